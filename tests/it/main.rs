//! The integration tests: one binary, driving the engine over HTTP and topics. See tests/README.md.

mod flow;
mod gateway;
mod log_contract;
mod support;
mod tidy;
