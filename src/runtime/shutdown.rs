//! Shutdown as an argument: whoever is given a [`Shutdown`] stops taking in, drains within its budget, commits and returns.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

#[derive(Clone, Debug)]
pub struct Shutdown {
    token: CancellationToken,
    /// How long may be drained after the signal.
    pub budget: Duration,
}

impl Shutdown {
    pub fn new(budget: Duration) -> Self {
        Self { token: CancellationToken::new(), budget }
    }

    /// Begins the shutdown. Calling it again changes nothing.
    pub fn begin(&self) {
        self.token.cancel();
    }

    pub fn has_begun(&self) -> bool {
        self.token.is_cancelled()
    }

    /// For those who know no runtime.
    pub fn token(&self) -> CancellationToken {
        self.token.clone()
    }

    /// Waits for the signal. Cancel-safe.
    pub async fn begun(&self) {
        self.token.cancelled().await;
    }
}
