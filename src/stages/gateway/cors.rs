//! Cross-origin requests, as browser SDKs make them: with credentials and any headers, from any origin or from those that are allowed.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

/// How long a browser may keep a preflight's answer, in seconds.
const MAX_AGE: &str = "900";
const METHODS: [&str; 3] = ["GET", "POST", "HEAD"];

/// Origins that browsers may send from.
#[derive(Clone, Debug, Default)]
pub struct Origins(Option<Arc<[String]>>);

impl Origins {
    /// `*`, or origins (`https://shop.example`) separated by commas.
    pub fn parse(list: &str) -> Self {
        let origins: Vec<String> =
            list.split(',').map(|text| text.trim().to_owned()).filter(|text| !text.is_empty()).collect();
        Self(if origins.iter().any(|origin| origin == "*") { None } else { Some(origins.into()) })
    }

    fn allow(&self, origin: &HeaderValue) -> bool {
        let of = |origins: &Arc<[String]>| origins.iter().any(|allowed| allowed.as_bytes() == origin.as_bytes());
        self.0.as_ref().is_none_or(of)
    }
}

pub async fn layer(State(origins): State<Origins>, request: Request, next: Next) -> Response {
    let origin = request.headers().get(header::ORIGIN).filter(|origin| origins.allow(origin)).cloned();
    let asked = request.headers().get(header::ACCESS_CONTROL_REQUEST_METHOD).cloned();
    if let (&Method::OPTIONS, Some(method)) = (request.method(), asked) {
        return preflight(origin, &method, request.headers()).into_response();
    }
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.append(header::VARY, HeaderValue::from_static("Origin"));
    if let Some(origin) = origin {
        allow(headers, origin);
    }
    response
}

fn preflight(origin: Option<HeaderValue>, method: &HeaderValue, asked: &HeaderMap) -> (StatusCode, HeaderMap) {
    let mut headers = HeaderMap::new();
    let vary = "Origin, Access-Control-Request-Method, Access-Control-Request-Headers";
    headers.insert(header::VARY, HeaderValue::from_static(vary));
    let known = method.to_str().is_ok_and(|method| METHODS.contains(&method));
    if let (Some(origin), true) = (origin, known) {
        allow(&mut headers, origin);
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, method.clone());
        headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(MAX_AGE));
        if let Some(wanted) = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
            headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted.clone());
        }
    }
    (StatusCode::NO_CONTENT, headers)
}

fn allow(headers: &mut HeaderMap, origin: HeaderValue) {
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
}
