//! `laneway topics`: the flow's topics, as declared and as the log has them.

use clap::{Args, Subcommand};

use serde_json::{Value, json};

use super::output::{Output, line, table};
use super::{Common, Found, Usage};
use crate::app::drift::{self, Compared};
use crate::app::open::{self, AnyLog};
use crate::clock::Clock;
use crate::log::embedded::Access;
use crate::log::topic::Topics;
use crate::log::{Admin, Backend};
use crate::model::record::Partition;
use crate::with_log;

#[derive(Args)]
pub struct TopicsCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// The declared topics and what the log has of them.
    List(Common),
    /// One topic, or all: what it is for, its settings and where each comes from, its partitions.
    Describe {
        topic: Option<String>,
        #[command(flatten)]
        common: Common,
    },
    /// Where the log has something else than what is declared. Exit code 3 where it has.
    Diff(Common),
    /// Create what is missing. What exists is left as it is: partitions and settings are never changed silently.
    Apply(Common),
}

impl TopicsCommand {
    pub async fn run(&self) -> anyhow::Result<()> {
        let (common, access) = match &self.action {
            Action::List(common) | Action::Diff(common) | Action::Describe { common, .. } => (common, Access::Command),
            Action::Apply(common) => (common, Access::Setup),
        };
        let (config, output) = (common.config.load(&[], &[])?, common.output);
        let topics = open::topics(&config)?;
        let any = AnyLog::open(&config, access, &Clock::system()).await?;
        let ended = with_log!(&any, log => match &self.action {
            Action::List(_) => list(log, &topics, false, output).await,
            Action::Apply(_) => list(log, &topics, true, output).await,
            Action::Describe { topic, .. } => describe(log, &topics, topic.as_deref(), output).await,
            Action::Diff(_) => diff(log, &topics, output).await,
        });
        any.close().await;
        ended
    }
}

async fn list<B: Backend>(log: &B, topics: &Topics, apply: bool, output: Output) -> anyhow::Result<()> {
    let admin = log.admin()?;
    let (mut rows, mut shown) = (Vec::new(), Vec::new());
    for Compared { spec, found, differences } in drift::compare(log, topics.iter()).await? {
        let state = match &found {
            None if apply => {
                admin.create(spec).await?;
                "created"
            }
            None => "missing",
            Some(_) if differences.iter().any(|it| it.key == "partitions") => "other partitions",
            Some(_) if !differences.is_empty() => "other settings",
            Some(_) => "as declared",
        };
        let there = found.map(|(info, _)| info.partitions).or((state == "created").then_some(spec.partitions));
        let cell = there.map_or("-".to_owned(), |count| count.to_string());
        rows.push(vec![spec.name.clone(), spec.partitions.to_string(), cell, state.to_owned()]);
        shown.push(json!({
            "topic": spec.name, "declared_partitions": spec.partitions, "partitions": there, "state": state
        }));
    }
    match output {
        Output::Table => table(&["TOPIC", "DECLARED", "FOUND", "STATE"], &rows),
        Output::Json => drop(line(&Value::from(shown).to_string())),
    }
    Ok(())
}

async fn diff<B: Backend>(log: &B, topics: &Topics, output: Output) -> anyhow::Result<()> {
    let mut rows: Vec<[String; 4]> = Vec::new();
    for Compared { spec, found, differences } in drift::compare(log, topics.iter()).await? {
        if found.is_none() {
            rows.push([spec.name.clone(), "topic".into(), "declared".into(), "missing".into()]);
        }
        let row = |it: drift::Difference| [spec.name.clone(), it.key, it.declared, it.found.unwrap_or("-".into())];
        rows.extend(differences.into_iter().map(row));
    }
    match output {
        Output::Table if rows.is_empty() => drop(line("the log has every topic as it is declared")),
        Output::Table => {
            table(&["TOPIC", "KEY", "DECLARED", "FOUND"], &rows.iter().map(|row| row.to_vec()).collect::<Vec<_>>());
        }
        Output::Json => {
            let row = |[topic, key, declared, found]: &[String; 4]| json!({"topic": topic, "key": key, "declared": declared, "found": found});
            line(&Value::from(rows.iter().map(row).collect::<Vec<_>>()).to_string());
        }
    }
    match rows.len() {
        0 => Ok(()),
        count => anyhow::bail!(Found(format!("{count} differences between declared and found"))),
    }
}

async fn describe<B: Backend>(log: &B, topics: &Topics, name: Option<&str>, output: Output) -> anyhow::Result<()> {
    let names: Vec<&str> = topics.iter().map(|spec| spec.name.as_str()).collect();
    if let Some(name) = name
        && !names.contains(&name)
    {
        anyhow::bail!(Usage(format!("there is no topic {name} in the flow; there are: {}", names.join(", "))));
    }
    let admin = log.admin()?;
    let meant = topics.iter().filter(|spec| name.is_none_or(|name| spec.name == name));
    let mut shown = Vec::new();
    for Compared { spec, found, differences } in drift::compare(log, meant).await? {
        let mut whole = json!({
            "topic": spec.name, "why": spec.why.trim(), "key": spec.key, "value": spec.value, "written_by": spec.written_by,
            "read_by": spec.read_by, "declared_partitions": spec.partitions, "declared": spec.config,
        });
        if let Some((info, config)) = found {
            let mut partitions = Vec::new();
            for number in 0..info.partitions {
                let marks = admin.watermarks(&info.topic, Partition(number)).await?;
                partitions.push(json!({
                    "partition": number, "start": marks.start.to_string(), "stable": marks.stable.to_string(),
                    "end": marks.end.to_string(),
                }));
            }
            whole["partitions"] = json!(partitions);
            whole["own"] = json!(config.own);
            whole["defaults"] = json!(config.defaults);
            whole["differences"] = differences.iter().map(|it| json!({"key": it.key, "found": it.found})).collect();
        }
        shown.push(whole);
    }
    match output {
        Output::Json => drop(line(&Value::from(shown).to_string())),
        Output::Table => shown.iter().for_each(describe_one),
    }
    Ok(())
}

/// For people: what the log adds by itself is left out.
fn describe_one(topic: &Value) {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    line(&text(&topic["topic"]));
    for (name, key) in
        [("for", "why"), ("key", "key"), ("value", "value"), ("written by", "written_by"), ("read by", "read_by")]
    {
        line(&format!("  {name:<11} {}", text(&topic[key]).replace(['[', ']', '"'], "").replace(',', ", ")));
    }
    let Some(partitions) = topic["partitions"].as_array() else {
        line("  the log does not have it; `laneway topics apply` creates it");
        return;
    };
    for (key, value) in topic["own"].as_object().into_iter().flatten() {
        line(&format!("  {:<11} {key} = {}", "set", text(value)));
    }
    for it in topic["differences"].as_array().into_iter().flatten() {
        line(&format!("  {:<11} {} is {}, declared otherwise", "DIFFERENT", text(&it["key"]), text(&it["found"])));
    }
    let cells = |it: &Value| ["partition", "start", "stable", "end"].map(|key| text(&it[key])).to_vec();
    table(&["  PARTITION", "START", "STABLE", "END"], &partitions.iter().map(cells).collect::<Vec<_>>());
}
