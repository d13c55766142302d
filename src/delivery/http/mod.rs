//! Sending a delivery over HTTP.

mod client;
mod guard;

pub use client::{Client, ClientSettings};
pub use guard::Guard;
