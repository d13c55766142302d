//! The stages of one process, running.

use std::collections::BTreeMap;
use std::future::IntoFuture;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, bail};
use axum::Router as HttpRouter;
use axum::serve::ListenerExt;
use tokio::net::TcpListener;

use super::{placement, retention};
use crate::clock::Clock;
use crate::config::{BackendKind, Config};
use crate::control::{Current, commands};
use crate::delivery::http::{Client, ClientSettings, Guard};
use crate::log::partitioner::Placement;
use crate::log::topic::Topics;
use crate::log::{Admin, Backend, LogError, Member};
use crate::model::id::{DestinationType, InstanceId};
use crate::model::record::Topic;
use crate::runtime::deliver::{Bounds, Deliver, DeliverSettings, DeliverWork, Destinations, RetryPolicy, Rules};
use crate::runtime::driver;
use crate::runtime::failure::FailureTopic;
use crate::runtime::shutdown::Shutdown;
use crate::runtime::supervisor::Supervisor;
use crate::runtime::transform::TransformWork;
use crate::stages::gateway::{self, Admission, Gateway, GatewaySettings};
use crate::stages::processor::Processor;
use crate::stages::router::{Configured, Router};
use crate::telemetry::server::{self, Readiness};

/// A part of the flow that a process can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Gateway,
    Processor,
    Router,
}

impl Stage {
    pub const ALL: [Stage; 3] = [Stage::Gateway, Stage::Processor, Stage::Router];

    pub fn as_str(self) -> &'static str {
        match self {
            Stage::Gateway => "gateway",
            Stage::Processor => "processor",
            Stage::Router => "router",
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
            Stage::Processor => Some(Topic::EVENTS),
            Stage::Router => Some(Topic::DELIVERIES),
        }
    }
}

/// Everything that the stages are built from.
pub struct Parts<B> {
    pub log: B,
    pub config: Config,
    pub topics: Topics,
    pub workspace: Current,
    pub instance: String,
    pub clock: Clock,
    pub shutdown: Shutdown,
    /// Start with another placement of users than the one in force, whatever waits.
    pub break_order: bool,
}

/// Where the process listens.
#[derive(Clone, Copy, Debug)]
pub struct Listening {
    pub admin: SocketAddr,
    pub gateway: Option<SocketAddr>,
}

