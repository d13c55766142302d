//! Everything that would keep the engine from running, or make it run badly, found at once and before it is started.

use std::sync::Arc;
use std::time::Duration;

use super::engine::edge;
use super::engine::rules::request_from_event;
use super::job_status::{self, StoredError};
use super::{drift, open, placement, retention};
use crate::clock::Clock;
use crate::config::{BackendKind, Config, Router};
use crate::control::workspace::{Source, Workspace};
use crate::log::embedded::Access;
use crate::log::partitioner::IsolateBy;
use crate::log::topic::{TopicSpec, Topics};
use crate::log::{Admin, Backend, LogError};
use crate::model::codec::KnownSchema;
use crate::model::record::{Partition, Topic};
use crate::store::Mismatch;
use crate::transform::builtin::webhook;
use crate::with_log;

/// The log has so long to answer everything that is asked.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    Ok,
    /// It runs, and somebody will wonder.
    Warning,
    /// It does not run, or loses what it should keep.
    Problem,
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::Warning => "warning",
            State::Problem => "problem",
        }
    }
}

/// What was looked at, and how it is.
#[derive(Clone, Debug)]
pub struct Finding {
    pub subject: String,
    pub state: State,
    pub says: String,
    /// What to do about it; empty where nothing is to be done.
    pub remedy: String,
}

impl Finding {
    fn ok(subject: &str, says: impl Into<String>) -> Self {
        Self { subject: subject.to_owned(), state: State::Ok, says: says.into(), remedy: String::new() }
    }

    fn warning(subject: &str, says: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { subject: subject.to_owned(), state: State::Warning, says: says.into(), remedy: remedy.into() }
    }

    pub fn problem(subject: &str, says: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { subject: subject.to_owned(), state: State::Problem, says: says.into(), remedy: remedy.into() }
    }
}

/// Looks at everything that a configuration names. Nothing is changed.
pub async fn run(config: &Config, clock: &Clock) -> Vec<Finding> {
    let mut found = vec![Finding::ok("configuration", format!("log.backend = {}", backend(config)))];
    if let Err(error) = open::instance_id(config) {
        found.push(Finding::problem("instance", error.to_string(), "choose another instance.id"));
    }
    found.extend(workspace(config).await);
    found.extend(transformer(config, clock).await);
    found.push(store(config).await);
    found.extend(suppressed(config, clock).await);
    match open::topics(config) {
        Ok(topics) => {
            if config.runtime.drain_timeout <= config.router.timeout {
                let says = "runtime.drain_timeout is not longer than router.timeout";
                let remedy = "requests under way at a stop are sent again by the next owner: make it longer";
                found.push(Finding::warning("runtime.drain_timeout", says, remedy));
            }
            found.extend(limits(config, &topics));
            found.extend(log(config, &topics, clock).await);
        }
        Err(error) => {
            let remedy = "mend the declaration in topics.dir";
            found.push(Finding::problem("topic declarations", format!("{error:#}"), remedy));
        }
    }
    found
}

fn backend(config: &Config) -> &'static str {
    match config.log.backend {
        BackendKind::Kafka => "kafka",
        BackendKind::Pulsar => "pulsar",
        BackendKind::Embedded => "embedded",
        BackendKind::Memory => "memory",
    }
}

async fn workspace(config: &Config) -> Vec<Finding> {
    match open::workspace(config).await {
        Ok(workspace) => of_workspace(&workspace, &config.router),
        Err(error) if config.control.url.is_empty() => {
            let remedy = "name the file that the control plane exports (control.workspace_file)";
            vec![Finding::problem("workspace", format!("{error:#}"), remedy)]
        }
        Err(error) => {
            let remedy = "are control.url, .token and .namespace right? The stages start with what is kept in the log, if there is something";
            vec![Finding::problem("workspace", format!("{error:#}"), remedy)]
        }
    }
}

/// Whether the transformer service is there, and knows what is asked of it.
async fn transformer(config: &Config, clock: &Clock) -> Vec<Finding> {
    let subject = "transformer";
    let remedy = "is it up, reachable from here, and is transformer.url right?";
    let service = match open::transformer(config, clock) {
        Ok(None) => return Vec::new(),
        Ok(Some(service)) => service,
        Err(error) => return vec![Finding::problem(subject, error.to_string(), "mend transformer.url")],
    };
    match service.features().await {
        Ok(features) if features["upgradedToSourceTransformV2"] == true => vec![Finding::ok(subject, "answers")],
        Ok(_) => {
            let says = "it does not transform webhook sources by the protocol's second version";
            vec![Finding::warning(subject, says, "use a newer rudder-transformer, or webhooks end in proc-errors")]
        }
        // Everything but webhooks goes on without it.
        Err(error) => vec![Finding::warning(subject, error.to_string(), remedy)],
    }
}

