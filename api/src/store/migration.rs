//! The schema's history, embedded in the binary. See `migrations/README.md` for what stands where.
use sqlx::{
    AnyConnection, Connection as _, SqlStr,
    migrate::{MigrateError, Migration, MigrationType, Migrator},
};

use super::{Dialect, StoreError};

/// One step; the text differs only where the databases do.
macro_rules! step {
    (common $number:literal $name:literal) => {
        ($number, $name, include_str!(concat!("../../../migrations/common/", $name, ".sql")), None)
    };
    (each $number:literal $name:literal) => {
        (
            $number,
            $name,
            include_str!(concat!("../../../migrations/sqlite/", $name, ".sql")),
            Some(include_str!(concat!("../../../migrations/postgres/", $name, ".sql"))),
        )
    };
}

/// Number, name, text (of SQLite), text of PostgreSQL where it is another one.
const STEPS: [(i64, &str, &str, Option<&str>); 6] = [
    step!(each 1 "0001_clock"),
    step!(common 2 "0002_session"),
    step!(common 3 "0003_access"),
    step!(each 4 "0004_guard"),
    step!(common 5 "0005_warm"),
    step!(common 6 "0006_backend"),
];

fn migrator(dialect: Dialect) -> Migrator {
    Migrator::with_migrations(
        STEPS
            .into_iter()
            .map(|(number, name, sqlite, postgres)| {
                let text = match dialect {
                    Dialect::Sqlite => sqlite,
                    Dialect::Postgres => postgres.unwrap_or(sqlite),
                };
                Migration::new(number, name.into(), MigrationType::Simple, SqlStr::from_static(text), false)
            })
            .collect(),
    )
}

/// Brings the schema to this binary's version. Any number of processes may do so at once: on PostgreSQL they
/// queue for sqlx's advisory lock, on SQLite for the write lock that is taken first.
pub(super) async fn migrate(connection: &mut AnyConnection, dialect: Dialect) -> Result<(), StoreError> {
    let migrator = migrator(dialect);
    let result = match dialect {
        Dialect::Postgres => {
            // Another replica may be at it for longer than a query may take.
            sqlx::raw_sql("set statement_timeout = 0; set lock_timeout = 0")
                .execute(&mut *connection)
                .await?;
            migrator.run_direct(None, connection, false).await
        }
        Dialect::Sqlite => {
            let mut transaction = connection.begin_with(dialect.begin()).await?;
            let result = migrator.run_direct(None, &mut *transaction, false).await;
            if result.is_ok() {
                transaction.commit().await?;
            }
            result
        }
    };
    result.map_err(|error| match error {
        MigrateError::VersionMissing(_) | MigrateError::VersionTooNew(..) => StoreError::Newer,
        MigrateError::VersionMismatch(number) => StoreError::Altered(number),
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => error.into(),
        other => StoreError::Migration(other.to_string()),
    })
}
