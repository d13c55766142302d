//! The command line: one file for each command.

mod check;
mod config;
mod dev;
mod known;
mod lag;
mod lanes;
mod letters;
mod load;
mod metrics;
mod migrate;
mod offsets;
mod output;
mod publish;
mod run;
mod secrets;
mod stage;
mod tail;
mod topics;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use self::output::Output;
use crate::config::{Config, ConfigError, Layers};
use crate::control::file::FileError;
use crate::control::remote::RemoteError;
use crate::log::topic::TopicError;
use crate::log::{LogError, Misconfigured};
use crate::model::redrive::Shelf;

/// Customer events in over HTTP, ordered deliveries out: a streaming engine on Kafka, on Pulsar, or on one file.
#[derive(Parser)]
#[command(name = "laneway", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Everything in one process on the embedded log, with a sample workspace and an inbox to look into.
    Dev(dev::Dev),
    /// Run one stage, several (comma-separated), or `all`.
    Run(run::Run),
    /// Look for everything that would keep the engine from running, without changing anything. Exit code 3 where something would.
    Check(check::Check),
    /// Look at the flow's topics, compare them with what is declared, or create them.
    Topics(topics::TopicsCommand),
    /// Publish events (one JSON object a line: an event, or a batch) to the `events` topic, checked as the gateway does.
    Publish(publish::Publish),
    /// Follow a topic.
    Tail(tail::Tail),
    /// How far each stage is behind: what waits, since when, whether it becomes less, and when it will be done.
    Lag(lag::Lag),
    /// Where the stages stand in their topics; put them elsewhere.
    Offsets(offsets::Offsets),
    /// What each destination is doing; pause, resume, retry and drain.
    Lanes(lanes::Lanes),
    /// Deliveries that were given up: look at them, send them again.
    DeadLetters(letters::Letters),
    /// Events that could not be processed, and webhook requests that became none: look at them, send them again.
    ProcErrors(letters::Letters),
    /// Prepare the store of job status: create or change its tables.
    Migrate(migrate::Migrate),
    /// Send a realistic load to a gateway and, with --sink, be the destination and judge what arrives.
    Load(load::Load),
    /// The configuration: what is in force and from where; its schema.
    Config(config::ConfigCommand),
    /// Print the catalogue of metrics.
    Metrics(metrics::MetricsCommand),
}

/// How to find the configuration.
#[derive(Args, Clone, Debug, Default)]
pub struct ConfigArgs {
    /// TOML file; `deploy/laneway.toml` shows every key.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Set a key, over file and environment: --set log.backend=kafka. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// What commands take that look at the log.
#[derive(Args)]
pub struct Common {
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    config: ConfigArgs,
}

/// An error of the caller's: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(String);

/// A check found something: exit code 3.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Found(String);

impl ConfigArgs {
    fn load(&self, flags: &[(&str, String)], defaults: &[(&str, String)]) -> anyhow::Result<Config> {
        Ok(self.layers(flags, defaults)?.config()?)
    }

