//! `laneway tail`: follows a topic.

use clap::Args;
use serde_json::{Value, json};

use super::output::{Output, line};
use super::secrets;
use super::{ConfigArgs, Usage, signalled};
use crate::app::open::AnyLog;
use crate::clock::Clock;
use crate::log::embedded::Access;
use crate::log::{Admin, Backend, Limit, LogError, Read, Reader};
use crate::model::codec;
use crate::model::command::Control;
use crate::model::delivery::{Delivery, Payload};
use crate::model::event::Event;
use crate::model::failure::Failure;
use crate::model::job_status::JobStatus;
use crate::model::progress::Progress;
use crate::model::record::{Offset, Partition, Record, Topic, header};
use crate::with_log;

#[derive(Args)]
pub struct Tail {
    /// events, deliveries, dead-letters, proc-errors, job-status, control, …
    #[arg(default_value = "events")]
    topic: String,
    /// Only records of this source.
    #[arg(long, value_name = "ID")]
    source: Option<String>,
    /// Only records of this destination.
    #[arg(long, value_name = "ID")]
    destination: Option<String>,
    /// Begin with the earliest record, instead of what comes from now on.
    #[arg(long)]
    from_start: bool,
    /// End when everything that is there now has been shown.
    #[arg(long)]
    until_end: bool,
    /// Show URLs of deliveries and the `header` object of events whole. They may hold keys of a destination.
    #[arg(long)]
    secrets: bool,
    /// A line for each record, or a JSON object for each.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    config: ConfigArgs,
}

impl Tail {
    pub async fn run(&self) -> anyhow::Result<()> {
        let config = self.config.load(&[], &[])?;
        let any = AnyLog::open(&config, Access::Command, &Clock::system()).await?;
        let ended = with_log!(&any, log => self.follow(log).await);
        any.close().await;
        ended
    }

    async fn follow<B: Backend>(&self, log: &B) -> anyhow::Result<()> {
        let admin = log.admin()?;
        let topic = Topic::new(self.topic.clone());
        let topics = admin.topics().await?;
        let Some(info) = topics.iter().find(|info| info.topic == topic) else {
            let names: Vec<&str> = topics.iter().map(|info| info.topic.as_str()).collect();
            anyhow::bail!(Usage(format!("there is no topic {topic}; there are: {}", names.join(", "))));
        };
        let mut tasks = tokio::task::JoinSet::new();
        let (lines, mut printed) = tokio::sync::mpsc::channel::<Record>(256);
        for number in 0..info.partitions {
            let partition = Partition(number);
            let marks = admin.watermarks(&topic, partition).await?;
            let from = if self.from_start { Offset::START } else { marks.end };
            let reader = log.reader(&topic, partition, from).await?;
            tasks.spawn(read(reader, lines.clone(), self.until_end));
        }
        drop(lines);
        let mut stop = std::pin::pin!(signalled());
        loop {
            tokio::select! {
                record = printed.recv() => match record {
                    Some(record) if !self.is_meant(&record) || self.print(&record) => {}
                    Some(_) => return Ok(()),
                    None => break,
                },
                Some(ended) = tasks.join_next() => ended??,
                () = &mut stop => return Ok(()),
            }
        }
        while let Some(ended) = tasks.join_next().await {
            ended??;
        }
        Ok(())
    }

    fn is_meant(&self, record: &Record) -> bool {
        if self.source.is_none() && self.destination.is_none() {
            return true;
        }
        // Not every topic says it in its headers.
        let value = self.decoded(record).unwrap_or_default();
        let is = |wanted: &Option<String>, name: &str, field: &str| {
            let Some(wanted) = wanted.as_deref() else { return true };
            record.headers.text(name) == Some(wanted) || value[field] == wanted
        };
        is(&self.source, header::SOURCE, "source") && is(&self.destination, header::DESTINATION, "destination")
    }

    /// A record's value for people. None: a tombstone.
    fn decoded(&self, record: &Record) -> Option<Value> {
        let mut value = show(&self.topic, record.value.as_ref()?, self.secrets);
        if matches!(self.topic.as_str(), "dead-letters" | "proc-errors") && value.get("reason").is_some() {
            value["message"] = json!(record.headers.text(header::FAILURE_MESSAGE));
        }
        Some(value)
    }

