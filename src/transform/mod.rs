//! Making an event ready for a type of destination.

pub mod builtin;
