//! Laneway's processes, as users start them: the binary, its arguments, its environment.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use laneway::log::pulsar::PulsarConfig;
use serde_json::{Value, json};

use super::{holds_within, kafka_address, pulsar_config, unique};

/// A loopback port that is free now, with the next one. Below the range that outgoing connections take theirs from, so that it
/// is still free when a process that was killed starts again.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 20_000 + (std::process::id() % 500) as u16 * 20;
    loop {
        let port = first + NEXT.fetch_add(2, Ordering::Relaxed) % 2_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() && TcpListener::bind(("127.0.0.1", port + 1)).is_ok() {
            return port;
        }
    }
}

/// `deploy/services WHAT NAME` for services of a test's own: on its ports, in its folder.
pub fn services(what: &str, name: &str, ports: &[(&str, String)], folder: &Path) {
    let ran = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/services"))
        .args([what, name])
        .envs(ports.iter().map(|(variable, port)| (variable, port)))
        .env("LANEWAY_SERVICES_RUN", folder)
        .output()
        .expect("deploy/services runs");
    assert!(ran.status.success(), "{what} {name}: {}", String::from_utf8_lossy(&ran.stderr));
}

/// A running process; killed when dropped.
pub struct Process {
    child: Child,
    pub admin: u16,
    output: PathBuf,
}

impl Process {
    pub fn spawn(args: &[&str], environment: &[(String, String)], admin: u16, folder: &Path) -> Self {
        let output = folder.join(unique("log"));
        let file = std::fs::File::create(&output).expect("a log file");
        let child = Command::new(env!("CARGO_BIN_EXE_laneway"))
            .args(args)
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a second handle"))
            .stderr(file)
            .spawn()
            .expect("laneway starts");
        Self { child, admin, output }
    }

    pub async fn ready(&mut self) {
        let url = format!("http://127.0.0.1:{}/readyz", self.admin);
        let until = Instant::now() + Duration::from_secs(120);
        let mut ended = None;
        while Instant::now() < until && ended.is_none() {
            let ready = async || reqwest::get(&url).await.is_ok_and(|answer| answer.status() == 200);
            // Looked at in between: a process that has ended never becomes ready.
            if holds_within(Duration::from_millis(200), ready).await {
                return;
            }
            ended = self.child.try_wait().expect("a child");
        }
        match ended {
            Some(ended) => panic!("ended with {ended} before it was ready:\n{}", self.said()),
            None => panic!("not ready:\n{}", self.said()),
        }
    }

    /// Waits until it has begun, ready or not.
    pub async fn lives(&self) {
        let url = format!("http://127.0.0.1:{}/livez", self.admin);
        let lives = async || reqwest::get(&url).await.is_ok();
        assert!(holds_within(Duration::from_secs(60), lives).await, "it does not begin:\n{}", self.said());
    }

    /// Waits until this gateway has taken so many more events: the load is under way.
    pub async fn takes(&self, events: f64) {
        let taken = async || self.metric("laneway_gateway_events_total").await.unwrap_or(0.0);
        let goal = taken().await + events;
        let is_taken = holds_within(Duration::from_secs(60), async || taken().await >= goal).await;
        assert!(is_taken, "the gateway takes nothing:\n{}", self.said());
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_some()
    }

