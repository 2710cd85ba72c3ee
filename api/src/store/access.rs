//! API keys, tickets, and the record of who tried to get in.
use std::net::IpAddr;

use sqlx::{Row as _, any::AnyRow};

use super::{
    Store, StoreError,
    actor::{Actor, Subject, audit},
};
use crate::identity::{SessionId, UserId};

/// An API key as it is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKeyRow {
    /// The public part of the key.
    pub id: String,
    /// For people.
    pub name: String,
    /// What it may do; words without blanks.
    pub scopes: Vec<String>,
    /// Keyed hash of the secret part.
    pub secret_hash: String,
}

/// An API key as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey {
    /// As it was made.
    pub row: ApiKeyRow,
    /// When, ms.
    pub created_at: i64,
    /// Since when it is of no use, ms.
    pub revoked_at: Option<i64>,
}

/// What a ticket opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TicketKind {
    /// A terminal or status WebSocket.
    Terminal,
    /// The page itself; traded for a cookie.
    Page,
}

impl TicketKind {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Terminal => "terminal",
            Self::Page => "page",
        }
    }
}

/// A single-use way in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TicketRow {
    /// The public part.
    pub id: String,
    /// Keyed hash of the secret part.
    pub secret_hash: String,
    /// Which session it opens.
    pub session_id: SessionId,
    /// Whose.
    pub user_id: UserId,
    /// By the database's clock, ms.
    pub expires_at: i64,
    /// What it opens.
    pub kind: TicketKind,
}

/// By which door somebody came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// SSH.
    Ssh,
    /// A WebSocket or the page.
    Browser,
    /// The HTTP API.
    Api,
}

/// What came of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Let in.
    Granted,
    /// Wrong secret, foreign or unknown session.
    Denied,
    /// The right person, too early.
    NotReady,
    /// The right person, too late.
    Ended,
    /// Over a limit.
    Limited,
}

/// One attempt to get in. The time is the database's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessRecord {
    /// The session that was asked for, where one could be read from the attempt.
    pub session_id: Option<SessionId>,
    /// Who it was, where that is known.
    pub user_id: Option<UserId>,
    /// By which door.
    pub channel: Channel,
    /// From where.
    pub source_ip: IpAddr,
    /// What came of it.
    pub outcome: Outcome,
}

fn api_key(row: &AnyRow) -> Result<ApiKey, StoreError> {
    Ok(ApiKey {
        row: ApiKeyRow {
            id: row.try_get("id")?,
            name: row.try_get("name")?,
            scopes: row.try_get::<String, _>("scopes")?.split_whitespace().map(str::to_owned).collect(),
            secret_hash: row.try_get("secret_hash")?,
        },
        created_at: row.try_get("created_at")?,
        revoked_at: row.try_get("revoked_at")?,
    })
}

