//! The operator's commands, followed in the `control` topic.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::clock::{Clock, Timestamp};
use crate::log::{Backend, Limit, LogError, Publisher, Read, Reader};
use crate::model::codec;
use crate::model::command::{Action, Command, Control};
use crate::model::id::DestinationId;
use crate::model::progress::Target;
use crate::model::record::{Addressed, Headers, Offset, Partition, Record, Topic, header};

const PARTITION: Partition = Partition(0);
const READ: Limit = Limit { records: 500, bytes: 1 << 20 };
const AGAIN: Duration = Duration::from_secs(1);
/// A drain is about deliveries older than itself. When those cannot be in the log any more it has nothing to say.
const DRAIN_LIFE: Duration = Duration::from_secs(8 * 24 * 3_600);
/// A wish to retry now is not one to retry later.
pub const RETRY_LIFE: Duration = Duration::from_secs(60);

/// Commands that hold no more are looked for about this often.
const SWEEP_INTERVAL: Duration = Duration::from_secs(3_600);

/// What is wanted now: the last word on each thing.
#[derive(Clone, Debug, Default)]
pub struct Commands(BTreeMap<(String, String), Command>);

impl Commands {
    pub fn paused(&self) -> HashSet<DestinationId> {
        self.0
            .values()
            .filter(|command| command.action == Action::Pause)
            .filter_map(|command| match &command.target {
                Target::Destination(id) => Some(id.clone()),
                Target::User(..) | Target::JobRun(_) | Target::Retention => None,
            })
            .collect()
    }

    pub fn drains(&self, now: Timestamp) -> impl Iterator<Item = &Command> {
        self.0.values().filter(move |command| command.action == Action::Drain && now.since(command.at) < DRAIN_LIFE)
    }

    /// Runs of reverse ETL whose rows are not to be delivered, whenever they come.
    pub fn drained_runs(&self, now: Timestamp) -> HashSet<&str> {
        fn run(command: &Command) -> Option<&str> {
            match &command.target {
                Target::JobRun(run) => Some(run),
                _ => None,
            }
        }
        self.drains(now).filter_map(run).collect()
    }

    pub fn retries(&self, now: Timestamp) -> impl Iterator<Item = &Command> {
        self.0.values().filter(move |command| command.action == Action::Retry && now.since(command.at) < RETRY_LIFE)
    }

