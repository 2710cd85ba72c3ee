//! The one place that speaks SQL: sessions, credentials, keys, tickets, exams and records.
//!
//! The same query text runs on PostgreSQL and on SQLite. Rules live in the schema (`migrations/`); this module's own
//! checks only give a better answer sooner. Times come from the database. Nothing here knows environments or clients.
use std::{
    fs::{File, OpenOptions, TryLockError},
    future::Future,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use sqlx::{
    Any, AnyConnection, AnyPool, Connection as _, Row as _, Transaction as SqlTransaction,
    any::{AnyConnectOptions, AnyPoolOptions},
};
use tokio::sync::{Semaphore, SemaphorePermit};

pub use self::{
    access::{AccessRecord, ApiKey, ApiKeyRow, Channel, Outcome, TicketKind, TicketRow},
    actor::Actor,
    error::StoreError,
    session::{NewSession, SessionCredential, Transition},
    warm::{Begun, WarmEnvironment, WarmExam, WarmState},
};

mod access;
mod actor;
mod backend;
mod error;
mod exam;
mod migration;
mod session;
mod warm;

/// Longest wait for a connection of the pool.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time of one call in all, also when the network swallows packets. Callers answer within 10 s.
const CALL_TIMEOUT: Duration = Duration::from_secs(8);
/// Longest wait for the schema: another replica may be making it.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(120);
/// Connections of one replica to PostgreSQL, whose default is 100 for everybody.
const POSTGRES_CONNECTIONS: u32 = 16;
/// Longest wait for the right to make a new SQLite file a write-ahead one, below [`ACQUIRE_TIMEOUT`]; and between two attempts.
const SQLITE_LOCK_TIMEOUT: Duration = Duration::from_secs(4);
const SQLITE_LOCK_PAUSE: Duration = Duration::from_millis(10);
/// Connections to SQLite: readers; writers take turns.
const SQLITE_CONNECTIONS: u32 = 6;

/// Which database it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialect {
    Sqlite,
    Postgres,
}

impl Dialect {
    /// SQLite must take its write lock at once: of two readers that both want to write, one would fail as busy.
    const fn begin(self) -> &'static str {
        match self {
            Self::Sqlite => "begin immediate",
            Self::Postgres => "begin",
        }
    }

    /// Behind a `select` in a claim: who claims at the same time takes another row, and does not wait.
    const fn skip_locked(self) -> &'static str {
        match self {
            Self::Sqlite => "",
            Self::Postgres => " for update skip locked",
        }
    }

    /// What every connection is told first.
    const fn settings(self) -> &'static str {
        match self {
            Self::Sqlite => "pragma busy_timeout = 5000; pragma synchronous = full; pragma foreign_keys = on",
            Self::Postgres => {
                "set statement_timeout = 5000; set lock_timeout = 4000; set idle_in_transaction_session_timeout = 15000"
            }
        }
    }
}

/// A database of sessions. Clones share its connections.
#[derive(Debug, Clone)]
pub struct Store {
    pool: AnyPool,
    dialect: Dialect,
    /// SQLite has one writer at a time; waiting here is fair, waiting in SQLite is polling.
    writer: Arc<Semaphore>,
    /// Held for the life of the store by a server.
    _lock: Option<Arc<File>>,
}

/// A write transaction, with the turn to write that goes with it.
struct Write<'a> {
    sql: SqlTransaction<'static, Any>,
    _turn: SemaphorePermit<'a>,
}

impl Store {
    /// Opens the database and brings its schema up to date: `sqlite:PATH` (made when it is not there, readable by its owner only)
    /// or `postgres://…`.
    ///
    /// # Errors
    /// [`StoreError::Url`] for what cannot be a database, [`StoreError::Unavailable`] when it does not answer,
    /// [`StoreError::Newer`] when a later version of carrel made it.
    pub async fn open(url: &str) -> Result<Self, StoreError> {
        Self::open_with(url, false).await
    }

    /// As [`Store::open`], for a server: nobody else can open the same SQLite file in this way until the store is dropped.
    /// Several servers on one PostgreSQL are fine.
    ///
    /// # Errors
    /// As [`Store::open`], and [`StoreError::InUse`].
    pub async fn open_exclusive(url: &str) -> Result<Self, StoreError> {
        Self::open_with(url, true).await
    }

    async fn open_with(url: &str, exclusive: bool) -> Result<Self, StoreError> {
        sqlx::any::install_default_drivers();
        let (dialect, url, lock) = match sqlite_path(url)? {
            Some(path) => {
                make_file(&path)?;
                let lock = if exclusive { Some(Arc::new(lock_file(&path)?)) } else { None };
                (Dialect::Sqlite, sqlite_url(&path)?, lock)
            }
            None => (Dialect::Postgres, url.to_owned(), None),
        };
        let options: AnyConnectOptions = url.parse().map_err(StoreError::from)?;
        // Not from the pool: it tries again for seconds where the first error says what is wrong.
        let connect = async {
            let mut connection = AnyConnection::connect_with(&options).await?;
            sqlx::raw_sql(dialect.settings()).execute(&mut connection).await?;
            if dialect == Dialect::Sqlite {
                write_ahead(&mut connection).await?;
            }
            Ok::<_, StoreError>(connection)
        };
        let mut connection = tokio::time::timeout(ACQUIRE_TIMEOUT, connect)
            .await
            .unwrap_or(Err(StoreError::Unavailable("there was no answer in time")))?;
        tokio::time::timeout(MIGRATION_TIMEOUT, migration::migrate(&mut connection, dialect))
            .await
            .unwrap_or(Err(StoreError::Unavailable("bringing its schema up to date took too long")))?;
        // The schema is made: how this connection ends changes nothing.
        let _ = connection.close().await;
        let pool = AnyPoolOptions::new()
            .max_connections(match dialect {
                Dialect::Sqlite => SQLITE_CONNECTIONS,
                Dialect::Postgres => POSTGRES_CONNECTIONS,
            })
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .after_connect(move |connection, _| {
                Box::pin(async move { sqlx::raw_sql(dialect.settings()).execute(connection).await.map(drop) })
            })
            .connect_lazy_with(options);
        Ok(Self { pool, dialect, writer: Arc::new(Semaphore::new(1)), _lock: lock })
    }

