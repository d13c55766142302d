//! `laneway run`: stages of the flow in this process.

use anyhow::{Context, bail};
use clap::Args;

use super::{ConfigArgs, Usage, signalled};
use crate::app::engine::{self, Listeners, Parts, Stage, StoreCell};
use crate::app::open::{self, AnyLog};
use crate::clock::Clock;
use crate::config::Config;
use crate::control::Current;
use crate::control::file::FileWatch;
use crate::control::workspace::Workspace;
use crate::log::embedded::Access;
use crate::log::{Admin, Backend};
use crate::model::record::Topic;
use crate::runtime::shutdown::Shutdown;
use crate::telemetry;
use crate::with_log;

#[derive(Args)]
pub struct Run {
    /// gateway, processor, router, reporter, live; several separated by commas; or all.
    #[arg(value_name = "STAGE[,STAGE…]")]
    stages: String,
    /// Start with another placement of users (partitions, isolate_by, spread) than the one in force, although deliveries wait:
    /// what comes now may overtake them.
    #[arg(long)]
    break_order: bool,
    #[command(flatten)]
    config: ConfigArgs,
}

impl Run {
    pub async fn run(&self) -> anyhow::Result<()> {
        telemetry::tracing::start("info");
        let config = self.config.load(&[], &[])?;
        let stages = parse_stages(&self.stages)?;
        if !config.log.backend.is_cluster() && stages.len() < Stage::ALL.len() {
            bail!(Usage(
                "the embedded log belongs to one process: run all stages in it (`laneway run all`), or use log.backend = \"kafka\" or \"pulsar\""
                    .into()
            ));
        }
        if stages == [Stage::Live] && config.control.url.is_empty() {
            bail!(Usage("live uploads events to a control plane: it needs control.url".into()));
        }
        let clock = Clock::system();
        let (workspace, watch) = match open::control_plane(&config) {
            // The engine follows it.
            Some(_) => (Current::fixed(Workspace::default()), None),
            None => {
                let watch = FileWatch::open(&config.control.workspace_file, config.control.allow_empty).await?;
                (watch.current(), Some(watch))
            }
        };
        let listeners = Listeners::bind(&config, &stages).await?;
        let shutdown = shutdown_on_signal(&config);
        let following = watch.map(|watch| tokio::spawn(watch.follow(clock.clone())));
        let topics = open::topics(&config)?;
        let instance = open::instance_id(&config)?;
        let any = AnyLog::open(&config, Access::Engine, &clock).await?;
        let ended = with_log!(&any, log => {
            if !config.log.backend.is_cluster() {
                apply(log, &topics).await?;
            }
            let log = log.clone();
            let control_plane = open::control_plane(&config);
            let break_order = self.break_order;
            let parts = Parts { log, config, topics, workspace, control_plane, instance, clock, shutdown, break_order, store: StoreCell::default() };
            engine::run(parts, &stages, listeners, axum::Router::new()).await
        });
        if let Some(following) = following {
            following.abort();
        }
        any.close().await;
        ended
    }
}

/// Creates the topics of a log that belongs to this process alone.
pub async fn apply<B: Backend>(log: &B, topics: &crate::log::topic::Topics) -> anyhow::Result<()> {
    let admin = log.admin()?;
    for spec in topics.iter() {
        admin.create(spec).await.with_context(|| format!("topic {}", spec.name))?;
    }
    Ok(())
}

/// How many partitions `events` has in the log, if it is there: a `dev` log has its own number.
pub async fn event_partitions<B: Backend>(log: &B) -> anyhow::Result<Option<u32>> {
    let found = log.admin()?.topics().await?;
    Ok(found.iter().find(|info| info.topic == Topic::EVENTS).map(|info| info.partitions))
}

/// A shutdown that SIGTERM and SIGINT begin.
pub fn shutdown_on_signal(config: &Config) -> Shutdown {
    let shutdown = Shutdown::new(config.runtime.drain_timeout);
    let begin = shutdown.clone();
    tokio::spawn(async move {
        signalled().await;
        tracing::info!("stopping: no new events, what is under way is finished");
        begin.begin();
    });
    shutdown
}

fn parse_stages(text: &str) -> Result<Vec<Stage>, Usage> {
    if text == "all" {
        return Ok(Stage::ALL.to_vec());
    }
    let names = || Stage::ALL.map(Stage::as_str).join(", ");
    let mut stages = Vec::new();
    for name in text.split(',').map(str::trim) {
        match Stage::ALL.iter().find(|stage| stage.as_str() == name) {
            Some(stage) if !stages.contains(stage) => stages.push(*stage),
            Some(_) => {}
            None => return Err(Usage(format!("there is no stage {name:?}; there are: {}, all", names()))),
        }
    }
    Ok(stages)
}
