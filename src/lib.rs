//! Laneway moves customer events from the apps where they happen to the tools that need them, over partitioned topics.
//!
//! ```text
//!  SDKs, webhooks ──HTTP──► gateway ──► events ──► processor ──► deliveries ──► router ──HTTP──► destinations
//!                             │                      │                          │
//!                             └──► proc-errors ◄─────┤                          ├──► dead-letters, progress.router
//!                                                    └──► job-status ◄──────────┘
//!                                                             └──► reporter ──► store
//! ```
//!
//! Layers, lowest first; an import goes to a lower one only:
//! [`clock`] | [`model`] | [`telemetry`] | [`log`], [`store`] | [`control`], [`transform`], [`delivery`] | [`runtime`] | [`stages`] | [`config`] |
//! [`app`] | [`cli`].
//!
//! Words. *workspace*: a tenant. *source*: where events come from; it has a write key. *destination*: one configured place that
//! events go to. *event*: one customer event, JSON. *delivery*: one event made ready for one destination. *order key*: what must stay
//! in order, a destination and a user. *stage*: one step of the flow. *lane*: all deliveries of one destination inside a partition.
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
pub mod store;
pub mod telemetry;
pub mod transform;