/// Whether the list of suppressed users can be asked for: without one no gateway takes events.
async fn suppressed(config: &Config, clock: &Clock) -> Option<Finding> {
    let subject = "suppressed users";
    if config.control.suppression.url.is_empty() {
        return None;
    }
    let remedy = "are control.suppression.url, control.token and .namespace right? A gateway takes no event before it has had a list";
    let asked = async {
        let workspace = open::workspace(config).await.map(|workspace| workspace.id.clone())?;
        let page = edge::regulations(config, &workspace, clock)?.page(None).await?;
        anyhow::Ok(page.items.len())
    };
    Some(match asked.await {
        Ok(count) => Finding::ok(subject, format!("the first page has {count}")),
        Err(error) => Finding::problem(subject, format!("{error:#}"), remedy),
    })
}

/// Whether the store is there, with its tables.
async fn store(config: &Config) -> Finding {
    let subject = "store";
    let remedy =
        "is it up, reachable from here, and is store.url right? Events are delivered without it; job status waits";
    let file = open::store_file(&open::store_url(config));
    if file.is_some() && config.log.backend.is_cluster() {
        let says = "it is a file: reporters and gateways on several machines would each have their own";
        return Finding::warning(subject, says, "name a Postgres (store.url), unless all of it runs on this machine");
    }
    if file.is_some_and(|file| !file.exists()) {
        return Finding::ok(subject, "the reporter makes it at its start");
    }
    let store = match open::job_status(config) {
        Ok(store) => store,
        Err(error) => return Finding::problem(subject, format!("{error:#}"), "mend store.url"),
    };
    match store.pending().await {
        Ok(missing) if missing.is_empty() => Finding::ok(subject, "answers"),
        Ok(_) if store.store().is_sqlite() => Finding::ok(subject, "the reporter makes it at its start"),
        Ok(missing) => {
            let says = format!("migrations are missing: {}", missing.join(", "));
            Finding::problem(subject, says, "`laneway migrate` applies them")
        }
        Err(error) => Finding::warning(subject, error.to_string(), remedy),
    }
}

fn of_workspace(workspace: &Workspace, router: &Router) -> Vec<Finding> {
    let subject = "workspace";
    let sources: Vec<_> = workspace.sources().collect();
    let count = sources.iter().map(|source| source.destinations.len()).sum::<usize>();
    let mut found = vec![Finding::ok(subject, format!("{} sources, {count} connected destinations", sources.len()))];
    for problem in workspace.left_out() {
        let remedy = "no event goes there: correct it in the control plane, or in the file";
        found.push(Finding::warning(subject, format!("left out: {problem}"), remedy));
    }
    if sources.iter().all(|source| !source.enabled) {
        found.push(Finding::warning(subject, "no source is enabled", "every event will be refused: enable one"));
    }
    for source in sources.iter().filter(|source| source.enabled && source.destinations.is_empty()) {
        let remedy = "its events go nowhere: connect one, or disable it";
        found.push(Finding::warning(subject, format!("source {} has no destination", source.id), remedy));
    }
    found.extend(requests_from_events(&sources, router));
    for destination in sources.iter().flat_map(|source| &source.destinations) {
        let subject = format!("destination {}", destination.id);
        if destination.kind.as_str() != webhook::KIND {
            let says = format!("destinations of type {} are not served", destination.kind);
            found.push(Finding::warning(&subject, says, "its events end in proc-errors: disconnect it"));
        } else if let Err(error) = webhook::check(&destination.config) {
            let remedy = "its events end in proc-errors: mend its configuration";
            found.push(Finding::warning(&subject, error.to_string(), remedy));
        }
    }
    found
}

/// Which sources' events may change path, query and headers of webhook requests.
fn requests_from_events(sources: &[&Arc<Source>], router: &Router) -> Vec<Finding> {
    let allows = request_from_event(router);
    let (mut found, mut may, mut may_not) = (Vec::new(), 0, 0);
    for source in sources {
        for destination in source.destinations.iter().filter(|it| it.kind.as_str() == webhook::KIND) {
            if !allows(source, destination) {
                may_not += 1;
                continue;
            }
            may += 1;
            if !source.definition.has_secret_key() {
                let says = format!(
                    "events of source {} may change path, query and headers of its requests, and the source's write key may be public",
                    source.id
                );
                let remedy =
                    "set request_from_event = false for it in router.destinations, unless only servers have this key";
                found.push(Finding::warning(&format!("destination {}", destination.id), says, remedy));
            }
        }
    }
    if may + may_not > 0 {
        let says = format!(
            "fullPath, appendPath and header of events are followed on {may} of {} connections from a source to a webhook",
            may + may_not
        );
        found.push(Finding::ok("webhook requests", says));
    }
    found
}

