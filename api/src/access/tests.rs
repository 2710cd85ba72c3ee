#![allow(clippy::unwrap_used, clippy::indexing_slicing)]
use std::path::Path;

use jsonwebtoken::{Algorithm, EncodingKey, Header, encode, get_current_timestamp, jwk::Jwk};
use serde_json::{Value, json};

use super::*;
use crate::{
    access::Scope,
    exam::Exam,
    store::{Actor, ApiKeyRow, NewSession},
};

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKhfMLv3Dj9G0mKpVGZkSHHIEDFQXPFTH/3TXAaQtrHs";

struct Fixture {
    directory: tempfile::TempDir,
    store: Store,
    auth: Auth,
    session: Session,
    password: Password,
}

async fn fixture() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&format!("sqlite:{}", directory.path().join("db").display())).await.unwrap();
    let auth = Auth::new(store.clone(), &JwtOptions::default()).unwrap();
    let password = Password::new();
    let exam = Exam::from_yaml("id: e\ntitle: E\nduration_minutes: 5\n").unwrap();
    let new = NewSession {
        user_id: UserId::new(),
        exam: &exam,
        password_hash: Some(auth.hash(&password).await.unwrap()),
        public_keys: vec![KEY.to_owned()],
    };
    let session = store.create_session(&new, &Actor::System).await.unwrap();
    Fixture { directory, store, auth, session, password }
}

#[tokio::test]
async fn the_right_password_or_key_opens_under_either_form_of_the_user_name() {
    let Fixture { directory: _directory, auth, session, password, .. } = fixture().await;
    let both = format!("{}+{}", session.user_id, session.id);
    for name in [session.id.to_string(), both] {
        let access = auth.ssh_password(&name, password.expose()).await.unwrap();
        assert_eq!(
            (access.user_id(), access.session_id(), access.how()),
            (session.user_id, session.id, How::Password)
        );
        assert!(!access.only_watches());
        let access = auth.ssh_public_key(&name, KEY).await.unwrap();
        assert_eq!(
            (access.user_id(), access.session_id(), access.how()),
            (session.user_id, session.id, How::PublicKey)
        );
    }
}

#[tokio::test]
async fn every_other_login_is_denied_alike() {
    let Fixture { directory: _directory, auth, session, password, .. } = fixture().await;
    let id = session.id.to_string();
    let foreign = format!("{}+{id}", UserId::new());
    let unknown = SessionId::new().to_string();
    let nobody = Uuid::nil().to_string();
    for (name, text) in [
        (id.as_str(), "wrong"),
        (&id, ""),
        (&id, &"x".repeat(5000)),
        (&foreign, password.expose()),
        (&unknown, password.expose()),
        (&nobody, password.expose()),
        ("", password.expose()),
        ("root", password.expose()),
        (&format!("+{id}"), password.expose()),
        (&format!("{id}+{id}+{id}"), password.expose()),
        (&format!("{id} "), password.expose()),
    ] {
        assert_eq!(auth.ssh_password(name, text).await, Err(LoginError::Denied), "{name} {text:.20}");
    }
    let other = KEY.replace("QtrHs", "QtrHt");
    for (name, key) in
        [(id.as_str(), other.as_str()), (&id, ""), (&foreign, KEY), (&unknown, KEY), ("root", KEY)]
    {
        assert_eq!(auth.ssh_public_key(name, key).await, Err(LoginError::Denied), "{name} {key}");
    }
}

#[tokio::test]
async fn a_ticket_opens_its_session_once() {
    let Fixture { directory: _directory, auth, session, .. } = fixture().await;
    let caller = Caller { user_id: Some(session.user_id), key_id: None, scopes: Scopes::default() };
    let ticket = auth.terminal_ticket(&caller, &session).await.unwrap();
    let access = auth.ticket(session.id, ticket.expose()).await.unwrap();
    assert_eq!((access.session_id(), access.how(), access.only_watches()), (session.id, How::Ticket, false));
    assert_eq!(auth.ticket(session.id, ticket.expose()).await, Err(LoginError::Denied));

    let ticket = auth.terminal_ticket(&caller, &session).await.unwrap();
    assert_eq!(auth.ticket(SessionId::new(), ticket.expose()).await, Err(LoginError::Denied));

    let page = auth.page_ticket(&session).await.unwrap();
    assert_eq!(auth.ticket(session.id, page.expose()).await, Err(LoginError::Denied), "of another kind");
    let stranger = Caller { user_id: Some(UserId::new()), key_id: None, scopes: Scopes::default() };
    assert!(matches!(auth.terminal_ticket(&stranger, &session).await, Err(LoginError::Denied)));
}

