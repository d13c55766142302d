//! The edge: takes events over HTTP, as the Segment and RudderStack SDKs send them, and answers 200 only when the log has them on
//! all replicas; 503 with `Retry-After` when it cannot, never 4xx for the engine's own trouble (SDKs drop on 4xx).
//!
//! `webhook` asks the transformer service what requests of other tools mean.
//!
//! `endpoints` lists every route; `auth` finds the source, `intake` takes the body within bounds, `request` turns it into events
//! (pure; the command line's `publish` uses the same), `limit` may turn them away, `publish` gives them to the log, `reply` answers.
//! `routes` is the HTTP around it.

mod auth;
mod client;
mod cors;
mod endpoints;
mod identity;
mod intake;
mod job_status;
mod limit;
pub mod messages;
mod openapi;
pub mod pixel;
mod publish;
mod reply;
pub mod request;
mod routes;
mod source_config;
mod suppress;
pub mod webhook;

pub use client::TrustedProxies;
pub use cors::Origins;
pub use intake::{Intake, inflated};
pub use job_status::{CaughtUp, JobStatusApi};
pub use limit::{Limits, RateLimits};
pub use publish::{Admission, Along, address};
pub use routes::{Gateway, internal, public, unavailable};
pub use suppress::without_suppressed;
