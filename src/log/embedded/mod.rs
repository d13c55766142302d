//! The embedded log: for one machine (`dev`, trials, tests). A durable log in one SQLite file, or in memory, with the same
//! sessions, groups and commits as a cluster has.
//!
//! A row is a *batch* of records, never one record, and one task writes: everything that waits when it is free goes into one
//! SQLite transaction (group commit), so a thousand small publishers cost one fsync. A [`Commit`] is part of such a
//! transaction: outputs, offsets and progress are exactly once. Offsets are given inside the transaction, so other processes
//! (the command line) may open the same file and publish while the engine runs; their records are noticed within
//! [`FOREIGN_POLL`]. It never pretends to be a cluster: a second engine on one file is refused.
//!
//! Groups live in this process (`coordinator`), with the same rules as on a broker: cooperative hand-over, session
//! time-outs, fencing of an older session of the same instance.

mod admin;
mod coordinator;
mod frame;
pub mod memory;
mod publisher;
mod reader;
mod session;
mod sqlite;
mod store;
mod writer;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::clock::Clock;
use crate::log::{Backend, LogError, Member};
use crate::model::id::InstanceId;
use crate::model::record::{Offset, Partition, Topic};

use coordinator::Coordinator;
use memory::{Faults, MemoryStore};
use sqlite::SqliteStore;
use store::Store;
use writer::Writer;

pub use admin::EmbeddedAdmin;
pub use publisher::EmbeddedPublisher;
pub use reader::EmbeddedReader;
pub use session::{EmbeddedCommitter, EmbeddedSession};

/// How soon records that another process wrote into the file are seen.
const FOREIGN_POLL: Duration = Duration::from_millis(100);

/// Who opens the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The engine: one at a time, and it does the maintenance.
    Engine,
    /// A command beside it: the file must be there.
    Command,
    /// A command that may create it.
    Setup,
}

/// An open embedded log. Clones share it.
#[derive(Clone)]
pub struct Embedded(Arc<Shared>);

struct Shared {
    store: Store,
    writer: Writer,
    groups: Mutex<Coordinator>,
    ends: Arc<Ends>,
    clock: Clock,
    /// None in memory.
    folder: Option<PathBuf>,
    /// Held as long as the engine runs.
    lock: Option<std::fs::File>,
}

/// Where each partition ends, and a bell for those who wait for more.
pub(crate) struct Ends {
    known: Mutex<HashMap<(Topic, Partition), Offset>>,
    version: watch::Sender<u64>,
}

impl Ends {
    fn new() -> Self {
        Self { known: Mutex::default(), version: watch::Sender::new(0) }
    }

    /// Notes where partitions end now and rings if that is news.
    fn note(&self, ends: impl IntoIterator<Item = ((Topic, Partition), Offset)>) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut news = false;
        for (partition, end) in ends {
            let slot = known.entry(partition).or_default();
            // A topic that is new is no news for readers until something is in it.
            if end > *slot {
                *slot = end;
                news = true;
            }
        }
        drop(known);
        if news {
            self.version.send_modify(|version| *version += 1);
        }
    }

    fn of(&self, topic: &Topic, partition: Partition) -> Offset {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(&(topic.clone(), partition)).copied().unwrap_or_default()
    }

    fn knows(&self, topic: &Topic, partition: Partition) -> bool {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&(topic.clone(), partition))
    }

    fn subscribe(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }
}

impl Embedded {
    /// Opens (and creates) the log in `folder`.
    ///
    /// # Errors
    /// [`LogError::Fatal`] where another engine runs on it, or the file cannot be opened.
    pub async fn open(folder: &Path, access: Access, clock: Clock) -> Result<Self, LogError> {
        let file = folder.join("log.sqlite");
        if access == Access::Command && !file.exists() {
            let folder = folder.display();
            return Err(LogError::fatal(format!("there is no embedded log in {folder} (log.embedded.data_dir)")));
        }
        std::fs::create_dir_all(folder)
            .map_err(|error| LogError::fatal(format!("data folder {}: {error}", folder.display())))?;
        let lock = match access {
            Access::Engine => Some(lock(folder)?),
            Access::Command | Access::Setup => None,
        };
        let store = SqliteStore::open(&file).await.map_err(LogError::fatal)?;
        Self::start(Store::Sqlite(store), access, clock, Some((folder, lock))).await
    }

