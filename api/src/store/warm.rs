//! Environments that are kept ready before their session.
use sqlx::{AssertSqlSafe, Row as _, any::AnyRow};

use super::{
    Store, StoreError,
    actor::{Actor, Subject, audit},
    exam,
    session::{Transition, transition},
};
use crate::{
    exam::Recipe,
    identity::EnvironmentId,
    session::{Session, State},
};

/// Rows looked at at once. All exams together keep fewer warm.
const LISTED: i64 = 10_000;

/// How far one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WarmState {
    /// Named, and on its way.
    Making,
    /// A claim may take it.
    Ready,
    /// No claim takes it any more.
    Ending,
}

impl WarmState {
    /// All of them, in order.
    pub const ALL: [Self; 3] = [Self::Making, Self::Ready, Self::Ending];

    /// As stored.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Making => "making",
            Self::Ready => "ready",
            Self::Ending => "ending",
        }
    }
}

/// One environment that no session has yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WarmEnvironment {
    /// Its name.
    pub id: EnvironmentId,
    /// For which exam.
    pub exam_id: String,
    /// How far it is.
    pub state: WarmState,
    /// Milliseconds since 1970 when it was named.
    pub created_at: i64,
    /// Does the exam still keep environments of this recipe warm?
    pub wanted: bool,
}

/// An exam and how many environments it keeps warm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WarmExam {
    /// Which exam.
    pub exam_id: String,
    /// How many it wants; more than none.
    pub warm: usize,
    /// Milliseconds since 1970 when it was last changed.
    pub updated_at: i64,
}

/// A session that has got its environment's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Begun {
    /// In `initializing`.
    pub session: Session,
    /// Its environment was kept warm for it: made, reached and set up.
    pub warm: bool,
}

fn id(row: &AnyRow) -> Result<EnvironmentId, StoreError> {
    let id: String = row.try_get("environment_id")?;
    id.parse().map_err(|_| StoreError::Corrupt("a warm environment's name"))
}

fn warm_environment(row: &AnyRow) -> Result<WarmEnvironment, StoreError> {
    let state: String = row.try_get("state")?;
    let known = WarmState::ALL.into_iter().find(|known| known.as_str() == state);
    Ok(WarmEnvironment {
        id: id(row)?,
        exam_id: row.try_get("exam_id")?,
        state: known.ok_or(StoreError::Corrupt("a warm environment's state"))?,
        created_at: row.try_get("created_at")?,
        wanted: row.try_get::<i64, _>("wanted")? == 1,
    })
}

