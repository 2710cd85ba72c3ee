//! The one service that turns credentials into [`Access`] and [`Caller`].
use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use subtle::ConstantTimeEq as _;
use tokio::sync::Semaphore;
use uuid::Uuid;
use zeroize::Zeroizing;

use super::{
    Access, How,
    caller::{Caller, Entry, Scopes},
    jwt::{AuthError, JwtOptions, Verifier},
};
use crate::{
    credential::{Overloaded, Password, Passwords, PublicKey, Secret, SecretKind, ServerKey},
    identity::{SessionId, UserId},
    metrics::Metrics,
    session::Session,
    store::{AccessRecord, Channel, Outcome, Store, StoreError, TicketKind, TicketRow},
};

/// A terminal ticket is good for this long, seconds.
pub const TICKET_SECONDS: u32 = 30;
/// A browser address is good for this long, seconds: people open it when they get to it.
const PAGE_SECONDS: u32 = 3600;
/// The name of the page's cookie.
pub const COOKIE: &str = "carrel_page";
/// A page's cookie is good for this long, seconds; its session's end takes its use away earlier.
pub const COOKIE_SECONDS: u64 = 7 * 24 * 3600;
/// Records of attempts being written at once; while so many are under way, more are only logged.
const RECORDS: usize = 64;
/// First character of the id of a ticket that only lets watch. An id is the ticket's key in the database: its holder cannot change it.
const WATCHES: char = 'w';
/// And of one that lets work.
const WORKS: char = 'c';

/// Why a login was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LoginError {
    /// Unknown, foreign, wrong or expired: one answer for all.
    #[error("access denied")]
    Denied,
    /// Too many logins wait already; another try in a few seconds is worth it.
    #[error("too many logins at this moment")]
    Overloaded,
    /// The database does not answer.
    #[error("the database does not answer")]
    Unavailable,
}

impl From<StoreError> for LoginError {
    fn from(error: StoreError) -> Self {
        tracing::warn!(%error, "a login cannot be decided");
        Self::Unavailable
    }
}

impl From<Overloaded> for LoginError {
    fn from(_: Overloaded) -> Self {
        Self::Overloaded
    }
}

/// A new ticket: shown once.
#[derive(Debug)]
pub struct Ticket {
    secret: Secret,
    /// It can be used for this long, seconds.
    pub expires_in: u32,
}

impl Ticket {
    /// The text.
    #[must_use]
    pub fn expose(&self) -> &str {
        self.secret.expose()
    }
}

/// What a page's ticket is traded for. The gateway decides its name and attributes.
pub struct Cookie {
    /// `session_id.expiry.tag`.
    pub value: Zeroizing<String>,
    /// Seconds.
    pub max_age: u64,
}

/// Checks credentials. One in a process, shared.
pub struct Auth {
    store: Store,
    passwords: Passwords,
    jwt: Option<Verifier>,
    key: ServerKey,
    records: Arc<Semaphore>,
    metrics: Arc<Metrics>,
}

impl Auth {
    /// With a cookie key of this process: cookies end with it. See [`Auth::with_key`].
    ///
    /// # Errors
    /// [`AuthError`] when the settings for bearer tokens cannot be used.
    pub fn new(store: Store, jwt: &JwtOptions) -> Result<Self, AuthError> {
        Ok(Self {
            store,
            passwords: Passwords::new(),
            jwt: Verifier::new(jwt)?,
            key: ServerKey::random(),
            records: Arc::new(Semaphore::new(RECORDS)),
            metrics: Arc::default(),
        })
    }

    /// With a key that outlives the process and that replicas share.
    #[must_use]
    pub fn with_key(self, key: ServerKey) -> Self {
        Self { key, ..self }
    }

    /// What is counted, for this process.
    #[must_use]
    pub const fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    fn counted<T>(&self, how: How, result: Result<T, LoginError>) -> Result<T, LoginError> {
        self.metrics.login(how, result.as_ref().map(|_| ()).map_err(|error| *error));
        result
    }

    /// Hashes a new session's password.
    ///
    /// # Errors
    /// [`LoginError::Overloaded`].
    pub async fn hash(&self, password: &Password) -> Result<String, LoginError> {
        Ok(self.passwords.hash(password).await?)
    }

    /// An SSH login by password. Also for a session that has ended: who knows its password is told why.
    ///
    /// # Errors
    /// [`LoginError`]; one answer and the same work for every denial.
    pub async fn ssh_password(&self, user_name: &str, password: &str) -> Result<Access, LoginError> {
        self.counted(How::Password, self.by_password(user_name, password).await)
    }

    async fn by_password(&self, user_name: &str, password: &str) -> Result<Access, LoginError> {
        let (user, session_id) = asked_for(user_name);
        let found = self.store.session_credential(session_id).await?;
        let stored = found.as_ref().and_then(|found| found.password_hash.as_deref());
        let right = self.passwords.verify(session_id, stored, password).await?;
        let found = found.filter(|found| right && user.is_none_or(|user| user == found.user_id));
        let user_id = found.ok_or(LoginError::Denied)?.user_id;
        Ok(Access { user_id, session_id, how: How::Password, watches: false })
    }

