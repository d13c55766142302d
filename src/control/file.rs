//! The workspace configuration from a file, read again when it changes. A version that cannot be used is reported, and the one
//! in force stays.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::clock::Clock;
use crate::control::Current;
use crate::control::workspace::{Workspace, WorkspaceError};
use crate::telemetry::metrics::metrics;

/// How soon a change is seen.
const LOOK: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("workspace file {path}: {error}")]
    Unreadable { path: PathBuf, error: std::io::Error },
    #[error("workspace file {path}: {error}")]
    Refused { path: PathBuf, error: WorkspaceError },
}

/// Follows a file.
pub struct FileWatch {
    path: PathBuf,
    allow_empty: bool,
    text: String,
    sender: watch::Sender<Arc<Workspace>>,
}

impl FileWatch {
    /// # Errors
    /// [`FileError`]: a start needs a usable configuration.
    pub async fn open(path: &Path, allow_empty: bool) -> Result<Self, FileError> {
        let (text, workspace) = parse(path, read(path).await?).await?;
        workspace.warn();
        metrics().config_loads.with_label_values(&["applied"]).inc();
        Ok(Self { path: path.to_owned(), allow_empty, text, sender: watch::Sender::new(Arc::new(workspace)) })
    }

    pub fn current(&self) -> Current {
        Current::new(self.sender.subscribe())
    }

    /// Looks for changes for as long as it is polled.
    pub async fn follow(mut self, clock: Clock) {
        let mut complained = String::new();
        loop {
            clock.sleep(LOOK).await;
            let result = match read(&self.path).await {
                Ok(text) if text == self.text => {
                    complained.clear();
                    "unchanged"
                }
                Ok(text) => match self.replacement(text).await {
                    Ok((text, workspace)) => {
                        tracing::info!(path = %self.path.display(), "workspace configuration changed");
                        workspace.warn();
                        self.sender.send_replace(Arc::new(workspace));
                        self.text = text;
                        complained.clear();
                        "applied"
                    }
                    Err(error) => complain(&mut complained, &error),
                },
                Err(error) => complain(&mut complained, &error),
            };
            metrics().config_loads.with_label_values(&[result]).inc();
        }
    }

    async fn replacement(&self, text: String) -> Result<(String, Workspace), FileError> {
        let (text, workspace) = parse(&self.path, text).await?;
        let refused = |error| FileError::Refused { path: self.path.clone(), error };
        workspace.may_replace(&self.sender.borrow(), self.allow_empty).map_err(refused)?;
        Ok((text, workspace))
    }
}

/// Says what is wrong, once for each problem.
fn complain(last: &mut String, error: &FileError) -> &'static str {
    let text = error.to_string();
    if *last != text {
        tracing::error!(error = %text, "workspace configuration not usable, the last good one stays in force");
        *last = text;
    }
    "refused"
}

async fn read(path: &Path) -> Result<String, FileError> {
    tokio::fs::read_to_string(path).await.map_err(|error| FileError::Unreadable { path: path.to_owned(), error })
}

/// Off the async threads: it may have megabytes.
async fn parse(path: &Path, text: String) -> Result<(String, Workspace), FileError> {
    let parsed =
        tokio::task::spawn_blocking(move || Workspace::parse_any(&text).map(|workspace| (text, workspace))).await;
    let parsed = parsed.unwrap_or_else(|error| Err(WorkspaceError::Refused(error.to_string())));
    parsed.map_err(|error| FileError::Refused { path: path.to_owned(), error })
}
