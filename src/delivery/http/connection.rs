//! Connections to destinations that know what was read from them, so that a failed request can be judged: whether it may be sent again at
//! once, and which status the destination had already sent.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::http::Uri;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tower_service::Service;

use super::guard::Guard;
use crate::clock::Clock;

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type Plain = TokioIo<TcpStream>;

/// Of an answer, enough for `HTTP/1.1 200`.
const STATUS_BYTES: usize = 12;
/// Of a request's head that is kept, to find its id in it. A request with a longer head before its id is judged as any that failed.
const MAX_HEAD_BYTES: usize = 4 << 10;
/// How the head of a request begins.
const METHODS: [&[u8]; 7] = [b"POST ", b"PUT ", b"PATCH ", b"GET ", b"DELETE ", b"HEAD ", b"OPTIONS "];

/// What was read from a connection.
#[derive(Clone)]
pub(super) struct Wire {
    opened: Instant,
    clock: Clock,
    heard: Arc<Mutex<Heard>>,
}

/// Of the request whose head was written last. Only HTTP/1 has such heads: over HTTP/2 just `last_read` is used.
#[derive(Default)]
struct Heard {
    /// The head as far as it was written at once.
    head: Vec<u8>,
    /// What was read since.
    bytes: u64,
    start: [u8; STATUS_BYTES],
    last_read: Option<Instant>,
}

impl Wire {
    fn new(clock: Clock) -> Self {
        Self { opened: clock.instant(), clock, heard: Arc::default() }
    }

    /// Whether the request with this id, which began at this time, was sent on a connection that was open before, and got no byte
    /// of an answer from it. `id`: the value of a header that no other delivery's request has.
    pub(super) fn was_reused_and_silent(&self, id: &[u8], began: Instant, is_http2: bool) -> bool {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let is_silent = match is_http2 {
            true => heard.last_read.is_none_or(|last| last < began),
            false => heard.is_of(id) && heard.bytes == 0,
        };
        self.opened < began && is_silent
    }

    /// The final status of an HTTP/1 answer that began, whatever came after it. None where the last request on this connection is
    /// another one: one that was given the connection may not have been sent on it.
    pub(super) fn status(&self, id: &[u8]) -> Option<u16> {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        if heard.bytes < STATUS_BYTES as u64 || !heard.is_of(id) {
            return None;
        }
        let rest = heard.start.strip_prefix(b"HTTP/1.0 ").or_else(|| heard.start.strip_prefix(b"HTTP/1.1 "))?;
        let code: u16 = std::str::from_utf8(rest).ok()?.parse().ok()?;
        (200..=599).contains(&code).then_some(code)
    }

    fn read(&self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let known = usize::try_from(heard.bytes).unwrap_or(usize::MAX).min(STATUS_BYTES);
        let more = bytes.len().min(STATUS_BYTES - known);
        heard.start[known..known + more].copy_from_slice(&bytes[..more]);
        heard.bytes += bytes.len() as u64;
        heard.last_read = Some(self.clock.instant());
    }

    /// The client begins to write these bytes. Those of a body are part of the request before.
    fn write(&self, bytes: &[u8]) {
        if !METHODS.iter().any(|method| bytes.starts_with(method)) {
            return;
        }
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.bytes = 0;
        heard.head.clear();
        heard.head.extend_from_slice(&bytes[..bytes.len().min(MAX_HEAD_BYTES)]);
    }
}

impl Heard {
    fn is_of(&self, id: &[u8]) -> bool {
        !id.is_empty() && self.head.windows(id.len()).any(|part| part == id)
    }
}

/// Opens connections: names through the guard, TLS where the URL asks for it.
#[derive(Clone)]
pub(super) struct Connector {
    inner: HttpsConnector<HttpConnector<Guard>>,
    /// For name, connection and TLS handshake together.
    timeout: Duration,
    clock: Clock,
}

impl Connector {
    /// # Errors
    /// Where the system's certificates cannot be used.
    pub(super) fn new(guard: Guard, timeout: Duration, http2: bool, clock: Clock) -> io::Result<Self> {
        let mut plain = HttpConnector::new_with_resolver(guard);
        plain.set_nodelay(true);
        plain.set_connect_timeout(Some(timeout));
        plain.enforce_http(false);
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let builder =
            HttpsConnectorBuilder::new().with_provider_and_platform_verifier(provider)?.https_or_http().enable_http1();
        let inner = match http2 {
            true => builder.enable_http2().wrap_connector(plain),
            false => builder.wrap_connector(plain),
        };
        Ok(Self { inner, timeout, clock })
    }
}

impl Service<Uri> for Connector {
    type Response = Watched;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Watched, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        let (connecting, timeout, clock) = (self.inner.call(to), self.timeout, self.clock.clone());
        Box::pin(async move {
            let late = |_| io::Error::new(io::ErrorKind::TimedOut, format!("no connection within {timeout:?}"));
            let stream = tokio::time::timeout(timeout, connecting).await.map_err(late)??;
            Ok(Watched { stream, wire: Wire::new(clock) })
        })
    }
}

/// A connection that notes what is read from it.
pub(super) struct Watched {
    stream: MaybeHttpsStream<Plain>,
    wire: Wire,
}

impl Connection for Watched {
    fn connected(&self) -> Connected {
        self.stream.connected().extra(self.wire.clone())
    }
}

impl Read for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        mut into: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        // What was read has to be looked at, and a cursor shows only what is free.
        let mut chunk = [0; 8 << 10];
        let room = into.remaining().min(chunk.len());
        let mut read = hyper::rt::ReadBuf::new(&mut chunk[..room]);
        match Pin::new(&mut self.stream).poll_read(context, read.unfilled()) {
            Poll::Ready(Ok(())) => {
                self.wire.read(read.filled());
                into.put_slice(read.filled());
                Poll::Ready(Ok(()))
            }
            other => other,
        }
    }
}

impl Write for Watched {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.wire.write(bytes);
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let Some(first) = parts.iter().find(|part| !part.is_empty()) {
            self.wire.write(first);
        }
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire() -> (Wire, Instant) {
        let wire = Wire::new(Clock::system());
        let began = wire.opened + Duration::from_secs(1);
        (wire, began)
    }

    #[test]
    fn an_answer_belongs_to_the_request_that_was_written() {
        let (wire, began) = wire();
        wire.write(b"POST / HTTP/1.1\r\nidempotency-key: one\r\n\r\n{}");
        wire.read(b"HTTP/1.1 200 OK\r\n");
        assert_eq!(wire.status(b"one"), Some(200));
        // The next request was given the connection, and was never written.
        assert_eq!(wire.status(b"two"), None);
        assert!(!wire.was_reused_and_silent(b"two", began, false));
        wire.write(b"POST / HTTP/1.1\r\nidempotency-key: two\r\n\r\n{}");
        assert_eq!((wire.status(b"one"), wire.status(b"two")), (None, None));
        wire.read(b"");
        assert!(wire.was_reused_and_silent(b"two", began, false), "the end of a connection is no answer");
        assert!(!wire.was_reused_and_silent(b"two", wire.opened, false), "it was opened for this request");
    }

    #[test]
    fn an_answer_that_begins_while_the_body_is_written_is_one() {
        let (wire, began) = wire();
        wire.write(b"PUT / HTTP/1.1\r\nidempotency-key: one\r\n\r\n{\"a");
        wire.read(b"HTTP/1.1 2");
        wire.write(b"\":1}");
        assert!(!wire.was_reused_and_silent(b"one", began, false));
        wire.read(b"00 OK\r\n");
        assert_eq!(wire.status(b"one"), Some(200));
    }
}
