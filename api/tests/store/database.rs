//! A fresh database for each test, of either kind, and a raw way in past the store.
#![allow(dead_code, reason = "each test program uses its part")]
use std::sync::atomic::{AtomicU32, Ordering};

use sqlx::{AnyConnection, AssertSqlSafe, Connection as _, Row as _, any::AnyRow};

/// Where the tests' PostgreSQL is: a superuser's URL.
pub const POSTGRES_URL: &str = "CARREL_TEST_POSTGRES_URL";
/// `1`: leave the PostgreSQL half out.
pub const SKIP_POSTGRES: &str = "CARREL_TEST_SKIP_POSTGRES";

/// One fresh database.
pub struct Database {
    pub url: String,
    /// The server's URL and the name to drop, for PostgreSQL.
    postgres: Option<(String, String)>,
    _directory: tempfile::TempDir,
}

static COUNT: AtomicU32 = AtomicU32::new(0);

impl Database {
    pub async fn sqlite() -> Self {
        sqlx::any::install_default_drivers();
        let directory = tempfile::tempdir().unwrap();
        let url = format!("sqlite:{}", directory.path().join("carrel.db").display());
        Self { url, postgres: None, _directory: directory }
    }

    /// `None` when the caller asked to leave PostgreSQL out. Panics when there is none: half of the tests not running must be seen.
    pub async fn postgres() -> Option<Self> {
        sqlx::any::install_default_drivers();
        let Ok(server) = std::env::var(POSTGRES_URL) else {
            assert_eq!(
                std::env::var(SKIP_POSTGRES).as_deref(),
                Ok("1"),
                "{POSTGRES_URL} is not set: run `tests/postgres.sh run cargo test …`, or set {SKIP_POSTGRES}=1 to leave these tests out"
            );
            println!("SKIPPED: {SKIP_POSTGRES}=1");
            return None;
        };
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("carrel_test_{}_{number}", std::process::id());
        let mut connection = AnyConnection::connect(&server).await.unwrap();
        raw(&mut connection, &format!("create database {name}")).await.unwrap();
        let (base, _) = server.rsplit_once('/').unwrap();
        Some(Self {
            url: format!("{base}/{name}"),
            postgres: Some((server, name)),
            _directory: tempfile::tempdir().unwrap(),
        })
    }

    pub fn is_postgres(&self) -> bool {
        self.postgres.is_some()
    }

    /// A connection of its own, past the store's rules but not past the schema's.
    pub async fn connect(&self) -> AnyConnection {
        AnyConnection::connect(&self.url.replace("sqlite:", "sqlite://")).await.unwrap()
    }

    pub async fn drop(self) {
        if let Some((server, name)) = self.postgres {
            let mut connection = AnyConnection::connect(&server).await.unwrap();
            raw(&mut connection, &format!("drop database {name} with (force)")).await.unwrap();
        }
    }
}

pub async fn raw(connection: &mut AnyConnection, text: &str) -> Result<u64, sqlx::Error> {
    sqlx::query(AssertSqlSafe(text.to_owned())).execute(connection).await.map(|result| result.rows_affected())
}

pub async fn rows(connection: &mut AnyConnection, text: &str) -> Vec<Vec<String>> {
    let rows: Vec<AnyRow> = sqlx::query(AssertSqlSafe(text.to_owned())).fetch_all(connection).await.unwrap();
    rows.iter()
        .map(|row| {
            (0..row.len())
                .map(|column| {
                    row.try_get::<Option<String>, _>(column)
                        .map(|text| text.unwrap_or_else(|| "null".into()))
                        .or_else(|_| row.try_get::<i64, _>(column).map(|number| number.to_string()))
                        .unwrap()
                })
                .collect()
        })
        .collect()
}
