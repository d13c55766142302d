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
/// Of one record.
const PART: usize = 1 << 20;
/// Of a configuration. Larger than a control plane's answer may be.
const MAX_TEXT: u64 = 512 << 20;

/// What names the configuration in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Named {
    hash: String,
    parts: usize,
}

/// What the topic says of configurations.
#[derive(Default)]
struct Shelf {
    parts: BTreeMap<String, Bytes>,
    named: Option<Named>,
}

impl Shelf {
    /// True: another one is named now.
    fn take(&mut self, record: &Record) -> bool {
        let key = record.key.as_deref().map(String::from_utf8_lossy).unwrap_or_default().into_owned();
        let control = record.value.as_ref().map(codec::decode::<Control>).transpose();
        match (key.split_once('/'), control) {
            (Some(("workspace-part", id)), Ok(Some(part))) => drop(self.parts.insert(id.to_owned(), part.payload)),
            (Some(("workspace-part", id)), Ok(None)) => drop(self.parts.remove(id)),
            (Some(("workspace", "current")), Ok(Some(control))) => {
                let named: Option<Named> = serde_json::from_slice(&control.payload).ok();
                let is_new = named.is_some() && named != self.named;
                self.named = named.or(self.named.take());
                return is_new;
            }
            _ => {}
        }
        false
    }

    /// The configuration that is named. None: none is, or not all of it is there.
    fn text(&self) -> Option<String> {
        let named = self.named.as_ref()?;
        let parts = (0..named.parts).map(|number| self.parts.get(&format!("{}-{number}", named.hash)));
        let packed: Vec<u8> = parts.collect::<Option<Vec<_>>>()?.into_iter().flatten().copied().collect();
        let mut text = String::new();
        GzDecoder::new(&packed[..]).take(MAX_TEXT).read_to_string(&mut text).ok()?;
        (hash(&text) == named.hash).then_some(text)
    }
}

fn hash(text: &str) -> String {
    format!("{:032x}", xxh3_128(text.as_bytes()))
}

/// The records that keep a configuration: its parts; its name, which is to come when those are stored.
fn records(text: &str, at: Timestamp) -> std::io::Result<(Vec<Addressed>, Addressed, Named)> {
    let mut packed = GzEncoder::new(Vec::new(), Compression::default());
    packed.write_all(text.as_bytes())?;
    let packed = Bytes::from(packed.finish()?);
    let hash = hash(text);
    let version = at.micros().max(0).unsigned_abs();
    let control =
        |kind: &str, id: String, payload: Bytes| commands::record(&Control { kind: kind.into(), id, version, payload });
    let pieces: Vec<Bytes> =
        (0..packed.len()).step_by(PART).map(|at| packed.slice(at..packed.len().min(at + PART))).collect();
    let named = Named { hash: hash.clone(), parts: pieces.len() };
    let parts = pieces
        .into_iter()
        .enumerate()
        .map(|(number, piece)| control("workspace-part", format!("{hash}-{number}"), piece));
    let payload = serde_json::to_vec(&named).unwrap_or_default();
    Ok((parts.collect(), control("workspace", "current".into(), payload.into()), named))
}

/// The configuration that every process follows.
pub struct Kept<B: Backend> {
    publisher: B::Publisher,
    reader: B::Reader,
    shelf: Shelf,
    clock: Clock,
}

impl<B: Backend> Kept<B> {
    /// Reads what is there.
    ///
    /// # Errors
    /// Where the log cannot be read.
    pub async fn open(log: &B, clock: Clock) -> Result<Self, LogError> {
        let reader = log.reader(&Topic::CONTROL, PARTITION, Offset::START).await?;
        let mut kept = Self { publisher: log.publisher()?, reader, shelf: Shelf::default(), clock };
        while let Read::Records(records) = kept.reader.read(READ).await? {
            for record in &records {
                kept.shelf.take(record);
            }
        }
        Ok(kept)
    }

    /// The configuration in force.
    pub fn text(&self) -> Option<String> {
        self.shelf.text()
    }

    /// Puts one in force, unless it is. Every process that follows sees it, this one too.
    ///
    /// # Errors
    /// Where the log does not take it; the old one stays in force.
    pub async fn put(&mut self, text: &str) -> Result<(), LogError> {
        // Whole: somebody who named another one may have deleted parts of this one.
        if self.shelf.named.as_ref().is_some_and(|named| named.hash == hash(text)) && self.shelf.text().is_some() {
            return Ok(());
        }
        let (parts, name, named) = records(text, self.clock.now()).map_err(LogError::fatal)?;
        self.publisher.publish(parts).await?;
        self.publisher.publish(vec![name]).await?;
        // Another process may have named the same one, so only what is not of it goes.
        let old = self.shelf.parts.keys().filter(|id| !id.starts_with(&named.hash));
        let gone = |id: &String| Addressed {
            value: None,
            ..commands::record(&Control {
                kind: "workspace-part".into(),
                id: id.clone(),
                version: 0,
                payload: Bytes::new(),
            })
        };
        let gone: Vec<Addressed> = old.map(gone).collect();
        self.publisher.publish(gone).await
    }

    /// Waits for another configuration to be in force. Cancel-safe.
    pub async fn changed(&mut self) -> String {
        loop {
            match self.reader.read(READ).await {
                Ok(Read::Records(records)) => {
                    let is_new = records.iter().fold(false, |is_new, record| self.shelf.take(record) | is_new);
                    if let Some(text) = self.shelf.text().filter(|_| is_new) {
                        return text;
                    }
                }
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
    use crate::model::record::Headers;

    fn stored(addressed: Addressed) -> Record {
        let timestamp = Timestamp::from_millis(0);
        let (key, value) = (addressed.key, addressed.value);
        Record { partition: PARTITION, offset: Offset::START, timestamp, key, value, headers: Headers::new() }
    }

    #[test]
    fn a_configuration_is_in_force_when_all_of_it_is_there() {
        // Not to be compressed well, so that it takes several parts.
        let mut seed = 1_u64;
        let noise = std::iter::repeat_with(|| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            format!("{seed:016x}")
        });
        let text: String = noise.take(200_000).collect();
        let (parts, name, named) = records(&text, Timestamp::from_millis(5)).expect("packed");
        assert!(parts.len() > 1 && named.parts == parts.len());
        let mut shelf = Shelf::default();
        assert!(shelf.take(&stored(name.clone())));
        assert_eq!(shelf.text(), None, "no part is there");
        for part in parts {
            shelf.take(&stored(part));
        }
        assert_eq!(shelf.text().as_ref(), Some(&text));
        assert!(!shelf.take(&stored(name)), "the same name again");
        let (parts, name, _) = records("{}", Timestamp::from_millis(6)).expect("packed");
        for part in parts {
            shelf.take(&stored(part));
        }
        assert!(shelf.take(&stored(name)));
        assert_eq!(shelf.text().as_deref(), Some("{}"));
    }
}
