//! `laneway publish`: events to the topic, through the gateway's own admission.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, BufReader};

use super::output::{Output, line};
use super::run::event_partitions;
use super::{ConfigArgs, Usage};
use crate::app::open::{self, AnyLog};
use crate::clock::Clock;
use crate::log::Backend;
use crate::log::embedded::Access;
use crate::model::event::{Channel, Event};
use crate::model::record::Topic;
use crate::runtime::tally::JobTopic;
use crate::stages::gateway::request::{Call, Facts, admit};
use crate::stages::gateway::{Admission, Along};
use crate::with_log;

/// Events given to the log at a time.
const CHUNK: usize = 500;
const CHUNK_BYTES: usize = 8 << 20;

#[derive(Args)]
pub struct Publish {
    /// The source that the events are of.
    #[arg(long, value_name = "KEY")]
    write_key: String,
    /// One JSON object a line: an event with its `type`, or {"batch": […]}. Default: standard input.
    file: Option<PathBuf>,
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    config: ConfigArgs,
}

impl Publish {
    pub async fn run(&self) -> anyhow::Result<()> {
        let config = self.config.load(&[], &[])?;
        let clock = Clock::system();
        let workspace = open::workspace(&config).await?;
        let place = match config.control.url.as_str() {
            "" => config.control.workspace_file.display().to_string(),
            _ => "what the control plane says".to_owned(),
        };
        let unknown = || Usage(format!("no source has this write key in {place}"));
        let source = std::sync::Arc::clone(workspace.by_write_key(&self.write_key).ok_or_else(unknown)?);
        if !source.enabled {
            anyhow::bail!(Usage(format!("source {} is disabled", source.id)));
        }
        let mut topics = open::topics(&config)?;
        let any = AnyLog::open(&config, Access::Command, &clock).await?;
        let admit_line = |line: &str| {
            let facts = Facts {
                received_at: clock.now(),
                client_ip: String::new(),
                channel: Channel::Publish,
                names_runs: true,
                job_run: None,
                task_run: None,
            };
            // An event by itself is a batch of one: its type is its own.
            let is_batch = crate::model::json::Object::parse(line).is_ok_and(|object| object.get("batch").is_some());
            let body = if is_batch { line.to_owned() } else { format!("{{\"batch\":[{line}]}}") };
            admit(&source, Call::Batch, body.as_bytes(), &facts)
        };
        let count = with_log!(&any, log => {
            if let Some(partitions) = event_partitions(log).await? {
                topics = topics.with_partitions(partitions);
            }
            let spec = topics.get(&Topic::EVENTS).context("events is not declared")?;
            let jobs = topics.get(&Topic::JOB_STATUS).context("job-status is not declared")?;
            let admission = Admission::new(log.publisher()?, spec.placement(), JobTopic(jobs.placement()));
            match &self.file {
                Some(path) => {
                    let file = tokio::fs::File::open(path).await.with_context(|| path.display().to_string())?;
                    publish(BufReader::new(file), &admission, admit_line).await
                }
                None => publish(BufReader::new(tokio::io::stdin()), &admission, admit_line).await,
            }
        })?;
        any.close().await;
        match self.output {
            Output::Table => line(&format!("{count} events published")),
            Output::Json => line(&serde_json::json!({"published": count}).to_string()),
        };
        Ok(())
    }
}

async fn publish<P: crate::log::Publisher>(
    input: impl AsyncBufRead + Unpin,
    admission: &Admission<P>,
    admit_line: impl Fn(&str) -> Result<Vec<Event>, crate::stages::gateway::request::Refusal>,
) -> anyhow::Result<usize> {
    let mut lines = input.lines();
    let (mut number, mut published) = (0_usize, 0_usize);
    let mut waiting: Vec<Event> = Vec::new();
    let along = Along::default();
    while let Some(line) = lines.next_line().await? {
        number += 1;
        if line.trim().is_empty() {
            continue;
        }
        match admit_line(&line) {
            Ok(events) => waiting.extend(events),
            Err(refusal) => {
                admission.publish(admission.records(waiting.iter().map(|event| (event, &along)))).await?;
                published += waiting.len();
                bail!("line {number}: {refusal}; the {published} events before it are published, nothing from it on");
            }
        }
        let bytes: usize = waiting.iter().map(|event| event.payload.len()).sum();
        if waiting.len() >= CHUNK || bytes >= CHUNK_BYTES {
            admission.publish(admission.records(waiting.iter().map(|event| (event, &along)))).await?;
            published += waiting.len();
            waiting.clear();
        }
    }
    admission.publish(admission.records(waiting.iter().map(|event| (event, &along)))).await?;
    Ok(published + waiting.len())
}