    /// An SSH login by public key, `algorithm base64`. Whether the client holds the private key is the caller's to verify.
    ///
    /// # Errors
    /// [`LoginError`].
    pub async fn ssh_public_key(&self, user_name: &str, key: &str) -> Result<Access, LoginError> {
        self.counted(How::PublicKey, self.by_public_key(user_name, key).await)
    }

    async fn by_public_key(&self, user_name: &str, key: &str) -> Result<Access, LoginError> {
        let (user, session_id) = asked_for(user_name);
        let found = self.store.session_credential(session_id).await?.ok_or(LoginError::Denied)?;
        let key = PublicKey::parse(key).map_err(|_| LoginError::Denied)?;
        let known = found.public_keys.iter().any(|known| known == key.as_str());
        if !known || user.is_some_and(|user| user != found.user_id) {
            return Err(LoginError::Denied);
        }
        Ok(Access { user_id: found.user_id, session_id, how: How::PublicKey, watches: false })
    }

    /// Who holds this bearer token: an API key, or a person's signed token.
    ///
    /// # Errors
    /// [`LoginError::Denied`] for anything but a good one.
    pub async fn caller(&self, token: &str) -> Result<Caller, LoginError> {
        self.counted(How::Bearer, self.by_token(token).await)
    }

    async fn by_token(&self, token: &str) -> Result<Caller, LoginError> {
        if let Some(secret) = Secret::parse(SecretKind::ApiKey, token) {
            let key = self.store.api_key(secret.id()).await?;
            // Compared also where there is none.
            let stored = key.as_ref().map_or("", |key| key.row.secret_hash.as_str());
            let right = secret.matches(stored);
            let key = key.filter(|key| right && key.revoked_at.is_none()).ok_or(LoginError::Denied)?;
            let scopes: Scopes = key.row.scopes.iter().filter_map(|scope| scope.parse().ok()).collect();
            return Ok(Caller { user_id: None, key_id: Some(key.row.id), scopes });
        }
        self.jwt.as_ref().and_then(|jwt| jwt.verify(token)).ok_or(LoginError::Denied)
    }

    /// Lets a caller into a session by their own bearer token.
    ///
    /// # Errors
    /// [`LoginError`].
    pub async fn enter(&self, caller: &Caller, session_id: SessionId) -> Result<Access, LoginError> {
        let session = self.store.session(session_id).await?.ok_or(LoginError::Denied)?;
        let entry = caller.may_enter(&session).ok_or(LoginError::Denied)?;
        let watches = entry == Entry::Watch;
        Ok(Access { user_id: session.user_id, session_id, how: How::Bearer, watches })
    }

    /// A ticket for a terminal or status WebSocket: single use, [`TICKET_SECONDS`]. Staff who watch get one that only watches.
    ///
    /// # Errors
    /// [`LoginError::Denied`] when the caller may not enter.
    pub async fn terminal_ticket(&self, caller: &Caller, session: &Session) -> Result<Ticket, LoginError> {
        let entry = caller.may_enter(session).ok_or(LoginError::Denied)?;
        self.issue(session, TicketKind::Terminal, entry, TICKET_SECONDS).await
    }

    /// A ticket for the page, to be traded for a cookie: single use, one hour.
    ///
    /// # Errors
    /// [`LoginError::Unavailable`].
    pub async fn page_ticket(&self, session: &Session) -> Result<Ticket, LoginError> {
        self.issue(session, TicketKind::Page, Entry::Work, PAGE_SECONDS).await
    }

    async fn issue(
        &self,
        session: &Session,
        kind: TicketKind,
        entry: Entry,
        seconds: u32,
    ) -> Result<Ticket, LoginError> {
        let mark = if entry == Entry::Watch { WATCHES } else { WORKS };
        let secret = Secret::new(SecretKind::Ticket, Some(mark));
        let row = TicketRow {
            id: secret.id().to_owned(),
            secret_hash: secret.hash(),
            session_id: session.id,
            user_id: session.user_id,
            expires_at: self.store.now().await?.saturating_add(i64::from(seconds) * 1000),
            kind,
        };
        self.store.insert_ticket(&row).await?;
        Ok(Ticket { secret, expires_in: seconds })
    }

    /// Uses up a ticket for a WebSocket of this session.
    ///
    /// # Errors
    /// [`LoginError`].
    pub async fn ticket(&self, session_id: SessionId, ticket: &str) -> Result<Access, LoginError> {
        let taken = self.take(ticket, &[TicketKind::Terminal]).await;
        self.counted(How::Ticket, taken.and_then(|access| access.only_for(session_id)))
    }

