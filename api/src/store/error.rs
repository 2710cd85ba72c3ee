//! Why the store did not do as asked.
use std::path::PathBuf;

use sqlx::error::ErrorKind;

use crate::{identity::SessionId, session::State};

/// What [`StoreError::Unavailable`] says of a SQLite file whose lock somebody else holds.
pub(super) const LOCKED: &str = "it is locked by another process";

/// Why the store did not do as asked. No message carries a value of a query.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The database does not answer in time: worth another try.
    #[error("the database does not answer: {0}")]
    Unavailable(&'static str),
    /// The URL names no database that can be used; a sentence that says what to write.
    #[error("{0}")]
    Url(String),
    /// Another server works on this SQLite file.
    #[error("{} is used by another carrel server: stop that one, give this one its own --database-url, or use PostgreSQL to run several", .0.display())]
    InUse(PathBuf),
    /// Sessions of this database run at another place.
    #[error(
        "{live} sessions of this database run in {known}, and would be lost in {asked}: use the settings of the server that made them, or end them first (`carrel session-lifecycle transition`)"
    )]
    Elsewhere {
        /// Where they run.
        known: String,
        /// Where this process would look for them.
        asked: String,
        /// How many they are.
        live: i64,
    },
    /// The schema is of a newer version.
    #[error("the database was made by a newer version of carrel: start that version or a later one")]
    Newer,
    /// A migration's text is not what was applied.
    #[error(
        "migration {0} was altered after it was applied: restore the database from a backup or use the version of carrel that made it"
    )]
    Altered(i64),
    /// The schema could not be made.
    #[error("the database's schema could not be brought up to date: {0}")]
    Migration(String),
    /// The user has a session that has not ended.
    #[error("the user already has an active session")]
    ActiveSessionExists(SessionId),
    /// The lifecycle has no such change.
    #[error("a session cannot go from {current} to {requested}")]
    IllegalTransition {
        /// Where it stands.
        current: State,
        /// Where it should have gone.
        requested: State,
        /// Where it may go.
        allowed: &'static [State],
    },
    /// A final state needs a reason.
    #[error("a session that ends needs a reason")]
    ReasonRequired,
    /// Somebody else changed the row first: read it again.
    #[error("the record was changed by somebody else in the meantime")]
    Conflict,
    /// There is no such row.
    #[error("there is no such record")]
    NotFound,
    /// A row says something that this version does not understand.
    #[error("a record cannot be read: {0}")]
    Corrupt(&'static str),
    /// The schema's rules refuse it.
    #[error("the database's rules refuse this: {0}")]
    Refused(&'static str),
    /// The database reports a fault.
    #[error("the database reports a fault (code {0})")]
    Database(String),
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        match error {
            sqlx::Error::Database(error) => match error.kind() {
                ErrorKind::UniqueViolation => Self::Conflict,
                ErrorKind::ForeignKeyViolation => Self::Refused("a reference points nowhere"),
                ErrorKind::NotNullViolation => Self::Refused("a value is missing"),
                ErrorKind::CheckViolation => Self::Refused("a value is impossible"),
                _ => {
                    let code = error.code().unwrap_or_default();
                    from_code(&code)
                }
            },
            sqlx::Error::Io(_) => Self::Unavailable("the connection failed"),
            sqlx::Error::Tls(_) => Self::Unavailable("no TLS connection can be made"),
            sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => {
                Self::Unavailable("the connection broke")
            }
            sqlx::Error::PoolTimedOut => Self::Unavailable("no connection was to be had in time"),
            sqlx::Error::PoolClosed => Self::Unavailable("the store is closed"),
            sqlx::Error::RowNotFound => Self::NotFound,
            sqlx::Error::Configuration(_) => Self::Url(
                "the database URL cannot be understood: use sqlite:PATH or postgres://USER@HOST/NAME".into(),
            ),
            sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) | sqlx::Error::ColumnNotFound(_) => {
                Self::Corrupt("a column is of an unexpected type")
            }
            _ => Self::Database("unknown".into()),
        }
    }
}

/// SQLSTATE has five characters; SQLite's extended result codes are decimal numbers.
fn from_code(code: &str) -> StoreError {
    match code {
        // SQLite: the low byte is the primary code.
        number if number.len() < 5 && number.parse::<u32>().is_ok() => {
            match number.parse::<u32>().unwrap_or_default() & 0xff {
                5 | 6 => StoreError::Unavailable(LOCKED),
                10 => StoreError::Unavailable("reading or writing its file failed"),
                13 => StoreError::Unavailable("there is no room on its disk"),
                14 => StoreError::Url(
                    "the SQLite file cannot be opened: its directory must exist and be writable".into(),
                ),
                8 => {
                    StoreError::Url("the SQLite file is read-only: make it and its directory writable".into())
                }
                26 => StoreError::Url("the file is no SQLite database: give another path".into()),
                19 => StoreError::Refused("a rule of the schema"),
                _ => StoreError::Database(number.to_owned()),
            }
        }
        "57014" => StoreError::Unavailable("a query took too long"),
        "55P03" | "40P01" | "40001" => StoreError::Unavailable("it is busy with conflicting changes"),
        "28P01" | "28000" => {
            StoreError::Url("the database refuses this user or password: correct the URL".into())
        }
        "3D000" => StoreError::Url("there is no database of this name: create it, or correct the URL".into()),
        "23000" => StoreError::Refused("a rule of the schema"),
        code if code.starts_with("08") || code.starts_with("53") || code.starts_with("57P") => {
            StoreError::Unavailable("the server refuses connections")
        }
        other => StoreError::Database(other.to_owned()),
    }
}
