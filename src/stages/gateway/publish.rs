//! Giving events to the log: which partition, which headers.

use std::borrow::Borrow;

use crate::control::commands;
use crate::log::partitioner::{IsolateBy, Placement};
use crate::log::{LogError, Publisher};
use crate::model::codec;
use crate::model::command::Command;
use crate::model::event::{Channel, Event};
use crate::model::id::DestinationId;
use crate::model::job_status::{Counts, Tally};
use crate::model::record::{Addressed, Headers, Topic, header};
use crate::runtime::tally::{JobTopic, key_of_event};

/// What goes along with an event, in its record's headers.
#[derive(Clone, Debug, Default)]
pub struct Along {
    /// W3C trace context.
    pub traceparent: Option<String>,
    /// The only destination that it is for.
    pub only: Option<DestinationId>,
    /// What sends it again.
    pub replay: Option<String>,
}

/// Puts admitted events onto the `events` topic.
#[derive(Clone)]
pub struct Admission<P> {
    publisher: P,
    placement: Placement,
    jobs: JobTopic,
}

impl<P: Publisher> Admission<P> {
    pub fn new(publisher: P, placement: Placement, jobs: JobTopic) -> Self {
        Self { publisher, placement, jobs }
    }

    /// The records of events, in their order, and behind them how many each run of reverse ETL has brought.
    pub fn records<'a, E: Borrow<Event>>(&self, events: impl Iterator<Item = (E, &'a Along)>) -> Vec<Addressed> {
        let mut tally = Tally::default();
        let address = |(event, along): (E, &Along)| {
            let event = event.borrow();
            let is_new = along.replay.is_none() && event.channel != Channel::Replay;
            if let Some(key) = key_of_event(event).filter(|_| is_new) {
                tally.add(key, Counts::taken(1));
            }
            address(self.placement, event, along)
        };
        let mut records: Vec<Addressed> = events.map(address).collect();
        records.extend(self.jobs.records(&mut tally));
        records
    }

    /// Returns once the log has all of them, as [`Admission::records`] made them, on all replicas.
    ///
    /// # Errors
    /// [`LogError`]; some of them may be stored all the same, and come again with the client's next try under the same
    /// message ids.
    pub async fn publish(&self, mut records: Vec<Addressed>) -> Result<(), LogError> {
        // Counts come behind the events that they are about: what was counted and is not there would be waited for, for ever.
        let counts = records.split_off(records.partition_point(|it| it.topic != Topic::JOB_STATUS));
        self.publisher.publish(records).await?;
        if counts.is_empty() { Ok(()) } else { self.publisher.publish(counts).await }
    }

    /// Gives an operator's command.
    ///
    /// # Errors
    /// As [`Admission::publish`].
    pub async fn command(&self, command: &Command) -> Result<(), LogError> {
        self.publisher.publish(vec![commands::record(&command.to_control())]).await
    }
}

/// The record of an event, where it belongs.
pub fn address(placement: Placement, event: &Event, along: &Along) -> Addressed {
    let isolation_key = match placement.isolate_by {
        IsolateBy::None | IsolateBy::Destination => "",
        IsolateBy::Workspace => event.workspace.as_str(),
        IsolateBy::Source => event.source.as_str(),
    };
    // Who is nobody is spread evenly.
    let user = event.user.as_ref().map_or(event.message_id.as_str(), |user| user.as_str());
    let mut headers = Headers::with_capacity(8);
    headers.push_text(header::SOURCE, event.source.as_str());
    headers.push_text(header::WORKSPACE, event.workspace.as_str());
    if let Some(only) = &along.only {
        headers.push_text(header::DESTINATION, only.as_str());
    }
    if let Some(replay) = &along.replay {
        headers.push_text(header::REPLAY_ID, replay);
    } else if event.channel == Channel::Replay {
        headers.push_text(header::REPLAY_ID, event.source.as_str());
    }
    if let Some(user) = &event.user {
        headers.push_text(header::USER, user.as_str());
    }
    headers.push_text(header::MESSAGE_ID, event.message_id.as_str());
    if let Some(run) = &event.job_run {
        headers.push_text(header::JOB_RUN, run.as_str());
    }
    if let Some(trace) = &along.traceparent {
        headers.push_text(header::TRACEPARENT, trace);
    }
    headers.push_text(header::CONTENT_TYPE, header::AVRO);
    Addressed {
        topic: Topic::EVENTS,
        partition: placement.place(isolation_key, user),
        key: Some(event.write_key.as_str().to_owned().into()),
        value: Some(codec::encode(event).into()),
        headers,
    }
}
