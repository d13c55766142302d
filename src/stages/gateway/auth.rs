//! Which source a request speaks for: by its write key (the user of HTTP Basic, whose password is not looked at, in the query, or in the
//! body, where Segment's newer SDKs put it), or by its id on the internal listener.

use std::sync::Arc;

use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use crate::control::workspace::{Source, Workspace};
use crate::model::id::DestinationId;

use super::request::Refusal;

/// How a route finds its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Auth {
    /// HTTP Basic.
    WriteKey,
    /// HTTP Basic; without the header, `writeKey` of the body.
    HeaderOrBody,
    /// `?writeKey=`, as beacons and pixels send it.
    QueryKey,
    /// Either; the query first.
    AnyKey,
    /// `X-Rudder-Source-Id`, and the destination that `X-Rudder-Destination-Id` names, if any.
    SourceId,
    /// `X-Rudder-Source-Id` of a source that replays another.
    Replay,
}

/// Whom a request speaks for.
pub struct Speaker {
    pub source: Arc<Source>,
    /// Its events go there only.
    pub only: Option<DestinationId>,
}

impl Auth {
    /// Whether only the body can say which source it is.
    pub fn needs_body(self, parts: &Parts) -> bool {
        self == Auth::HeaderOrBody && !parts.headers.contains_key(header::AUTHORIZATION)
    }

    /// # Errors
    /// In this order: nothing usable in the request, an unknown source, one that is switched off, a destination that it does not have.
    pub fn speaker(self, parts: &Parts, workspace: &Workspace) -> Result<Speaker, Refusal> {
        let by_key = |key: String| by_key(&key, workspace);
        let by_id = || {
            let id = text(&parts.headers, "x-rudder-source-id").ok_or(Refusal::NoSourceId)?;
            workspace.source(&id.into()).ok_or(Refusal::InvalidSourceId)
        };
        let source = match self {
            Auth::WriteKey | Auth::HeaderOrBody => by_key(basic(&parts.headers).ok_or(Refusal::NoWriteKey)?)?,
            Auth::QueryKey => by_key(query_key(parts).ok_or(Refusal::NoWriteKeyInQuery)?)?,
            Auth::AnyKey => {
                by_key(query_key(parts).or_else(|| basic(&parts.headers)).ok_or(Refusal::NoWriteKeyInQuery)?)?
            }
            Auth::SourceId | Auth::Replay => by_id()?,
        };
        if self == Auth::Replay && source.replays.is_none() {
            return Err(Refusal::NotAReplaySource);
        }
        if !source.enabled {
            return Err(Refusal::SourceDisabled);
        }
        let only = match self {
            Auth::SourceId => text(&parts.headers, "x-rudder-destination-id").map(DestinationId::from),
            _ => None,
        };
        if let Some(id) = &only
            && !source.destinations.iter().any(|destination| destination.id == *id)
        {
            let is_off = source.disabled.contains(id);
            return Err(if is_off { Refusal::DestinationDisabled } else { Refusal::InvalidDestination });
        }
        Ok(Speaker { source: Arc::clone(source), only })
    }
}

fn by_key<'w>(key: &str, workspace: &'w Workspace) -> Result<&'w Arc<Source>, Refusal> {
    workspace.by_write_key(key).ok_or(Refusal::InvalidWriteKey)
}

/// For a body whose write key is this one.
///
/// # Errors
/// As [`Auth::speaker`], where the body has none.
pub fn speaker_of_body(key: Option<&str>, workspace: &Workspace) -> Result<Speaker, Refusal> {
    let source = by_key(key.filter(|key| !key.is_empty()).ok_or(Refusal::NoWriteKey)?, workspace)?;
    match source.enabled {
        true => Ok(Speaker { source: Arc::clone(source), only: None }),
        false => Err(Refusal::SourceDisabled),
    }
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name).and_then(|value| value.to_str().ok()).filter(|text| !text.is_empty())
}

fn query_key(parts: &Parts) -> Option<String> {
    let query = parts.uri.query()?;
    let mut pairs = url::form_urlencoded::parse(query.as_bytes());
    pairs.find(|(name, key)| name == "writeKey" && !key.is_empty()).map(|(_, key)| key.into_owned())
}

fn basic(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, credentials) = value.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = String::from_utf8(BASE64_STANDARD.decode(credentials.trim()).ok()?).ok()?;
    // Some clients send no colon where the password is empty.
    let key = decoded.split_once(':').map_or(decoded.as_str(), |(user, _)| user);
    (!key.is_empty()).then(|| key.to_owned())
}
