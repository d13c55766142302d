//! Numbers that no process could run with, and numbers that contradict each other: named before anything starts.

use std::time::Duration;

use super::{Config, DestinationRules};

/// Below this, waiting costs more than the work between.
const MIN_INTERVAL: Duration = Duration::from_millis(1);
/// Of timeouts: a shorter one fails everything.
const MIN_TIMEOUT: Duration = Duration::from_millis(100);
/// Of a group's session: below it, a busy machine loses its partitions all the time.
const MIN_SESSION: Duration = Duration::from_secs(1);
/// Of the wait before the first retry: a shorter one is a load test of the destination.
const MIN_RETRY: Duration = Duration::from_millis(10);
/// Of requests at a time: far above what a process can have, and below what its semaphores can count.
const MAX_AT_A_TIME: usize = 1 << 20;
/// Memory for what is held at least: one record of the largest size, and what is around it.
const MIN_MEMORY: usize = 1 << 20;

/// The first number that is wrong: its key, and what is wrong with it.
pub(super) fn problem(config: &Config) -> Option<(String, String)> {
    let Config { gateway, runtime, router, control, processor, .. } = config;
    let counts = [
        ("gateway.max_requests", gateway.max_requests),
        ("router.in_flight", router.in_flight),
        ("router.in_flight_per_destination", router.in_flight_per_destination),
        ("control.suppression.page_size", control.suppression.page_size),
    ];
    let count = |(key, count): &(&str, usize)| {
        let is_right = (1..=MAX_AT_A_TIME).contains(count);
        (!is_right).then(|| wrong(key, format!("{count} is not between 1 and {MAX_AT_A_TIME}")))
    };
    let times = [
        ("gateway.body_timeout", gateway.body_timeout, MIN_TIMEOUT),
        ("gateway.idle_timeout", gateway.idle_timeout, MIN_TIMEOUT),
        ("router.timeout", router.timeout, MIN_TIMEOUT),
        ("router.retry_first", router.retry_first, MIN_RETRY),
        ("runtime.session_timeout", runtime.session_timeout, MIN_SESSION),
        ("runtime.transform_commit_interval", runtime.transform_commit_interval, MIN_INTERVAL),
        ("runtime.deliver_commit_interval", runtime.deliver_commit_interval, MIN_INTERVAL),
    ];
    let time = |(key, time, least): &(&str, Duration, Duration)| {
        (time < least).then(|| wrong(key, format!("{time:?} is less than {least:?}")))
    };
    let memory = [
        ("gateway.body_memory", gateway.body_memory),
        ("runtime.process_memory", runtime.process_memory),
        ("runtime.partition_memory", runtime.partition_memory),
        ("processor.dedup_memory", if processor.dedup_window.is_zero() { MIN_MEMORY } else { processor.dedup_memory }),
    ];
    let size = |(key, bytes): &(&str, usize)| {
        (*bytes < MIN_MEMORY).then(|| wrong(key, format!("{bytes} bytes are less than 1MiB")))
    };
    counts
        .iter()
        .find_map(count)
        .or_else(|| times.iter().find_map(time))
        .or_else(|| memory.iter().find_map(size))
        .or_else(|| contradiction(config))
        .or_else(|| router.destinations.iter().find_map(|(name, rules)| of_destination(config, name, rules)))
}

fn wrong(key: &str, what: String) -> (String, String) {
    (key.to_owned(), what)
}

fn contradiction(config: &Config) -> Option<(String, String)> {
    let Config { runtime, router, .. } = config;
    if runtime.partition_memory > runtime.process_memory {
        return Some(wrong("runtime.partition_memory", "is more than runtime.process_memory".to_owned()));
    }
    // An owner stops when its last commit is older than a third of it.
    let most = runtime.session_timeout / 3;
    for (key, interval) in [
        ("runtime.transform_commit_interval", runtime.transform_commit_interval),
        ("runtime.deliver_commit_interval", runtime.deliver_commit_interval),
    ] {
        if interval >= most {
            return Some(wrong(
                key,
                format!("{interval:?} is not less than a third of runtime.session_timeout ({most:?})"),
            ));
        }
    }
    if runtime.revoke_drain >= runtime.session_timeout {
        return Some(wrong("runtime.revoke_drain", "is not less than runtime.session_timeout".to_owned()));
    }
    (router.retry_cap < router.retry_first)
        .then(|| wrong("router.retry_cap", "is less than router.retry_first".to_owned()))
}

