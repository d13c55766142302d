//! The driver: one loop that polls a session, feeds the workers, and commits what they have finished.
//!
//! It never waits for a worker. Records are try-sent; what does not go in stays in one bounded stash, and that partition is
//! paused. Workers never push results: the driver asks each for its changes. So neither can block the other. What has been
//! collected stays here until a commit has succeeded: a failed one is repeated with it, without partitions that were lost, and
//! nothing is done again.

mod lease;
mod own;
mod pending;
#[cfg(test)]
mod tests;
mod watchdog;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot};

use crate::clock::Clock;
use crate::log::{Assignment, Backend, Committed, LogError, Member};
use crate::model::record::{Addressed, Offset, Record};
use crate::runtime::shutdown::Shutdown;
use crate::telemetry::events;
use crate::telemetry::server::Ready;

pub use lease::Lease;

/// Batches that wait in front of a worker. More would be memory without more speed.
const INBOX_BATCHES: usize = 4;
/// So many sessions in a row fenced, each so soon after it had joined: two processes use one instance id, and a person must
/// choose another. They take the session from each other within seconds. Once alone says little: a broker that was away can
/// believe a member's second try to join to be somebody else.
const FENCED_IN_A_ROW: u32 = 5;
const FENCED_AT_ONCE: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(500);

/// What a worker is asked.
pub enum Ask {
    /// What has changed since the last time, if anything.
    Collect(oneshot::Sender<Option<Changes>>),
    /// What was collected so far is committed.
    Committed,
    /// Start nothing new; answer when nothing is under way.
    Drain(oneshot::Sender<()>),
}

/// What a worker has finished since it was asked last.
#[derive(Debug)]
pub struct Changes {
    pub outputs: Vec<Addressed>,
    /// Written behind everything else of the transaction: the partition's progress record.
    pub last: Option<Addressed>,
    pub position: Committed,
}

/// A worker's end of the driver.
pub struct Inbox {
    pub records: mpsc::Receiver<Vec<Record>>,
    pub asks: mpsc::UnboundedReceiver<Ask>,
    /// Takes the offset to read from, once, when the worker is ready for records.
    pub ready: oneshot::Sender<Offset>,
    pub bell: Arc<Bell>,
    pub lease: Arc<Lease>,
}

/// How a worker gets the driver's attention.
#[derive(Default)]
pub struct Bell {
    wake: Notify,
    full: Notify,
}

impl Bell {
    /// There is room again, or there are changes.
    pub fn ring(&self) {
        self.wake.notify_one();
    }

    /// There is so much to commit that nothing more can be done before: the next commit is due at once.
    pub fn ring_full(&self) {
        self.full.notify_one();
    }
}

/// What runs in a worker.
pub trait Work: Send + Sync + 'static {
    /// Runs a partition until its inbox closes. Aborted at any await when the assignment is lost.
    fn run(self: Arc<Self>, assignment: Assignment, inbox: Inbox) -> impl Future<Output = Result<(), LogError>> + Send;
}

#[derive(Clone, Debug)]
pub struct Settings {
    pub member: Member,
    /// How many partitions of the input topic are declared. Others, which somebody has added by hand, are not served: nothing
    /// that belongs to them (progress, placement) is there.
    pub partitions: u32,
    /// Commits are at least so far apart.
    pub commit_interval: Duration,
    /// The stage's name in metrics and log lines.
    pub stage: &'static str,
}

/// What is done with a session as long as it lasts.
pub trait Serve<S>: Send {
    /// Ends without an error when the shutdown has begun.
    fn serve(&mut self, session: S, ready: &mut Ready) -> impl Future<Output = Result<(), LogError>> + Send;
}

/// Runs a stage's partitions, each by a worker, until shutdown.
///
/// # Errors
/// As [`keep`].
pub async fn run<B: Backend, W: Work>(
    backend: B,
    work: Arc<W>,
    settings: Settings,
    clock: Clock,
    shutdown: Shutdown,
    ready: Ready,
) -> Result<(), LogError> {
    let drive = Drive { backend: &backend, work, settings: &settings, clock: &clock, shutdown: &shutdown };
    keep(&backend, &settings, &clock, &shutdown, ready, drive).await
}

struct Drive<'a, B, W> {
    backend: &'a B,
    work: Arc<W>,
    settings: &'a Settings,
    clock: &'a Clock,
    shutdown: &'a Shutdown,
}

impl<B: Backend, W: Work> Serve<B::Session> for Drive<'_, B, W> {
    async fn serve(&mut self, session: B::Session, ready: &mut Ready) -> Result<(), LogError> {
        let work = Arc::clone(&self.work);
        own::Driver::new(self.backend.clone(), session, work, self.settings, self.clock, self.shutdown).run(ready).await
    }
}

/// Keeps a stage's session until shutdown, building a new one whenever it has to.
///
/// # Errors
/// [`LogError::Fatal`], with what a person has to mend.
pub async fn keep<B: Backend>(
    backend: &B,
    settings: &Settings,
    clock: &Clock,
    shutdown: &Shutdown,
    mut ready: Ready,
    mut serve: impl Serve<B::Session>,
) -> Result<(), LogError> {
    let (mut fenced, mut cause) = (0, "start");
    while !shutdown.has_begun() {
        events::session(settings.stage, cause);
        let opened = tokio::select! {
            biased;
            opened = backend.session(settings.member.clone()) => opened,
            () = shutdown.begun() => return Ok(()),
        };
        let joined_at = clock.instant();
        let ended = match opened {
            Ok(session) => serve.serve(session, &mut ready).await,
            Err(error) => Err(error),
        };
        ready.set(false);
        match ended {
            Ok(()) => return Ok(()),
            Err(LogError::Fatal(error)) => return Err(LogError::Fatal(error)),
            Err(LogError::Fenced(error)) => {
                fenced = if joined_at.elapsed() < FENCED_AT_ONCE { fenced + 1 } else { 1 };
                if fenced >= FENCED_IN_A_ROW {
                    return Err(LogError::fatal(format!(
                        "fenced {fenced} times in a row ({error}): is instance.id {:?} in use by two processes?",
                        settings.member.instance.as_str()
                    )));
                }
                cause = "fenced";
                events::session_ended(settings.stage, &error);
            }
            Err(LogError::Broken(error)) => {
                (fenced, cause) = (0, "broken");
                events::session_ended(settings.stage, &error);
            }
            Err(LogError::Transient(error)) => {
                (fenced, cause) = (0, "transient");
                events::session_ended(settings.stage, &error);
            }
        }
        tokio::select! {
            biased;
            () = shutdown.begun() => {}
            () = clock.sleep(RETRY) => {}
        }
    }
    Ok(())
}
