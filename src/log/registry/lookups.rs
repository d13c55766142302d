//! Answers that are asked for once, kept, and asked for again after a failure.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::clock::Clock;

/// After a failure nobody asks again for so long.
const AGAIN: Duration = Duration::from_secs(2);
/// After "there is no such thing": for so long. It may come.
const ABSENT: Duration = Duration::from_secs(60);
/// Answers that are kept. There are few schemas; this bounds what garbage can make one ask.
const KEPT: usize = 10_000;

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Asking again will not help; a person has to mend something.
    pub is_permanent: bool,
    pub text: String,
}

enum Answer<V> {
    Asked,
    /// Since when; for ever, if it is one that lasts.
    Known(Instant, V),
    Failed(Instant, Failure),
}

pub struct Lookups<K, V> {
    answers: Mutex<HashMap<K, Answer<V>>>,
    changed: Notify,
    lasts: fn(&V) -> bool,
}

impl<K: Clone + Eq + Hash + Send + 'static, V: Clone + Send + 'static> Lookups<K, V> {
    /// An answer that does not last is asked for again after a while.
    pub fn new(lasts: fn(&V) -> bool) -> Arc<Self> {
        Arc::new(Self { answers: Mutex::default(), changed: Notify::new(), lasts })
    }

    fn put(&self, key: K, answer: Answer<V>) {
        self.answers().insert(key, answer);
        self.changed.notify_waiters();
    }

    #[cfg(test)]
    pub fn tell(&self, key: K, value: V) {
        self.put(key, Answer::Known(Clock::system().instant(), value));
    }

    fn answers(&self) -> MutexGuard<'_, HashMap<K, Answer<V>>> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known by now; where nothing is, it is asked for in a task of its own, since whoever waits may be gone before the
    /// answer. None: it is under way.
    pub fn look<F>(self: &Arc<Self>, key: &K, ask: impl FnOnce(K) -> F) -> Result<Option<V>, Failure>
    where
        F: Future<Output = Result<V, Failure>> + Send + 'static,
    {
        let mut answers = self.answers();
        match answers.get(key) {
            Some(Answer::Known(at, value)) if (self.lasts)(value) || at.elapsed() < ABSENT => {
                return Ok(Some(value.clone()));
            }
            Some(Answer::Asked) => return Ok(None),
            Some(Answer::Failed(at, failure)) if at.elapsed() < AGAIN => return Err(failure.clone()),
            Some(Answer::Known(..) | Answer::Failed(..)) | None => {}
        }
        if answers.len() >= KEPT {
            answers.retain(|_, answer| matches!(answer, Answer::Asked));
        }
        answers.insert(key.clone(), Answer::Asked);
        let (lookups, asked, key) = (Arc::clone(self), ask(key.clone()), key.clone());
        tokio::spawn(async move {
            // In a task of its own: whoever waits must not wait for one that has crashed.
            let asked = tokio::spawn(asked).await;
            let crashed = |error: tokio::task::JoinError| Failure { is_permanent: false, text: error.to_string() };
            let now = Clock::system().instant();
            let answer = match asked.map_err(crashed).flatten() {
                Ok(value) => Answer::Known(now, value),
                Err(failure) => Answer::Failed(now, failure),
            };
            lookups.put(key, answer);
        });
        Ok(None)
    }

    /// The same, when the answer is there.
    pub async fn get<F>(self: &Arc<Self>, key: &K, ask: impl Fn(K) -> F) -> Result<V, Failure>
    where
        F: Future<Output = Result<V, Failure>> + Send + 'static,
    {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Before the look: an answer that comes between the two must not be missed.
            changed.as_mut().enable();
            match self.look(key, &ask) {
                Ok(Some(value)) => return Ok(value),
                Ok(None) => changed.await,
                Err(failure) => return Err(failure),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn failure(text: &str) -> Failure {
        Failure { is_permanent: false, text: text.into() }
    }

    #[tokio::test(start_paused = true)]
    async fn many_ask_at_once_and_one_question_goes_out() {
        let (lookups, asked) = (Lookups::<u32, u32>::new(|_| true), Arc::new(AtomicUsize::new(0)));
        let ask = |key: u32| {
            let asked = Arc::clone(&asked);
            async move {
                asked.fetch_add(1, Ordering::Relaxed);
                Clock::system().sleep(Duration::from_millis(10)).await;
                Ok(key + 1)
            }
        };
        let (a, b) = tokio::join!(lookups.get(&1, ask), lookups.get(&1, ask));
        assert_eq!((a, b, lookups.get(&1, ask).await), (Ok(2), Ok(2), Ok(2)));
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_is_told_for_a_while_and_then_asked_about_again() {
        let lookups = Lookups::<u32, u32>::new(|_| true);
        assert_eq!(lookups.get(&1, |_| async { Err(failure("away")) }).await, Err(failure("away")));
        assert_eq!(lookups.get(&1, |_| async { Ok(5) }).await, Err(failure("away")), "not asked yet");
        Clock::system().sleep(AGAIN).await;
        assert_eq!(lookups.get(&1, |_| async { Ok(5) }).await, Ok(5));
    }

    #[tokio::test(start_paused = true)]
    async fn who_stops_waiting_does_not_stop_the_question() {
        let lookups = Lookups::<u32, u32>::new(|_| true);
        let slow = |_| async {
            Clock::system().sleep(Duration::from_secs(1)).await;
            Ok(5)
        };
        assert!(tokio::time::timeout(Duration::from_millis(1), lookups.get(&1, slow)).await.is_err());
        assert_eq!(lookups.get(&1, |_| async { Err(failure("asked twice")) }).await, Ok(5));
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_not_there_is_asked_for_again_and_a_crash_is_a_failure() {
        let lookups = Lookups::<u32, Option<u32>>::new(Option::is_some);
        assert_eq!(lookups.get(&1, |_| async { Ok(None) }).await, Ok(None));
        assert_eq!(lookups.get(&1, |_| async { Ok(Some(5)) }).await, Ok(None));
        Clock::system().sleep(ABSENT).await;
        assert_eq!(lookups.get(&1, |_| async { Ok(Some(5)) }).await, Ok(Some(5)));
        Clock::system().sleep(ABSENT).await;
        assert_eq!(lookups.get(&1, |_| async { Ok(None) }).await, Ok(Some(5)));
        let crash = |_| async { Ok(Some([1_u32].into_iter().find(|it| *it == 2).expect("planted"))) };
        assert!(lookups.get(&2, crash).await.is_err());
    }
}
