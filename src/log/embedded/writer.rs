//! The one task that writes. What waits while a transaction runs goes into the next one together: group commit.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use crate::clock::Clock;
use crate::log::LogError;
use crate::model::record::{Addressed, Partition, Topic};
use crate::telemetry::metrics::metrics;

use super::store::{NoSuchPartition, Position, Store, Transaction};
use super::{Access, Ends, FOREIGN_POLL};

/// Requests that wait while one transaction runs. Publishers wait for their turn beyond it.
const QUEUE: usize = 1_024;
/// One transaction takes at most so much: a larger one would make everybody wait for its sync.
const TRANSACTION_BYTES: usize = 8 << 20;
/// Expired records stay for this long at most, beside what their retention says.
const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(30);
/// At 100 MB/s the WAL grows by that much beyond its bound, and the disk's reserve lasts.
const SPACE_CHECK_INTERVAL: Duration = Duration::from_millis(500);
/// A WAL that another process keeps from being reset is left alone for this long.
const WAL_RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// Is the sender still the owner? Asked when the request's turn has come.
pub type Fence = Box<dyn FnOnce() -> Result<(), LogError> + Send>;

pub struct Request {
    pub records: Vec<Addressed>,
    pub positions: Vec<Position>,
    /// Which commit of which session this is; none for publishers.
    pub commit: Option<(String, u64)>,
    pub fence: Option<Fence>,
    pub done: oneshot::Sender<Result<(), LogError>>,
}

pub struct Writer {
    ends: Arc<Ends>,
    queue: Mutex<Option<mpsc::Sender<Request>>>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    /// New events are refused, so that room is left for commits and for deleting.
    is_short: Arc<AtomicBool>,
    /// Dropped to stop what runs beside the writer.
    running: Mutex<Option<watch::Sender<()>>>,
}

impl Writer {
    pub fn start(store: Store, ends: Arc<Ends>, clock: Clock, access: Access) -> Self {
        let (queue, requests) = mpsc::channel(QUEUE);
        let known = Arc::clone(&ends);
        let turn = run(store.clone(), Arc::clone(&ends), clock.clone(), requests);
        let (is_short, running) = (Arc::<AtomicBool>::default(), watch::Sender::new(()));
        let foreign = watch_foreign(store.clone(), ends, clock.clone());
        let mut tasks = vec![tokio::spawn(turn), tokio::spawn(until_closed(running.subscribe(), foreign))];
        if access == Access::Engine && matches!(store, Store::Memory(_)) {
            tasks.push(tokio::spawn(until_closed(running.subscribe(), maintain(store, clock))));
        } else if access == Access::Engine {
            let bounding = bound(store.clone(), Arc::clone(&is_short), clock.clone());
            tasks.push(tokio::spawn(until_closed(running.subscribe(), bounding)));
            tasks.push(tokio::spawn(until_closed(running.subscribe(), maintain(store, clock))));
        }
        let (queue, tasks) = (Mutex::new(Some(queue)), Mutex::new(tasks));
        Self { ends: known, queue, tasks, is_short, running: Mutex::new(Some(running)) }
    }

    /// Hands a request over and waits until it is on disk.
    pub async fn write(
        &self,
        records: Vec<Addressed>,
        positions: Vec<Position>,
        commit: Option<(String, u64)>,
        fence: Option<Fence>,
    ) -> Result<(), LogError> {
        // Checked before it joins others in a transaction, which it would take down with it.
        if let Some(stray) = records.iter().find(|record| !self.ends.knows(&record.topic, record.partition)) {
            let (topic, partition) = (stray.topic.clone(), stray.partition);
            return Err(LogError::fatal(NoSuchPartition { topic, partition }));
        }
        // A session's commit ends what the log has already, and is taken.
        if commit.is_none() && !records.is_empty() && self.is_short.load(Ordering::Relaxed) {
            return Err(LogError::transient("the disk of the embedded log is nearly full: it takes no new records"));
        }
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let closed = || LogError::transient("the embedded log is closed");
        let queue = queue.ok_or_else(closed)?;
        let (done, answer) = oneshot::channel();
        queue.send(Request { records, positions, commit, fence, done }).await.map_err(|_| closed())?;
        drop(queue);
        answer.await.map_err(|_| closed())?
    }

    /// Takes no more, and waits for what was taken.
    pub async fn close(&self) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        let tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        for task in tasks {
            // A panic of the task has been reported by the runtime; there is nothing left to close then.
            let _ = task.await;
        }
    }
}

async fn run(store: Store, ends: Arc<Ends>, clock: Clock, mut requests: mpsc::Receiver<Request>) {
    while let Some(first) = requests.recv().await {
        let mut turn = vec![first];
        let size = |request: &Request| request.records.iter().map(Addressed::size).sum::<usize>();
        let mut bytes = size(&turn[0]);
        while bytes < TRANSACTION_BYTES
            && let Ok(more) = requests.try_recv()
        {
            bytes += size(&more);
            turn.push(more);
        }
        let mut accepted = Vec::with_capacity(turn.len());
        for mut request in turn {
            match request.fence.take().map_or(Ok(()), |fence| fence()) {
                Ok(()) => accepted.push(request),
                Err(refused) => drop(request.done.send(Err(refused))),
            }
        }
        write(&store, &ends, &clock, accepted).await;
    }
}

