//! What became of the rows of reverse ETL, counted for their runs.

use std::sync::Arc;

use bytes::Bytes;

use crate::control::workspace::{Destination, Workspace};
use crate::model::codec;
use crate::model::event::Event;
use crate::model::failure::Failure;
use crate::model::job_status::{Counts, JobKey, Tally};
use crate::model::json::Object;
use crate::model::outcome::Outcome;
use crate::model::record::{Record, Topic, header};
use crate::runtime::tally::{counts, key_of_event};

use super::fan_out::{Integrations, takes};

/// What a row is told that the engine itself refused.
const REFUSED: u16 = 400;
/// The code of a row of a drained run, as in rudder-server.
const DRAINED_STATUS_CODE: u16 = 410;

/// Counts an event of a run: what became of it at the source, and what each destination gets to do.
pub fn count(tally: &mut Tally, record: &Record, outcome: &Outcome) {
    if !counts(record) {
        return;
    }
    let event = record.value.as_ref().and_then(|value| codec::decode::<Event>(value).ok());
    let Some(key) = event.as_ref().map_or_else(|| said(record), key_of_event) else { return };
    let row = || event.as_ref().and_then(record_id);
    let outputs = match outcome {
        Outcome::Failed { .. } => return tally.add(key, Counts::failed(row(), REFUSED)),
        Outcome::Filtered(_) => return tally.add(key, Counts::passed()),
        Outcome::Produced(outputs) => outputs,
    };
    tally.add(key.clone(), Counts::passed());
    for output in outputs {
        let is_delivery = output.topic == Topic::DELIVERIES;
        let named = || output.headers.text(header::DESTINATION).map(Into::into);
        let failed = || codec::decode::<Failure>(output.value.as_ref()?).ok()?.destination;
        let Some(destination) = (if is_delivery { named() } else { failed() }) else { continue };
        let mut counted = Counts::taken(1);
        if !is_delivery {
            counted.add(Counts::failed(row(), REFUSED));
        }
        tally.add(JobKey { destination: Some(destination), ..key.clone() }, counted);
    }
}

/// Counts a row of a drained run: it has passed the source, and failed at each destination that it would have gone to.
pub fn count_drained(tally: &mut Tally, record: &Record, workspace: &Workspace) {
    if !counts(record) {
        return;
    }
    let event = record.value.as_ref().and_then(|value| codec::decode::<Event>(value).ok());
    let Some(key) = event.as_ref().map_or_else(|| said(record), key_of_event) else { return };
    tally.add(key.clone(), Counts::passed());
    let only = record.headers.text(header::DESTINATION);
    let source = event.as_ref().and_then(|event| workspace.source(&event.source));
    let Some(source) = source else { return };
    let payload = event.as_ref().and_then(|event| std::str::from_utf8(&event.payload).ok());
    for destination in would_get(&source.destinations, only, payload) {
        let mut counted = Counts::taken(1);
        counted.add(Counts::failed(event.as_ref().and_then(record_id), DRAINED_STATUS_CODE));
        tally.add(JobKey { destination: Some(destination.id.clone()), ..key.clone() }, counted);
    }
}

/// The destinations that an event would have gone to; none where its payload cannot be read. `only`: the one that it is meant for.
fn would_get<'a>(
    destinations: &'a [Arc<Destination>],
    only: Option<&str>,
    payload: Option<&str>,
) -> Vec<&'a Arc<Destination>> {
    let Some(event) = payload.and_then(|payload| Object::parse(payload).ok()) else { return Vec::new() };
    let integrations = Integrations::of(&event);
    let is_meant = |destination: &&Arc<Destination>| {
        only.is_none_or(|only| destination.id.as_str() == only)
            && integrations.chooses(destination)
            && takes(destination, &event)
    };
    destinations.iter().filter(is_meant).collect()
}

/// Of a record that cannot be read.
fn said(record: &Record) -> Option<JobKey> {
    Some(JobKey {
        job_run: record.headers.text(header::JOB_RUN)?.into(),
        task_run: "".into(),
        source: record.headers.text(header::SOURCE)?.into(),
        destination: None,
    })
}

fn record_id(event: &Event) -> Option<Bytes> {
    let payload = std::str::from_utf8(&event.payload).ok()?;
    Some(Object::parse(payload).ok()?.get("recordId")?.to_owned().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drained_row_fails_where_it_would_have_gone() {
        let destination = |id: &str, types: Option<Vec<String>>| {
            Arc::new(Destination {
                id: id.into(),
                name: id.into(),
                kind: "WEBHOOK".into(),
                display_name: id.to_uppercase(),
                message_types: types,
                config: serde_json::Value::Null,
            })
        };
        let all = [destination("a", None), destination("b", None), destination("c", Some(vec!["identify".into()]))];
        for (payload, only, expected) in [
            (r#"{"type":"track"}"#, None, vec!["a", "b"]),
            (r#"{"type":"identify"}"#, None, vec!["a", "b", "c"]),
            (r#"{"type":"track","integrations":{"All":false,"B":true}}"#, None, vec!["b"]),
            (r#"{"type":"track","integrations":{"A":false}}"#, Some("a"), vec![]),
            (r#"{"type":"track"}"#, Some("b"), vec!["b"]),
            ("no event", None, vec![]),
        ] {
            let found: Vec<&str> = would_get(&all, only, Some(payload)).iter().map(|it| it.id.as_str()).collect();
            assert_eq!(found, expected, "{payload} {only:?}");
        }
    }
}
