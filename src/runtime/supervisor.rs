//! Spawns the process's parts, watches them and joins every one: the first part that fails takes the others down in order.

use std::future::Future;

use tokio::task::JoinSet;

use crate::log::BoxError;
use crate::runtime::shutdown::Shutdown;

pub struct Supervisor {
    parts: JoinSet<(&'static str, Result<(), BoxError>)>,
    shutdown: Shutdown,
}

impl Supervisor {
    pub fn new(shutdown: Shutdown) -> Self {
        Self { parts: JoinSet::new(), shutdown }
    }

    /// Starts a part. It ends when the shutdown has begun, or by failing.
    pub fn start<E: Into<BoxError>>(
        &mut self,
        name: &'static str,
        part: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        self.parts.spawn(async move { (name, part.await.map_err(Into::into)) });
    }

    /// Waits until all parts have ended.
    ///
    /// # Errors
    /// What the first failing part said.
    pub async fn join(mut self) -> Result<(), BoxError> {
        let mut failed = None;
        while let Some(ended) = self.parts.join_next().await {
            let problem = match ended {
                Ok((name, Ok(()))) if !self.shutdown.has_begun() => Some(format!("{name} ended by itself").into()),
                Ok((_, Ok(()))) => None,
                Ok((name, Err(error))) => Some(BoxError::from(format!("{name}: {error}"))),
                Err(crashed) => Some(BoxError::from(format!("a part crashed: {crashed}"))),
            };
            if let Some(problem) = problem {
                tracing::error!(error = %problem, "stopping");
                failed.get_or_insert(problem);
                self.shutdown.begin();
            }
        }
        failed.map_or(Ok(()), Err)
    }
}
