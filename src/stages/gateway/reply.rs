//! Answers, as clients of this API know them: texts, not JSON, since some SDKs trip over JSON that they do not expect.

use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use serde_json::{Value, json};
use subtle::ConstantTimeEq;

use crate::model::id::MessageId;

use super::request::Refusal;

const TEXT: &str = "text/plain; charset=utf-8";

/// What became of one event of a request that asked for verdicts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Accepted(MessageId),
    Refused(Refusal),
}

pub fn ok() -> Response {
    (StatusCode::OK, [(header::CONTENT_TYPE, TEXT)], "ok").into_response()
}

pub fn text(status: StatusCode, message: &str) -> Response {
    let headers = [(header::CONTENT_TYPE, TEXT), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    (status, headers, format!("{message}\n")).into_response()
}

pub fn json(status: StatusCode, value: &Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json; charset=utf-8")], value.to_string()).into_response()
}

/// A body that somebody else has written.
pub fn raw(body: Bytes, content_type: &str) -> Response {
    let kind = HeaderValue::from_str(content_type).unwrap_or(HeaderValue::from_static("application/json"));
    ([(header::CONTENT_TYPE, kind), (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"))], body)
        .into_response()
}

pub fn html(page: String) -> Response {
    ([(header::CONTENT_TYPE, "text/html; charset=utf-8")], page).into_response()
}

/// A picture that nobody keeps: each look at it is an event.
pub fn gif(bytes: &'static [u8]) -> Response {
    ([(header::CONTENT_TYPE, "image/gif"), (header::CACHE_CONTROL, "no-store")], bytes).into_response()
}

pub fn refuse(refusal: Refusal) -> Response {
    let mut response = text(status(refusal), &refusal.to_string());
    let wait = match refusal {
        Refusal::Unavailable => Some(1),
        Refusal::RateLimited { wait } => Some(wait),
        _ => None,
    };
    if let Some(wait) = wait {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(wait));
    }
    if refusal == Refusal::Slow {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// 200 where something was accepted, else the first refusal's status.
pub fn verdicts(all: &[Verdict]) -> Response {
    let accepted = all.iter().filter(|verdict| matches!(verdict, Verdict::Accepted(_))).count();
    let events: Vec<Value> = all
        .iter()
        .enumerate()
        .map(|(index, verdict)| match verdict {
            Verdict::Accepted(id) => json!({"index": index, "messageId": id.as_str(), "accepted": true}),
            Verdict::Refused(refusal) => {
                json!({"index": index, "accepted": false, "code": refusal.status(), "reason": refusal.to_string()})
            }
        })
        .collect();
    let first = all.iter().find_map(|verdict| match verdict {
        Verdict::Refused(refusal) => Some(status(*refusal)),
        Verdict::Accepted(_) => None,
    });
    let status = first.filter(|_| accepted == 0).unwrap_or(StatusCode::OK);
    json(status, &json!({"accepted": accepted, "refused": all.len() - accepted, "events": events}))
}

fn status(refusal: Refusal) -> StatusCode {
    StatusCode::from_u16(refusal.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

/// Whether a request brings the token: as a bearer's, or in a header of its own where `Authorization` names a source.
pub fn knows(headers: &HeaderMap, token: &str) -> bool {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    let own = headers.get("x-laneway-token").map(HeaderValue::as_bytes);
    !token.is_empty() && [bearer, own].into_iter().flatten().any(|given| given.ct_eq(token.as_bytes()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_opens_and_nothing_else_does() {
        let with = |name: &'static str, value: &'static str| {
            HeaderMap::from_iter([(name.parse().expect("a name"), HeaderValue::from_static(value))])
        };
        assert!(knows(&with("authorization", "Bearer abc"), "abc"));
        assert!(knows(&with("x-laneway-token", "abc"), "abc"));
        for headers in [
            HeaderMap::new(),
            with("authorization", "Bearer abd"),
            with("authorization", "Basic abc"),
            with("x-laneway-token", ""),
        ] {
            assert!(!knows(&headers, "abc") && !knows(&headers, ""), "{headers:?}");
        }
    }
}
