//! Every metric of the engine: name, kind, meaning, labels. The catalogue in the documentation is printed from here
//! (`laneway metrics`), and a test compares it with what is served. Labels never hold user or message ids.

use std::sync::LazyLock;

use prometheus::{
    Encoder, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder, exponential_buckets,
};

/// One row of the catalogue.
#[derive(Clone, Copy, Debug)]
pub struct Described {
    pub name: &'static str,
    pub kind: &'static str,
    pub labels: &'static [&'static str],
    pub meaning: &'static str,
}

macro_rules! catalogue {
    ($($field:ident: $kind:ident $name:literal [$($label:literal),*] $meaning:literal;)*) => {
        /// The metrics, by field.
        pub struct Metrics {
            registry: Registry,
            $(#[doc = $meaning] pub $field: $kind,)*
        }

        /// The catalogue, in its order.
        pub const CATALOGUE: &[Described] = &[$(Described {
            name: $name,
            kind: stringify!($kind),
            labels: &[$($label),*],
            meaning: $meaning,
        }),*];

        impl Metrics {
            fn new() -> Self {
                let registry = Registry::new();
                $(let $field = <$kind as Registered>::register(&registry, $name, $meaning, &[$($label),*]);)*
                Self { registry, $($field),* }
            }
        }
    };
}

catalogue! {
    gateway_requests: IntCounterVec "laneway_gateway_requests_total" ["code"] "Requests answered, by status code.";
    gateway_events: IntCounterVec "laneway_gateway_events_total" ["source"] "Events that the log has taken.";
    gateway_seconds: HistogramVec "laneway_gateway_request_seconds" [] "Time to answer a request to an ingest endpoint, in seconds.";
    gateway_open: IntGaugeVec "laneway_gateway_open_requests" [] "Requests that are being answered.";
    gateway_suppressed: IntCounterVec "laneway_gateway_suppressed_events_total" ["source"] "Events of suppressed users, which are not taken.";
    gateway_webhook_failures: IntCounterVec "laneway_gateway_webhook_failures_total" ["source", "reason"] "Webhook requests that became nothing and were kept in proc-errors.";
    processor_events: IntCounterVec "laneway_processor_events_total" ["outcome"] "Events processed: produced, filtered or failed.";
    processor_reasons: IntCounterVec "laneway_processor_reasons_total" ["outcome", "reason"] "Why events were filtered or failed.";
    processor_deliveries: IntCounterVec "laneway_processor_deliveries_total" ["destination"] "Deliveries made ready.";
    forgotten: IntCounterVec "laneway_processor_forgotten_events_total" [] "Events that would not be known if they came again within processor.dedup_window: processor.dedup_memory is too small.";
    live_events: IntCounterVec "laneway_live_events_total" ["result"] "Events of watched sources: uploaded, dropped (too many at a time) or failed.";
    reporter_unreadable: IntCounterVec "laneway_reporter_unreadable_records_total" [] "Records of job status that say nothing that can be counted.";
    router_outcomes: IntCounterVec "laneway_router_outcomes_total" ["destination", "outcome"] "Final outcomes: delivered, filtered, aborted, drained; repeated: what the log had twice, sent once.";
    router_aborted: IntCounterVec "laneway_router_aborted_total" ["destination", "reason"] "Deliveries given up, by reason.";
    router_attempts: IntCounterVec "laneway_router_attempts_total" ["destination", "code"] "Requests sent, by status code (0: no answer).";
    router_resends: IntCounterVec "laneway_router_resends_total" [] "Requests sent again at once on a new connection, because an open connection broke before an answer began or the destination refused an HTTP/2 stream. They count neither as attempts nor for the breaker.";
    router_attempt_seconds: HistogramVec "laneway_router_attempt_seconds" [] "Time of one request to a destination, in seconds.";
    router_latency_seconds: HistogramVec "laneway_router_latency_seconds" [] "Time from receiving an event to having delivered it, in seconds.";
    router_in_flight: IntGaugeVec "laneway_router_in_flight_requests" [] "Requests to destinations that are under way.";
    lane_pending: IntGaugeVec "laneway_router_pending_deliveries" ["partition"] "Deliveries taken and not final.";
    lane_held: IntGaugeVec "laneway_router_held_keys" ["partition"] "Users whose next delivery waits for a retry, by partition.";
    lane_bytes: IntGaugeVec "laneway_router_window_bytes" ["partition"] "Deliveries kept in memory, in bytes.";
    lane_detached: IntGaugeVec "laneway_router_detached_lanes" ["partition"] "Lanes that a cursor feeds instead of live reading.";
    lanes_detached: IntCounterVec "laneway_router_lanes_detached_total" ["reason"] "Lanes detached: bytes, holes, window or down.";
    parked: IntGaugeVec "laneway_router_parked_keys" ["partition"] "Users part of whose deliveries is only marked, to be read again.";
    cursors: IntGaugeVec "laneway_router_cursors" ["partition"] "Cursors that read deliveries again for detached lanes and parked users.";
    scanned_bytes: IntCounterVec "laneway_router_scanned_bytes_total" [] "Deliveries read again, by cursors and directly, in bytes.";
    fetched: IntCounterVec "laneway_router_fetched_deliveries_total" [] "Deliveries read one by one at their offsets.";
    breaker: IntGaugeVec "laneway_router_breaker_open" ["destination"] "1 while the destination counts as down.";
    retention_left: IntGaugeVec "laneway_router_retention_left_seconds" ["partition"] "Time until the log may delete the oldest unfinished delivery, in seconds.";
    paused: IntGaugeVec "laneway_router_paused" ["destination"] "1 while an operator's pause is in force.";
    commits: IntCounterVec "laneway_runtime_commits_total" ["stage", "result"] "Commits: ok, or failed and repeated.";
    commit_seconds: HistogramVec "laneway_runtime_commit_seconds" ["stage"] "Time of one commit, in seconds.";
    partitions: IntGaugeVec "laneway_runtime_partitions" ["stage"] "Partitions that this process owns.";
    rebalances: IntCounterVec "laneway_runtime_rebalances_total" ["stage", "kind"] "Partitions assigned, revoked and lost.";
    waiting: IntGaugeVec "laneway_runtime_waiting_partitions" ["stage", "reason"] "Partitions that take nothing on purpose, since memory is full.";
    restored_bytes: IntCounterVec "laneway_runtime_restored_bytes_total" ["stage"] "Progress read to restore partitions, in bytes.";
    restore_seconds: HistogramVec "laneway_runtime_restore_seconds" ["stage"] "Time to restore a partition, in seconds.";
    sessions: IntCounterVec "laneway_runtime_sessions_total" ["stage", "cause"] "Sessions opened: start, transient, broken or fenced.";
    stalled: IntCounterVec "laneway_runtime_stalled_total" ["stage"] "Sessions built anew because reading stood still before records that were there.";
    hanging: IntCounterVec "laneway_runtime_hanging_transactions_total" ["topic"] "Transactions found that the broker left undecided and that no instance here can end: offsets that were passed over, records that readers stand before.";
    log_damaged: IntCounterVec "laneway_log_damaged_batches_total" ["topic"] "Times that a batch of the embedded log could not be decoded and was passed over.";
    log_free_bytes: IntGaugeVec "laneway_log_free_bytes" ["where"] "Bytes that are free for the embedded log: on its disk, and in its file.";
    unclean_stops: IntCounterVec "laneway_runtime_unclean_stops_total" ["stage"] "Partitions whose last owner ended while records were under way.";
    schema_lookups: IntCounterVec "laneway_schema_registry_lookups_total" ["what", "outcome"] "Questions to the schema registry: of an id or a subject; ok, refused or failed.";
    projected_held: IntGaugeVec "laneway_runtime_held_partitions" ["stage"] "Partitions of which nothing is written into the store: their stored position belongs to another log, or lies beyond the log's end.";
    projected: IntCounterVec "laneway_runtime_projected_records_total" ["stage"] "Records written into the store: of job status, by the reporter.";
    store_failures: IntCounterVec "laneway_store_failures_total" ["stage"] "Tries to write job status into the store that failed, and are made again.";
    publishers: IntCounterVec "laneway_runtime_publishers_replaced_total" [] "Kafka producers replaced because their records timed out and nothing was acknowledged meanwhile.";
    suppressed_users: IntGaugeVec "laneway_control_suppressed_users" [] "Users whose events are not taken: one for each source, or one for all.";
    suppression_asks: IntCounterVec "laneway_control_suppression_asks_total" ["result"] "Pages of the list of suppressed users asked for: done or failed.";
    config_loads: IntCounterVec "laneway_control_workspace_loads_total" ["result"] "Workspace configurations looked at: applied, unchanged, refused, kept (from the log, at a start), or unreachable (the control plane).";
}

/// The process's metrics.
pub fn metrics() -> &'static Metrics {
    static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);
    &METRICS
}

