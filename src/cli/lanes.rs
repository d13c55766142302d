//! `laneway lanes`: what each destination is doing, and steering it.
//!
//! What is shown is what the owners have committed to `progress.router`, so it is the same whichever process is asked; it is
//! behind by a commit interval at most.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;

use super::output::{Output, drains_in, line, short, table};
use super::{Common, Usage, known, operator};
use crate::app::open::AnyLog;
use crate::app::standing::{self, Standing};
use crate::clock::{Clock, Timestamp};
use crate::control::commands;
use crate::log::embedded::Access;
use crate::log::{Admin, Backend, Publisher};
use crate::model::command::{Action, Command};
use crate::model::id::{DestinationId, User};
use crate::model::progress::Target;
use crate::model::record::{Offset, Partition, Topic};
use crate::with_log;

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Lanes {
    #[command(subcommand)]
    action: Option<What>,
    #[command(flatten)]
    list: List,
}

#[derive(Subcommand)]
enum What {
    /// Every destination: state, pending, oldest, blocked users, time to drain. The same as `lanes` alone.
    List(List),
    /// One destination: its blocked users with attempts, next try and last error.
    Show {
        destination: String,
        #[command(flatten)]
        common: Common,
    },
    /// Start nothing more for a destination. What is pending waits; its retry windows stop.
    Pause {
        destination: String,
        /// Accept an id that nothing is known of.
        #[arg(long)]
        unknown: bool,
        #[command(flatten)]
        common: Common,
    },
    /// End a pause.
    Resume {
        destination: String,
        #[command(flatten)]
        common: Common,
    },
    /// Try what waits for its next try now.
    Retry {
        destination: String,
        /// Only this user's.
        #[arg(long)]
        user: Option<String>,
        /// Accept an id that nothing is known of.
        #[arg(long)]
        unknown: bool,
        #[command(flatten)]
        common: Common,
    },
    /// End what is pending without sending it. Shows how much that is, and acts only with --execute.
    Drain(Drain),
}

#[derive(Args)]
struct Drain {
    #[arg(required_unless_present = "job_run")]
    destination: Option<String>,
    /// Only this user's.
    #[arg(long, requires = "destination")]
    user: Option<String>,
    /// The deliveries of a reverse-ETL job run, whatever their destination.
    #[arg(long, conflicts_with_all = ["destination", "user"])]
    job_run: Option<String>,
    /// Accept an id that nothing is known of.
    #[arg(long)]
    unknown: bool,
    /// Do it.
    #[arg(long)]
    execute: bool,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct List {
    /// Watch for so many seconds to tell the time to drain; 0 shows what is there at once.
    #[arg(long, value_name = "SECONDS", default_value_t = 2)]
    over: u64,
    #[command(flatten)]
    common: Common,
}

impl Lanes {
    pub async fn run(&self) -> anyhow::Result<()> {
        let common = match &self.action {
            None => &self.list.common,
            Some(What::List(list)) => &list.common,
            Some(What::Drain(drain)) => &drain.common,
            Some(
                What::Show { common, .. }
                | What::Pause { common, .. }
                | What::Resume { common, .. }
                | What::Retry { common, .. },
            ) => common,
        };
        let config = common.config.load(&[], &[])?;
        let clock = Clock::system();
        let any = AnyLog::open(&config, Access::Command, &clock).await?;
        let ended = with_log!(&any, log => {
            match self.meant() {
                Some(id) => match known::destination(log, &config, id).await {
                    Ok(()) => self.act(log, common.output, &clock).await,
                    refused => refused,
                },
                None => self.act(log, common.output, &clock).await,
            }
        });
        any.close().await;
        ended
    }

    /// The destination that has to exist.
    fn meant(&self) -> Option<&str> {
        match &self.action {
            Some(What::Pause { destination, unknown: false, .. } | What::Retry { destination, unknown: false, .. }) => {
                Some(destination)
            }
            Some(What::Drain(Drain { destination, unknown: false, .. })) => destination.as_deref(),
            _ => None,
        }
    }

