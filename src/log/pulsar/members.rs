//! Who is in a group, and which partitions each should have.
//!
//! Pulsar's own hand-out (a failover subscription) is not told by the client, and would have to be read to be noticed. So members speak to
//! each other on a small topic: each says every so often who it is and what it owns, and answers who is new. Everybody computes the same
//! shares from that. Two may see it differently for a moment; then the broker decides, who gives a partition's only producer to one
//! ([`super::positions`]). Nothing rests on what is said here but who asks for which.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::model::record::{Partition, Topic};

/// The topic on which a group's members speak.
pub fn topic(group: &str, input: &Topic) -> Topic {
    Topic::new(format!("__{group}.{input}.members"))
}

/// What a member says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Word {
    pub instance: String,
    /// Of this session, unlike an earlier or later one of the same instance.
    pub session: String,
    /// When it joined, in microseconds: of two sessions of an instance the later one is right.
    pub since: i64,
    /// With the term of each: of two who claim one the later owner is right.
    pub owned: BTreeMap<Partition, u64>,
    /// It wants to hear who is there.
    #[serde(default)]
    pub asks: bool,
    #[serde(default)]
    pub leaves: bool,
}

struct Heard {
    word: Word,
    at: Instant,
}

/// The others, as far as they were heard.
#[derive(Default)]
pub struct View(BTreeMap<String, Heard>);

/// What a word means to who hears it.
#[derive(Debug, PartialEq, Eq)]
pub enum Meaning {
    Known,
    /// Somebody wants an answer.
    Asked,
    /// A later session of our own instance has joined.
    Fenced,
    /// Somebody owns partitions that we believed to be ours.
    Stolen(BTreeSet<Partition>),
}

impl View {
    pub fn hear(&mut self, me: &Word, word: Word, at: Instant) -> Meaning {
        if word.session == me.session {
            return Meaning::Known;
        }
        if word.instance == me.instance {
            let is_later = (word.since, &word.session) > (me.since, &me.session);
            return if is_later && !word.leaves { Meaning::Fenced } else { Meaning::Known };
        }
        if word.leaves {
            if self.0.get(&word.instance).is_some_and(|known| known.word.session == word.session) {
                self.0.remove(&word.instance);
            }
            return Meaning::Known;
        }
        if self.0.get(&word.instance).is_some_and(|known| known.word.since > word.since) {
            return Meaning::Known;
        }
        let is_new = !self.0.contains_key(&word.instance);
        let is_later = |(partition, term): &(&Partition, &u64)| me.owned.get(partition).is_some_and(|own| *term >= own);
        let stolen: BTreeSet<Partition> = word.owned.iter().filter(is_later).map(|(partition, _)| *partition).collect();
        let asks = word.asks || is_new;
        self.0.insert(word.instance.clone(), Heard { word, at });
        match stolen.is_empty() {
            false => Meaning::Stolen(stolen),
            true if asks => Meaning::Asked,
            true => Meaning::Known,
        }
    }

    /// Who was not heard for so long is gone.
    pub fn forget(&mut self, now: Instant, timeout: Duration) {
        self.0.retain(|_, heard| now.saturating_duration_since(heard.at) < timeout);
    }

    /// Whether somebody else says that it has a partition.
    pub fn is_owned(&self, partition: Partition) -> bool {
        self.0.values().any(|heard| heard.word.owned.contains_key(&partition))
    }

    /// What is ours of so many.
    pub fn share(&self, me: &Word, partitions: u32) -> BTreeSet<Partition> {
        let mut members: BTreeMap<&str, &BTreeMap<Partition, u64>> =
            self.0.iter().map(|(instance, heard)| (instance.as_str(), &heard.word.owned)).collect();
        members.insert(&me.instance, &me.owned);
        shares(&members, partitions).remove(me.instance.as_str()).unwrap_or_default()
    }
}

