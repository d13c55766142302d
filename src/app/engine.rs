//! The stages of one process, running.

pub(super) mod edge;
pub(super) mod rules;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use anyhow::{Context, bail};
use axum::Router as HttpRouter;
use tokio::net::TcpListener;

use super::serve::{Admittance, serve};
use super::{drift, job_status, open, placement, retention};
use crate::clock::Clock;
use crate::config::Config;
use crate::control::follow::{self, FollowError};
use crate::control::remote::RemoteSettings;
use crate::control::uploads::Uploads;
use crate::control::{Current, commands};
use crate::delivery::http::{Client, ClientSettings, Guard};
use crate::log::partitioner::Placement;
use crate::log::topic::Topics;
use crate::log::{Backend, Guarantee, LogError, Member, Session};
use crate::model::id::InstanceId;
use crate::model::record::Topic;
use crate::runtime::deliver::{Bounds, Deliver, DeliverSettings, DeliverWork, Destinations};
use crate::runtime::driver;
use crate::runtime::failure::FailureTopic;
use crate::runtime::project;
use crate::runtime::shutdown::Shutdown;
use crate::runtime::supervisor::Supervisor;
use crate::runtime::tally::JobTopic;
use crate::runtime::transform::{Memory, TransformWork};
use crate::runtime::watch;
use crate::stages::live::{Live, Waiting};
use crate::stages::processor::Processor;
use crate::stages::reporter::Reporter;
use crate::stages::router::Router;
use crate::store::job_status::JobStatusStore;
use crate::telemetry::server::{self, Readiness};

/// A part of the flow that a process can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Gateway,
    Processor,
    Router,
    Reporter,
    Live,
}

impl Stage {
    pub const ALL: [Stage; 5] = [Stage::Gateway, Stage::Processor, Stage::Router, Stage::Reporter, Stage::Live];

    pub fn as_str(self) -> &'static str {
        match self {
            Stage::Gateway => "gateway",
            Stage::Processor => "processor",
            Stage::Router => "router",
            Stage::Reporter => "reporter",
            Stage::Live => "live",
        }
    }

    /// Its consumer group, without prefix.
    pub fn group(self) -> String {
        format!("laneway.{}", self.as_str())
    }

    /// What it reads; the gateway reads no topic.
    pub fn input(self) -> Option<Topic> {
        match self {
            Stage::Gateway => None,
            Stage::Processor | Stage::Live => Some(Topic::EVENTS),
            Stage::Router => Some(Topic::DELIVERIES),
            Stage::Reporter => Some(Topic::JOB_STATUS),
        }
    }
}

/// Everything that the stages are built from.
pub struct Parts<B> {
    pub log: B,
    pub config: Config,
    pub topics: Topics,
    pub workspace: Current,
    /// Where the workspace comes from instead.
    pub control_plane: Option<RemoteSettings>,
    pub instance: String,
    pub clock: Clock,
    pub shutdown: Shutdown,
    /// Start with another placement of users than the one in force, whatever waits.
    pub break_order: bool,
    pub store: StoreCell,
}

/// The store of this process, opened by the first who wants it: most processes do not.
#[derive(Default)]
pub struct StoreCell(OnceLock<JobStatusStore>);

impl StoreCell {
    fn get(&self, config: &Config) -> anyhow::Result<JobStatusStore> {
        if let Some(store) = self.0.get() {
            return Ok(store.clone());
        }
        let store = open::job_status(config)?;
        Ok(self.0.get_or_init(|| store).clone())
    }
}

/// Where the process listens.
#[derive(Clone, Copy, Debug)]
pub struct Listening {
    pub admin: SocketAddr,
    pub gateway: Option<SocketAddr>,
}

/// Of the admin listener.
const ADMIN: Admittance = Admittance { idle: std::time::Duration::from_secs(75), connections: 1_000 };
/// Connections for each request at a time: most of them are idle.
const SEATS: usize = 4;
/// What is turned away at the start may take so long to be answered.
const TURNING_AWAY: std::time::Duration = std::time::Duration::from_secs(1);

fn admittance(gateway: &crate::config::Gateway) -> Admittance {
    Admittance { idle: gateway.idle_timeout, connections: gateway.max_requests.saturating_mul(SEATS).clamp(1, 1 << 20) }
}

/// What the reporter has written it tells the log so often.
const TOLD: std::time::Duration = std::time::Duration::from_secs(1);
/// Runs of which nothing has changed for so long are looked for so often.
const EXPIRE: std::time::Duration = std::time::Duration::from_secs(3_600);

