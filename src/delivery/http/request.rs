//! A delivery's request as the HTTP client takes it, checked before anything is sent.

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use hyper::{Method, Request, Uri};
use url::Url;

use crate::model::delivery::HttpRequest;
use crate::model::id::DeliveryId;

/// Carries the delivery's id: no other delivery's request has the same value.
pub(super) const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// Headers of one request. Servers refuse more than about a hundred; the type that holds them panics far above.
const MAX_HEADERS: usize = 512;
/// Names and values of them together. Most servers refuse a head over 8 to 32 KiB.
const MAX_HEADER_BYTES: usize = 128 << 10;

/// A request that cannot be sent as it is; says why, without the URL, which may hold a secret.
#[derive(Debug)]
pub(super) struct Unbuildable(pub(super) String);

/// Everything of a request, to be sent to one URL after the other.
pub(super) struct Prepared {
    pub(super) method: Method,
    pub(super) url: Url,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
}

impl Prepared {
    /// # Errors
    /// [`Unbuildable`].
    pub(super) fn new(request: &HttpRequest, delivery: &DeliveryId) -> Result<Self, Unbuildable> {
        let method = Method::from_bytes(request.method.as_bytes())
            .map_err(|_| Unbuildable(format!("{:?} is not an HTTP method", request.method)))?;
        let mut url = Url::parse(&request.url)
            .map_err(|error| Unbuildable(format!("the destination's URL is wrong: {error}")))?;
        if !request.params.is_empty() {
            url.query_pairs_mut().extend_pairs(&request.params);
        }
        let mut headers = headers(request)?;
        if let Ok(id) = HeaderValue::from_str(delivery.as_str()) {
            headers.insert(IDEMPOTENCY_KEY, id);
        }
        headers.entry(ACCEPT).or_insert(HeaderValue::from_static("*/*"));
        let agent = HeaderValue::from_static(concat!("Laneway/", env!("CARGO_PKG_VERSION")));
        headers.entry(USER_AGENT).or_insert(agent);
        take_credentials(&mut url, &mut headers);
        let uri = uri(&url)?;
        Ok(Self { method, url, uri, headers, body: request.body.clone() })
    }

    /// The request for the HTTP client.
    pub(super) fn request(&self) -> Request<Full<Bytes>> {
        let mut request = Request::new(Full::new(self.body.clone()));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        *request.headers_mut() = self.headers.clone();
        request
    }

    /// The same request for another URL. What is configured for one origin, keys among it, is not for another.
    ///
    /// # Errors
    /// [`Unbuildable`]: a redirect from https to anything else would send body and credentials in clear text.
    pub(super) fn redirect(&mut self, mut to: Url) -> Result<(), Unbuildable> {
        if self.url.scheme() == "https" && to.scheme() != "https" {
            return Err(Unbuildable(
                "redirected from https to http, which would send the event in clear text".to_owned(),
            ));
        }
        if to.origin() != self.url.origin() {
            let keeps = [CONTENT_TYPE.as_str(), ACCEPT.as_str(), USER_AGENT.as_str(), IDEMPOTENCY_KEY];
            let own: Vec<HeaderName> =
                self.headers.keys().filter(|name| !keeps.contains(&name.as_str())).cloned().collect();
            own.iter().for_each(|name| drop(self.headers.remove(name)));
        }
        take_credentials(&mut to, &mut self.headers);
        self.uri = uri(&to)?;
        self.url = to;
        Ok(())
    }
}

fn headers(request: &HttpRequest) -> Result<HeaderMap, Unbuildable> {
    let bytes: usize = request.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
    let count = request.headers.len();
    if count > MAX_HEADERS || bytes > MAX_HEADER_BYTES {
        let most = format!("more than {MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes");
        return Err(Unbuildable(format!("the request has {count} headers with {bytes} bytes: {most} are not sent")));
    }
    let mut headers = HeaderMap::with_capacity(count + 4);
    for (name, value) in &request.headers {
        let unusable = |what: &str| Unbuildable(format!("the {what} of header {name:?} is not a valid one"));
        let parsed = HeaderName::from_bytes(name.as_bytes()).map_err(|_| unusable("name"))?;
        let value = HeaderValue::from_str(value.trim()).map_err(|_| unusable("value"))?;
        headers.append(parsed, value);
    }
    Ok(headers)
}

