//! The workspace configuration in RudderStack's JSON, read into what the stages need. Unknown fields are ignored, so that a
//! file exported from there works as it is.

mod raw;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;

use crate::model::id::{DestinationId, DestinationType, SourceId, WorkspaceId, WriteKey};

use raw::{Pairs, RawDestination, RawSource, RawWorkspace};

pub(super) use raw::or_default;

/// Which of an event's ids keeps what in order (topics/README.md).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OrderBy {
    /// `anonymousId`, else `userId`: one device's events stay in order over login.
    #[default]
    AnonymousId,
    /// `userId`, else `anonymousId`: one person's events stay in order over devices once they are known.
    UserId,
    /// Both together: the finest spread; the order is kept while neither changes.
    Both,
}

#[derive(Debug)]
pub struct Source {
    pub id: SourceId,
    pub name: String,
    pub write_key: WriteKey,
    pub enabled: bool,
    pub workspace: WorkspaceId,
    pub order_by: OrderBy,
    pub definition: SourceDefinition,
    /// Its settings, as they are.
    pub config: Value,
    /// The source whose events it replays.
    pub replays: Option<SourceId>,
    /// Those that are enabled and connected.
    pub destinations: Vec<Arc<Destination>>,
    /// Destinations that are connected and switched off.
    pub disabled: Vec<DestinationId>,
}

/// What a source is, to the control plane.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct SourceDefinition {
    #[serde(alias = "ID", deserialize_with = "or_default")]
    pub id: String,
    /// Which transform its requests need, where it is a webhook.
    #[serde(alias = "Name", deserialize_with = "or_default")]
    pub name: String,
    /// Empty for a stream of events, else `webhook`, `cloud`, `warehouse`, ….
    #[serde(alias = "Category", deserialize_with = "or_default")]
    pub category: String,
    #[serde(rename = "type", alias = "Type", deserialize_with = "or_default")]
    pub kind: String,
    #[serde(alias = "Options")]
    pub options: Value,
}

impl Source {
    /// Somebody looks at its events in the control plane.
    pub fn is_watched(&self) -> bool {
        self.enabled && self.config.get("eventUpload") == Some(&Value::Bool(true))
    }

    pub fn is_webhook(&self) -> bool {
        self.definition.category == "webhook"
    }

    /// Brings rows of a warehouse or of another tool (reverse ETL), not what users do now.
    pub fn is_backfill(&self) -> bool {
        !matches!(self.definition.category.as_str(), "" | "webhook")
    }
}

#[derive(Debug)]
pub struct Destination {
    pub id: DestinationId,
    pub name: String,
    pub kind: DestinationType,
    /// What an event's `integrations` calls it.
    pub display_name: String,
    /// The message types it takes; all where it does not say.
    pub message_types: Option<Vec<String>>,
    pub config: Value,
}

