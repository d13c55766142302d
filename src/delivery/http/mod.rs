//! Sending a delivery over HTTP.

mod client;
mod connection;
mod guard;
mod request;

pub use client::{Client, ClientSettings};
pub use guard::Guard;