    /// Closes every connection. Calls after this get [`StoreError::Unavailable`].
    pub async fn close(&self) {
        self.pool.close().await;
    }

    /// The database's clock, milliseconds since 1970.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn now(&self) -> Result<i64, StoreError> {
        self.bounded(async {
            let row = sqlx::query("select now_ms from clock").fetch_one(&self.pool).await?;
            Ok(row.try_get(0)?)
        })
        .await
    }

    /// Does it answer?
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn ping(&self) -> Result<(), StoreError> {
        self.now().await.map(drop)
    }

    /// Holds every call to its time limit.
    async fn bounded<T>(&self, call: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        tokio::time::timeout(CALL_TIMEOUT, call)
            .await
            .unwrap_or(Err(StoreError::Unavailable("there was no answer in time")))
    }

    /// Starts a write.
    async fn write(&self) -> Result<Write<'_>, StoreError> {
        let turns = match self.dialect {
            Dialect::Sqlite => 1,
            Dialect::Postgres => 0,
        };
        let turn = self.writer.acquire_many(turns).await;
        let turn = turn.map_err(|_| StoreError::Unavailable("the store is closed"))?;
        Ok(Write { sql: self.pool.begin_with(self.dialect.begin()).await?, _turn: turn })
    }
}

impl Write<'_> {
    async fn commit(self) -> Result<(), StoreError> {
        Ok(self.sql.commit().await?)
    }

    async fn rollback(self) -> Result<(), StoreError> {
        Ok(self.sql.rollback().await?)
    }

    /// Keeps what was written, or nothing of it when something went wrong.
    async fn end<T>(self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        match result {
            Ok(value) => self.commit().await.map(|()| value),
            Err(error) => self.rollback().await.and(Err(error)),
        }
    }
}

/// Lets readers go on while somebody writes; the file keeps this. Several processes may open a new file at once, and for
/// this one change SQLite asks once only for a lock that somebody else has reserved, whatever its `busy_timeout`: who does not get it asks
/// again.
async fn write_ahead(connection: &mut AnyConnection) -> Result<(), StoreError> {
    let until = Instant::now() + SQLITE_LOCK_TIMEOUT;
    loop {
        match sqlx::raw_sql("pragma journal_mode = wal")
            .execute(&mut *connection)
            .await
            .map_err(StoreError::from)
        {
            Err(StoreError::Unavailable(error::LOCKED)) if Instant::now() < until => {
                tokio::time::sleep(SQLITE_LOCK_PAUSE).await
            }
            result => return result.map(drop),
        }
    }
}

/// The file of a SQLite URL; `None` for PostgreSQL.
fn sqlite_path(url: &str) -> Result<Option<PathBuf>, StoreError> {
    if url.starts_with("postgres://") || url.starts_with("postgresql://") {
        return Ok(None);
    }
    let Some(path) = url.strip_prefix("sqlite:") else {
        return Err(StoreError::Url("the database URL must begin with sqlite: or postgres://".into()));
    };
    let path = path.strip_prefix("//").unwrap_or(path);
    if path.is_empty() || path.starts_with(":memory:") || path.contains('?') {
        return Err(StoreError::Url(
            "a SQLite URL is sqlite: and the path of a file, with nothing after it".into(),
        ));
    }
    let path = Path::new(path);
    std::path::absolute(path)
        .map(Some)
        .map_err(|error| StoreError::Url(format!("{} is no path that can be used: {error}", path.display())))
}

/// Percent-encoded, because a path may hold what means something else in a URL.
fn sqlite_url(path: &Path) -> Result<String, StoreError> {
    let Some(path) = path.to_str() else {
        return Err(StoreError::Url("the path of a SQLite file must be UTF-8".into()));
    };
    let mut url = String::from("sqlite://");
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
            url.push(char::from(byte));
        } else {
            url.push_str(&format!("%{byte:02X}"));
        }
    }
    Ok(url)
}

/// Makes the file for its owner only: it holds password hashes. SQLite gives its WAL the same mode.
fn make_file(path: &Path) -> Result<(), StoreError> {
    OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path).map(drop).map_err(
        |error| {
            StoreError::Url(format!(
                "{} cannot be opened for writing ({error}): its directory must exist and be writable",
                path.display()
            ))
        },
    )
}

/// A lock of its own file, not of the database's: SQLite takes and drops byte locks on that one.
fn lock_file(path: &Path) -> Result<File, StoreError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&name);
    let file = file.map_err(|error| {
        StoreError::Url(format!("{} cannot be made: {error}", Path::new(&name).display()))
    })?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::InUse(path.to_owned())),
        Err(TryLockError::Error(error)) => {
            Err(StoreError::Url(format!("{} cannot be locked: {error}", Path::new(&name).display())))
        }
    }
}
