//! Which destinations want an event: what the client chose (`integrations`), what the destination takes.

use crate::control::workspace::Destination;
use crate::model::json::{Object, string_of};

/// What an event's `integrations` says.
pub enum Integrations<'a> {
    /// Nobody: the field is there, but cannot be followed.
    Nobody,
    /// Everybody, or nobody, but for those that are named.
    Chosen { all: bool, named: Option<Object<'a>> },
}

impl<'a> Integrations<'a> {
    pub fn of(event: &Object<'a>) -> Self {
        let raw = match event.get("integrations") {
            None | Some("null") => return Integrations::Chosen { all: true, named: None },
            Some(raw) => raw,
        };
        let Ok(named) = Object::parse(raw) else { return Integrations::Nobody };
        let all = match named.get("All") {
            None | Some("true") => true,
            Some("false") => false,
            Some(_) => return Integrations::Nobody,
        };
        Integrations::Chosen { all, named: Some(named) }
    }

    /// Whether a destination is chosen, by its display name: a boolean decides, an object means yes, else `All` does.
    pub fn chooses(&self, destination: &Destination) -> bool {
        match self {
            Integrations::Nobody => false,
            Integrations::Chosen { all, named } => {
                match named.as_ref().and_then(|named| named.get(&destination.display_name)) {
                    Some("true") => true,
                    Some("false") => false,
                    Some(own) if own.starts_with('{') => true,
                    _ => *all,
                }
            }
        }
    }
}

/// Whether a destination takes events of this type.
pub fn takes(destination: &Destination, event: &Object<'_>) -> bool {
    let Some(types) = &destination.message_types else { return true };
    let kind = event.get("type").and_then(string_of).unwrap_or_default();
    let kind = kind.trim().to_lowercase();
    types.contains(&kind)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn destination(types: Option<&[&str]>) -> Destination {
        Destination {
            id: "d".into(),
            name: "n".into(),
            kind: "WEBHOOK".into(),
            display_name: "Webhook".into(),
            message_types: types.map(|types| types.iter().map(|kind| (*kind).to_owned()).collect()),
            config: Value::Null,
        }
    }

    #[test]
    fn the_client_chooses_destinations() {
        let cases = [
            ("{}", true),
            (r#"{"integrations":null}"#, true),
            (r#"{"integrations":{}}"#, true),
            (r#"{"integrations":{"All":true,"Webhook":false}}"#, false),
            (r#"{"integrations":{"All":false}}"#, false),
            (r#"{"integrations":{"All":false,"Webhook":true}}"#, true),
            (r#"{"integrations":{"All":false,"Webhook":{"a":1}}}"#, true),
            (r#"{"integrations":{"All":false,"Webhook":"yes"}}"#, false),
            (r#"{"integrations":{"All":"true"}}"#, false),
            (r#"{"integrations":[1]}"#, false),
            (r#"{"integrations":{"Other":false}}"#, true),
        ];
        for (event, chosen) in cases {
            let object = Object::parse(event).expect("an event");
            assert_eq!(Integrations::of(&object).chooses(&destination(None)), chosen, "{event}");
        }
    }

    #[test]
    fn a_destination_takes_the_types_it_names() {
        let track = Object::parse(r#"{"type":" Track "}"#).expect("an event");
        assert!(takes(&destination(None), &track));
        assert!(takes(&destination(Some(&["track"])), &track));
        assert!(!takes(&destination(Some(&["page"])), &track));
        assert!(!takes(&destination(Some(&["page"])), &Object::parse("{}").expect("an event")));
    }
}
