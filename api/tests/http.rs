//! The API over a real listener and a real SQLite database. Where sessions run is away here: that is an answer too.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "a test fails by panicking")]
use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use carrel_api::{
    access::{Auth, JwtOptions},
    credential::{Secret, SecretKind},
    environment::{ByteStream, Create, Environment, EnvironmentError, Observation, Observed, link::Links},
    exam::Exam,
    http::{ApiState, Public, openapi, router},
    identity::{EnvironmentId, SessionId, UserId},
    lifecycle::Lifecycle,
    reason::{Reason, ReasonCode},
    session::State,
    store::{Actor, ApiKeyRow, Store, Transition},
};
use futures_util::{SinkExt as _, StreamExt as _};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode, get_current_timestamp, jwk::Jwk};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tokio_tungstenite::tungstenite::{
    Message, client::IntoClientRequest as _, protocol::frame::coding::CloseCode,
};

/// Longer than anything here may take.
const PATIENCE: Duration = Duration::from_secs(15);

/// A place that is not to be had, with whatever it reports of itself.
struct Away(watch::Sender<Arc<Observation>>);

#[async_trait]
impl Environment for Away {
    fn place(&self) -> String {
        "away".to_owned()
    }
    fn makes(&self) -> String {
        "away".to_owned()
    }
    async fn check(&self) -> Result<(), EnvironmentError> {
        Err(EnvironmentError::Unavailable("away".into()))
    }
    async fn create(&self, _: &Create) -> Result<(), EnvironmentError> {
        Err(EnvironmentError::Unavailable("away".into()))
    }
    fn observe(&self) -> watch::Receiver<Arc<Observation>> {
        self.0.subscribe()
    }
    async fn inspect(&self, _: EnvironmentId) -> Result<Option<Observed>, EnvironmentError> {
        Err(EnvironmentError::Unavailable("away".into()))
    }
    async fn connect(&self, _: EnvironmentId) -> Result<Box<dyn ByteStream>, EnvironmentError> {
        Err(EnvironmentError::Unavailable("away".into()))
    }
    async fn adopt(&self, _: EnvironmentId, _: (UserId, SessionId)) -> Result<(), EnvironmentError> {
        Err(EnvironmentError::Unavailable("away".into()))
    }

    async fn destroy(&self, _: EnvironmentId) -> Result<(), EnvironmentError> {
        Err(EnvironmentError::Unavailable("away".into()))
    }
}

struct World {
    directory: tempfile::TempDir,
    store: Store,
    lifecycle: Arc<Lifecycle>,
    environment: Arc<Away>,
    address: SocketAddr,
    platform: String,
    operator: String,
    server: tokio::task::JoinHandle<()>,
    end: tokio_util::sync::CancellationToken,
}

impl Drop for World {
    fn drop(&mut self) {
        self.server.abort();
    }
}

struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    fn data(&self) -> Value {
        let body = self.json();
        assert_eq!((&body["success"], keys(&body)), (&json!(true), set(&["success", "data"])), "{body}");
        body["data"].clone()
    }

    fn failed(&self, status: u16, code: &str) -> String {
        let body = self.json();
        assert_eq!(keys(&body), set(&["success", "error"]), "{body}");
        assert_eq!(keys(&body["error"]), set(&["code", "message"]), "{body}");
        assert_eq!(
            (self.status, &body["success"], &body["error"]["code"]),
            (status, &json!(false), &json!(code)),
            "{body}"
        );
        body["error"]["message"].as_str().unwrap().to_owned()
    }
}

