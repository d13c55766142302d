//! The simulation: the real driver and deliver runtime on the log in memory and a clock that stands still, one seed a run. The
//! seed decides traffic, how destinations behave, limits, batch sizes and faults. A failing run prints its seed and what was
//! wrong; `cargo test --test sim -- --seed N` repeats it exactly.
//!
//! ```text
//! cargo test --test sim                         200 seeds, every planted mistake from its recorded seed, named traces
//! cargo test --release --test sim -- --seeds N  N seeds, for nights
//! cargo test --test sim -- --hunt               finds each planted mistake's first seed anew
//! ```

#![allow(clippy::disallowed_methods, reason = "it measures how long it takes itself")]

mod plan;
mod run;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};

use laneway::runtime::planted::{Mistake, plant};

use plan::Plan;

/// Runs in CI.
const SEEDS: u64 = 200;
/// A planted mistake is to be found within so many.
const HUNT: u64 = 2_000;
/// Where each planted mistake is found first.
const FOUND: &[(Mistake, u64)] = &[
    (Mistake::SkipParked, 0),
    (Mistake::ForgetParkedInMark, 0),
    (Mistake::CommitPastMark, 0),
    (Mistake::FreeKeyTooEarly, 0),
    (Mistake::AttachTooEarly, 2),
    (Mistake::LoseTailAtAttach, 9),
    (Mistake::ScanPastLive, 9),
    (Mistake::ForgetFinishedAtDetach, 7),
    (Mistake::ForgetForgotten, 2),
    (Mistake::ForgetRunsAtRestore, 0),
    (Mistake::KeepMarks, 0),
    (Mistake::DissolveTooEarly, 7),
];

/// Panics inside the engine's tasks, which the runtime would swallow.
static PANICS: AtomicUsize = AtomicUsize::new(0);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1)?.parse::<u64>().ok()
    };
    std::panic::set_hook(Box::new(|info| {
        PANICS.fetch_add(1, Ordering::Relaxed);
        if std::env::var_os("SIM_SHOW_PANICS").is_some() {
            eprintln!("{info}\n{}", std::backtrace::Backtrace::force_capture());
        }
    }));
    let mut report = Report::default();
    if let Some(seed) = value("--seed") {
        let planted = arguments.iter().position(|argument| argument == "--planted");
        let name = planted.and_then(|at| arguments.get(at + 1));
        plant(Mistake::ALL.into_iter().find(|mistake| name.is_some_and(|name| *name == format!("{mistake:?}"))));
        report.seed(Plan::of(seed));
    } else if arguments.iter().any(|argument| argument == "--hunt") {
        hunt(&mut report);
    } else {
        for seed in 0..value("--seeds").unwrap_or(SEEDS) {
            report.seed(Plan::of(seed));
        }
        for (name, plan) in plan::traces() {
            report.trace(name, plan);
        }
        // Mistakes exist in debug builds only.
        if cfg!(debug_assertions) {
            for (mistake, seed) in FOUND {
                report.planted(*mistake, *seed);
            }
        }
    }
    report.end()
}

/// Runs a plan; what was wrong.
fn violations(plan: &Plan) -> Vec<String> {
    PANICS.store(0, Ordering::Relaxed);
    let found = catch_unwind(AssertUnwindSafe(|| run::run(plan)));
    let mut found = found.unwrap_or_else(|_| vec!["the simulation itself panicked".into()]);
    let panics = PANICS.load(Ordering::Relaxed);
    if panics > 0 && found.is_empty() {
        found.push(format!("{panics} panics in the engine (SIM_SHOW_PANICS=1 shows them)"));
    }
    found
}

#[derive(Default)]
struct Report {
    passed: usize,
    failed: usize,
}

impl Report {
    fn seed(&mut self, plan: Plan) {
        let found = violations(&plan);
        self.judge(&format!("seed {}", plan.seed), &found, Some(plan.seed));
    }

    fn trace(&mut self, name: &str, plan: Plan) {
        let found = violations(&plan);
        self.judge(name, &found, None);
    }

    fn planted(&mut self, mistake: Mistake, seed: u64) {
        plant(Some(mistake));
        let found = violations(&Plan::of(seed));
        plant(None);
        match found.is_empty() {
            true => self.judge(&format!("planted {mistake:?}"), &[format!("seed {seed} does not find it")], None),
            false => self.passed += 1,
        }
    }

    fn judge(&mut self, name: &str, found: &[String], seed: Option<u64>) {
        if found.is_empty() {
            self.passed += 1;
            return;
        }
        self.failed += 1;
        eprintln!("{name} failed:");
        found.iter().take(8).for_each(|violation| eprintln!("  {violation}"));
        if let Some(seed) = seed {
            eprintln!("  again: cargo test --test sim -- --seed {seed}");
        }
    }

    fn end(self) -> ExitCode {
        println!("{} passed, {} failed", self.passed, self.failed);
        if self.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// Finds each mistake's first seed.
fn hunt(report: &mut Report) {
    for mistake in Mistake::ALL {
        plant(Some(mistake));
        let found = (0..HUNT).find_map(|seed| {
            let found = violations(&Plan::of(seed));
            found.first().cloned().map(|first| (seed, first))
        });
        plant(None);
        match found {
            Some((seed, first)) => {
                report.passed += 1;
                println!("    (Mistake::{mistake:?}, {seed}), // {first}");
            }
            None => {
                report.failed += 1;
                println!("    // {mistake:?} is not found");
            }
        }
    }
}
