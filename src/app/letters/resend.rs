//! What a letter becomes when it is sent again: the delivery that failed, or the event that could not be processed.

use std::sync::Arc;

use serde::de::IgnoredAny;

use crate::clock::Clock;
use crate::control::suppression::Suppressed;
use crate::control::workspace::Workspace;
use crate::log::partitioner::Placement;
use crate::model::codec;
use crate::model::delivery::Delivery;
use crate::model::event::{Channel, Event};
use crate::model::failure::Try;
use crate::model::outcome::Reason;
use crate::model::record::{Addressed, Headers, Record, Topic, header};
use crate::model::redrive::{Letter, Shelf};
use crate::runtime::failure::{Cause, FailureTopic};
use crate::stages::gateway::request::Facts;
use crate::stages::gateway::webhook::{Failed, Made, make, renewed};
use crate::stages::gateway::{Along, address, without_suppressed};
use crate::transform::http::Sources;

use super::RedriveError;

/// The stage whose failures are requests of webhook sources.
const GATEWAY: &str = "gateway";

/// What became of a letter.
pub enum Sent {
    Again(Vec<Addressed>),
    /// It failed as before: a new letter.
    Failed(Addressed),
    /// It does not hold the whole.
    Not,
}

/// How letters are sent again.
pub enum Resend {
    /// To the destination that failed only, in a lane of its own.
    Deliveries(Placement),
    /// From the beginning of the flow.
    Events(Box<Events>),
}

pub struct Events {
    /// Of `events`.
    pub placement: Placement,
    pub workspace: Arc<Workspace>,
    /// None: requests of webhook sources cannot be sent.
    pub sources: Option<Sources>,
    /// Where such requests go that fail again.
    pub failures: FailureTopic,
    pub clock: Clock,
    /// Whose events are not taken.
    pub suppressed: Suppressed,
}

/// Whether a letter holds the whole of what it was made of.
pub fn is_whole(shelf: Shelf, letter: &Letter) -> bool {
    let Some(value) = &letter.failure.value else { return false };
    match shelf {
        Shelf::DeadLetters => codec::decode::<Delivery>(value).is_ok(),
        Shelf::ProcErrors if letter.failure.stage == GATEWAY => serde_json::from_slice::<IgnoredAny>(value).is_ok(),
        Shelf::ProcErrors => codec::decode::<Event>(value).is_ok(),
    }
}

impl Resend {
    pub fn outputs(&self) -> Vec<Topic> {
        match self {
            Resend::Deliveries(_) => vec![Topic::DELIVERIES],
            Resend::Events(_) => vec![Topic::EVENTS, Topic::PROC_ERRORS],
        }
    }

    /// The records of a letter, for the plan that sends it.
    ///
    /// # Errors
    /// [`RedriveError::Away`], where a service does not answer that is needed for it.
    pub async fn records(&self, plan: &str, letter: &Letter) -> Result<Sent, RedriveError> {
        let whole = |record: Option<Addressed>| record.map_or(Sent::Not, |record| Sent::Again(vec![record]));
        match self {
            Resend::Deliveries(placement) => Ok(whole(delivery(*placement, plan, letter))),
            Resend::Events(events) if letter.failure.stage == GATEWAY => events.webhook(plan, letter).await,
            Resend::Events(events) => Ok(events.event(plan, letter).map_or(Sent::Not, Sent::Again)),
        }
    }
}

/// The original record, where its user's deliveries lie now.
fn delivery(placement: Placement, plan: &str, letter: &Letter) -> Option<Addressed> {
    let failure = &letter.failure;
    let delivery: Delivery = codec::decode(failure.value.as_ref()?).ok()?;
    let mut headers = Headers::new();
    for (name, value) in failure.headers.iter().filter(|(name, _)| name != header::REPLAY_ID) {
        headers.push(name.clone(), value.clone());
    }
    headers.push_text(header::REPLAY_ID, plan);
    Some(Addressed {
        topic: Topic::DELIVERIES,
        partition: placement.of_delivery(&delivery),
        key: failure.key.clone(),
        value: failure.value.clone(),
        headers,
    })
}

impl Events {
    /// The event, for the destination whose transform failed, or for all where the whole event did.
    /// Nothing for a user who is suppressed. None: the letter does not hold the whole event.
    fn event(&self, plan: &str, letter: &Letter) -> Option<Vec<Addressed>> {
        let event: Event = codec::decode(letter.failure.value.as_ref()?).ok()?;
        // Who was suppressed since then.
        let Some(event) = without_suppressed(&self.suppressed, vec![event]).pop() else { return Some(Vec::new()) };
        let before = letter.original(header::DESTINATION).map(Into::into);
        let along = Along {
            traceparent: letter.original(header::TRACEPARENT).map(str::to_owned),
            only: letter.failure.destination.clone().or(before),
            replay: Some(plan.to_owned()),
        };
        Some(vec![address(self.placement, &event, &along)])
    }

    async fn webhook(&self, plan: &str, letter: &Letter) -> Result<Sent, RedriveError> {
        let Some(sources) = &self.sources else {
            return Err(RedriveError::Away("transformer.url is not set".to_owned()));
        };
        let id = letter.original(header::SOURCE).unwrap_or_default();
        let Some(source) = self.workspace.source(&id.into()) else {
            let why = format!("source {id:?} is not configured");
            return Ok(self.again(letter, Reason::UnknownSource, 0, why));
        };
        let kept = letter.failure.value.as_ref().and_then(|value| std::str::from_utf8(value).ok());
        // Its settings may be what was mended.
        let Some(request) = kept.and_then(|kept| renewed(kept, source).ok()) else { return Ok(Sent::Not) };
        let facts = Facts {
            received_at: letter.failure.timestamp,
            client_ip: letter.original(header::REQUEST_IP).unwrap_or_default().to_owned(),
            channel: Channel::Webhook,
            names_runs: source.is_backfill(),
            job_run: None,
            task_run: None,
        };
        match make(sources, source, request, &facts).await {
            Made::Events(events, _) => {
                let events = without_suppressed(&self.suppressed, events);
                let along = Along { replay: Some(plan.to_owned()), ..Along::default() };
                Ok(Sent::Again(events.iter().map(|event| address(self.placement, event, &along)).collect()))
            }
            Made::Full => Err(RedriveError::Away("too much waits for it".to_owned())),
            // One that makes the service fail must not stand in the way of the others.
            Made::Failed(Failed { reason: Reason::TransformerAway, detail, .. }) if !sources.is_there().await => {
                Err(RedriveError::Away(detail))
            }
            Made::Failed(failed) => Ok(self.again(letter, failed.reason, failed.status, failed.detail)),
        }
    }

    /// What has failed again.
    fn again(&self, letter: &Letter, reason: Reason, code: u16, detail: String) -> Sent {
        let failure = &letter.failure;
        let mut headers = Headers::new();
        failure.headers.iter().for_each(|(name, value)| headers.push(name.clone(), value.clone()));
        let original = Record {
            partition: failure.partition,
            offset: failure.offset,
            timestamp: failure.timestamp,
            key: failure.key.clone(),
            value: failure.value.clone(),
            headers,
        };
        let key = failure.key.as_deref().map(String::from_utf8_lossy).unwrap_or_default();
        let cause = Cause {
            attempts: failure.attempts.saturating_add(1),
            first: failure.first.clone(),
            last: Some(Try { at: self.clock.now(), code, message: detail.clone() }),
            source: failure.source.clone(),
            ..Cause::untried(reason, detail, &key)
        };
        Sent::Failed(self.failures.record(&original, &cause))
    }
}
