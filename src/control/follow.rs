//! The workspace configuration of a control plane, followed: asked for here, kept in the log ([`super::kept`]) and put in force from
//! there, so that all processes have the same one. A start goes on with what is kept when the control plane does not answer.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::clock::Clock;
use crate::control::Current;
use crate::control::kept::{Kept, Packed};
use crate::control::remote::{Remote, RemoteError, RemoteSettings};
use crate::control::workspace::{Workspace, WorkspaceError};
use crate::log::{Backend, LogError};
use crate::telemetry::metrics::metrics;

/// What the log did not take is given to it again after so long.
const AGAIN: Duration = Duration::from_secs(1);

/// The same problem with the control plane is reported this often.
const REPORT_INTERVAL: Duration = Duration::from_secs(60);

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
    let mut trouble = Trouble::default();
    let (first, kept, workspace) = loop {
        let answer = asked(&mut remote, &mut trouble, &clock).await;
        let mut kept = Kept::<B>::open(log, clock.clone()).await?;
        let last = match &answer {
            // Only an empty answer is compared with what is kept.
            Asked::New(_, workspace) if workspace.sources().next().is_some() || settings.allow_empty => None,
            _ => match kept.text().await {
                Some(text) => usable(text, None).await.ok().map(|(_, workspace)| workspace),
                None => None,
            },
        };
        match (answer, last) {
            (Asked::New(text, workspace), last)
                if last.as_ref().is_none_or(|last| is_taken(&workspace, last, false)) =>
            {
                // The one that is kept was in force before, and is not to come back for a moment.
                kept.pass_over();
                break (Some(Packed::of(text).await), kept, *workspace);
            }
            (_, Some(last)) => {
                tracing::warn!("going on with the workspace configuration that was in force last");
                count("kept");
                break (None, kept, last);
            }
            (_, None) => {}
        }
        clock.sleep(settings.poll_interval).await;
    };
    let sender = watch::Sender::new(Arc::new(workspace));
    let current = Current::new(sender.subscribe());
    let (asks, answers) = watch::channel(first);
    let (every, allow_empty, own) = (settings.poll_interval, settings.allow_empty, clock.clone());
    let in_force = current.clone();
    tokio::spawn(async move {
        while !asks.is_closed() {
            own.sleep(every).await;
            match asked(&mut remote, &mut trouble, &own).await {
                Asked::New(_, workspace) if !is_taken(&workspace, &in_force.get(), allow_empty) => {}
                Asked::New(text, _) => drop(asks.send_replace(Some(Packed::of(text).await))),
                // It holds still: whoever keeps it is to look whether that is what is in force.
                Asked::Same => asks.send_modify(|_| {}),
                Asked::Nothing => {}
            }
        }
    });
    tokio::spawn(keep(kept, sender, answers, clock));
    Ok(current)
}

/// Gives what was asked for to the log, and puts in force what comes from there. Where another process has put something else there,
/// the control plane's next answer decides, also one that says that nothing has changed: somebody may have asked before and written late.
async fn keep<B: Backend>(
    mut kept: Kept<B>,
    sender: watch::Sender<Arc<Workspace>>,
    mut answers: watch::Receiver<Option<Packed>>,
    clock: Clock,
) {
    answers.mark_changed();
    let (mut is_asking, mut is_owed) = (true, false);
    loop {
        tokio::select! {
            () = sender.closed() => return,
            answer = answers.changed(), if is_asking => is_asking = answer.is_ok(),
            () = clock.sleep(AGAIN), if is_owed => {}
            text = kept.changed() => {
                if let Ok((_, workspace)) = usable(text, None).await {
                    tracing::info!(sources = workspace.sources().count(), "workspace configuration in force");
                    workspace.warn();
                    sender.send_replace(Arc::new(workspace));
                    count("applied");
                }
                continue;
            }
        }
        let said = answers.borrow_and_update().clone();
        is_owed = match said {
            Some(packed) => kept.put(&packed).await.inspect_err(|error| {
                tracing::warn!(%error, "the log does not take the workspace configuration, trying again");
            }),
            None => Ok(()),
        }
        .is_err();
    }
}

/// What an answer of the control plane means.
enum Asked {
    New(String, Box<Workspace>),
    /// What it said last holds.
    Same,
    /// It says nothing, or nothing that can be used; that is told.
    Nothing,
}

/// What was wrong last, so that a control plane that is away for hours is reported once a minute.
#[derive(Default)]
struct Trouble(Option<(String, Instant)>);

impl Trouble {
    fn is_due(&mut self, problem: &str, now: Instant) -> bool {
        let is_due = self.0.as_ref().is_none_or(|(last, at)| last != problem || now >= *at + REPORT_INTERVAL);
        if is_due {
            self.0 = Some((problem.to_owned(), now));
        }
        is_due
    }
}

async fn asked(remote: &mut Remote, trouble: &mut Trouble, clock: &Clock) -> Asked {
    match remote.fetch().await {
        Ok(None) => {
            count("unchanged");
            trouble.0 = None;
            Asked::Same
        }
        Ok(Some(text)) => match usable(text, Some((&mut *trouble, clock.instant()))).await {
            Ok((text, workspace)) => {
                trouble.0 = None;
                remote.accept();
                Asked::New(text, Box::new(workspace))
            }
            Err(_) => Asked::Nothing,
        },
        Err(error) => {
            count("unreachable");
            if trouble.is_due(&error.to_string(), clock.instant()) {
                tracing::warn!(%error, "the control plane cannot be asked, the last good workspace configuration stays in force");
            }
            Asked::Nothing
        }
    }
}

/// Whether a configuration takes the place of another one; says why not.
fn is_taken(workspace: &Workspace, in_force: &Workspace, allow_empty: bool) -> bool {
    let taken = workspace.may_replace(in_force, allow_empty);
    if let Err(error) = &taken {
        count("refused");
        tracing::error!(%error, "workspace configuration not usable, the last good one stays in force");
    }
    taken.is_ok()
}

/// Off the async threads: it may have megabytes.
async fn usable(text: String, trouble: Option<(&mut Trouble, Instant)>) -> Result<(String, Workspace), WorkspaceError> {
    let parsed =
        tokio::task::spawn_blocking(move || Workspace::parse_any(&text).map(|workspace| (text, workspace))).await;
    let parsed = parsed.unwrap_or_else(|error| Err(WorkspaceError::Refused(error.to_string())));
    if let Err(error) = &parsed {
        count("refused");
        if trouble.is_none_or(|(trouble, now)| trouble.is_due(&error.to_string(), now)) {
            tracing::error!(%error, "workspace configuration not usable, the last good one stays in force");
        }
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
