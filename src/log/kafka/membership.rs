//! Whether a session's client still knows what its group's coordinator knows.
//!
//! After a broker was away, librdkafka's consumer can stand beside its group for ever: the coordinator counts a static member
//! and has given it partitions of which the client tells nothing, or the client waits to join a group that has settled without
//! it (librdkafka 2.12 with Kafka 4.4, twice in ten restarts of an overloaded broker; librdkafka issue 3437). Nobody reads
//! those partitions then, and nothing says so. So the coordinator is asked now and then whom it believes. What differs twice in
//! a row, although the client has been polled in between, ends the session: a new one joins with a new client.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc::WeakSender;
use tokio_util::task::AbortOnDropHandle;

use crate::clock::Clock;
use crate::log::{LogError, Polled};
use crate::model::record::{Epoch, Partition};

use super::admin::KafkaAdmin;
use super::consume::Owned;

/// Longer than a rebalance in which nobody is slow.
const LOOK: Duration = Duration::from_secs(10);
/// Polls between two looks that show that the client had the chance to tell.
const POLLS: usize = 2;

/// Some member of this process has been found under its name. Not every broker has to name members as Kafka does: where none was
/// ever found, none is missed.
static MET: AtomicBool = AtomicBool::new(false);

/// What is looked after.
pub struct Watched {
    pub admin: KafkaAdmin,
    /// With the prefix.
    pub group: String,
    pub topic: String,
    /// The static member's id in its group.
    pub instance: String,
    pub owned: Owned,
    /// How often the client has been polled.
    pub polls: Arc<AtomicUsize>,
    /// To the session. It ends with the thread that polls.
    pub polled: WeakSender<Result<Polled, LogError>>,
}

/// A group as its coordinator describes it.
pub struct Described {
    /// No rebalance is under way.
    pub is_settled: bool,
    /// Ids of members, and what each was given, encoded.
    pub members: Vec<(String, Vec<u8>)>,
}

/// How the client is out of step.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Rift {
    /// The group has settled without it.
    Forgotten,
    /// It was given these and does not know.
    Untold(BTreeSet<Partition>),
}

impl std::fmt::Display for Rift {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Rift::Forgotten => write!(f, "the group has settled without this member, and the client does not join"),
            Rift::Untold(partitions) => {
                let numbers: Vec<String> = partitions.iter().map(Partition::to_string).collect();
                write!(
                    f,
                    "the group has given partitions {} to this member, and the client does not tell",
                    numbers.join(", ")
                )
            }
        }
    }
}

/// Looks until the session ends.
pub fn watch(watched: Watched) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        let clock = Clock::system();
        let (mut before, mut polls) = (None, 0);
        loop {
            clock.sleep(LOOK).await;
            // A coordinator that does not answer says nothing about the client.
            let described = watched.admin.describe(&watched.group).await;
            let owned = || watched.owned.lock().unwrap_or_else(PoisonError::into_inner);
            let Ok(described) = described else {
                before = None;
                continue;
            };
            if described.members.iter().any(|(id, _)| is_of(id, &watched.instance)) {
                MET.store(true, Ordering::Relaxed);
            }
            let is_met = MET.load(Ordering::Relaxed);
            let now = judge(&described, &watched.instance, &watched.topic, &owned()).filter(|_| is_met);
            let polled = watched.polls.load(Ordering::Relaxed);
            if now.is_some() && now == before && polled >= polls + POLLS {
                let Some(rift) = now else { continue };
                let Some(session) = watched.polled.upgrade() else { return };
                let _ = session.send(Err(LogError::broken(rift.to_string()))).await;
                return;
            }
            (before, polls) = (now, polled);
        }
    }))
}

