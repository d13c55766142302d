//! Users whose events are not taken: asked for at a control plane ([`super::regulations`]), kept in the topic `suppressions`, and in force
//! from there, so that all gateways have the same list, and start with it when the control plane is away.
//!
//! One gateway asks and writes: the one that has the topic's partition as a member of a group. What it writes and how far it has asked go
//! together, in one commit. Until the list was asked for to its end once, nobody has it, and no gateway takes events.
//!
//! A digest of workspace, user and source stands for them, in the topic and in memory: 16 bytes each, and no names.

use std::collections::HashSet;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use md5::{Digest, Md5};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::log::{Backend, Commit, Committed, Limit, LogError, Member, Polled, Read, Reader, Session};
use crate::model::codec;
use crate::model::command::Control;
use crate::model::id::{SourceId, WorkspaceId, clean};
use crate::model::record::{Addressed, Epoch, Headers, Offset, Partition, Record, Topic, header};
use crate::telemetry::metrics::metrics;
use crate::telemetry::seldom;

use super::regulations::{Item, Page, Regulations};
use super::remote::RemoteError;

const PARTITION: Partition = Partition(0);
const READ: Limit = Limit { records: 5_000, bytes: 4 << 20 };
const KIND: &str = "suppression";
/// The key of the record that says how far the list was asked for.
const ASKED: &str = "asked";
const AGAIN: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(50);

/// The list. Clones see the same one.
#[derive(Clone, Default)]
pub struct Suppressed(Arc<RwLock<List>>);

struct List {
    users: HashSet<u128>,
    asked: Asked,
    /// What is read next.
    next: Offset,
}

impl Default for List {
    fn default() -> Self {
        Self { users: HashSet::new(), asked: Asked::default(), next: Offset::START }
    }
}

/// How far the list was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Asked {
    /// None: not at all.
    token: Option<String>,
    /// To its end, once.
    is_whole: bool,
    /// Whose list: of which control plane, and which workspace.
    #[serde(default)]
    whose: String,
}

impl Suppressed {
    /// Nobody at all: nothing is to be looked up.
    pub fn is_empty(&self) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).users.is_empty()
    }

    /// Whether this user's events are not taken from this source. `user`: the event's `userId`, cleaned.
    pub fn covers(&self, workspace: &WorkspaceId, source: &SourceId, user: &str) -> bool {
        let list = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let is_there = |source: &str| list.users.contains(&digest(workspace.as_str(), user, source));
        !user.is_empty() && (is_there("") || is_there(source.as_str()))
    }

    /// Waits until there is a list.
    pub async fn is_whole(&self, clock: &Clock) {
        while !self.asked().is_whole {
            clock.sleep(LOOK).await;
        }
    }

    fn asked(&self) -> Asked {
        self.0.read().unwrap_or_else(PoisonError::into_inner).asked.clone()
    }
}

impl List {
    fn take(&mut self, record: &Record) {
        self.next = record.offset.just_after();
        let key = record.key.as_deref().unwrap_or_default();
        let key = std::str::from_utf8(key).unwrap_or_default();
        if key == ASKED {
            let said = record.value.as_ref().and_then(|value| codec::decode::<Control>(value).ok());
            match said.and_then(|control| serde_json::from_slice(&control.payload).ok()) {
                Some(asked) => self.asked = asked,
                None => tracing::error!(offset = %record.offset, "how far the list was asked for cannot be read"),
            }
            return;
        }
        match (u128::from_str_radix(key, 16), record.value.is_some()) {
            (Ok(user), true) => drop(self.users.insert(user)),
            (Ok(user), false) => drop(self.users.remove(&user)),
            (Err(_), _) => tracing::error!(offset = %record.offset, "a suppressed user's record has another key"),
        }
        metrics().suppressed_users.with_label_values::<&str>(&[]).set(self.users.len() as i64);
    }
}

/// `source` is empty for all of them.
fn digest(workspace: &str, user: &str, source: &str) -> u128 {
    let mut digest = Md5::new();
    for part in [workspace, user, source] {
        digest.update((part.len() as u32).to_le_bytes());
        digest.update(part);
    }
    u128::from_be_bytes(digest.finalize().into())
}

/// The list as it is kept, and what reads on.
///
/// # Errors
/// Where the log cannot be read.
pub async fn load<B: Backend>(log: &B) -> Result<(Suppressed, B::Reader), LogError> {
    let mut reader = log.reader(&Topic::SUPPRESSIONS, PARTITION, Offset::START).await?;
    let mut list = List::default();
    while let Read::Records(records) = reader.read(READ).await? {
        records.iter().for_each(|record| list.take(record));
    }
    Ok((Suppressed(Arc::new(RwLock::new(list))), reader))
}

