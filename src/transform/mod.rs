//! What turns events into the form that a destination wants, and other tools' requests into events.

pub mod builtin;
pub mod http;