/// Each process may send one request at a time whatever its share is, so a small limit holds for few processes only.
fn limits(config: &Config, topics: &Topics) -> Vec<Finding> {
    let Some(placement) = topics.get(&Topic::DELIVERIES).map(TopicSpec::placement) else { return Vec::new() };
    let spread = match placement.isolate_by {
        IsolateBy::None => placement.partitions,
        _ => placement.spread.map_or(placement.partitions, |spread| spread.min(placement.partitions)),
    };
    let small = config.router.destinations.iter().filter_map(|(name, rules)| Some((name, rules.concurrency?)));
    let small = small.filter(|(_, limit)| *limit < spread as usize);
    let warn = |(name, limit): (&String, usize)| {
        let says = format!(
            "concurrency {limit} holds for up to {limit} router processes, and its deliveries lie in {spread} partitions"
        );
        let remedy = "run no more router processes than that, or give `deliveries` a smaller spread (topics.dir; 1 makes it exact)";
        Finding::warning(&format!("router.destinations.{name}"), says, remedy)
    };
    small.map(warn).collect()
}

async fn log(config: &Config, topics: &Topics, clock: &Clock) -> Vec<Finding> {
    let subject = "log";
    let remedy = match config.log.backend {
        BackendKind::Kafka => {
            "is it up, reachable from here, and are log.kafka.bootstrap_servers and .properties right?"
        }
        BackendKind::Pulsar => {
            "is it up, reachable from here, and are log.pulsar.service_url, .admin_url, .tenant, .namespace, .token and .oauth2 right?"
        }
        BackendKind::Embedded => {
            "start the engine once (`laneway run all`), or name its folder (log.embedded.data_dir)"
        }
        BackendKind::Memory => "",
    };
    let embedded = &config.log.embedded.data_dir;
    if config.log.backend == BackendKind::Embedded && !embedded.join("log.sqlite").exists() {
        let says = format!("there is none in {} (log.embedded.data_dir)", embedded.display());
        return vec![Finding::warning(subject, says, "the engine creates it at its start")];
    }
    let any = match open::AnyLog::open(config, Access::Command, clock).await {
        Ok(any) => any,
        Err(error) => return vec![Finding::problem(subject, format!("{error:#}"), remedy)],
    };
    let looked = async { with_log!(&any, log => look(log, config, topics, clock).await) };
    let mut found = match tokio::time::timeout(PATIENCE, looked).await {
        Ok(Ok(found)) => found,
        Ok(Err(error)) => vec![Finding::problem(subject, error.to_string(), remedy)],
        Err(_) => vec![Finding::problem(subject, format!("no answer within {PATIENCE:?}"), remedy)],
    };
    found.extend(schemas(&any, topics).await);
    any.close().await;
    found
}

/// Whether the registry takes what will be written.
async fn schemas(any: &open::AnyLog, topics: &Topics) -> Vec<Finding> {
    let Some(registry) = any.registry() else { return Vec::new() };
    let subject = "schema registry";
    if let Err(error) = registry.is_there().await {
        let remedy = "is it up, reachable from here, and are log.schema_registry.url and the way in right?";
        return vec![Finding::problem(subject, error, remedy)];
    }
    let mut found = vec![Finding::ok(subject, "answers")];
    for spec in topics.iter() {
        let Some(schema) = KnownSchema::named(&spec.value) else { continue };
        if let Err(error) = registry.check(&spec.topic(), schema).await {
            let remedy =
                "nothing can be written there until the subject takes it: upgrade its other writers and readers first";
            found.push(Finding::problem(&format!("schema of topic {}", spec.name), error, remedy));
        }
    }
    found
}