/// Follows what is kept, for ever.
pub async fn read_on<R: Reader>(mut reader: R, list: Suppressed, clock: Clock) {
    loop {
        match reader.read(READ).await {
            Ok(Read::Records(records)) => {
                let mut list = list.0.write().unwrap_or_else(PoisonError::into_inner);
                records.iter().for_each(|record| list.take(record));
            }
            Ok(Read::End) => {}
            Err(error) => {
                if let Some(left_out) = seldom::due("suppressed users read", &error.to_string()) {
                    tracing::warn!(%error, left_out, "suppressed users cannot be read, trying again");
                }
                clock.sleep(AGAIN).await;
            }
        }
    }
}

/// Who asks the control plane, whenever this process is the one that does.
pub struct Asking<B> {
    pub log: B,
    pub regulations: Regulations,
    pub member: Member,
    pub clock: Clock,
    pub stop: CancellationToken,
}

/// What this process does as the one that asks.
struct Owned {
    epoch: Epoch,
    asked: Asked,
    due: Instant,
}

impl<B: Backend> Asking<B> {
    /// Asks until it is stopped, and hands over then.
    pub async fn ask_on(self, list: Suppressed) {
        while !self.stop.is_cancelled() {
            let ended = match self.log.session(self.member.clone()).await {
                Ok(mut session) => {
                    let ended = self.own(&mut session, &list).await;
                    session.close().await;
                    ended
                }
                Err(error) => Err(error),
            };
            if let Err(error) = ended
                && let Some(left_out) = seldom::due("session of suppressed users", &error.to_string())
            {
                tracing::warn!(%error, left_out, "the session of suppressed users ended, building a new one");
            }
            tokio::select! {
                () = self.clock.sleep(AGAIN) => {}
                () = self.stop.cancelled() => {}
            }
        }
    }

    async fn own(&self, session: &mut B::Session, list: &Suppressed) -> Result<(), LogError> {
        let mut owned: Option<Owned> = None;
        loop {
            // Asked beside the session: whoever asks for long must not lose it unheard.
            let next = owned.as_ref().map(|it| (it.due, it.asked.token.clone()));
            let question = async move {
                match next {
                    None => std::future::pending().await,
                    Some((due, token)) => {
                        self.clock.sleep_until(due).await;
                        self.regulations.page(token.as_deref()).await
                    }
                }
            };
            let mut question = std::pin::pin!(question);
            let page = loop {
                let polled = tokio::select! {
                    () = self.stop.cancelled() => return Ok(()),
                    page = &mut question => break Ok(page),
                    polled = session.poll(Limit { records: 1, bytes: 1 }) => polled?,
                };
                match polled {
                    // Every member hears of every rebalance.
                    Polled::Assigned(given) if given.is_empty() => {}
                    Polled::Records(_) | Polled::Idle => {}
                    other => break Err(other),
                }
            };
            match page {
                Err(Polled::Assigned(given)) => {
                    let Some(epoch) = given.first().map(|it| it.epoch) else { continue };
                    let asked = self.asked(list).await?;
                    owned = Some(Owned { epoch, asked, due: self.clock.instant() });
                }
                Err(_) => owned = None,
                Ok(page) => {
                    let Some(it) = &mut owned else { continue };
                    it.due = self.clock.instant() + self.answered(session, it, page).await?;
                }
            }
        }
    }

    /// How far it was asked, with all that the last owner has committed.
    async fn asked(&self, list: &Suppressed) -> Result<Asked, LogError> {
        let (mut asked, next) = {
            let list = list.0.read().unwrap_or_else(PoisonError::into_inner);
            (list.asked.clone(), list.next)
        };
        let mut rest = List::default();
        let mut reader = self.log.reader(&Topic::SUPPRESSIONS, PARTITION, next).await?;
        while let Read::Records(records) = reader.read(READ).await? {
            records
                .iter()
                .filter(|record| record.key.as_deref() == Some(ASKED.as_bytes()))
                .for_each(|it| rest.take(it));
        }
        if rest.asked != Asked::default() {
            asked = rest.asked;
        }
        let whose = self.regulations.whose();
        // Of another list there is nothing yet, and what is kept of the old one stays until then.
        Ok(if asked.whose == whose { asked } else { Asked { token: None, is_whole: false, whose } })
    }

