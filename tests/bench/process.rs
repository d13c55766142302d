//! A stage as a process of its own, whose CPU and memory are its alone, on topics of its own.

use std::cell::RefCell;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use laneway::log::pulsar::PulsarConfig;

use crate::waiting::eventually;

/// Every Linux tells CPU time in hundredths of a second.
const TICKS: f64 = 100.0;

/// The test Kafka.
pub fn bootstrap() -> String {
    format!("127.0.0.1:{}", std::env::var("LANEWAY_KAFKA_PORT").unwrap_or("19092".into()))
}

/// The test Pulsar.
pub fn pulsar(prefix: &str) -> PulsarConfig {
    let port = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.into());
    PulsarConfig {
        service_url: format!("pulsar://127.0.0.1:{}", port("LANEWAY_PULSAR_PORT", "16650")),
        admin_url: format!("http://127.0.0.1:{}", port("LANEWAY_PULSAR_WEB_PORT", "18080")),
        tenant: "public".into(),
        namespace: "default".into(),
        prefix: prefix.into(),
        ..PulsarConfig::default()
    }
}

/// Where processes run: a folder with `workspace.json` and `laneway.toml`, topics under a prefix.
pub struct Setting {
    pub folder: tempfile::TempDir,
    pub prefix: String,
    admin: u16,
    log: Vec<(&'static str, String)>,
}

impl Setting {
    /// On Kafka, with its topics.
    pub fn new(workspace: &serde_json::Value, config: &str) -> Self {
        let log =
            vec![("LANEWAY_LOG__BACKEND", "kafka".into()), ("LANEWAY_LOG__KAFKA__BOOTSTRAP_SERVERS", bootstrap())];
        Self::on(log, workspace, config)
    }

    /// On Pulsar, with its topics.
    pub fn on_pulsar(workspace: &serde_json::Value, config: &str) -> Self {
        let at = pulsar("");
        let log = vec![
            ("LANEWAY_LOG__BACKEND", "pulsar".into()),
            ("LANEWAY_LOG__PULSAR__SERVICE_URL", at.service_url),
            ("LANEWAY_LOG__PULSAR__ADMIN_URL", at.admin_url),
        ];
        Self::on(log, workspace, config)
    }

    fn on(log: Vec<(&'static str, String)>, workspace: &serde_json::Value, config: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("workspace.json"), workspace.to_string()).expect("written");
        std::fs::write(folder.path().join("laneway.toml"), config).expect("written");
        let prefix = format!("bench-{}.", uuid::Uuid::new_v4().simple());
        let setting = Self { folder, prefix, admin: 21_000 + (std::process::id() % 4_000) as u16, log };
        let applied = setting.command(&["topics", "apply"]).status().expect("laneway runs");
        assert!(applied.success(), "is there a broker (deploy/services up kafka, or pulsar)?\n{}", setting.said());
        setting
    }

    fn command(&self, args: &[&str]) -> Command {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.folder.path().join("log"));
        let log = log.expect("a log file");
        let mut command = Command::new(env!("CARGO_BIN_EXE_laneway"));
        command
            .args(args)
            .args(["--config", "laneway.toml"])
            .env("LANEWAY_CONTROL__WORKSPACE_FILE", "workspace.json")
            .envs(self.log.iter().map(|(name, value)| (name, value)))
            .env("LANEWAY_LOG__TOPIC_PREFIX", &self.prefix)
            .env("LANEWAY_RUNTIME__SESSION_TIMEOUT", "6s")
            .env("LANEWAY_ADMIN__LISTEN", format!("127.0.0.1:{}", self.admin))
            .env("LANEWAY_INSTANCE__ID", "bench")
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log);
        command
    }

    /// Starts a stage and waits until it is ready.
    pub async fn start(&self, stage: &str) -> Running {
        let child = self.command(&["run", stage]).spawn().expect("laneway starts");
        let running = RefCell::new(Running { child, admin: self.admin });
        let url = format!("http://127.0.0.1:{}/readyz", self.admin);
        eventually(&format!("{stage} is ready"), Duration::from_secs(120), async || {
            let has_ended = running.borrow_mut().child.try_wait().is_ok_and(|ended| ended.is_some());
            assert!(!has_ended, "no {stage}:\n{}", self.said());
            reqwest::get(&url).await.is_ok_and(|answer| answer.status() == 200)
        })
        .await;
        running.into_inner()
    }

    /// The end of what was printed.
    pub fn said(&self) -> String {
        let said = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = said.lines().rev().take(30).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

/// Killed when dropped.
pub struct Running {
    child: Child,
    admin: u16,
}

impl Running {
    /// Any process that can be measured.
    #[allow(dead_code, reason = "not every benchmark has one of its own")]
    pub fn of(child: Child) -> Self {
        Self { child, admin: 0 }
    }

    /// One that has metrics on this port.
    #[allow(dead_code, reason = "not every benchmark has one of its own")]
    pub fn telling_at(child: Child, admin: u16) -> Self {
        Self { child, admin }
    }

    fn proc(&self, file: &str) -> String {
        std::fs::read_to_string(Path::new("/proc").join(self.child.id().to_string()).join(file)).unwrap_or_default()
    }

    /// Seconds of CPU that it has used.
    pub fn cpu(&self) -> f64 {
        let stat = self.proc("stat");
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |index: usize| fields.get(index).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
        (ticks(11) + ticks(12)) / TICKS
    }

    /// The most memory that it has had, in MB.
    pub fn peak_memory(&self) -> u64 {
        let status = self.proc("status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
    }

    /// The sum of a metric's series.
    pub async fn metric(&self, name: &str) -> f64 {
        let url = format!("http://127.0.0.1:{}/metrics", self.admin);
        let page = match reqwest::get(&url).await {
            Ok(answer) => answer.text().await.unwrap_or_default(),
            Err(_) => String::new(),
        };
        let of_name = |line: &&str| line.starts_with(name) && line[name.len()..].starts_with([' ', '{']);
        page.lines().filter(of_name).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
