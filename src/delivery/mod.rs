//! Getting a delivery to its destination, and what the destination's answer means.

pub mod http;
pub mod verdict;
pub mod warehouse;
