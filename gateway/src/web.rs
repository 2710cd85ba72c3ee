//! The browser's way in: the page, its login, and the terminal's WebSocket. `docs/websocket.md` describes the frames.
//!
//! This module does not decide who may come in nor when a session ends.
use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{any, get, post},
};
use carrel_api::{
    credential::Auth,
    http::{Origins, Public},
};
use tokio::{sync::Semaphore, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::bridge::Bridge;

mod attachment;
mod close;
mod frame;
mod login;
mod page;
mod terminal;
mod utf8;

/// WebSockets at once that have not shown a credential yet; further ones are told to come back.
const STRANGERS: usize = 512;
/// After the server's end is asked for, open terminals have this long for their last words.
const DRAIN: Duration = Duration::from_secs(6);

/// What the browser's routes share. Clones are the same.
#[derive(Clone)]
pub struct WebState(Arc<Web>);

struct Web {
    auth: Arc<Auth>,
    bridge: Arc<Bridge>,
    origins: Origins,
    /// Browsers come by https: cookies stay there.
    secure: bool,
    strangers: Arc<Semaphore>,
    sockets: TaskTracker,
    shutdown: CancellationToken,
}

impl WebState {
    /// `allowed_origins` are those of further pages that may open a terminal, beside the public URL's own.
    pub fn new(
        auth: Arc<Auth>,
        bridge: Arc<Bridge>,
        public: &Public,
        allowed_origins: &[String],
        shutdown: CancellationToken,
    ) -> Self {
        let urls = allowed_origins.iter().map(String::as_str).chain([public.url.as_str()]);
        Self(Arc::new(Web {
            auth,
            bridge,
            origins: Origins::new(urls),
            secure: public.url.to_ascii_lowercase().starts_with("https:"),
            strangers: Arc::new(Semaphore::new(STRANGERS)),
            sockets: TaskTracker::new(),
            shutdown,
        }))
    }

    /// Resolves once the server's end was asked for and the open terminals have had their last words.
    pub async fn ended(self) {
        self.0.shutdown.cancelled().await;
        self.0.sockets.close();
        if timeout(DRAIN, self.0.sockets.wait()).await.is_err() {
            tracing::warn!(left = self.0.sockets.len(), "some terminals did not end in time");
        }
    }
}

/// The routes, to be merged with the API's.
pub fn router(state: WebState) -> Router {
    Router::new()
        .route("/session/{session_id}", get(page::page))
        .route("/session/{session_id}/login", post(login::login))
        .route("/assets/{file}", get(page::asset))
        // Any method: over HTTP/2 a WebSocket is a CONNECT.
        .route("/v1/sessions/{session_id}/terminal", any(terminal::terminal))
        .with_state(state)
}

/// An error in the API's form.
fn error(status: StatusCode, code: &'static str, message: &'static str) -> Response {
    let body = serde_json::json!({"success": false, "error": {"code": code, "message": message}});
    (status, axum::Json(body)).into_response()
}
