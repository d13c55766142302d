//! The gateway of a process: what it is made of, and its listeners.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use anyhow::{Context, bail};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use super::{Parts, Placements, Stage, TURNING_AWAY, admittance, answered, failures};
use crate::app::serve::serve;
use crate::app::{job_status, open};
use crate::clock::Clock;
use crate::config::Config;
use crate::control::regulations::{RegulationSettings, Regulations};
use crate::control::suppression::{self, Asking, Suppressed};
use crate::delivery::warehouse::Warehouse;
use crate::log::{Backend, Member};
use crate::model::id::{InstanceId, WorkspaceId};
use crate::model::record::Topic;
use crate::runtime::shutdown::Shutdown;
use crate::runtime::supervisor::Supervisor;
use crate::runtime::tally::JobTopic;
use crate::stages::gateway::webhook::Webhooks;
use crate::stages::gateway::{
    self, Admission, Gateway, Intake, JobStatusApi, Limits, Origins, RateLimits, TrustedProxies,
};
use crate::store::job_status::JobStatusStore;
use crate::telemetry::server::{Readiness, Ready};
use crate::transform::http::Sources;

/// A gateway that is not open yet.
pub struct Opening<B> {
    pub parts: Parts<B>,
    pub placements: Placements,
    pub readiness: Readiness,
    pub waiting: TurnedAway,
}

impl<B: Backend> Opening<B> {
    /// Waits for the list of suppressed users, then serves until the shutdown. `opened`: ready when the listeners are.
    ///
    /// # Errors
    /// What the first failing part of the gateway said.
    pub async fn run(
        self,
        public: TcpListener,
        internal: Option<TcpListener>,
        mut opened: Ready,
    ) -> anyhow::Result<()> {
        let Self { parts, placements, readiness, waiting } = self;
        let mut supervisor = Supervisor::new(parts.shutdown.clone());
        let started = async {
            let suppressed = suppressed(&parts, &mut supervisor).await?;
            waiting.end().await;
            if let Some(suppressed) = suppressed {
                start(&parts, &placements, suppressed, (public, internal), &readiness, &mut supervisor)?;
                opened.set(true);
            }
            anyhow::Ok(())
        };
        let started = started.await;
        if started.is_err() {
            parts.shutdown.begin();
        }
        let ended = supervisor.join().await;
        started.and(ended.map_err(|error| anyhow::anyhow!(error)))
    }
}

fn start<B: Backend>(
    parts: &Parts<B>,
    placements: &Placements,
    suppressed: Suppressed,
    (listener, internal): (TcpListener, Option<TcpListener>),
    readiness: &Readiness,
    supervisor: &mut Supervisor,
) -> anyhow::Result<()> {
    let settings = &parts.config.gateway;
    let limits = &settings.limits;
    let limits =
        Limits { window: limits.window, source: limits.source, workspace: limits.workspace, own: limits.own.clone() };
    let gateway = Arc::new(Gateway {
        admission: Admission::new(
            parts.log.publisher()?,
            placements[&Topic::EVENTS],
            JobTopic(placements[&Topic::JOB_STATUS]),
        ),
        workspace: parts.workspace.clone(),
        clock: parts.clock.clone(),
        proxies: TrustedProxies::new(settings.trusted_proxies.clone()),
        origins: Origins::parse(&settings.cors_origins),
        intake: Intake::new(settings.body_memory, settings.body_timeout),
        limits: RateLimits::new(limits, parts.clock.clone()),
        most: settings.max_requests,
        token: settings.internal.token.clone(),
        open: AtomicUsize::new(0),
        webhooks: webhooks(parts, placements)?,
        jobs: match internal {
            Some(_) => Some(job_status_api(parts, placements, parts.store.get(&parts.config)?)),
            None => None,
        },
        suppressed,
        warehouse: match settings.internal.warehouse_url.as_str() {
            "" => None,
            url => Some(Warehouse::new(url)?),
        },
    });
    let tasks = gateway.webhooks.as_ref().map(|webhooks| webhooks.tasks.clone());
    let public = gateway::public(Arc::clone(&gateway));
    let routes = internal.map(|listener| (listener, "internal gateway", gateway::internal(gateway)));
    for (listener, name, routes) in [(listener, "gateway", public)].into_iter().chain(routes) {
        let mut ready = readiness.part();
        tracing::info!(address = %listener.local_addr()?, "{name} listens");
        let served = serve(listener, routes, admittance(settings), parts.shutdown.clone());
        let (stop, tasks) = (parts.shutdown.clone(), tasks.clone());
        supervisor.start(name, async move {
            ready.set(true);
            tokio::pin!(served);
            let ended = tokio::select! {
                ended = &mut served => ended,
                () = stop.begun() => {
                    // Nobody is to come any more, while those who are here are served.
                    ready.set(false);
                    served.await
                }
            };
            if let Some(tasks) = tasks {
                tasks.close();
                tasks.wait().await;
            }
            ended
        });
    }
    Ok(())
}

