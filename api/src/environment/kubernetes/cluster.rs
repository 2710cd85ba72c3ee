//! The API server: how it is reached, how long it may take, and what its answers mean. Does not know pods' contents.
use std::{fmt, future::Future, time::Duration};

use http::{HeaderValue, Request, header::SEC_WEBSOCKET_PROTOCOL};
use hyper_util::{
    client::legacy::{Client as HttpClient, connect::HttpConnector},
    rt::TokioExecutor,
};
use k8s_openapi::api::{
    core::v1::{Event, Pod},
    networking::v1::NetworkPolicy,
};
use kube::{
    Api, Client, Config,
    client::{Body, ClientBuilder, ConfigExt},
    config::{KubeConfigOptions, Kubeconfig},
    core::Status,
};
use rand::RngExt;
use tokio::time::timeout;
use tower::{
    BoxError,
    util::{MapErr, MapRequest},
};

use super::KubernetesOptions;
use crate::{
    environment::EnvironmentError,
    reason::{Reason, ReasonCode},
};

/// One call to the API server, from the connection to the last byte of the answer.
const CALL: Duration = Duration::from_secs(4);
/// Attempts at one call.
const ATTEMPTS: u32 = 3;
/// Wait before the second attempt; doubled for the third, and up to half of it more by chance.
const BACKOFF: Duration = Duration::from_millis(200);
/// What of a message that comes from outside is kept, characters.
const MESSAGE: usize = 500;

/// Why a call has no result.
#[derive(Debug)]
pub(super) enum Fault {
    /// No answer, or one that says "later".
    Unavailable(String),
    /// The answer is no.
    Answer(Box<Status>),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unavailable(why) => f.write_str(why),
            Self::Answer(status) => f.write_str(&plain(&status.message)),
        }
    }
}

impl Fault {
    pub(super) fn is_not_found(&self) -> bool {
        matches!(self, Self::Answer(status) if status.code == 404)
    }

    pub(super) fn is_conflict(&self) -> bool {
        matches!(self, Self::Answer(status) if status.code == 409)
    }

    pub(super) fn is_already_there(&self) -> bool {
        matches!(self, Self::Answer(status) if status.code == 409 && status.reason == "AlreadyExists")
    }

    /// For callers above this module. A full quota is a reason of its own; any other refusal is a fault of the deployment.
    pub(super) fn into_error(self, what: &str) -> EnvironmentError {
        match self {
            Self::Unavailable(why) => EnvironmentError::Unavailable(format!("{what}: {why}")),
            Self::Answer(status) => {
                let code = if status.code == 403 && status.message.contains("exceeded quota") {
                    ReasonCode::QuotaExceeded
                } else {
                    ReasonCode::Internal
                };
                let details = format!("{what}: Kubernetes refuses it: {}", plain(&status.message));
                EnvironmentError::Refused(Reason::new(code, details))
            }
        }
    }
}

/// A connection to one namespace of one cluster.
pub(super) struct Cluster {
    pub(super) client: Client,
    pub(super) namespace: String,
    pub(super) server: String,
    pub(super) pods: Api<Pod>,
    pub(super) policies: Api<NetworkPolicy>,
    pub(super) events: Api<Event>,
}

impl Cluster {
    /// Reads where the cluster is; does not call it yet. Needs a Tokio runtime.
    pub(super) async fn new(options: &KubernetesOptions) -> Result<Self, EnvironmentError> {
        let unusable = |error: &dyn std::error::Error| {
            EnvironmentError::Unavailable(format!(
                "no usable cluster configuration: {}; `kubectl config view` shows what is there",
                chain(error)
            ))
        };
        let config = match &options.kubeconfig {
            Some(file) => {
                let read = Kubeconfig::read_from(file).map_err(|error| unusable(&error))?;
                Config::from_custom_kubeconfig(read, &KubeConfigOptions::default())
                    .await
                    .map_err(|error| unusable(&error))?
            }
            None => Config::infer().await.map_err(|error| unusable(&error))?,
        };
        let client = client(&config).map_err(|error| unusable(&error))?;
        let namespace = options.namespace.clone();
        Ok(Self {
            server: config.cluster_url.to_string(),
            pods: Api::namespaced(client.clone(), &namespace),
            policies: Api::namespaced(client.clone(), &namespace),
            events: Api::namespaced(client.clone(), &namespace),
            client,
            namespace,
        })
    }

    /// Makes a call, each attempt within its own time, and again when there was no answer or one that may change.
    pub(super) async fn call<T, F>(&self, call: impl Fn() -> F) -> Result<T, Fault>
    where
        F: Future<Output = kube::Result<T>>,
    {
        let mut attempt = 1;
        loop {
            let (fault, again) = match self.attempt(call()).await {
                Ok(value) => return Ok(value),
                Err(fault) => fault,
            };
            if !again || attempt == ATTEMPTS {
                return Err(fault);
            }
            tokio::time::sleep(backoff(attempt)).await;
            attempt += 1;
        }
    }

    /// As [`Self::call`], once.
    pub(super) async fn once<T>(&self, call: impl Future<Output = kube::Result<T>>) -> Result<T, Fault> {
        self.attempt(call).await.map_err(|(fault, _)| fault)
    }

