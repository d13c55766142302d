//! The composition root: the only place that knows every module. Builds the stages on a log and runs them until shutdown.

pub mod engine;
pub mod inbox;
pub mod lag;
pub mod open;
mod retention;
pub mod standing;