fn webhooks<B>(parts: &Parts<B>, placements: &Placements) -> anyhow::Result<Option<Webhooks>> {
    let Some(service) = open::transformer(&parts.config, &parts.clock)? else { return Ok(None) };
    let placement = placements[&Topic::PROC_ERRORS];
    Ok(Some(Webhooks {
        sources: Sources::new(service),
        by_get: parts.config.gateway.webhooks_by_get.clone(),
        failures: failures(&parts.config.log, placement, Stage::Gateway, Topic::PROC_ERRORS),
        tasks: TaskTracker::new(),
        shutdown: parts.shutdown.clone(),
        clock: parts.clock.clone(),
    }))
}

/// Who is told to come back, as long as nothing can be taken.
pub struct TurnedAway {
    until: Shutdown,
    served: Vec<JoinHandle<std::io::Result<()>>>,
}

impl TurnedAway {
    /// Lets those end who are being told.
    pub async fn end(self) {
        self.until.begin();
        for served in self.served {
            let _ = served.await;
        }
    }
}

/// A gateway's public and internal listener, if there are any.
type Doors = (Option<TcpListener>, Option<TcpListener>);

/// Answers at both doors from the beginning, until they can be opened.
pub fn turned_away(
    config: &Config,
    public: Option<TcpListener>,
    internal: Option<TcpListener>,
) -> std::io::Result<(Option<TcpListener>, Option<TcpListener>, TurnedAway)> {
    let mut away = TurnedAway { until: Shutdown::new(TURNING_AWAY), served: Vec::new() };
    let mut doors: Doors = (None, None);
    for (listener, door) in [(public, &mut doors.0), (internal, &mut doors.1)] {
        let Some(listener) = listener else { continue };
        let (waiting, listener) = twice(listener)?;
        let routes = gateway::unavailable(Origins::parse(&config.gateway.cors_origins));
        away.served.push(tokio::spawn(serve(waiting, routes, admittance(&config.gateway), away.until.clone())));
        *door = Some(listener);
    }
    Ok((doors.0, doors.1, away))
}

/// The same listener for two that serve it, one after the other.
fn twice(listener: TcpListener) -> std::io::Result<(TcpListener, TcpListener)> {
    let listener = listener.into_std()?;
    let again = listener.try_clone()?;
    Ok((TcpListener::from_std(again)?, TcpListener::from_std(listener)?))
}

/// The users whose events are not taken, once there is a list. None: the process was told to stop meanwhile.
async fn suppressed<B: Backend>(parts: &Parts<B>, supervisor: &mut Supervisor) -> anyhow::Result<Option<Suppressed>> {
    if parts.config.control.suppression.url.is_empty() {
        return Ok(Some(Suppressed::default()));
    }
    let list = async || Ok(suppression::load(&parts.log).await?);
    let Some((list, reader)) = answered(parts, list).await? else { return Ok(None) };
    let asking = Asking {
        log: parts.log.clone(),
        regulations: regulations(&parts.config, &parts.workspace.get().id, &parts.clock)?,
        member: asker(parts),
        clock: parts.clock.clone(),
        stop: parts.shutdown.token(),
    };
    let (own, clock, failed) = (list.clone(), parts.clock.clone(), parts.shutdown.clone());
    supervisor.start("suppressed users", async move {
        tokio::select! {
            () = suppression::read_on(reader, own.clone(), clock) => {}
            () = asking.ask_on(own) => {}
        }
        // Without it no list would ever come.
        let is_early = !failed.has_begun();
        failed.begin();
        if is_early { Err(anyhow::anyhow!("ended by itself")) } else { Ok(()) }
    });
    let stop = parts.shutdown.clone();
    tokio::select! {
        () = list.is_whole(&parts.clock) => Ok(Some(list)),
        () = stop.begun() => Ok(None),
    }
}

pub fn regulations(config: &Config, workspace: &WorkspaceId, clock: &Clock) -> anyhow::Result<Regulations> {
    let (control, own) = (&config.control, &config.control.suppression);
    let workspace = workspace.to_string();
    if control.namespace.is_empty() && workspace.is_empty() {
        bail!("control.suppression: the workspace configuration has no workspaceId");
    }
    let settings = RegulationSettings {
        url: own.url.clone(),
        token: control.token.clone(),
        namespace: control.namespace.clone(),
        workspace,
        page_size: own.page_size.max(1),
        poll_interval: own.poll_interval,
    };
    Regulations::new(settings, clock.clone()).context("control.suppression.url")
}

/// The member that asks for suppressed users.
fn asker<B>(parts: &Parts<B>) -> Member {
    Member {
        group: "laneway.suppressions".into(),
        instance: InstanceId::from(parts.instance.as_str()),
        topic: Topic::SUPPRESSIONS,
        outputs: vec![Topic::SUPPRESSIONS],
        state: None,
        session_timeout: parts.config.runtime.session_timeout,
        revoke_drain: parts.config.runtime.revoke_drain,
    }
}

fn job_status_api<B: Backend>(parts: &Parts<B>, placements: &Placements, store: JobStatusStore) -> JobStatusApi {
    let placement = placements[&Topic::JOB_STATUS];
    let caught_up = job_status::caught_up(parts.log.clone(), store.clone(), placement, parts.clock.clone());
    JobStatusApi::new(store, caught_up)
}