/// Listeners, bound before anything else starts: a taken port is told at once.
pub struct Listeners {
    admin: TcpListener,
    gateway: Option<TcpListener>,
    internal: Option<TcpListener>,
}

impl Listeners {
    /// # Errors
    /// Which address cannot be listened on, and why.
    pub async fn bind(config: &Config, stages: &[Stage]) -> anyhow::Result<Self> {
        let bind = async |what: &str, address: SocketAddr| {
            TcpListener::bind(address).await.with_context(|| format!("{what}.listen {address}"))
        };
        let admin = bind("admin", config.admin.listen).await?;
        let gateway = match stages.contains(&Stage::Gateway) {
            true => Some(bind("gateway", config.gateway.listen).await?),
            false => None,
        };
        let internal = match config.gateway.internal.listen.filter(|_| gateway.is_some()) {
            Some(address) => Some(bind("gateway.internal", address).await?),
            None => None,
        };
        Ok(Self { admin, gateway, internal })
    }

    /// # Errors
    /// Where the system does not tell.
    pub fn addresses(&self) -> std::io::Result<Listening> {
        let gateway = self.gateway.as_ref().map(TcpListener::local_addr).transpose()?;
        Ok(Listening { admin: self.admin.local_addr()?, gateway })
    }
}

/// Runs the stages until the shutdown has ended. `extra` are more routes for the admin listener.
///
/// # Errors
/// What made the first failing part fail.
pub async fn run<B: Backend>(
    mut parts: Parts<B>,
    stages: &[Stage],
    listeners: Listeners,
    extra: HttpRouter,
) -> anyhow::Result<()> {
    let readiness = Readiness::default();
    // Nobody is told that the process is ready before all of its parts are counted.
    let mut starting = readiness.part();
    let mut supervisor = Supervisor::new(parts.shutdown.clone());
    let admin = server::routes(readiness.clone()).merge(extra);
    // The admin listener comes first and goes last: it tells how the others are doing.
    let admin_down = Shutdown::new(parts.shutdown.budget);
    let admin_part = serve(listeners.admin, admin, ADMIN, admin_down.clone());
    let admin_task = tokio::spawn(admin_part);
    let (gateway, internal, waiting) = edge::turned_away(&parts.config, listeners.gateway, listeners.internal)?;
    let Some(placements) = answered(&parts, async || placements(&parts).await).await? else { return Ok(()) };
    let Some(workspace) = workspace(&parts).await? else { return Ok(()) };
    parts.workspace = workspace;
    if !start_consumers(&parts, stages, &placements, &readiness, &mut supervisor).await? {
        return Ok(());
    }
    // It may wait for hours for the list of suppressed users, while the others are watched.
    let opening = gateway.map(|listener| {
        let ready = readiness.part();
        edge::Opening { parts, placements, readiness: readiness.clone(), waiting }.run(listener, internal, ready)
    });
    starting.set(true);
    let open = async {
        match opening {
            Some(opening) => opening.await,
            None => Ok(()),
        }
    };
    let (ended, opened) = tokio::join!(supervisor.join(), open);
    admin_down.begin();
    // It has no requests of its own to lose.
    let _ = admin_task.await;
    ended.map_err(|error| anyhow::anyhow!(error)).and(opened)
}

/// Starts the stages that read a topic. False: the shutdown has begun meanwhile.
async fn start_consumers<B: Backend>(
    parts: &Parts<B>,
    stages: &[Stage],
    placements: &Placements,
    readiness: &Readiness,
    supervisor: &mut Supervisor,
) -> anyhow::Result<bool> {
    let mut commands = None;
    if [Stage::Processor, Stage::Router].iter().any(|stage| stages.contains(stage)) {
        let follow =
            async || commands::follow(parts.log.clone(), parts.clock.clone()).await.context("the topic control");
        let Some(followed) = answered(parts, follow).await? else { return Ok(false) };
        let (sweep, stop) =
            (commands::sweep(parts.log.clone(), followed.clone(), parts.clock.clone()), parts.shutdown.clone());
        supervisor.start("commands", async move {
            tokio::select! {
                () = sweep => {}
                () = stop.begun() => {}
            }
            anyhow::Ok(())
        });
        commands = Some(followed);
    }
    let mut router = None;
    if stages.contains(&Stage::Router) {
        let check = async || retention::check(&parts.log, &parts.topics, &parts.config.router).await;
        let Some(retention) = answered(parts, check).await? else { return Ok(false) };
        router = commands.clone().map(|commands| Standing { retention, commands });
    }
    if let Some(commands) = commands.filter(|_| stages.contains(&Stage::Processor)) {
        start_processor(parts, placements, commands, readiness, supervisor);
    }
    if let Some(standing) = router {
        start_router(parts, placements, standing, readiness, supervisor)?;
    }
    if stages.contains(&Stage::Reporter) {
        start_reporter(parts, readiness, supervisor)?;
    }
    if stages.contains(&Stage::Live) {
        start_live(parts, supervisor)?;
    }
    Ok(true)
}

