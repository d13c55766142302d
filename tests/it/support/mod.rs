//! What the tests share: services, waiting for conditions, topics of their own.

pub mod broker;
pub mod issuer;
pub mod postgres;
pub mod process;
pub mod registry;
pub mod sink;
#[path = "../../waiting.rs"]
mod waiting;

use laneway::log::pulsar::PulsarConfig;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

pub use waiting::{eventually, holds_within};

/// A destination on a port that takes everything; the path and the body of what arrives.
pub async fn sink(port: u16) -> UnboundedReceiver<(String, String)> {
    let (arrived, arrivals) = unbounded_channel();
    let routes = axum::Router::new().fallback(move |uri: axum::http::Uri, body: String| {
        let arrived = arrived.clone();
        async move { drop(arrived.send((uri.path().to_owned(), body))) }
    });
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.expect("a listener");
    tokio::spawn(async move { axum::serve(listener, routes).await });
    arrivals
}

/// Where the test Kafka listens; `deploy/services up kafka` starts it.
pub fn kafka_address() -> String {
    let port = std::env::var("LANEWAY_KAFKA_PORT").unwrap_or_else(|_| "19092".into());
    let address = format!("127.0.0.1:{port}");
    let socket = address.parse().expect("LANEWAY_KAFKA_PORT is a port");
    if let Err(error) = std::net::TcpStream::connect_timeout(&socket, Duration::from_secs(2)) {
        panic!("this test needs a Kafka on {address} ({error}): start it with `deploy/services up kafka`");
    }
    address
}

/// The test Pulsar; `deploy/services up pulsar` starts it.
pub fn pulsar_config() -> PulsarConfig {
    let port = |name: &str, default: u16| std::env::var(name).map_or(default, |text| text.parse().expect("a port"));
    let (broker, web) = (port("LANEWAY_PULSAR_PORT", 16_650), port("LANEWAY_PULSAR_WEB_PORT", 18_080));
    let socket = ([127, 0, 0, 1], broker).into();
    if let Err(error) = std::net::TcpStream::connect_timeout(&socket, Duration::from_secs(2)) {
        panic!("this test needs a Pulsar on {socket} ({error}): start it with `deploy/services up pulsar`");
    }
    pulsar_at(broker, web)
}

/// A Pulsar on these ports.
pub fn pulsar_at(broker: u16, web: u16) -> PulsarConfig {
    PulsarConfig {
        service_url: format!("pulsar://127.0.0.1:{broker}"),
        admin_url: format!("http://127.0.0.1:{web}"),
        tenant: "public".into(),
        namespace: "default".into(),
        ..PulsarConfig::default()
    }
}

/// A name that no other test uses.
pub fn unique(stem: &str) -> String {
    format!("{stem}-{}", &uuid::Uuid::new_v4().simple().to_string()[..8])
}
