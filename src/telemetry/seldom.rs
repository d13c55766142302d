//! Log lines that would repeat themselves: a broker that is away is told of by each client many times a second.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::clock::Clock;

/// Lines of one kind are so far apart.
const APART: Duration = Duration::from_secs(5);
/// Kinds that are kept in mind. They are few; this bounds a surprise.
const KINDS: usize = 1_000;

/// When a line of a kind was written last, and how many were left out since.
#[derive(Default)]
struct Kept(HashMap<(&'static str, String), (Instant, u64)>);

static KEPT: LazyLock<Mutex<Kept>> = LazyLock::new(Mutex::default);

/// Whether a line of this kind is to be written now, and how many were left out before it (`None` inside: none).
pub fn due(what: &'static str, kind: &str) -> Option<Option<u64>> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner).due(what, kind, Clock::system().instant())
}

impl Kept {
    fn due(&mut self, what: &'static str, kind: &str, now: Instant) -> Option<Option<u64>> {
        let key = (what, kind.to_owned());
        if let Some((last, left_out)) = self.0.get_mut(&key) {
            if now < *last + APART {
                *left_out += 1;
                return None;
            }
            *last = now;
            let before = std::mem::take(left_out);
            return Some((before > 0).then_some(before));
        }
        if self.0.len() >= KINDS {
            self.0.clear();
        }
        self.0.insert(key, (now, 0));
        Some(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_told_once_in_a_while_with_what_was_left_out() {
        let (mut kept, start) = (Kept::default(), Clock::system().instant());
        let mut at = |kind: &str, seconds| kept.due("w", kind, start + Duration::from_secs(seconds));
        assert_eq!(at("a", 0), Some(None));
        assert_eq!((at("a", 1), at("a", 4), at("b", 4)), (None, None, Some(None)));
        assert_eq!(at("a", 5), Some(Some(2)));
        assert_eq!(at("a", 10), Some(None));
    }

    #[test]
    fn kinds_without_end_do_not_fill_the_memory() {
        let (mut kept, now) = (Kept::default(), Clock::system().instant());
        for number in 0..KINDS * 3 {
            assert_eq!(kept.due("w", &number.to_string(), now), Some(None));
        }
        assert!(kept.0.len() <= KINDS);
    }
}
