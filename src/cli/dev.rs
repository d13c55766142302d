//! `laneway dev`: everything in one process, ready to be tried.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::bail;
use clap::Args;

use super::output::{self, Output};
use super::run::{apply, event_partitions, shutdown_on_signal};
use super::{ConfigArgs, Usage};
use crate::app::engine::{self, Listeners, Listening, Parts, Stage, StoreCell};
use crate::app::inbox::Inbox;
use crate::app::open::{self, AnyLog};
use crate::clock::Clock;
use crate::config::{BackendKind, Config};
use crate::control::Current;
use crate::control::file::FileWatch;
use crate::control::workspace::Workspace;
use crate::log::embedded::Access;
use crate::telemetry;
use crate::with_log;

/// On one machine more partitions only cost.
const PARTITIONS: u32 = 4;
const SAMPLE_KEY: &str = "dev-key";

#[derive(Args)]
pub struct Dev {
    /// Workspace configuration (RudderStack's JSON). Default: a sample with one webhook, the built-in inbox.
    #[arg(long, value_name = "FILE")]
    workspace: Option<PathBuf>,
    /// Where the embedded log lies.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Where events are taken in. [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Health, metrics and the inbox. [default: 127.0.0.1:8081]
    #[arg(long, value_name = "ADDR")]
    admin: Option<SocketAddr>,
    /// Keep the log in memory: gone when the process ends.
    #[arg(long, conflicts_with = "data_dir")]
    memory: bool,
    /// Another log than the embedded one: kafka://host:port, or pulsar://host:port (its admin API as in log.pulsar.admin_url). Its topics are created where they are missing.
    #[arg(long, value_name = "URL", conflicts_with_all = ["memory", "data_dir"])]
    log: Option<String>,
    /// One JSON object for each delivery, instead of a line for people.
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    config: ConfigArgs,
}

impl Dev {
    pub async fn run(&self) -> anyhow::Result<()> {
        telemetry::tracing::start("warn");
        let began = std::time::Instant::now();
        let config = self.config.load(&self.flags()?, &own_defaults())?;
        let clock = Clock::system();
        // The log comes first: a second `dev` is told about the folder, not about a port.
        let any = AnyLog::open(&config, Access::Engine, &clock).await?;
        let listeners = Listeners::bind(&config, &Stage::ALL).await?;
        let listening = listeners.addresses()?;
        let watch = match &self.workspace {
            Some(path) => Some(FileWatch::open(path, config.control.allow_empty).await?),
            None => None,
        };
        let workspace = match &watch {
            Some(watch) => watch.current(),
            None => Current::fixed(Workspace::parse(&sample(listening.admin))?),
        };
        let following = watch.map(|watch| tokio::spawn(watch.follow(clock.clone())));
        let shutdown = shutdown_on_signal(&config);
        let instance = open::instance_id(&config)?;
        self.banner(listening, &self.place(&config), began);
        let inbox = Inbox::new(clock.clone(), self.output == Output::Json).routes();
        let ended = with_log!(&any, log => {
            // Topics that are there keep the partitions they have.
            let partitions = event_partitions(log).await?.unwrap_or(PARTITIONS);
            let topics = open::topics(&config)?.with_partitions(partitions);
            apply(log, &topics).await?;
            let log = log.clone();
            let parts = Parts {
                log,
                config,
                topics,
                workspace,
                control_plane: None,
                instance,
                clock,
                shutdown,
                break_order: false,
                store: StoreCell::default(),
            };
            engine::run(parts, &Stage::ALL, listeners, inbox).await
        });
        if let Some(following) = following {
            following.abort();
        }
        any.close().await;
        ended
    }

    fn place(&self, config: &Config) -> String {
        match (&self.log, config.log.backend) {
            (Some(url), _) => url.clone(),
            (None, BackendKind::Memory) => "memory".into(),
            (None, BackendKind::Kafka) => format!("kafka://{}", config.log.kafka.bootstrap_servers),
            (None, BackendKind::Pulsar) => config.log.pulsar.service_url.clone(),
            (None, BackendKind::Embedded) => config.log.embedded.data_dir.display().to_string(),
        }
    }

    fn flags(&self) -> anyhow::Result<Vec<(&'static str, String)>> {
        let mut flags = Vec::new();
        flags.extend(self.listen.map(|address| ("gateway.listen", address.to_string())));
        flags.extend(self.admin.map(|address| ("admin.listen", address.to_string())));
        if self.memory {
            flags.push(("log.backend", "memory".into()));
        }
        if let Some(url) = &self.log {
            if let Some(servers) = url.strip_prefix("kafka://") {
                flags.push(("log.backend", "kafka".into()));
                flags.push(("log.kafka.bootstrap_servers", servers.trim_end_matches('/').into()));
            } else if url.starts_with("pulsar://") || url.starts_with("pulsar+ssl://") {
                flags.push(("log.backend", "pulsar".into()));
                flags.push(("log.pulsar.service_url", url.trim_end_matches('/').into()));
            } else {
                bail!(Usage(format!("--log {url}: expected kafka://host:port or pulsar://host:port")));
            }
        }
        if let Some(folder) = &self.data_dir {
            flags.push(("log.embedded.data_dir", folder.display().to_string()));
        }
        Ok(flags)
    }

    fn banner(&self, listening: Listening, place: &str, began: std::time::Instant) {
        let Some(gateway) = listening.gateway else { return };
        let (admin, took) = (listening.admin, began.elapsed().as_millis());
        // Where the output is for programs, the banner is not part of it.
        let print = |line: String| match self.output {
            Output::Json => output::note(&line),
            Output::Table => drop(output::line(&line)),
        };
        print(format!("Laneway {} is up ({took} ms)", env!("CARGO_PKG_VERSION")));
        print(format!("  events in    http://{gateway}   (Segment / RudderStack API)"));
        print(format!("  health       http://{admin}/readyz   metrics: http://{admin}/metrics"));
        print(format!("  log          {place}"));
        if self.workspace.is_none() {
            print(format!("  inbox        http://{admin}/inbox/webhook   (the sample workspace's destination)"));
            print("try it:".into());
            print(format!(
                "  curl -u {SAMPLE_KEY}: http://{gateway}/v1/track -d '{{\"userId\":\"ann\",\"event\":\"Order Completed\"}}'"
            ));
        }
    }
}

/// On a developer's machine nobody else is to be served.
fn own_defaults() -> [(&'static str, String); 1] {
    [("gateway.listen", "127.0.0.1:8080".into())]
}

/// One source, one webhook that posts to this process's inbox.
fn sample(admin: SocketAddr) -> String {
    serde_json::json!({
        "workspaceId": "dev",
        "sources": [{
            "id": "dev-source", "name": "Sample", "writeKey": SAMPLE_KEY, "enabled": true, "workspaceId": "dev",
            "destinations": [{
                "id": "webhook", "name": "Inbox", "enabled": true,
                "config": {"webhookUrl": format!("http://{admin}/inbox/webhook"), "webhookMethod": "POST"},
                "destinationDefinition": {"id": "webhook", "name": "WEBHOOK", "displayName": "Webhook", "config": {}}
            }]
        }]
    })
    .to_string()
}