#[tokio::test]
async fn a_proctors_ticket_only_watches_and_a_graders_is_none() {
    let Fixture { directory: _directory, auth, session, .. } = fixture().await;
    let staff =
        |scope| Caller { user_id: None, key_id: Some("k".into()), scopes: [scope].into_iter().collect() };
    let ticket = auth.terminal_ticket(&staff(Scope::Proctor), &session).await.unwrap();
    assert!(auth.ticket(session.id, ticket.expose()).await.unwrap().only_watches());
    let ticket = auth.terminal_ticket(&staff(Scope::Platform), &session).await.unwrap();
    assert!(!auth.ticket(session.id, ticket.expose()).await.unwrap().only_watches());
    let ticket = auth.terminal_ticket(&staff(Scope::Proctor), &session).await.unwrap();
    assert!(auth.trade(ticket.expose()).await.is_err(), "a cookie lets work");
    let ticket = auth.terminal_ticket(&staff(Scope::Platform), &session).await.unwrap();
    assert_eq!(auth.trade(ticket.expose()).await.unwrap().0.session_id(), session.id);
    assert!(auth.terminal_ticket(&staff(Scope::Grader), &session).await.is_err());
    assert!(auth.enter(&staff(Scope::Proctor), session.id).await.unwrap().only_watches());
    assert_eq!(auth.enter(&staff(Scope::Grader), session.id).await, Err(LoginError::Denied));
    assert_eq!(auth.enter(&staff(Scope::Operator), SessionId::new()).await, Err(LoginError::Denied));
}

#[tokio::test]
async fn a_page_ticket_is_traded_for_a_cookie_that_outlives_the_process_with_its_key() {
    let Fixture { auth, session, store, directory, .. } = fixture().await;
    let path = directory.path().join("key");
    let auth = auth.with_key(ServerKey::load_or_create(&path).unwrap());
    let ticket = auth.page_ticket(&session).await.unwrap();
    let (access, cookie) = auth.trade(ticket.expose()).await.unwrap();
    assert_eq!(access.session_id(), session.id);
    assert!(auth.trade(ticket.expose()).await.is_err());

    let again = Auth::new(store.clone(), &JwtOptions::default()).unwrap();
    assert_eq!(again.cookie(session.id, &cookie.value).await, Err(LoginError::Denied), "another key");
    let again = again.with_key(ServerKey::load_or_create(&path).unwrap());
    let access = again.cookie(session.id, &cookie.value).await.unwrap();
    assert_eq!(
        (access.session_id(), access.user_id(), access.how()),
        (session.id, session.user_id, How::Cookie)
    );

    assert_eq!(again.cookie(SessionId::new(), &cookie.value).await, Err(LoginError::Denied));
    for at in 0..cookie.value.len() {
        let mut altered = cookie.value.to_string();
        let put = if altered.as_bytes()[at] == b'1' { "2" } else { "1" };
        altered.replace_range(at..=at, put);
        assert!(again.cookie(session.id, &altered).await.is_err(), "{at}");
    }
    let late = again.cookie_tag(session.id, session.user_id, 1);
    let late = format!("{}.{}.1.{late}", session.id, session.user_id);
    assert_eq!(again.cookie(session.id, &late).await, Err(LoginError::Denied), "expired");
}

#[tokio::test]
async fn an_api_key_is_good_until_it_is_revoked() {
    let Fixture { directory: _directory, auth, store, .. } = fixture().await;
    let secret = Secret::new(SecretKind::ApiKey, None);
    let row = ApiKeyRow {
        id: secret.id().to_owned(),
        name: "n".into(),
        scopes: vec!["platform".into(), "proctor".into()],
        secret_hash: secret.hash(),
    };
    store.insert_api_key(&row).await.unwrap();
    let caller = auth.caller(secret.expose()).await.unwrap();
    assert_eq!(caller.actor(), Actor::Key(row.id.clone()));
    assert!(caller.scopes.any(&[Scope::Platform]) && !caller.scopes.any(&[Scope::Operator]));
    let other = Secret::new(SecretKind::ApiKey, None);
    for token in ["", "x", other.expose(), &secret.expose()[1..]] {
        assert_eq!(auth.caller(token).await, Err(LoginError::Denied));
    }
    store.revoke_api_key(&row.id).await.unwrap();
    assert_eq!(auth.caller(secret.expose()).await, Err(LoginError::Denied));
}

#[tokio::test]
async fn a_database_that_is_away_is_no_denial() {
    let Fixture { directory: _directory, auth, store, session, password, .. } = fixture().await;
    store.close().await;
    let id = session.id.to_string();
    assert_eq!(auth.ssh_password(&id, password.expose()).await, Err(LoginError::Unavailable));
    assert_eq!(auth.ssh_public_key(&id, KEY).await, Err(LoginError::Unavailable));
    let key = Secret::new(SecretKind::ApiKey, None);
    assert_eq!(auth.caller(key.expose()).await, Err(LoginError::Unavailable));
}