fn judge(described: &Described, instance: &str, topic: &str, owned: &BTreeMap<Partition, Epoch>) -> Option<Rift> {
    if !described.is_settled {
        return None;
    }
    let Some((_, given)) = described.members.iter().find(|(id, _)| is_of(id, instance)) else {
        return Some(Rift::Forgotten);
    };
    // What is owned beyond that is being given back.
    let mut untold = assigned(given, topic)?;
    untold.retain(|partition| !owned.contains_key(partition));
    (!untold.is_empty()).then_some(Rift::Untold(untold))
}

/// A static member's id is its instance's with a UUID behind it.
fn is_of(member: &str, instance: &str) -> bool {
    let behind = member.strip_prefix(instance).and_then(|rest| rest.strip_prefix('-'));
    behind.is_some_and(|id| uuid::Uuid::try_parse(id).is_ok())
}

/// The partitions of a topic in a `ConsumerProtocolAssignment`: version, topics with their partitions, user data. None where it
/// is something else.
fn assigned(encoded: &[u8], topic: &str) -> Option<BTreeSet<Partition>> {
    let mut rest = encoded;
    let mut take = |count: usize| {
        let (taken, left) = rest.split_at_checked(count)?;
        rest = left;
        Some(taken)
    };
    let _version = take(2)?;
    let topics = u32::from_be_bytes(take(4)?.try_into().ok()?);
    let mut found = BTreeSet::new();
    for _ in 0..topics {
        let length = u16::from_be_bytes(take(2)?.try_into().ok()?);
        let is_ours = take(usize::from(length))? == topic.as_bytes();
        let count = u32::from_be_bytes(take(4)?.try_into().ok()?);
        for _ in 0..count {
            let number = u32::from_be_bytes(take(4)?.try_into().ok()?);
            if is_ours {
                found.insert(Partition(number));
            }
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a broker of version 4.4 gave it: `[4, 5]` of `t`, no user data.
    const GIVEN: &[u8] = &[0, 0, 0, 0, 0, 1, 0, 1, b't', 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0, 5, 0xff, 0xff, 0xff, 0xff];

    #[test]
    fn what_was_given_is_read() {
        assert_eq!(assigned(GIVEN, "t"), Some([Partition(4), Partition(5)].into()));
        assert_eq!(assigned(GIVEN, "u"), Some(BTreeSet::new()));
    }

    #[test]
    fn what_is_cut_off_says_nothing() {
        for length in 0..GIVEN.len() - 4 {
            assert_eq!(assigned(&GIVEN[..length], "t"), None, "{length} bytes");
        }
    }

    #[test]
    fn a_client_is_out_of_step_with_what_its_settled_group_says() {
        let member = |number: u32| format!("i-{number}-33dcf584-35dc-47df-a501-3c871e384970");
        let described = |is_settled, given: &[u32]| {
            let members = given.iter().map(|number| (member(*number), GIVEN.to_vec())).collect();
            Described { is_settled, members }
        };
        let owned = |numbers: &[u32]| numbers.iter().map(|number| (Partition(*number), Epoch(1))).collect();
        let judge = |described: &Described, numbers: &[u32]| judge(described, "i-1", "t", &owned(numbers));

        assert_eq!(judge(&described(true, &[1, 2]), &[4, 5]), None);
        assert_eq!(judge(&described(true, &[1, 2]), &[3, 4, 5]), None, "3 is being given back");
        assert_eq!(judge(&described(true, &[1, 2]), &[4]), Some(Rift::Untold([Partition(5)].into())));
        assert_eq!(judge(&described(true, &[2]), &[4, 5]), Some(Rift::Forgotten));
        assert_eq!(judge(&described(true, &[]), &[]), Some(Rift::Forgotten));
        assert_eq!(judge(&described(false, &[2]), &[]), None, "still rebalancing");
    }

    #[test]
    fn a_member_is_known_by_its_instance() {
        let id = "laneway.router.router-1-33dcf584-35dc-47df-a501-3c871e384970";
        assert!(is_of(id, "laneway.router.router-1"));
        assert!(!is_of(id, "laneway.router.router"));
        assert!(!is_of("laneway.router.router-1", "laneway.router.router-1"));
    }
}
