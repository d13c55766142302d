//! Sending again what was given up: which ones are meant, and how the plan of it lies in the `control` topic.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;
use crate::model::codec::{self, Unreadable};
use crate::model::command::Control;
use crate::model::failure::Failure;
use crate::model::id::{DestinationId, MessageId, SourceId, User};
use crate::model::record::{Offset, Partition, Record, Topic, header};

/// Where what was given up lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shelf {
    /// Deliveries that were given up.
    #[default]
    DeadLetters,
    /// Events that could not be processed, and requests of webhook sources that became none.
    ProcErrors,
}

impl Shelf {
    pub const fn topic(self) -> Topic {
        match self {
            Shelf::DeadLetters => Topic::DEAD_LETTERS,
            Shelf::ProcErrors => Topic::PROC_ERRORS,
        }
    }

    /// The command that is about it.
    pub const fn command(self) -> &'static str {
        match self {
            Shelf::DeadLetters => "dead-letters",
            Shelf::ProcErrors => "proc-errors",
        }
    }
}

/// A record of `dead-letters` or `proc-errors`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Letter {
    pub partition: Partition,
    pub offset: Offset,
    /// When it was given up.
    pub at: Timestamp,
    /// Why, for people: the last answer, or what kept it from being tried.
    pub message: String,
    pub failure: Failure,
}

impl Letter {
    /// # Errors
    /// [`Unreadable`] where it is none of ours, or empty.
    pub fn of(record: &Record) -> Result<Self, Unreadable> {
        let failure: Failure = codec::decode(&record.value.clone().unwrap_or_default())?;
        let header = || record.headers.text(header::FAILURE_MESSAGE).unwrap_or_default().to_owned();
        let message = failure.last.as_ref().map_or_else(header, |last| last.message.clone());
        Ok(Self { partition: record.partition, offset: record.offset, at: record.timestamp, message, failure })
    }

    /// A header of the original record.
    pub fn original(&self, name: &str) -> Option<&str> {
        let (_, value) = self.failure.headers.iter().find(|(header, _)| header == name)?;
        std::str::from_utf8(value).ok()
    }
}

/// Which letters are meant: those for which everything that is given here holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    pub destination: Option<DestinationId>,
    pub source: Option<SourceId>,
    pub user: Option<User>,
    pub message_id: Option<MessageId>,
    /// Any of these; all where it is empty.
    pub reasons: Vec<String>,
    pub code: Option<u16>,
    /// Given up at this time or later.
    pub since: Option<Timestamp>,
    /// Given up before this time.
    pub until: Option<Timestamp>,
}

impl Filter {
    pub fn matches(&self, letter: &Letter) -> bool {
        fn is<T: AsRef<str>>(wanted: Option<T>, found: Option<&str>) -> bool {
            wanted.is_none_or(|wanted| found == Some(wanted.as_ref()))
        }
        let failure = &letter.failure;
        let destination = failure.destination.as_ref().map(DestinationId::as_str);
        is(self.destination.as_ref().map(DestinationId::as_str), destination.or(letter.original(header::DESTINATION)))
            && is(self.source.as_ref().map(SourceId::as_str), letter.original(header::SOURCE))
            && is(self.user.as_ref().map(User::as_str), letter.original(header::USER))
            && is(self.message_id.as_ref().map(MessageId::as_str), letter.original(header::MESSAGE_ID))
            && (self.reasons.is_empty() || self.reasons.iter().any(|reason| reason == failure.reason.as_str()))
            && self.code.is_none_or(|code| failure.last.as_ref().is_some_and(|last| last.code == code))
            && self.since.is_none_or(|since| letter.at >= since)
            && self.until.is_none_or(|until| letter.at < until)
    }
}

/// Where the letters lie that a plan means in a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    pub first: Offset,
    /// Behind the last one.
    pub until: Offset,
}

/// What is to be sent again, decided once: letters that come later are not in it. Times are in microseconds since 1970 UTC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The replay id of what is sent, and the name of the group that does it.
    pub id: String,
    #[serde(default)]
    pub shelf: Shelf,
    pub filter: Filter,
    pub spans: BTreeMap<Partition, Span>,
    /// As many as it means.
    pub letters: u64,
    /// The plans that were there when it was made: what they send it leaves out.
    pub earlier: Vec<String>,
    /// Nothing is left out.
    pub again: bool,
    /// Letters a second.
    pub rate: u32,
    pub at: Timestamp,
    pub by: String,
    /// Also where it was abandoned: its spans end then where it had come to.
    pub finished_at: Option<Timestamp>,
}

/// Of its control records.
pub const KIND: &str = "redrive";

impl Plan {
    /// Whether a letter is one of those that this plan, or an earlier one, sends.
    pub fn covers(&self, letter: &Letter) -> bool {
        let is_inside = |span: &Span| (span.first..span.until).contains(&letter.offset);
        self.spans.get(&letter.partition).is_some_and(is_inside) && self.filter.matches(letter)
    }

    /// Whether this plan sends the letter. `known`: all plans, or at least the earlier ones.
    pub fn sends(&self, letter: &Letter, known: &[Plan]) -> bool {
        let is_earlier = |plan: &&Plan| self.earlier.contains(&plan.id);
        self.covers(letter) && (self.again || !known.iter().filter(is_earlier).any(|plan| plan.covers(letter)))
    }