/// An Ed25519 key for signing, as PKCS #8: a fixed head and 32 bytes.
fn signer(seed: u8) -> EncodingKey {
    let mut der =
        vec![0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
    der.extend([seed; 32]);
    EncodingKey::from_ed_der(&der)
}

fn publish(path: &Path, seeds: &[u8]) {
    let keys: Vec<Jwk> = seeds
        .iter()
        .map(|seed| {
            let mut jwk = Jwk::from_encoding_key(&signer(*seed), Algorithm::EdDSA).unwrap();
            jwk.common.key_id = Some(format!("k{seed}"));
            jwk
        })
        .collect();
    std::fs::write(path, serde_json::to_vec(&json!({ "keys": keys })).unwrap()).unwrap();
}

fn token(seed: u8, claims: &Value) -> String {
    let mut header = Header::new(Algorithm::EdDSA);
    header.kid = Some(format!("k{seed}"));
    encode(&header, claims, &signer(seed)).unwrap()
}

fn options(path: &Path) -> JwtOptions {
    JwtOptions {
        jwt_issuer: Some("https://issuer.example".into()),
        jwt_audience: Some("carrel".into()),
        jwt_jwks_file: Some(path.to_owned()),
        jwt_algorithms: Vec::new(),
    }
}

fn claims() -> Value {
    json!({
        "sub": "0190c0de-0000-7000-8000-000000000001",
        "iss": "https://issuer.example",
        "aud": "carrel",
        "exp": get_current_timestamp() + 600,
    })
}

fn with(name: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[name] = value;
    claims
}

#[tokio::test]
async fn a_signed_token_is_its_subject_and_any_fault_in_it_is_denied() {
    let Fixture { store, directory, .. } = fixture().await;
    let path = directory.path().join("jwks.json");
    publish(&path, &[1]);
    let auth = Auth::new(store, &options(&path)).unwrap();
    let caller = auth.caller(&token(1, &claims())).await.unwrap();
    assert_eq!(caller.user_id().unwrap().to_string(), "0190c0de-0000-7000-8000-000000000001");
    assert_eq!(caller.scopes, Scopes::default());
    let caller =
        auth.caller(&token(1, &with("roles", json!(["proctor", "platform", "poet"])))).await.unwrap();
    assert_eq!(caller.scopes, [Scope::Proctor].into_iter().collect());

    let now = get_current_timestamp();
    let mut missing = claims();
    missing.as_object_mut().unwrap().remove("aud");
    for (name, bad) in [
        ("issuer", token(1, &with("iss", json!("https://other.example")))),
        ("audience", token(1, &with("aud", json!("other")))),
        ("no audience", token(1, &missing)),
        ("expired", token(1, &with("exp", json!(now - 120)))),
        ("too early", token(1, &with("nbf", json!(now + 120)))),
        ("subject", token(1, &with("sub", json!("root")))),
        ("signer", token(2, &claims())),
    ] {
        assert_eq!(auth.caller(&bad).await, Err(LoginError::Denied), "{name}");
    }
    let good = token(1, &claims());
    let (head, _) = good.rsplit_once('.').unwrap();
    assert_eq!(auth.caller(&format!("{head}.")).await, Err(LoginError::Denied));
    // The public key as a shared secret: the classic confusion of algorithms.
    let public = serde_json::to_vec(&Jwk::from_encoding_key(&signer(1), Algorithm::EdDSA).unwrap()).unwrap();
    let confused =
        encode(&Header::new(Algorithm::HS256), &claims(), &EncodingKey::from_secret(&public)).unwrap();
    assert_eq!(auth.caller(&confused).await, Err(LoginError::Denied));
}

#[tokio::test]
async fn settings_for_tokens_that_cannot_work_are_refused_at_start() {
    let Fixture { store, directory, .. } = fixture().await;
    let path = directory.path().join("jwks.json");
    let new = |options: &JwtOptions| Auth::new(store.clone(), options).err().map(|error| error.to_string());
    assert!(new(&options(&path)).unwrap().contains("jwks.json"));
    std::fs::write(&path, "{\"keys\":[]}").unwrap();
    assert!(new(&options(&path)).unwrap().contains("no keys"));
    publish(&path, &[1]);
    assert_eq!(new(&options(&path)), None);
    let part = JwtOptions { jwt_audience: None, ..options(&path) };
    assert!(new(&part).unwrap().contains("belong together"));
    for algorithm in ["HS256", "none", "ed25519"] {
        let weak = JwtOptions { jwt_algorithms: vec![algorithm.into()], ..options(&path) };
        assert!(new(&weak).unwrap().contains(algorithm));
    }
}

#[test]
fn staff_may_what_their_scopes_say_and_no_more() {
    let of =
        |scope| Caller { user_id: None, key_id: Some("k".into()), scopes: [scope].into_iter().collect() };
    let someone = Some(UserId::new());
    for (scope, creates, writes) in [
        (Scope::Platform, true, false),
        (Scope::Operator, true, true),
        (Scope::Proctor, false, false),
        (Scope::Grader, false, false),
    ] {
        let caller = of(scope);
        assert_eq!(caller.may_create_for(someone).is_some(), creates, "{scope}");
        assert_eq!(caller.may_create_for(None), None, "a key is nobody's session");
        assert_eq!(caller.may_write_exams(), writes, "{scope}");
        assert!(caller.may_read_exams());
    }
    let candidate = Caller { user_id: someone, key_id: None, scopes: Scopes::default() };
    assert_eq!(candidate.may_create_for(None), someone);
    assert_eq!(candidate.may_create_for(someone), someone);
    assert_eq!(candidate.may_create_for(Some(UserId::new())), None);
    assert!(!candidate.may_read_exams());
}
