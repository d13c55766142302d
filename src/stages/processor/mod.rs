//! From one event to its deliveries: completes the event, chooses the destinations that want it, makes a request for each.
//!
//! | event | outcome |
//! |---|---|
//! | unreadable, or of a source that is not configured | failed: whole to `proc-errors` |
//! | no destination wants it, or it was processed before | filtered |
//! | its run of reverse ETL was drained | filtered, and counted as failed at each of its destinations |
//! | a destination's transform refuses it | that destination's failure to `proc-errors`; the others get theirs |
//! | else | one delivery for each destination |

mod complete;
mod fan_out;
mod jobs;

use std::collections::BTreeMap;
use std::sync::Arc;

use md5::{Digest, Md5};

use crate::clock::Clock;
use crate::control::workspace::{Destination, Source, Workspace};
use crate::control::{Current, commands};
use crate::log::partitioner::Placement;
use crate::model::codec;
use crate::model::delivery::{Delivery, HttpRequest, Origin, Payload, TransformAt};
use crate::model::event::Event;
use crate::model::id::DeliveryId;
use crate::model::job_status::Tally;
use crate::model::json::{Object, string_of};
use crate::model::outcome::{Outcome, Reason};
use crate::model::record::{Addressed, Headers, Record, Topic, header};
use crate::model::seen::Identity;
use crate::runtime::failure::{Cause, FailureTopic};
use crate::runtime::tally::JobTopic;
use crate::runtime::transform::Transform;
use crate::telemetry::metrics::metrics;
use crate::transform::builtin::webhook::{self, EventFields};

/// The log takes records up to 5 MiB.
const MAX_DELIVERY: usize = (5 << 20) - (64 << 10);

/// Whether events of a source may change the path, query and headers of requests to a destination.
pub type RequestFromEvent = Box<dyn Fn(&Source, &Destination) -> bool + Send + Sync>;

pub struct Processor {
    pub workspace: Current,
    pub request_from_event: RequestFromEvent,
    /// How `deliveries` is placed.
    pub deliveries: Placement,
    pub failures: FailureTopic,
    pub jobs: JobTopic,
    /// Which runs of reverse ETL are drained.
    pub commands: commands::Current,
    pub clock: Clock,
}

impl Transform for Processor {
    fn process(&self, records: &[Record]) -> Vec<Outcome> {
        let workspace = self.workspace.get();
        let commands = Arc::clone(&self.commands.borrow());
        let drained = commands.drained_runs(self.clock.now());
        let is_drained = |record: &Record| {
            !drained.is_empty() && record.headers.text(header::JOB_RUN).is_some_and(|run| drained.contains(run))
        };
        let outcome = |record: &Record| match is_drained(record) {
            true => Outcome::Filtered(Reason::Drained),
            false => self.one(&workspace, record),
        };
        let outcomes: Vec<Outcome> = records.iter().map(outcome).collect();
        count(&outcomes);
        outcomes
    }

    fn failures(&self) -> &FailureTopic {
        &self.failures
    }

    /// An event is its source's, with its message id; reverse ETL sends the same row in each run, and to one destination after the
    /// other. What is replayed has been here before on purpose.
    fn identity(&self, record: &Record) -> Option<Identity> {
        let said = |name: &str| record.headers.text(name).filter(|text| !text.is_empty());
        if said(header::REPLAY_ID).is_some() {
            return None;
        }
        let (source, id) = (said(header::SOURCE)?, said(header::MESSAGE_ID)?);
        // Ids are chosen by whoever has a write key: none is to be found that is another's.
        let mut digest = Md5::new();
        for part in
            [source, id, said(header::JOB_RUN).unwrap_or_default(), said(header::DESTINATION).unwrap_or_default()]
        {
            digest.update((part.len() as u32).to_le_bytes());
            digest.update(part);
        }
        Some(Identity::from_be_bytes(digest.finalize().into()))
    }

    fn duplicate(&self, _: &Record) {
        count(&[Outcome::Filtered(Reason::Duplicate)]);
    }

