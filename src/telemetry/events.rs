//! Internal events: what happened, told once, as a log line and its metrics together.

use std::time::Duration;

use tracing::{debug, error, info, warn};

use crate::model::outcome::Reason;
use crate::model::record::{Offset, Partition, Topic};
use crate::telemetry::metrics::metrics;

/// Partitions came or went.
pub fn rebalanced(stage: &str, kind: &'static str, partitions: &[Partition]) {
    if partitions.is_empty() {
        // Every member hears of every rebalance, most of which are about others.
        return;
    }
    let numbers: Vec<u32> = partitions.iter().map(|partition| partition.0).collect();
    info!(stage, kind, partitions = ?numbers, "partitions changed hands");
    metrics().rebalances.with_label_values(&[stage, kind]).inc_by(partitions.len() as u64);
}

pub fn owned(stage: &str, partitions: usize) {
    metrics().partitions.with_label_values(&[stage]).set(partitions as i64);
}

pub fn committed(stage: &str, took: Duration) {
    metrics().commits.with_label_values(&[stage, "ok"]).inc();
    metrics().commit_seconds.with_label_values(&[stage]).observe(took.as_secs_f64());
}

pub fn commit_failed(stage: &str, error: &dyn std::fmt::Display) {
    warn!(stage, %error, "commit failed, it will be repeated");
    metrics().commits.with_label_values(&[stage, "failed"]).inc();
}

/// A session is opened, and why.
pub fn session(stage: &str, cause: &'static str) {
    debug!(stage, cause, "opening a session");
    metrics().sessions.with_label_values(&[stage, cause]).inc();
}

pub fn session_ended(stage: &str, error: &dyn std::fmt::Display) {
    warn!(stage, %error, "session ended, building a new one");
}

pub fn restored(stage: &str, partition: Partition, bytes: usize, held: usize, took: Duration) {
    debug!(stage, partition = partition.0, bytes, held, "partition restored");
    metrics().restored_bytes.with_label_values(&[stage]).inc_by(bytes as u64);
    metrics().restore_seconds.with_label_values(&[stage]).observe(took.as_secs_f64());
}

/// A partition that is not declared was assigned to this process: somebody has added it by hand.
pub fn undeclared_partition(stage: &str, partition: Partition) {
    error!(
        stage,
        partition = partition.0,
        "the input topic has more partitions than are declared: this one is not read, and what is written there waits"
    );
}

/// Progress does not fit the committed offset, so it is not used: somebody reset the offset or lost the topic.
pub fn progress_missing(stage: &str, partition: Partition) {
    error!(
        stage,
        partition = partition.0,
        "progress does not belong to the committed offset; reading on from there, repeats are possible"
    );
}

/// The log has deleted deliveries before they were read: they end as aborted, without a dead letter.
pub fn deliveries_deleted(partition: Partition, destination: &str, count: u64) {
    error!(
        partition = partition.0,
        destination, count, "the log deleted deliveries before they were delivered; they count as aborted (retention)"
    );
    metrics().router_outcomes.with_label_values(&[destination, "aborted"]).inc_by(count);
    metrics().router_aborted.with_label_values(&[destination, Reason::Retention.as_str()]).inc_by(count);
}

/// The input topic ends before what was read of it.
pub fn log_cut(
    stage: &str,
    partition: Partition,
    live: &dyn std::fmt::Display,
    end: &dyn std::fmt::Display,
    from: &dyn std::fmt::Display,
) {
    error!(
        stage,
        partition = partition.0,
        read_until = %live,
        %end,
        %from,
        "the log ends before what was read: it has lost records, or the topic was created anew; reading on from what is an hour \
         older than the last commit, repeats are possible"
    );
}

/// Behind the progress that the committed offset names lies some of a commit that does not count.
pub fn progress_behind(stage: &str, partition: Partition, records: usize) {
    warn!(stage, partition = partition.0, records, "progress of a commit that does not count is passed over");
}

/// A destination counts as down from now on, or as up again.
pub fn breaker(destination: &str, is_open: bool) {
    if is_open {
        warn!(destination, "the destination fails: its breaker opens, one probe at a time is sent");
    } else {
        info!(destination, "the destination answers again: its breaker closes");
    }
    metrics().breaker.with_label_values(&[destination]).set(i64::from(is_open));
}

