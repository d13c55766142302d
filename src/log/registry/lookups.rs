//! Answers that are asked for once, kept, and asked for again after a failure.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::clock::Clock;

/// After a failure, and after "there is no such thing", nobody asks again for so long.
const AGAIN: Duration = Duration::from_secs(2);

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Asking again will not help; a person has to mend something.
    pub is_permanent: bool,
    pub text: String,
}

enum Answer<V> {
    Asked,
    Known(V),
    /// There is none, or there was none at that time.
    Failed(Instant, Failure),
}

pub struct Lookups<K, V> {
    answers: Mutex<HashMap<K, Answer<V>>>,
    changed: Notify,
}

impl<K: Clone + Eq + Hash + Send + 'static, V: Clone + Send + 'static> Lookups<K, V> {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { answers: Mutex::default(), changed: Notify::new() })
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
            Some(Answer::Known(value)) => return Ok(Some(value.clone())),
            Some(Answer::Asked) => return Ok(None),
            Some(Answer::Failed(at, failure)) if at.elapsed() < AGAIN => return Err(failure.clone()),
            Some(Answer::Failed(..)) | None => {}
        }
        answers.insert(key.clone(), Answer::Asked);
        let (lookups, asked, key) = (Arc::clone(self), ask(key.clone()), key.clone());
        tokio::spawn(async move {
            let answer = match asked.await {
                Ok(value) => Answer::Known(value),
                Err(failure) => Answer::Failed(Clock::system().instant(), failure),
            };
            lookups.answers().insert(key, answer);
            lookups.changed.notify_waiters();
        });
        Ok(None)
    }

    /// Waits until there is some new answer, at most so long.
    pub async fn changed(&self, at_most: Duration) {
        let _ = tokio::time::timeout(at_most, self.changed.notified()).await;
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
        let (lookups, asked) = (Lookups::<u32, u32>::new(), Arc::new(AtomicUsize::new(0)));
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
        let lookups = Lookups::<u32, u32>::new();
        assert_eq!(lookups.get(&1, |_| async { Err(failure("away")) }).await, Err(failure("away")));
        assert_eq!(lookups.get(&1, |_| async { Ok(5) }).await, Err(failure("away")), "not asked yet");
        Clock::system().sleep(AGAIN).await;
        assert_eq!(lookups.get(&1, |_| async { Ok(5) }).await, Ok(5));
    }

    #[tokio::test(start_paused = true)]
    async fn who_stops_waiting_does_not_stop_the_question() {
        let lookups = Lookups::<u32, u32>::new();
        let slow = |_| async {
            Clock::system().sleep(Duration::from_secs(1)).await;
            Ok(5)
        };
        assert!(tokio::time::timeout(Duration::from_millis(1), lookups.get(&1, slow)).await.is_err());
        assert_eq!(lookups.get(&1, |_| async { Err(failure("asked twice")) }).await, Ok(5));
    }
}
