//! The last good workspace configuration, kept in the `control` topic: every process follows it, so all see the same one, and a
//! start needs no control plane.
//!
//! A configuration may be larger than a record, so it lies there compressed and in pieces (`workspace-part/<hash>-<n>`), and a record
//! of its own (`workspace/current`) names it once all of them are there. What it replaced is deleted then.

use std::collections::BTreeMap;
use std::io::{Read as _, Write};
use std::time::Duration;

use bytes::Bytes;
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

use crate::clock::{Clock, Timestamp};
use crate::control::commands;
use crate::log::{Backend, Limit, LogError, Publisher, Read, Reader};
use crate::model::codec;
use crate::model::command::Control;
use crate::model::record::{Addressed, Offset, Partition, Record, Topic};

const PARTITION: Partition = Partition(0);
const READ: Limit = Limit { records: 500, bytes: 16 << 20 };
const AGAIN: Duration = Duration::from_secs(1);
/// Of one record: below what brokers take unless they are told otherwise.
const PART: usize = 512 << 10;
/// Of a configuration. Larger than a control plane's answer may be.
const MAX_TEXT: u64 = 512 << 20;

/// What names the configuration in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Named {
    hash: String,
    parts: usize,
}

/// A configuration, ready to be kept.
#[derive(Clone)]
pub struct Packed {
    named: Named,
    gzip: Bytes,
}

impl Packed {
    /// Off the async threads: a configuration may have megabytes.
    pub async fn of(text: String) -> Self {
        let packed = tokio::task::spawn_blocking(move || {
            let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
            gzip.write_all(text.as_bytes()).expect("memory takes it");
            let gzip = Bytes::from(gzip.finish().expect("memory takes it"));
            Self { named: Named { hash: hash(&text), parts: gzip.len().div_ceil(PART) }, gzip }
        });
        packed.await.expect("compressing does not panic")
    }

    /// The records that keep it: its parts; its name, which is to come when those are stored.
    fn records(&self, at: Timestamp) -> (Vec<Addressed>, Addressed) {
        let (Named { hash, .. }, version) = (&self.named, at.micros().max(0).unsigned_abs());
        let control = |kind: &str, id: String, payload: Bytes| {
            commands::record(&Control { kind: kind.into(), id, version, payload })
        };
        let pieces =
            (0..self.named.parts).map(|part| self.gzip.slice(part * PART..self.gzip.len().min((part + 1) * PART)));
        let parts =
            pieces.enumerate().map(|(number, piece)| control("workspace-part", format!("{hash}-{number}"), piece));
        let payload = serde_json::to_vec(&self.named).unwrap_or_default();
        (parts.collect(), control("workspace", "current".into(), payload.into()))
    }
}

/// What the topic says of configurations.
#[derive(Default)]
struct Shelf {
    parts: BTreeMap<String, Bytes>,
    named: Option<Named>,
    /// The one that was named before.
    replaced: Option<Named>,
}

impl Shelf {
    fn take(&mut self, record: &Record) {
        let key = record.key.as_deref().map(String::from_utf8_lossy).unwrap_or_default().into_owned();
        let control = record.value.as_ref().map(codec::decode::<Control>).transpose();
        match (key.split_once('/'), control) {
            (Some(("workspace-part", id)), Ok(Some(part))) => drop(self.parts.insert(id.to_owned(), part.payload)),
            (Some(("workspace-part", id)), Ok(None)) => drop(self.parts.remove(id)),
            (Some(("workspace", "current")), Ok(Some(control))) => {
                if let Ok(named) = serde_json::from_slice(&control.payload) {
                    self.replaced = self
                        .named
                        .replace(named)
                        .filter(|old| Some(old) != self.named.as_ref())
                        .or(self.replaced.take());
                }
            }
            _ => {}
        }
    }

    /// The configuration that is named, if all of it is there.
    fn whole(&self) -> Option<(&Named, Vec<Bytes>)> {
        let named = self.named.as_ref()?;
        let parts = (0..named.parts).map(|number| self.parts.get(&named.part(number)).cloned());
        Some((named, parts.collect::<Option<Vec<_>>>()?))
    }

    fn names(&self, named: &Named) -> bool {
        self.whole().is_some_and(|(whole, _)| whole == named)
    }
}

impl Named {
    fn part(&self, number: usize) -> String {
        format!("{}-{number}", self.hash)
    }
}

/// Off the async threads, as [`Packed::of`]. None: it is not what its name says.
async fn inflated(hash_of: String, parts: Vec<Bytes>) -> Option<String> {
    let inflate = move || {
        let packed: Vec<u8> = parts.into_iter().flatten().collect();
        let mut text = String::new();
        GzDecoder::new(&packed[..]).take(MAX_TEXT).read_to_string(&mut text).ok()?;
        (hash(&text) == hash_of).then_some(text)
    };
    tokio::task::spawn_blocking(inflate).await.ok().flatten()
}

fn hash(text: &str) -> String {
    format!("{:032x}", xxh3_128(text.as_bytes()))
}

/// The configuration that every process follows.
pub struct Kept<B: Backend> {
    publisher: B::Publisher,
    reader: B::Reader,
    shelf: Shelf,
    /// What has been told of.
    told: Option<Named>,
    clock: Clock,
}

