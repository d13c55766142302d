//! `laneway dead-letters redrive` and `laneway proc-errors redrive`: a plan, shown, and carried out.

use std::time::Duration;

use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};

use super::{FilterArgs, find};
use crate::app::engine::{self, Stage};
use crate::app::letters::{self, Events, Redrive, Resend, Sent, Survey};
use crate::app::open;
use crate::cli::output::{Output, line, note, short, table};
use crate::cli::run::shutdown_on_signal;
use crate::cli::{Common, Found, Usage, known as existing, operator};
use crate::clock::Clock;
use crate::config::Config;
use crate::control::suppression::{self, Suppressed};
use crate::log::partitioner::Placement;
use crate::log::{Admin, Backend};
use crate::model::record::Topic;
use crate::model::redrive::{Filter, Plan, Shelf};
use crate::transform::http::Sources;

/// Letters a second where nothing else is said.
const RATE: u32 = 100;

#[derive(Args)]
pub struct RedriveArgs {
    #[command(flatten)]
    filter: FilterArgs,
    /// Letters a second; 100 where it is not given, and for a plan that goes on the rate that it had.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: Option<u32>,
    /// Also what an earlier plan sends.
    #[arg(long)]
    again: bool,
    /// Go on with a plan that was not finished.
    #[arg(long, value_name = "ID", conflicts_with_all = ["FilterArgs", "again"])]
    plan: Option<String>,
    /// Accept a destination that nothing is known of.
    #[arg(long)]
    unknown: bool,
    /// Do it.
    #[arg(long)]
    execute: bool,
    #[command(flatten)]
    pub common: Common,
}

impl RedriveArgs {
    pub async fn run<B: Backend>(&self, log: &B, shelf: Shelf, config: &Config, clock: &Clock) -> anyhow::Result<()> {
        let mut known = letters::plans(log, shelf).await?;
        let filter = self.filter.read(clock.now())?;
        // The same command, started again, goes on too.
        let is_same = |plan: &&Plan| plan.finished_at.is_none() && plan.filter == filter && plan.again == self.again;
        let begun = match &self.plan {
            Some(id) => Some(find(&known, shelf, id)?),
            None => known.iter().find(is_same),
        };
        let mut plan = match begun.cloned() {
            Some(plan) => self.go_on(log, plan).await?,
            None => {
                let survey = letters::survey(log, shelf, &filter, self.again, &known).await?;
                let is_found = survey.letters > 0 || !survey.planned_before.is_empty() || survey.unsendable > 0;
                if let Some(id) = filter.destination.as_ref().filter(|_| !is_found && !self.unknown) {
                    existing::destination(log, config, id.as_str()).await?;
                }
                let plan = self.plan_of(&survey, shelf, filter, &known, clock);
                if !self.tell(&plan, &survey, &known)? {
                    return Ok(());
                }
                letters::forget(log, &known).await?;
                if !letters::announce(log, &plan).await? {
                    anyhow::bail!("another plan was made at the same moment; start again to see what it leaves");
                }
                plan
            }
        };
        if !self.execute {
            return Ok(());
        }
        plan.rate = self.rate.unwrap_or(plan.rate);
        known.retain(|it| it.id != plan.id);
        carry_out(log, config, clock, plan, &known, self.common.output).await
    }

    async fn go_on<B: Backend>(&self, log: &B, plan: Plan) -> anyhow::Result<Plan> {
        let sent = letters::sent(log, &plan).await?;
        match self.common.output {
            Output::Json if !self.execute => drop(line(
                &json!({
                    "plan": plan.id, "letters": plan.letters, "sent": sent, "rate": plan.rate, "finished": false,
                    "executed": false,
                })
                .to_string(),
            )),
            Output::Json => {}
            Output::Table => {
                let (made, by) = (plan.at, &plan.by);
                line(&format!("plan {} of {made} by {by} has sent {sent} of {} letters", plan.id, plan.letters));
                if !self.execute {
                    line("nothing was sent; --execute goes on with it");
                }
            }
        }
        Ok(plan)
    }

