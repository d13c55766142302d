//! A Kafka of a test's own, for tests that stop it.

use std::path::Path;
use std::process::Command;

use super::process::free_port;

pub struct Broker {
    port: u16,
    folder: tempfile::TempDir,
}

impl Broker {
    pub fn start() -> Self {
        let broker = Self { port: free_port(), folder: tempfile::tempdir().expect("a folder") };
        broker.run("up");
        broker
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// With -9: nothing is written or told any more.
    pub fn kill(&self) {
        self.run("kill");
    }

    pub fn stop(&self) {
        self.run("stop");
    }

    /// Where it keeps its partitions.
    pub fn data(&self) -> std::path::PathBuf {
        self.folder.path().join("kafka/data")
    }

    /// With what it has on disk.
    pub fn start_again(&self) {
        self.run("start");
    }

    fn run(&self, what: &str) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/services");
        let ran = Command::new(script)
            .args([what, "kafka"])
            .env("LANEWAY_KAFKA_PORT", self.port.to_string())
            .env("LANEWAY_SERVICES_RUN", self.folder.path())
            .output()
            .expect("deploy/services runs");
        assert!(ran.status.success(), "{what}: {}", String::from_utf8_lossy(&ran.stderr));
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.run("kill");
    }
}