    pub fn to_control(&self) -> Control {
        let version = self.finished_at.unwrap_or(self.at).micros().max(0).unsigned_abs();
        let payload = serde_json::to_vec(self).unwrap_or_default().into();
        Control { kind: KIND.into(), id: self.id.clone(), version, payload }
    }

    /// None for other kinds of control records.
    ///
    /// # Errors
    /// What is wrong with the payload.
    pub fn of_control(control: &Control) -> Result<Option<Self>, String> {
        match control.kind.as_str() {
            KIND => serde_json::from_slice(&control.payload).map(Some).map_err(|error| error.to_string()),
            _ => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    use crate::model::failure::Try;
    use crate::model::outcome::Reason;
    use crate::model::record::Topic;

    fn letter(offset: u128, user: &str) -> Letter {
        let text = |name: &str, value: &str| (name.to_owned(), Bytes::copy_from_slice(value.as_bytes()));
        Letter {
            partition: Partition(3),
            offset: Offset::new(offset),
            at: Timestamp::from_millis(1_000),
            message: "no".into(),
            failure: Failure {
                stage: "router".into(),
                reason: Reason::Rejected,
                attempts: 1,
                first: None,
                last: Some(Try { at: Timestamp::from_millis(999), code: 400, message: "no".into() }),
                topic: Topic::DELIVERIES,
                partition: Partition(0),
                offset: Offset::new(7),
                timestamp: Timestamp::from_millis(900),
                key: None,
                value: None,
                headers: vec![
                    text(header::SOURCE, "s"),
                    text(header::USER, user),
                    text(header::MESSAGE_ID, "m"),
                    text(header::DESTINATION, "d"),
                ],
                destination: Some("d".into()),
                source: None,
            },
        }
    }

    fn plan(filter: Filter, first: u128, last: u128) -> Plan {
        let span = Span { first: Offset::new(first), until: Offset::new(last + 1) };
        Plan {
            id: "p".into(),
            shelf: Shelf::ProcErrors,
            filter,
            spans: [(Partition(3), span)].into(),
            letters: 2,
            earlier: vec!["e".into()],
            again: false,
            rate: 100,
            at: Timestamp::from_millis(5_000),
            by: "me@here".into(),
            finished_at: None,
        }
    }

    #[test]
    fn everything_that_is_given_has_to_hold() {
        let at = |millis| Some(Timestamp::from_millis(millis));
        let whole = Filter {
            destination: Some("d".into()),
            source: Some("s".into()),
            user: Some("u".into()),
            message_id: Some("m".into()),
            reasons: vec!["retention".into(), "rejected".into()],
            code: Some(400),
            since: at(1_000),
            until: at(1_001),
        };
        let it = letter(5, "u");
        assert!(Filter::default().matches(&it) && whole.matches(&it));
        for other in [
            Filter { destination: Some("x".into()), ..whole.clone() },
            Filter { source: Some("x".into()), ..whole.clone() },
            Filter { user: Some("x".into()), ..whole.clone() },
            Filter { message_id: Some("x".into()), ..whole.clone() },
            Filter { reasons: vec!["retention".into()], ..whole.clone() },
            Filter { code: Some(500), ..whole.clone() },
            Filter { since: at(1_001), ..whole.clone() },
            Filter { until: at(1_000), ..whole.clone() },
        ] {
            assert!(!other.matches(&it), "{other:?}");
        }
        let mut bare = it;
        bare.failure.headers.clear();
        assert!(!Filter { user: Some("u".into()), ..Filter::default() }.matches(&bare), "it has no user");
    }

    #[test]
    fn a_plan_sends_what_no_earlier_one_sends() {
        let only = |user: &str, id: &str| Plan {
            id: id.into(),
            ..plan(Filter { user: Some(user.into()), ..Filter::default() }, 4, 6)
        };
        let known = [only("u", "e"), only("v", "later")];
        let now = plan(Filter::default(), 5, 9);
        let sends = |plan: &Plan, offset, user: &str| plan.sends(&letter(offset, user), &known);
        assert!(!sends(&now, 4, "v") && sends(&now, 5, "v") && sends(&now, 9, "u") && !sends(&now, 10, "u"));
        assert!(!sends(&now, 6, "u"), "the earlier one sends it");
        assert!(sends(&Plan { again: true, ..now }, 6, "u"));
    }

    #[test]
    fn plans_survive_the_topic() {
        let mut it =
            plan(Filter { code: Some(500), since: Some(Timestamp::from_micros(1)), ..Filter::default() }, 1, 1 << 90);
        assert_eq!(Plan::of_control(&it.to_control()), Ok(Some(it.clone())));
        it.finished_at = Some(Timestamp::from_millis(6_000));
        let control = it.to_control();
        assert_eq!(Plan::of_control(&control), Ok(Some(it)));
        assert_eq!(Plan::of_control(&Control { kind: "pause".into(), ..control.clone() }), Ok(None));
        assert!(Plan::of_control(&Control { payload: "{}".into(), ..control }).is_err());
    }
}
