//! The HTTP API, as `docs/api.md` and `/openapi.json` describe it.
//!
//! Knows neither terminals nor pages: those routes are merged in by the gateway.
use std::{borrow::Cow, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{Request, State},
    http::{HeaderValue, header},
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
};
use futures_util::FutureExt as _;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use utoipa::{
    Modify, OpenApi,
    openapi::security::{Http, HttpAuthScheme, SecurityScheme},
};
use utoipa_axum::{router::OpenApiRouter, routes};

pub use self::create::{CreateError, start};
use self::error::ApiError;
pub use self::origin::Origins;
use crate::{access::Auth, environment::Environment, lifecycle::Lifecycle, store::Store};

pub(crate) mod body;
pub(crate) mod create;
mod error;
mod exam;
mod extract;
mod health;
mod origin;
mod session;
mod status;

/// A request is answered within this, whatever the database does.
const ANSWER_WITHIN: Duration = Duration::from_millis(9500);
/// Requests at once; more are told to come back.
const AT_ONCE: usize = 512;
/// Status WebSockets at once; more are told to come back.
const SOCKETS: usize = 8192;

/// How the server is reached, as answers tell it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Public {
    /// `http(s)://host[:port]` with no slash at its end.
    pub url: String,
    /// For ssh clients, without brackets.
    pub ssh_host: String,
    /// For ssh clients.
    pub ssh_port: u16,
    /// `SHA256:…`.
    pub host_key_fingerprint: String,
    /// A line for `known_hosts`.
    pub known_hosts: String,
}

impl Public {
    /// The URL with the scheme of WebSockets.
    fn web_socket_url(&self) -> String {
        match self.url.split_once("://") {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("https") => format!("wss://{rest}"),
            Some((_, rest)) => format!("ws://{rest}"),
            None => self.url.clone(),
        }
    }
}

/// What all requests share. Clones are the same.
#[derive(Clone)]
pub struct ApiState(Arc<Shared>);

#[derive(Clone)]
struct Shared {
    store: Store,
    lifecycle: Arc<Lifecycle>,
    auth: Arc<Auth>,
    public: Public,
    environment: Option<Arc<dyn Environment>>,
    origins: Origins,
    shutdown: CancellationToken,
    places: Arc<Semaphore>,
    sockets: Arc<Semaphore>,
    counted: Arc<Mutex<health::Counted>>,
}

impl ApiState {
    /// For one server.
    #[must_use]
    pub fn new(store: Store, lifecycle: Arc<Lifecycle>, auth: Arc<Auth>, public: Public) -> Self {
        let origins = Origins::new([public.url.as_str()]);
        Self(Arc::new(Shared {
            store,
            lifecycle,
            auth,
            public,
            environment: None,
            origins,
            shutdown: CancellationToken::new(),
            places: Arc::new(Semaphore::new(AT_ONCE)),
            sockets: Arc::new(Semaphore::new(SOCKETS)),
            counted: Arc::default(),
        }))
    }

    /// Readiness asks this too, and no session is made while it cannot be had.
    #[must_use]
    pub fn with_environment(mut self, environment: Arc<dyn Environment>) -> Self {
        Arc::make_mut(&mut self.0).environment = Some(environment);
        self
    }

    /// Further origins whose pages may open WebSockets, beside the public URL's.
    #[must_use]
    pub fn with_allowed_origins(mut self, allowed: &[String]) -> Self {
        let shared = Arc::make_mut(&mut self.0);
        let urls = allowed.iter().map(String::as_str).chain([shared.public.url.as_str()]);
        shared.origins = Origins::new(urls);
        self
    }

    /// Open WebSockets are told to come back when this is cancelled.
    #[must_use]
    pub fn with_shutdown(mut self, shutdown: CancellationToken) -> Self {
        Arc::make_mut(&mut self.0).shutdown = shutdown;
        self
    }

    fn store(&self) -> &Store {
        &self.0.store
    }

    fn lifecycle(&self) -> &Lifecycle {
        &self.0.lifecycle
    }

    fn auth(&self) -> &Auth {
        &self.0.auth
    }

    fn public(&self) -> &Public {
        &self.0.public
    }

    fn origins(&self) -> &Origins {
        &self.0.origins
    }