/// User and password of a URL go into a header, as browsers and curl do it. A configured header has precedence.
fn take_credentials(url: &mut Url, headers: &mut HeaderMap) {
    use base64::Engine;
    if url.username().is_empty() && url.password().is_none() {
        return;
    }
    let decode = |text: &str| {
        // The pair is `=` and the text, so that the text is decoded as a form's value. A plus sign stays one.
        let pair = format!("={}", text.replace('+', "%2B").replace('&', "%26"));
        url::form_urlencoded::parse(pair.as_bytes()).next().map(|(_, value)| value.into_owned()).unwrap_or_default()
    };
    let both = format!("{}:{}", decode(url.username()), decode(url.password().unwrap_or_default()));
    let basic = format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(both));
    if let Ok(mut value) = HeaderValue::from_str(&basic) {
        value.set_sensitive(true);
        headers.entry(AUTHORIZATION).or_insert(value);
    }
    // Neither fails where the URL has a host.
    let _ = url.set_username("");
    let _ = url.set_password(None);
}

/// The URL for the HTTP client, which takes fewer than `Url`: not those over 64 KiB, nor hosts with signs such as `{`.
fn uri(url: &Url) -> Result<Uri, Unbuildable> {
    if !matches!(url.scheme(), "http" | "https") {
        return Err(Unbuildable(format!("the URL's scheme {:?} is neither http nor https", url.scheme())));
    }
    let uri = Uri::try_from(url.as_str());
    uri.map_err(|error| {
        Unbuildable(format!("no request can be sent to the URL, which has {} bytes: {error}", url.as_str().len()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::delivery::BodyFormat;

    fn prepared(url: &str, params: Vec<(String, String)>, headers: Vec<(String, String)>) -> Result<Prepared, String> {
        let (method, body) = ("POST".to_owned(), Bytes::from_static(b"{}"));
        let request = HttpRequest { method, url: url.to_owned(), headers, params, body_format: BodyFormat::Json, body };
        Prepared::new(&request, &"d-1".into()).map_err(|error| error.0)
    }

    #[test]
    fn a_request_that_cannot_be_sent_says_why_and_not_where() {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let long = format!("https://hook.test/key?{}", "a".repeat(70_000));
        let many: Vec<_> = (0..30_000).map(|n| pair(&format!("x{n}"), "1")).collect();
        let cases = [
            (prepared("https://{{host}}/key", vec![], vec![]), "no request can be sent to the URL"),
            (prepared(&long, vec![], vec![]), "which has 700"),
            (prepared("https://hook.test/key", vec![pair("a", &"b".repeat(70_000))], vec![]), "which has 700"),
            (prepared("key", vec![], vec![]), "the destination's URL is wrong"),
            (prepared("ftp://hook.test/key", vec![], vec![]), "neither http nor https"),
            (prepared("https://hook.test/key", vec![], many), "the request has 30000 headers"),
            (prepared("https://hook.test/key", vec![], vec![pair("a b", "")]), "the name of header \"a b\""),
            (prepared("https://hook.test/key", vec![], vec![pair("a", "b\nc")]), "the value of header \"a\""),
        ];
        for (found, expected) in cases {
            let found = found.err().expect("refused");
            assert!(found.contains(expected) && !found.contains("key"), "{expected}: {found}");
        }
    }

    #[test]
    fn credentials_of_a_url_are_sent_as_a_header() {
        let found = prepared("https://a%40b:c%3Ad+&e@hook.test/x", vec![], vec![]).expect("built");
        assert_eq!(found.headers[AUTHORIZATION], "Basic YUBiOmM6ZCsmZQ==");
        assert_eq!(found.uri, "https://hook.test/x");
        let own = vec![("authorization".to_owned(), "Bearer t".to_owned())];
        assert_eq!(prepared("https://a:b@hook.test/x", vec![], own).expect("built").headers[AUTHORIZATION], "Bearer t");
    }

    #[test]
    fn a_redirect_never_leaves_tls() {
        let own = vec![("authorization".to_owned(), "Bearer t".to_owned())];
        let mut found = prepared("https://hook.test/x", vec![], own).expect("built");
        found.redirect(Url::parse("https://hook.test/y").expect("a URL")).expect("followed");
        assert!(found.headers.contains_key(AUTHORIZATION));
        found.redirect(Url::parse("https://other.test/").expect("a URL")).expect("followed");
        assert!(!found.headers.contains_key(AUTHORIZATION) && found.headers.contains_key("idempotency-key"));
        assert!(found.redirect(Url::parse("http://other.test/").expect("a URL")).is_err());
    }
}