    fn plan_of(&self, survey: &Survey, shelf: Shelf, filter: Filter, known: &[Plan], clock: &Clock) -> Plan {
        Plan {
            id: uuid::Uuid::new_v4().simple().to_string()[..12].to_owned(),
            shelf,
            filter,
            spans: survey.spans.clone(),
            letters: survey.letters,
            earlier: known.iter().map(|plan| plan.id.clone()).collect(),
            again: self.again,
            rate: self.rate.unwrap_or(RATE),
            at: clock.now(),
            by: operator(),
            finished_at: None,
        }
    }

    /// Says what a new plan would send. True: it is to be carried out.
    fn tell(&self, plan: &Plan, survey: &Survey, known: &[Plan]) -> anyhow::Result<bool> {
        let goes_ahead = self.execute && plan.letters > 0;
        match self.common.output {
            // One document: that of the end.
            Output::Json if goes_ahead => {}
            Output::Json => drop(line(&survey_json(plan, survey).to_string())),
            Output::Table => {
                tell_survey(plan, survey);
                if !self.execute && plan.letters > 0 {
                    line("nothing was sent; --execute does it");
                }
            }
        }
        let unfinished = known.iter().filter(|plan| plan.finished_at.is_none());
        let waits: Vec<&Plan> = unfinished.filter(|plan| survey.planned_before.contains_key(&plan.id)).collect();
        for it in &waits {
            let (count, id) = (survey.planned_before[&it.id], &it.id);
            note(&format!(
                "laneway: {count} of the letters left out belong to plan {id}, which is not finished: {}, and `laneway {} \
                 abandon {id}` gives it up",
                go_on(it),
                it.shelf.command()
            ));
        }
        if plan.letters == 0 && !waits.is_empty() {
            anyhow::bail!(Found("what is meant waits in plans that are not finished".into()));
        }
        Ok(goes_ahead)
    }
}

fn survey_json(plan: &Plan, survey: &Survey) -> Value {
    let groups: Vec<Value> = survey
        .groups
        .iter()
        .map(|((whose, reason), count)| json!({"of": whose, "reason": reason, "letters": count}))
        .collect();
    json!({
        "letters": plan.letters, "bytes": survey.bytes, "oldest": survey.oldest.map(|at| at.to_string()),
        "newest": survey.newest.map(|at| at.to_string()), "groups": groups, "rate": plan.rate,
        "takes_seconds": takes(plan).as_secs_f64(), "planned_before": survey.planned_before.values().sum::<u64>(),
        "unsendable": survey.unsendable, "executed": false,
    })
}

fn takes(plan: &Plan) -> Duration {
    Duration::from_secs_f64(plan.letters as f64 / f64::from(plan.rate))
}

fn tell_survey(plan: &Plan, survey: &Survey) {
    let rows: Vec<Vec<String>> = survey
        .groups
        .iter()
        .map(|((destination, reason), count)| vec![destination.clone(), (*reason).to_owned(), count.to_string()])
        .collect();
    if !rows.is_empty() {
        table(&["OF", "REASON", "LETTERS"], &rows);
    }
    let span = match (survey.oldest, survey.newest) {
        (Some(oldest), Some(newest)) => format!(", given up from {oldest} to {newest}"),
        _ => String::new(),
    };
    line(&format!(
        "{} letters ({} bytes){span}; at {} a second this takes {}",
        plan.letters,
        survey.bytes,
        plan.rate,
        short(takes(plan))
    ));
    let before: u64 = survey.planned_before.values().sum();
    if before > 0 {
        line(&format!(
            "{before} more are left out: earlier plans send them, or have sent them (--again takes them in)"
        ));
    }
    if survey.unsendable > 0 {
        line(&format!("{} more cannot be sent: they do not hold the whole", survey.unsendable));
    }
}