    fn layers(&self, flags: &[(&str, String)], defaults: &[(&str, String)]) -> anyhow::Result<Layers> {
        let mut all: Vec<(&str, String)> = Vec::new();
        for pair in &self.set {
            let (key, value) =
                pair.split_once('=').ok_or_else(|| Usage(format!("--set {pair}: expected KEY=VALUE")))?;
            all.push((key, value.to_owned()));
        }
        all.extend(flags.iter().cloned());
        // A variable that is not text is none of ours.
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        let environment = std::env::vars_os().filter_map(text);
        Ok(Layers::read(self.config.as_deref(), environment, &all, defaults)?)
    }
}

/// Parses the arguments, runs the command, and turns its end into an exit code: 0 done, 1 failed, 2 usage or
/// configuration, 3 a check found something.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => error.exit(),
        // Help and version.
        Err(text) => {
            output::raw(&text.render().to_string());
            return printed(ExitCode::SUCCESS);
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let ended = match runtime {
        Ok(runtime) => {
            let ended = runtime.block_on(dispatch(cli.command));
            // A call that a log does not answer must not keep the process.
            runtime.shutdown_timeout(Duration::from_secs(1));
            ended
        }
        Err(error) => Err(error.into()),
    };
    match ended {
        Ok(()) => printed(ExitCode::SUCCESS),
        Err(error) => {
            // Some libraries write several lines.
            let text = format!("{error:#}");
            let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
            output::note(&format!("laneway: {}", lines.join(", ")));
            let is_usage = error.chain().any(is_usage);
            let is_finding = error.is::<Found>();
            ExitCode::from(if is_usage {
                2
            } else if is_finding {
                3
            } else {
                1
            })
        }
    }
}

/// A command that could not print its answer has failed.
fn printed(code: ExitCode) -> ExitCode {
    let Some(error) = output::failed() else { return code };
    output::note(&format!("laneway: cannot write to standard output: {error}"));
    ExitCode::FAILURE
}

/// What the caller has to mend: arguments, or something that is configured.
fn is_usage(cause: &(dyn std::error::Error + 'static)) -> bool {
    let is_misconfigured =
        matches!(cause.downcast_ref(), Some(LogError::Fatal(inside)) if inside.is::<Misconfigured>());
    is_misconfigured
        || matches!(cause.downcast_ref(), Some(RemoteError::Address))
        || cause.is::<Usage>()
        || cause.is::<ConfigError>()
        || cause.is::<FileError>()
        || cause.is::<TopicError>()
}

async fn dispatch(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Dev(dev) => dev.run().await,
        Command::Run(run) => run.run().await,
        Command::Check(check) => check.run().await,
        Command::Topics(topics) => topics.run().await,
        Command::Publish(publish) => publish.run().await,
        Command::Tail(tail) => tail.run().await,
        Command::Lag(lag) => lag.run().await,
        Command::Offsets(offsets) => offsets.run().await,
        Command::Lanes(lanes) => lanes.run().await,
        Command::DeadLetters(letters) => letters.run(Shelf::DeadLetters).await,
        Command::ProcErrors(letters) => letters.run(Shelf::ProcErrors).await,
        Command::Migrate(migrate) => migrate.run().await,
        Command::Load(load) => load.run().await,
        Command::Config(config) => config.run(),
        Command::Metrics(metrics) => metrics.run(),
    }
}

/// Who gives a command, as far as the system tells.
fn operator() -> String {
    let who = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}@{}", who("USER").or_else(|| who("LOGNAME")).unwrap_or_else(|| "unknown".into()), host.trim())
}

/// Waits for SIGTERM or SIGINT. A second one ends the process at once.
async fn signalled() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = interrupt.recv() => {}
    }
    tokio::spawn(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = interrupt.recv() => {}
        }
        eprintln!("laneway: ended without draining");
        std::process::exit(1);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines of a document's shell examples.
    fn examples(document: &str) -> impl Iterator<Item = &str> {
        let mut is_shell = false;
        document.lines().filter_map(move |line| {
            if let Some(fence) = line.strip_prefix("```") {
                is_shell = fence == "sh";
                return None;
            }
            is_shell.then(|| line.split(" #").next().unwrap_or_default().trim())
        })
    }

    #[test]
    fn every_command_in_the_documentation_is_one() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let chapters = std::fs::read_dir(root.join("docs")).expect("docs").map(|entry| entry.expect("an entry").path());
        let (mut seen, summary) = (0, std::fs::read_to_string(root.join("docs/SUMMARY.md")).expect("a summary"));
        for path in
            chapters.chain([root.join("README.md")]).filter(|path| path.extension().is_some_and(|it| it == "md"))
        {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let is_listed = summary.contains(&format!("]({name})"));
            assert!(is_listed || ["SUMMARY.md", "README.md"].contains(&name.as_str()), "{name} is not in the summary");
            let text = std::fs::read_to_string(&path).expect("text");
            for line in examples(&text).filter(|line| line.starts_with("laneway ")) {
                if let Err(error) = Cli::try_parse_from(line.split_whitespace()) {
                    panic!("{name}: {line}: {error}");
                }
                seen += 1;
            }
        }
        assert!(seen > 20, "{seen}");
    }
}
