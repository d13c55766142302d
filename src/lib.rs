//! Laneway moves customer events from the apps where they happen to the tools that need them, over partitioned topics.
#![warn(clippy::dbg_macro, clippy::todo, clippy::unimplemented, clippy::unwrap_used)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod app;
pub mod cli;
pub mod clock;
pub mod config;
pub mod control;
pub mod delivery;
pub mod log;
pub mod model;
pub mod runtime;
pub mod stages;
pub mod telemetry;
pub mod transform;