    fn beside(&self, records: &[Record], outcomes: &[Outcome], known: &[Record]) -> Vec<Addressed> {
        let mut tally = Tally::default();
        let workspace = self.workspace.get();
        for (record, outcome) in records.iter().zip(outcomes) {
            match outcome {
                Outcome::Filtered(Reason::Drained) => jobs::count_drained(&mut tally, record, &workspace),
                outcome => jobs::count(&mut tally, record, outcome),
            }
        }
        // The one before it has been processed; this one was taken, too.
        known.iter().for_each(|record| jobs::count(&mut tally, record, &Outcome::Filtered(Reason::Duplicate)));
        self.jobs.records(&mut tally)
    }
}

impl Processor {
    fn one(&self, workspace: &Workspace, record: &Record) -> Outcome {
        let Some(value) = &record.value else {
            return self.fail(record, Reason::Unreadable, "the record has no value");
        };
        let event: Event = match codec::decode(value) {
            Ok(event) => event,
            Err(error) => return self.fail(record, Reason::Unreadable, error.to_string()),
        };
        let source = workspace.source(&event.source).or_else(|| workspace.by_write_key(event.write_key.as_str()));
        let Some(source) = source else {
            return self.fail(record, Reason::UnknownSource, format!("source {:?} is not configured", event.source));
        };
        match self.fan_out(record, &event, source) {
            Ok(outcome) => outcome,
            Err(message) => self.fail(record, Reason::Unreadable, message),
        }
    }

    fn fan_out(&self, record: &Record, event: &Event, source: &Arc<Source>) -> Result<Outcome, String> {
        let payload =
            std::str::from_utf8(&event.payload).map_err(|error| format!("the payload is not UTF-8: {error}"))?;
        let original = Object::parse(payload).map_err(|error| format!("the payload is {error}"))?;
        let integrations = fan_out::Integrations::of(&original);
        // Reverse ETL may name the one destination that its rows are for.
        let only = record.headers.text(header::DESTINATION);
        let is_meant = |destination: &&Arc<Destination>| only.is_none_or(|only| destination.id.as_str() == only);
        let connected = source.destinations.iter().filter(is_meant);
        let chosen: Vec<&Arc<Destination>> =
            connected.filter(|destination| integrations.chooses(destination)).collect();
        if chosen.is_empty() {
            return Ok(Outcome::Filtered(Reason::NoDestination));
        }
        let wanting: Vec<&Arc<Destination>> =
            chosen.into_iter().filter(|destination| fan_out::takes(destination, &original)).collect();
        if wanting.is_empty() {
            return Ok(Outcome::Filtered(Reason::MessageType));
        }
        let completed = complete::complete(&original, event.received_at, &event.request_ip);
        let whole = match &completed {
            None => original,
            Some(text) => Object::parse(text).map_err(|error| format!("the completed payload is {error}"))?,
        };
        let deliver = |destination: &Arc<Destination>| {
            let fields = match (self.request_from_event)(source, destination) {
                true => EventFields::Allowed,
                false => EventFields::Ignored,
            };
            let made = match destination.kind.as_str() {
                webhook::KIND => {
                    webhook::request(&whole, &destination.config, fields).map_err(|error| error.to_string())
                }
                other => Err(format!("there is no transform for destinations of type {other}")),
            };
            match made {
                Ok(request) => self.deliver(record, event, destination, &whole, request),
                Err(message) => self.refuse(record, event, destination, message),
            }
        };
        Ok(Outcome::Produced(wanting.into_iter().map(deliver).collect()))
    }