impl Store {
    /// From `created` to `initializing`: with the oldest environment that is kept warm for this recipe if there is one, else with
    /// the name given. The claim is one statement: of any number of sessions that claim at once no two get the same.
    ///
    /// # Errors
    /// As [`Store::transition`].
    pub async fn provision(
        &self,
        current: &Session,
        recipe: &Recipe,
        fresh: EnvironmentId,
    ) -> Result<Begun, StoreError> {
        let recipe = exam::recipe(recipe)?;
        let claim = format!(
            "delete from warm_environment where environment_id = (
                 select environment_id from warm_environment
                 where exam_id = $1 and state = 'ready' and recipe = $2
                 order by created_at, environment_id limit 1{}
             ) returning environment_id",
            self.dialect.skip_locked()
        );
        self.bounded(async {
            let mut write = self.write().await?;
            let claimed = sqlx::query(AssertSqlSafe(claim))
                .bind(current.exam_id.clone())
                .bind(recipe)
                .fetch_optional(&mut *write.sql)
                .await?
                .map(|row| id(&row))
                .transpose()?;
            let change = Transition {
                environment_id: Some(claimed.unwrap_or(fresh)),
                step: Some(0),
                ..Transition::to(State::Initializing)
            };
            let remark = claimed.map(|_| "kept warm");
            let session = transition(&mut write, current, change, &Actor::System, remark).await;
            // Without the session's change there is no claim either.
            write.end(session.map(|session| Begun { session, warm: claimed.is_some() })).await
        })
        .await
    }

    /// All environments that no session has, oldest first, at most 10,000.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn warm_environments(&self) -> Result<Vec<WarmEnvironment>, StoreError> {
        self.bounded(async {
            let rows = sqlx::query(
                "select environment_id, exam_id, state, created_at,
                     case when exists (
                         select 1 from exam where exam.id = exam_id and exam.warm > 0 and exam.recipe = warm_environment.recipe
                     ) then cast(1 as bigint) else cast(0 as bigint) end as wanted
                 from warm_environment order by created_at, environment_id limit $1",
            )
            .bind(LISTED)
            .fetch_all(&self.pool)
            .await?;
            rows.iter().map(warm_environment).collect()
        })
        .await
    }

    /// The exams that keep environments warm, by id.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn warm_exams(&self) -> Result<Vec<WarmExam>, StoreError> {
        self.bounded(async {
            let rows =
                sqlx::query("select id, warm, updated_at from exam where warm > 0 order by id limit $1")
                    .bind(LISTED)
                    .fetch_all(&self.pool)
                    .await?;
            let exam = |row: &AnyRow| {
                let warm: i64 = row.try_get("warm")?;
                Ok(WarmExam {
                    exam_id: row.try_get("id")?,
                    warm: usize::try_from(warm).unwrap_or_default(),
                    updated_at: row.try_get("updated_at")?,
                })
            };
            rows.iter().map(exam).collect()
        })
        .await
    }

    /// Names environments for an exam until it has as many as it wants, counting those named after `since` (ms), but no more than
    /// `at_once` on their way. Replicas that do so at the same time take turns and do not name too many. Returns those it named.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn plan_warm(
        &self,
        exam_id: &str,
        since: i64,
        at_once: usize,
    ) -> Result<Vec<WarmEnvironment>, StoreError> {
        self.bounded(async {
            let mut write = self.write().await?;
            // The lock by which replicas take turns.
            let exam =
                sqlx::query("update exam set warm = warm where id = $1 and warm > 0 returning warm, recipe")
                    .bind(exam_id.to_owned())
                    .fetch_optional(&mut *write.sql)
                    .await?;
            let Some(exam) = exam else {
                write.rollback().await?;
                return Ok(Vec::new());
            };
            let (warm, recipe): (i64, String) = (exam.try_get("warm")?, exam.try_get("recipe")?);
            let row = sqlx::query(
                "select cast(count(*) as bigint) as fresh,
                     cast(coalesce(sum(case when state = 'making' then 1 else 0 end), 0) as bigint) as making
                 from warm_environment
                 where exam_id = $1 and recipe = $2 and state in ('making', 'ready') and created_at > $3",
            )
            .bind(exam_id.to_owned())
            .bind(recipe.clone())
            .bind(since)
            .fetch_one(&mut *write.sql)
            .await?;
            let (fresh, making): (i64, i64) = (row.try_get("fresh")?, row.try_get("making")?);
            let at_once = i64::try_from(at_once).unwrap_or(i64::MAX);
            let missing = warm.saturating_sub(fresh).min(at_once.saturating_sub(making)).max(0);
            let mut named = Vec::new();
            for _ in 0..missing {
                let row = sqlx::query(
                    "insert into warm_environment (environment_id, exam_id, recipe, state, created_at)
                     values ($1, $2, $3, 'making', (select now_ms from clock))
                     returning environment_id, exam_id, state, created_at, cast(1 as bigint) as wanted",
                )
                .bind(EnvironmentId::new().to_string())
                .bind(exam_id.to_owned())
                .bind(recipe.clone())
                .fetch_one(&mut *write.sql)
                .await?;
                named.push(warm_environment(&row)?);
            }
            write.commit().await?;
            Ok(named)
        })
        .await
    }

    /// What one is made from; `None` when it is not on its way any more.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn warm_recipe(&self, id: EnvironmentId) -> Result<Option<Recipe>, StoreError> {
        self.bounded(async {
            let row = sqlx::query(
                "select recipe from warm_environment where environment_id = $1 and state = 'making'",
            )
            .bind(id.to_string())
            .fetch_optional(&self.pool)
            .await?;
            let parse = |row: AnyRow| {
                serde_json::from_str(row.try_get("recipe")?)
                    .map_err(|_| StoreError::Corrupt("a warm environment's recipe"))
            };
            row.map(parse).transpose()
        })
        .await
    }

    /// Is it kept warm, on its way or ending? Then no session has it.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn is_warm(&self, id: EnvironmentId) -> Result<bool, StoreError> {
        self.bounded(async {
            let row = sqlx::query("select environment_id from warm_environment where environment_id = $1")
                .bind(id.to_string())
                .fetch_optional(&self.pool)
                .await?;
            Ok(row.is_some())
        })
        .await
    }

    /// To a later state; `false` when it is no longer in the state given: claimed, or changed by another replica.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn move_warm(
        &self,
        id: EnvironmentId,
        from: WarmState,
        to: WarmState,
    ) -> Result<bool, StoreError> {
        self.bounded(async {
            let mut write = self.write().await?;
            let changed = sqlx::query(
                "update warm_environment set state = $1 where environment_id = $2 and state = $3",
            )
            .bind(to.as_str())
            .bind(id.to_string())
            .bind(from.as_str())
            .execute(&mut *write.sql)
            .await?
            .rows_affected();
            write.commit().await?;
            Ok(changed == 1)
        })
        .await
    }

    /// One that was ending is gone. A second time changes nothing.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn forget_warm(&self, id: EnvironmentId) -> Result<(), StoreError> {
        self.bounded(async {
            let mut write = self.write().await?;
            let removed =
                sqlx::query("delete from warm_environment where environment_id = $1 and state = 'ending'")
                    .bind(id.to_string())
                    .execute(&mut *write.sql)
                    .await?
                    .rows_affected();
            if removed == 1 {
                let subject =
                    Subject { name: id.to_string(), environment_id: Some(id), ..Subject::default() };
                audit(&mut write.sql, &Actor::System, "environment.release", subject, None).await?;
            }
            write.commit().await
        })
        .await
    }
}
