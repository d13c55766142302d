//! `laneway lag`: how far each stage is behind.
//!
//! BEHIND is what any tool would say: offsets from the group's position to the end. Ends of transactions have offsets too, and a
//! router's position is its oldest unfinished delivery. PENDING is what a router has to deliver yet.

use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::ConfigArgs;
use super::output::{Output, drains_in, line, short, table};
use super::stage::{Consumer, stored_positions};
use crate::app::engine::Stage;
use crate::app::lag::{self, PartitionLag, StageLag};
use crate::app::open::AnyLog;
use crate::app::standing::{self, Standing};
use crate::clock::{Clock, Timestamp};
use crate::config::Config;
use crate::log::Backend;
use crate::log::embedded::Access;
use crate::with_log;

#[derive(Args)]
pub struct Lag {
    /// Only these stages.
    #[arg(value_enum, value_name = "STAGE")]
    stages: Vec<Consumer>,
    /// A row for each partition. BEHIND counts offsets from the group's position, as any tool does; PENDING counts the
    /// deliveries that a router has not ended.
    #[arg(long)]
    partitions: bool,
    /// Watch for so many seconds to tell the trend and the time to drain; 0 shows what is there at once.
    #[arg(long, value_name = "SECONDS", default_value_t = 2)]
    over: u64,
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    config: ConfigArgs,
}

impl Lag {
    pub async fn run(&self) -> anyhow::Result<()> {
        let config = self.config.load(&[], &[])?;
        let clock = Clock::system();
        let any = AnyLog::open(&config, Access::Command, &clock).await?;
        let ended = with_log!(&any, log => self.show(log, &config, &clock).await);
        any.close().await;
        ended
    }

    async fn show<B: Backend>(&self, log: &B, config: &Config, clock: &Clock) -> anyhow::Result<()> {
        let stages = Consumer::meant(&self.stages);
        let mut before = None;
        if self.over > 0 {
            before = Some((read(log, &stages, config).await?, clock.instant()));
            clock.sleep(Duration::from_secs(self.over)).await;
        }
        let lags = read(log, &stages, config).await?;
        // Reading it takes a while too.
        let seconds = before.as_ref().map(|(_, at)| at.elapsed().as_secs_f64());
        let earlier = before.map(|(earlier, _)| earlier);
        let now = clock.now();
        let mut rows = Vec::new();
        for (index, lag) in lags.iter().enumerate() {
            let earlier = earlier.as_ref().map(|earlier| &earlier[index]);
            let sum = earlier.map(|earlier| sum_of(earlier).work());
            rows.push(Row::new(lag, None, &sum_of(lag), trend(sum, &sum_of(lag), seconds), now));
            if self.partitions {
                for (partition, found) in &lag.partitions {
                    let before = earlier.and_then(|earlier| earlier.partitions.get(partition)).map(PartitionLag::work);
                    rows.push(Row::new(lag, Some(partition.0), found, trend(before, found, seconds), now));
                }
            }
        }
        match self.output {
            Output::Json => drop(line(&json!(rows.into_iter().map(|row| row.json).collect::<Vec<_>>()).to_string())),
            Output::Table => {
                let head = ["STAGE", "TOPIC", "PARTITION", "BEHIND", "OLDEST", "PENDING", "TREND", "DRAINS IN"];
                table(&head, &rows.into_iter().map(|row| row.cells).collect::<Vec<_>>());
                for lag in &lags {
                    for (partition, found) in &lag.partitions {
                        if let Some(problem) = &found.problem {
                            line(&format!("{} partition {partition}: {problem}", lag.stage.as_str()));
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

async fn read<B: Backend>(log: &B, stages: &[Stage], config: &Config) -> anyhow::Result<Vec<StageLag>> {
    let standing = match stages.contains(&Stage::Router) {
        true => standing::read(log).await?,
        false => Standing::default(),
    };
    let stored = match stages.contains(&Stage::Reporter) {
        true => stored_positions(log, config).await?,
        false => None,
    };
    Ok(lag::read(log, stages, &standing, stored.as_ref()).await?)
}

/// By how much the work becomes more in a second; less where negative.
fn trend(before: Option<u64>, now: &PartitionLag, seconds: Option<f64>) -> Option<f64> {
    Some((now.work() as f64 - before? as f64) / seconds?)
}

/// All partitions of a stage as one.
fn sum_of(lag: &StageLag) -> PartitionLag {
    let all = || lag.partitions.values();
    PartitionLag {
        committed: None,
        end: Default::default(),
        behind: all().map(|it| it.behind).sum(),
        oldest: all().filter_map(|it| it.oldest).min(),
        pending: all().any(|it| it.pending.is_some()).then(|| all().map(PartitionLag::work).sum()),
        problem: lag
            .partitions
            .iter()
            .find_map(|(partition, it)| Some(format!("partition {partition}: {}", it.problem.as_ref()?))),
    }
}

struct Row {
    cells: Vec<String>,
    json: Value,
}

impl Row {
    /// `partition`: none for all of them.
    fn new(lag: &StageLag, partition: Option<u32>, it: &PartitionLag, trend: Option<f64>, now: Timestamp) -> Self {
        let dash = || "-".to_owned();
        let oldest = it.oldest.map(|at| now.since(at));
        let (drains_in, drains) = drains_in(it.work(), trend.map(|trend| -trend));
        let cells = vec![
            lag.stage.as_str().to_owned(),
            lag.topic.to_string(),
            partition.map_or("all".to_owned(), |number| number.to_string()),
            it.behind.to_string(),
            oldest.map_or_else(dash, short),
            it.pending.map_or_else(dash, |pending| pending.to_string()),
            trend.map_or_else(dash, |trend| format!("{trend:+.0}/s")),
            drains,
        ];
        let json = json!({
            "stage": lag.stage.as_str(), "topic": lag.topic.as_str(), "group": lag.stage.group(), "partition": partition,
            "committed": partition.and(it.committed).map(|at| at.to_string()),
            "end": partition.map(|_| it.end.to_string()), "behind": it.behind,
            "oldest_seconds": oldest.map(|age| age.as_secs_f64()), "pending": it.pending, "trend_per_second": trend,
            "drains_in_seconds": drains_in, "problem": it.problem,
        });
        Self { cells, json }
    }
}
