//! The driver beside a log whose commits hang.

use std::sync::Mutex;

use super::*;
use crate::log::embedded::memory::Faults;
use crate::log::embedded::{
    Embedded, EmbeddedAdmin, EmbeddedCommitter, EmbeddedPublisher, EmbeddedReader, EmbeddedSession,
};
use crate::log::topic::Topics;
use crate::log::{Admin, Commit, Committer, Guarantee, Limit, Polled, Session};
use crate::model::record::{Partition, Topic};
use crate::telemetry::server::Readiness;

const DRAIN: Duration = Duration::from_secs(1);

/// A log whose commits hang as long as they are told to.
#[derive(Clone)]
struct Hanging {
    log: Embedded,
    hangs: tokio::sync::watch::Sender<bool>,
}

struct HangingSession(EmbeddedSession, tokio::sync::watch::Sender<bool>);
struct HangingCommitter(EmbeddedCommitter, tokio::sync::watch::Receiver<bool>);

impl Backend for Hanging {
    type Session = HangingSession;
    type Publisher = EmbeddedPublisher;
    type Reader = EmbeddedReader;
    type Admin = EmbeddedAdmin;

    async fn session(&self, member: Member) -> Result<HangingSession, LogError> {
        Ok(HangingSession(self.log.session(member).await?, self.hangs.clone()))
    }

    fn publisher(&self) -> Result<EmbeddedPublisher, LogError> {
        self.log.publisher()
    }

    async fn reader(&self, topic: &Topic, partition: Partition, from: Offset) -> Result<EmbeddedReader, LogError> {
        self.log.reader(topic, partition, from).await
    }

    fn admin(&self) -> Result<EmbeddedAdmin, LogError> {
        self.log.admin()
    }
}

impl Session for HangingSession {
    const GUARANTEE: Guarantee = EmbeddedSession::GUARANTEE;
    type Committer = HangingCommitter;

    async fn poll(&mut self, limit: Limit) -> Result<Polled, LogError> {
        self.0.poll(limit).await
    }

    fn seek(&mut self, partition: Partition, to: Offset) -> Result<(), LogError> {
        self.0.seek(partition, to)
    }

    fn pause(&mut self, partitions: &[Partition]) -> Result<(), LogError> {
        self.0.pause(partitions)
    }

    fn resume(&mut self, partitions: &[Partition]) -> Result<(), LogError> {
        self.0.resume(partitions)
    }

    fn committer(&self) -> HangingCommitter {
        HangingCommitter(self.0.committer(), self.1.subscribe())
    }

    async fn close(self) {
        self.0.close().await;
    }
}

impl Committer for HangingCommitter {
    async fn commit(&mut self, commit: Arc<Commit>) -> Result<(), LogError> {
        self.1.wait_for(|hangs| !hangs).await.map_err(LogError::transient)?;
        self.0.commit(commit).await
    }
}

/// What workers were told, in order.
type Told = Arc<Mutex<Vec<(Partition, &'static str)>>>;

/// Always has a change to commit; never finishes a drain, as with a request that hangs.
struct Busy(Told);

struct Ended(Told, Partition);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.lock().expect("told").push((self.1, "ended"));
    }
}

impl Work for Busy {
    async fn run(self: Arc<Self>, assignment: Assignment, inbox: Inbox) -> Result<(), LogError> {
        let Inbox { mut asks, ready, bell, .. } = inbox;
        let partition = assignment.partition;
        let _ended = Ended(Arc::clone(&self.0), partition);
        let _ = ready.send(Offset::START);
        let mut draining = Vec::new();
        bell.ring();
        while let Some(ask) = asks.recv().await {
            match ask {
                Ask::Collect(answer) => {
                    let position = Committed { offset: Offset::START, metadata: String::new() };
                    drop(answer.send(Some(Changes { outputs: Vec::new(), last: None, position })));
                    bell.ring();
                }
                Ask::Committed => {}
                Ask::Drain(done) => {
                    draining.push(done);
                    self.0.lock().expect("told").push((partition, "drain"));
                }
            }
        }
        Ok(())
    }
}

struct Running {
    told: Told,
    task: tokio::task::JoinHandle<Result<(), LogError>>,
}

fn start(log: &Hanging, clock: &Clock, instance: &str) -> Running {
    let told = Told::default();
    let member = crate::log::Member {
        group: "g".into(),
        instance: instance.into(),
        topic: Topic::EVENTS,
        outputs: Vec::new(),
        state: None,
        session_timeout: Duration::from_secs(600),
        revoke_drain: DRAIN,
    };
    let settings = Settings { member, partitions: 2, commit_interval: Duration::from_millis(20), stage: "test" };
    let (work, shutdown) = (Arc::new(Busy(Arc::clone(&told))), Shutdown::new(Duration::from_secs(1)));
    let ready = Readiness::default().part();
    Running { told, task: tokio::spawn(run(log.clone(), work, settings, clock.clone(), shutdown, ready)) }
}

#[tokio::test(start_paused = true)]
async fn what_is_revoked_while_a_commit_hangs_stops_at_once_and_ends_when_the_log_gives_it_away() {
    let clock = Clock::derived(crate::clock::Timestamp::from_millis(1));
    let log = Embedded::in_memory(Faults::none(), clock.clone()).await.expect("a log");
    for spec in Topics::load(None).expect("topics").with_partitions(2).iter() {
        log.admin().expect("an admin").create(spec).await.expect("created");
    }
    let log = Hanging { log, hangs: tokio::sync::watch::Sender::new(false) };
    let first = start(&log, &clock, "a");
    clock.sleep(Duration::from_secs(1)).await;
    log.hangs.send_replace(true);
    clock.sleep(Duration::from_secs(1)).await;
    let second = start(&log, &clock, "b");
    clock.sleep(Duration::from_millis(500)).await;
    let told = || first.told.lock().expect("told").clone();
    let (revoked, drain) = told().first().copied().expect("the worker is told although the commit hangs");
    assert_eq!((told().len(), drain), (1, "drain"), "{:?}", told());
    clock.sleep(DRAIN).await;
    assert_eq!(told().len(), 1, "there is time for the commit");
    clock.sleep(Duration::from_secs(5)).await;
    assert_eq!(told(), [(revoked, "drain"), (revoked, "ended")], "the log gives it away now");
    assert!(second.told.lock().expect("told").is_empty());
    log.hangs.send_replace(false);
    clock.sleep(Duration::from_secs(1)).await;
    second.task.abort();
    clock.sleep(Duration::from_secs(1)).await;
    assert!(second.told.lock().expect("told").contains(&(revoked, "ended")), "the other one had it");
    first.task.abort();
}
