//! The workspace configuration as its JSON has it. Unknown fields are ignored, and a null is an absent field everywhere, as for rudder-server.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::SourceDefinition;

/// Null is absent, for a field that is empty where it is absent.
pub(in crate::control) fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    input: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(input)?.unwrap_or_default())
}

/// Null is absent, for a flag that is true where it is absent.
fn or_yes<'de, D: Deserializer<'de>>(input: D) -> Result<bool, D::Error> {
    Ok(Option::deserialize(input)?.unwrap_or(true))
}

/// A list without its nulls.
fn list<'de, D: Deserializer<'de>, T: Deserialize<'de>>(input: D) -> Result<Vec<T>, D::Error> {
    let all: Option<Vec<Option<T>>> = Option::deserialize(input)?;
    Ok(all.into_iter().flatten().flatten().collect())
}

/// Values by name, without nulls.
fn map<'de, D: Deserializer<'de>, T: Deserialize<'de>>(input: D) -> Result<BTreeMap<String, T>, D::Error> {
    let all: Option<HashMap<String, Option<T>>> = Option::deserialize(input)?;
    Ok(all.into_iter().flatten().filter_map(|(name, value)| Some((name, value?))).collect())
}

fn yes() -> bool {
    true
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawWorkspace {
    #[serde(default, alias = "WorkspaceID", alias = "workspaceID", deserialize_with = "or_default")]
    pub workspace_id: String,
    #[serde(alias = "Sources", deserialize_with = "list")]
    pub sources: Vec<RawSource>,
    #[serde(default, alias = "Connections", deserialize_with = "map")]
    pub connections: BTreeMap<String, RawConnection>,
    #[serde(default, alias = "EventReplays", deserialize_with = "map")]
    pub event_replays: BTreeMap<String, RawReplay>,
}

/// A replay that the control plane has begun: copies of sources and destinations, by their own ids.
#[derive(Clone, Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RawReplay {
    #[serde(deserialize_with = "map")]
    pub sources: BTreeMap<String, RawOriginal>,
    #[serde(deserialize_with = "map")]
    pub destinations: BTreeMap<String, RawOriginal>,
    #[serde(deserialize_with = "list")]
    pub connections: Vec<RawConnection>,
}

#[derive(Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawOriginal {
    #[serde(default, deserialize_with = "or_default")]
    pub original_id: String,
}

/// A source and a destination each.
pub(super) type Pairs<'a> = HashSet<(&'a str, &'a str)>;

impl RawWorkspace {
    /// Connections that are switched off.
    pub fn disconnected(&self) -> Pairs<'_> {
        let off = self.connections.values().filter(|connection| !connection.enabled);
        off.map(|connection| (connection.source_id.as_str(), connection.destination_id.as_str())).collect()
    }

    /// The sources that replay others. Those without any destination are left out.
    pub fn replays(&self) -> Vec<RawSource> {
        let mut all = Vec::new();
        for replay in self.event_replays.values() {
            for (id, RawOriginal { original_id }) in &replay.sources {
                let Some(original) = self.sources.iter().find(|source| source.id == *original_id) else { continue };
                let connections = replay.connections.iter().filter(|connection| connection.source_id == *id);
                let destinations: Vec<RawDestination> =
                    connections.filter_map(|connection| self.replayed(&connection.destination_id, replay)).collect();
                if destinations.is_empty() {
                    continue;
                }
                let mut source = RawSource {
                    id: id.clone(),
                    write_key: id.clone(),
                    original_id: original_id.clone(),
                    destinations,
                    ..original.clone()
                };
                // Nobody looks at what has been before.
                if let Value::Object(config) = &mut source.config {
                    config.remove("eventUpload");
                }
                all.push(source);
            }
        }
        all
    }

    /// The copy of a destination that a replay goes to.
    fn replayed(&self, id: &str, replay: &RawReplay) -> Option<RawDestination> {
        let original = &replay.destinations.get(id)?.original_id;
        let mut known = self.sources.iter().flat_map(|source| &source.destinations);
        let original = known.find(|destination| destination.id == *original)?;
        Some(RawDestination { id: id.to_owned(), is_processor_enabled: true, ..original.clone() })
    }
}

#[derive(Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawSource {
    #[serde(default, alias = "ID", deserialize_with = "or_default")]
    pub id: String,
    #[serde(default, alias = "Name", deserialize_with = "or_default")]
    pub name: String,
    #[serde(default, alias = "WriteKey", deserialize_with = "or_default")]
    pub write_key: String,
    #[serde(default = "yes", alias = "Enabled", deserialize_with = "or_yes")]
    pub enabled: bool,
    #[serde(default, alias = "WorkspaceID", alias = "workspaceID", deserialize_with = "or_default")]
    pub workspace_id: String,
    #[serde(default, alias = "OriginalID", alias = "originalID", deserialize_with = "or_default")]
    pub original_id: String,
    #[serde(default, alias = "SourceDefinition", deserialize_with = "or_default")]
    pub source_definition: SourceDefinition,
    #[serde(default, alias = "Config")]
    pub config: Value,
    #[serde(default, alias = "Destinations", deserialize_with = "list")]
    pub destinations: Vec<RawDestination>,
}

#[derive(Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawDestination {
    #[serde(default, alias = "ID", deserialize_with = "or_default")]
    pub id: String,
    #[serde(default, alias = "Name", deserialize_with = "or_default")]
    pub name: String,
    #[serde(default = "yes", alias = "Enabled", deserialize_with = "or_yes")]
    pub enabled: bool,
    #[serde(default = "yes", alias = "IsProcessorEnabled", deserialize_with = "or_yes")]
    pub is_processor_enabled: bool,
    #[serde(default, alias = "Config")]
    pub config: Value,
    #[serde(default, alias = "DestinationDefinition", deserialize_with = "or_default")]
    pub destination_definition: RawDefinition,
}

#[derive(Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RawDefinition {
    #[serde(alias = "Name", deserialize_with = "or_default")]
    pub name: String,
    #[serde(alias = "DisplayName", deserialize_with = "or_default")]
    pub display_name: String,
    #[serde(alias = "Config")]
    pub config: Value,
}

#[derive(Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawConnection {
    #[serde(default, deserialize_with = "or_default")]
    pub source_id: String,
    #[serde(default, deserialize_with = "or_default")]
    pub destination_id: String,
    #[serde(default = "yes", deserialize_with = "or_yes")]
    pub enabled: bool,
}
