//! Sessions: made, found, changed.
use sqlx::{Row as _, any::AnyRow};

use super::{
    Store, StoreError, Write,
    actor::{Actor, audit},
    exam,
};
use crate::{
    exam::Exam,
    identity::{EnvironmentId, SessionId, UserId},
    reason::Reason,
    session::{STEPS, Session, State},
};

/// Rows that the loop takes at once; more wait for the next look.
const UNRELEASED: i64 = 10_000;
/// Longest sentence kept with a reason, bytes.
const DETAILS_BYTES: usize = 8 * 1024;

macro_rules! columns {
    () => {
        "id, user_id, exam_id, environment_id, state, version, reason_code, reason_details, step, duration_ms, \
         start_within_ms, reconnect_window_ms, created_at, initializing_at, ready_at, started_at, ended_at, \
         released_at, active_at, updated_at"
    };
}

/// What a session is made of.
#[derive(Debug, Clone)]
pub struct NewSession<'a> {
    /// Whose it is.
    pub user_id: UserId,
    /// The exam as it stands now.
    pub exam: &'a Exam,
    /// Argon2id hash (PHC string) of the SSH password; `None`: no password gets in.
    pub password_hash: Option<String>,
    /// OpenSSH public keys that get in.
    pub public_keys: Vec<String>,
}

/// One change of state. A final state needs a reason, any other has none; `initializing` needs the environment's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transition {
    /// Where to.
    pub to: State,
    /// Why, for a final state.
    pub reason: Option<Reason>,
    /// Set once, with `initializing`.
    pub environment_id: Option<EnvironmentId>,
    /// Index into [`STEPS`]; `None` leaves it.
    pub step: Option<usize>,
}

impl Transition {
    /// To a state that is not final.
    #[must_use]
    pub const fn to(to: State) -> Self {
        Self { to, reason: None, environment_id: None, step: None }
    }

    /// To a final state.
    #[must_use]
    pub const fn end(to: State, reason: Reason) -> Self {
        Self { to, reason: Some(reason), environment_id: None, step: None }
    }
}

/// What opens a session.
#[derive(Clone, PartialEq, Eq)]
pub struct SessionCredential {
    /// Argon2id hash (PHC string); `None` once removed, or where there never was one.
    pub password_hash: Option<String>,
    /// OpenSSH public keys in the order given.
    pub public_keys: Vec<String>,
    /// Whose session it is.
    pub user_id: UserId,
    /// Where it stands.
    pub state: State,
}

