//! The fields that destinations expect in every event: times and the client's address.

use crate::clock::Timestamp;
use crate::model::json::{Object, Splice, quote, string_of};

/// The event with `originalTimestamp`, `sentAt`, `timestamp` where they are missing or no dates, and `context.ip` where it is
/// absent. A good value keeps its bytes; nothing else is touched.
///
/// `timestamp` is the time of the event by the server's clock: received minus how long the client kept it.
pub fn complete(event: &Object<'_>, received_at: Timestamp, request_ip: &str) -> Option<String> {
    let mut splice = Splice::new(event);
    let date = |key: &str| event.get(key).and_then(string_of).and_then(|text| Timestamp::parse(&text));
    let mut default = |key: &str, found: Option<Timestamp>, value: Timestamp| {
        found.unwrap_or_else(|| {
            splice.set(key, &value.rfc3339_millis());
            value
        })
    };
    let original = default("originalTimestamp", date("originalTimestamp"), received_at);
    let sent = default("sentAt", date("sentAt"), received_at);
    let kept = sent.micros().saturating_sub(original.micros());
    let happened = Timestamp::from_micros(received_at.micros().saturating_sub(kept));
    default("timestamp", date("timestamp"), happened);
    if !request_ip.is_empty() {
        add_ip(event, request_ip, &mut splice);
    }
    (!splice.is_empty()).then(|| splice.finish())
}

fn add_ip<'a>(event: &Object<'a>, ip: &str, splice: &mut Splice<'_, 'a>) {
    match event.get("context") {
        None => splice.add("context", &format!("{{\"ip\":{}}}", quote(ip))),
        Some(raw) => {
            // A context that is no object is the client's own affair.
            if let Ok(context) = Object::parse(raw)
                && context.get("ip").is_none()
            {
                splice.add_inside(raw, context.members().is_empty(), "ip", ip);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completed(event: &str) -> String {
        let object = Object::parse(event).expect("an event");
        let received = Timestamp::parse("2026-01-01T00:00:10.000Z").expect("a date");
        complete(&object, received, "10.0.0.1").unwrap_or_else(|| event.to_owned())
    }

    #[test]
    fn missing_times_and_address_are_added() {
        assert_eq!(
            completed(r#"{"a":1}"#),
            concat!(
                r#"{"a":1,"originalTimestamp":"2026-01-01T00:00:10.000Z","sentAt":"2026-01-01T00:00:10.000Z","#,
                r#""timestamp":"2026-01-01T00:00:10.000Z","context":{"ip":"10.0.0.1"}}"#
            )
        );
    }

    #[test]
    fn the_time_the_client_kept_it_is_taken_off() {
        let event =
            r#"{"originalTimestamp":"2025-01-01T00:00:00Z","sentAt":"2025-01-01T00:00:04Z","context":{"ip":"x"}}"#;
        assert!(completed(event).ends_with(r#","timestamp":"2026-01-01T00:00:06.000Z"}"#), "{}", completed(event));
    }

    #[test]
    fn good_values_keep_their_bytes_and_bad_ones_are_replaced() {
        let good = concat!(
            r#"{"originalTimestamp":"2026-11-23T16:43:19.484257564Z","sentAt":"2026-11-23T16:43:19+00:00","#,
            r#""timestamp":"2026-01-01","context":{"ip":""}}"#
        );
        assert_eq!(completed(good), good);
        let bad = r#"{"originalTimestamp":5,"sentAt":"soon","timestamp":null,"context":[]}"#;
        let now = "\"2026-01-01T00:00:10.000Z\"";
        assert_eq!(
            completed(bad),
            format!(r#"{{"originalTimestamp":{now},"sentAt":{now},"timestamp":{now},"context":[]}}"#)
        );
    }
}