    /// The delivery for one destination, or its failure where the delivery is too large for the log.
    fn deliver(
        &self,
        record: &Record,
        event: &Event,
        destination: &Destination,
        whole: &Object<'_>,
        request: HttpRequest,
    ) -> Addressed {
        let origin = Origin { topic: &self.failures.input, partition: record.partition, offset: record.offset };
        let delivery = Delivery {
            delivery_id: DeliveryId::of(origin, &destination.id, &event.message_id, 0),
            workspace: event.workspace.clone(),
            source: event.source.clone(),
            destination: destination.id.clone(),
            destination_type: destination.kind.clone(),
            user: event.user.clone(),
            message_id: event.message_id.clone(),
            event_type: event.event_type.clone(),
            event_name: whole.get("event").and_then(string_of).map(|name| name.into_owned()),
            received_at: event.received_at,
            job_run: event.job_run.clone(),
            task_run: event.task_run.clone(),
            record_id: whole.get("recordId").map(|raw| raw.to_owned().into()),
            transform_at: TransformAt::Processor,
            payload: Payload::Request(request),
        };
        let addressed = self.address(&delivery, record.headers.text(header::TRACEPARENT));
        if addressed.size() > MAX_DELIVERY {
            return self.refuse(record, event, destination, format!("the delivery has {} bytes", addressed.size()));
        }
        addressed
    }

    /// The failure of one destination; the others get theirs.
    fn refuse(&self, record: &Record, event: &Event, destination: &Destination, message: String) -> Addressed {
        let mut cause = Cause::untried(Reason::Transform, message, event.write_key.as_str());
        cause.destination = Some(destination.id.clone());
        cause.source = Some(event.source.clone());
        metrics().processor_reasons.with_label_values(&["failed", Reason::Transform.as_str()]).inc();
        self.failures.record(record, &cause)
    }

    fn address(&self, delivery: &Delivery, traceparent: Option<&str>) -> Addressed {
        let mut headers = Headers::new();
        headers.push_text(header::SOURCE, delivery.source.as_str());
        headers.push_text(header::WORKSPACE, delivery.workspace.as_str());
        headers.push_text(header::DESTINATION, delivery.destination.as_str());
        if let Some(user) = &delivery.user {
            headers.push_text(header::USER, user.as_str());
        }
        headers.push_text(header::MESSAGE_ID, delivery.message_id.as_str());
        headers.push_text(header::DELIVERY_ID, delivery.delivery_id.as_str());
        if let Some(run) = &delivery.job_run {
            headers.push_text(header::JOB_RUN, run.as_str());
        }
        if let Some(trace) = traceparent {
            headers.push_text(header::TRACEPARENT, trace);
        }
        headers.push_text(header::CONTENT_TYPE, header::AVRO);
        Addressed {
            topic: Topic::DELIVERIES,
            partition: self.deliveries.of_delivery(delivery),
            key: Some(delivery.destination.as_str().to_owned().into()),
            value: Some(codec::encode(delivery).into()),
            headers,
        }
    }

    fn fail(&self, record: &Record, reason: Reason, message: impl Into<String>) -> Outcome {
        let key = record.key.as_deref().map(String::from_utf8_lossy).unwrap_or_default();
        let mut cause = Cause::untried(reason, message, &key);
        cause.source = record.headers.text(header::SOURCE).map(Into::into);
        Outcome::Failed { reason, failure: self.failures.record(record, &cause) }
    }
}

/// Looking up a series for each event would cost as much as a hundredth of its processing.
fn count(outcomes: &[Outcome]) {
    let (mut produced, mut deliveries) = (0, BTreeMap::<&str, u64>::new());
    for outcome in outcomes {
        let (name, reason) = match outcome {
            Outcome::Produced(outputs) => {
                produced += 1;
                let made = outputs.iter().filter(|output| output.topic == Topic::DELIVERIES);
                for destination in made.filter_map(|output| output.headers.text(header::DESTINATION)) {
                    *deliveries.entry(destination).or_default() += 1;
                }
                continue;
            }
            Outcome::Filtered(reason) => ("filtered", reason),
            Outcome::Failed { reason, .. } => ("failed", reason),
        };
        metrics().processor_events.with_label_values(&[name]).inc();
        metrics().processor_reasons.with_label_values(&[name, reason.as_str()]).inc();
    }
    if produced > 0 {
        metrics().processor_events.with_label_values(&["produced"]).inc_by(produced);
    }
    for (destination, count) in deliveries {
        metrics().processor_deliveries.with_label_values(&[destination]).inc_by(count);
    }
}