    /// What ends the commands that hold no more, so that the topic does not grow for ever.
    pub fn expired(&self, now: Timestamp) -> Vec<Addressed> {
        let is_over = |command: &Command| match command.action {
            Action::Drain => now.since(command.at) >= DRAIN_LIFE,
            Action::Retry => now.since(command.at) >= RETRY_LIFE,
            Action::Pause | Action::Resume => false,
        };
        let over = self.0.values().filter(|command| is_over(command));
        over.map(|command| Addressed { value: None, ..record(&command.to_control()) }).collect()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Command> {
        self.0.values()
    }

    /// Takes a record of the topic in. One that cannot be read is told and passed over: the others have to be heard.
    pub fn take(&mut self, record: &Record) {
        let Some(value) = &record.value else {
            let key = record.key.as_ref().map(|key| String::from_utf8_lossy(key).into_owned()).unwrap_or_default();
            if let Some((kind, id)) = key.split_once('/') {
                self.0.remove(&(kind.to_owned(), id.to_owned()));
            }
            return;
        };
        let command = codec::decode::<Control>(value).map_err(|error| error.to_string()).and_then(|control| {
            Ok(Command::of_control(&control)?.map(|command| ((control.kind, control.id), command)))
        });
        match command {
            Ok(Some((key, command))) => drop(self.0.insert(key, command)),
            Ok(None) => {}
            Err(error) => tracing::error!(offset = %record.offset, %error, "a control record cannot be read"),
        }
    }

    /// Reads everything that is there.
    ///
    /// # Errors
    /// Where the log cannot be read.
    pub async fn load<B: Backend>(log: &B) -> Result<(Self, B::Reader), LogError> {
        let mut reader = log.reader(&Topic::CONTROL, PARTITION, Offset::START).await?;
        let mut commands = Self::default();
        while let Read::Records(records) = reader.read(READ).await? {
            records.iter().for_each(|record| commands.take(record));
        }
        Ok((commands, reader))
    }
}

/// The last word of each id of a kind; what cannot be read is told in its place.
///
/// # Errors
/// Where the log cannot be read.
pub async fn of_kind<B: Backend>(log: &B, kind: &str) -> Result<BTreeMap<String, Result<Control, String>>, LogError> {
    let mut reader = log.reader(&Topic::CONTROL, PARTITION, Offset::START).await?;
    let mut found = BTreeMap::new();
    while let Read::Records(records) = reader.read(READ).await? {
        for record in records {
            let key = record.key.as_deref().map(String::from_utf8_lossy).unwrap_or_default();
            let Some((_, id)) = key.split_once('/').filter(|(of, _)| *of == kind) else { continue };
            match record.value {
                Some(value) => {
                    let control = codec::decode::<Control>(&value);
                    let control = control.map_err(|error| format!("control record {}: {error}", record.offset));
                    found.insert(id.to_owned(), control);
                }
                None => drop(found.remove(id)),
            }
        }
    }
    Ok(found)
}

/// The record of `control` that says this.
pub fn record(control: &Control) -> Addressed {
    let mut headers = Headers::new();
    headers.push_text(header::CONTENT_TYPE, header::AVRO);
    Addressed {
        topic: Topic::CONTROL,
        partition: PARTITION,
        key: Some(format!("{}/{}", control.kind, control.id).into()),
        value: Some(codec::encode(control).into()),
        headers,
    }
}

/// The commands in force. Clones see the same ones.
pub type Current = watch::Receiver<Arc<Commands>>;

/// Reads the topic and goes on following it in the background, as long as somebody listens.
///
/// # Errors
/// Where the log cannot be read at the start: without knowing what is paused nothing may begin.
pub async fn follow<B: Backend>(log: B, clock: Clock) -> Result<Current, LogError> {
    let (mut commands, mut reader) = Commands::load(&log).await?;
    let (sender, current) = watch::channel(Arc::new(commands.clone()));
    tokio::spawn(async move {
        while !sender.is_closed() {
            match reader.read(READ).await {
                Ok(Read::Records(records)) => {
                    for record in &records {
                        commands.take(record);
                    }
                    sender.send_replace(Arc::new(commands.clone()));
                }
                Ok(Read::End) => {}
                Err(error) => {
                    tracing::warn!(%error, "commands cannot be read, trying again");
                    clock.sleep(AGAIN).await;
                }
            }
        }
    });
    Ok(current)
}

/// Ends commands that hold no more, every now and then, for as long as it is polled. Several processes may do so: a tombstone changes nothing
/// where there is one.
pub async fn sweep<B: Backend>(log: B, commands: Current, clock: Clock) {
    loop {
        clock.sleep(SWEEP_INTERVAL.mul_f64(rand::random_range(0.5..1.5))).await;
        let expired = commands.borrow().expired(clock.now());
        if expired.is_empty() {
            continue;
        }
        let count = expired.len();
        let ended = async { log.publisher()?.publish(expired).await };
        match ended.await {
            Ok(()) => tracing::info!(count, "commands that hold no more are deleted from the topic control"),
            Err(error) => tracing::warn!(%error, "old commands are not deleted yet"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(action: Action, target: &str, at: i64) -> Record {
        let target = Target::parse(target).expect("a target");
        let (id, at) = (format!("{}-{at}", action.as_str()), Timestamp::from_millis(at));
        let control = Command { id, action, target, at, by: "me".into(), ends: BTreeMap::new() }.to_control();
        Record {
            partition: PARTITION,
            offset: Offset::START,
            timestamp: at,
            key: Some(format!("{}/{}", control.kind, control.id).into()),
            value: Some(codec::encode(&control).into()),
            headers: Headers::new(),
        }
    }

    #[test]
    fn the_last_word_on_each_thing_counts() {
        let mut commands = Commands::default();
        for (action, target, at) in [
            (Action::Pause, "destination/a", 1),
            (Action::Pause, "destination/b", 2),
            (Action::Drain, "destination/a", 3),
            (Action::Drain, "user/a/u", 4),
            (Action::Retry, "destination/a", 5),
            (Action::Resume, "destination/a", 6),
        ] {
            commands.take(&told(action, target, at));
        }
        let mut broken = told(Action::Pause, "destination/c", 9);
        broken.value = Some("nonsense".into());
        commands.take(&broken);
        assert_eq!(commands.paused(), HashSet::from(["b".into()]));
        let soon = Timestamp::from_millis(1_000);
        assert_eq!((commands.drains(soon).count(), commands.retries(soon).count()), (2, 1));
        let late = soon.plus(RETRY_LIFE);
        assert_eq!((commands.drains(late).count(), commands.retries(late).count()), (2, 0));
        let keys = |now: Timestamp| -> Vec<String> {
            let key = |it: Addressed| String::from_utf8_lossy(&it.key.unwrap_or_default()).into_owned();
            commands.expired(now).into_iter().inspect(|it| assert!(it.value.is_none())).map(key).collect()
        };
        assert_eq!((keys(soon), keys(late)), (vec![], vec!["retry/retry-5".to_owned()]));
        assert_eq!(keys(soon.plus(DRAIN_LIFE)).len(), 3, "pauses hold until they are ended");
        let mut gone = told(Action::Pause, "destination/b", 9);
        gone.value = None;
        commands.take(&gone);
        assert!(commands.paused().is_empty());
    }
}