fn keys(value: &Value) -> BTreeSet<String> {
    value.as_object().unwrap().keys().cloned().collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn signer() -> EncodingKey {
    let mut der =
        vec![0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
    der.extend([7; 32]);
    EncodingKey::from_ed_der(&der)
}

fn person(user: UserId, roles: &[&str]) -> String {
    let claims =
        json!({"sub": user, "iss": "i", "aud": "a", "exp": get_current_timestamp() + 600, "roles": roles});
    encode(&Header::new(Algorithm::EdDSA), &claims, &signer()).unwrap()
}

impl World {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&format!("sqlite:{}", directory.path().join("db").display())).await.unwrap();
        let jwks = directory.path().join("jwks.json");
        let jwk = Jwk::from_encoding_key(&signer(), Algorithm::EdDSA).unwrap();
        std::fs::write(&jwks, json!({"keys": [jwk]}).to_string()).unwrap();
        let jwt = JwtOptions {
            jwt_issuer: Some("i".into()),
            jwt_audience: Some("a".into()),
            jwt_jwks_file: Some(jwks),
            jwt_algorithms: Vec::new(),
        };
        let auth = Arc::new(Auth::new(store.clone(), &jwt).unwrap());
        let complete = Observation { complete: true, ..Observation::default() };
        let environment = Arc::new(Away(watch::Sender::new(Arc::new(complete))));
        let links = Links::new(environment.clone());
        let lifecycle = Lifecycle::new(store.clone(), environment.clone(), links);
        let public = Public {
            url: "https://exam.example.org".into(),
            ssh_host: "ssh.example.org".into(),
            ssh_port: 2222,
            host_key_fingerprint: "SHA256:abc".into(),
            known_hosts: "[ssh.example.org]:2222 ssh-ed25519 AAAA".into(),
        };
        let exam = Exam::from_yaml("id: e\ntitle: E\nduration_minutes: 2\n").unwrap();
        store.put_exam(&exam).await.unwrap();
        let end = tokio_util::sync::CancellationToken::new();
        let state = ApiState::new(store.clone(), lifecycle.clone(), auth, public)
            .with_environment(environment.clone())
            .with_shutdown(end.clone());
        let router = router(state);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            axum::serve(listener, router).await.unwrap();
        });
        let (platform, operator) = (key(&store, "platform").await, key(&store, "operator").await);
        Self { directory, store, lifecycle, environment, address, platform, operator, server, end }
    }

    async fn raw(&self, bytes: &[u8]) -> Answer {
        let exchange = async {
            let mut stream = TcpStream::connect(self.address).await.unwrap();
            stream.write_all(bytes).await.unwrap();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await.unwrap();
            String::from_utf8(answer).unwrap()
        };
        let answer = tokio::time::timeout(PATIENCE, exchange).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Answer { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
    }

    async fn ask(&self, method: &str, path: &str, token: &str, body: Option<&str>) -> Answer {
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n");
        if !token.is_empty() {
            request += &format!("Authorization: Bearer {token}\r\n");
        }
        if let Some(body) = body {
            request +=
                &format!("Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        } else {
            request += "\r\n";
        }
        self.raw(request.as_bytes()).await
    }

    async fn create(&self, user: UserId) -> SessionId {
        let body = json!({"exam_id": "e", "user_id": user}).to_string();
        let answer = self.ask("POST", "/v1/sessions", &self.platform, Some(&body)).await;
        assert_eq!(answer.status, 201, "{}", answer.body);
        answer.data()["session_id"].as_str().unwrap().parse().unwrap()
    }

    /// As the loop would, if environments were to be had.
    async fn advance(&self, id: SessionId, to: State) {
        let session = self.store.session(id).await.unwrap().unwrap();
        let mut change = Transition::to(to);
        if to == State::Initializing {
            change.environment_id = Some(EnvironmentId::new());
        }
        self.store.transition(&session, change, &Actor::System).await.unwrap();
    }
}

async fn key(store: &Store, scope: &str) -> String {
    let secret = Secret::new(SecretKind::ApiKey, None);
    let row = ApiKeyRow {
        id: secret.id().to_owned(),
        name: scope.into(),
        scopes: vec![scope.to_owned()],
        secret_hash: secret.hash(),
    };
    store.insert_api_key(&row).await.unwrap();
    secret.expose().to_owned()
}

#[tokio::test]
async fn a_session_is_made_shown_and_ended_in_the_shapes_of_the_contract() {
    let world = World::new().await;
    let user = UserId::new();
    let body = json!({"exam_id": "e", "user_id": user}).to_string();
    let answer = world.ask("POST", "/v1/sessions", &world.platform, Some(&body)).await;
    assert_eq!(answer.status, 201, "{}", answer.body);
    assert!(answer.head.contains("cache-control: no-store"), "{}", answer.head);
    let made = answer.data();
    let id = made["session_id"].as_str().unwrap().to_owned();
    assert!(answer.head.contains(&format!("location: /v1/sessions/{id}")), "{}", answer.head);
    let fields = ["session_id", "user_id", "exam_id", "status", "websocket_url", "status_url", "ssh"];
    assert_eq!(keys(&made), set(&fields));
    assert_eq!(made["status"], "created");
    assert_eq!(made["user_id"], json!(user));
    assert_eq!(made["websocket_url"], format!("wss://exam.example.org/v1/sessions/{id}/terminal"));
    let fields = ["host", "port", "username", "password", "command", "host_key_fingerprint", "known_hosts"];
    assert_eq!(keys(&made["ssh"]), set(&fields));
    assert_eq!(made["ssh"]["command"], format!("ssh -p 2222 {id}@ssh.example.org"));

    let again = world.ask("POST", "/v1/sessions", &world.platform, Some(&body)).await;
    again.failed(409, "ACTIVE_SESSION_EXISTS");

    let path = format!("/v1/sessions/{id}");
    let candidate = person(user, &[]);
    for token in [&world.platform, &candidate] {
        let shown = world.ask("GET", &path, token, None).await.data();
        let fields = [
            "session_id",
            "user_id",
            "exam_id",
            "lifecycle_state",
            "lifecycle_reason",
            "started_at",
            "ready_at",
            "ends_at",
            "remaining_seconds",
            "environment",
        ];
        assert_eq!(keys(&shown), set(&fields));
        assert_eq!(shown["environment"], json!({"ready": false, "environment_id": null}));
        assert_eq!((&shown["remaining_seconds"], &shown["started_at"]), (&json!(120), &Value::Null));
    }
    let active = world.ask("GET", "/v1/sessions/active", &candidate, None).await.data();
    assert_eq!(active["session_id"], id.as_str());
    let asked = format!("/v1/sessions/active?user_id={user}");
    assert_eq!(world.ask("GET", &asked, &world.platform, None).await.data()["session_id"], id.as_str());
    world
        .ask("GET", "/v1/sessions/active?user=x", &world.platform, None)
        .await
        .failed(400, "INVALID_REQUEST");
    world.ask("GET", &asked, &person(UserId::new(), &[]), None).await.failed(404, "NO_ACTIVE_SESSION");

    let session: SessionId = id.parse().unwrap();
    world.advance(session, State::Initializing).await;
    world.advance(session, State::Ready).await;
    world.advance(session, State::Running).await;
    let shown = world.ask("GET", &path, &candidate, None).await.data();
    assert_eq!(
        (&shown["lifecycle_state"], &shown["environment"]["ready"]),
        (&json!("running"), &json!(true))
    );
    for name in ["started_at", "ready_at", "ends_at"] {
        let time = shown[name].as_str().unwrap();
        assert!(time.len() == 24 && time.ends_with('Z') && time.as_bytes()[19] == b'.', "{time}");
    }
    assert!(shown["remaining_seconds"].as_i64().unwrap() <= 120);

    let ended = world.ask("POST", &format!("{path}/terminate"), &candidate, None).await.data();
    assert_eq!(keys(&ended), set(&["session_id", "terminated_at"]));
    let shown = world.ask("GET", &path, &candidate, None).await.data();
    assert_eq!(shown["lifecycle_reason"]["code"], "ended_by_candidate");
    assert_eq!(shown["remaining_seconds"], 0);
    for tail in ["terminate", "submit"] {
        let answer = world.ask("POST", &format!("{path}/{tail}"), &candidate, None).await;
        answer.failed(400, "SESSION_ALREADY_TERMINATED");
    }
    world.ask("GET", "/v1/sessions/active", &candidate, None).await.failed(404, "NO_ACTIVE_SESSION");
}

#[tokio::test]
async fn the_status_says_how_far_it_is_and_why_it_failed() {
    let world = World::new().await;
    let id = world.create(UserId::new()).await;
    let path = format!("/v1/sessions/{id}/status");
    let status = world.ask("GET", &path, &world.platform, None).await.data();
    let fields = [
        "session_id",
        "display_state",
        "message",
        "progress",
        "environment_ready",
        "remaining_seconds",
        "error_reason",
        "recoverable",
        "updated_at",
    ];
    assert_eq!(keys(&status), set(&fields));
    assert_eq!((&status["display_state"], &status["error_reason"]), (&json!("creating"), &Value::Null));
    assert_eq!(keys(&status["progress"]), set(&["current_step", "total_steps", "step_description"]));
    assert_eq!(
        (&status["progress"]["current_step"], &status["progress"]["total_steps"]),
        (&json!(1), &json!(5))
    );
    let session = world.store.session(id).await.unwrap().unwrap();
    let reason = Reason::new(ReasonCode::ImagePullFailed, "secret-registry said no");
    world.store.transition(&session, Transition::end(State::Failed, reason), &Actor::System).await.unwrap();
    let answer = world.ask("GET", &path, &world.platform, None).await;
    let status = answer.data();
    assert_eq!(
        (&status["display_state"], &status["error_reason"]),
        (&json!("error"), &json!("image_pull_failed"))
    );
    assert!(status["recoverable"].is_boolean());
    assert!(!answer.body.contains("secret-registry"), "details are for staff");
}

#[tokio::test]
async fn who_has_no_good_token_is_unauthenticated_everywhere() {
    let world = World::new().await;
    let id = world.create(UserId::new()).await;
    let mut seen = BTreeSet::new();
    for (method, path) in [
        ("POST", "/v1/sessions".to_owned()),
        ("GET", "/v1/sessions/active".to_owned()),
        ("GET", format!("/v1/sessions/{id}")),
        ("GET", format!("/v1/sessions/{id}/status")),
        ("POST", format!("/v1/sessions/{id}/submit")),
        ("POST", format!("/v1/sessions/{id}/terminate")),
        ("POST", format!("/v1/sessions/{id}/terminal-ticket")),
        ("GET", "/v1/exams".to_owned()),
        ("GET", "/v1/exams/e".to_owned()),
        ("PUT", "/v1/exams/e".to_owned()),
    ] {
        let altered = world.platform[..world.platform.len() - 1].to_owned();
        for token in ["", "x", &altered, "a.b.c"] {
            let answer = world.ask(method, &path, token, None).await;
            answer.failed(401, "UNAUTHENTICATED");
            assert!(answer.head.contains("www-authenticate: bearer"));
            seen.insert(answer.body);
        }
    }
    assert_eq!(seen.len(), 1);
    for header in ["Basic eDp5", "Bearer", "Bearer  ", ""] {
        let request = format!(
            "GET /v1/exams HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: {header}\r\n\r\n"
        );
        world.raw(request.as_bytes()).await.failed(401, "UNAUTHENTICATED");
    }
}

#[tokio::test]
async fn unknown_foreign_and_malformed_sessions_are_denied_byte_for_byte_alike() {
    let world = World::new().await;
    let id = world.create(UserId::new()).await.to_string();
    let stranger = person(UserId::new(), &[]);
    let unknown = SessionId::new().to_string();
    let mut seen = BTreeSet::new();
    for (method, tail) in [
        ("GET", ""),
        ("GET", "/status"),
        ("POST", "/submit"),
        ("POST", "/terminate"),
        ("POST", "/terminal-ticket"),
    ] {
        for name in [id.as_str(), &unknown, "x", "%00", "%ff", &id.replace('-', ""), &format!("{{{id}}}")] {
            let answer = world.ask(method, &format!("/v1/sessions/{name}{tail}"), &stranger, None).await;
            answer.failed(403, "ACCESS_DENIED");
            let date =
                answer.head.lines().filter(|line| !line.starts_with("date:")).collect::<Vec<_>>().join("\n");
            seen.insert(format!("{date}\n{}", answer.body));
        }
    }
    assert_eq!(seen.len(), 1, "{seen:?}");
    let body = json!({"exam_id": "e", "user_id": UserId::new()}).to_string();
    world.ask("POST", "/v1/sessions", &stranger, Some(&body)).await.failed(403, "ACCESS_DENIED");
}

#[tokio::test]
async fn keys_and_roles_do_what_their_scopes_allow() {
    let world = World::new().await;
    let id = world.create(UserId::new()).await;
    let (proctor, grader) = (key(&world.store, "proctor").await, key(&world.store, "grader").await);
    let body = json!({"exam_id": "e", "user_id": UserId::new()}).to_string();
    let exam = json!({"id": "e", "title": "E", "duration_minutes": 1}).to_string();
    for token in [&proctor, &grader, &person(UserId::new(), &["proctor"])] {
        world.ask("POST", "/v1/sessions", token, Some(&body)).await.failed(403, "ACCESS_DENIED");
        world.ask("PUT", "/v1/exams/e", token, Some(&exam)).await.failed(403, "ACCESS_DENIED");
        assert_eq!(world.ask("GET", &format!("/v1/sessions/{id}"), token, None).await.status, 200);
        world
            .ask("POST", &format!("/v1/sessions/{id}/submit"), token, None)
            .await
            .failed(403, "ACCESS_DENIED");
    }
    world.ask("PUT", "/v1/exams/e", &world.platform, Some(&exam)).await.failed(403, "ACCESS_DENIED");
    world.ask("GET", "/v1/exams", &person(UserId::new(), &[]), None).await.failed(403, "ACCESS_DENIED");
    let path = format!("/v1/sessions/{id}/terminate");
    world.ask("POST", &path, &grader, None).await.failed(403, "ACCESS_DENIED");
    assert_eq!(world.ask("POST", &path, &proctor, None).await.status, 200);
    let reason = world.store.session(id).await.unwrap().unwrap().reason.unwrap();
    assert_eq!(reason.code, ReasonCode::Cancelled, "it was not ready yet");
}

#[tokio::test]
async fn a_body_that_is_not_as_described_is_refused_by_its_fault() {
    let world = World::new().await;
    let user = UserId::new().to_string();
    for (body, code, names) in [
        (String::new(), "INVALID_REQUEST", ""),
        ("{".into(), "INVALID_REQUEST", ""),
        ("[]".into(), "INVALID_REQUEST", ""),
        ("null".into(), "INVALID_REQUEST", ""),
        ("[".repeat(5000), "INVALID_REQUEST", ""),
        (format!(r#"{{"user_id":"{user}"}}"#), "INVALID_REQUEST", "exam_id"),
        (format!(r#"{{"exam_id":"e","user_id":"{user}","evil":1}}"#), "INVALID_REQUEST", "evil"),
        (format!(r#"{{"exam_id":"e","exam_id":"e","user_id":"{user}"}}"#), "INVALID_REQUEST", "exam_id"),
        (format!(r#"{{"exam_id":5,"user_id":"{user}"}}"#), "INVALID_REQUEST", "exam_id"),
        (r#"{"exam_id":"e","user_id":"me"}"#.into(), "INVALID_REQUEST", "user_id"),
        (format!(r#"{{"exam_id":"e","user_id":"{}"}}"#, user.replace('-', "")), "INVALID_REQUEST", "user_id"),
        (r#"{"exam_id":"e"}"#.into(), "INVALID_REQUEST", "user_id"),
        (format!(r#"{{"exam_id":"e","user_id":"{user}"}} x"#), "INVALID_REQUEST", ""),
        (
            format!(r#"{{"exam_id":"e","user_id":"{user}","ssh_public_key":"ssh-rsa x"}}"#),
            "INVALID_REQUEST",
            "ssh_public_key",
        ),
        (format!(r#"{{"exam_id":"none","user_id":"{user}"}}"#), "INVALID_EXAM_ID", ""),
        (format!(r#"{{"exam_id":"../é","user_id":"{user}"}}"#), "INVALID_EXAM_ID", ""),
    ] {
        let answer = world.ask("POST", "/v1/sessions", &world.platform, Some(&body)).await;
        let message = answer.failed(400, code);
        assert!(message.contains(names), "{body:.80}: {message}");
    }
    let large = format!(r#"{{"exam_id":"{}"}}"#, "x".repeat(70_000));
    world.ask("POST", "/v1/sessions", &world.platform, Some(&large)).await.failed(413, "PAYLOAD_TOO_LARGE");
    let chunked = format!(
        "POST /v1/sessions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {}\r\n\
         Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n11170\r\n{}\r\n0\r\n\r\n",
        world.platform,
        "x".repeat(0x11170)
    );
    world.raw(chunked.as_bytes()).await.failed(413, "PAYLOAD_TOO_LARGE");
    let text = format!(
        "POST /v1/sessions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {}\r\n\
         Content-Type: text/plain\r\nContent-Length: 2\r\n\r\n{{}}",
        world.platform
    );
    world.raw(text.as_bytes()).await.failed(415, "UNSUPPORTED_MEDIA_TYPE");
    let id = world.create(UserId::new()).await;
    let path = format!("/v1/sessions/{id}/submit");
    let message =
        world.ask("POST", &path, &world.platform, Some(r#"{"why":1}"#)).await.failed(400, "INVALID_REQUEST");
    assert!(message.contains("why"), "{message}");
    assert_eq!(world.ask("POST", &path, &world.platform, Some("{}")).await.status, 200);
}

#[tokio::test]
async fn what_is_not_there_and_what_is_not_done_answers_in_the_same_form() {
    let world = World::new().await;
    for path in ["/", "/v1", "/v1/nothing", "/v1/sessions/x/y/z"] {
        world.ask("GET", path, &world.platform, None).await.failed(404, "NOT_FOUND");
    }
    for (method, path) in [("DELETE", "/v1/exams/e"), ("PUT", "/v1/sessions"), ("POST", "/healthz")] {
        let answer = world.ask(method, path, &world.platform, None).await;
        answer.failed(405, "METHOD_NOT_ALLOWED");
        assert!(answer.head.contains("\nallow: "), "{}", answer.head);
    }
    assert_eq!(world.ask("HEAD", "/healthz", "", None).await.status, 200);
}

#[tokio::test]
async fn a_ticket_is_given_to_whom_may_enter_and_logins_are_recorded() {
    let world = World::new().await;
    let user = UserId::new();
    let id = world.create(user).await;
    let path = format!("/v1/sessions/{id}/terminal-ticket");
    let answer = world.ask("POST", &path, &person(user, &[]), None).await.data();
    assert_eq!((keys(&answer), &answer["expires_in"]), (set(&["ticket", "expires_in"]), &json!(30)));
    assert!(answer["ticket"].as_str().unwrap().starts_with("ct_"));
    let grader = key(&world.store, "grader").await;
    world.ask("POST", &path, &grader, None).await.failed(403, "ACCESS_DENIED");
}

#[tokio::test]
async fn exams_are_listed_read_and_put_by_the_rules_of_files() {
    let world = World::new().await;
    let listed = world.ask("GET", "/v1/exams", &world.platform, None).await.data();
    assert_eq!(listed["exams"][0]["id"], "e");
    assert_eq!(world.ask("GET", "/v1/exams/e", &world.platform, None).await.data()["duration_minutes"], 2);
    for path in ["/v1/exams/none", "/v1/exams/%ff"] {
        world.ask("GET", path, &world.platform, None).await.failed(404, "EXAM_NOT_FOUND");
    }
    let setup = "\"\n".repeat(128 * 1024);
    let exam = json!({"id": "n", "title": "N", "duration_minutes": 5, "environment": {"cpu": "500m", "setup": setup}});
    let answer = world.ask("PUT", "/v1/exams/n", &world.operator, Some(&exam.to_string())).await;
    assert_eq!(answer.data()["environment"]["cpu"], "500m");
    assert_eq!(world.store.exam("n").await.unwrap().unwrap().environment.cpu, Some(500));
    let again = world.ask("GET", "/v1/exams/n", &world.operator, None).await.data();
    assert_eq!(world.ask("PUT", "/v1/exams/n", &world.operator, Some(&again.to_string())).await.status, 200);

    let put = |body: Value| {
        let text = body.to_string();
        let world = &world;
        async move {
            world.ask("PUT", "/v1/exams/n", &world.operator, Some(&text)).await.failed(400, "INVALID_REQUEST")
        }
    };
    let message = put(json!({"id": "n", "title": "N", "duration_minutes": 0})).await;
    assert!(message.contains("duration_minutes") && message.contains("10080"), "{message}");
    let message =
        put(json!({"id": "n", "title": "N", "duration_minutes": 5, "environment": {"netwerk": 1}})).await;
    assert!(message.contains("netwerk"), "{message}");
    let message = put(json!({"id": "other", "title": "N", "duration_minutes": 5})).await;
    assert!(message.contains("path"), "{message}");
}

#[tokio::test]
async fn a_backend_that_is_away_is_said_at_once_and_a_start_asks_for_patience() {
    let world = World::new().await;
    assert_eq!(world.ask("GET", "/readyz", "", None).await.status, 200);
    let body = json!({"exam_id": "e", "user_id": UserId::new()}).to_string();

    world.environment.0.send_replace(Arc::new(Observation::default()));
    let answer = world.ask("POST", "/v1/sessions", &world.platform, Some(&body)).await;
    answer.failed(503, "NOT_READY");
    assert!(answer.head.contains("retry-after: "), "{}", answer.head);
    world.ask("GET", "/readyz", "", None).await.failed(503, "NOT_READY");

    let gone =
        Observation { complete: true, unavailable: Some("no cluster".into()), ..Observation::default() };
    world.environment.0.send_replace(Arc::new(gone));
    world.ask("POST", "/v1/sessions", &world.platform, Some(&body)).await.failed(503, "BACKEND_UNAVAILABLE");
    assert!(
        world.ask("GET", "/readyz", "", None).await.failed(503, "BACKEND_UNAVAILABLE").contains("no cluster")
    );

    world.store.close().await;
    world.ask("GET", "/v1/exams", &world.platform, None).await.failed(503, "BACKEND_UNAVAILABLE");
    world.ask("GET", "/readyz", "", None).await.failed(503, "BACKEND_UNAVAILABLE");
    assert_eq!(world.ask("GET", "/healthz", "", None).await.status, 200);
    assert!(world.ask("GET", "/metrics", "", None).await.body.contains("carrel_up 0\n"));
}

#[tokio::test]
async fn metrics_count_sessions_logins_and_requests() {
    let world = World::new().await;
    world.create(UserId::new()).await;
    let answer = world.ask("GET", "/metrics", "", None).await;
    assert!(answer.head.contains("content-type: text/plain; version=0.0.4"), "{}", answer.head);
    for line in [
        "carrel_up 1",
        "carrel_sessions{state=\"created\"} 1",
        "carrel_sessions_created_total 1",
        "carrel_logins_total{method=\"bearer\",result=\"accepted\"} 1",
        "carrel_http_requests_total{status=\"2xx\"} 1",
    ] {
        assert!(answer.body.lines().any(|shown| shown == line), "{line}\n{}", answer.body);
    }
}

#[tokio::test]
async fn the_description_lists_every_route_with_the_fields_that_are_sent() {
    let world = World::new().await;
    let answer = world.ask("GET", "/openapi.json", "", None).await;
    let document = answer.json();
    assert_eq!(document, serde_json::to_value(openapi()).unwrap());
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
    let mut described = BTreeSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in keys(item).iter().filter(|key| ["get", "post", "put", "delete"].contains(&key.as_str()))
        {
            described.insert(format!("{method} {path}"));
            let anonymous = item[method]["security"].is_null();
            assert_eq!(anonymous, item[method]["tags"][0] == "health", "{method} {path}");
        }
    }
    let routes = [
        "get /healthz",
        "get /metrics",
        "get /readyz",
        "get /v1/exams",
        "get /v1/exams/{exam_id}",
        "get /v1/sessions/active",
        "get /v1/sessions/{session_id}",
        "get /v1/sessions/{session_id}/status",
        "post /v1/sessions",
        "post /v1/sessions/{session_id}/submit",
        "post /v1/sessions/{session_id}/terminal-ticket",
        "post /v1/sessions/{session_id}/terminate",
        "put /v1/exams/{exam_id}",
    ];
    assert_eq!(described, set(&routes));

    let user = UserId::new();
    let made = json!({"exam_id": "e", "user_id": user}).to_string();
    let answer = world.ask("POST", "/v1/sessions", &world.platform, Some(&made)).await;
    let id = answer.data()["session_id"].as_str().unwrap().to_owned();
    conforms(&document, "/v1/sessions", "post", &answer);
    for (method, path, asked) in [
        ("get", "/v1/sessions/{session_id}", format!("/v1/sessions/{id}")),
        ("get", "/v1/sessions/{session_id}/status", format!("/v1/sessions/{id}/status")),
        ("get", "/v1/sessions/active", format!("/v1/sessions/active?user_id={user}")),
        ("get", "/v1/exams", "/v1/exams".to_owned()),
        ("get", "/v1/exams/{exam_id}", "/v1/exams/e".to_owned()),
        ("get", "/v1/exams/{exam_id}", "/v1/exams/none".to_owned()),
        ("post", "/v1/sessions/{session_id}/terminal-ticket", format!("/v1/sessions/{id}/terminal-ticket")),
        ("post", "/v1/sessions/{session_id}/submit", format!("/v1/sessions/{id}/submit")),
        ("post", "/v1/sessions/{session_id}/terminate", format!("/v1/sessions/{id}/terminate")),
        ("get", "/readyz", "/readyz".to_owned()),
    ] {
        let answer = world.ask(&method.to_ascii_uppercase(), &asked, &world.platform, None).await;
        conforms(&document, path, method, &answer);
    }
}

/// The answer is of the described status and of the described shape.
fn conforms(document: &Value, path: &str, method: &str, answer: &Answer) {
    let responses = &document["paths"][path][method]["responses"];
    let described = &responses[answer.status.to_string()];
    assert!(!described.is_null(), "{method} {path}: {} is not described", answer.status);
    let schema = &described["content"]["application/json"]["schema"];
    assert!(!schema.is_null(), "{method} {path}");
    fits(document, schema, &answer.json(), &format!("{method} {path}"));
}

/// As much of JSON Schema as the document uses.
fn fits(document: &Value, schema: &Value, value: &Value, at: &str) {
    if let Some(name) = schema["$ref"].as_str() {
        let target = document.pointer(&name[1..]).unwrap_or_else(|| panic!("{at}: {name} leads nowhere"));
        return fits(document, target, value, at);
    }
    if let Some(options) = schema["oneOf"].as_array() {
        let fit = options
            .iter()
            .filter(|option| std::panic::catch_unwind(|| fits(document, option, value, at)).is_ok());
        assert_eq!(fit.count(), 1, "{at}: {value} does not fit one of {schema}");
        return;
    }
    let kinds: Vec<&str> = match &schema["type"] {
        Value::String(kind) => vec![kind],
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect(),
        _ => return,
    };
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_i64() => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    assert!(
        kinds.contains(&kind) || kind == "integer" && kinds.contains(&"number"),
        "{at}: {value} is no {kinds:?}"
    );
    if let Some(words) = schema["enum"].as_array() {
        assert!(words.contains(value), "{at}: {value} is not of {words:?}");
    }
    if let (Some(items), Value::Array(values)) = (schema.get("items"), value) {
        for value in values {
            fits(document, items, value, at);
        }
    }
    if let (Some(properties), Value::Object(fields)) = (schema["properties"].as_object(), value) {
        for (name, value) in fields {
            let property = properties.get(name).unwrap_or_else(|| panic!("{at}: {name} is not described"));
            fits(document, property, value, &format!("{at} {name}"));
        }
        for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            assert!(fields.contains_key(name), "{at}: {name} is missing");
        }
    }
}

type Socket = tokio_tungstenite::WebSocketStream<TcpStream>;

impl World {
    async fn socket(&self, path: &str, headers: &[(&'static str, String)]) -> Result<Socket, u16> {
        let mut request = format!("ws://{}{path}", self.address).into_client_request().unwrap();
        for (name, value) in headers {
            request.headers_mut().append(*name, value.parse().unwrap());
        }
        let stream = TcpStream::connect(self.address).await.unwrap();
        match tokio::time::timeout(PATIENCE, tokio_tungstenite::client_async(request, stream)).await.unwrap()
        {
            Ok((socket, _)) => Ok(socket),
            Err(tokio_tungstenite::tungstenite::Error::Http(response)) => Err(response.status().as_u16()),
            Err(error) => panic!("{error}"),
        }
    }
}

async fn next(socket: &mut Socket) -> Message {
    tokio::time::timeout(PATIENCE, socket.next()).await.unwrap().unwrap().unwrap()
}

async fn frame(socket: &mut Socket) -> Value {
    match next(socket).await {
        Message::Text(text) => serde_json::from_str(&text).unwrap(),
        other => panic!("{other:?}"),
    }
}

async fn closed(socket: &mut Socket) -> u16 {
    match next(socket).await {
        Message::Close(Some(frame)) => frame.code.into(),
        other => panic!("{other:?}"),
    }
}

fn bearer(token: &str) -> Vec<(&'static str, String)> {
    vec![("authorization", format!("Bearer {token}"))]
}

#[tokio::test]
async fn the_status_socket_tells_every_change_and_closes_when_it_is_over() {
    let world = World::new().await;
    let user = UserId::new();
    let id = world.create(user).await;
    let path = format!("/v1/sessions/{id}/status");
    let mut socket = world.socket(&path, &bearer(&person(user, &[]))).await.unwrap();
    let first = frame(&mut socket).await;
    assert_eq!(
        (&first["type"], &first["data"]["lifecycle_state"]),
        (&json!("status_update"), &json!("created"))
    );
    assert_eq!(first["data"]["remaining_seconds"], 120);
    assert_eq!(first["data"]["environment_ready"], false);
    world.lifecycle.end(id, ReasonCode::EndedByStaff, &Actor::System).await.unwrap();
    let last = frame(&mut socket).await;
    assert_eq!(last["data"]["lifecycle_state"], "failed");
    let error = frame(&mut socket).await;
    assert_eq!((&error["type"], &error["data"]["code"]), (&json!("error"), &json!("ENVIRONMENT_FAILED")));
    assert_eq!(keys(&error["data"]), set(&["code", "message", "recoverable"]));
    assert_eq!(closed(&mut socket).await, 4006);

    let mut late = world.socket(&path, &bearer(&world.platform)).await.unwrap();
    assert_eq!(frame(&mut late).await["data"]["display_state"], "error");
}

#[tokio::test]
async fn the_status_socket_takes_a_ticket_as_subprotocol_or_in_the_first_frame_once() {
    let world = World::new().await;
    let user = UserId::new();
    let id = world.create(user).await;
    let path = format!("/v1/sessions/{id}/status");
    let ticket = || async {
        let answer =
            world.ask("POST", &format!("/v1/sessions/{id}/terminal-ticket"), &world.platform, None).await;
        answer.data()["ticket"].as_str().unwrap().to_owned()
    };
    let one = ticket().await;
    let protocol = [("sec-websocket-protocol", format!("carrel.ticket.{one}"))];
    let mut socket = world.socket(&path, &protocol).await.unwrap();
    assert_eq!(frame(&mut socket).await["type"], "status_update");
    let mut again = world.socket(&path, &protocol).await.unwrap();
    assert_eq!(closed(&mut again).await, 4001);

    let mut socket = world.socket(&path, &[]).await.unwrap();
    let first = json!({"type": "auth", "ticket": ticket().await}).to_string();
    socket.send(Message::Text(first.into())).await.unwrap();
    assert_eq!(frame(&mut socket).await["type"], "status_update");

    for first in ["{}", "x", r#"{"type":"auth","ticket":"ct_x"}"#] {
        let mut socket = world.socket(&path, &[]).await.unwrap();
        socket.send(Message::Text(first.into())).await.unwrap();
        assert_eq!(closed(&mut socket).await, 4001);
    }
}

#[tokio::test]
async fn the_status_socket_refuses_strangers_other_sites_and_says_when_it_goes_away() {
    let world = World::new().await;
    let id = world.create(UserId::new()).await;
    let path = format!("/v1/sessions/{id}/status");
    for path in
        [path.clone(), format!("/v1/sessions/{}/status", SessionId::new()), "/v1/sessions/x/status".into()]
    {
        let mut socket = world.socket(&path, &bearer(&person(UserId::new(), &[]))).await.unwrap();
        assert_eq!(closed(&mut socket).await, 4003, "{path}");
    }
    let mut socket = world.socket(&path, &bearer("x")).await.unwrap();
    assert_eq!(closed(&mut socket).await, 4001);
    let mut from = bearer(&world.platform);
    from.push(("origin", "https://evil.example".into()));
    assert_eq!(world.socket(&path, &from).await.err(), Some(403));
    from[1].1 = "https://exam.example.org".into();
    let mut socket = world.socket(&path, &from).await.unwrap();
    assert_eq!(frame(&mut socket).await["type"], "status_update");
    world.end.cancel();
    assert_eq!(closed(&mut socket).await, u16::from(CloseCode::Away));
}

/// What the log says, for a test that looks for secrets in it.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn no_secret_reaches_the_log_or_the_database() {
    let log = Log::default();
    let writer = log.clone();
    // For the whole program: the server's tasks of other tests may write here too.
    let subscriber =
        tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(move || writer.clone());
    tracing::subscriber::set_global_default(subscriber.finish()).unwrap();
    let world = World::new().await;
    let user = UserId::new();
    let body = json!({"exam_id": "e", "user_id": user}).to_string();
    let made = world.ask("POST", "/v1/sessions", &world.platform, Some(&body)).await.data();
    let password = made["ssh"]["password"].as_str().unwrap().to_owned();
    let id = made["session_id"].as_str().unwrap();
    let ticket =
        world.ask("POST", &format!("/v1/sessions/{id}/terminal-ticket"), &world.platform, None).await;
    let ticket = ticket.data()["ticket"].as_str().unwrap().to_owned();
    let _ = world.ask("GET", "/v1/exams", &world.platform[1..], None).await;
    world.store.close().await;
    let said = String::from_utf8_lossy(&log.0.lock().unwrap()).into_owned();
    assert!(said.contains("session created"), "the log was looked at");
    let mut kept = Vec::new();
    for file in std::fs::read_dir(world.directory.path()).unwrap() {
        kept.extend(std::fs::read(file.unwrap().path()).unwrap());
    }
    let secrets = [&password, &ticket, &world.platform, &world.operator];
    for secret in secrets.map(|secret| secret.rsplit('_').next().unwrap()) {
        assert!(!said.contains(secret));
        assert!(!kept.windows(secret.len()).any(|window| window == secret.as_bytes()));
    }
}