async fn look<B: Backend>(log: &B, config: &Config, topics: &Topics, clock: &Clock) -> Result<Vec<Finding>, LogError> {
    let admin = log.admin()?;
    let there = match config.log.backend.is_cluster() {
        true => drift::wait_for_topics(&admin, topics, clock).await?,
        false => admin.topics().await?,
    };
    let mut found = vec![Finding::ok("log", format!("answers, {} topics", there.len()))];
    let is_own = !config.log.backend.is_cluster();
    for compared in drift::compare(log, topics.iter()).await? {
        let subject = format!("topic {}", compared.spec.name);
        if compared.found.is_none() {
            found.push(match is_own {
                true => Finding::warning(&subject, "is not there", "the engine creates it at its start"),
                false => Finding::problem(&subject, "is not there", "`laneway topics apply` creates it"),
            });
            continue;
        }
        if compared.differences.is_empty() {
            found.push(Finding::ok(&subject, "as declared"));
        }
        for it in compared.differences {
            let has = it.found.as_deref().unwrap_or("nothing");
            let says = format!("{} is declared as {} and is {has}", it.key, it.declared);
            found.push(match it.key.as_str() {
                "partitions" => {
                    let remedy = "declare what is there (topics.dir): other partitions would move users while their deliveries wait";
                    Finding::problem(&subject, says, remedy)
                }
                _ => Finding::warning(&subject, says, "set it in the log, or declare what is there (topics.dir)"),
            });
        }
    }
    if there.iter().any(|info| info.topic == Topic::CONTROL) {
        for moved in placement::look(log, topics).await?.0 {
            let remedy = "declare what was (topics.dir), or let everything drain before the start (`laneway lag`)";
            found.push(Finding::warning("placement", moved.to_string(), remedy));
        }
    }
    if there.iter().any(|info| info.topic == Topic::JOB_STATUS) {
        found.extend(reporter(log, config).await?);
    }
    if let Err(error) = retention::check(log, topics, &config.router).await {
        found.push(Finding::problem("retention", format!("{error:#}"), "the router refuses to start until then"));
    }
    Ok(found)
}

/// Whether the reporter's positions are ones of this log. A store that does not answer is a finding of its own.
async fn reporter<B: Backend>(log: &B, config: &Config) -> Result<Vec<Finding>, LogError> {
    let is_missing = open::store_file(&open::store_url(config)).is_some_and(|file| !file.exists());
    let Some(store) = open::job_status(config).ok().filter(|_| !is_missing) else { return Ok(Vec::new()) };
    let stored = match job_status::stored(log, &store).await {
        Ok(stored) => stored,
        Err(StoredError::Store(_)) => return Ok(Vec::new()),
        Err(StoredError::Log(error)) => return Err(error),
    };
    let remedy = "nothing of the partition is counted: `laneway offsets reset reporter` with --to-earliest counts what is in this log";
    let problem = |(partition, (_, mismatch)): (Partition, (_, Option<Mismatch>))| {
        Some(Finding::problem("reporter", format!("job-status partition {partition}: {}", mismatch?), remedy))
    };
    Ok(stored.into_iter().filter_map(problem).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Layers;

    #[test]
    fn a_concurrency_that_many_processes_exceed_is_told() {
        let set = [
            ("router.destinations.d1.concurrency", "3".to_owned()),
            ("router.destinations.d2.concurrency", "12".to_owned()),
        ];
        let layers = Layers::read(None, std::iter::empty(), &set, &[]).expect("valid");
        let topics = Topics::load(None).expect("declared");
        let found = limits(&layers.config().expect("valid"), &topics);
        let said: Vec<(&str, bool)> =
            found.iter().map(|it| (it.subject.as_str(), it.says.contains("up to 3 router"))).collect();
        assert_eq!(said, [("router.destinations.d1", true)]);
    }

    #[test]
    fn a_workspace_is_looked_through() {
        let text = r#"{"workspaceId":"w","sources":[
            {"id":"s1","writeKey":"k1","enabled":true,"destinations":[]},
            {"id":"s2","writeKey":"k2","enabled":true,"destinations":[
                {"id":"d1","enabled":true,"config":{"webhookUrl":"http://127.0.0.1/"},"destinationDefinition":{"name":"WEBHOOK"}},
                {"id":"d2","enabled":true,"config":{},"destinationDefinition":{"name":"WEBHOOK"}},
                {"id":"d3","enabled":true,"config":{},"destinationDefinition":{"name":"AM"}}]}]}"#;
        let workspace = Workspace::parse(text).expect("a workspace");
        let set = [("router.destinations.d2.request_from_event", "true".to_owned())];
        let layers = Layers::read(None, std::iter::empty(), &set, &[]).expect("valid");
        let mut found = of_workspace(&workspace, &layers.config().expect("valid").router);
        found.sort_by(|a, b| a.subject.cmp(&b.subject).then(a.state.cmp(&b.state)));
        let said: Vec<(&str, &str, &str)> =
            found.iter().map(|it| (it.subject.as_str(), it.state.as_str(), it.says.as_str())).collect();
        assert_eq!(
            said,
            [
                (
                    "destination d2",
                    "warning",
                    "events of source s2 may change path, query and headers of its requests, and the source's write key may be public"
                ),
                ("destination d2", "warning", "the destination has no webhookUrl"),
                ("destination d3", "warning", "destinations of type AM are not served"),
                (
                    "webhook requests",
                    "ok",
                    "fullPath, appendPath and header of events are followed on 1 of 2 connections from a source to a webhook"
                ),
                ("workspace", "ok", "2 sources, 3 connected destinations"),
                ("workspace", "warning", "source s1 has no destination"),
            ]
        );
    }
}
