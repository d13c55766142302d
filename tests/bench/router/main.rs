//! Benchmarks of the router on a real Kafka, or with `LOG=pulsar` on a real Pulsar: `deliveries` is filled directly, the sink judges, figures are
//! lines of JSON.
//!
//! ```text
//! deploy/services up kafka
//! cargo bench --features pulsar --bench router -- throughput
//! cargo bench --features pulsar --bench router -- isolation dead 1000000     (or slow, flaky; deliveries that pile up; SECONDS=60 PAIRS=3)
//! cargo bench --features pulsar --bench router -- together 200 1000          (destinations; deliveries of each)
//! cargo bench --features pulsar --bench router -- hot
//! cargo bench --features pulsar --bench router -- failing-users              (SECONDS=600)
//! cargo bench --features pulsar --bench router -- restart 1000000
//! cargo bench --features pulsar --bench router -- flat
//! ```
//!
//! A time says little on a shared machine: compare what one run prints.

#![allow(clippy::disallowed_methods, reason = "it measures time")]

mod bed;
#[path = "../process.rs"]
mod process;
mod sink;
#[path = "../../waiting.rs"]
mod waiting;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use bed::{Bed, Place};
use sink::Manner;
use waiting::eventually;

/// Without anything arriving for so long a run has failed.
const PATIENCE: Duration = Duration::from_secs(180);
/// The router's own rules, for runs that do not wait for minutes.
const QUICK: &str = "[router]\nretry_cap = \"5s\"\n";

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let number =
        |index: usize, default: u64| arguments.get(index).and_then(|text| text.parse().ok()).unwrap_or(default);
    let clean = match arguments.first().map(String::as_str) {
        Some("throughput") => throughput(number(1, 200_000), 100_000).await,
        Some("isolation") => {
            let manner = match arguments.get(1).map(String::as_str) {
                Some("slow") => Manner::Well(Duration::from_secs(29)),
                Some("flaky") => Manner::Flaky(30),
                _ => Manner::Dead,
            };
            isolation(manner, number(2, 1_000_000)).await
        }
        Some("together") => together(number(1, 200) as u32, number(2, 1_000) as u32).await,
        Some("hot") => hot().await,
        Some("failing-users") => failing_users().await,
        Some("restart") => restart(number(1, 1_000_000)).await,
        Some("flat") => flat().await,
        _ => {
            eprintln!(
                "which? throughput, isolation, together, hot, failing-users, restart, flat (see tests/bench/router)"
            );
            return ExitCode::from(2);
        }
    };
    if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Prints a run's figures. True: nothing was lost, doubled or out of order.
fn report(bed: &Bed, what: &str, figures: &Value) -> bool {
    let seen = bed.sink.seen();
    let lost = bed.published - seen.delivered;
    let mut line = json!({"run": what, "published": bed.published, "lost": lost, "out_of_order": seen.out_of_order,
        "doubled": seen.doubled});
    if let (Some(line), Some(figures)) = (line.as_object_mut(), figures.as_object()) {
        line.extend(figures.clone());
    }
    println!("{line}");
    lost == 0 && seen.out_of_order == 0
}

fn p(bed: &Bed, quantile: f64) -> f64 {
    bed.sink.seen().latency.value_at_quantile(quantile) as f64 / 1_000.0
}

/// Many users, a sink that takes 50 ms: deliveries a second, and what one costs.
async fn throughput(deliveries: u64, users: u32) -> bool {
    let mut bed = Bed::new(4, Place::Usual, QUICK).await;
    bed.sink.set(0..4, Manner::Well(Duration::from_millis(50)));
    bed.fill((0..deliveries).map(|n| (n as u32 % 4, (n / 4) as u32 % users))).await;
    bed.start().await;
    let (began, cpu) = (Instant::now(), bed.cpu());
    let before = bed.sink.seen().delivered;
    bed.until(bed.published, PATIENCE).await;
    let (elapsed, cpu) = (began.elapsed().as_secs_f64(), bed.cpu() - cpu);
    let delivered = (bed.sink.seen().delivered - before) as f64;
    let figures = json!({"delivered_per_second": (delivered / elapsed).round(), "cpu_us_per_delivery": (cpu * 1e6 / delivered).round(),
        "delivered_per_second_of_cpu": (delivered / cpu).round(), "peak_mb": bed.peak_memory()});
    report(&bed, "throughput", &figures)
}

