//! What lies in a topic, and how a place in it is named.

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;

/// The logical name of a topic, without the configured prefix.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Topic(Cow<'static, str>);

impl Topic {
    pub const EVENTS: Topic = Topic(Cow::Borrowed("events"));
    pub const EVENTS_SEEN: Topic = Topic(Cow::Borrowed("events.seen"));
    pub const DELIVERIES: Topic = Topic(Cow::Borrowed("deliveries"));
    pub const PROGRESS_ROUTER: Topic = Topic(Cow::Borrowed("progress.router"));
    pub const CONTROL: Topic = Topic(Cow::Borrowed("control"));
    pub const PROC_ERRORS: Topic = Topic(Cow::Borrowed("proc-errors"));
    pub const SUPPRESSIONS: Topic = Topic(Cow::Borrowed("suppressions"));
    pub const JOB_STATUS: Topic = Topic(Cow::Borrowed("job-status"));
    pub const DEAD_LETTERS: Topic = Topic(Cow::Borrowed("dead-letters"));

    pub fn new(name: impl Into<String>) -> Self {
        Topic(Cow::Owned(name.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Identifies one topic of one log: another cluster, prefix or file has another id, whatever the topic's name is. What is stored
/// outside the log carries it, because an offset means nothing in another log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicId(String);

impl TopicId {
    pub fn new(id: impl Into<String>) -> Self {
        TopicId(id.into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TopicId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A partition's number inside its topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Partition(pub u32);

impl fmt::Display for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A place in a partition. Ordered and opaque: offsets have gaps, so none is computed from another. Written as a number, or as
/// `ledger:entry:index` where it is such a place.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Offset(u128);

impl Offset {
    /// Before every record.
    pub const START: Offset = Offset(0);

    pub const fn new(raw: u128) -> Self {
        Offset(raw)
    }

    pub const fn raw(self) -> u128 {
        self.0
    }

    /// The place directly behind this record: above it, and not above any later record. It is a position to read from, not
    /// the offset of anything.
    pub const fn just_after(self) -> Offset {
        Offset(self.0.saturating_add(1))
    }

    /// A place in a log of ledgers: which ledger, which entry of it, which record of the entry. Above every number.
    pub const fn of_entry(ledger: u64, entry: u64, index: u32) -> Self {
        let (ledger, entry, index) = (ledger as u128 & LEDGER, entry as u128 & ENTRY, index as u128 & INDEX);
        Offset(OF_ENTRY | ledger << 72 | entry << 24 | index)
    }

    /// What [`Offset::of_entry`] was made of. None: it is a number.
    pub const fn entry(self) -> Option<(u64, u64, u32)> {
        if self.0 & OF_ENTRY == 0 {
            return None;
        }
        Some(((self.0 >> 72 & LEDGER) as u64, (self.0 >> 24 & ENTRY) as u64, (self.0 & INDEX) as u32))
    }

    /// A place so many offsets before, or entries of the same ledger.
    #[must_use]
    pub const fn back(self, count: u64) -> Offset {
        match self.entry() {
            Some((ledger, entry, _)) => Self::of_entry(ledger, entry.saturating_sub(count), 0),
            None => Offset(self.0.saturating_sub(count as u128)),
        }
    }

    /// A place so many offsets behind, or entries of the same ledger, whether there is something or not.
    #[must_use]
    pub const fn forward(self, count: u64) -> Offset {
        match self.entry() {
            Some((ledger, entry, _)) => Self::of_entry(ledger, entry.saturating_add(count), 0),
            None => Offset(self.0.saturating_add(count as u128)),
        }
    }

    /// About how much lies between an earlier place and this one: offsets, or entries where it is a log of ledgers (what a ledger holds
    /// is not known here: a broker's usual measure stands for it). To weigh one way against another, not to count.
    pub fn distance_from(self, earlier: Offset) -> u64 {
        const ENTRIES: u64 = 50_000;
        match (self.entry(), earlier.entry()) {
            (Some((ledger, entry, index)), Some((other, before, place))) if ledger == other => {
                entry.saturating_sub(before).saturating_add(u64::from(index > place))
            }
            (Some((ledger, entry, _)), Some((other, before, _))) => {
                let ledgers = ledger.saturating_sub(other).saturating_mul(ENTRIES);
                ledgers.saturating_add(entry).saturating_sub(before.min(ENTRIES))
            }
            (Some((_, entry, _)), None) => entry.saturating_add(ENTRIES),
            (None, _) => u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(u64::MAX),
        }
    }

    pub fn parse(text: &str) -> Option<Offset> {
        let mut parts = text.split(':');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(number), None, None, None) => number.parse().ok().filter(|raw| raw & OF_ENTRY == 0).map(Offset),
            (Some(ledger), Some(entry), Some(index), None) => {
                let (ledger, entry, index): (u64, u64, u32) =
                    (ledger.parse().ok()?, entry.parse().ok()?, index.parse().ok()?);
                let fits = u128::from(ledger) <= LEDGER && u128::from(entry) <= ENTRY && u128::from(index) <= INDEX;
                fits.then(|| Self::of_entry(ledger, entry, index))
            }
            _ => None,
        }
    }
}

/// Marks places in a log of ledgers; the parts below it have 55, 48 and 24 bits.
const OF_ENTRY: u128 = 1 << 127;
const LEDGER: u128 = (1 << 55) - 1;
const ENTRY: u128 = (1 << 48) - 1;
const INDEX: u128 = (1 << 24) - 1;

impl From<Offset> for String {
    fn from(offset: Offset) -> Self {
        offset.to_string()
    }
}

impl TryFrom<String> for Offset {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Offset::parse(&text).ok_or_else(|| format!("{text:?} is no offset"))
    }
}

impl fmt::Display for Offset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.entry() {
            Some((ledger, entry, index)) => write!(f, "{ledger}:{entry}:{index}"),
            None => self.0.fmt(f),
        }
    }
}

impl fmt::Debug for Offset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Which assignment of a partition something belongs to. A new one is given at each assignment; what an older one still
/// brings is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Epoch(pub u64);

/// Record headers in their order. Names repeat where the sender repeated them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers(Vec<(Cow<'static, str>, Bytes)>);

impl Headers {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn with_capacity(count: usize) -> Self {
        Self(Vec::with_capacity(count))
    }

    pub fn push(&mut self, name: impl Into<Cow<'static, str>>, value: impl Into<Bytes>) {
        self.0.push((name.into(), value.into()));
    }

    pub fn push_text(&mut self, name: &'static str, value: &str) {
        self.0.push((Cow::Borrowed(name), Bytes::copy_from_slice(value.as_bytes())));
    }

    /// The first header of this name as text.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.iter().find(|(key, _)| *key == name).and_then(|(_, value)| std::str::from_utf8(value).ok())
    }

    /// Gives headers of this name another value, where they have the one named.
    pub fn replace(&mut self, name: &str, from: &str, to: &'static str) {
        for (_, value) in self.0.iter_mut().filter(|(key, value)| key == name && value == from.as_bytes()) {
            *value = Bytes::from_static(to.as_bytes());
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Bytes)> {
        self.0.iter().map(|(name, value)| (name.as_ref(), value))
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn bytes(&self) -> usize {
        self.0.iter().map(|(name, value)| name.len() + value.len()).sum()
    }
}

/// A record as read from a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub partition: Partition,
    pub offset: Offset,
    pub timestamp: Timestamp,
    pub key: Option<Bytes>,
    /// `None` is a tombstone.
    pub value: Option<Bytes>,
    pub headers: Headers,
}

impl Record {
    /// What it costs to keep in memory, in bytes: content, and a flat share for the structures around it.
    pub fn weight(&self) -> usize {
        128 + self.key.as_ref().map_or(0, Bytes::len) + self.value.as_ref().map_or(0, Bytes::len) + self.headers.bytes()
    }
}

/// A record on its way to a partition that its sender has chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addressed {
    pub topic: Topic,
    pub partition: Partition,
    pub key: Option<Bytes>,
    /// `None` is a tombstone.
    pub value: Option<Bytes>,
    pub headers: Headers,
}

impl Addressed {
    /// Its size in the log, about, in bytes.
    pub fn size(&self) -> usize {
        64 + self.key.as_ref().map_or(0, Bytes::len) + self.value.as_ref().map_or(0, Bytes::len) + self.headers.bytes()
    }
}

/// The names of the headers (topics/README.md).
pub mod header {
    use std::borrow::Cow;

