//! `laneway topics`: the flow's topics, as declared and as the log has them.

use clap::{Args, Subcommand};

use super::ConfigArgs;
use super::output::{Output, table};
use crate::app::open::{self, AnyLog};
use crate::clock::Clock;
use crate::log::embedded::Access;
use crate::log::topic::{TopicSpec, Topics};
use crate::log::{Admin, Backend, TopicInfo};
use crate::with_log;

#[derive(Args)]
pub struct TopicsCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Show the declared topics and what the log has of them.
    List(Common),
    /// Create what is missing. What exists is left as it is: partitions and settings are never changed silently.
    Apply(Common),
}

#[derive(Args)]
struct Common {
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    config: ConfigArgs,
}

impl TopicsCommand {
    pub async fn run(&self) -> anyhow::Result<()> {
        let (common, apply) = match &self.action {
            Action::List(common) => (common, false),
            Action::Apply(common) => (common, true),
        };
        let config = common.config.load(&[], &[])?;
        let topics = open::topics(&config)?;
        let any = AnyLog::open(&config, if apply { Access::Setup } else { Access::Command }, &Clock::system()).await?;
        let rows = with_log!(&any, log => inspect(log, &topics, apply).await)?;
        any.close().await;
        print(&rows, common.output);
        Ok(())
    }
}

/// What is to be said of a topic.
struct Row {
    name: String,
    declared: u32,
    found: Option<u32>,
    state: &'static str,
}

async fn inspect<B: Backend>(log: &B, topics: &Topics, apply: bool) -> anyhow::Result<Vec<Row>> {
    let admin = log.admin()?;
    let found = admin.topics().await?;
    let mut rows = Vec::new();
    for spec in topics.iter() {
        let before = found.iter().find(|info| info.topic == spec.topic());
        let mut state = state(spec, before);
        if before.is_none() && apply {
            admin.create(spec).await?;
            state = "created";
        }
        rows.push(Row {
            name: spec.name.clone(),
            declared: spec.partitions,
            found: before.map(|info| info.partitions).or((state == "created").then_some(spec.partitions)),
            state,
        });
    }
    Ok(rows)
}

fn state(spec: &TopicSpec, found: Option<&TopicInfo>) -> &'static str {
    match found {
        None => "missing",
        Some(info) if info.partitions != spec.partitions => "other partitions",
        Some(info) if spec.config.iter().any(|(key, value)| info.config.get(key) != Some(value)) => "other settings",
        Some(_) => "as declared",
    }
}

fn print(rows: &[Row], output: Output) {
    match output {
        Output::Table => {
            let cells = |row: &Row| {
                let found = row.found.map_or("-".to_owned(), |count| count.to_string());
                vec![row.name.clone(), row.declared.to_string(), found, row.state.to_owned()]
            };
            table(&["TOPIC", "DECLARED", "FOUND", "STATE"], &rows.iter().map(cells).collect::<Vec<_>>());
        }
        Output::Json => {
            let row = |row: &Row| {
                serde_json::json!({
                    "topic": row.name, "declared_partitions": row.declared, "partitions": row.found, "state": row.state
                })
            };
            println!("{}", serde_json::Value::from(rows.iter().map(row).collect::<Vec<_>>()));
        }
    }
}
