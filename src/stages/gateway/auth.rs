//! Which source a request speaks for: the write key, as the user of HTTP Basic. The password is not looked at.

use std::sync::Arc;

use axum::http::{HeaderMap, header};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use crate::control::workspace::{Source, Workspace};

use super::request::Refusal;

/// # Errors
/// In this order: no usable header, an unknown key, a source that is switched off.
pub fn source(headers: &HeaderMap, workspace: &Workspace) -> Result<Arc<Source>, Refusal> {
    let key = write_key(headers).ok_or(Refusal::NoWriteKey)?;
    let source = workspace.by_write_key(&key).ok_or(Refusal::InvalidWriteKey)?;
    if !source.enabled {
        return Err(Refusal::SourceDisabled);
    }
    Ok(Arc::clone(source))
}

fn write_key(headers: &HeaderMap) -> Option<String> {
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
