//! A schema registry of a test's own.

use serde_json::{Value, json};

use super::process::{free_port, services};

pub struct Registry {
    port: u16,
    folder: tempfile::TempDir,
}

impl Registry {
    /// A place for one, that is not there yet.
    pub fn away() -> Self {
        Self { port: free_port(), folder: tempfile::tempdir().expect("a folder") }
    }

    pub fn start() -> Self {
        let registry = Self::away();
        registry.come();
        registry
    }

    pub fn come(&self) {
        self.run("up");
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}/apis/ccompat/v7", self.port)
    }

    /// It stands still: connections are taken and nothing is answered.
    pub fn freeze(&self) {
        self.signal(libc::SIGSTOP);
    }

    pub fn thaw(&self) {
        self.signal(libc::SIGCONT);
    }

    fn signal(&self, signal: i32) {
        let pid = std::fs::read_to_string(self.folder.path().join("registry.pid")).expect("it runs");
        // SAFETY: the process is one that this test started.
        assert_eq!(unsafe { libc::kill(pid.trim().parse().expect("a pid"), signal) }, 0);
    }

    pub async fn subjects(&self) -> Vec<String> {
        let answer = reqwest::get(format!("{}/subjects", self.url())).await.expect("an answer");
        serde_json::from_str(&answer.text().await.expect("a body")).expect("a list")
    }

    /// Registers a schema; its id.
    pub async fn register(&self, subject: &str, schema: &str) -> u32 {
        let answer = self.send("POST", &format!("/subjects/{subject}/versions"), &json!({"schema": schema})).await;
        answer["id"].as_u64().unwrap_or_else(|| panic!("{answer}")) as u32
    }

    /// New schemas of all subjects have to be readable by readers of the old ones.
    pub async fn wants(&self, compatibility: &str) {
        self.send("PUT", "/config", &json!({"compatibility": compatibility})).await;
    }

    async fn send(&self, method: &str, path: &str, body: &Value) -> Value {
        let request = reqwest::Client::new()
            .request(method.parse().expect("a method"), self.url() + path)
            .header("content-type", "application/vnd.schemaregistry.v1+json")
            .body(body.to_string());
        let answer = request.send().await.expect("an answer").text().await.expect("a body");
        serde_json::from_str(&answer).expect("JSON")
    }

    fn run(&self, what: &str) {
        services(what, "registry", &[("LANEWAY_REGISTRY_PORT", self.port.to_string())], self.folder.path());
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.run("kill");
    }
}