async fn carry_out<B: Backend>(
    log: &B,
    config: &Config,
    clock: &Clock,
    mut plan: Plan,
    known: &[Plan],
    output: Output,
) -> anyhow::Result<()> {
    let before = letters::sent(log, &plan).await?;
    let resend = resend(log, config, clock, plan.shelf).await?;
    let redrive = Redrive {
        log,
        clock,
        plan: &plan,
        known,
        resend: &resend,
        session_timeout: config.runtime.session_timeout,
        shutdown: shutdown_on_signal(config),
    };
    let began = clock.instant();
    let mut told = (began, None);
    let tell = |sent: Sent| {
        let now = clock.instant();
        if now.duration_since(told.0) >= Duration::from_secs(1) || told.1.is_none() {
            let left = plan.letters.saturating_sub(sent.letters) as f64 / f64::from(plan.rate);
            told = (now, Some(sent.letters));
            note(&format!(
                "laneway: {} of {} sent, {} left",
                sent.letters,
                plan.letters,
                short(Duration::from_secs_f64(left))
            ));
        }
    };
    let sent = redrive.run(tell).await.with_context(|| go_on(&plan))?;
    // Ended before it was told how far it had been.
    let sent = Sent { letters: sent.letters.max(before), ..sent };
    let seconds = began.elapsed().as_secs_f64();
    if sent.is_finished {
        plan.finished_at = Some(clock.now());
        letters::store(log, &plan).await?;
    }
    match output {
        Output::Json => drop(line(
            &json!({
                "plan": plan.id, "letters": plan.letters, "sent": sent.letters, "finished": sent.is_finished,
                "failed_again": sent.failed_again, "seconds": seconds, "executed": true,
            })
            .to_string(),
        )),
        Output::Table => {
            let state = if sent.is_finished { "finished".to_owned() } else { go_on(&plan) };
            line(&format!("{} of {} letters sent (plan {}): {state}", sent.letters, plan.letters, plan.id));
        }
    }
    if !sent.is_finished {
        anyhow::bail!("stopped before everything was sent");
    }
    match plan.letters.saturating_sub(sent.letters) {
        0 if sent.failed_again > 0 => {
            anyhow::bail!(Found(format!("{} of them failed again; they lie in proc-errors anew", sent.failed_again)))
        }
        0 => Ok(()),
        gone => {
            anyhow::bail!(Found(format!("{gone} letters of the plan were there no more: the log had deleted them")))
        }
    }
}

fn go_on(plan: &Plan) -> String {
    format!("`laneway {} redrive --plan {} --execute` goes on with it", plan.shelf.command(), plan.id)
}

/// What it takes to send letters again.
async fn resend<B: Backend>(log: &B, config: &Config, clock: &Clock, shelf: Shelf) -> anyhow::Result<Resend> {
    let topics = open::topics(config)?;
    let there = log.admin()?.topics().await?;
    // With the partitions that the topic has.
    let placement = |topic: Topic| {
        let declared = topics.get(&topic).with_context(|| format!("{topic} is not declared"))?.placement();
        let there = there.iter().find(|info| info.topic == topic);
        let missing = || Usage(format!("there is no topic {topic}; `laneway topics apply` creates it"));
        anyhow::Ok(Placement { partitions: there.ok_or_else(missing)?.partitions, ..declared })
    };
    if shelf == Shelf::DeadLetters {
        return Ok(Resend::Deliveries(placement(Topic::DELIVERIES)?));
    }
    let failures = engine::failures(&config.log, placement(Topic::PROC_ERRORS)?, Stage::Gateway, Topic::PROC_ERRORS);
    Ok(Resend::Events(Box::new(Events {
        placement: placement(Topic::EVENTS)?,
        workspace: open::workspace(config).await?,
        sources: open::transformer(config, clock)?.map(Sources::new),
        failures,
        clock: clock.clone(),
        suppressed: match config.control.suppression.url.as_str() {
            "" => Suppressed::default(),
            _ => suppression::load(log).await?.0,
        },
    })))
}
