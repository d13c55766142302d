//! The integration tests: one binary, driving the engine over HTTP and topics. See tests/README.md.

#![allow(clippy::disallowed_methods, reason = "tests wait on the real clock, with deadlines")]
#![allow(clippy::unwrap_used)]

mod config;
mod control;
mod dead_letters;
mod dedup;
mod edge;
mod faults;
mod flow;
mod gateway;
mod hanging;
mod hostile;
mod job_status;
mod lag;
mod lanes;
mod live;
mod log_contract;
mod offsets;
#[cfg(feature = "oidc")]
mod oidc;
mod pulsar;
mod registry;
mod sdks;
mod security;
mod store_contract;
mod support;
mod suppression;
mod tidy;
mod webhooks;