    /// Trades a page's ticket for a cookie, or a terminal's: a platform sends its candidates to the page with one. Not one that
    /// only watches: a cookie lets work.
    ///
    /// # Errors
    /// [`LoginError`].
    pub async fn trade(&self, ticket: &str) -> Result<(Access, Cookie), LoginError> {
        let taken = self.take(ticket, &[TicketKind::Page, TicketKind::Terminal]).await;
        let taken =
            taken.and_then(|access| if access.watches { Err(LoginError::Denied) } else { Ok(access) });
        let access = self.counted(How::Ticket, taken)?;
        let expiry = seconds_now().saturating_add(COOKIE_SECONDS);
        let value = Zeroizing::new(format!(
            "{}.{}.{expiry}.{}",
            access.session_id,
            access.user_id,
            self.cookie_tag(access.session_id, access.user_id, expiry)
        ));
        Ok((access, Cookie { value, max_age: COOKIE_SECONDS }))
    }

    async fn take(&self, ticket: &str, kinds: &[TicketKind]) -> Result<Access, LoginError> {
        let secret = Secret::parse(SecretKind::Ticket, ticket).ok_or(LoginError::Denied)?;
        let row = self.store.take_ticket(secret.id()).await?.ok_or(LoginError::Denied)?;
        if !secret.matches(&row.secret_hash) || !kinds.contains(&row.kind) {
            return Err(LoginError::Denied);
        }
        let watches = row.id.starts_with(WATCHES);
        Ok(Access { user_id: row.user_id, session_id: row.session_id, how: How::Ticket, watches })
    }

    /// A login by the page's cookie.
    ///
    /// # Errors
    /// [`LoginError`].
    pub async fn cookie(&self, session_id: SessionId, value: &str) -> Result<Access, LoginError> {
        self.counted(How::Cookie, self.by_cookie(session_id, value).await)
    }

    async fn by_cookie(&self, session_id: SessionId, value: &str) -> Result<Access, LoginError> {
        let access = self.cookie_access(value).ok_or(LoginError::Denied)?;
        let session = self.store.session(session_id).await?.ok_or(LoginError::Denied)?;
        if access.user_id == session.user_id { access.only_for(session_id) } else { Err(LoginError::Denied) }
    }

    /// What a cookie is for, by its tag alone.
    fn cookie_access(&self, value: &str) -> Option<Access> {
        let mut parts = value.splitn(4, '.');
        let session_id: SessionId = parts.next()?.parse().ok()?;
        let user_id: UserId = parts.next()?.parse().ok()?;
        let expiry: u64 = parts.next()?.parse().ok()?;
        let given = parts.next()?;
        let right = self.cookie_tag(session_id, user_id, expiry);
        let right = bool::from(right.as_bytes().ct_eq(given.as_bytes()));
        (right && seconds_now() < expiry).then_some(Access {
            user_id,
            session_id,
            how: How::Cookie,
            watches: false,
        })
    }

    fn cookie_tag(&self, session_id: SessionId, user_id: UserId, expiry: u64) -> String {
        self.key.tag(&[
            b"cookie",
            session_id.uuid().as_bytes(),
            user_id.uuid().as_bytes(),
            &expiry.to_be_bytes(),
        ])
    }

    /// Writes down an attempt, without making anybody wait. While the database does not keep up, attempts are only logged.
    pub fn record(
        &self,
        channel: Channel,
        source_ip: IpAddr,
        ids: (Option<SessionId>, Option<UserId>),
        outcome: Outcome,
    ) {
        let (session_id, user_id) = ids;
        tracing::info!(?channel, %source_ip, ?session_id, ?user_id, ?outcome, "access");
        let Ok(place) = Arc::clone(&self.records).try_acquire_owned() else { return };
        let store = self.store.clone();
        tokio::spawn(async move {
            let _place = place;
            let record = AccessRecord { session_id, user_id, channel, source_ip, outcome };
            if let Err(error) = store.record_access(record).await {
                tracing::warn!(%error, "an access record could not be written");
            }
        });
    }
}

impl Access {
    fn only_for(self, session_id: SessionId) -> Result<Self, LoginError> {
        if self.session_id == session_id { Ok(self) } else { Err(LoginError::Denied) }
    }
}

/// The names in an SSH user name, `<session_id>` or `<user_id>+<session_id>`; `None` for anything else.
#[must_use]
pub fn user_name(text: &str) -> Option<(Option<UserId>, SessionId)> {
    match text.split_once('+') {
        None => Some((None, text.parse().ok()?)),
        Some((user, session)) => Some((Some(user.parse().ok()?), session.parse().ok()?)),
    }
}

/// A malformed name becomes one that nobody has, so that it takes the same way.
fn asked_for(text: &str) -> (Option<UserId>, SessionId) {
    user_name(text).unwrap_or((None, SessionId::from(Uuid::nil())))
}

fn seconds_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