    pub const SOURCE: &str = "lw-source";
    pub const WORKSPACE: &str = "lw-workspace";
    pub const DESTINATION: &str = "lw-destination";
    pub const USER: &str = "lw-user";
    pub const MESSAGE_ID: &str = "lw-message-id";
    pub const DELIVERY_ID: &str = "lw-delivery-id";
    pub const JOB_RUN: &str = "lw-job-run";
    pub const REPLAY_ID: &str = "lw-replay-id";
    /// Of what a processor makes of events again after its position was reset: which reset.
    pub const RERUN: &str = "lw-rerun";
    pub const TRACEPARENT: &str = "traceparent";
    pub const CONTENT_TYPE: &str = "content-type";
    /// Of a request that a webhook source sent: who sent it.
    pub const REQUEST_IP: &str = "lw-request-ip";
    pub const STAGE: &str = "lw-stage";
    pub const REASON: &str = "lw-reason";
    /// Of a failure: why, for people. Other tools read it by this name (runtime/failure.rs).
    pub const FAILURE_MESSAGE: &str = "__connect.errors.exception.message";
    pub const CODE: &str = "lw-code";
    pub const ATTEMPTS: &str = "lw-attempts";
    pub const FIRST_FAILED_AT: &str = "lw-first-failed-at";
    pub const LAST_FAILED_AT: &str = "lw-last-failed-at";
    /// Of an empty record that only ends what a broker left undecided: it says nothing.
    pub const FILLER: &str = "lw-filler";

