//! The words of the engine as types: ids, events, deliveries, outcomes, records and progress. No I/O and no async here;
//! everything else is built from these.

pub mod codec;
pub mod command;
pub mod delivery;
pub mod event;
pub mod failure;
pub mod id;
pub mod job_status;
pub mod json;
pub mod outcome;
pub mod progress;
pub mod record;
pub mod redrive;
pub mod seen;
