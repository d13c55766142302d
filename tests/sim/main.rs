//! The simulation: the real driver and runtimes on the log in memory and a clock that stands still, one seed a run. The seed
//! decides traffic, how destinations behave, limits, batch sizes and faults. A failing run prints its seed and what was wrong;
//! `cargo test --test sim -- --seed N` repeats it exactly: a run has a process of its own, in which nothing is random that the
//! seed does not decide ([`chance`]).
//!
//! ```text
//! cargo test --test sim                         200 seeds, every planted mistake from its recorded seed, named traces
//! cargo test --release --test sim -- --seeds N  N seeds, for nights [--from FIRST]
//! cargo test --test sim -- --seed N             one seed [--planted MISTAKE] [--show]
//! cargo test --test sim -- --trace N            one named trace
//! cargo test --test sim -- --hunt               finds each planted mistake's first seed anew [--planted MISTAKE]
//! ```

#![allow(clippy::disallowed_methods, reason = "it measures how long it takes itself")]

mod chance;
mod gate;
mod plan;
mod run;
mod world;

use std::io::{self, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use laneway::runtime::planted::{Mistake, check_invariants, plant};

use plan::Plan;

/// Runs in CI.
const SEEDS: u64 = 200;
/// A planted mistake is to be found within so many.
const HUNT: u64 = 2_000;
/// So many of the seeds run twice, and have to do the same twice.
const TWICE: u64 = 10;
/// A run that takes longer spins: all of its waiting is on a clock that nobody waits for.
const SPINNING: Duration = Duration::from_secs(60);
/// Where each planted mistake is found first.
const FOUND: &[(Mistake, u64)] = &[
    (Mistake::SkipParked, 0),
    (Mistake::ForgetParkedInMark, 0),
    (Mistake::CommitPastMark, 1),
    (Mistake::FreeKeyTooEarly, 0),
    (Mistake::AttachTooEarly, 0),
    (Mistake::LoseTailAtAttach, 48),
    (Mistake::ScanPastLive, 67),
    (Mistake::ForgetFinishedAtDetach, 2),
    (Mistake::ForgetForgotten, 0),
    (Mistake::ForgetRunsAtRestore, 3),
    (Mistake::KeepMarks, 0),
    (Mistake::DissolveTooEarly, 0),
    (Mistake::SpendWhileOpen, 0),
    (Mistake::RestoreLaneBehindRuns, 0),
    (Mistake::ForgetLedger, 0),
    (Mistake::ForgetEpoch, 37),
    (Mistake::DropAfterFailedCommit, 14),
    (Mistake::CountRepeats, 2),
];

/// Panics inside the engine's tasks, which the runtime would swallow.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// What a process of its own runs.
#[derive(Clone, Copy)]
enum What {
    Seed(u64),
    Trace(usize),
}

/// One run, and what is to come of it.
struct Job {
    what: What,
    mistake: Option<Mistake>,
    twice: bool,
}

/// What came of a run in its process.
struct Came {
    /// Empty where all properties hold.
    violations: Vec<String>,
    digest: String,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let text = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1).cloned()
    };
    let value = |name: &str| text(name).and_then(|text| text.parse::<u64>().ok());
    let named = text("--planted").map(|name| Mistake::ALL.into_iter().find(|mistake| name == format!("{mistake:?}")));
    if named == Some(None) {
        eprintln!("--planted: one of {:?}", Mistake::ALL);
        return ExitCode::from(2);
    }
    let named = named.flatten();
    let shown = arguments.iter().any(|argument| argument == "--show");
    if let Some(seed) = value("--seed") {
        return execute(&Plan::of(seed), named, shown);
    }
    if let Some(number) = value("--trace") {
        let mut traces = plan::traces();
        return execute(&traces.swap_remove(number as usize % traces.len()).1, named, shown);
    }
    if arguments.iter().any(|argument| argument == "--hunt") {
        let mistakes = named.map_or(Mistake::ALL.to_vec(), |mistake| vec![mistake]);
        return all(&mistakes, |mistake| hunt(*mistake));
    }
    all(&jobs(value("--from").unwrap_or(0), value("--seeds")), Job::judge)
}

/// The seeds; without a number of them the traces and the planted mistakes too.
fn jobs(from: u64, seeds: Option<u64>) -> Vec<Job> {
    let mut jobs: Vec<Job> = (from..from + seeds.unwrap_or(SEEDS)).map(Job::seed).collect();
    if seeds.is_some() {
        return jobs;
    }
    jobs.extend((0..plan::traces().len()).map(|it| Job { what: What::Trace(it), mistake: None, twice: false }));
    // Mistakes exist in debug builds only.
    if cfg!(debug_assertions) {
        let planted = |(mistake, seed): &(Mistake, u64)| Job { mistake: Some(*mistake), ..Job::seed(*seed) };
        jobs.extend(FOUND.iter().map(planted));
        let looks_back = plan::traces().iter().position(|(name, _)| *name == plan::LOOKS_BACK).expect("a trace");
        let mistake = Some(Mistake::ForgetLookBack);
        jobs.push(Job { what: What::Trace(looks_back), mistake, twice: false });
    }
    jobs
}