fn of_destination(config: &Config, name: &str, rules: &DestinationRules) -> Option<(String, String)> {
    let own = |key: &str, what: String| Some((format!("router.destinations.{name}.{key}"), what));
    if let Some(rate) = rules.rate.filter(|rate| !rate.is_finite() || *rate <= 0.0) {
        return own("rate", format!("{rate} is not a number above 0; leave it out where there is no limit"));
    }
    if let Some(concurrency) = rules.concurrency.filter(|most| !(1..=MAX_AT_A_TIME).contains(most)) {
        return own("concurrency", format!("{concurrency} is not between 1 and {MAX_AT_A_TIME}"));
    }
    let (first, cap) =
        (rules.retry_first.unwrap_or(config.router.retry_first), rules.retry_cap.unwrap_or(config.router.retry_cap));
    if first < MIN_RETRY {
        return own("retry_first", format!("{first:?} is less than {MIN_RETRY:?}"));
    }
    if cap < first {
        return own("retry_cap", format!("{cap:?} is less than retry_first, {first:?}"));
    }
    None
}

#[cfg(test)]
mod tests {
    use crate::config::Layers;

    #[test]
    fn numbers_that_nothing_can_run_with_are_named() {
        let load = |pairs: &[(&str, &str)]| {
            let flags: Vec<(&str, String)> = pairs.iter().map(|(key, text)| (*key, (*text).to_owned())).collect();
            Layers::read(None, std::iter::empty(), &flags, &[]).and_then(|layers| layers.config())
        };
        let wrong: &[(&[(&str, &str)], &str)] = &[
            (
                &[("router.destinations.WEBHOOK.rate", "0")],
                "router.destinations.WEBHOOK.rate: 0 is not a number above 0",
            ),
            (&[("router.destinations.d.rate", "-5")], "-5 is not"),
            (&[("router.destinations.d.rate", "nan")], "NaN is not"),
            (&[("router.destinations.d.rate", "inf")], "inf is not"),
            (&[("router.destinations.d.concurrency", "0")], "0 is not between 1 and"),
            (
                &[("router.destinations.d.retry_first", "0s")],
                "router.destinations.d.retry_first: 0ns is less than 10ms",
            ),
            (&[("router.destinations.d.retry_first", "10m")], "router.destinations.d.retry_cap: 300s is less than"),
            (&[("router.retry_first", "0s")], "router.retry_first"),
            (&[("router.retry_cap", "10ms")], "router.retry_cap: is less than router.retry_first"),
            (&[("router.timeout", "0s")], "router.timeout: 0ns is less than 100ms"),
            (&[("router.timeout", "99999999h")], "more than 10 years"),
            (&[("router.in_flight", "0")], "router.in_flight: 0 is not between"),
            (&[("router.in_flight", "4611686018427387904")], "is not between"),
            (&[("gateway.max_requests", "0")], "gateway.max_requests"),
            (&[("gateway.max_requests", "-1")], "invalid value"),
            (&[("gateway.body_memory", "0")], "gateway.body_memory: 0 bytes are less than 1MiB"),
            (&[("runtime.process_memory", "32MiB")], "runtime.partition_memory: is more than"),
            (&[("runtime.deliver_commit_interval", "20s")], "not less than a third of runtime.session_timeout (15s)"),
            (&[("runtime.session_timeout", "0s")], "runtime.session_timeout"),
        ];
        for (pairs, expected) in wrong {
            let error = load(pairs).expect_err(expected).to_string();
            assert!(error.contains(expected), "{expected}: {error}");
        }
        let right: &[&[(&str, &str)]] = &[
            &[("router.destinations.d.rate", "0.001")],
            &[("router.retry_window", "0s"), ("router.retry_min_attempts", "0")],
            &[("processor.dedup_window", "0s"), ("processor.dedup_memory", "0")],
            &[("router.repeat_window", "0"), ("gateway.limits.source", "0")],
        ];
        for pairs in right {
            load(pairs).unwrap_or_else(|error| panic!("{pairs:?}: {error}"));
        }
    }
}
