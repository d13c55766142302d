//! How the destinations stand, read from what the owners of the partitions have committed.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream;

use crate::clock::Timestamp;
use crate::control::commands::Commands;
use crate::log::{Admin, Backend, Limit, LogError, Read, Reader};
use crate::model::codec;
use crate::model::id::{DestinationId, User};
use crate::model::progress::{Head, Ledger, Progress};
use crate::model::record::{Offset, Partition, Topic};

/// Partitions that are read at a time: each takes a reader.
const AT_A_TIME: usize = 8;
const READ: Limit = Limit { records: 1_000, bytes: 4 << 20 };

/// All destinations that anything is known of.
#[derive(Debug, Default)]
pub struct Standing {
    pub destinations: BTreeMap<String, Destination>,
    pub commands: Commands,
    pub partitions: BTreeMap<Partition, Taken>,
}

/// What the owner of a partition has taken.
#[derive(Debug, Default)]
pub struct Taken {
    /// Everything below.
    pub live: Offset,
    /// Of that, what has not ended.
    pub pending: u64,
}

/// One destination, over all partitions and replays.
#[derive(Debug, Default)]
pub struct Destination {
    pub ledger: Ledger,
    /// Lanes that live reading does not feed.
    pub detached: usize,
    /// Users part of whose deliveries is only marked.
    pub parked: usize,
    pub blocked: Vec<Blocked>,
    pub open_since: Option<Timestamp>,
    /// Of the detached lanes' deliveries, or one before it.
    oldest: Option<Timestamp>,
}

/// A user whose head fails.
#[derive(Debug)]
pub struct Blocked {
    pub user: User,
    pub partition: Partition,
    pub head: Head,
    /// As many as the mark lists.
    pub followers: usize,
}

impl Destination {
    pub fn pending(&self) -> u64 {
        self.ledger.pending()
    }

    /// Since when something has waited, as far as marks tell.
    pub fn oldest(&self) -> Option<Timestamp> {
        self.blocked.iter().map(|blocked| blocked.head.first_failed_at).chain(self.oldest).min()
    }

    fn add(&mut self, ledger: Ledger) {
        self.ledger.taken += ledger.taken;
        self.ledger.delivered += ledger.delivered;
        self.ledger.filtered += ledger.filtered;
        self.ledger.aborted += ledger.aborted;
        self.ledger.drained += ledger.drained;
        // Of several processes' breakers the one that is open for longest. Where nothing is pending nobody would tell that it
        // has closed.
        let open_since = ledger.open_since.filter(|_| ledger.pending() > 0);
        self.open_since = [self.open_since, open_since].into_iter().flatten().min();
    }
}

impl Standing {
    pub fn is_paused(&self, destination: &str) -> bool {
        self.commands.paused().contains(&DestinationId::from(destination))
    }

    /// What was commanded about a destination, for people.
    pub fn commands_of(&self, destination: &str) -> Vec<String> {
        let about = self.commands.iter().filter(|command| command.target.concerns(destination));
        about.map(|it| format!("{} {} by {} at {} ({})", it.action.as_str(), it.target, it.by, it.at, it.id)).collect()
    }

    fn take(&mut self, partition: Partition, progress: Progress) {
        match progress {
            Progress::Partition(progress) => self.partitions.entry(partition).or_default().live = progress.live,
            Progress::Lane(lane) => {
                let it = self.destinations.entry(lane.lane.destination.to_string()).or_default();
                it.detached += 1;
                it.oldest = Some(it.oldest.map_or(lane.oldest, |oldest| oldest.min(lane.oldest)));
            }
            Progress::Key(key) => {
                let it = self.destinations.entry(key.lane.destination.to_string()).or_default();
                it.parked += usize::from(key.parked.is_some());
                if let Some(head) = key.head {
                    it.blocked.push(Blocked { user: key.user, partition, head, followers: key.followers.len() });
                }
            }
            Progress::Ledger(lane, ledger) => {
                self.partitions.entry(partition).or_default().pending += ledger.pending();
                self.destinations.entry(lane.destination.to_string()).or_default().add(ledger);
            }
        }
    }
}

/// Reads the progress of all partitions, and the commands in force.
///
/// # Errors
/// Where the log cannot be read.
pub async fn read<B: Backend>(log: &B) -> Result<Standing, LogError> {
    // Asked first: it says so where the log does not answer, and a reader would wait.
    let admin = log.admin()?;
    let topics = admin.topics().await?;
    let (commands, _) = Commands::load(log).await?;
    let mut standing = Standing { commands, ..Standing::default() };
    let partitions = topics.iter().find(|info| info.topic == Topic::PROGRESS_ROUTER).map_or(0, |info| info.partitions);
    let mut reads =
        stream::iter((0..partitions).map(|number| newest(log, &admin, Partition(number)))).buffer_unordered(AT_A_TIME);
    while let Some(read) = reads.next().await {
        let (partition, found) = read?;
        for value in found.into_values() {
            match codec::decode::<Progress>(&value) {
                Ok(progress) => standing.take(partition, progress),
                Err(error) => tracing::warn!(partition = partition.0, %error, "a progress record cannot be read"),
            }
        }
    }
    drop(reads);
    Ok(standing)
}

/// The last record of each key.
async fn newest<B: Backend>(
    log: &B,
    admin: &B::Admin,
    partition: Partition,
) -> Result<(Partition, BTreeMap<Bytes, Bytes>), LogError> {
    let mut found = BTreeMap::new();
    let marks = admin.watermarks(&Topic::PROGRESS_ROUTER, partition).await?;
    if marks.start >= marks.stable {
        return Ok((partition, found));
    }
    let mut reader = log.reader(&Topic::PROGRESS_ROUTER, partition, Offset::START).await?;
    while let Read::Records(records) = reader.read(READ).await? {
        for record in records {
            match (record.key, record.value) {
                (Some(key), Some(value)) => drop(found.insert(key, value)),
                (Some(key), None) => drop(found.remove(&key)),
                (None, _) => {}
            }
        }
    }
    Ok((partition, found))
}