/// Runs a plan in this process and prints what was wrong, then what stands for all that happened.
fn execute(plan: &Plan, mistake: Option<Mistake>, show: bool) -> ExitCode {
    chance::fix();
    if show {
        eprintln!("{plan:#?}");
        tracing_subscriber::fmt().without_time().with_max_level(tracing::Level::DEBUG).with_writer(io::stderr).init();
    }
    plant(mistake);
    check_invariants(true);
    std::panic::set_hook(Box::new(|info| {
        PANICS.lock().unwrap_or_else(PoisonError::into_inner).push(info.to_string());
        if std::env::var_os("SIM_SHOW_PANICS").is_some() {
            eprintln!("{info}\n{}", std::backtrace::Backtrace::force_capture());
        }
    }));
    let Ok(mut run) = catch_unwind(AssertUnwindSafe(|| run::run(plan))) else {
        println!("the simulation itself panicked (SIM_SHOW_PANICS=1 shows it)");
        return ExitCode::FAILURE;
    };
    let panics = std::mem::take(&mut *PANICS.lock().unwrap_or_else(PoisonError::into_inner));
    if let Some(first) = panics.first() {
        let text = format!("{} panics in the engine (SIM_SHOW_PANICS=1 shows them), the first: {first}", panics.len());
        run.violations.insert(0, text);
    }
    run.violations.iter().take(8).for_each(|violation| println!("{violation}"));
    println!("digest {:016x}", run.digest);
    if run.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

impl What {
    fn arguments(self) -> [String; 2] {
        match self {
            What::Seed(seed) => ["--seed".into(), seed.to_string()],
            What::Trace(number) => ["--trace".into(), number.to_string()],
        }
    }

    /// Runs it in a process of its own.
    fn run(self, mistake: Option<Mistake>) -> io::Result<Came> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(self.arguments()).stdout(Stdio::piped());
        if let Some(mistake) = mistake {
            command.args(["--planted", &format!("{mistake:?}")]);
        }
        let (mut child, since) = (command.spawn()?, Instant::now());
        let mut stdout = child.stdout.take().expect("a pipe");
        let (whole, is_whole) = std::sync::mpsc::channel();
        // Its output ends when it does.
        let reading = thread::spawn(move || {
            let mut printed = Vec::new();
            let read = stdout.read_to_end(&mut printed).map(|_| printed);
            // Whoever waits may have given up and waits for this thread now.
            let _ = whole.send(());
            read
        });
        if is_whole.recv_timeout(SPINNING).is_err() {
            child.kill()?;
        }
        let printed = reading.join().expect("it does not panic")?;
        let status = child.wait()?;
        let printed = String::from_utf8_lossy(&printed).into_owned();
        let mut violations: Vec<String> = printed.lines().map(str::to_owned).collect();
        let digest = violations.pop_if(|line| line.starts_with("digest ")).unwrap_or_default();
        if !status.success() && violations.is_empty() {
            violations.push(format!("it ended with {status} after {:?}", since.elapsed()));
        }
        Ok(Came { violations, digest })
    }
}

impl Job {
    fn seed(seed: u64) -> Self {
        Self { what: What::Seed(seed), mistake: None, twice: seed < TWICE }
    }

    fn name(&self) -> String {
        let what = match self.what {
            What::Seed(seed) => format!("seed {seed}"),
            What::Trace(number) => format!("trace {number}, {}", plan::traces()[number].0),
        };
        self.mistake.map_or(what.clone(), |mistake| format!("{what} with {mistake:?} planted"))
    }

    /// What is wrong with the engine; with a planted mistake: that nothing is.
    fn judge(&self) -> Result<(), String> {
        let failed = |why: &str| {
            let again = self.what.arguments().join(" ");
            format!("{} failed:\n  {why}\n  again: cargo test --test sim -- {again}", self.name())
        };
        let came = self.what.run(self.mistake).map_err(|error| failed(&error.to_string()))?;
        if self.mistake.is_some() {
            return if came.violations.is_empty() { Err(failed("nothing was found")) } else { Ok(()) };
        }
        if !came.violations.is_empty() {
            return Err(failed(&came.violations.join("\n  ")));
        }
        if self.twice {
            let second = self.what.run(None).map_err(|error| failed(&error.to_string()))?;
            if second.digest != came.digest {
                return Err(failed("a second run of it did something else"));
            }
        }
        Ok(())
    }
}

/// Works everything off, one thread a core; prints what failed.
fn all<T: Sync>(work: &[T], each: impl Fn(&T) -> Result<(), String> + Sync) -> ExitCode {
    let (next, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let worker = || {
        while let Some(item) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(message) = each(item) {
                failed.fetch_add(1, Ordering::Relaxed);
                eprintln!("{message}");
            }
        }
    };
    let cores = thread::available_parallelism().map_or(2, usize::from);
    thread::scope(|scope| (0..cores).for_each(|_| drop(scope.spawn(worker))));
    let failed = failed.into_inner();
    println!("{} passed, {failed} failed", work.len() - failed);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Finds a mistake's first seed.
fn hunt(mistake: Mistake) -> Result<(), String> {
    for seed in 0..HUNT {
        let came = What::Seed(seed).run(Some(mistake)).map_err(|error| error.to_string())?;
        if let Some(first) = came.violations.first() {
            println!("    (Mistake::{mistake:?}, {seed}), // {first}");
            return Ok(());
        }
    }
    Err(format!("{mistake:?} is not found within {HUNT} seeds"))
}
