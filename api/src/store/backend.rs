//! Where the sessions of this database run.
use sqlx::Row as _;

use super::{Store, StoreError};

impl Store {
    /// Begins to work at this place. With `makes`, for a server: records it, and takes what was kept warm out of the pool if it was
    /// made of something else. Without, for a command beside a server: changes nothing.
    ///
    /// # Errors
    /// [`StoreError::Elsewhere`] while sessions run at another place: seen from here they would all be lost.
    pub async fn work_at(&self, place: &str, makes: Option<&str>) -> Result<(), StoreError> {
        self.bounded(async {
            let mut write = self.write().await?;
            if let Some(makes) = makes {
                sqlx::query("insert into backend (place, makes) values ($1, $2) on conflict (one) do nothing")
                    .bind(place.to_owned())
                    .bind(makes.to_owned())
                    .execute(&mut *write.sql)
                    .await?;
            }
            // The lock by which servers that start at once take turns.
            let known = sqlx::query("update backend set one = one returning place, makes")
                .fetch_optional(&mut *write.sql)
                .await?;
            let Some(known) = known else { return write.rollback().await };
            let (before, made): (String, String) = (known.try_get("place")?, known.try_get("makes")?);
            let live: i64 = sqlx::query(
                "select cast(count(*) as bigint) as live from session where state in ('initializing', 'ready', 'running')",
            )
            .fetch_one(&mut *write.sql)
            .await?
            .try_get("live")?;
            if before != place && live > 0 {
                write.rollback().await?;
                return Err(StoreError::Elsewhere { known: before, asked: place.to_owned(), live });
            }
            let Some(makes) = makes else { return write.rollback().await };
            if before != place || made != makes {
                sqlx::query("update backend set place = $1, makes = $2")
                    .bind(place.to_owned())
                    .bind(makes.to_owned())
                    .execute(&mut *write.sql)
                    .await?;
                sqlx::query("update warm_environment set state = 'ending' where state <> 'ending'")
                    .execute(&mut *write.sql)
                    .await?;
            }
            write.commit().await
        })
        .await
    }
}
