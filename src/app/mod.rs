//! The composition root: the only place that knows every module. Builds the stages on a log and runs them until shutdown.

pub mod check;
pub mod drift;
pub mod engine;
pub mod inbox;
pub mod job_status;
pub mod lag;
pub mod letters;
pub mod offsets;
pub mod open;
mod placement;
mod retention;
mod serve;
pub mod standing;
