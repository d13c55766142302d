//! A Kafka or Pulsar of a test's own, for tests that stop it or ask for more than the shared one has.

use laneway::log::pulsar::PulsarConfig;

use super::process::{Flow, free_port, services};
use super::pulsar_at;

/// One node, or a cluster of several.
pub struct Broker {
    kind: &'static str,
    /// One for each node; of a Pulsar the broker's and the admin API's.
    ports: Vec<u16>,
    /// Of the listeners with TLS and SASL; the next ports are those with TLS and client certificates. Empty: none.
    tls_ports: Vec<u16>,
    folder: tempfile::TempDir,
}

impl Broker {
    pub fn start() -> Self {
        Self::up(1, false)
    }

    pub fn start_pulsar() -> Self {
        let (ports, folder) = (vec![free_port(), free_port()], tempfile::tempdir().expect("a folder"));
        let broker = Self { kind: "pulsar", ports, tls_ports: Vec::new(), folder };
        broker.run("up", "pulsar");
        broker
    }

    /// With TLS, for those with a token only.
    pub fn start_pulsar_secured() -> Self {
        let (ports, tls_ports) = (vec![free_port(), free_port()], vec![free_port()]);
        let broker = Self { kind: "pulsar", ports, tls_ports, folder: tempfile::tempdir().expect("a folder") };
        broker.run("up", "pulsar");
        broker
    }

    /// The way in over TLS, with a token.
    pub fn tls_config(&self, token: &str) -> PulsarConfig {
        let port = self.tls_ports[0];
        PulsarConfig {
            service_url: format!("pulsar+ssl://127.0.0.1:{port}"),
            admin_url: format!("https://127.0.0.1:{}", port + 1),
            token: token.into(),
            ca_file: self.tls_file("ca.pem").into(),
            ..pulsar_at(0, 0)
        }
    }

    /// A flow on it.
    pub fn flow(&self) -> Flow {
        match self.kind {
            "pulsar" => Flow::on_pulsar_at(&pulsar_at(self.ports[0], self.ports[1])),
            _ => Flow::on_kafka_at(&self.address()),
        }
    }

    /// So many nodes with the listeners that companies have; three replicas from three nodes on.
    pub fn start_secured(nodes: usize) -> Self {
        Self::up(nodes, true)
    }

    fn up(nodes: usize, is_secured: bool) -> Self {
        let ports = |count: usize| (0..count).map(|_| free_port()).collect();
        let tls_ports = ports(if is_secured { nodes } else { 0 });
        let broker =
            Self { kind: "kafka", ports: ports(nodes), tls_ports, folder: tempfile::tempdir().expect("a folder") };
        broker.run("up", "kafka");
        broker
    }

    pub fn address(&self) -> String {
        addresses(&self.ports)
    }

    /// With TLS and SASL.
    pub fn tls_address(&self) -> String {
        addresses(&self.tls_ports)
    }

    /// With TLS and client certificates.
    pub fn mtls_address(&self) -> String {
        addresses(&self.tls_ports.iter().map(|port| port + 1).collect::<Vec<_>>())
    }

    /// A file that a client needs.
    pub fn tls_file(&self, name: &str) -> String {
        self.folder.path().join(self.kind).join("tls").join(name).display().to_string()
    }

    /// A token that lets everybody in.
    pub fn token_file(&self) -> String {
        self.folder.path().join("pulsar/token").display().to_string()
    }

    /// With -9: nothing is written or told any more.
    pub fn kill(&self) {
        self.run("kill", self.kind);
    }

    pub fn stop(&self) {
        self.run("stop", self.kind);
    }

    /// Where it keeps its partitions.
    pub fn data(&self) -> std::path::PathBuf {
        self.folder.path().join("kafka/data")
    }

    /// With what it has on disk.
    pub fn start_again(&self) {
        self.run("start", self.kind);
    }

    /// One node of a cluster, from 1 on.
    pub fn kill_node(&self, number: usize) {
        self.run("kill", &name(number));
    }

    fn run(&self, what: &str, name: &str) {
        let list = |ports: &[u16]| ports.iter().map(u16::to_string).collect::<Vec<_>>().join(",");
        if self.kind == "pulsar" {
            let [broker, web] = [self.ports[0], self.ports[1]].map(|port| port.to_string());
            let mut ports = vec![("LANEWAY_PULSAR_PORT", broker), ("LANEWAY_PULSAR_WEB_PORT", web)];
            if let [tls] = self.tls_ports[..] {
                ports.extend([("LANEWAY_PULSAR_TLS_PORT", tls.to_string()), ("LANEWAY_PULSAR_TOKENS", "1".into())]);
            }
            return services(what, name, &ports, self.folder.path());
        }
        let ports = [("LANEWAY_KAFKA_PORT", list(&self.ports)), ("LANEWAY_KAFKA_TLS_PORT", list(&self.tls_ports))];
        services(what, name, &ports, self.folder.path());
    }
}

fn name(number: usize) -> String {
    if number == 1 { "kafka".to_owned() } else { format!("kafka-{number}") }
}

fn addresses(ports: &[u16]) -> String {
    ports.iter().map(|port| format!("127.0.0.1:{port}")).collect::<Vec<_>>().join(",")
}

impl Drop for Broker {
    fn drop(&mut self) {
        match self.kind {
            "pulsar" => self.kill(),
            _ => (1..=self.ports.len()).for_each(|number| self.kill_node(number)),
        }
    }
}
