//! Looking at a topic as it goes by, for people: recent records only, from where it is now, without any promise. Nothing is committed,
//! what cannot be looked at in time is passed over, and nothing at all is read while nobody looks.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::{Clock, Timestamp};
use crate::log::{Admin, Backend, Limit, LogError, Polled, Session};
use crate::model::record::{Offset, Partition, Record, Topic};
use crate::runtime::driver::{self, Serve, Settings};
use crate::runtime::shutdown::Shutdown;
use crate::telemetry::server::Ready;

const READ: Limit = Limit { records: 500, bytes: 1 << 20 };
/// Whether somebody looks, and whether reading keeps up, is asked so often.
const LOOK: Duration = Duration::from_secs(1);
/// Who begins to look sees what lies within so many offsets of the end of each partition.
const HISTORY: u64 = 1_000;
/// Who is so far behind goes on near the end.
const LATE: Duration = Duration::from_secs(30);

/// A stage's logic.
pub trait Watch: Send + Sync + 'static {
    /// Whether anybody looks.
    fn is_watching(&self) -> bool;

    /// Takes what came. No waiting.
    fn take(&self, records: &[Record]);
}

/// Runs a stage until shutdown.
///
/// # Errors
/// As [`driver::keep`].
pub async fn run<B: Backend, W: Watch>(
    backend: B,
    watch: Arc<W>,
    settings: Settings,
    clock: Clock,
    shutdown: Shutdown,
    ready: Ready,
) -> Result<(), LogError> {
    let admin = backend.admin()?;
    let topic = settings.member.topic.clone();
    let serve = Watching::<B, W> { admin, watch, topic, clock: clock.clone(), shutdown: shutdown.clone() };
    driver::keep(&backend, &settings, &clock, &shutdown, ready, serve).await
}

struct Watching<B: Backend, W> {
    admin: B::Admin,
    watch: Arc<W>,
    topic: Topic,
    clock: Clock,
    shutdown: Shutdown,
}

/// How far a partition of ours is read. None: nothing is read.
type Parts = BTreeMap<Partition, Option<Place>>;

#[derive(Clone, Copy)]
struct Place {
    /// When the record that was read last was written.
    at: Timestamp,
    next: Offset,
}

impl<B: Backend, W: Watch> Serve<B::Session> for Watching<B, W> {
    async fn serve(&mut self, mut session: B::Session, ready: &mut Ready) -> Result<(), LogError> {
        ready.set(true);
        let ended = self.go(&mut session).await;
        session.close().await;
        ended
    }
}

impl<B: Backend, W: Watch> Watching<B, W> {
    async fn go(&self, session: &mut B::Session) -> Result<(), LogError> {
        let (mut parts, mut look_at) = (Parts::new(), self.clock.instant());
        loop {
            let polled = tokio::select! {
                biased;
                () = self.shutdown.begun() => return Ok(()),
                () = self.clock.sleep_until(look_at) => {
                    // A log that is away is no reason to leave: nobody has to see anything.
                    let _ = tokio::time::timeout(LOOK, self.look(session, &mut parts)).await;
                    look_at = self.clock.instant() + LOOK;
                    continue;
                }
                polled = session.poll(READ) => polled?,
            };
            match polled {
                Polled::Assigned(given) => parts.extend(given.into_iter().map(|it| (it.partition, None))),
                Polled::Revoked(gone) | Polled::Lost(gone) => parts.retain(|it, _| !gone.contains(it)),
                Polled::Records(records) => {
                    for record in &records {
                        if let Some(Some(place)) = parts.get_mut(&record.partition) {
                            *place = Place { at: record.timestamp, next: record.offset.just_after() };
                        }
                    }
                    self.watch.take(&records);
                }
                Polled::Idle => {}
            }
        }
    }