/// A workspace with its indexes.
#[derive(Debug, Default)]
pub struct Workspace {
    pub id: WorkspaceId,
    by_write_key: HashMap<WriteKey, Arc<Source>>,
    by_source: HashMap<SourceId, Arc<Source>>,
    by_destination: HashMap<DestinationId, Arc<Destination>>,
    left_out: Vec<String>,
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum WorkspaceError {
    #[error("not a workspace configuration: {0}")]
    Json(#[from] serde_json::Error),
    #[error("{0}")]
    Refused(String),
}

impl Workspace {
    /// # Errors
    /// [`WorkspaceError`] says what and where: the line and column of a JSON error, or the ids that contradict each other.
    pub fn parse(text: &str) -> Result<Self, WorkspaceError> {
        let raw: RawWorkspace = serde_json::from_str(text)?;
        let mut workspace = Workspace { id: raw.workspace_id.as_str().into(), ..Workspace::default() };
        let disconnected = raw.disconnected();
        for source in raw.sources.iter().chain(&raw.replays()) {
            workspace.add(source, &raw, &disconnected)?;
        }
        Ok(workspace)
    }

    /// One workspace, or several by their ids, as a control plane has them.
    ///
    /// # Errors
    /// As [`Workspace::parse`].
    pub fn parse_any(text: &str) -> Result<Self, WorkspaceError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Probe {
            #[serde(alias = "Sources")]
            sources: Option<serde::de::IgnoredAny>,
            #[serde(alias = "WorkspaceID", alias = "workspaceID")]
            workspace_id: Option<String>,
        }
        let probe: Probe = serde_json::from_str(text)?;
        if probe.sources.is_some() || probe.workspace_id.is_some() {
            return Self::parse(text);
        }
        let all: BTreeMap<String, Option<RawWorkspace>> = serde_json::from_str(text)?;
        // An answer that knows of none is a mistake: it would end what all of them do.
        if all.values().all(Option::is_none) {
            return Err(WorkspaceError::Refused("there is no workspace in it".to_owned()));
        }
        let mut workspace = Workspace::default();
        for (id, raw) in all.into_iter().filter_map(|(id, raw)| Some((id, raw?))) {
            let raw =
                RawWorkspace { workspace_id: if raw.workspace_id.is_empty() { id } else { raw.workspace_id }, ..raw };
            let disconnected = raw.disconnected();
            for source in raw.sources.iter().chain(&raw.replays()) {
                workspace.add(source, &raw, &disconnected)?;
            }
        }
        Ok(workspace)
    }

    pub fn by_write_key(&self, key: &str) -> Option<&Arc<Source>> {
        self.by_write_key.get(key)
    }

    pub fn source(&self, id: &SourceId) -> Option<&Arc<Source>> {
        self.by_source.get(id)
    }

    /// An enabled destination.
    pub fn destination(&self, id: &DestinationId) -> Option<&Arc<Destination>> {
        self.by_destination.get(id)
    }

    /// Every connected destination, also those that are switched off.
    pub fn destination_ids(&self) -> impl Iterator<Item = &DestinationId> {
        self.by_destination.keys().chain(self.by_source.values().flat_map(|source| &source.disabled))
    }

    pub fn sources(&self) -> impl Iterator<Item = &Arc<Source>> {
        self.by_source.values()
    }

    /// Whether this may take the place of the configuration in force. One without sources would refuse every event, so it is taken for a
    /// mistake.
    ///
    /// # Errors
    /// [`WorkspaceError::Refused`].
    pub fn may_replace(&self, in_force: &Workspace, allow_empty: bool) -> Result<(), WorkspaceError> {
        let (now, before) = (self.by_source.len(), in_force.by_source.len());
        if now == 0 && before > 0 && !allow_empty {
            return Err(WorkspaceError::Refused(format!(
                "it has no source, and the one in force has {before}; control.allow_empty = true takes it all the same"
            )));
        }
        if now * 2 < before {
            tracing::warn!(before, now, "more than half of the sources are gone from the workspace configuration");
        }
        Ok(())
    }

    /// Sources and destinations that cannot be used, and why. Everything else of the configuration is in force.
    pub fn left_out(&self) -> &[String] {
        &self.left_out
    }

    /// Logs what is left out.
    pub fn warn(&self) {
        for problem in &self.left_out {
            tracing::warn!(problem, "left out of the workspace configuration");
        }
    }

    fn add(&mut self, source: &RawSource, raw: &RawWorkspace, disconnected: &Pairs<'_>) -> Result<(), WorkspaceError> {
        let refused = |what: String| Err(WorkspaceError::Refused(what));
        if source.id.is_empty() || source.write_key.is_empty() {
            self.left_out.push(format!("source {:?} ({:?}) has no id or no writeKey", source.id, source.name));
            return Ok(());
        }
        let disconnected =
            |destination: &RawDestination| disconnected.contains(&(source.id.as_str(), destination.id.as_str()));
        let (mut destinations, mut disabled) = (Vec::new(), Vec::new());
        for destination in &source.destinations {
            if destination.id.is_empty() || destination.destination_definition.name.is_empty() {
                let (id, name) = (&destination.id, &destination.name);
                let problem = format!("destination {id:?} ({name:?}) of source {:?} has no id or no type", source.id);
                self.left_out.push(problem);
                continue;
            }
            match (destination.is_processor_enabled, destination.enabled && !disconnected(destination)) {
                (true, true) => destinations.push(self.destination_of(destination)?),
                (true, false) => disabled.push(destination.id.as_str().into()),
                (false, _) => {}
            }
        }
        let workspace = if source.workspace_id.is_empty() { &raw.workspace_id } else { &source.workspace_id };
        let order_by = match source.config.get("orderBy") {
            None | Some(Value::Null) => OrderBy::default(),
            Some(value) => OrderBy::deserialize(value).map_err(|error| {
                WorkspaceError::Refused(format!("config.orderBy of source {:?}: {error}", source.id))
            })?,
        };
        let built = Arc::new(Source {
            id: source.id.as_str().into(),
            name: source.name.clone(),
            write_key: source.write_key.as_str().into(),
            enabled: source.enabled,
            workspace: workspace.as_str().into(),
            order_by,
            definition: source.source_definition.clone(),
            config: source.config.clone(),
            replays: (!source.original_id.is_empty()).then(|| source.original_id.as_str().into()),
            destinations,
            disabled,
        });
        if let Some(other) = self.by_write_key.insert(built.write_key.clone(), Arc::clone(&built)) {
            return refused(format!("sources {:?} and {:?} have the same writeKey", other.id, built.id));
        }
        if self.by_source.insert(built.id.clone(), built).is_some() {
            return refused(format!("source id {:?} occurs twice", source.id));
        }
        Ok(())
    }

    fn destination_of(&mut self, raw: &RawDestination) -> Result<Arc<Destination>, WorkspaceError> {
        if let Some(known) = self.by_destination.get(raw.id.as_str()) {
            // The same destination under several sources is one destination.
            return Ok(Arc::clone(known));
        }
        let definition = &raw.destination_definition;
        let mut message_types: Option<Vec<String>> = match definition.config.get("supportedMessageTypes") {
            Some(Value::Array(types)) => {
                Some(types.iter().filter_map(Value::as_str).map(|kind| kind.trim().to_lowercase()).collect())
            }
            // Newer definitions list them for each way of connecting; deliveries go the cloud's way.
            Some(Value::Object(ways)) => ways
                .get("cloud")
                .and_then(Value::as_array)
                .map(|types| types.iter().filter_map(Value::as_str).map(|kind| kind.trim().to_lowercase()).collect()),
            _ => None,
        };
        if raw.config.get("enableServerSideIdentify") == Some(&Value::Bool(false))
            && let Some(types) = &mut message_types
        {
            types.retain(|kind| kind != "identify");
        }
        let destination = Arc::new(Destination {
            id: raw.id.as_str().into(),
            name: raw.name.clone(),
            kind: definition.name.as_str().into(),
            display_name: if definition.display_name.is_empty() {
                definition.name.clone()
            } else {
                definition.display_name.clone()
            },
            message_types,
            config: raw.config.clone(),
        });
        self.by_destination.insert(destination.id.clone(), Arc::clone(&destination));
        Ok(destination)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(source: &str, destination: &str) -> String {
        format!(
            r#"{{"workspaceId":"ws-1","unknown":1,"sources":[{{"id":"src-1","writeKey":"wk-1"{source},"destinations":[
            {{"id":"dst-1","name":"Hook"{destination},"destinationDefinition":{{"name":"WEBHOOK","displayName":"Webhook",
            "config":{{"supportedMessageTypes":["Identify","track"]}}}}}}]}}]}}"#
        )
    }

    #[test]
    fn sources_and_destinations_are_found() {
        let workspace = Workspace::parse(&text("", "")).expect("valid");
        let source = workspace.by_write_key("wk-1").expect("there");
        assert_eq!((source.workspace.as_str(), source.enabled, source.order_by), ("ws-1", true, OrderBy::AnonymousId));
        let destination = &source.destinations[0];
        assert_eq!((destination.kind.as_str(), destination.display_name.as_str()), ("WEBHOOK", "Webhook"));
        assert_eq!(destination.message_types.as_deref(), Some(&["identify".to_owned(), "track".to_owned()][..]));
        assert!(workspace.destination(&"dst-1".into()).is_some());
    }

    #[test]
    fn disabled_and_disconnected_destinations_are_left_out() {
        for destination in [r#","enabled":false"#, r#","isProcessorEnabled":false"#] {
            let workspace = Workspace::parse(&text("", destination)).expect("valid");
            assert!(workspace.by_write_key("wk-1").expect("there").destinations.is_empty(), "{destination}");
        }
        let disconnected = text("", "").replacen(
            "\"sources\"",
            r#""connections":{"c":{"sourceId":"src-1","destinationId":"dst-1","enabled":false}},"sources""#,
            1,
        );
        let workspace = Workspace::parse(&disconnected).expect("valid");
        assert!(workspace.by_write_key("wk-1").expect("there").destinations.is_empty());
    }

    #[test]
    fn sources_say_what_they_are() {
        let of = |more: &str, destination: &str| {
            let workspace = Workspace::parse(&text(more, destination)).expect("valid");
            Arc::clone(workspace.by_write_key("wk-1").expect("there"))
        };
        assert!(!of(r#","sourceDefinition":{"category":null}"#, "").is_backfill());
        assert!(!of(r#","sourceDefinition":{"category":"webhook"}"#, "").is_backfill());
        let source = of(r#","originalId":"src-0","sourceDefinition":{"category":"warehouse"}"#, r#","enabled":false"#);
        assert!(source.is_backfill());
        assert_eq!(source.replays.as_ref().map(SourceId::as_str), Some("src-0"));
        assert_eq!(source.disabled, [DestinationId::from("dst-1")]);
    }

    #[test]
    fn replays_are_sources_of_their_own() {
        let replays = r#""eventReplays":{"r":{"sources":{"src-r":{"originalId":"src-1"},"src-x":{"originalId":"gone"},"src-y":{"originalId":"src-1"}},
            "destinations":{"dst-r":{"originalId":"dst-1"},"dst-x":{"originalId":"gone"}},
            "connections":[{"sourceId":"src-r","destinationId":"dst-r"},{"sourceId":"src-x","destinationId":"dst-r"},
                {"sourceId":"src-y","destinationId":"dst-x"}]}},"sources""#;
        let text = text(r#","config":{"eventUpload":true}"#, r#","isProcessorEnabled":false"#);
        let workspace = Workspace::parse(&text.replacen("\"sources\"", replays, 1)).expect("valid");
        let source = workspace.by_write_key("src-r").expect("there");
        assert_eq!((source.id.as_str(), source.replays.as_ref().map(SourceId::as_str)), ("src-r", Some("src-1")));
        assert_eq!(source.destinations.iter().map(|it| it.id.as_str()).collect::<Vec<_>>(), ["dst-r"]);
        assert!(!source.is_watched() && workspace.by_write_key("wk-1").expect("there").is_watched());
        assert_eq!(workspace.sources().count(), 2, "others have nowhere to go");
        let none = text.replacen("\"sources\"", r#""eventReplays":null,"sources""#, 1);
        assert_eq!(Workspace::parse(&none).expect("valid").sources().count(), 1);
    }

    #[test]
    fn several_workspaces_are_one_configuration() {
        let of = |n: u32| format!(r#"{{"sources":[{{"id":"s{n}","writeKey":"k{n}"}}]}}"#);
        let text = format!(r#"{{"ws-1":{},"ws-2":{},"ws-3":null}}"#, of(1), of(2));
        let workspace = Workspace::parse_any(&text).expect("valid");
        let of = |key: &str| workspace.by_write_key(key).map(|source| source.workspace.to_string());
        assert_eq!((of("k1"), of("k2"), of("k3")), (Some("ws-1".into()), Some("ws-2".into()), None));
        assert_eq!(
            Workspace::parse_any(r#"{"workspaceId":"w","sources":[]}"#).map(|it| it.id.to_string()).ok(),
            Some("w".into())
        );
        for broken in
            ["", "[]", r#"{"ws":{"sources":1}}"#, r#"{"ws":7}"#, "{}", r#"{"ws":null}"#, r#"{"sources":null}"#]
        {
            assert!(Workspace::parse_any(broken).is_err(), "{broken}");
        }
    }

    #[test]
    fn no_source_at_all_replaces_none() {
        let full = Workspace::parse(&text("", "")).expect("valid");
        let empty = Workspace::parse(r#"{"workspaceId":"w","sources":[]}"#).expect("valid");
        assert!(empty.may_replace(&full, false).unwrap_err().to_string().contains("the one in force has 1"));
        assert!(empty.may_replace(&full, true).is_ok() && empty.may_replace(&empty, false).is_ok());
        assert!(full.may_replace(&empty, false).is_ok());
    }

    #[test]
    fn null_is_absent_wherever_it_stands() {
        fn nulled(value: &Value, at: &mut usize, out: &mut Vec<String>, whole: &Value, path: String) {
            let children: Vec<(String, &Value)> = match value {
                Value::Object(members) => members.iter().map(|(key, it)| (format!("{path}/{key}"), it)).collect(),
                Value::Array(list) => list.iter().enumerate().map(|(n, it)| (format!("{path}/{n}"), it)).collect(),
                _ => return,
            };
            for (place, child) in children {
                let mut copy = whole.clone();
                *copy.pointer_mut(&place).expect("there") = Value::Null;
                *at += 1;
                out.push(copy.to_string());
                nulled(child, at, out, whole, place);
            }
        }
        let source = r#","name":"s","enabled":true,"workspaceId":"ws-1","originalId":"","config":{"a":1},
            "sourceDefinition":{"id":"d","name":"HTTP","category":"","type":"cloud","options":{}}"#;
        let destination = r#","enabled":true,"isProcessorEnabled":true,"config":{"webhookUrl":"http://h/"}"#;
        let replay = r#""connections":{"c":{"sourceId":"src-1","destinationId":"dst-1","enabled":true}},
            "eventReplays":{"r":{"sources":{"src-r":{"originalId":"src-1"}},"destinations":{"dst-r":{"originalId":"dst-1"}},
            "connections":[{"sourceId":"src-r","destinationId":"dst-r","enabled":true}]}},"sources""#;
        let whole = text(source, destination).replacen("\"sources\"", replay, 1);
        let whole: Value = serde_json::from_str(&whole).expect("JSON");
        let (mut places, mut texts) = (0, Vec::new());
        nulled(&whole, &mut places, &mut texts, &whole, String::new());
        for text in texts.iter().filter(|text| !text.contains(r#""sources":null,"#)) {
            let workspace = Workspace::parse(text).unwrap_or_else(|error| panic!("{error}: {text}"));
            let source = workspace.by_write_key("wk-1");
            assert!(source.is_some() || workspace.left_out().len() + workspace.sources().count() <= 2, "{text}");
        }
        assert!(places > 30, "{places}");
        let nameless = Workspace::parse(
            r#"{"sources":[{"id":"a","writeKey":null},{"id":"b","writeKey":"k",
            "destinations":[{"id":"d","destinationDefinition":null},null]}]}"#,
        );
        let nameless = nameless.expect("the rest is usable");
        assert_eq!((nameless.left_out().len(), nameless.sources().count()), (2, 1), "{:?}", nameless.left_out());
    }

    #[test]
    fn contradictions_are_named() {
        let twice = r#"{"sources":[{"id":"a","writeKey":"k"},{"id":"b","writeKey":"k"}]}"#;
        assert!(Workspace::parse(twice).unwrap_err().to_string().contains("\"a\" and \"b\""));
        let order = text(r#","config":{"orderBy":"email"}"#, "");
        assert!(Workspace::parse(&order).unwrap_err().to_string().contains("orderBy of source \"src-1\""));
        assert!(Workspace::parse("{\"sources\":[}").unwrap_err().to_string().contains("line 1 column 13"));
    }
}