impl Metrics {
    /// The Prometheus text format.
    pub fn render(&self) -> String {
        let mut out = Vec::new();
        // Encoding our own families into memory cannot fail; if it did, an empty page says so.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut out);
        String::from_utf8(out).unwrap_or_default()
    }
}

/// A kind of metric that can be made and registered.
trait Registered: Sized {
    fn register(registry: &Registry, name: &str, meaning: &str, labels: &[&str]) -> Self;
}

macro_rules! registered {
    ($kind:ty, $options:expr) => {
        impl Registered for $kind {
            fn register(registry: &Registry, name: &str, meaning: &str, labels: &[&str]) -> Self {
                let options = $options(name, meaning);
                let family = <$kind>::new(options, labels).expect("the catalogue's names and labels are valid");
                registry.register(Box::new(family.clone())).expect("the catalogue has no name twice");
                family
            }
        }
    };
}

registered!(IntCounterVec, Opts::new::<&str, &str>);
registered!(IntGaugeVec, Opts::new::<&str, &str>);
registered!(HistogramVec, |name: &str, meaning: &str| {
    HistogramOpts::new(name, meaning).buckets(exponential_buckets(0.001, 2.0, 18).expect("valid buckets"))
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalogue_is_what_is_served_and_named_by_the_rules() {
        let metrics = Metrics::new();
        metrics.gateway_requests.with_label_values(&["200"]).inc();
        metrics.gateway_open.with_label_values::<&str>(&[]).set(1);
        metrics.commit_seconds.with_label_values(&["router"]).observe(0.1);
        let page = metrics.render();
        for name in
            ["laneway_gateway_requests_total", "laneway_gateway_open_requests", "laneway_runtime_commit_seconds"]
        {
            assert!(page.contains(&format!("# HELP {name} ")), "{name} is missing in {page}");
        }
        let mut names: Vec<&str> = CATALOGUE.iter().map(|row| row.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), CATALOGUE.len());
        for row in CATALOGUE {
            assert!(row.name.starts_with("laneway_") && row.meaning.ends_with('.'), "{row:?}");
            assert_eq!(row.kind == "IntCounterVec", row.name.ends_with("_total"), "{row:?}");
            assert!(!row.labels.iter().any(|label| ["user", "message"].contains(label)), "{row:?}");
        }
    }
}