/// The workspace to go by. None: the process was told to stop meanwhile.
async fn workspace<B: Backend>(parts: &Parts<B>) -> anyhow::Result<Option<Current>> {
    let Some(settings) = &parts.control_plane else { return Ok(Some(parts.workspace.clone())) };
    let followed = async || match follow::follow(&parts.log, settings, parts.clock.clone()).await {
        Ok(workspace) => Ok(workspace),
        Err(FollowError::Log(error)) => Err(error.into()),
        Err(FollowError::Remote(error)) => Err(error.into()),
    };
    answered(parts, followed).await
}

/// While the log does not answer it is asked again, so often.
const AGAIN: std::time::Duration = std::time::Duration::from_secs(1);

/// Asks the log until it answers. None: the process was told to stop meanwhile.
async fn answered<B, T>(parts: &Parts<B>, ask: impl AsyncFn() -> anyhow::Result<T>) -> anyhow::Result<Option<T>> {
    loop {
        let answer = tokio::select! {
            biased;
            () = parts.shutdown.begun() => return Ok(None),
            answer = ask() => answer,
        };
        let is_transient = |cause: &(dyn std::error::Error + 'static)| {
            matches!(cause.downcast_ref::<LogError>(), Some(LogError::Transient(_)))
        };
        match answer {
            Err(error) if error.chain().any(is_transient) => {
                tracing::warn!(
                    error = format!("{error:#}"),
                    "the log does not answer yet; nothing starts before it does"
                );
            }
            answer => return answer.map(Some),
        }
        parts.clock.sleep(AGAIN).await;
    }
}

type Placements = BTreeMap<Topic, Placement>;

/// How each topic is placed, after a check that the log has the topics as declared.
async fn placements<B: Backend>(parts: &Parts<B>) -> anyhow::Result<Placements> {
    let admin = parts.log.admin()?;
    let found = drift::wait_for_topics(&admin, &parts.topics, &parts.clock).await;
    let found = found.context("the log cannot be asked for its topics")?;
    let mut placements = Placements::new();
    for spec in parts.topics.iter() {
        let topic = spec.topic();
        match found.iter().find(|info| info.topic == topic) {
            None => bail!("there is no topic {topic}; create the topics with `laneway topics apply`"),
            Some(info) if info.partitions < spec.partitions => bail!(
                "topic {topic} has {} partitions and is declared with {}: users would move while their deliveries wait; \
                 declare what is there (topics.dir)",
                info.partitions,
                spec.partitions
            ),
            Some(info) => {
                if info.partitions > spec.partitions {
                    tracing::error!(
                        %topic,
                        partitions = info.partitions,
                        declared = spec.partitions,
                        "the topic has more partitions than are declared; only those are written and read: whoever else writes \
                         to it must keep to them"
                    );
                }
                placements.insert(topic, spec.placement());
            }
        }
    }
    placement::settle(&parts.log, &parts.topics, parts.break_order, parts.clock.now()).await?;
    Ok(placements)
}

fn settings<B>(parts: &Parts<B>, stage: Stage, topic: Topic) -> driver::Settings {
    let runtime = &parts.config.runtime;
    let partitions = parts.topics.iter().find(|spec| spec.topic() == topic).map_or(0, |spec| spec.partitions);
    driver::Settings {
        partitions,
        member: Member {
            group: stage.group(),
            instance: InstanceId::from(parts.instance.as_str()),
            topic,
            outputs: match stage {
                Stage::Gateway | Stage::Reporter | Stage::Live => Vec::new(),
                Stage::Processor => {
                    // Redrives write to `events` and end; who reads it watches over what they leave.
                    vec![Topic::EVENTS, Topic::DELIVERIES, Topic::PROC_ERRORS, Topic::EVENTS_SEEN, Topic::JOB_STATUS]
                }
                Stage::Router => vec![Topic::PROGRESS_ROUTER, Topic::DEAD_LETTERS, Topic::JOB_STATUS],
            },
            state: match stage {
                Stage::Gateway | Stage::Reporter | Stage::Live => None,
                Stage::Processor => Some(Topic::EVENTS_SEEN),
                Stage::Router => Some(Topic::PROGRESS_ROUTER),
            },
            session_timeout: runtime.session_timeout,
            revoke_drain: runtime.revoke_drain,
        },
        commit_interval: match stage {
            Stage::Router => runtime.deliver_commit_interval,
            Stage::Reporter => TOLD,
            _ => runtime.transform_commit_interval,
        },
        stage: stage.as_str(),
    }
}