/// A lane leaves live reading, or comes back to it.
pub fn lane_detached(partition: Partition, destination: &str, why: &'static str) {
    info!(partition = partition.0, destination, why, "lane detached: a cursor will bring its deliveries");
    metrics().lanes_detached.with_label_values(&[why]).inc();
}

pub fn lane_attached(partition: Partition, destination: &str) {
    info!(partition = partition.0, destination, "lane attached again");
}

/// Live reading stands still although there are records: the session is built anew.
pub fn stalled(stage: &str, partition: Partition, position: &dyn std::fmt::Display) {
    error!(stage, partition = partition.0, %position, "reading stands still before records that are there");
    metrics().stalled.with_label_values(&[stage]).inc();
}

/// A producer that gets nothing acknowledged any more makes room for a new one.
pub fn publisher_replaced(error: &dyn std::fmt::Display) {
    tracing::warn!(%error, "nothing is acknowledged any more, replacing the kafka publisher");
    metrics().publishers.with_label_values::<&str>(&[]).inc();
}

pub fn schema_lookup(what: &str, outcome: &str) {
    metrics().schema_lookups.with_label_values(&[what, outcome]).inc();
}

/// Offsets of a transaction that nobody decides any more; those before it are used.
pub fn hanging_transaction(topic: &str) {
    error!(topic, "a former owner's transaction is neither committed nor aborted; its offsets are passed over");
    metrics().hanging.with_label_values(&[topic]).inc();
}

/// A partition is not read any further, since a transaction that began at `stable` is not decided though its time is up.
pub fn undecided(topic: &Topic, partition: Partition, stable: &dyn std::fmt::Display) {
    error!(
        %topic,
        partition = partition.0,
        %stable,
        "reading stands before a transaction that should have been decided long ago; a process with the instance.id that \
         began it ends it when it starts (kafka-transactions.sh would abort it, and its records may be missing then)"
    );
    metrics().hanging.with_label_values(&[topic.as_str()]).inc();
}

/// A partition begins or ends waiting on purpose.
pub fn waiting(stage: &str, partition: Partition, reason: &'static str, begins: bool) {
    if begins {
        warn!(stage, partition = partition.0, reason, "partition waits: its bound is full");
    } else {
        info!(stage, partition = partition.0, reason, "partition goes on");
    }
    metrics().waiting.with_label_values(&[stage, reason]).add(if begins { 1 } else { -1 });
}

/// The oldest unfinished delivery of a partition, which the log may delete after `left`.
pub fn retention(partition: Partition, left: Duration, drain: Duration, alarm: bool) {
    let label = partition.0.to_string();
    metrics()
        .retention_left
        .with_label_values(&[label.as_str()])
        .set(i64::try_from(left.as_secs()).unwrap_or(i64::MAX));
    if alarm {
        error!(
            partition = partition.0,
            left_seconds = left.as_secs(),
            drains_in_seconds = drain.as_secs(),
            "deliveries may outlive what the log keeps; those that it is about to delete go to dead-letters"
        );
    }
}

/// Nothing of a partition is unfinished, or it is not ours any more.
pub fn retention_over(partition: Partition) {
    // Absent where it was never told.
    let _ = metrics().retention_left.remove_label_values(&[&partition.0.to_string()]);
}

/// The last owner of a partition ended without saying so while records were under way.
pub fn unclean_stop(stage: &str, partition: Partition, times: u32, alone: Option<Offset>) {
    let until = alone.map_or_else(String::new, |until| format!("; those below {until} run one by one"));
    warn!(stage, partition = partition.0, times, "records were under way when the last owner ended{until}");
    metrics().unclean_stops.with_label_values(&[stage]).inc();
}

pub fn poison(stage: &str, partition: Partition, offset: &dyn std::fmt::Display) {
    error!(stage, partition = partition.0, %offset, "a record ends the process; it goes to proc-errors");
}

pub fn panicked(stage: &str, partition: Partition, offset: &dyn std::fmt::Display) {
    error!(stage, partition = partition.0, %offset, "the stage panicked on a record; it goes to proc-errors");
}