    /// A log that lives in memory, with the faults that `faults` decides.
    ///
    /// # Errors
    /// None today; the signature is that of [`Embedded::open`].
    pub async fn in_memory(faults: Faults, clock: Clock) -> Result<Self, LogError> {
        Self::start(Store::Memory(MemoryStore::new(faults)), Access::Engine, clock, None).await
    }

    /// From now on these go wrong. A log in a file has only its own faults.
    pub fn inject(&self, faults: Faults) {
        if let Store::Memory(store) = &self.0.store {
            store.set(faults);
        }
    }

    /// A member of a group counts as having been silent for too long, as if it had been cut off.
    pub fn cut_off(&self, group: &str, topic: &Topic, instance: &InstanceId) {
        self.groups().cut_off(&(group.to_owned(), topic.clone()), instance);
    }

    async fn start(
        store: Store,
        access: Access,
        clock: Clock,
        place: Option<(&Path, Option<std::fs::File>)>,
    ) -> Result<Self, LogError> {
        let ends = Arc::new(Ends::new());
        ends.note(store.ends().await.map_err(LogError::fatal)?);
        let writer = Writer::start(store.clone(), Arc::clone(&ends), clock.clone(), access);
        let groups = Mutex::new(Coordinator::new());
        let (folder, lock) = place.map_or((None, None), |(folder, lock)| (Some(folder.to_owned()), lock));
        Ok(Self(Arc::new(Shared { store, writer, groups, ends, clock, folder, lock })))
    }

    /// Finishes what is being written and closes the file.
    pub async fn close(&self) {
        self.0.writer.close().await;
        self.0.store.close().await;
    }

    /// Keeps engines away until it is dropped, where this process is none.
    fn exclude_engines(&self) -> Result<Option<std::fs::File>, LogError> {
        match (&self.0.folder, &self.0.lock) {
            (Some(folder), None) => lock(folder).map(Some),
            _ => Ok(None),
        }
    }

    /// Keeps other processes out of a group until it is dropped: a group lives in one process. The engine has its own lock.
    fn exclude_members(&self, group: &str) -> Result<Option<std::fs::File>, LogError> {
        match (&self.0.folder, &self.0.lock) {
            (Some(folder), None) => {
                let taken =
                    || format!("another process is in group {group} on {}: end that one first", folder.display());
                lock_file(&folder.join(format!("{group}.lock")), taken).map(Some)
            }
            _ => Ok(None),
        }
    }

    fn groups(&self) -> std::sync::MutexGuard<'_, Coordinator> {
        self.0.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backend for Embedded {
    type Session = EmbeddedSession;
    type Publisher = EmbeddedPublisher;
    type Reader = EmbeddedReader;
    type Admin = EmbeddedAdmin;

    async fn session(&self, member: Member) -> Result<EmbeddedSession, LogError> {
        EmbeddedSession::join(self.clone(), member).await
    }

    fn publisher(&self) -> Result<EmbeddedPublisher, LogError> {
        Ok(EmbeddedPublisher::new(self.clone()))
    }

    async fn reader(&self, topic: &Topic, partition: Partition, from: Offset) -> Result<EmbeddedReader, LogError> {
        Ok(EmbeddedReader::new(self.clone(), topic.clone(), partition, from))
    }

    fn admin(&self) -> Result<EmbeddedAdmin, LogError> {
        Ok(EmbeddedAdmin::new(self.clone()))
    }
}

fn lock(folder: &Path) -> Result<std::fs::File, LogError> {
    lock_file(&folder.join("engine.lock"), || {
        format!(
            "another engine is running on the data folder {}; stop it, or give this one a folder of its own (--data-dir)",
            folder.display()
        )
    })
}

/// Holds a lock as long as the file is open. `taken`: what to say where somebody else holds it.
fn lock_file(path: &Path, taken: impl FnOnce() -> String) -> Result<std::fs::File, LogError> {
    let failed = |error: &dyn std::fmt::Display| LogError::fatal(format!("{}: {error}", path.display()));
    let file = std::fs::OpenOptions::new().create(true).write(true).truncate(false).open(path);
    let file = file.map_err(|error| failed(&error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(LogError::fatal(taken())),
        Err(std::fs::TryLockError::Error(error)) => Err(failed(&error)),
    }
}
