//! The one task that writes. What waits while a transaction runs goes into the next one together: group commit.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::clock::Clock;
use crate::log::LogError;
use crate::model::record::{Addressed, Partition, Topic};

use super::store::{NoSuchPartition, Position, Store, Transaction};
use super::{Access, Ends, FOREIGN_POLL};

/// Requests that wait while one transaction runs. Publishers wait for their turn beyond it.
const QUEUE: usize = 1_024;
/// One transaction takes at most so much: a larger one would make everybody wait for its sync.
const TRANSACTION_BYTES: usize = 8 << 20;
const MAINTENANCE: Duration = Duration::from_secs(30);

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
}

impl Writer {
    pub fn start(store: Store, ends: Arc<Ends>, clock: Clock, access: Access) -> Self {
        let (queue, requests) = mpsc::channel(QUEUE);
        let known = Arc::clone(&ends);
        let turn = run(store.clone(), Arc::clone(&ends), clock.clone(), requests);
        let look = look_around(store, ends, clock, access, queue.downgrade());
        let tasks = vec![tokio::spawn(turn), tokio::spawn(look)];
        Self { ends: known, queue: Mutex::new(Some(queue)), tasks: Mutex::new(tasks) }
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

/// Notices what other processes write into the file and, for the engine, keeps the file small.
async fn look_around(store: Store, ends: Arc<Ends>, clock: Clock, access: Access, alive: mpsc::WeakSender<Request>) {
    let mut maintained = clock.instant();
    while alive.upgrade().is_some() {
        clock.sleep(FOREIGN_POLL).await;
        if let Ok(found) = store.ends().await {
            ends.note(found);
        }
        if access == Access::Engine && maintained.elapsed() >= MAINTENANCE {
            maintained = clock.instant();
            if let Err(error) = store.maintain(clock.now()).await {
                tracing::warn!(%error, "maintenance of the embedded log failed");
            }
        }
    }
}
