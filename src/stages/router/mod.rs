//! Sends deliveries to HTTP destinations. Order, retries and what happens after are the deliver runtime's; this is one attempt.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::{Clock, Timestamp};
use crate::control::Current;
use crate::delivery::http::Client;
use crate::delivery::verdict::Verdict;
use crate::model::codec;
use crate::model::delivery::{Delivery, Payload};
use crate::model::id::{DestinationId, DestinationType};
use crate::model::outcome::Reason;
use crate::model::record::Record;
use crate::runtime::deliver::{Deliver, Rules};
use crate::telemetry::metrics::metrics;

/// A delivery to a destination that this process does not know is retried for this long after it was written: the processor's
/// configuration may be newer than the router's.
const UNKNOWN_DESTINATION_GRACE: Duration = Duration::from_secs(30);

/// Gives the rules for a destination of this id and type.
pub type Configured = Box<dyn Fn(&DestinationId, Option<&DestinationType>) -> Rules + Send + Sync>;

pub struct Router {
    pub client: Client,
    pub workspace: Current,
    pub clock: Clock,
    /// What is configured for a destination, by its id and its type.
    pub rules: Configured,
}

impl Deliver for Router {
    async fn attempt(&self, records: Vec<Arc<Record>>) -> Vec<Verdict> {
        // A webhook takes one event a request.
        match records.first() {
            Some(record) => vec![self.send(record).await],
            None => Vec::new(),
        }
    }

    fn rules(&self, destination: &DestinationId) -> Rules {
        let workspace = self.workspace.get();
        let kind = workspace.destination(destination).map(|found| found.kind.clone());
        (self.rules)(destination, kind.as_ref())
    }
}

impl Router {
    async fn send(&self, record: &Record) -> Verdict {
        let abort = |reason, message: String| Verdict::Abort { reason, code: 0, message };
        let delivery: Delivery = match record.value.as_ref().map(codec::decode) {
            Some(Ok(delivery)) => delivery,
            Some(Err(error)) => return abort(Reason::Unreadable, error.to_string()),
            None => return abort(Reason::Unreadable, "the record has no value".into()),
        };
        if self.workspace.get().destination(&delivery.destination).is_none() {
            return unknown_destination(&delivery.destination, record.timestamp, self.clock.now());
        }
        let Payload::Request(request) = &delivery.payload else {
            return abort(Reason::BadRequest, "the delivery holds no request".into());
        };
        let began = self.clock.instant();
        let verdict = self.client.send(request, &delivery.delivery_id).await;
        metrics().router_attempt_seconds.with_label_values::<&str>(&[]).observe(began.elapsed().as_secs_f64());
        let code = verdict.code().to_string();
        metrics().router_attempts.with_label_values(&[delivery.destination.as_str(), &code]).inc();
        if let Verdict::Delivered { .. } = verdict {
            let latency = self.clock.now().since(delivery.received_at);
            metrics().router_latency_seconds.with_label_values::<&str>(&[]).observe(latency.as_secs_f64());
        }
        verdict
    }
}

/// What comes of a delivery that was written at `written_at` to a destination that is not in the configuration in force.
fn unknown_destination(destination: &DestinationId, written_at: Timestamp, now: Timestamp) -> Verdict {
    let message = format!("destination {destination} is not configured, or is switched off");
    match now.since(written_at) < UNKNOWN_DESTINATION_GRACE {
        true => Verdict::Retry { code: 0, message, not_before: None },
        false => Verdict::Abort { reason: Reason::DestinationGone, code: 0, message },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delivery_to_a_new_destination_waits_for_the_configuration() {
        let written = Timestamp::from_millis(1_000_000);
        let after = |time| unknown_destination(&"new".into(), written, written.plus(time));
        assert!(matches!(after(Duration::from_secs(1)), Verdict::Retry { .. }));
        assert!(matches!(after(UNKNOWN_DESTINATION_GRACE), Verdict::Abort { reason: Reason::DestinationGone, .. }));
    }
}
