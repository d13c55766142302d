//! Serving HTTP: connections that come and go, with bounds in time, until the process is told to stop.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::http::Request;
use axum::response::Response;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::clock::Clock;
use crate::runtime::shutdown::Shutdown;
use crate::telemetry::seldom;

/// A listener that cannot accept (no file descriptors are left, mostly) is asked again after so long.
const AGAIN: Duration = Duration::from_secs(1);
/// Of a request's head. Heads are not counted by the gateway's memory limit, and a client may send most of one and stop. An HTTP/1 request with a
/// longer head is answered with 431.
const MAX_HEAD_BYTES: u32 = 32 << 10;
/// What a connection of HTTP/2 begins with.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const LOOK: Duration = Duration::from_millis(20);
/// Requests at a time on one connection of HTTP/2.
const STREAMS: u32 = 250;

/// How much a listener bears.
#[derive(Clone, Copy, Debug)]
pub struct Admittance {
    /// The head of a request has to come within this time, also of the next one on a connection that is kept.
    pub idle: Duration,
    /// Connections at a time; more wait to be accepted.
    pub connections: usize,
}

/// Serves until shutdown, then lets open requests end within the budget.
///
/// # Errors
/// None; what goes wrong with a connection ends it alone.
pub async fn serve(
    listener: TcpListener,
    routes: Router,
    admittance: Admittance,
    shutdown: Shutdown,
) -> std::io::Result<()> {
    let idle = admittance.idle;
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(idle).max_buf_size(MAX_HEAD_BYTES as usize);
    let http2 = &mut builder.http2();
    http2.timer(TokioTimer::new()).keep_alive_interval(idle).keep_alive_timeout(idle).max_concurrent_streams(STREAMS);
    http2.max_header_list_size(MAX_HEAD_BYTES);
    let graceful = GracefulShutdown::new();
    let seats = Arc::new(Semaphore::new(admittance.connections));
    loop {
        let accept = async { (Arc::clone(&seats).acquire_owned().await, listener.accept().await) };
        let (seat, accepted) = tokio::select! {
            biased;
            () = shutdown.begun() => break,
            accepted = accept => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                refused(&error).await;
                continue;
            }
        };
        let (builder, routes) = (builder.clone(), routes.clone());
        let (watcher, stop) = (graceful.watcher(), shutdown.clone());
        tokio::spawn(async move {
            let _seat = seat;
            let begins = tokio::select! {
                biased;
                begins = tokio::time::timeout(idle, begins(&stream)) => begins.is_ok(),
                () = stop.begun() => false,
            };
            if begins {
                let peer = Peer { routes, address: peer };
                let connection = builder.serve_connection(TokioIo::new(prepared(stream)), peer).into_owned();
                // How a connection ends is the client's affair.
                drop(watcher.watch(connection).await);
            }
        });
    }
    drop(listener);
    let budget = Clock::system();
    tokio::select! {
        () = graceful.shutdown() => {}
        () = budget.sleep(shutdown.budget) => {}
    }
    Ok(())
}

/// Waits until it can be told which protocol is spoken: what serves connections would wait for that for ever.
async fn begins(stream: &TcpStream) {
    let mut first = [0; PREFACE.len()];
    while let Ok(count) = stream.peek(&mut first).await {
        if count == 0 || count == PREFACE.len() || !PREFACE.starts_with(&first[..count]) {
            return;
        }
        Clock::system().sleep(LOOK).await;
    }
}

fn prepared(stream: TcpStream) -> TcpStream {
    // Answers are small; waiting to join packets would only delay them.
    let _ = stream.set_nodelay(true);
    stream
}

/// What answers on one connection: the routes, told who is at its other end.
struct Peer {
    routes: Router,
    address: SocketAddr,
}

impl hyper::service::Service<Request<Incoming>> for Peer {
    type Response = Response;
    type Error = Infallible;
    type Future = <Router as tower_service::Service<Request<Body>>>::Future;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(ConnectInfo(self.address));
        // Clones share everything.
        tower_service::Service::call(&mut self.routes.clone(), request)
    }
}

/// A client that has gone again is nothing; anything else will be the same at once.
async fn refused(error: &std::io::Error) {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    if matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset) {
        return;
    }
    if let Some(left_out) = seldom::due("connections not accepted", &error.to_string()) {
        tracing::error!(%error, left_out, "connections not accepted");
    }
    Clock::system().sleep(AGAIN).await;
}
