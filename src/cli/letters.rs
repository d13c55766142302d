//! `laneway dead-letters` and `laneway proc-errors`: what was given up, and sending it again.

mod redrive;

use std::collections::BTreeMap;

use anyhow::Context;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::output::{Output, document, line, table};
use super::secrets;
use super::stage::when;
use super::{Common, Usage};
use crate::app::engine::Stage;
use crate::app::letters;
use crate::app::open::AnyLog;
use crate::clock::{Clock, Timestamp};
use crate::config::Config;
use crate::log::Backend;
use crate::log::embedded::Access;
use crate::model::codec::{self, Unreadable};
use crate::model::delivery::{Delivery, Payload};
use crate::model::event::Event;
use crate::model::failure::Try;
use crate::model::outcome::Reason;
use crate::model::record::{Offset, Partition, header};
use crate::model::redrive::{Filter, Letter, Plan, Shelf};
use crate::with_log;

#[derive(Args)]
pub struct Letters {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// The newest, and how many there are.
    List {
        #[command(flatten)]
        filter: FilterArgs,
        /// Show so many.
        #[arg(long, default_value_t = 100)]
        limit: usize,
        #[command(flatten)]
        common: Common,
    },
    /// One of them: why it was given up, and the whole of it.
    Show {
        /// As `list` names it: PARTITION/OFFSET.
        letter: String,
        /// Show the whole URL, every header and every parameter. They may hold keys of the destination.
        #[arg(long)]
        secrets: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Send them again: a delivery to the destination that failed only, with its delivery id; an event from the beginning of the flow,
    /// to the destination whose transform failed where it was only that; a webhook request through the transformer service.
    /// Shows what that would be, and acts only with --execute. What an earlier plan sends is left out.
    Redrive(redrive::RedriveArgs),
    /// Every plan of a redrive, and which are not finished.
    Plans(Common),
    /// End a plan where it has come to. What it has not sent is free for other plans.
    Abandon {
        /// As `plans` lists it.
        #[arg(value_name = "ID")]
        plan: String,
        #[command(flatten)]
        common: Common,
    },
}

/// Which letters are meant: those for which everything that is given holds.
#[derive(Args)]
struct FilterArgs {
    /// Given up by this destination.
    #[arg(long, value_name = "ID")]
    destination: Option<String>,
    /// Of this source.
    #[arg(long, value_name = "ID")]
    source: Option<String>,
    /// Of this user.
    #[arg(long)]
    user: Option<String>,
    /// Of this event.
    #[arg(long, value_name = "ID")]
    message_id: Option<String>,
    /// Why it was given up (rejected, retries_exhausted, …). May be repeated.
    #[arg(long = "reason", value_name = "REASON")]
    reasons: Vec<String>,
    /// The last answer's status.
    #[arg(long)]
    code: Option<u16>,
    /// Given up since then: 2h, 3d, or an RFC 3339 time.
    #[arg(long, value_name = "WHEN")]
    since: Option<String>,
    /// Given up before then.
    #[arg(long, value_name = "WHEN")]
    until: Option<String>,
}

impl FilterArgs {
    fn read(&self, now: Timestamp) -> anyhow::Result<Filter> {
        let known = Reason::ALL.map(Reason::as_str);
        if let Some(reason) = self.reasons.iter().find(|reason| !known.contains(&reason.as_str())) {
            anyhow::bail!(Usage(format!("there is no reason {reason}; there are: {}", known.join(", "))));
        }
        let when = |text: &Option<String>| text.as_deref().map(|text| when(text, now)).transpose();
        Ok(Filter {
            destination: self.destination.as_deref().map(Into::into),
            source: self.source.as_deref().map(Into::into),
            user: self.user.as_deref().map(Into::into),
            message_id: self.message_id.as_deref().map(Into::into),
            reasons: self.reasons.clone(),
            code: self.code,
            since: when(&self.since)?,
            until: when(&self.until)?,
        })
    }
}

impl Letters {
    pub async fn run(&self, shelf: Shelf) -> anyhow::Result<()> {
        let common = match &self.action {
            Action::List { common, .. }
            | Action::Show { common, .. }
            | Action::Plans(common)
            | Action::Abandon { common, .. } => common,
            Action::Redrive(redrive) => &redrive.common,
        };
        let (config, clock, output) = (common.config.load(&[], &[])?, Clock::system(), common.output);
        let any = AnyLog::open(&config, Access::Command, &clock).await?;
        let ended = with_log!(&any, log => match &self.action {
            Action::List { filter, limit, .. } => list(log, shelf, &filter.read(clock.now())?, *limit, output).await,
            Action::Show { letter, secrets, .. } => show(log, shelf, letter, *secrets, output).await,
            Action::Redrive(redrive) => redrive.run(log, shelf, &config, &clock).await,
            Action::Plans(_) => plans(log, shelf, output).await,
            Action::Abandon { plan, .. } => abandon(log, shelf, &config, &clock, plan, output).await,
        });
        any.close().await;
        ended
    }
}

/// The newest letters of a partition, and how many there are.
#[derive(Default)]
struct Newest {
    letters: BTreeMap<(Timestamp, Partition, Offset), Letter>,
    count: u64,
    unreadable: u64,
}

async fn list<B: Backend>(log: &B, shelf: Shelf, filter: &Filter, limit: usize, output: Output) -> anyhow::Result<()> {
    let take = |newest: &mut Newest, letter: Result<Letter, Unreadable>| match letter {
        Ok(mut letter) if filter.matches(&letter) => {
            newest.count += 1;
            // It may be large, and is not shown here.
            letter.failure.value = None;
            newest.letters.insert((letter.at, letter.partition, letter.offset), letter);
            if newest.letters.len() > limit {
                newest.letters.pop_first();
            }
        }
        Ok(_) => {}
        Err(_) => newest.unreadable += 1,
    };
    let found = letters::scan(log, shelf, filter.since, take).await?;
    let count: u64 = found.iter().map(|it| it.count).sum();
    let unreadable: u64 = found.iter().map(|it| it.unreadable).sum();
    let all: BTreeMap<_, Letter> = found.into_iter().flat_map(|newest| newest.letters).collect();
    let letters: Vec<&Letter> = all.values().rev().take(limit).collect();
    match output {
        Output::Json => {
            let rows: Vec<Value> = letters.iter().map(|letter| describe(letter)).collect();
            line(&json!({"count": count, "unreadable": unreadable, "letters": rows}).to_string());
        }
        Output::Table => {
            let head = ["LETTER", "GIVEN UP", "SOURCE", "DESTINATION", "USER", "REASON", "CODE", "TRIES", "LAST ERROR"];
            table(&head, &letters.iter().map(|letter| cells(letter)).collect::<Vec<_>>());
            if count > letters.len() as u64 {
                line(&format!("… the newest {} of {count} (--limit)", letters.len()));
            }
            if unreadable > 0 {
                line(&format!("… and {unreadable} records that are no letters of ours"));
            }
        }
    }
    Ok(())
}

fn cells(letter: &Letter) -> Vec<String> {
    let failure = &letter.failure;
    let dash = || "-".to_owned();
    let last = failure.last.as_ref();
    vec![
        format!("{}/{}", letter.partition, letter.offset),
        letter.at.to_string(),
        letter.original(header::SOURCE).map_or_else(dash, ToOwned::to_owned),
        failure.destination.as_ref().map_or_else(dash, ToString::to_string),
        letter.original(header::USER).map_or_else(dash, ToOwned::to_owned),
        failure.reason.as_str().to_owned(),
        last.filter(|last| last.code > 0).map_or_else(dash, |last| last.code.to_string()),
        failure.attempts.to_string(),
        if letter.message.is_empty() { dash() } else { letter.message.chars().take(80).collect() },
    ]
}

fn describe(letter: &Letter) -> Value {
    let failure = &letter.failure;
    let tried = |tried: &Option<Try>| {
        tried.as_ref().map(|it| json!({"at": it.at.to_string(), "code": it.code, "message": it.message}))
    };
    json!({
        "letter": format!("{}/{}", letter.partition, letter.offset), "given_up_at": letter.at.to_string(),
        "destination": failure.destination, "source": letter.original(header::SOURCE), "user": letter.original(header::USER),
        "message_id": letter.original(header::MESSAGE_ID), "delivery_id": letter.original(header::DELIVERY_ID),
        "replay_id": letter.original(header::REPLAY_ID), "stage": failure.stage, "reason": failure.reason.as_str(),
        "message": letter.message, "attempts": failure.attempts, "first": tried(&failure.first), "last": tried(&failure.last),
        "origin": {
            "topic": failure.topic.as_str(), "partition": failure.partition.0, "offset": failure.offset.to_string(),
            "timestamp": failure.timestamp.to_string(),
        },
    })
}

async fn show<B: Backend>(
    log: &B,
    shelf: Shelf,
    letter: &str,
    with_secrets: bool,
    output: Output,
) -> anyhow::Result<()> {
    let place = letter
        .split_once('/')
        .and_then(|(partition, offset)| Some((Partition(partition.parse().ok()?), Offset::parse(offset)?)));
    let (partition, offset) = place.ok_or_else(|| Usage(format!("{letter}: expected PARTITION/OFFSET")))?;
    let record = letters::letter_at(log, shelf, partition, offset).await?;
    let record = record.ok_or_else(|| Usage(format!("there is no letter at {letter}")))?;
    let letter = Letter::of(&record).with_context(|| format!("the record at {letter}"))?;
    let mut whole = describe(&letter);
    original(&mut whole, shelf, &letter, with_secrets);
    match output {
        Output::Json => drop(line(&whole.to_string())),
        Output::Table => drop(document(&serde_json::to_string_pretty(&whole)?)),
    }
    Ok(())
}

/// What was given up, as it was.
fn original(whole: &mut Value, shelf: Shelf, letter: &Letter, with_secrets: bool) {
    let value = letter.failure.value.clone().unwrap_or_default();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let event_of = |bytes: &[u8]| if with_secrets { text(bytes) } else { secrets::event(&text(bytes)) };
    // What cannot be read may hold anything.
    let unreadable = |error: String| match with_secrets {
        true => json!({"error": error, "value": text(&value)}),
        false => json!({"error": error, "bytes": value.len(), "value": "shown with --secrets"}),
    };
    if shelf == Shelf::ProcErrors && letter.failure.stage == Stage::Gateway.as_str() {
        match serde_json::from_slice::<Value>(&value) {
            Ok(mut request) => {
                if !with_secrets {
                    secrets::webhook_request(&mut request);
                }
                whole["webhook"] = request;
            }
            Err(error) => whole["unreadable"] = unreadable(error.to_string()),
        }
        return;
    }
    if shelf == Shelf::ProcErrors {
        match codec::decode::<Event>(&value) {
            Ok(event) => {
                whole["type"] = json!(event.event_type);
                whole["received_at"] = json!(event.received_at.to_string());
                whole["event"] = json!(event_of(&event.payload));
            }
            Err(error) => whole["unreadable"] = unreadable(error.to_string()),
        }
        return;
    }
    match codec::decode::<Delivery>(&value) {
        Ok(delivery) => {
            whole["type"] = json!(delivery.event_type);
            whole["received_at"] = json!(delivery.received_at.to_string());
            match delivery.payload {
                Payload::Request(request) => {
                    let shown = |(name, value): &(String, String)| match with_secrets {
                        true => (name.clone(), value.clone()),
                        false => (name.clone(), secrets::shown(name, value).to_owned()),
                    };
                    let [headers, params]: [Vec<_>; 2] =
                        [&request.headers, &request.params].map(|list| list.iter().map(shown).collect());
                    let url = if with_secrets { request.url.clone() } else { secrets::url(&request.url) };
                    whole["request"] = json!({
                        "method": request.method, "url": url, "headers": headers, "params": params,
                        "body_format": request.body_format.as_str(), "body": text(&request.body),
                    });
                }
                Payload::Event(event) => whole["event"] = json!(event_of(&event)),
            }
        }
        Err(error) => whole["unreadable"] = unreadable(error.to_string()),
    }
}

async fn abandon<B: Backend>(
    log: &B,
    shelf: Shelf,
    config: &Config,
    clock: &Clock,
    id: &str,
    output: Output,
) -> anyhow::Result<()> {
    let known = letters::plans(log, shelf).await?;
    let plan = find(&known, shelf, id)?;
    let ended = letters::abandon(log, clock, plan, config.runtime.session_timeout).await?;
    match output {
        Output::Json => drop(line(&json!({"plan": id, "letters": plan.letters, "sent": ended.letters}).to_string())),
        Output::Table => {
            let left = plan.letters.saturating_sub(ended.letters);
            line(&format!("plan {id} ends with {} letters sent; {left} are free for other plans", ended.letters));
        }
    }
    Ok(())
}

/// A plan that is not finished.
fn find<'a>(known: &'a [Plan], shelf: Shelf, id: &str) -> Result<&'a Plan, Usage> {
    let found = known.iter().find(|plan| plan.id == id);
    match found {
        None => Err(Usage(format!("there is no plan {id}; `laneway {} plans` lists them", shelf.command()))),
        Some(plan) if plan.finished_at.is_some() => Err(Usage(format!("plan {id} is finished"))),
        Some(plan) => Ok(plan),
    }
}