async fn write(store: &Store, ends: &Ends, clock: &Clock, mut accepted: Vec<Request>) {
    let mut what = Transaction::default();
    let mut batches: BTreeMap<(Topic, Partition), Vec<Addressed>> = BTreeMap::new();
    for request in &mut accepted {
        for record in std::mem::take(&mut request.records) {
            batches.entry((record.topic.clone(), record.partition)).or_default().push(record);
        }
        what.positions.append(&mut request.positions);
        what.commits.extend(request.commit.clone());
    }
    what.batches = batches.into_iter().collect();
    match store.write(&what, clock.now()).await {
        Ok(grown) => {
            ends.note(grown);
            for request in accepted {
                // Who no longer waits has given up; the records are stored all the same.
                let _ = request.done.send(Ok(()));
            }
        }
        Err(error) => {
            let error = error.to_string();
            for request in accepted {
                let _ = request.done.send(settle(store, ends, &request.commit, &error).await);
            }
        }
    }
}

/// A write that failed may have been stored all the same. Of a session's commit that can be known; a publisher is told to
/// try again.
async fn settle(store: &Store, ends: &Ends, commit: &Option<(String, u64)>, error: &str) -> Result<(), LogError> {
    let Some((session, number)) = commit else { return Err(LogError::transient(error)) };
    match store.last_commit(session).await {
        Ok(Some(last)) if last >= *number => {
            if let Ok(found) = store.ends().await {
                ends.note(found);
            }
            Ok(())
        }
        Ok(_) => Err(LogError::transient(error)),
        Err(unknown) => Err(LogError::broken(format!("{error}; and whether it was stored is unknown: {unknown}"))),
    }
}

/// Runs until the log is closed. A transaction that is cut off is rolled back.
async fn until_closed(mut running: watch::Receiver<()>, task: impl Future<Output = ()>) {
    tokio::select! {
        () = task => {}
        _ = running.changed() => {}
    }
}

/// Notices what other processes write into the file.
async fn watch_foreign(store: Store, ends: Arc<Ends>, clock: Clock) {
    loop {
        clock.sleep(FOREIGN_POLL).await;
        if let Ok(found) = store.ends().await {
            ends.note(found);
        }
    }
}

/// Keeps the file small.
async fn maintain(store: Store, clock: Clock) {
    loop {
        clock.sleep(MAINTENANCE_INTERVAL).await;
        if let Err(error) = store.maintain(clock.now()).await {
            tracing::warn!(%error, "maintenance of the embedded log failed, trying again in {MAINTENANCE_INTERVAL:?}");
        }
    }
}

/// Keeps the WAL within its bound, and tells when the disk is nearly full.
async fn bound(store: Store, is_short: Arc<AtomicBool>, clock: Clock) {
    let mut reset_at = clock.instant();
    loop {
        clock.sleep(SPACE_CHECK_INTERVAL).await;
        if clock.instant() >= reset_at {
            let reset = store.bound_wal().await;
            if !matches!(reset, Ok(true)) {
                reset_at = clock.instant() + WAL_RETRY_INTERVAL;
                let error = reset.err().map_or_else(|| "another process reads".to_owned(), |error| error.to_string());
                tracing::warn!(error, "the WAL of the embedded log cannot be reset, it grows until it can");
            }
        }
        let Ok(Some(space)) = store.space().await else { continue };
        for (place, bytes) in [("disk", space.disk), ("file", space.file)] {
            metrics().log_free_bytes.with_label_values(&[place]).set(i64::try_from(bytes).unwrap_or(i64::MAX));
        }
        let (short, before) = (space.is_short(), is_short.swap(space.is_short(), Ordering::Relaxed));
        if short && !before {
            let (disk, file) = (space.disk, space.file);
            tracing::error!(
                disk,
                file,
                "the disk of the embedded log is nearly full: new events are refused with 503 until there is room"
            );
        } else if before && !short {
            tracing::info!("the embedded log takes new events again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Embedded;
    use super::super::memory::Faults;
    use super::*;
    use crate::log::topic::Topics;
    use crate::log::{Admin, Backend};
    use crate::model::record::Headers;

    #[tokio::test]
    async fn a_nearly_full_disk_refuses_events_and_takes_commits() {
        let log = Embedded::in_memory(Faults::none(), Clock::system()).await.expect("a log");
        for spec in Topics::load(None).expect("the topics").iter() {
            log.admin().expect("an admin").create(spec).await.expect("created");
        }
        let writer = &log.0.writer;
        let one = || {
            let (topic, value) = (Topic::EVENTS, Some("e".into()));
            vec![Addressed { topic, partition: Partition(0), key: None, value, headers: Headers::new() }]
        };
        writer.is_short.store(true, Ordering::Relaxed);
        let refused = writer.write(one(), Vec::new(), None, None).await;
        assert!(matches!(refused, Err(LogError::Transient(_))), "{refused:?}");
        writer.write(one(), Vec::new(), Some(("s".into(), 1)), None).await.expect("a commit is taken");
        writer.is_short.store(false, Ordering::Relaxed);
        writer.write(one(), Vec::new(), None, None).await.expect("there is room again");
    }
}