/// p99 of a destination that is well, alone and beside one that is not, in pairs; then that one comes back.
async fn isolation(manner: Manner, pending: u64) -> bool {
    let (seconds, pairs) = (setting("SECONDS", 60), setting("PAIRS", 3));
    let (mut clean, mut calm, mut beside) = (true, Vec::new(), Vec::new());
    for _ in 0..pairs {
        for (pending, manner, p99s) in
            [(0, Manner::Well(Duration::from_millis(20)), &mut calm), (pending, manner, &mut beside)]
        {
            let mut bed = Bed::new(2, Place::One, QUICK).await;
            bed.sink.set([0], Manner::Well(Duration::from_millis(20)));
            bed.sink.set([1], manner);
            bed.fill((0..pending).map(|n| (1, (n % 100_000) as u32))).await;
            bed.start().await;
            let live = |round: u64| {
                (0..4)
                    .flat_map(|n| [(0, (round * 4 + n) as u32 % 1_000), (1, (round * 4 + n) as u32 % 100_000)])
                    .collect()
            };
            // Until what has piled up is behind it, and the breaker has opened.
            bed.stream(50, Duration::from_secs(20), live).await;
            bed.sink.measure();
            bed.stream(50, Duration::from_secs(seconds), |round| live(round + 1_000)).await;
            let (p50, p99) = (p(&bed, 0.5), p(&bed, 0.99));
            p99s.push(p99);
            let peak = bed.peak_memory();
            bed.sink.set([1], Manner::Well(Duration::from_millis(1)));
            let (back, behind) = (Instant::now(), bed.published - bed.sink.seen().delivered);
            bed.until(bed.published, PATIENCE).await;
            let figures = json!({"pending": pending, "manner": format!("{manner:?}"), "p50_ms": p50, "p99_ms": p99, "peak_mb": peak,
                "peak_mb_after_catch_up": bed.peak_memory(), "behind": behind, "caught_up_after_s": back.elapsed().as_secs()});
            clean &= report(&bed, "isolation", &figures);
        }
    }
    let median = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let (calm, beside) = (median(&mut calm), median(&mut beside));
    println!(
        "{}",
        json!({"run": "isolation, medians", "calm_p99_ms": calm, "beside_p99_ms": beside, "ratio": beside / calm})
    );
    clean
}

/// Dead destinations in one partition come back at once: how much is read for that, and how fast it goes.
async fn together(destinations: u32, each: u32) -> bool {
    let mut bed = Bed::new(destinations as usize, Place::One, QUICK).await;
    bed.sink.set(0..destinations as usize, Manner::Dead);
    bed.fill((0..destinations * each).map(|n| (n % destinations, n / destinations % 100))).await;
    let bare = bed.bare_reader().await;
    bed.start().await;
    // Each is found to be down, and what does not fit into memory is left in the log.
    eventually("all count as down", PATIENCE, async || {
        bed.metric("laneway_router_breaker_open").await == f64::from(destinations)
    })
    .await;
    let before = bed.metric("laneway_router_scanned_bytes_total").await;
    bed.sink.set(0..destinations as usize, Manner::Well(Duration::from_millis(1)));
    let (back, cpu) = (Instant::now(), bed.cpu());
    bed.until(bed.published, PATIENCE).await;
    let elapsed = back.elapsed().as_secs_f64();
    let read = bed.metric("laneway_router_scanned_bytes_total").await;
    let backlog = bed.bytes as f64;
    let figures = json!({"destinations": destinations, "read_while_dead_share": before / backlog, "read_share": (read - before) / backlog,
        "caught_up_after_s": elapsed, "cpu_us_per_delivery": (bed.cpu() - cpu) * 1e6 / f64::from(destinations * each),
        "share_of_bare_reader": backlog / elapsed / bare, "peak_mb": bed.peak_memory()});
    report(&bed, "together", &figures)
}

/// Users with thousands of pending deliveries, a tenth of which fail once.
async fn hot() -> bool {
    let mut clean = true;
    for (name, users, each) in [("one user, 20,000", 1, 20_000), ("20 users, 5,000 each", 20, 5_000)] {
        let mut bed = Bed::new(1, Place::Usual, "[router]\nretry_first = \"10ms\"\nretry_cap = \"100ms\"\n").await;
        bed.sink.set([0], Manner::Once(10));
        bed.fill((0..users * each).map(|n| (0, n % users))).await;
        bed.start().await;
        let began = Instant::now();
        bed.until(bed.published, PATIENCE).await;
        let rate = f64::from(users * each) / began.elapsed().as_secs_f64();
        clean &= report(&bed, name, &json!({"delivered_per_second": rate.round(), "peak_mb": bed.peak_memory()}));
    }
    clean
}

