//! The edge: takes events over HTTP, as the Segment and RudderStack SDKs send them, and answers 200 only when the log has them on
//! all replicas; 503 with `Retry-After` when it cannot, never 4xx for the engine's own trouble (SDKs drop on 4xx).
//!
//! `request` turns a body into events (pure; the command line's `publish` uses the same), `publish` gives them to the log,
//! `routes` is the HTTP around it.

mod auth;
mod cors;
mod identity;
mod publish;
pub mod request;
mod routes;

pub use publish::Admission;
pub use routes::{Gateway, GatewaySettings, routes, unavailable};