async fn plans<B: Backend>(log: &B, shelf: Shelf, output: Output) -> anyhow::Result<()> {
    let mut rows = Vec::new();
    for plan in letters::plans(log, shelf).await? {
        let sent = letters::sent(log, &plan).await?;
        rows.push((plan, sent));
    }
    match output {
        Output::Json => {
            let row = |(plan, sent): &(Plan, u64)| {
                json!({
                    "plan": plan.id, "made_at": plan.at.to_string(), "by": plan.by, "letters": plan.letters, "sent": sent,
                    "rate": plan.rate, "again": plan.again, "finished_at": plan.finished_at.map(|at| at.to_string()),
                    "filter": filter_json(&plan.filter),
                })
            };
            line(&json!(rows.iter().map(row).collect::<Vec<_>>()).to_string());
        }
        Output::Table => {
            let row = |(plan, sent): &(Plan, u64)| {
                let state = if plan.finished_at.is_some() { "finished" } else { "not finished" };
                let cells =
                    [plan.id.clone(), plan.at.to_string(), plan.by.clone(), format!("{sent} of {}", plan.letters)];
                cells.into_iter().chain([state.to_owned(), filter_text(&plan.filter)]).collect()
            };
            table(&["PLAN", "MADE", "BY", "SENT", "STATE", "LETTERS"], &rows.iter().map(row).collect::<Vec<_>>());
        }
    }
    Ok(())
}

fn filter_json(filter: &Filter) -> Value {
    json!({
        "destination": filter.destination, "source": filter.source, "user": filter.user, "message_id": filter.message_id,
        "reasons": filter.reasons, "code": filter.code, "since": filter.since.map(|at| at.to_string()),
        "until": filter.until.map(|at| at.to_string()),
    })
}

fn filter_text(filter: &Filter) -> String {
    let Value::Object(fields) = filter_json(filter) else { return String::new() };
    let given = fields.into_iter().filter_map(|(name, value)| match value {
        Value::Null => None,
        Value::Array(list) if list.is_empty() => None,
        Value::Array(list) => {
            Some(format!("{name} {}", list.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" or ")))
        }
        Value::String(text) => Some(format!("{name} {text}")),
        other => Some(format!("{name} {other}")),
    });
    let given: Vec<String> = given.collect();
    if given.is_empty() { "all".to_owned() } else { given.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_said_in_words() {
        assert_eq!(filter_text(&Filter::default()), "all");
        let filter = Filter {
            destination: Some("d".into()),
            reasons: vec!["rejected".into(), "retention".into()],
            code: Some(400),
            ..Filter::default()
        };
        assert_eq!(filter_text(&filter), "code 400, destination d, reasons rejected or retention");
    }
}