    /// Takes a page in. How long to wait for the next one.
    async fn answered(
        &self,
        session: &mut B::Session,
        owned: &mut Owned,
        page: Result<Page, RemoteError>,
    ) -> Result<Duration, LogError> {
        let interval = self.regulations.settings().poll_interval;
        let page = match page {
            Ok(page) => page,
            Err(error) => {
                count("failed");
                if owned.asked.is_whole {
                    tracing::warn!(%error, "suppressed users cannot be asked for, the list that is kept stays in force");
                    return Ok(interval);
                }
                if let Some(left_out) = seldom::due("suppressed users", &error.to_string()) {
                    tracing::error!(%error, left_out, "suppressed users cannot be asked for, and no event is taken before there is a list");
                }
                return Ok(AGAIN);
            }
        };
        count("done");
        // A control plane may give less than it is asked for: the end is where nothing more comes.
        let is_last = page.items.is_empty() || owned.asked.token.as_ref() == Some(&page.token);
        let asked = Asked {
            token: Some(page.token.clone()),
            is_whole: owned.asked.is_whole || is_last,
            whose: owned.asked.whose.clone(),
        };
        if asked != owned.asked || !page.items.is_empty() {
            session.commit(Arc::new(commit(&page, &asked, owned.epoch))).await?;
            owned.asked = asked;
        }
        Ok(if is_last { interval } else { Duration::ZERO })
    }
}

/// A page, and how far the list was asked for with it.
fn commit(page: &Page, asked: &Asked, epoch: Epoch) -> Commit {
    let mut outputs: Vec<Addressed> = page.items.iter().flat_map(records).collect();
    let payload = serde_json::to_vec(asked).unwrap_or_default().into();
    outputs.push(record(ASKED.to_owned(), Some((0, payload))));
    // It binds the commit to the ownership: who has lost it writes nothing.
    let position = Committed { offset: Offset::START, metadata: String::new() };
    Commit { outputs, offsets: [(PARTITION, (epoch, position))].into() }
}

fn records(item: &Item) -> Vec<Addressed> {
    let all = [String::new()];
    let sources = if item.source_ids.is_empty() { &all[..] } else { &item.source_ids };
    let created = item.created_at().micros().max(0).unsigned_abs();
    let of = |source: &String| {
        // Events are compared by their cleaned ids.
        let key = format!("{:032x}", digest(&item.workspace_id, &clean(&item.user_id), source));
        record(key, (!item.canceled).then(|| (created, Bytes::new())))
    };
    sources.iter().map(of).collect()
}

fn record(key: String, said: Option<(u64, Bytes)>) -> Addressed {
    let mut headers = Headers::new();
    headers.push_text(header::CONTENT_TYPE, header::AVRO);
    let value = said.map(|(version, payload)| {
        codec::encode(&Control { kind: KIND.into(), id: key.clone(), version, payload }).into()
    });
    Addressed { topic: Topic::SUPPRESSIONS, partition: PARTITION, key: Some(key.into()), value, headers }
}

fn count(result: &str) {
    metrics().suppression_asks.with_label_values(&[result]).inc();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;

    fn item(user: &str, canceled: bool, sources: &[&str]) -> Item {
        Item {
            workspace_id: "w".into(),
            user_id: user.into(),
            canceled,
            created_at: "2026-01-01T00:00:00Z".into(),
            source_ids: sources.iter().map(|source| (*source).to_owned()).collect(),
        }
    }

    fn taken(suppressed: &Suppressed, items: Vec<Item>, asked: &Asked) {
        let commit = commit(&Page { items, token: "t".into() }, asked, Epoch(1));
        for output in commit.outputs {
            let record = Record {
                partition: PARTITION,
                offset: Offset::START,
                timestamp: Timestamp::default(),
                key: output.key,
                value: output.value,
                headers: output.headers,
            };
            suppressed.0.write().unwrap().take(&record);
        }
    }

    #[test]
    fn users_are_suppressed_at_all_sources_or_some_until_that_ends() {
        let suppressed = Suppressed::default();
        let covers = |user: &str, source: &str| suppressed.covers(&"w".into(), &source.into(), user);
        let asked = Asked { token: Some("t".into()), is_whole: true, whose: "me".into() };
        taken(&suppressed, vec![item("a", false, &[]), item("b", false, &["s1", "s2"])], &asked);
        assert!(covers("a", "s1") && covers("a", "s9") && covers("b", "s1") && covers("b", "s2"));
        assert!(!covers("b", "s3") && !covers("c", "s1") && !covers("", "s1"));
        assert!(!suppressed.covers(&"other".into(), &"s1".into(), "a"), "of another workspace");
        assert_eq!(suppressed.asked(), asked);
        // A blank or an invisible character on one side or on both makes no other user.
        taken(&suppressed, vec![item(" ann\u{200b}\u{a0}", false, &[])], &asked);
        assert!(covers("ann", "s1"));
        taken(&suppressed, vec![item("ann ", true, &[])], &asked);
        assert!(!covers("ann", "s1"));
        // Only what was said is taken back.
        taken(&suppressed, vec![item("a", true, &["s1"]), item("b", true, &["s1"])], &asked);
        assert!(covers("a", "s1") && !covers("b", "s1") && covers("b", "s2"));
        taken(&suppressed, vec![item("a", true, &[]), item("b", true, &["s2"])], &asked);
        assert!(suppressed.is_empty());
    }
}