    fn shutdown(&self) -> &CancellationToken {
        &self.0.shutdown
    }

    fn counted(&self) -> &Mutex<health::Counted> {
        &self.0.counted
    }

    fn socket_place(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.0.sockets).try_acquire_owned().ok()
    }

    /// Can environments be had now?
    fn provisions(&self) -> Result<(), ApiError> {
        let Some(environment) = &self.0.environment else { return Ok(()) };
        let seen = environment.observe();
        let seen = seen.borrow();
        if let Some(cause) = &seen.unavailable {
            return Err(ApiError::BackendUnavailable(Cow::Owned(cause.clone())));
        }
        if !seen.complete {
            return Err(ApiError::NotReady(Cow::Borrowed(
                "the server has just started; try again in a moment",
            )));
        }
        Ok(())
    }
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Carrel",
        description = "Exam sessions: an isolated shell for each candidate, by SSH and in the browser.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    modifiers(&Bearer),
)]
struct Document;

struct Bearer;

impl Modify for Bearer {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let mut scheme = Http::new(HttpAuthScheme::Bearer);
        scheme.description = Some("An API key, or a signed token (JWT) of a person.".to_owned());
        document
            .components
            .get_or_insert_default()
            .add_security_scheme("bearer", SecurityScheme::Http(scheme));
    }
}

fn routes() -> OpenApiRouter<ApiState> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(session::post))
        .routes(routes!(session::active))
        .routes(routes!(session::get))
        .routes(routes!(status::get))
        .routes(routes!(session::submit))
        .routes(routes!(session::terminate))
        .routes(routes!(session::ticket))
        .routes(routes!(exam::list))
        .routes(routes!(exam::get, exam::put))
        .routes(routes!(health::alive))
        .routes(routes!(health::ready))
        .routes(routes!(health::metrics))
}

/// The description of the API, as served at `/openapi.json`.
#[must_use]
pub fn openapi() -> utoipa::openapi::OpenApi {
    routes().into_openapi()
}

/// The routes. Answers everything else with 404 in the API's form, also when other routers are merged in.
pub fn router(state: ApiState) -> Router {
    let (router, document) = routes().split_for_parts();
    let document: Arc<str> = document.to_json().unwrap_or_default().into();
    let described = move || async move {
        ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], document.to_string())
    };
    router
        .route("/openapi.json", axum::routing::get(described))
        .method_not_allowed_fallback(|| async { ApiError::MethodNotAllowed })
        .fallback(|| async { ApiError::NotFound })
        .layer(middleware::from_fn_with_state(state.clone(), guard))
        .with_state(state)
}

/// Around every request: a place, a deadline, and a net under panics.
async fn guard(State(state): State<ApiState>, request: Request, next: Next) -> Response {
    // Whoever asks whether the server lives is not turned away by a crowd.
    let watched = request.uri().path().starts_with("/v1/");
    let place = Arc::clone(&state.0.places).try_acquire_owned();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let response = if watched && place.is_err() {
        ApiError::Overloaded.into_response()
    } else {
        answered(next.run(request)).await
    };
    tracing::debug!(%method, path, status = response.status().as_u16(), "request");
    state.auth().metrics().request(response.status().as_u16());
    response
}

/// The answer, or why there is none.
async fn answered(answer: impl Future<Output = Response>) -> Response {
    match tokio::time::timeout(ANSWER_WITHIN, AssertUnwindSafe(answer).catch_unwind()).await {
        Ok(Ok(response)) => response,
        Ok(Err(_)) => {
            tracing::error!("a request's handler panicked");
            ApiError::Internal.into_response()
        }
        Err(_) => {
            tracing::warn!("a request was not answered in time");
            ApiError::DATABASE.into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::panic)]
    use super::*;

    #[tokio::test]
    async fn a_handler_that_panics_is_an_internal_error() {
        let response = answered(async { panic!("on purpose") }).await;
        assert_eq!(response.status(), 500);
    }

    #[tokio::test(start_paused = true)]
    async fn a_handler_that_never_answers_is_a_backend_that_is_away() {
        let response = answered(std::future::pending()).await;
        assert_eq!(response.status(), 503);
        assert!(response.headers().contains_key(header::RETRY_AFTER));
    }
}