    /// What it has printed so far.
    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.output).unwrap_or_default()
    }

    pub fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("reaped");
    }

    /// SIGTERM, as a supervisor of services sends it.
    pub fn terminate(&self) {
        self.signal(libc::SIGTERM);
    }

    /// It stands still, as in a machine that is suspended, until [`Process::thaw`].
    pub fn freeze(&self) {
        self.signal(libc::SIGSTOP);
    }

    pub fn thaw(&self) {
        self.signal(libc::SIGCONT);
    }

    fn signal(&self, signal: i32) {
        let pid = i32::try_from(self.child.id()).expect("a pid");
        // SAFETY: the pid is that of a child that has not been reaped.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// The sum of a metric's series; none where the process does not answer.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        self.metric_with(name, "").await
    }

    /// The sum of those whose labels say this.
    pub async fn metric_with(&self, name: &str, label: &str) -> Option<f64> {
        let answer = reqwest::get(format!("http://127.0.0.1:{}/metrics", self.admin)).await.ok()?;
        let page = answer.text().await.ok()?;
        let of_name =
            |line: &&str| line.starts_with(name) && line[name.len()..].starts_with([' ', '{']) && line.contains(label);
        Some(page.lines().filter(of_name).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }

    pub async fn ended(&mut self, deadline: Duration) -> ExitStatus {
        let mut status = None;
        let mut look = || {
            status = self.child.try_wait().expect("a child");
            std::future::ready(status.is_some())
        };
        holds_within(deadline, &mut look).await;
        status.unwrap_or_else(|| panic!("still running after {deadline:?}:\n{}", self.said()))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let said = self.said();
            let tail: Vec<&str> = said.lines().rev().take(40).collect();
            eprintln!("--- {} said last:", self.output.display());
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
}

/// A flow of its own: a folder, a workspace whose webhook is a sink, ports, and the log it runs on.
pub struct Flow {
    pub folder: tempfile::TempDir,
    pub gateway: u16,
    pub sink: u16,
    environment: Vec<(String, String)>,
    is_cluster: bool,
}

impl Flow {
    fn new(is_cluster: bool) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let (gateway, sink) = (free_port(), free_port());
        let workspace = workspace(&[("dst-1", &format!("http://127.0.0.1:{sink}/"))]);
        std::fs::write(folder.path().join("workspace.json"), workspace).expect("written");
        let environment =
            [("LANEWAY_GATEWAY__LISTEN", format!("127.0.0.1:{gateway}")), ("LANEWAY_ROUTER__RETRY_CAP", "2s".into())];
        let environment = environment.map(|(name, value)| (name.to_owned(), value)).to_vec();
        Self { folder, gateway, sink, environment, is_cluster }
    }

    pub fn embedded() -> Self {
        Self::new(false)
    }

    /// On the test Kafka, with topics of its own.
    pub fn on_kafka() -> Self {
        Self::on_kafka_at(&kafka_address())
    }

    pub fn on_kafka_at(address: &str) -> Self {
        Self::on_kafka_with(address, None)
    }

    /// Without its topics, and with more settings.
    pub fn unapplied(address: &str, settings: &[(&str, &str)]) -> Self {
        let mut flow = Self::new(true);
        for (name, value) in [
            ("LANEWAY_LOG__BACKEND", "kafka"),
            ("LANEWAY_LOG__KAFKA__BOOTSTRAP_SERVERS", address),
            ("LANEWAY_LOG__TOPIC_PREFIX", &(unique("f") + ".")),
            ("LANEWAY_RUNTIME__SESSION_TIMEOUT", "6s"),
        ] {
            flow.set(name, value);
        }
        settings.iter().for_each(|(name, value)| flow.set(name, value));
        flow
    }

    /// On the test Pulsar, with topics of its own.
    pub fn on_pulsar() -> Self {
        Self::on_pulsar_at(&pulsar_config())
    }

    pub fn on_pulsar_at(pulsar: &PulsarConfig) -> Self {
        Self::on_pulsar_with(pulsar, None)
    }

    pub fn on_pulsar_with(pulsar: &PulsarConfig, partitions: Option<u32>) -> Self {
        let mut flow = Self::unapplied_on_pulsar(pulsar);
        flow.repartition(partitions);
        flow.apply();
        flow
    }

    /// Without its topics.
    pub fn unapplied_on_pulsar(pulsar: &PulsarConfig) -> Self {
        let settings = [
            ("LANEWAY_LOG__BACKEND", "pulsar"),
            ("LANEWAY_LOG__PULSAR__SERVICE_URL", &pulsar.service_url),
            ("LANEWAY_LOG__PULSAR__ADMIN_URL", &pulsar.admin_url),
            ("LANEWAY_LOG__PULSAR__TOKEN", &pulsar.token),
            ("LANEWAY_LOG__PULSAR__CA_FILE", &pulsar.ca_file.display().to_string()),
            ("LANEWAY_LOG__PULSAR__OAUTH2__ISSUER_URL", &pulsar.oauth2.issuer_url),
            ("LANEWAY_LOG__PULSAR__OAUTH2__CREDENTIALS", &pulsar.oauth2.credentials),
        ];
        Self::unapplied("", &settings)
    }

    pub fn apply(&self) {
        let applied = self.command(&["topics", "apply"]);
        assert!(applied.status.success(), "{}", String::from_utf8_lossy(&applied.stderr));
    }

    /// With so many partitions instead of the declared ones, for `deliveries` and what goes with it.
    pub fn on_kafka_with(address: &str, partitions: Option<u32>) -> Self {
        let mut flow = Self::unapplied(address, &[]);
        flow.repartition(partitions);
        flow.apply();
        flow
    }

    fn repartition(&mut self, partitions: Option<u32>) {
        let Some(partitions) = partitions else { return };
        let declared = Path::new(env!("CARGO_MANIFEST_DIR")).join("topics");
        for name in ["deliveries.yaml", "progress.yaml"] {
            let text = std::fs::read_to_string(declared.join(name)).expect("a declaration");
            let changed = text.replace("partitions: 12", &format!("partitions: {partitions}"));
            assert_ne!(text, changed, "{name} declares 12 partitions");
            std::fs::write(self.folder.path().join(name), changed).expect("written");
        }
        self.set("LANEWAY_TOPICS__DIR", ".");
    }

    pub fn set(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// What was set last.
    pub fn setting(&self, name: &str) -> &str {
        self.environment.iter().rfind(|(set, _)| set == name).map_or("", |(_, value)| value)
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.gateway)
    }

    /// A command, to be run.
    pub fn prepared(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_laneway"));
        let environment = self.environment.iter().map(|(name, value)| (name, value));
        command.args(args).envs(environment).current_dir(self.folder.path()).stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    pub fn command(&self, args: &[&str]) -> std::process::Output {
        self.prepared(args).output().expect("laneway runs")
    }

    /// Starts a command.
    pub fn begin(&self, args: &[&str]) -> Process {
        Process::spawn(args, &self.environment, 0, self.folder.path())
    }

    /// Starts stages under an instance id.
    pub fn start(&self, stages: &str, instance: &str) -> Process {
        let admin = free_port();
        let mut environment = self.environment.clone();
        environment.push(("LANEWAY_ADMIN__LISTEN".into(), format!("127.0.0.1:{admin}")));
        environment.push(("LANEWAY_INSTANCE__ID".into(), instance.to_owned()));
        Process::spawn(&["run", stages], &environment, admin, self.folder.path())
    }

    /// Starts the whole flow: one process on the embedded log, three on a cluster.
    pub async fn start_all(&self) -> Vec<Process> {
        let parts = if self.is_cluster { vec!["gateway", "processor", "router"] } else { vec!["all"] };
        let mut processes: Vec<Process> =
            parts.into_iter().map(|part| self.start(part, &format!("{part}-1"))).collect();
        for process in &mut processes {
            process.ready().await;
        }
        processes
    }

    /// `laneway load` as generator, destination and judge.
    pub fn load(&self, args: &[&str]) -> Load {
        let (to, sink) = (self.url(), format!("127.0.0.1:{}", self.sink));
        let mut all = vec!["load", "--to", &to, "--write-key", "wk-1", "--sink", &sink, "--output", "json"];
        all.extend(args);
        let output = self.folder.path().join(unique("report"));
        let child = tokio::process::Command::new(env!("CARGO_BIN_EXE_laneway"))
            .args(all)
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(&output).expect("a file"))
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("load starts");
        Load { child, output }
    }
}

