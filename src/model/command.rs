//! What the operator wants of the running stages, as it lies in the `control` topic (schemas/control.avsc).

use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;
use crate::model::progress::Target;

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
    /// End everything that was taken before the command's time without sending it.
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
}

#[derive(Serialize, Deserialize)]
struct Payload {
    id: String,
    action: Action,
    target: String,
    at_micros: i64,
    by: String,
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
        Ok(Some(Command { id: payload.id, action, target, at, by: payload.by }))
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
                let command = Command { id: "i".into(), action, target: target.clone(), at, by };
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
            Command { id, action, target, at, by: String::new() }.to_control()
        };
        let key = |control: Control| (control.kind, control.id);
        assert_eq!(key(command(Action::Pause)), key(command(Action::Resume)));
        assert_ne!(key(command(Action::Pause)), key(command(Action::Drain)));
    }
}