impl Store {
    /// Writes down one attempt to get in. Callers throttle: every call is a row.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn record_access(&self, record: AccessRecord) -> Result<(), StoreError> {
        self.bounded(async {
            let mut write = self.write().await?;
            sqlx::query(
                "insert into access_record (id, session_id, user_id, channel, source_ip, outcome, at)
                 values ($1, $2, $3, $4, $5, $6, (select now_ms from clock))",
            )
            .bind(uuid::Uuid::now_v7().to_string())
            .bind(record.session_id.map(|id| id.to_string()))
            .bind(record.user_id.map(|id| id.to_string()))
            .bind(match record.channel {
                Channel::Ssh => "ssh",
                Channel::Browser => "browser",
                Channel::Api => "api",
            })
            .bind(record.source_ip.to_canonical().to_string())
            .bind(match record.outcome {
                Outcome::Granted => "granted",
                Outcome::Denied => "denied",
                Outcome::NotReady => "not_ready",
                Outcome::Ended => "ended",
                Outcome::Limited => "limited",
            })
            .execute(&mut *write.sql)
            .await?;
            write.commit().await
        })
        .await
    }

    /// Adds an API key.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when the id is taken.
    pub async fn insert_api_key(&self, key: &ApiKeyRow) -> Result<(), StoreError> {
        self.bounded(async {
            let mut write = self.write().await?;
            sqlx::query(
                "insert into api_key (id, name, scopes, secret_hash, created_at)
                 values ($1, $2, $3, $4, (select now_ms from clock))",
            )
            .bind(key.id.clone())
            .bind(key.name.clone())
            .bind(key.scopes.join(" "))
            .bind(key.secret_hash.clone())
            .execute(&mut *write.sql)
            .await?;
            let subject = Subject { name: key.id.clone(), ..Subject::default() };
            audit(&mut write.sql, &Actor::System, "api_key.create", subject, Some(&key.scopes.join(" ")))
                .await?;
            write.commit().await
        })
        .await
    }

    /// One API key, revoked or not.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn api_key(&self, id: &str) -> Result<Option<ApiKey>, StoreError> {
        self.bounded(async {
            let row = sqlx::query(
                "select id, name, scopes, secret_hash, created_at, revoked_at from api_key where id = $1",
            )
            .bind(id.to_owned())
            .fetch_optional(&self.pool)
            .await?;
            row.as_ref().map(api_key).transpose()
        })
        .await
    }

    /// All API keys by age, the first 1000, revoked or not.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn api_keys(&self) -> Result<Vec<ApiKey>, StoreError> {
        self.bounded(async {
            let rows = sqlx::query(
                "select id, name, scopes, secret_hash, created_at, revoked_at from api_key
                 order by created_at, id limit 1000",
            )
            .fetch_all(&self.pool)
            .await?;
            rows.iter().map(api_key).collect()
        })
        .await
    }

    /// Makes an API key useless from now on. A second time changes nothing.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn revoke_api_key(&self, id: &str) -> Result<(), StoreError> {
        self.bounded(async {
            let mut write = self.write().await?;
            let revoked = sqlx::query(
                "update api_key set revoked_at = (select now_ms from clock) where id = $1 and revoked_at is null",
            )
            .bind(id.to_owned())
            .execute(&mut *write.sql)
            .await?
            .rows_affected();
            if revoked == 0 {
                write.rollback().await?;
                let known = sqlx::query("select id from api_key where id = $1")
                    .bind(id.to_owned())
                    .fetch_optional(&self.pool)
                    .await?;
                return known.map(drop).ok_or(StoreError::NotFound);
            }
            let subject = Subject { name: id.to_owned(), ..Subject::default() };
            audit(&mut write.sql, &Actor::System, "api_key.revoke", subject, None).await?;
            write.commit().await
        })
        .await
    }

    /// Adds a ticket.
    ///
    /// # Errors
    /// [`StoreError::Refused`] when there is no such session.
    pub async fn insert_ticket(&self, ticket: &TicketRow) -> Result<(), StoreError> {
        self.bounded(async {
            let mut write = self.write().await?;
            sqlx::query(
                "insert into ticket (id, kind, secret_hash, session_id, user_id, expires_at)
                 values ($1, $2, $3, $4, $5, $6)",
            )
            .bind(ticket.id.clone())
            .bind(ticket.kind.as_str())
            .bind(ticket.secret_hash.clone())
            .bind(ticket.session_id.to_string())
            .bind(ticket.user_id.to_string())
            .bind(ticket.expires_at)
            .execute(&mut *write.sql)
            .await?;
            write.commit().await
        })
        .await
    }

    /// Takes a ticket that has not expired: of any number of takers one gets it. The secret is the caller's to compare;
    /// a wrong one has used the ticket up.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn take_ticket(&self, id: &str) -> Result<Option<TicketRow>, StoreError> {
        self.bounded(async {
            let mut write = self.write().await?;
            let row = sqlx::query(
                "delete from ticket where id = $1 and expires_at > (select now_ms from clock)
                 returning id, kind, secret_hash, session_id, user_id, expires_at",
            )
            .bind(id.to_owned())
            .fetch_optional(&mut *write.sql)
            .await?;
            write.commit().await?;
            let Some(row) = row else { return Ok(None) };
            let malformed = |_| StoreError::Corrupt("a ticket's identity");
            Ok(Some(TicketRow {
                id: row.try_get("id")?,
                secret_hash: row.try_get("secret_hash")?,
                session_id: row.try_get::<String, _>("session_id")?.parse().map_err(malformed)?,
                user_id: row.try_get::<String, _>("user_id")?.parse().map_err(malformed)?,
                expires_at: row.try_get("expires_at")?,
                kind: match row.try_get::<String, _>("kind")?.as_str() {
                    "terminal" => TicketKind::Terminal,
                    "page" => TicketKind::Page,
                    _ => return Err(StoreError::Corrupt("a ticket's kind")),
                },
            }))
        })
        .await
    }

    /// Removes tickets that have expired, and the credentials of sessions that ended more than four minutes ago
    /// (for that long a late login is still told why the session ended). Returns how many rows went.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn delete_expired(&self) -> Result<u64, StoreError> {
        self.bounded(async {
            let mut write = self.write().await?;
            let mut gone = 0;
            for text in [
                "delete from ticket where expires_at <= (select now_ms from clock)",
                "delete from session_public_key where session_id in (
                     select id from session where ended_at < (select now_ms from clock) - 240000)",
                "delete from session_credential where session_id in (
                     select id from session where ended_at < (select now_ms from clock) - 240000)",
            ] {
                gone += sqlx::query(text).execute(&mut *write.sql).await?.rows_affected();
            }
            write.commit().await?;
            Ok(gone)
        })
        .await
    }
}
