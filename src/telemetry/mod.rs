//! What the engine tells about itself: metrics in one catalogue, internal events that are a log line and its metrics in one,
//! the admin listener that serves them.

pub mod events;
pub mod metrics;
pub mod seldom;
pub mod server;
pub mod terminal;
pub mod tracing;
