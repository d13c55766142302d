//! What the operator has configured: the workspace with its sources and destinations, as every stage sees it.

pub mod commands;
pub mod file;
pub mod follow;
pub mod kept;
pub mod regulations;
pub mod remote;
pub mod source_types;
pub mod suppression;
pub mod uploads;
pub mod workspace;

use std::sync::Arc;

use tokio::sync::watch;

use workspace::Workspace;

/// The workspace in force. Clones see the same one; a change applies to whatever is begun after it.
#[derive(Clone)]
pub struct Current(watch::Receiver<Arc<Workspace>>);

impl Current {
    pub fn new(receiver: watch::Receiver<Arc<Workspace>>) -> Self {
        Self(receiver)
    }

    /// One that never changes.
    pub fn fixed(workspace: Workspace) -> Self {
        Self(watch::Sender::new(Arc::new(workspace)).subscribe())
    }

    pub fn get(&self) -> Arc<Workspace> {
        Arc::clone(&self.0.borrow())
    }

    /// Returns when the workspace is another one than at the last call of this clone, or at its making. Never, where nothing
    /// changes it any more.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
