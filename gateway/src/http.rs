//! The loop that accepts HTTP connections. It sets what `axum::serve` does not: a limit on connections, a deadline
//! for headers, and an orderly end. HTTP/1.1 only: telling the versions apart by their first bytes has no deadline, and
//! what terminates TLS in front of it speaks HTTP/2 to browsers.
use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, extract::ConnectInfo};
use hyper::server::conn::http1::Builder;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{net::TcpListener, sync::Semaphore, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Connections at once; more wait in the kernel's queue.
const CONNECTIONS: usize = 16_384;
/// From a connection's start, or the end of a request, to the end of the next request's headers.
const HEADER_DEADLINE: Duration = Duration::from_secs(10);
/// Header bytes of a request.
const HEADER_BYTES: usize = 64 << 10;
/// After the server's end is asked for, requests have this long.
const DRAIN: Duration = Duration::from_secs(5);
/// After an error of `accept` (no file descriptors, mostly).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves `router` on `listener` until `shutdown`.
pub async fn serve(listener: TcpListener, router: Router, shutdown: CancellationToken) {
    let mut builder = Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEADER_DEADLINE).max_buf_size(HEADER_BYTES);
    let builder = Arc::new(builder);
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let connections = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = async {
                let place = Arc::clone(&places).acquire_owned().await;
                (listener.accept().await, place)
            } => accepted,
        };
        let (stream, peer) = match accepted {
            (Ok((stream, peer)), Ok(place)) => ((stream, place), peer),
            (Err(error), _) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
            (_, Err(_)) => break,
        };
        connections.spawn(connection(Arc::clone(&builder), stream, peer, router.clone(), shutdown.clone()));
    }
    drop(listener);
    connections.close();
    if timeout(DRAIN, connections.wait()).await.is_err() {
        tracing::warn!(left = connections.len(), "some HTTP connections did not end in time");
    }
}

async fn connection(
    builder: Arc<Builder>,
    (stream, _place): (tokio::net::TcpStream, tokio::sync::OwnedSemaphorePermit),
    peer: SocketAddr,
    router: Router,
    shutdown: CancellationToken,
) {
    // A keystroke's echo is one small write.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY could not be set");
    }
    let service = TowerToHyperService::new(router.layer(axum::Extension(ConnectInfo(peer))));
    let connection = builder.serve_connection(TokioIo::new(stream), service).with_upgrades();
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "an HTTP connection ended early");
    }
}
