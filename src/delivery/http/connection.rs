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

/// What was read from a connection.
#[derive(Clone)]
pub(super) struct Wire {
    opened: Instant,
    clock: Clock,
    heard: Arc<Mutex<Heard>>,
}

/// Since the last write. A client over HTTP/1 writes nothing while it reads, so this is the answer to the request that was written last.
#[derive(Default)]
struct Heard {
    bytes: u64,
    start: [u8; STATUS_BYTES],
    last: Option<Instant>,
}

impl Wire {
    fn new(clock: Clock) -> Self {
        Self { opened: clock.instant(), clock, heard: Arc::default() }
    }

    /// Whether a request that began at this time found the connection open, and got no byte of an answer from it.
    pub(super) fn was_reused_and_silent(&self, began: Instant, is_http2: bool) -> bool {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let is_silent = match is_http2 {
            true => heard.last.is_none_or(|last| last < began),
            false => heard.bytes == 0,
        };
        self.opened < began && is_silent
    }

    /// The final status of an HTTP/1 answer that began, whatever came after it.
    pub(super) fn status(&self) -> Option<u16> {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        if heard.bytes < STATUS_BYTES as u64 {
            return None;
        }
        let rest = heard.start.strip_prefix(b"HTTP/1.0 ").or_else(|| heard.start.strip_prefix(b"HTTP/1.1 "))?;
        let code: u16 = std::str::from_utf8(rest).ok()?.parse().ok()?;
        (200..=599).contains(&code).then_some(code)
    }

    fn read(&self, bytes: &[u8]) {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let known = usize::try_from(heard.bytes).unwrap_or(usize::MAX).min(STATUS_BYTES);
        let more = bytes.len().min(STATUS_BYTES - known);
        heard.start[known..known + more].copy_from_slice(&bytes[..more]);
        heard.bytes += bytes.len() as u64;
        heard.last = Some(self.clock.instant());
    }

    fn written(&self) {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).bytes = 0;
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
        self.wire.written();
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
        self.wire.written();
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }
}