/// Listeners, bound before anything else starts: a taken port is told at once.
pub struct Listeners {
    admin: TcpListener,
    gateway: Option<TcpListener>,
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
        Ok(Self { admin, gateway })
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
    parts: Parts<B>,
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
    let admin_part = serve(listeners.admin, admin, admin_down.clone());
    let admin_task = tokio::spawn(admin_part);
    let (gateway, waiting) = match listeners.gateway {
        Some(listener) => {
            let (waiting, listener) = twice(listener)?;
            let until = Shutdown::new(parts.shutdown.budget);
            let served = tokio::spawn(serve(waiting, gateway::unavailable(), until.clone()));
            (Some(listener), Some((until, served)))
        }
        None => (None, None),
    };
    let Some(placements) = answered(&parts, async || placements(&parts).await).await? else { return Ok(()) };
    let mut router = None;
    if stages.contains(&Stage::Router) {
        router = answered(&parts, async || Standing::read(&parts).await).await?;
        if router.is_none() {
            return Ok(());
        }
    }
    if let Some((until, served)) = waiting {
        until.begin();
        let _ = served.await;
    }
    if let Some(listener) = gateway {
        let mut ready = readiness.part();
        let gateway = Gateway {
            admission: Admission::new(parts.log.publisher()?, placements[&Topic::EVENTS]),
            workspace: parts.workspace.clone(),
            clock: parts.clock.clone(),
            settings: GatewaySettings { trust_forwarded_for: parts.config.gateway.trust_forwarded_for },
        };
        let served = serve(listener, gateway::routes(gateway), parts.shutdown.clone());
        supervisor.start("gateway", async move {
            ready.set(true);
            served.await
        });
    }
    if stages.contains(&Stage::Processor) {
        start_processor(&parts, &placements, &readiness, &mut supervisor);
    }
    if let Some(standing) = router {
        start_router(&parts, &placements, standing, &readiness, &mut supervisor)?;
    }
    starting.set(true);
    let ended = supervisor.join().await;
    admin_down.begin();
    // It has no requests of its own to lose.
    let _ = admin_task.await;
    ended.map_err(|error| anyhow::anyhow!(error))
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

/// A topic that has just been created is not known to every broker at once.
const TOPICS_APPEAR: std::time::Duration = std::time::Duration::from_secs(5);

type Placements = BTreeMap<Topic, Placement>;

/// How each topic is placed, after a check that the log has the topics as declared.
async fn placements<B: Backend>(parts: &Parts<B>) -> anyhow::Result<Placements> {
    let admin = parts.log.admin()?;
    let until = parts.clock.instant() + TOPICS_APPEAR;
    let found = loop {
        let found = admin.topics().await.context("the log cannot be asked for its topics")?;
        let is_complete = parts.topics.iter().all(|spec| found.iter().any(|info| info.topic == spec.topic()));
        if is_complete || parts.clock.instant() > until {
            break found;
        }
        parts.clock.sleep(std::time::Duration::from_millis(100)).await;
    };
    let mut placements = Placements::new();
    for spec in parts.topics.iter() {
        let topic = spec.topic();
        match found.iter().find(|info| info.topic == topic) {
            None => bail!("there is no topic {topic}; create the topics with `laneway topics apply`"),
            Some(info) if info.partitions != spec.partitions => bail!(
                "topic {topic} has {} partitions and is declared with {}: users would move while their deliveries wait; \
                 declare what is there (topics.dir)",
                info.partitions,
                spec.partitions
            ),
            Some(_) => drop(placements.insert(topic, spec.placement())),
        }
    }
    placement::settle(&parts.log, &parts.topics, parts.break_order, parts.clock.now()).await?;
    Ok(placements)
}

fn settings<B>(parts: &Parts<B>, stage: Stage, topic: Topic) -> driver::Settings {
    let runtime = &parts.config.runtime;
    driver::Settings {
        member: Member {
            group: stage.group(),
            instance: InstanceId::from(parts.instance.as_str()),
            topic,
            outputs: match stage {
                Stage::Gateway => Vec::new(),
                Stage::Processor => vec![Topic::DELIVERIES, Topic::PROC_ERRORS],
                Stage::Router => vec![Topic::PROGRESS_ROUTER, Topic::DEAD_LETTERS],
            },
            session_timeout: runtime.session_timeout,
            revoke_drain: runtime.revoke_drain,
        },
        commit_interval: match stage {
            Stage::Router => runtime.deliver_commit_interval,
            _ => runtime.transform_commit_interval,
        },
        stage: stage.as_str(),
    }
}

fn failures(log: &crate::config::Log, placements: &Placements, stage: Stage, topic: Topic) -> FailureTopic {
    // The embedded log knows no prefix.
    let prefix = if log.backend == BackendKind::Kafka { log.topic_prefix.as_str() } else { "" };
    let input = stage.input().unwrap_or(Topic::EVENTS);
    FailureTopic {
        placement: placements[&topic],
        topic,
        stage: stage.as_str(),
        input_name: format!("{prefix}{input}"),
        input,
        group: format!("{prefix}{}", stage.group()),
    }
}

fn start_processor<B: Backend>(
    parts: &Parts<B>,
    placements: &Placements,
    readiness: &Readiness,
    supervisor: &mut Supervisor,
) {
    let processor = Processor {
        workspace: parts.workspace.clone(),
        deliveries: placements[&Topic::DELIVERIES],
        failures: failures(&parts.config.log, placements, Stage::Processor, Topic::PROC_ERRORS),
    };
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let running = driver::run(
        parts.log.clone(),
        Arc::new(TransformWork::new(parts.log.clone(), parts.clock.clone(), processor, cores)),
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

impl Standing {
    async fn read<B: Backend>(parts: &Parts<B>) -> anyhow::Result<Self> {
        let retention = retention::check(&parts.log, &parts.topics, &parts.config.router).await?;
        let commands = commands::follow(parts.log.clone(), parts.clock.clone()).await.context("the topic control")?;
        Ok(Self { retention, commands })
    }
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
        guard: Guard { block_private: router.block_private_ips },
        ..ClientSettings::default()
    };
    let stage = Router {
        client: Client::new(client, parts.clock.clone()).context("the HTTP client")?,
        workspace: parts.workspace.clone(),
        clock: parts.clock.clone(),
        rules: rules(router.clone()),
    };
    let deliver = DeliverSettings {
        input: Topic::DELIVERIES,
        progress: Topic::PROGRESS_ROUTER,
        failures: failures(&parts.config.log, placements, Stage::Router, Topic::DEAD_LETTERS),
        bounds: Bounds {
            process_bytes: runtime.process_memory,
            partition_bytes: runtime.partition_memory,
            ..Bounds::default()
        },
        stage: Stage::Router.as_str(),
        retention,
        seed: rand::random(),
    };
    let placement = placements[&Topic::DELIVERIES];
    let destinations = Destinations::new(router.in_flight, router.in_flight_per_destination, placement);
    let (stage, clock) = (Arc::new(stage), parts.clock.clone());
    pause(destinations.clone(), Arc::clone(&stage), commands.clone());
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

/// The rules for a destination: the defaults, what is configured for its type, what is configured for its id.
fn rules(router: crate::config::Router) -> Configured {
    Box::new(move |id, kind| {
        let mut rules = Rules {
            retry: RetryPolicy {
                first: router.retry_first,
                cap: router.retry_cap,
                window: router.retry_window,
                min_attempts: router.retry_min_attempts,
                ..RetryPolicy::default()
            },
            ..Rules::default()
        };
        for name in kind.map(DestinationType::as_str).into_iter().chain([id.as_str()]) {
            let Some(own) = router.destinations.get(name) else { continue };
            rules.ordered = own.ordered.unwrap_or(rules.ordered);
            rules.rate = own.rate.or(rules.rate);
            rules.concurrency = own.concurrency.or(rules.concurrency);
            rules.retry.first = own.retry_first.unwrap_or(rules.retry.first);
            rules.retry.cap = own.retry_cap.unwrap_or(rules.retry.cap);
            rules.retry.window = own.retry_window.unwrap_or(rules.retry.window);
            rules.retry.min_attempts = own.retry_min_attempts.unwrap_or(rules.retry.min_attempts);
        }
        rules
    })
}

/// Serves until shutdown, then lets open requests end within the budget.
/// The same listener for two that serve it, one after the other.
fn twice(listener: TcpListener) -> std::io::Result<(TcpListener, TcpListener)> {
    let listener = listener.into_std()?;
    let again = listener.try_clone()?;
    Ok((TcpListener::from_std(again)?, TcpListener::from_std(listener)?))
}

async fn serve(listener: TcpListener, routes: HttpRouter, shutdown: Shutdown) -> std::io::Result<()> {
    let listener = listener.tap_io(|stream| {
        // Answers are small; waiting to join packets would only delay them.
        let _ = stream.set_nodelay(true);
    });
    let service = routes.into_make_service_with_connect_info::<SocketAddr>();
    let (stop, over) = (shutdown.clone(), shutdown.clone());
    let serving = axum::serve(listener, service).with_graceful_shutdown(async move { stop.begun().await });
    let budget = async move {
        over.begun().await;
        Clock::system().sleep(over.budget).await;
    };
    tokio::select! {
        ended = serving.into_future() => ended,
        () = budget => Ok(()),
    }
}
