//! Users whose events are not taken.

use crate::control::suppression::Suppressed;
use crate::model::event::Event;
use crate::model::json::Object;
use crate::telemetry::metrics::metrics;

use super::identity;

/// Without the events of users who are not to be known. Their clients are told nothing of it.
pub fn without_suppressed(suppressed: &Suppressed, mut events: Vec<Event>) -> Vec<Event> {
    if !suppressed.is_empty() {
        events.retain(|event| !is_suppressed(suppressed, event));
    }
    events
}

pub fn is_suppressed(suppressed: &Suppressed, event: &Event) -> bool {
    let object = std::str::from_utf8(&event.payload).ok().and_then(|text| Object::parse(text).ok());
    let user = object.as_ref().map(|object| object.text_of("userId")).unwrap_or_default();
    let is_suppressed = suppressed.covers(&event.workspace, &event.source, &identity::clean(&user));
    if is_suppressed {
        metrics().gateway_suppressed.with_label_values(&[event.source.as_str()]).inc();
    }
    is_suppressed
}