/// A figure of a load's report.
pub fn number(report: &Value, name: &str) -> u64 {
    report[name].as_u64().unwrap_or_else(|| panic!("{name} in {report}"))
}

/// A running load; killed when dropped.
pub struct Load {
    child: tokio::process::Child,
    output: PathBuf,
}

impl Load {
    pub async fn report(self) -> Value {
        self.report_within(Duration::from_secs(240)).await
    }

    pub async fn report_within(mut self, deadline: Duration) -> Value {
        assert!(self.ends_within(deadline).await, "the load does not end");
        let text = std::fs::read_to_string(&self.output).expect("a report");
        let report: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("no report: {text}"));
        eprintln!("{report}");
        report
    }

    /// Waits for its end, at most so long: how long a fault lasts that happens to a flow under load. True: it has ended.
    pub async fn ends_within(&mut self, at_most: Duration) -> bool {
        tokio::time::timeout(at_most, self.child.wait()).await.is_ok()
    }
}

/// A workspace of one source (`wk-1`) with these webhooks.
pub fn workspace(destinations: &[(&str, &str)]) -> String {
    let webhook = |(id, url): &(&str, &str)| {
        json!({
            "id": id, "name": id, "enabled": true,
            "config": {"webhookUrl": url, "webhookMethod": "POST"},
            "destinationDefinition": {"name": "WEBHOOK", "displayName": "Webhook", "config": {}}
        })
    };
    let destinations: Vec<Value> = destinations.iter().map(webhook).collect();
    let disabled = json!({"id": "src-2", "name": "Off", "writeKey": "wk-off", "enabled": false, "destinations": []});
    let source =
        json!({"id": "src-1", "name": "Web", "writeKey": "wk-1", "enabled": true, "destinations": destinations});
    json!({"workspaceId": "ws-1", "sources": [source, disabled]}).to_string()
}
