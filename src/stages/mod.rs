//! The stages: only logic. Each is called by a runtime or, at the edge, by HTTP; none calls another, they meet on topics.
//!
//! | stage | reads | writes | record key | guarantee |
//! |---|---|---|---|---|
//! | [`gateway`] | HTTP | `events`, `proc-errors`, `job-status` | writeKey | 200 only when the log has it |
//! | [`processor`] | `events` | `deliveries`, `proc-errors`, `job-status` | destination id | exactly once |
//! | [`router`] | `deliveries` | HTTP, `dead-letters`, `progress.router`, `job-status` | | at least once, with a stable delivery id; in order per user |
//! | [`live`] | `events` | the control plane | | none: recent events, for people |
//! | [`reporter`] | `job-status` | the store | | exactly once |

pub mod gateway;
pub mod live;
pub mod processor;
pub mod reporter;
pub mod router;
