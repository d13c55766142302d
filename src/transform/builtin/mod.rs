//! Transforms that need no other process.

pub mod webhook;