/// One of a hundred users fails for long; the others are measured before and meanwhile.
async fn failing_users() -> bool {
    let seconds = Duration::from_secs(setting("SECONDS", 600));
    let mut bed = Bed::new(1, Place::Usual, "").await;
    let well = Manner::Well(Duration::from_millis(20));
    bed.sink.set([0], well);
    bed.start().await;
    let live = |round: u64| (0..10).map(|n| (0, ((round * 10 + n).wrapping_mul(7_919) % 100_000) as u32)).collect();
    bed.stream(50, Duration::from_secs(5), live).await;
    bed.sink.measure();
    bed.stream(50, seconds / 5, |round| live(round + 1_000)).await;
    let before = p(&bed, 0.99);
    bed.sink.set([0], Manner::FailingUsers(1));
    bed.sink.measure();
    bed.stream(50, seconds, |round| live(round + 1_000_000)).await;
    let meanwhile = p(&bed, 0.99);
    bed.sink.set([0], well);
    let (back, behind) = (Instant::now(), bed.published - bed.sink.seen().delivered);
    bed.until(bed.published, Duration::from_secs(400)).await;
    let figures = json!({"p99_ms_before": before, "p99_ms_meanwhile": meanwhile, "behind": behind,
        "caught_up_after_s": back.elapsed().as_secs(), "peak_mb": bed.peak_memory()});
    report(&bed, "failing-users", &figures)
}

/// The owner is killed with so many pending: how long until others' deliveries go on.
async fn restart(pending: u64) -> bool {
    let mut bed = Bed::new(2, Place::One, QUICK).await;
    bed.sink.set([0], Manner::Well(Duration::from_millis(1)));
    bed.sink.set([1], Manner::Dead);
    bed.fill((0..pending).map(|n| (1, (n % 100_000) as u32))).await;
    bed.start().await;
    let live = |round: u64| (0..4).map(|n| (0, (round * 4 + n) as u32 % 1_000)).collect();
    bed.stream(50, Duration::from_secs(setting("SECONDS", 20)), live).await;
    bed.kill();
    let before = bed.sink.seen().delivered;
    bed.fill(live(1)).await;
    let began = Instant::now();
    let ready = bed.start().await;
    // The other one delivers nothing.
    bed.until(before + 1, PATIENCE).await;
    let first = began.elapsed();
    bed.sink.set([1], Manner::Well(Duration::from_millis(1)));
    let back = Instant::now();
    bed.until(bed.published, PATIENCE).await;
    let figures = json!({"pending": pending, "ready_after_s": ready.as_secs_f64(), "first_delivery_after_s": first.as_secs_f64(),
        "caught_up_after_s": back.elapsed().as_secs(), "peak_mb": bed.peak_memory()});
    report(&bed, "restart", &figures)
}

/// What a delivery costs beside so many pending ones, and over so many destinations.
async fn flat() -> bool {
    let mut clean = true;
    let table = [(1_000, 1), (10_000, 1), (100_000, 1), (1_000_000, 1), (1_000, 100), (1_000, 10_000)];
    for (pending, destinations) in table {
        let mut bed = Bed::new(destinations as usize + 1, Place::One, QUICK).await;
        bed.sink.set([destinations as usize], Manner::Dead);
        bed.fill((0..pending).map(|n| (destinations, n % 100_000))).await;
        bed.start().await;
        let live = |round: u64| {
            (0..40)
                .map(|n| {
                    let number = round * 40 + n;
                    ((number % u64::from(destinations)) as u32, number as u32 % 10_000)
                })
                .collect()
        };
        bed.stream(25, Duration::from_secs(30), live).await;
        let (before, cpu) = (bed.sink.seen().delivered, bed.cpu());
        bed.stream(25, Duration::from_secs(20), |round| live(round + 100_000)).await;
        let (delivered, cpu) = ((bed.sink.seen().delivered - before) as f64, bed.cpu() - cpu);
        let peak = bed.peak_memory();
        bed.sink.set([destinations as usize], Manner::Well(Duration::from_millis(1)));
        bed.until(bed.published, PATIENCE).await;
        let figures = json!({"pending": pending, "destinations": destinations, "cpu_us_per_delivery": cpu * 1e6 / delivered, "peak_mb": peak});
        clean &= report(&bed, "flat", &figures);
    }
    clean
}
