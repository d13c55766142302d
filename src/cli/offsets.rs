//! `laneway offsets`: where the stages' groups stand, and putting them elsewhere.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::output::{Output, line, table};
use super::stage::{Consumer, stored_positions, when};
use super::{Common, Usage};
use crate::app::engine::Stage;
use crate::app::job_status::{self, Stored};
use crate::app::offsets::{self, Place, Step, Target};
use crate::app::open::{self, AnyLog};
use crate::app::standing::{self, Standing};
use crate::clock::{Clock, Timestamp};
use crate::config::{BackendKind, Config};
use crate::log::Backend;
use crate::log::embedded::Access;
use crate::model::record::{Offset, Partition, Topic};
use crate::store::Mismatch;
use crate::store::job_status::JobStatusStore;
use crate::with_log;

#[derive(Args)]
pub struct Offsets {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Every partition's position, and where its log begins and ends.
    List {
        /// Only these stages.
        #[arg(value_enum, value_name = "STAGE")]
        stages: Vec<Consumer>,
        #[command(flatten)]
        common: Common,
    },
    /// Put a stage's positions elsewhere, while it does not run. Shows what that would be, and acts only with --execute.
    ///
    /// Processor: what lies above a position is processed, again where it was. Router: what lies above is delivered, again
    /// where it was, and what is pending below is forgotten. Reporter: what lies above is counted, again where it was; its positions
    /// are in the store, and it may run.
    Reset(Reset),
}

#[derive(Args)]
struct Reset {
    #[arg(value_enum)]
    stage: Consumer,
    /// Only these partitions.
    #[arg(long = "partition", value_name = "NUMBER")]
    partitions: Vec<u32>,
    #[command(flatten)]
    target: TargetArgs,
    /// Do it.
    #[arg(long)]
    execute: bool,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct TargetArgs {
    /// The earliest record.
    #[arg(long)]
    to_earliest: bool,
    /// The end: nothing that is there now is read.
    #[arg(long)]
    to_latest: bool,
    /// Where it is: what a router has pending is forgotten all the same.
    #[arg(long)]
    to_current: bool,
    #[arg(long, value_name = "OFFSET")]
    to_offset: Option<String>,
    /// So many offsets on, or back.
    #[arg(long, value_name = "OFFSETS", allow_hyphen_values = true)]
    shift_by: Option<i64>,
    /// What was written since then: 2h or 3d (ago), or an RFC 3339 time.
    #[arg(long, visible_aliases = ["to-datetime", "by-duration"], value_name = "WHEN")]
    to_time: Option<String>,
    /// A line PARTITION,OFFSET for each partition (or TOPIC,PARTITION,OFFSET, as kafka-consumer-groups exports them).
    #[arg(long, value_name = "FILE")]
    from_file: Option<PathBuf>,
}

impl TargetArgs {
    /// `topics`: the names of the stage's topic.
    fn read(&self, topics: &[&str], backend: BackendKind, now: Timestamp) -> anyhow::Result<Target> {
        if let Some(text) = &self.to_offset {
            let offset = Offset::parse(text).ok_or_else(|| Usage(format!("--to-offset {text}: not an offset")))?;
            of_log(offset, backend).map_err(|problem| Usage(format!("--to-offset {problem}")))?;
            return Ok(Target::Offset(offset));
        }
        if let Some(path) = &self.from_file {
            let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            let problem = |problem| Usage(format!("{}: {problem}", path.display()));
            let offsets = each(&text, topics).map_err(problem)?;
            offsets.values().try_for_each(|offset| of_log(*offset, backend)).map_err(problem)?;
            return Ok(Target::Each(offsets));
        }
        Ok(match (&self.to_time, self.shift_by) {
            (Some(text), _) => Target::Time(when(text, now)?),
            (None, Some(by)) => Target::Shift(by),
            (None, None) if self.to_earliest => Target::Earliest,
            (None, None) if self.to_latest => Target::Latest,
            (None, None) => Target::Current,
        })
    }
}

/// Refuses an offset in the notation of another log: it would be taken for the beginning or the end.
fn of_log(offset: Offset, backend: BackendKind) -> Result<(), String> {
    match (offset.entry().is_some(), backend == BackendKind::Pulsar) {
        (true, false) => {
            Err(format!("{offset}: offsets of this log are numbers, ledger:entry:index is Pulsar's notation"))
        }
        (false, true) => Err(format!("{offset}: offsets on Pulsar are written ledger:entry:index")),
        _ => Ok(()),
    }
}

/// Lines of `PARTITION,OFFSET`, or `TOPIC,PARTITION,OFFSET` as kafka-consumer-groups exports them.
fn each(text: &str, topics: &[&str]) -> Result<BTreeMap<Partition, Offset>, String> {
    let mut found = BTreeMap::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let fields: Vec<&str> = line.split(',').map(|field| field.trim().trim_matches('"')).collect();
        let place = match fields[..] {
            [topic, ..] if fields.len() == 3 && !topics.contains(&topic) => {
                return Err(format!("line {}: {topic} is not the stage's topic, {}", number + 1, topics.join(" or ")));
            }
            [partition, offset] | [_, partition, offset] => {
                partition.parse().ok().map(Partition).zip(Offset::parse(offset))
            }
            _ => None,
        };
        let (partition, offset) = place.ok_or_else(|| format!("line {}: expected PARTITION,OFFSET", number + 1))?;
        if found.insert(partition, offset).is_some() {
            return Err(format!("line {}: partition {partition} stands there twice", number + 1));
        }
    }
    Ok(found)
}

