//! What the configuration says about destinations, as functions that the stages ask. A key of a destination's id has precedence over the same
//! key of its type.

use crate::config::{DestinationRules, Router};
use crate::control::workspace::{Destination, Source};
use crate::model::id::DestinationType;
use crate::runtime::deliver::{RetryPolicy, Rules};
use crate::stages::processor::RequestFromEvent;
use crate::stages::router::Configured;

/// The rules for a destination: the defaults, what is configured for its type, what is configured for its id.
pub fn deliver(router: Router) -> Configured {
    Box::new(move |id, kind| {
        let mut rules = Rules {
            retry: RetryPolicy {
                first: router.retry_first,
                cap: router.retry_cap,
                window: router.retry_window,
                min_attempts: router.retry_min_attempts,
                job_run_window: router.job_run_retry_window,
            },
            ..Rules::default()
        };
        for name in kind.map(DestinationType::as_str).into_iter().chain([id.as_str()]) {
            let Some(own) = router.destinations.get(name) else { continue };
            rules.ordered = own.ordered.unwrap_or(rules.ordered);
            rules.rate = own.rate.or(rules.rate);
            rules.concurrency = own.concurrency.or(rules.concurrency);
            rules.retry.first = own.retry_first.unwrap_or(rules.retry.first);
            rules.retry.cap = own.retry_cap.unwrap_or(rules.retry.cap);
            rules.retry.window = own.retry_window.unwrap_or(rules.retry.window);
            rules.retry.job_run_window = own.job_run_retry_window.unwrap_or(rules.retry.job_run_window);
            rules.retry.min_attempts = own.retry_min_attempts.unwrap_or(rules.retry.min_attempts);
        }
        rules
    })
}

/// Whether events of a source change the requests to a destination: as configured, else where the source's write key is secret.
pub fn request_from_event(router: &Router) -> RequestFromEvent {
    let own = |(name, rules): (&String, &DestinationRules)| Some((name.clone(), rules.request_from_event?));
    let own: std::collections::HashMap<String, bool> = router.destinations.iter().filter_map(own).collect();
    Box::new(move |source: &Source, destination: &Destination| {
        let configured = own.get(destination.id.as_str()).or_else(|| own.get(destination.kind.as_str()));
        configured.copied().unwrap_or_else(|| source.definition.has_secret_key())
    })
}