impl<B: Backend> Kept<B> {
    /// Reads what is there.
    ///
    /// # Errors
    /// Where the log cannot be read.
    pub async fn open(log: &B, clock: Clock) -> Result<Self, LogError> {
        let reader = log.reader(&Topic::CONTROL, PARTITION, Offset::START).await?;
        let mut kept = Self { publisher: log.publisher()?, reader, shelf: Shelf::default(), told: None, clock };
        while let Read::Records(records) = kept.reader.read(READ).await? {
            for record in &records {
                kept.shelf.take(record);
            }
        }
        Ok(kept)
    }

    /// The configuration in force. None: none is, or not all of it is there.
    pub async fn text(&mut self) -> Option<String> {
        let (named, parts) = self.shelf.whole()?;
        let named = named.clone();
        let text = inflated(named.hash.clone(), parts).await?;
        self.told = Some(named);
        Some(text)
    }

    /// Marks the configuration in the topic as reported, for a caller that has a newer one: [`Kept::changed`] does not return it.
    pub fn pass_over(&mut self) {
        self.told = self.shelf.whole().map(|(named, _)| named.clone());
    }

    /// Puts one in force, unless it is. Every process that follows sees it, this one too.
    ///
    /// # Errors
    /// Where the log does not take it; the old one stays in force.
    pub async fn put(&mut self, packed: &Packed) -> Result<(), LogError> {
        // Whole: somebody who named another one may have deleted parts of this one.
        if self.shelf.names(&packed.named) {
            return Ok(());
        }
        let (parts, name) = packed.records(self.clock.now());
        self.publisher.publish(parts).await?;
        self.publisher.publish(vec![name]).await?;
        // Only what had been named and was replaced: of anything else another process may be about to name it.
        let old = self.shelf.replaced.iter().filter(|old| old.hash != packed.named.hash);
        let old = old.flat_map(|old| (0..old.parts).map(|number| old.part(number)));
        let gone = |id: String| Addressed {
            value: None,
            ..commands::record(&Control { kind: "workspace-part".into(), id, version: 0, payload: Bytes::new() })
        };
        let gone: Vec<Addressed> = old.filter(|id| self.shelf.parts.contains_key(id)).map(gone).collect();
        self.publisher.publish(gone).await
    }

    /// Waits for another configuration to be in force. Cancel-safe.
    pub async fn changed(&mut self) -> String {
        loop {
            if self.shelf.whole().is_some_and(|(named, _)| Some(named) != self.told.as_ref())
                && let Some(text) = self.text().await
            {
                return text;
            }
            match self.reader.read(READ).await {
                Ok(Read::Records(records)) => records.iter().for_each(|record| self.shelf.take(record)),
                Ok(Read::End) => {}
                Err(error) => {
                    tracing::warn!(%error, "the workspace configuration cannot be followed, trying again");
                    self.clock.sleep(AGAIN).await;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::Admin;
    use crate::log::embedded::Embedded;
    use crate::log::embedded::memory::Faults;
    use crate::log::topic::Topics;
    use crate::model::record::Headers;

    fn stored(addressed: Addressed) -> Record {
        let timestamp = Timestamp::from_millis(0);
        let (key, value) = (addressed.key, addressed.value);
        Record { partition: PARTITION, offset: Offset::START, timestamp, key, value, headers: Headers::new() }
    }

    async fn text(shelf: &Shelf) -> Option<String> {
        let (named, parts) = shelf.whole()?;
        inflated(named.hash.clone(), parts).await
    }

    #[tokio::test]
    async fn a_configuration_is_in_force_when_all_of_it_is_there() {
        // Not to be compressed well, so that it takes several parts.
        let mut seed = 1_u64;
        let noise = std::iter::repeat_with(|| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            format!("{seed:016x}")
        });
        let whole: String = noise.take(200_000).collect();
        let first = Packed::of(whole.clone()).await;
        let (parts, name) = first.records(Timestamp::from_millis(5));
        assert!(parts.len() > 2 && first.named.parts == parts.len());
        let mut shelf = Shelf::default();
        shelf.take(&stored(name));
        assert_eq!(text(&shelf).await, None, "no part is there");
        parts.into_iter().for_each(|part| shelf.take(&stored(part)));
        assert_eq!(text(&shelf).await, Some(whole));
        assert!(shelf.names(&first.named) && shelf.replaced.is_none());
        let second = Packed::of("{}".into()).await;
        let (parts, name) = second.records(Timestamp::from_millis(6));
        parts.into_iter().chain([name.clone(), name]).for_each(|record| shelf.take(&stored(record)));
        assert_eq!(text(&shelf).await.as_deref(), Some("{}"));
        assert_eq!(shelf.replaced, Some(first.named));
    }

    /// A start with a newer answer of the control plane must not put the configuration in force again that it replaces.
    #[tokio::test]
    async fn what_is_passed_over_is_not_told() {
        let log = Embedded::in_memory(Faults::none(), Clock::system()).await.expect("a log");
        let topics = Topics::load(None).expect("declared");
        log.admin().expect("an admin").create(topics.get(&Topic::CONTROL).expect("declared")).await.expect("created");
        let open = async || Kept::open(&log, Clock::system()).await.expect("opened");
        open().await.put(&Packed::of("old".to_owned()).await).await.expect("stored");
        let mut kept = open().await;
        kept.pass_over();
        let soon = Duration::from_millis(300);
        assert!(tokio::time::timeout(soon, kept.changed()).await.is_err(), "the old one is not told");
        kept.put(&Packed::of("new".to_owned()).await).await.expect("stored");
        assert_eq!(kept.changed().await, "new");
        assert_eq!(open().await.changed().await, "new", "who passes nothing over is told");
    }
}
