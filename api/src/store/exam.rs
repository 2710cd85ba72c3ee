//! Exams as last defined.
use sqlx::Row as _;

use super::{
    Store, StoreError,
    actor::{Actor, Subject, audit},
};
use crate::exam::{Exam, Recipe};

/// Exams listed at most: a list is held in memory.
const LISTED: i64 = 1000;

fn parse(document: &str) -> Result<Exam, StoreError> {
    serde_json::from_str(document).map_err(|_| StoreError::Corrupt("an exam's definition"))
}

pub(super) fn document(exam: &Exam) -> Result<String, StoreError> {
    serde_json::to_string(exam).map_err(|_| StoreError::Corrupt("an exam's definition"))
}

/// The text by which recipes are compared.
pub(super) fn recipe(recipe: &Recipe) -> Result<String, StoreError> {
    serde_json::to_string(recipe).map_err(|_| StoreError::Corrupt("an exam's recipe"))
}

impl Store {
    /// Makes or replaces an exam. Sessions that exist keep the exam as it was.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn put_exam(&self, exam: &Exam) -> Result<(), StoreError> {
        let document = document(exam)?;
        let recipe = recipe(&Recipe::of(exam))?;
        self.bounded(async {
            let mut write = self.write().await?;
            // An unchanged one leaves no trace: a server puts its files at every start.
            let changed = sqlx::query(
                "insert into exam (id, document, warm, recipe, updated_at)
                 values ($1, $2, $3, $4, (select now_ms from clock))
                 on conflict (id) do update
                 set document = excluded.document, warm = excluded.warm, recipe = excluded.recipe,
                     updated_at = excluded.updated_at
                 where exam.document <> excluded.document or exam.recipe <> excluded.recipe",
            )
            .bind(exam.id.clone())
            .bind(document)
            .bind(i64::from(exam.warm))
            .bind(recipe)
            .execute(&mut *write.sql)
            .await?
            .rows_affected();
            if changed > 0 {
                let subject = Subject { name: exam.id.clone(), ..Subject::default() };
                audit(&mut write.sql, &Actor::System, "exam.put", subject, None).await?;
            }
            write.commit().await
        })
        .await
    }

    /// One exam.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn exam(&self, id: &str) -> Result<Option<Exam>, StoreError> {
        self.bounded(async {
            let row = sqlx::query("select document from exam where id = $1")
                .bind(id.to_owned())
                .fetch_optional(&self.pool)
                .await?;
            row.map(|row| parse(row.try_get(0)?)).transpose()
        })
        .await
    }

    /// All exams by id, the first 1000.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn exams(&self) -> Result<Vec<Exam>, StoreError> {
        self.bounded(async {
            let rows = sqlx::query("select document from exam order by id limit $1")
                .bind(LISTED)
                .fetch_all(&self.pool)
                .await?;
            rows.iter().map(|row| parse(row.try_get(0)?)).collect()
        })
        .await
    }
}