impl std::fmt::Debug for SessionCredential {
    /// Without the hash.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SessionCredential")
            .field("user_id", &self.user_id)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

fn text(row: &AnyRow, column: &str) -> Result<String, StoreError> {
    Ok(row.try_get(column)?)
}

fn state(row: &AnyRow) -> Result<State, StoreError> {
    text(row, "state")?.parse().map_err(|_| StoreError::Corrupt("a session's state"))
}

fn session(row: &AnyRow) -> Result<Session, StoreError> {
    let malformed = |_| StoreError::Corrupt("a session's identity");
    let code: Option<String> = row.try_get("reason_code")?;
    let reason = code.map(|code| {
        Ok::<_, StoreError>(Reason {
            code: code.parse().map_err(|_| StoreError::Corrupt("a session's reason"))?,
            technical_details: row.try_get::<Option<String>, _>("reason_details")?.unwrap_or_default(),
        })
    });
    let environment_id: Option<String> = row.try_get("environment_id")?;
    Ok(Session {
        id: text(row, "id")?.parse().map_err(malformed)?,
        user_id: text(row, "user_id")?.parse().map_err(malformed)?,
        exam_id: text(row, "exam_id")?,
        environment_id: environment_id.map(|id| id.parse().map_err(malformed)).transpose()?,
        state: state(row)?,
        version: row.try_get("version")?,
        reason: reason.transpose()?,
        step: usize::try_from(row.try_get::<i64, _>("step")?)
            .ok()
            .filter(|step| *step < STEPS.len())
            .ok_or(StoreError::Corrupt("a session's step"))?,
        duration_ms: row.try_get("duration_ms")?,
        start_within_ms: row.try_get("start_within_ms")?,
        reconnect_window_ms: row.try_get("reconnect_window_ms")?,
        created_at: row.try_get("created_at")?,
        initializing_at: row.try_get("initializing_at")?,
        ready_at: row.try_get("ready_at")?,
        started_at: row.try_get("started_at")?,
        ended_at: row.try_get("ended_at")?,
        released_at: row.try_get("released_at")?,
        active_at: row.try_get("active_at")?,
        updated_at: row.try_get("updated_at")?,
    })
}

/// Cut at a character, because a tail of some program's output may be long.
fn shortened(details: &str) -> String {
    details.get(..details.floor_char_boundary(DETAILS_BYTES)).unwrap_or_default().replace('\0', "\u{fffd}")
}

/// The change itself, within a write. `remark` goes to the audit entry of a change that has no reason.
pub(super) async fn transition(
    write: &mut Write<'_>,
    current: &Session,
    change: Transition,
    actor: &Actor,
    remark: Option<&str>,
) -> Result<Session, StoreError> {
    let allowed = current.state.next();
    let illegal = StoreError::IllegalTransition { current: current.state, requested: change.to, allowed };
    if !allowed.contains(&change.to) {
        return Err(illegal);
    }
    if change.to.is_terminal() && change.reason.is_none() {
        return Err(StoreError::ReasonRequired);
    }
    let to = change.to.as_str();
    let environment_id = change.environment_id.or(current.environment_id).map(|id| id.to_string());
    let reason = change.reason.filter(|_| change.to.is_terminal());
    let code = reason.as_ref().map(|reason| reason.code.as_str());
    let details = reason.as_ref().map(|reason| shortened(&reason.technical_details));
    let step = change.step.and_then(|step| i64::try_from(step).ok());
    let row = sqlx::query(
        "insert into session_transition
             (session_id, user_id, number, previous_number, from_state, to_state, environment_id, reason_code,
              reason_details, actor_kind, actor_id, at)
         select id, user_id, transition_number + 1, transition_number, state, $1, $2, $3, $4, $5, $6, now_ms
         from session, clock where id = $7 and state = $8 and version = $9 returning at",
    )
    .bind(to)
    .bind(environment_id.clone())
    .bind(code)
    .bind(details.clone())
    .bind(actor.kind())
    .bind(actor.id())
    .bind(current.id.to_string())
    .bind(current.state.as_str())
    .bind(current.version)
    .fetch_optional(&mut *write.sql)
    .await
    .map_err(|error| match StoreError::from(error) {
        StoreError::Refused(_) => illegal,
        other => other,
    })?;
    let Some(row) = row else { return Err(StoreError::Conflict) };
    let now: i64 = row.try_get(0)?;
    let row = sqlx::query(concat!(
        "update session set state = $1, transition_number = transition_number + 1, version = version + 1, ",
        "environment_id = coalesce(environment_id, $2), reason_code = $3, reason_details = $4, ",
        "step = coalesce($5, step), updated_at = $6, ",
        "active_at = case when $1 in ('ready', 'running') then $6 else active_at end, ",
        "initializing_at = case when $1 = 'initializing' then $6 else initializing_at end, ",
        "ready_at = case when $1 = 'ready' then $6 else ready_at end, ",
        "started_at = case when $1 = 'running' then $6 else started_at end, ",
        "ended_at = case when $1 in ('terminated', 'failed') then $6 else ended_at end ",
        "where id = $7 and state = $8 and version = $9 returning ",
        columns!()
    ))
    .bind(to)
    .bind(environment_id)
    .bind(code)
    .bind(details)
    .bind(step)
    .bind(now)
    .bind(current.id.to_string())
    .bind(current.state.as_str())
    .bind(current.version)
    .fetch_optional(&mut *write.sql)
    .await?;
    let Some(row) = row else { return Err(StoreError::Conflict) };
    let changed = session(&row)?;
    let detail = match code.or(remark) {
        Some(more) => format!("{} -> {to}: {more}", current.state),
        None => format!("{} -> {to}", current.state),
    };
    audit(&mut write.sql, actor, "session.transition", (&changed).into(), Some(&detail)).await?;
    Ok(changed)
}

impl Store {
    /// Makes a session in `created`.
    ///
    /// # Errors
    /// [`StoreError::ActiveSessionExists`] when the user has one that has not ended.
    pub async fn create_session(&self, new: &NewSession<'_>, actor: &Actor) -> Result<Session, StoreError> {
        self.bounded(async {
            // The session in the way may end between the refusal and the look at it.
            for _ in 0..3 {
                match self.try_create_session(new, actor).await {
                    Err(StoreError::Conflict) => {
                        if let Some(active) = self.active_session(new.user_id).await? {
                            return Err(StoreError::ActiveSessionExists(active.id));
                        }
                    }
                    other => return other,
                }
            }
            Err(StoreError::Conflict)
        })
        .await
    }

