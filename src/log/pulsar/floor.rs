//! The subscription under a group's name. Nothing is read through it: it stands where the group will read on, so that the broker keeps what
//! is not done, and its own tools show a backlog.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::log::LogError;
use crate::model::record::{Offset, Partition, Topic};
use crate::telemetry::seldom;

use super::membership::Own;
use super::positions::Place;

/// It follows so far behind.
const PAUSE: Duration = Duration::from_secs(5);

fn subscription(place: &Place) -> String {
    format!("{}{}", place.client.config.prefix, place.group)
}

/// Makes it where it is not there, at the earliest record.
pub async fn prepare(place: &Place, topic: &Topic) -> Result<(), LogError> {
    let path = format!("{}/subscription/{}", place.rest.topic(topic), subscription(place));
    let earliest = serde_json::json!({"ledgerId": -1, "entryId": -1, "partitionIndex": -1});
    place.rest.put(&path, &earliest).await.map(drop)
}

/// Moves it along, as long as it is not dropped.
pub async fn follow(own: Arc<Own>) {
    let mut at: BTreeMap<(Topic, Partition), Offset> = BTreeMap::new();
    loop {
        own.clock.sleep(PAUSE).await;
        let mut places: Vec<((Topic, Partition), Offset)> = Vec::new();
        for (partition, lock) in &*own.locks.lock().await {
            places.push(((own.place.topic(), *partition), lock.at));
            if let Some(committed) = &lock.kept.committed {
                places.push(((own.place.input.clone(), *partition), committed.offset));
            }
        }
        for (place, offset) in places {
            if at.get(&place) == Some(&offset) {
                continue;
            }
            match put(&own.place, &place.0, place.1, offset).await {
                Ok(()) => {
                    at.insert(place, offset);
                }
                Err(error) => {
                    if let Some(left_out) = seldom::due("pulsar subscription", &own.member.group) {
                        let group = own.member.group.as_str();
                        tracing::warn!(%error, left_out, group, "the subscription cannot be moved along");
                    }
                }
            }
        }
    }
}

/// The broker begins with a whole entry.
pub async fn put(place: &Place, topic: &Topic, partition: Partition, offset: Offset) -> Result<(), LogError> {
    let Some((ledger, entry, _)) = offset.entry() else { return Ok(()) };
    let path = place.rest.partition(topic, partition);
    let at = serde_json::json!({"ledgerId": ledger, "entryId": entry, "partitionIndex": partition.0});
    place.rest.post(&format!("{path}/subscription/{}/resetcursor", subscription(place)), &at).await
}