    async fn attempt<T>(&self, call: impl Future<Output = kube::Result<T>>) -> Result<T, (Fault, bool)> {
        match timeout(CALL, call).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(self.fault(error)),
            Err(_) => {
                let why = format!("{} gave no answer within {} s", self.server, CALL.as_secs());
                Err((Fault::Unavailable(why), true))
            }
        }
    }

    /// What an error means, and whether another try may end otherwise.
    pub(super) fn fault(&self, error: kube::Error) -> (Fault, bool) {
        match error {
            kube::Error::Api(status) => {
                // A quota that is being written by many at once answers with a conflict.
                let conflict = status.code == 409 && status.reason == "Conflict";
                match status.code {
                    _ if conflict || matches!(status.code, 429 | 500..=599) => {
                        let why = format!("{} answers: {}", self.server, plain(&status.message));
                        (Fault::Unavailable(why), true)
                    }
                    401 => {
                        let why = format!("{} does not accept the credentials it was given", self.server);
                        (Fault::Unavailable(why), false)
                    }
                    _ => (Fault::Answer(status), false),
                }
            }
            other => (Fault::Unavailable(format!("{}: {}", self.server, chain(&other))), true),
        }
    }
}

/// How long to wait after the given attempt, counted from 1.
pub(super) fn backoff(attempt: u32) -> Duration {
    let base = BACKOFF.saturating_mul(1 << attempt.saturating_sub(1).min(5)).min(Duration::from_secs(5));
    base.mul_f64(rand::rng().random_range(1.0..1.5))
}

/// A client without Nagle's delay, without repeats of its own, and without time limits on open streams: the ones of
/// kube's default stack end a stream that nobody reads for a while, and repeat calls that are not ours to repeat.
fn client(config: &Config) -> kube::Result<Client> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(Duration::from_secs(3)));
    tcp.set_keepalive(Some(Duration::from_secs(15)));
    tcp.set_keepalive_interval(Some(Duration::from_secs(5)));
    tcp.set_keepalive_retries(Some(3));
    if config.proxy_url.is_some() {
        tracing::warn!("the cluster's proxy setting is not used: its API server is called directly");
    }
    let tls = config.rustls_https_connector_with_connector(tcp)?;
    let http = HttpClient::builder(TokioExecutor::new()).pool_max_idle_per_host(32).build::<_, Body>(tls);
    let http = MapRequest::new(MapErr::new(http, BoxError::from), passed_through);
    let builder =
        ClientBuilder::new(http, config.default_namespace.clone()).with_layer(&config.extra_headers_layer()?);
    Ok(match config.auth_layer()? {
        Some(auth) => builder.with_layer(&auth).with_layer(&config.base_uri_layer()).build(),
        None => builder.with_layer(&config.base_uri_layer()).build(),
    })
}

/// Asks for version 4 of the exec protocol. An API server takes the bytes of version 5 apart and puts them together anew for the kubelet;
/// those of version 4 it passes through. What version 5 adds, the end of stdin, is not needed: HTTP/2 has its own.
fn passed_through(mut request: Request<Body>) -> Request<Body> {
    if let Some(protocol) = request.headers_mut().get_mut(SEC_WEBSOCKET_PROTOCOL) {
        *protocol = HeaderValue::from_static("v4.channel.k8s.io");
    }
    request
}

/// An error with its causes: the innermost one usually says what is the matter.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    for _ in 0..8 {
        let Some(next) = cause else { break };
        let more = next.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = next.source();
    }
    plain(&text)
}

/// Text from outside as it may stand in a log or an answer: one line, without control characters, of limited length.
pub(super) fn plain(text: &str) -> String {
    text.trim().chars().take(MESSAGE).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(code: u16, reason: &str, message: &str) -> Fault {
        Fault::Answer(Status::failure(message, reason).with_code(code).boxed())
    }

    #[test]
    fn a_full_quota_is_a_reason_of_its_own() {
        let full = "pods \"carrel-x\" is forbidden: exceeded quota: few, requested: pods=1, used: pods=2, limited: pods=2";
        let EnvironmentError::Refused(reason) = answer(403, "Forbidden", full).into_error("pod") else {
            panic!("not refused");
        };
        assert_eq!(reason.code, ReasonCode::QuotaExceeded);
        assert!(reason.technical_details.contains("exceeded quota: few"));
        let EnvironmentError::Refused(reason) =
            answer(403, "Forbidden", "violates PodSecurity \"restricted:latest\"").into_error("pod")
        else {
            panic!("not refused");
        };
        assert_eq!(reason.code, ReasonCode::Internal);
    }

    #[test]
    fn waits_between_attempts_grow_and_stay_bounded() {
        for attempt in 1..40 {
            let wait = backoff(attempt);
            assert!(wait >= BACKOFF && wait <= Duration::from_millis(7500), "{attempt}: {wait:?}");
        }
        assert!(backoff(2) >= BACKOFF * 2);
    }

    #[test]
    fn text_from_outside_is_one_short_line() {
        let text = plain(&format!("a\r\n\u{1b}[2Jb{}", "x".repeat(9000)));
        assert!(text.starts_with("a   [2Jb") && text.chars().count() == MESSAGE, "{text}");
    }
}