    /// Begins to read, stops it, or goes on near the end.
    async fn look(&self, session: &mut B::Session, parts: &mut Parts) -> Result<(), LogError> {
        let (is_watching, now) = (self.watch.is_watching(), self.clock.now());
        for (partition, place) in parts.iter_mut() {
            match (is_watching, *place) {
                (false, Some(_)) => {
                    session.pause(&[*partition])?;
                    *place = None;
                }
                (true, None) => *place = self.near_the_end(session, *partition, Offset::START).await?,
                (true, Some(last)) if now.since(last.at) > LATE => {
                    // Never back: it may only be quiet.
                    if let Some(ahead) = self.near_the_end(session, *partition, last.next).await? {
                        *place = Some(ahead);
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Goes on near the end, where that is ahead.
    async fn near_the_end(
        &self,
        session: &mut B::Session,
        partition: Partition,
        at_least: Offset,
    ) -> Result<Option<Place>, LogError> {
        let marks = self.admin.watermarks(&self.topic, partition).await?;
        let next = marks.stable.back(HISTORY).max(marks.start);
        if next < at_least {
            return Ok(None);
        }
        session.pause(&[partition])?;
        session.seek(partition, next)?;
        session.resume(&[partition])?;
        Ok(Some(Place { at: self.clock.now(), next }))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::log::embedded::Embedded;
    use crate::log::embedded::memory::Faults;
    use crate::log::topic::Topics;
    use crate::log::{Member, Publisher};
    use crate::model::record::{Addressed, Headers};
    use crate::telemetry::server::Readiness;

    #[derive(Default)]
    struct Seen {
        is_watching: AtomicBool,
        offsets: Mutex<Vec<Offset>>,
    }

    impl Watch for Seen {
        fn is_watching(&self) -> bool {
            self.is_watching.load(Ordering::Relaxed)
        }

        fn take(&self, records: &[Record]) {
            self.offsets.lock().unwrap().extend(records.iter().map(|record| record.offset));
        }
    }

    async fn publish(log: &Embedded, count: usize) {
        let record = || Addressed {
            topic: Topic::EVENTS,
            partition: Partition(0),
            key: None,
            value: Some("x".into()),
            headers: Headers::new(),
        };
        log.publisher().unwrap().publish((0..count).map(|_| record()).collect()).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn recent_records_are_seen_once_while_somebody_looks() {
        let clock = Clock::derived(Timestamp::from_millis(1_767_225_602_000));
        let log = Embedded::in_memory(Faults::none(), clock.clone()).await.unwrap();
        for spec in Topics::load(None).unwrap().iter() {
            log.admin().unwrap().create(spec).await.unwrap();
        }
        publish(&log, 1_500).await;
        let seen = Arc::new(Seen::default());
        let shutdown = Shutdown::new(Duration::from_secs(5));
        let settings = Settings {
            partitions: u32::MAX,
            member: Member {
                group: "g".into(),
                instance: "one".into(),
                topic: Topic::EVENTS,
                outputs: Vec::new(),
                state: None,
                session_timeout: Duration::from_secs(6),
                revoke_drain: Duration::from_secs(1),
            },
            commit_interval: Duration::from_millis(10),
            stage: "test",
        };
        let part = Readiness::default().part();
        let running =
            tokio::spawn(run(log.clone(), Arc::clone(&seen), settings, clock.clone(), shutdown.clone(), part));
        let count = || seen.offsets.lock().unwrap().len();
        clock.sleep(Duration::from_secs(10)).await;
        assert_eq!(count(), 0, "nobody looks");
        seen.is_watching.store(true, Ordering::Relaxed);
        clock.sleep(Duration::from_secs(10)).await;
        assert_eq!(count(), HISTORY as usize, "what was lately");
        // Quiet for long: nothing is seen again.
        clock.sleep(Duration::from_secs(300)).await;
        assert_eq!(count(), HISTORY as usize);
        publish(&log, 10).await;
        clock.sleep(Duration::from_secs(5)).await;
        assert_eq!(count(), HISTORY as usize + 10);
        seen.is_watching.store(false, Ordering::Relaxed);
        clock.sleep(Duration::from_secs(5)).await;
        publish(&log, 10).await;
        clock.sleep(Duration::from_secs(5)).await;
        assert_eq!(count(), HISTORY as usize + 10, "nobody looks any more");
        shutdown.begin();
        running.await.unwrap().unwrap();
        let mut offsets = seen.offsets.lock().unwrap().clone();
        offsets.dedup();
        assert_eq!(offsets.len(), HISTORY as usize + 10, "each once, in order");
    }
}
