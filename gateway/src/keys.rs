//! `carrel api-key`: keys for platforms and staff, one JSON document on stdout for each command.
use std::process::ExitCode;

use carrel_api::{
    access::Scope,
    cli::{Exit, Output},
    credential::{Secret, SecretKind},
    store::{ApiKeyRow, Store, StoreError},
};

use serde_json::Value;

use crate::{
    options::{ApiKeyAction, Database},
    serve::{StartError, data_dir, database_url},
    tools,
};

impl From<&KeysError> for Output {
    fn from(error: &KeysError) -> Self {
        match error {
            KeysError::Start(error) => tools::unavailable(error),
            KeysError::Store(error) => tools::refused(error),
            KeysError::Scope(_) => Self::error(
                Exit::ValidationFailed,
                "INVALID_SCOPE",
                &error.to_string(),
                serde_json::json!({}),
            ),
        }
    }
}

/// Why a command about keys failed.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The database's place.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No such scope.
    #[error("{0:?} is no scope; there are platform, operator, proctor and grader")]
    Scope(String),
}

/// Runs one command and prints what it has to say.
pub async fn run(database: &Database, action: ApiKeyAction) -> ExitCode {
    let output = match answer(database, action).await {
        Ok(json) => Output { exit: Exit::Ok, json },
        Err(error) => Output::from(&error),
    };
    tools::say(&output)
}

async fn answer(database: &Database, action: ApiKeyAction) -> Result<Value, KeysError> {
    let store = open(database).await?;
    Ok(match action {
        ApiKeyAction::Create { name, scopes } => {
            let (id, key) = create(&store, &name, &scopes).await?;
            serde_json::json!({"id": id, "key": key, "scopes": scopes})
        }
        ApiKeyAction::List => {
            let keys = store.api_keys().await?.into_iter().map(|key| {
                serde_json::json!({
                    "id": key.row.id,
                    "name": key.row.name,
                    "scopes": key.row.scopes,
                    "revoked": key.revoked_at.is_some(),
                })
            });
            serde_json::json!({"keys": keys.collect::<Vec<_>>()})
        }
        ApiKeyAction::Revoke { id } => {
            store.revoke_api_key(&id).await?;
            serde_json::json!({"id": id, "revoked": true})
        }
    })
}

async fn open(database: &Database) -> Result<Store, KeysError> {
    let data_dir = data_dir(&database.data_dir)?;
    Ok(Store::open(&database_url(database, &data_dir)?).await?)
}

/// Makes a key. What is returned second is shown this once: only its hash is kept.
pub async fn create(store: &Store, name: &str, scopes: &[String]) -> Result<(String, String), KeysError> {
    if let Some(unknown) = scopes.iter().find(|scope| scope.parse::<Scope>().is_err()) {
        return Err(KeysError::Scope(unknown.clone()));
    }
    let secret = Secret::new(SecretKind::ApiKey, None);
    let row = ApiKeyRow {
        id: secret.id().to_owned(),
        name: name.to_owned(),
        scopes: scopes.to_vec(),
        secret_hash: secret.hash(),
    };
    store.insert_api_key(&row).await?;
    Ok((row.id, secret.expose().to_owned()))
}