    /// False where nobody reads any more.
    fn print(&self, record: &Record) -> bool {
        let text = |bytes: &bytes::Bytes| String::from_utf8_lossy(bytes).into_owned();
        let key = record.key.as_ref().map(text);
        let value = self.decoded(record);
        match self.output {
            Output::Table => line(&format!(
                "{}/{}  {}  {}  {}",
                record.partition,
                record.offset,
                record.timestamp,
                key.as_deref().unwrap_or("-"),
                value.map_or_else(|| "(tombstone)".to_owned(), |value| value.to_string())
            )),
            Output::Json => {
                let headers: Vec<Value> =
                    record.headers.iter().map(|(name, value)| json!({"name": name, "value": text(value)})).collect();
                line(
                    &json!({
                        "topic": self.topic, "partition": record.partition.0, "offset": record.offset.to_string(),
                        "timestamp": record.timestamp.to_string(), "key": key, "headers": headers, "value": value,
                    })
                    .to_string(),
                )
            }
        }
    }
}

async fn read<R: Reader>(
    mut reader: R,
    lines: tokio::sync::mpsc::Sender<Record>,
    until_end: bool,
) -> Result<(), LogError> {
    loop {
        match reader.read(Limit { records: 100, bytes: 1 << 20 }).await? {
            Read::Records(records) => {
                for record in records {
                    if lines.send(record).await.is_err() {
                        return Ok(());
                    }
                }
            }
            Read::End if until_end => return Ok(()),
            Read::End if lines.is_closed() => return Ok(()),
            Read::End => {}
        }
    }
}

/// A value for people: decoded where it is one of ours.
fn show(topic: &str, value: &bytes::Bytes, with_secrets: bool) -> Value {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let event_of = |bytes: &[u8]| if with_secrets { text(bytes) } else { secrets::event(&text(bytes)) };
    let shown = match topic {
        "events" => codec::decode::<Event>(value).map(|event| {
            json!({
                "source": event.source, "user": event.user, "message_id": event.message_id, "type": event.event_type,
                "received_at": event.received_at.to_string(), "channel": event.channel.as_str(), "payload": event_of(&event.payload),
            })
        }),
        "deliveries" => codec::decode::<Delivery>(value).map(|delivery| {
            let request = match &delivery.payload {
                Payload::Request(request) => {
                    let url = if with_secrets { request.url.clone() } else { secrets::url(&request.url) };
                    json!({"method": request.method, "url": url, "body": text(&request.body)})
                }
                Payload::Event(event) => json!({"event": event_of(event)}),
            };
            json!({
                "delivery_id": delivery.delivery_id, "destination": delivery.destination, "user": delivery.user,
                "message_id": delivery.message_id, "type": delivery.event_type, "request": request,
            })
        }),
        "dead-letters" | "proc-errors" => codec::decode::<Failure>(value).map(|failure| {
            let last = failure.last.map(|last| json!({"at": last.at.to_string(), "code": last.code, "message": last.message}));
            json!({
                "stage": failure.stage, "reason": failure.reason.as_str(), "attempts": failure.attempts, "last": last,
                "destination": failure.destination, "source": failure.source, "topic": failure.topic.as_str(),
                "partition": failure.partition.0, "offset": failure.offset.to_string(),
            })
        }),
        "job-status" => codec::decode::<JobStatus>(value).map(|JobStatus { key, counts }| {
            json!({
                "job_run": key.job_run, "task_run": key.task_run, "source": key.source, "destination": key.destination,
                "in": counts.taken, "out": counts.passed, "failed": counts.failed, "failed_records": counts.failed_rows.len(),
            })
        }),
        "control" | "suppressions" => codec::decode::<Control>(value).map(|control| {
            json!({"kind": control.kind, "id": control.id, "version": control.version, "payload": text(&control.payload)})
        }),
        _ => codec::decode::<Progress>(value).map(|progress| json!(format!("{progress:?}"))),
    };
    shown.unwrap_or_else(|error| json!({"unreadable": error.to_string(), "bytes": value.len()}))
}