    async fn act<B: Backend>(&self, log: &B, output: Output, clock: &Clock) -> anyhow::Result<()> {
        let one = |id: &String| Target::Destination(id.as_str().into());
        match &self.action {
            None => list(log, self.list.over, output, clock).await,
            Some(What::List(args)) => list(log, args.over, output, clock).await,
            Some(What::Show { destination, .. }) => show(log, destination, output, clock).await,
            Some(What::Pause { destination, .. }) => command(log, Action::Pause, one(destination), output, clock).await,
            Some(What::Resume { destination, .. }) => {
                command(log, Action::Resume, one(destination), output, clock).await
            }
            Some(What::Retry { destination, user, .. }) => {
                command(log, Action::Retry, target(destination, user.as_deref()), output, clock).await
            }
            Some(What::Drain(drain)) => drain.run(log, output, clock).await,
        }
    }
}

fn target(destination: &str, user: Option<&str>) -> Target {
    let destination: DestinationId = destination.into();
    match user {
        Some(user) => Target::User(destination, User::from(user)),
        None => Target::Destination(destination),
    }
}

impl Drain {
    async fn run<B: Backend>(&self, log: &B, output: Output, clock: &Clock) -> anyhow::Result<()> {
        let target = match (&self.destination, &self.job_run) {
            (Some(destination), _) => target(destination, self.user.as_deref()),
            (None, Some(run)) => Target::JobRun(run.clone()),
            (None, None) => anyhow::bail!(Usage("name a destination, or --job-run".into())),
        };
        if self.execute {
            return command(log, Action::Drain, target, output, clock).await;
        }
        let standing = standing::read(log).await?;
        let pending = self.destination.as_deref().and_then(|id| standing.destinations.get(id)).map(|it| it.pending());
        match output {
            Output::Json => {
                line(&json!({"target": target.to_string(), "pending": pending, "executed": false}).to_string());
            }
            Output::Table => {
                let most = pending.map_or_else(String::new, |pending| format!(" ({pending} pending in all)"));
                line(&format!("would end what is pending of {target}{most} without sending it; --execute does it"));
            }
        }
        Ok(())
    }
}

/// Writes a command to `control`.
async fn command<B: Backend>(
    log: &B,
    action: Action,
    target: Target,
    output: Output,
    clock: &Clock,
) -> anyhow::Result<()> {
    let id = uuid::Uuid::new_v4().simple().to_string();
    let ends = if action == Action::Drain { delivery_ends(log).await? } else { BTreeMap::new() };
    let command = Command { id, action, target, at: clock.now(), by: operator(), ends };
    let record = commands::record(&command.to_control());
    log.publisher()?.publish(vec![record]).await?;
    let Command { id, action, target, at, by, .. } = command;
    match output {
        Output::Json => line(
            &json!({"id": id, "action": action, "target": target.to_string(), "at": at.to_string(), "by": by})
                .to_string(),
        ),
        Output::Table => line(&format!("{} {target}: told (id {id}, by {by})", action.as_str())),
    };
    Ok(())
}

/// Where the partitions of `deliveries` end: what is pending now lies before.
async fn delivery_ends<B: Backend>(log: &B) -> anyhow::Result<BTreeMap<Partition, Offset>> {
    let admin = log.admin()?;
    let found = admin.topics().await?;
    let partitions = found.iter().find(|info| info.topic == Topic::DELIVERIES).map_or(0, |info| info.partitions);
    let mut ends = BTreeMap::new();
    for partition in (0..partitions).map(Partition) {
        ends.insert(partition, admin.watermarks(&Topic::DELIVERIES, partition).await?.end);
    }
    Ok(ends)
}

async fn list<B: Backend>(log: &B, over: u64, output: Output, clock: &Clock) -> anyhow::Result<()> {
    let mut before = None;
    if over > 0 {
        before = Some((standing::read(log).await?, clock.instant()));
        clock.sleep(Duration::from_secs(over)).await;
    }
    let standing = standing::read(log).await?;
    let now = clock.now();
    // Reading it takes a while too.
    let seconds = before.as_ref().map_or(0.0, |(_, at)| at.elapsed().as_secs_f64());
    let rows: Vec<Row> = standing
        .destinations
        .iter()
        .map(|(id, it)| {
            let earlier = before.as_ref().and_then(|(before, _)| before.destinations.get(id));
            let ended = earlier.map(|earlier| it.ledger.ended().saturating_sub(earlier.ledger.ended()));
            let rate = ended.map(|ended| ended as f64 / seconds);
            Row::new(id, it, rate, standing.is_paused(id), now)
        })
        .collect();
    match output {
        Output::Json => drop(line(&json!(rows.iter().map(|row| &row.json).collect::<Vec<_>>()).to_string())),
        Output::Table => {
            let head =
                ["DESTINATION", "STATE", "PENDING", "OLDEST", "BLOCKED USERS", "DELIVERED", "ABORTED", "DRAINS IN"];
            table(&head, &rows.iter().map(|row| row.cells.clone()).collect::<Vec<_>>());
        }
    }
    Ok(())
}

/// A destination, for people and for programs.
struct Row {
    cells: Vec<String>,
    json: serde_json::Value,
}

impl Row {
    fn new(id: &str, it: &standing::Destination, rate: Option<f64>, paused: bool, now: Timestamp) -> Self {
        let (pending, blocked) = (it.pending(), it.blocked.len());
        let oldest = it.oldest().map(|at| now.since(at)).filter(|_| pending > 0);
        let state = match (paused, it.open_since) {
            (true, _) => "paused".to_owned(),
            (false, Some(since)) if pending > 0 => format!("down for {}", short(now.since(since))),
            _ if it.detached > 0 => "catching up".to_owned(),
            _ if blocked > 0 => "users blocked".to_owned(),
            _ => "ok".to_owned(),
        };
        let (drains_in, drains) = drains_in(pending, rate);
        let dash = || "-".to_owned();
        let ledger = it.ledger;
        let cells = vec![
            id.to_owned(),
            state.clone(),
            pending.to_string(),
            oldest.map_or_else(dash, short),
            blocked.to_string(),
            ledger.delivered.to_string(),
            ledger.aborted.to_string(),
            drains,
        ];
        let json = json!({
            "destination": id, "state": state, "paused": paused, "pending": pending,
            "oldest_seconds": oldest.map(|age| age.as_secs_f64()), "blocked_users": blocked,
            "parked_users": it.parked, "detached_lanes": it.detached,
            "breaker_open_since": it.open_since.map(|at| at.to_string()), "ended_per_second": rate,
            "drains_in_seconds": drains_in,
            "ledger": {
                "taken": ledger.taken, "delivered": ledger.delivered, "filtered": ledger.filtered,
                "aborted": ledger.aborted, "drained": ledger.drained,
            },
        });
        Self { cells, json }
    }
}

async fn show<B: Backend>(log: &B, destination: &str, output: Output, clock: &Clock) -> anyhow::Result<()> {
    let standing: Standing = standing::read(log).await?;
    let Some(it) = standing.destinations.get(destination) else {
        let known: Vec<&str> = standing.destinations.keys().map(String::as_str).collect();
        anyhow::bail!(Usage(format!("nothing is known of destination {destination}; known are: {}", known.join(", "))));
    };
    let now = clock.now();
    let row = Row::new(destination, it, None, standing.is_paused(destination), now);
    match output {
        Output::Json => {
            let blocked: Vec<serde_json::Value> = it
                .blocked
                .iter()
                .map(|user| {
                    json!({
                        "user": user.user, "partition": user.partition.0, "since": user.head.first_failed_at.to_string(),
                        "attempts": user.head.attempts, "next_try_at": user.head.next_try_at.to_string(),
                        "last_code": user.head.last_code, "last_message": user.head.last_message,
                        "offset": user.head.offset.to_string(), "known_followers": user.followers,
                    })
                })
                .collect();
            let mut whole = row.json;
            whole["blocked"] = json!(blocked);
            whole["commands"] = json!(standing.commands_of(destination));
            line(&whole.to_string());
        }
        Output::Table => {
            let facts: BTreeMap<usize, &str> =
                [(1, "state"), (2, "pending"), (3, "oldest"), (5, "delivered"), (6, "aborted")].into();
            for (cell, name) in facts {
                line(&format!("{name:<10} {}", row.cells[cell]));
            }
            for command in standing.commands_of(destination) {
                line(&format!("{:<10} {command}", "command"));
            }
            line("");
            let cells = |user: &standing::Blocked| {
                let head = &user.head;
                let next = if head.next_try_at > now { short(head.next_try_at.since(now)) } else { "now".to_owned() };
                let code = if head.last_code == 0 { "-".to_owned() } else { head.last_code.to_string() };
                vec![
                    user.user.to_string(),
                    user.partition.to_string(),
                    short(now.since(head.first_failed_at)),
                    head.attempts.to_string(),
                    next,
                    code,
                    head.last_message.chars().take(80).collect(),
                ]
            };
            let head = ["BLOCKED USER", "PARTITION", "SINCE", "ATTEMPTS", "NEXT TRY", "CODE", "LAST ERROR"];
            table(&head, &it.blocked.iter().map(cells).collect::<Vec<_>>());
        }
    }
    Ok(())
}