    async fn try_create_session(&self, new: &NewSession<'_>, actor: &Actor) -> Result<Session, StoreError> {
        let id = SessionId::new().to_string();
        let user_id = new.user_id.to_string();
        let exam = new.exam;
        let mut write = self.write().await?;
        let row = sqlx::query(
            "insert into session_transition (session_id, user_id, number, to_state, actor_kind, actor_id, at)
             values ($1, $2, 0, 'created', $3, $4, (select now_ms from clock)) returning at",
        )
        .bind(id.clone())
        .bind(user_id.clone())
        .bind(actor.kind())
        .bind(actor.id())
        .fetch_one(&mut *write.sql)
        .await?;
        let now: i64 = row.try_get(0)?;
        let row = sqlx::query(concat!(
            "insert into session (id, user_id, exam_id, exam, state, transition_number, version, step, duration_ms, ",
            "start_within_ms, reconnect_window_ms, created_at, active_at, updated_at) ",
            "values ($1, $2, $3, $4, 'created', 0, 1, 0, $5, $6, $7, $8, $8, $8) returning ",
            columns!()
        ))
        .bind(id.clone())
        .bind(user_id)
        .bind(exam.id.clone())
        .bind(exam::document(exam)?)
        .bind(i64::from(exam.duration_minutes) * 60_000)
        .bind(i64::from(exam.start_within_seconds) * 1000)
        .bind(i64::from(exam.reconnect_window_seconds) * 1000)
        .bind(now)
        .fetch_one(&mut *write.sql)
        .await?;
        let session = session(&row)?;
        sqlx::query("insert into session_credential (session_id, password_hash) values ($1, $2)")
            .bind(id.clone())
            .bind(new.password_hash.clone())
            .execute(&mut *write.sql)
            .await?;
        for (position, key) in (0_i64..).zip(&new.public_keys) {
            sqlx::query(
                "insert into session_public_key (session_id, position, public_key) values ($1, $2, $3)",
            )
            .bind(id.clone())
            .bind(position)
            .bind(key.clone())
            .execute(&mut *write.sql)
            .await?;
        }
        audit(&mut write.sql, actor, "session.create", (&session).into(), Some(&exam.id)).await?;
        write.commit().await?;
        Ok(session)
    }

    /// One session.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn session(&self, id: SessionId) -> Result<Option<Session>, StoreError> {
        self.bounded(async {
            let row = sqlx::query(concat!("select ", columns!(), " from session where id = $1"))
                .bind(id.to_string())
                .fetch_optional(&self.pool)
                .await?;
            row.as_ref().map(session).transpose()
        })
        .await
    }

