//! What the operator wants of the running stages, as it lies in the `control` topic (schemas/control.avsc).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;
use crate::model::progress::Target;
use crate::model::record::{Offset, Partition};

/// A record of `control`. Its key is `<kind>/<id>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Control {
    pub kind: String,
    pub id: String,
    /// Rises with each record of one key: the time in microseconds.
    pub version: u64,
    /// JSON, by kind.
    pub payload: bytes::Bytes,
}

/// What is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Start nothing for the destination. Retry windows stop.
    Pause,
    Resume,
    /// End everything that was written before the command without sending it.
    Drain,
    /// Try what waits for a retry now.
    Retry,
}

impl Action {
    pub fn as_str(self) -> &'static str {
        match self {
            Action::Pause => "pause",
            Action::Resume => "resume",
            Action::Drain => "drain",
            Action::Retry => "retry",
        }
    }
}

/// An admin's command: what, of what, when, by whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    pub id: String,
    pub action: Action,
    pub target: Target,
    pub at: Timestamp,
    pub by: String,
    /// Of a drain: where the partitions of `deliveries` ended when it was given. A partition that is not here is drained up to the first
    /// record that was written at `at` or later, by the clock of who wrote it.
    pub ends: BTreeMap<Partition, Offset>,
}

#[derive(Serialize, Deserialize)]
struct Payload {
    id: String,
    action: Action,
    target: String,
    at_micros: i64,
    by: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    ends: BTreeMap<u32, String>,
}

impl Command {
    /// A pause and the resume that ends it have one key, so that the last word counts.
    pub fn to_control(&self) -> Control {
        let (kind, id) = match self.action {
            Action::Pause | Action::Resume => ("pause", self.target.to_string()),
            Action::Drain => ("drain", self.id.clone()),
            Action::Retry => ("retry", self.id.clone()),
        };
        let payload = Payload {
            id: self.id.clone(),
            action: self.action,
            target: self.target.to_string(),
            at_micros: self.at.micros(),
            by: self.by.clone(),
            ends: self.ends.iter().map(|(partition, end)| (partition.0, end.to_string())).collect(),
        };
        let payload = serde_json::to_vec(&payload).unwrap_or_default().into();
        Control { kind: kind.into(), id, version: self.at.micros().max(0).unsigned_abs(), payload }
    }

    /// None for other kinds of control records.
    ///
    /// # Errors
    /// What is wrong with a command's payload.
    pub fn of_control(control: &Control) -> Result<Option<Self>, String> {
        if !["pause", "drain", "retry"].contains(&control.kind.as_str()) {
            return Ok(None);
        }
        let payload: Payload = serde_json::from_slice(&control.payload).map_err(|error| error.to_string())?;
        let target = Target::parse(&payload.target).ok_or_else(|| format!("no target: {}", payload.target))?;
        let (action, at) = (payload.action, Timestamp::from_micros(payload.at_micros));
        let end = |(partition, end): (u32, String)| {
            let offset = Offset::parse(&end).ok_or_else(|| format!("no offset: {end}"))?;
            Ok::<_, String>((Partition(partition), offset))
        };
        let ends = payload.ends.into_iter().map(end).collect::<Result<_, _>>()?;
        Ok(Some(Command { id: payload.id, action, target, at, by: payload.by, ends }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_survive_the_topic() {
        let targets = ["destination/d1", "user/d1/a/b", "job-run/7"].map(|text| Target::parse(text).expect("a target"));
        for target in targets {
            for action in [Action::Pause, Action::Resume, Action::Drain, Action::Retry] {
                let (at, by) = (Timestamp::from_micros(5), "me@here".to_owned());
                let ends = BTreeMap::from([(Partition(3), Offset::new(7)), (Partition(0), Offset::of_entry(1, 2, 3))]);
                let command = Command { id: "i".into(), action, target: target.clone(), at, by, ends };
                assert_eq!(Command::of_control(&command.to_control()), Ok(Some(command)));
            }
        }
        for text in ["", "destination/", "d1", "user/d1", "tenant/x"] {
            assert_eq!(Target::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_resume_replaces_its_pause() {
        let command = |action| {
            let target = Target::Destination("d".into());
            let (id, at) = ("i".into(), Timestamp::from_micros(1));
            Command { id, action, target, at, by: String::new(), ends: BTreeMap::new() }.to_control()
        };
        let key = |control: Control| (control.kind, control.id);
        assert_eq!(key(command(Action::Pause)), key(command(Action::Resume)));
        assert_ne!(key(command(Action::Pause)), key(command(Action::Drain)));
    }
}
