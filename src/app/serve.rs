//! Serving HTTP: connections that come and go, with bounds in time, until the process is told to stop.

use std::convert::Infallible;
use std::net::SocketAddr;
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

use crate::clock::Clock;
use crate::runtime::shutdown::Shutdown;
use crate::telemetry::seldom;

/// A listener that cannot accept (no file descriptors are left, mostly) is asked again after so long.
const AGAIN: Duration = Duration::from_secs(1);
/// Of a request's head, in bytes.
const MAX_HEAD: usize = 512 * 1024;
/// Requests at a time on one connection of HTTP/2.
const STREAMS: u32 = 250;

/// Serves until shutdown, then lets open requests end within the budget. The head of a request has to come within `idle`, also of the
/// next one on a connection that is kept.
///
/// # Errors
/// None; what goes wrong with a connection ends it alone.
pub async fn serve(listener: TcpListener, routes: Router, idle: Duration, shutdown: Shutdown) -> std::io::Result<()> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(idle).max_buf_size(MAX_HEAD);
    let http2 = &mut builder.http2();
    http2.timer(TokioTimer::new()).keep_alive_interval(idle).keep_alive_timeout(idle).max_concurrent_streams(STREAMS);
    let graceful = GracefulShutdown::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = shutdown.begun() => break,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                refused(&error).await;
                continue;
            }
        };
        let connection = builder
            .serve_connection(TokioIo::new(prepared(stream)), Peer { routes: routes.clone(), address: peer })
            .into_owned();
        let watched = graceful.watch(connection);
        // How a connection ends is the client's affair.
        tokio::spawn(async move { drop(watched.await) });
    }
    drop(listener);
    let budget = Clock::system();
    tokio::select! {
        () = graceful.shutdown() => {}
        () = budget.sleep(shutdown.budget) => {}
    }
    Ok(())
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