impl Offsets {
    pub async fn run(&self) -> anyhow::Result<()> {
        let common = match &self.action {
            Action::List { common, .. } => common,
            Action::Reset(reset) => &reset.common,
        };
        let (config, clock, output) = (common.config.load(&[], &[])?, Clock::system(), common.output);
        let any = AnyLog::open(&config, Access::Command, &clock).await?;
        let ended = with_log!(&any, log => match &self.action {
            Action::List { stages, .. } => list(log, stages, &config, output).await,
            Action::Reset(reset) => reset.run(log, &config, output, &clock).await,
        });
        any.close().await;
        ended
    }
}

/// A stage's topic, and where it stands in it.
async fn look<B: Backend>(
    log: &B,
    stage: Stage,
    stored: Option<&Stored>,
) -> anyhow::Result<(Topic, BTreeMap<Partition, Place>)> {
    let topic = stage.input().context("this stage reads no topic")?;
    let standing = match stage {
        Stage::Router => standing::read(log).await?,
        _ => Standing::default(),
    };
    let places = offsets::look(log, stage, &topic, &standing, stored).await?;
    Ok((topic, places))
}

async fn list<B: Backend>(log: &B, stages: &[Consumer], config: &Config, output: Output) -> anyhow::Result<()> {
    let (mut rows, mut shown, mut problems) = (Vec::new(), Vec::new(), Vec::new());
    for stage in Consumer::meant(stages) {
        let stored = match stage {
            Stage::Reporter => stored_positions(log, config).await?,
            _ => None,
        };
        let (topic, places) = look(log, stage, stored.as_ref()).await?;
        for (partition, Place { committed, marks, pending, problem }) in places {
            let problem = problem.map(|problem| problem.to_string());
            problems
                .extend(problem.iter().map(|problem| format!("{} partition {partition}: {problem}", stage.as_str())));
            let at = committed.as_ref().map(|committed| committed.offset.to_string());
            shown.push(json!({
                "stage": stage.as_str(), "group": stage.group(), "topic": topic.as_str(), "partition": partition.0,
                "committed": at, "metadata": committed.map(|committed| committed.metadata), "start": marks.start.to_string(),
                "stable": marks.stable.to_string(), "end": marks.end.to_string(), "pending": pending,
                "problem": problem,
            }));
            let dash = || "-".to_owned();
            let cells = [at.unwrap_or_else(dash), marks.start.to_string(), marks.end.to_string()];
            let pending = pending.map_or_else(dash, |pending| pending.to_string());
            rows.push([&[stage.group(), topic.to_string(), partition.to_string()], &cells[..], &[pending]].concat());
        }
    }
    match output {
        Output::Json => drop(line(&Value::from(shown).to_string())),
        Output::Table => {
            table(&["GROUP", "TOPIC", "PARTITION", "COMMITTED", "START", "END", "PENDING"], &rows);
            for problem in &problems {
                line(problem);
            }
        }
    }
    Ok(())
}

/// The store of the reporter's positions.
fn store_of(config: &Config) -> anyhow::Result<JobStatusStore> {
    if let Some(file) = open::store_file(&open::store_url(config)).filter(|file| !file.exists()) {
        anyhow::bail!("there is no store in {}: the reporter has no positions yet (store.url)", file.display());
    }
    open::job_status(config)
}

