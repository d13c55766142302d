//! What covers unfinished records, as a commit wrote it; and what a state that does not come to rest looks like.

use super::*;
use crate::model::progress::Run;

/// What is left, for a run that does not come to rest.
pub fn describe(state: &PartitionState) -> String {
    let mut text = format!("window {}..{} of {} ", state.window.base(), state.window.live(), state.taken_until);
    text += &format!("memory {}", state.account.records());
    for index in 0..state.lanes.len() {
        let lane = state.lanes.at(index);
        let scan = lane.detached.as_ref().map(|detached| (detached.scan, detached.cursor, detached.window.base()));
        text += &format!("\nlane {index} {scan:?} bytes {} shut {}", lane.account.bytes(), lane.shut);
        for (user, key) in &lane.keys {
            let queue: Vec<Offset> = key.items().map(|item| item.offset).collect();
            let next = key.failing().map(|failing| failing.next_try_at);
            text += &format!("\n  {user} {:?} {next:?} {queue:?} {:?}", key.activity(), key.rest());
        }
    }
    text
}

pub type Mark = (Option<Head>, Vec<Offset>, Option<Offset>);

/// What covers unfinished records.
#[derive(Debug, Default)]
pub struct Cover {
    pub base: Offset,
    /// Where the owner reads next: what is parked from there on is handed to its key's mark when it comes.
    pub read: Offset,
    pub runs: Vec<Run>,
    pub lanes: BTreeMap<Lane, (Offset, Vec<Run>)>,
    pub keys: BTreeMap<(Lane, String), Mark>,
}

impl Cover {
    /// How many cover a record. A lane leaves to a key what that key's mark covers.
    pub fn count(&self, record: &Record) -> usize {
        let offset = record.offset;
        let lane = lane_of(record);
        let within = |runs: &[Run]| runs.iter().any(|run| run.first <= offset && offset <= run.last);
        // Memory covers what live reading feeds. Of a lane that was detached while live was reading anew what an earlier owner had
        // read, some records are neither in the runs yet nor memory's: live will only count them.
        let in_memory = offset >= self.base && !within(&self.runs) && !self.lanes.contains_key(&lane);
        let of_lane = self.lanes.get(&lane).is_some_and(|(tail, done)| offset >= *tail && !within(done));
        let key = World::key_of(record).unwrap_or((lane, format!("#{offset}")));
        let is_parked = self.keys.get(&key).is_some_and(|(_, _, parked)| parked.is_some_and(|from| from <= offset));
        let memory = in_memory && !(is_parked && offset >= self.read);
        let of_key = self.keys.get(&key).is_some_and(|(head, followers, parked)| {
            head.as_ref().is_some_and(|head| head.offset == offset)
                || followers.contains(&offset)
                || parked.is_some_and(|parked| parked <= offset)
        });
        usize::from(memory) + usize::from(of_lane || of_key)
    }
}