/// Where a stage's failures go.
pub fn failures(log: &crate::config::Log, placement: Placement, stage: Stage, topic: Topic) -> FailureTopic {
    // The embedded log knows no prefix.
    let prefix = if log.backend.is_cluster() { log.topic_prefix.as_str() } else { "" };
    // What the gateway cannot use came over HTTP.
    let input = stage.input().unwrap_or(Topic::new("webhook"));
    FailureTopic {
        placement,
        topic,
        stage: stage.as_str(),
        input_name: format!("{prefix}{input}"),
        input,
        group: format!("{prefix}{}", stage.group()),
    }
}

fn start_reporter<B: Backend>(
    parts: &Parts<B>,
    readiness: &Readiness,
    supervisor: &mut Supervisor,
) -> anyhow::Result<()> {
    let (store, file) = (parts.store.get(&parts.config)?, open::store_file(&open::store_url(&parts.config)));
    let (stop, clock, keep) = (parts.shutdown.clone(), parts.clock.clone(), parts.config.reporter.job_retention);
    let (log, settings) = (parts.log.clone(), settings(parts, Stage::Reporter, Topic::JOB_STATUS));
    let part = readiness.part();
    supervisor.start("reporter", async move {
        tokio::select! {
            () = open::prepare(&store, file.as_deref(), &clock) => {}
            () = stop.begun() => return Ok(()),
        }
        let expiring = async {
            loop {
                if let Err(error) = store.expire(clock.now().minus(keep)).await {
                    tracing::warn!(%error, "old job status is not forgotten yet");
                }
                clock.sleep(EXPIRE).await;
            }
        };
        let reporter = Reporter { store: store.clone(), group: job_status::group(), clock: clock.clone() };
        tokio::select! {
            ended = project::run(log, Arc::new(reporter), settings, clock.clone(), stop, part) => ended,
            () = expiring => Ok(()),
        }
    });
    Ok(())
}

/// What ends the reading of live events ends nothing else; it is tried again after so long.
const LIVE_AGAIN: std::time::Duration = std::time::Duration::from_secs(30);

/// Without a control plane nobody looks.
fn start_live<B: Backend>(parts: &Parts<B>, supervisor: &mut Supervisor) -> anyhow::Result<()> {
    let Some(settings) = &parts.control_plane else { return Ok(()) };
    let uploads = Uploads::new(settings)?;
    let live =
        Live { workspace: parts.workspace.clone(), uploads, clock: parts.clock.clone(), waiting: Waiting::default() };
    let live = Arc::new(live);
    let (log, settings, clock) =
        (parts.log.clone(), self::settings(parts, Stage::Live, Topic::EVENTS), parts.clock.clone());
    let stop = parts.shutdown.clone();
    supervisor.start("live", async move {
        let watching = async {
            while !stop.has_begun() {
                // Whether it works says nothing about the process.
                let part = Readiness::default().part();
                let (log, settings) = (log.clone(), settings.clone());
                match watch::run(log, Arc::clone(&live), settings, clock.clone(), stop.clone(), part).await {
                    Ok(()) => return,
                    Err(error) => tracing::error!(%error, "live events cannot be read, trying again"),
                }
                tokio::select! {
                    () = clock.sleep(LIVE_AGAIN) => {}
                    () = stop.begun() => {}
                }
            }
        };
        tokio::select! {
            () = watching => anyhow::Ok(()),
            () = live.upload() => Ok(()),
        }
    });
    Ok(())
}