    /// The user's session that has not ended; there is at most one.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn active_session(&self, user_id: UserId) -> Result<Option<Session>, StoreError> {
        self.bounded(async {
            let row = sqlx::query(concat!(
                "select ",
                columns!(),
                " from session where user_id = $1 and state in ('created', 'initializing', 'ready', 'running')"
            ))
            .bind(user_id.to_string())
            .fetch_optional(&self.pool)
            .await?;
            row.as_ref().map(session).transpose()
        })
        .await
    }

    /// Every session that the lifecycle still has to do with, oldest first, at most 10,000: those that have not ended, and those that
    /// have but whose environment may be there.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn unreleased_sessions(&self) -> Result<Vec<Session>, StoreError> {
        self.bounded(async {
            let rows = sqlx::query(concat!(
                "select ",
                columns!(),
                " from session where released_at is null order by created_at, id limit $1"
            ))
            .bind(UNRELEASED)
            .fetch_all(&self.pool)
            .await?;
            rows.iter().map(session).collect()
        })
        .await
    }

    /// The session that an environment was made for, ended or not.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn environment_session(&self, id: EnvironmentId) -> Result<Option<Session>, StoreError> {
        self.bounded(async {
            let row = sqlx::query(concat!("select ", columns!(), " from session where environment_id = $1"))
                .bind(id.to_string())
                .fetch_optional(&self.pool)
                .await?;
            row.as_ref().map(session).transpose()
        })
        .await
    }

    /// Changes the state of a session that is still as it was read.
    ///
    /// # Errors
    /// [`StoreError::IllegalTransition`], [`StoreError::ReasonRequired`], and [`StoreError::Conflict`] when it was changed since.
    pub async fn transition(
        &self,
        current: &Session,
        change: Transition,
        actor: &Actor,
    ) -> Result<Session, StoreError> {
        self.bounded(async {
            let mut write = self.write().await?;
            let changed = transition(&mut write, current, change, actor, None).await;
            write.end(changed).await
        })
        .await
    }

    /// Moves provisioning on to a later step ([`STEPS`]); an earlier one changes nothing.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when it was changed since it was read.
    pub async fn set_step(&self, current: &Session, step: usize) -> Result<Session, StoreError> {
        if step <= current.step {
            return Ok(current.clone());
        }
        let step = i64::try_from(step.min(STEPS.len().saturating_sub(1))).unwrap_or_default();
        self.bounded(async {
            let mut write = self.write().await?;
            let row = sqlx::query(concat!(
                "update session set step = $1, version = version + 1, updated_at = (select now_ms from clock) ",
                "where id = $2 and state = $3 and version = $4 returning ",
                columns!()
            ))
            .bind(step)
            .bind(current.id.to_string())
            .bind(current.state.as_str())
            .bind(current.version)
            .fetch_optional(&mut *write.sql)
            .await?;
            write.commit().await?;
            row.as_ref().map_or(Err(StoreError::Conflict), session)
        })
        .await
    }

    /// Somebody is attached now. No change that anybody waits for: the version stays.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn touch(&self, id: SessionId) -> Result<(), StoreError> {
        self.bounded(async {
            let mut write = self.write().await?;
            sqlx::query(
                "update session set active_at = (select now_ms from clock)
                 where id = $1 and state in ('ready', 'running')",
            )
            .bind(id.to_string())
            .execute(&mut *write.sql)
            .await?;
            write.commit().await
        })
        .await
    }

    /// The environment of an ended session, its secrets and storage are gone. A second time changes nothing.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when it has not ended, [`StoreError::NotFound`].
    pub async fn mark_released(&self, id: SessionId) -> Result<Session, StoreError> {
        self.bounded(async {
            let mut write = self.write().await?;
            let row = sqlx::query(concat!(
                "update session set released_at = (select now_ms from clock), version = version + 1 ",
                "where id = $1 and state in ('terminated', 'failed') and released_at is null returning ",
                columns!()
            ))
            .bind(id.to_string())
            .fetch_optional(&mut *write.sql)
            .await?;
            let Some(row) = row else {
                write.rollback().await?;
                let known = self.session(id).await?.ok_or(StoreError::NotFound)?;
                return if known.released_at.is_some() { Ok(known) } else { Err(StoreError::Conflict) };
            };
            let released = session(&row)?;
            audit(&mut write.sql, &Actor::System, "session.release", (&released).into(), None).await?;
            write.commit().await?;
            Ok(released)
        })
        .await
    }

    /// The exam as it stood when the session was made.
    ///
    /// # Errors
    /// [`StoreError::NotFound`].
    pub async fn environment_exam(&self, session: &Session) -> Result<Exam, StoreError> {
        self.bounded(async {
            let row = sqlx::query("select exam from session where id = $1")
                .bind(session.id.to_string())
                .fetch_optional(&self.pool)
                .await?
                .ok_or(StoreError::NotFound)?;
            serde_json::from_str(&text(&row, "exam")?).map_err(|_| StoreError::Corrupt("a session's exam"))
        })
        .await
    }

    /// What opens a session; `None` when there is no such session.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn session_credential(&self, id: SessionId) -> Result<Option<SessionCredential>, StoreError> {
        self.bounded(async {
            let row = sqlx::query(
                "select user_id, state, password_hash from session
                 left join session_credential on session_id = id where id = $1",
            )
            .bind(id.to_string())
            .fetch_optional(&self.pool)
            .await?;
            let Some(row) = row else { return Ok(None) };
            let keys = sqlx::query(
                "select public_key from session_public_key where session_id = $1 order by position",
            )
            .bind(id.to_string())
            .fetch_all(&self.pool)
            .await?;
            Ok(Some(SessionCredential {
                password_hash: row.try_get("password_hash")?,
                public_keys: keys.iter().map(|row| text(row, "public_key")).collect::<Result<_, _>>()?,
                user_id: text(&row, "user_id")?
                    .parse()
                    .map_err(|_| StoreError::Corrupt("a session's identity"))?,
                state: state(&row)?,
            }))
        })
        .await
    }
}