    /// `content-type` of an Avro single-object value.
    pub const AVRO: &str = "application/avro";

    /// Our own names need no allocation.
    pub fn named(name: &str) -> Cow<'static, str> {
        const KNOWN: [&str; 11] = [
            SOURCE,
            WORKSPACE,
            DESTINATION,
            USER,
            MESSAGE_ID,
            DELIVERY_ID,
            CONTENT_TYPE,
            TRACEPARENT,
            JOB_RUN,
            REPLAY_ID,
            RERUN,
        ];
        match KNOWN.iter().find(|known| **known == name) {
            Some(known) => Cow::Borrowed(known),
            None => Cow::Owned(name.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_in_ledgers_are_ordered_and_written_as_they_are() {
        let places =
            [(0, 0, 0), (0, 0, 1), (0, 7, 0), (12, 0, 0), (12, 3, 999), ((1 << 55) - 1, (1 << 48) - 1, (1 << 24) - 1)];
        let offsets = places.map(|(ledger, entry, index)| Offset::of_entry(ledger, entry, index));
        assert!(offsets.is_sorted() && offsets[0] > Offset::new(u128::from(u64::MAX)));
        for (place, offset) in places.into_iter().zip(offsets) {
            assert_eq!(offset.entry(), Some(place));
            let (ledger, entry, index) = place;
            assert_eq!(offset.to_string(), format!("{ledger}:{entry}:{index}"));
            assert_eq!(Offset::parse(&offset.to_string()), Some(offset));
        }
        let (last, next) = (Offset::of_entry(12, 3, 49), Offset::of_entry(12, 4, 0));
        assert!(last.just_after() > last && last.just_after() <= next);
        assert_eq!(Offset::new(7).entry(), None);
        for text in ["", "1:2", "1:2:3:4", "a:b:c", "-1", &(1_u128 << 127).to_string()] {
            assert_eq!(Offset::parse(text), None, "{text}");
        }
    }

    #[test]
    fn ways_are_weighed_in_offsets_or_entries() {
        let at = Offset::of_entry;
        assert_eq!(Offset::new(100).distance_from(Offset::new(40)), 60);
        assert_eq!(Offset::new(40).distance_from(Offset::new(100)), 0);
        assert_eq!(at(5, 90, 3).distance_from(at(5, 30, 0)), 61);
        assert_eq!(at(5, 30, 3).distance_from(at(5, 30, 3)), 0);
        assert!(at(7, 10, 0).distance_from(at(5, 30, 0)) > at(6, 10, 0).distance_from(at(5, 30, 0)));
        assert!(at(5, 10, 0).distance_from(Offset::START) > 0);
        assert_eq!((at(5, 90, 3).back(20), at(5, 10, 3).back(20)), (at(5, 70, 0), at(5, 0, 0)));
        assert_eq!((Offset::new(90).back(100), Offset::new(90).forward(10)), (Offset::START, Offset::new(100)));
        assert_eq!(at(5, 90, 3).forward(20), at(5, 110, 0));
    }
}