impl Reset {
    async fn run<B: Backend>(&self, log: &B, config: &Config, output: Output, clock: &Clock) -> anyhow::Result<()> {
        let (stage, own) = (Stage::from(self.stage), &config.log);
        let mut store = None;
        if stage == Stage::Reporter {
            store = Some(store_of(config)?);
        }
        let stored = match &store {
            Some(store) => Some(job_status::stored(log, store).await?),
            None => None,
        };
        let (topic, mut places) = look(log, stage, stored.as_ref()).await?;
        let names = [topic.as_str(), &format!("{}{topic}", own.topic_prefix)];
        let target = self.target.read(&names, own.backend, clock.now())?;
        let named = match &target {
            Target::Each(each) => each.keys().map(|partition| partition.0).collect(),
            _ => self.partitions.clone(),
        };
        if let Some(stray) = named.iter().find(|number| !places.contains_key(&Partition(**number))) {
            anyhow::bail!(Usage(format!("topic {topic} has no partition {stray}")));
        }
        places.retain(|partition, _| self.partitions.is_empty() || self.partitions.contains(&partition.0));
        let steps = offsets::plan(log, &topic, places, &target).await?;
        match &store {
            Some(store) if self.execute => offsets::execute_stored(log, store, &topic, &steps).await?,
            None if self.execute => offsets::execute(log, stage, &topic, &steps).await?,
            _ => {}
        }
        self.tell(&steps, output);
        Ok(())
    }

    fn tell(&self, steps: &BTreeMap<Partition, Step>, output: Output) {
        let is_foreign = |step: &Step| matches!(step.place.problem, Some(Mismatch::AnotherTopic { .. }));
        let at =
            |step: &Step| step.place.committed.as_ref().filter(|_| !is_foreign(step)).map(|committed| committed.offset);
        if output == Output::Json {
            let row = |(partition, step): (&Partition, &Step)| {
                json!({
                    "partition": partition.0, "from": at(step).map(|at| at.to_string()), "to": step.to.to_string(),
                    "clamped": step.is_clamped, "pending": step.place.pending, "executed": self.execute,
                })
            };
            line(&Value::from(steps.iter().map(row).collect::<Vec<_>>()).to_string());
            return;
        }
        let row = |(partition, step): (&Partition, &Step)| {
            let change = at(step).map(|at| match step.to >= at {
                true => format!("+{}", step.to.distance_from(at)),
                false => format!("-{}", at.distance_from(step.to)),
            });
            let dash = || "-".to_owned();
            vec![
                partition.to_string(),
                at(step).map_or_else(dash, |at| at.to_string()),
                format!("{}{}", step.to, if step.is_clamped { " (the nearest)" } else { "" }),
                change.unwrap_or_else(dash),
                step.place.pending.map_or_else(dash, |pending| pending.to_string()),
            ]
        };
        let rows: Vec<Vec<String>> = steps.iter().map(row).collect();
        table(&["PARTITION", "FROM", "TO", "CHANGE", "PENDING"], &rows);
        let pending: u64 = steps.values().filter_map(|step| step.place.pending).sum();
        if pending > 0 {
            let tense = if self.execute { "are" } else { "would be" };
            line(&format!("of {pending} pending deliveries those below the new positions {tense} forgotten"));
        }
        for (partition, step) in steps {
            if let Some(problem) = &step.place.problem {
                line(&format!("partition {partition}: {problem}"));
            }
        }
        line(if self.execute && self.stage == Consumer::Reporter {
            "set in the store"
        } else if self.execute {
            "set, and read back"
        } else {
            "nothing was changed; --execute does it"
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_of_another_log_are_refused() {
        let (number, place) = (Offset::new(5), Offset::of_entry(1, 2, 3));
        for backend in [BackendKind::Kafka, BackendKind::Embedded, BackendKind::Memory] {
            assert_eq!((of_log(number, backend).is_ok(), of_log(place, backend).is_ok()), (true, false));
        }
        assert_eq!(
            (of_log(number, BackendKind::Pulsar).is_ok(), of_log(place, BackendKind::Pulsar).is_ok()),
            (false, true)
        );
        assert_eq!(Offset::parse("99999999999999999999:0:0"), None);
        assert_eq!(Offset::parse(&format!("{}:0:0", u64::MAX)), None);
    }

    #[test]
    fn positions_are_read_from_a_file() {
        let expected = BTreeMap::from([(Partition(0), Offset::new(5)), (Partition(11), Offset::new(7))]);
        let each = |text| each(text, &["events", "p.events"]);
        assert_eq!(each("0,5\n\n11, 7\n"), Ok(expected.clone()));
        assert_eq!(each("\"p.events\",0,5\nevents,11,7"), Ok(expected));
        assert_eq!(each("0,5\nx,7"), Err("line 2: expected PARTITION,OFFSET".into()));
        assert_eq!(each("0,5\n0,7"), Err("line 2: partition 0 stands there twice".into()));
        assert_eq!(
            each("deliveries,0,5"),
            Err("line 1: deliveries is not the stage's topic, events or p.events".into())
        );
    }
}