fn start_processor<B: Backend>(
    parts: &Parts<B>,
    placements: &Placements,
    commands: commands::Current,
    readiness: &Readiness,
    supervisor: &mut Supervisor,
) {
    let processor = Processor {
        workspace: parts.workspace.clone(),
        request_from_event: rules::request_from_event(&parts.config.router),
        deliveries: placements[&Topic::DELIVERIES],
        failures: failures(&parts.config.log, placements[&Topic::PROC_ERRORS], Stage::Processor, Topic::PROC_ERRORS),
        jobs: JobTopic(placements[&Topic::JOB_STATUS]),
        commands,
        clock: parts.clock.clone(),
    };
    let own = &parts.config.processor;
    let remembers = own.dedup_window > std::time::Duration::ZERO;
    let memory = remembers.then(|| Memory::new(Topic::EVENTS_SEEN, own.dedup_window, own.dedup_memory));
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let running = driver::run(
        parts.log.clone(),
        Arc::new(TransformWork::new(parts.log.clone(), parts.clock.clone(), processor, cores, memory)),
        settings(parts, Stage::Processor, Topic::EVENTS),
        parts.clock.clone(),
        parts.shutdown.clone(),
        readiness.part(),
    );
    supervisor.start("processor", running);
}

/// What the router reads from the log before it starts.
struct Standing {
    retention: Option<std::time::Duration>,
    commands: commands::Current,
}

fn start_router<B: Backend>(
    parts: &Parts<B>,
    placements: &Placements,
    Standing { retention, commands }: Standing,
    readiness: &Readiness,
    supervisor: &mut Supervisor,
) -> anyhow::Result<()> {
    let (router, runtime) = (&parts.config.router, &parts.config.runtime);
    let client = ClientSettings {
        timeout: router.timeout,
        http2: router.http2,
        guard: Guard { block_private: router.block_private_ips },
        ..ClientSettings::default()
    };
    let stage = Router {
        client: Client::new(client, parts.clock.clone()).context("the HTTP client")?,
        workspace: parts.workspace.clone(),
        clock: parts.clock.clone(),
        rules: rules::deliver(router.clone()),
    };
    let deliver = DeliverSettings {
        input: Topic::DELIVERIES,
        progress: Topic::PROGRESS_ROUTER,
        failures: failures(&parts.config.log, placements[&Topic::DEAD_LETTERS], Stage::Router, Topic::DEAD_LETTERS),
        jobs: JobTopic(placements[&Topic::JOB_STATUS]),
        bounds: Bounds {
            process_bytes: runtime.process_memory,
            partition_bytes: runtime.partition_memory,
            ..Bounds::default()
        },
        stage: Stage::Router.as_str(),
        repeats: match B::Session::GUARANTEE {
            Guarantee::ExactlyOnce => 0,
            Guarantee::AtLeastOnce => router.repeat_window,
        },
        retention,
        seed: rand::random(),
    };
    let placement = placements[&Topic::DELIVERIES];
    let destinations = Destinations::new(router.in_flight, router.in_flight_per_destination, placement);
    let (stage, clock) = (Arc::new(stage), parts.clock.clone());
    pause(destinations.clone(), Arc::clone(&stage), commands.clone());
    let refreshing = refresh(destinations.clone(), Arc::clone(&stage), parts.workspace.clone());
    let stop = parts.shutdown.clone();
    supervisor.start("rules", async move {
        tokio::select! {
            () = refreshing => {}
            () = stop.begun() => {}
        }
        anyhow::Ok(())
    });
    let running = driver::run(
        parts.log.clone(),
        Arc::new(DeliverWork::new(parts.log.clone(), stage, deliver, destinations, commands, clock)?),
        settings(parts, Stage::Router, Topic::DELIVERIES),
        parts.clock.clone(),
        parts.shutdown.clone(),
        readiness.part(),
    );
    supervisor.start("router", running);
    Ok(())
}

/// Keeps the rules of destinations those of the workspace in force.
async fn refresh(destinations: Destinations, stage: Arc<Router>, mut workspace: Current) {
    loop {
        // First for a workspace that came since the destinations of a pause were met.
        destinations.refresh(|id| stage.rules(id));
        workspace.changed().await;
    }
}

/// Keeps the destinations paused that are to be, as long as there is somebody to command it.
fn pause(destinations: Destinations, stage: Arc<Router>, mut commands: commands::Current) {
    let apply = move |commands: &commands::Commands| destinations.pause(&commands.paused(), |id| stage.rules(id));
    // Before the first partition comes.
    apply(&commands.borrow_and_update());
    tokio::spawn(async move {
        while commands.changed().await.is_ok() {
            apply(&commands.borrow_and_update());
        }
    });
}
