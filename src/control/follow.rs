//! The workspace configuration of a control plane, followed: asked for here, kept in the log ([`super::kept`]) and put in force from
//! there, so that all processes have the same one. A start goes on with what is kept when the control plane does not answer.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use crate::clock::Clock;
use crate::control::Current;
use crate::control::kept::Kept;
use crate::control::remote::{Remote, RemoteError, RemoteSettings};
use crate::control::workspace::{Workspace, WorkspaceError};
use crate::log::{Backend, LogError};
use crate::telemetry::metrics::metrics;

/// What was asked for is given to the log again, as long as it does not take it.
const AGAIN: Duration = Duration::from_secs(1);

/// Why there is nothing to follow.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    #[error(transparent)]
    Remote(#[from] RemoteError),
    #[error(transparent)]
    Log(#[from] LogError),
}

/// Returns when a configuration is in force, and goes on following in the background as long as somebody has it.
///
/// # Errors
/// [`FollowError`]: an address that is none, or a log that cannot be read. A control plane that does not answer is waited for.
pub async fn follow<B: Backend>(log: &B, settings: &RemoteSettings, clock: Clock) -> Result<Current, FollowError> {
    let mut remote = Remote::new(settings)?;
    let mut kept = Kept::<B>::open(log, clock.clone()).await?;
    let mut wanted = None;
    let workspace = loop {
        if let Some((text, workspace)) = asked(&mut remote).await {
            wanted = Some(text);
            break workspace;
        }
        if let Some(workspace) = match kept.text() {
            Some(text) => usable(text).await.ok().map(|(_, workspace)| workspace),
            None => None,
        } {
            tracing::warn!("going on with the workspace configuration that was in force last");
            count("kept");
            break workspace;
        }
        clock.sleep(settings.poll_interval).await;
        kept = Kept::open(log, clock.clone()).await?;
    };
    let sender = watch::Sender::new(Arc::new(workspace));
    let current = Current::new(sender.subscribe());
    let (asks, answers) = mpsc::channel(1);
    let (every, own) = (settings.poll_interval, clock.clone());
    tokio::spawn(async move {
        while !asks.is_closed() {
            own.sleep(every).await;
            if let Some((text, _)) = asked(&mut remote).await {
                let _ = asks.send(text).await;
            }
        }
    });
    tokio::spawn(keep(kept, sender, answers, wanted, clock));
    Ok(current)
}

/// Gives what was asked for to the log, and puts in force what comes from there.
async fn keep<B: Backend>(
    mut kept: Kept<B>,
    sender: watch::Sender<Arc<Workspace>>,
    mut answers: mpsc::Receiver<String>,
    mut wanted: Option<String>,
    clock: Clock,
) {
    loop {
        if let Some(text) = &wanted {
            match kept.put(text).await {
                Ok(()) => wanted = None,
                Err(error) => tracing::warn!(%error, "the log does not take the workspace configuration, trying again"),
            }
        }
        let is_waiting = wanted.is_some();
        tokio::select! {
            () = sender.closed() => return,
            () = clock.sleep(AGAIN), if is_waiting => {}
            Some(text) = answers.recv() => wanted = Some(text),
            text = kept.changed() => {
                if let Ok((_, workspace)) = usable(text).await {
                    tracing::info!(sources = workspace.sources().count(), "workspace configuration in force");
                    sender.send_replace(Arc::new(workspace));
                    count("applied");
                }
            }
        }
    }
}

/// What the control plane has, where that is new and can be used; what is wrong is told.
async fn asked(remote: &mut Remote) -> Option<(String, Workspace)> {
    match remote.fetch().await {
        Ok(None) => {
            count("unchanged");
            None
        }
        Ok(Some(text)) => usable(text).await.ok(),
        Err(error) => {
            count("unreachable");
            tracing::warn!(%error, "the control plane cannot be asked, the last good workspace configuration stays in force");
            None
        }
    }
}

/// Off the async threads: it may have megabytes.
async fn usable(text: String) -> Result<(String, Workspace), WorkspaceError> {
    let parsed =
        tokio::task::spawn_blocking(move || Workspace::parse_any(&text).map(|workspace| (text, workspace))).await;
    let parsed = parsed.unwrap_or_else(|error| Err(WorkspaceError::Refused(error.to_string())));
    if let Err(error) = &parsed {
        count("refused");
        tracing::error!(%error, "workspace configuration not usable, the last good one stays in force");
    }
    parsed
}

/// What a control plane has now, for a command.
///
/// # Errors
/// Where it does not answer, or its answer cannot be used.
pub async fn once(settings: &RemoteSettings) -> Result<Workspace, String> {
    let mut remote = Remote::new(settings).map_err(|error| error.to_string())?;
    let text = remote.fetch().await.map_err(|error| error.to_string())?.unwrap_or_default();
    Workspace::parse_any(&text).map_err(|error| error.to_string())
}

fn count(result: &str) {
    metrics().config_loads.with_label_values(&[result]).inc();
}