/// An even share for everybody, of what it has as far as that goes.
fn shares<'m>(
    members: &BTreeMap<&'m str, &BTreeMap<Partition, u64>>,
    partitions: u32,
) -> BTreeMap<&'m str, BTreeSet<Partition>> {
    let count = u32::try_from(members.len()).unwrap_or(u32::MAX).max(1);
    let (least, mut one_more) = ((partitions / count) as usize, (partitions % count) as usize);
    let mut free: BTreeSet<Partition> = (0..partitions).map(Partition).collect();
    let mut shares = BTreeMap::new();
    // Those who have most come first, so that they keep one more where there is one more to have.
    let mut order: Vec<_> = members.iter().collect();
    order.sort_by_key(|(instance, owned)| (std::cmp::Reverse(owned.len()), **instance));
    let mut quotas = Vec::new();
    for (instance, owned) in order {
        let quota = least + usize::from(one_more > 0);
        one_more = one_more.saturating_sub(1);
        let kept: BTreeSet<Partition> = owned.keys().copied().filter(|it| free.contains(it)).take(quota).collect();
        for partition in &kept {
            free.remove(partition);
        }
        shares.insert(*instance, kept);
        quotas.push((*instance, quota));
    }
    for (instance, quota) in quotas {
        let share = shares.entry(instance).or_default();
        while share.len() < quota
            && let Some(partition) = free.pop_first()
        {
            share.insert(partition);
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;

    fn set(numbers: &[u32]) -> BTreeSet<Partition> {
        numbers.iter().copied().map(Partition).collect()
    }

    fn terms(numbers: &[u32], term: u64) -> BTreeMap<Partition, u64> {
        numbers.iter().map(|number| (Partition(*number), term)).collect()
    }

    fn word(instance: &str, since: i64, owned: &[u32]) -> Word {
        Word {
            instance: instance.into(),
            session: format!("{instance}-{since}"),
            since,
            owned: terms(owned, 1),
            asks: false,
            leaves: false,
        }
    }

    fn shared(members: &[(&str, &[u32])], partitions: u32) -> Vec<BTreeSet<Partition>> {
        let owned: Vec<_> = members.iter().map(|(_, owned)| terms(owned, 1)).collect();
        let members: BTreeMap<&str, &BTreeMap<Partition, u64>> =
            members.iter().map(|(name, _)| *name).zip(owned.iter()).collect();
        shares(&members, partitions).into_values().collect()
    }

    #[test]
    fn shares_are_even_and_move_little() {
        assert_eq!(shared(&[("a", &[])], 3), [set(&[0, 1, 2])]);
        assert_eq!(shared(&[("a", &[0, 1, 2, 3]), ("b", &[])], 4), [set(&[0, 1]), set(&[2, 3])]);
        assert_eq!(shared(&[("a", &[]), ("b", &[0, 1, 2])], 3), [set(&[2]), set(&[0, 1])]);
        assert_eq!(shared(&[("a", &[1]), ("b", &[1])], 2), [set(&[1]), set(&[0])], "both believe that they have it");
        assert_eq!(shared(&[("a", &[]), ("b", &[]), ("c", &[1])], 2), [set(&[0]), set(&[]), set(&[1])]);
        // Whoever has the right number keeps it.
        let settled = shared(&[("a", &[4, 5, 0]), ("b", &[1, 2]), ("c", &[3, 6])], 7);
        assert_eq!(settled, [set(&[0, 4, 5]), set(&[1, 2]), set(&[3, 6])]);
    }

    #[test]
    fn members_are_heard_and_forgotten() {
        let (mut view, start) = (View::default(), Clock::system().instant());
        let me = word("a", 5, &[0, 1]);
        assert_eq!(view.hear(&me, me.clone(), start), Meaning::Known);
        assert_eq!(view.share(&me, 2), set(&[0, 1]));
        assert_eq!(view.hear(&me, word("b", 6, &[]), start), Meaning::Asked, "who is new is answered");
        assert_eq!(view.hear(&me, word("b", 6, &[2]), start), Meaning::Known);
        assert_eq!(view.share(&me, 2), set(&[0]));
        assert!(view.is_owned(Partition(2)) && !view.is_owned(Partition(0)));
        assert_eq!(view.hear(&me, word("b", 6, &[1, 2]), start), Meaning::Stolen(set(&[1])));
        let me = Word { owned: terms(&[0, 1], 2), ..me };
        assert_eq!(
            view.hear(&me, word("b", 6, &[1, 2]), start),
            Meaning::Known,
            "it had it before us, and does not know"
        );
        view.forget(start + Duration::from_secs(5), Duration::from_secs(6));
        assert!(view.is_owned(Partition(2)));
        view.forget(start + Duration::from_secs(6), Duration::from_secs(6));
        assert!(!view.is_owned(Partition(2)));
    }

    #[test]
    fn a_later_session_of_an_instance_is_the_right_one() {
        let (mut view, now) = (View::default(), Clock::system().instant());
        let me = word("a", 5, &[0]);
        assert_eq!(view.hear(&me, word("a", 4, &[0]), now), Meaning::Known, "what is said late of an earlier one");
        assert_eq!(view.hear(&me, word("a", 6, &[]), now), Meaning::Fenced);
        view.hear(&me, word("b", 8, &[3]), now);
        view.hear(&me, word("b", 7, &[4]), now);
        assert!(view.is_owned(Partition(3)) && !view.is_owned(Partition(4)));
        let leaves = |since| Word { leaves: true, ..word("b", since, &[]) };
        view.hear(&me, leaves(7), now);
        assert!(view.is_owned(Partition(3)), "an earlier one's leave");
        view.hear(&me, leaves(8), now);
        assert!(!view.is_owned(Partition(3)));
    }
}
