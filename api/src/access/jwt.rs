//! Bearer tokens of people: JSON Web Tokens, signed by whom the operator trusts.
//!
//! Keys come from a file that is read again when it changes; fetching them is left to whatever keeps the file, so that no login waits for
//! another server. Symmetric algorithms are never taken: whoever can check such a token can make one.
use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header, jwk::JwkSet};
use serde::Deserialize;

use super::caller::{Caller, Scope, Scopes};
use crate::identity::UserId;

/// Who signs people's bearer tokens. Without these, only API keys are taken.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct JwtOptions {
    /// `iss` that people's tokens must have
    #[arg(long, env = "CARREL_JWT_ISSUER", value_name = "ISSUER")]
    pub jwt_issuer: Option<String>,
    /// `aud` that people's tokens must have
    #[arg(long, env = "CARREL_JWT_AUDIENCE", value_name = "AUDIENCE")]
    pub jwt_audience: Option<String>,
    /// The signer's public keys, a JWK set (RFC 7517); read again when it changes
    #[arg(long, env = "CARREL_JWT_JWKS_FILE", value_name = "FILE")]
    pub jwt_jwks_file: Option<PathBuf>,
    /// Signature algorithms that are taken. Default: EdDSA,ES256,ES384,PS256,RS256
    #[arg(long, env = "CARREL_JWT_ALGORITHMS", value_name = "ALGORITHM", value_delimiter = ',')]
    pub jwt_algorithms: Vec<String>,
}

/// Why the settings for bearer tokens cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// Some are given and some are not.
    #[error("--jwt-issuer, --jwt-audience and --jwt-jwks-file belong together: give all three or none")]
    Incomplete,
    /// No such algorithm, or a symmetric one.
    #[error(
        "--jwt-algorithms: {0:?} is not one of EdDSA, ES256, ES384, PS256, PS384, PS512, RS256, RS384 and RS512"
    )]
    Algorithm(String),
    /// The key file.
    #[error("the JWK set {} cannot be used: {message}", path.display())]
    Jwks {
        /// Which file.
        path: PathBuf,
        /// Why.
        message: String,
    },
}

/// How often the file is looked at, at most.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Clocks may differ by this, seconds.
const LEEWAY: u64 = 30;
/// Longest token, bytes.
const LONGEST: usize = 8 * 1024;
/// Largest key file, bytes.
const JWKS_BYTES: u64 = 1 << 20;

/// Checks tokens.
pub(super) struct Verifier {
    issuer: String,
    audience: String,
    algorithms: Vec<Algorithm>,
    path: PathBuf,
    keys: Mutex<Keys>,
}

struct Keys {
    set: Arc<JwkSet>,
    changed: Option<SystemTime>,
    looked: Instant,
}

#[derive(Deserialize)]
struct Claims {
    sub: String,
    #[serde(default)]
    roles: Vec<String>,
}

impl Verifier {
    /// `None` when no token is to be taken.
    pub(super) fn new(options: &JwtOptions) -> Result<Option<Self>, AuthError> {
        let (issuer, audience, path) =
            match (&options.jwt_issuer, &options.jwt_audience, &options.jwt_jwks_file) {
                (None, None, None) => return Ok(None),
                (Some(issuer), Some(audience), Some(path)) => {
                    (issuer.clone(), audience.clone(), path.clone())
                }
                _ => return Err(AuthError::Incomplete),
            };
        let algorithms = if options.jwt_algorithms.is_empty() {
            vec![Algorithm::EdDSA, Algorithm::ES256, Algorithm::ES384, Algorithm::PS256, Algorithm::RS256]
        } else {
            options.jwt_algorithms.iter().map(|name| algorithm(name)).collect::<Result<_, _>>()?
        };
        let (set, changed) =
            read(&path).map_err(|message| AuthError::Jwks { path: path.clone(), message })?;
        let keys = Mutex::new(Keys { set: Arc::new(set), changed, looked: Instant::now() });
        Ok(Some(Self { issuer, audience, algorithms, path, keys }))
    }

    /// Who holds this token; `None` for anything but a good one.
    pub(super) fn verify(&self, token: &str) -> Option<Caller> {
        if token.len() > LONGEST {
            return None;
        }
        let header = decode_header(token).ok()?;
        if !self.algorithms.contains(&header.alg) {
            return None;
        }
        let keys = self.keys();
        let mut validation = Validation::new(header.alg);
        validation.leeway = LEEWAY;
        validation.validate_nbf = true;
        validation.set_issuer(&[&self.issuer]);
        validation.set_audience(&[&self.audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        let candidates = keys.keys.iter().filter(|jwk| {
            let named = header.kid.as_ref().is_none_or(|kid| jwk.common.key_id.as_ref() == Some(kid));
            let meant =
                jwk.common.key_algorithm.is_none_or(|meant| meant.to_string() == format!("{:?}", header.alg));
            named && meant
        });
        let claims = candidates
            .filter_map(|jwk| DecodingKey::from_jwk(jwk).ok())
            .filter(|key| key.family() == header.alg.family())
            .find_map(|key| decode::<Claims>(token, &key, &validation).ok())?
            .claims;
        let user_id: UserId = claims.sub.parse().ok()?;
        // A back end's scope is for keys: no person's token makes sessions for others.
        let roles = claims.roles.iter().filter_map(|role| role.parse().ok());
        let scopes: Scopes = roles.filter(|scope| *scope != Scope::Platform).collect();
        Some(Caller { user_id: Some(user_id), key_id: None, scopes })
    }

    /// The keys, read again when the file has changed. One that cannot be read leaves the last good ones in force.
    fn keys(&self) -> Arc<JwkSet> {
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        if keys.looked.elapsed() >= LOOK_EVERY {
            keys.looked = Instant::now();
            let changed = std::fs::metadata(&self.path).and_then(|data| data.modified()).ok();
            if changed.is_none() || changed != keys.changed {
                match read(&self.path) {
                    Ok((set, changed)) => {
                        tracing::info!(keys = set.keys.len(), "the JWK set was read again");
                        keys.set = Arc::new(set);
                        keys.changed = changed;
                    }
                    Err(message) => {
                        tracing::warn!(message, "the JWK set cannot be read; the last one stays in force")
                    }
                }
            }
        }
        Arc::clone(&keys.set)
    }
}

fn algorithm(name: &str) -> Result<Algorithm, AuthError> {
    let known: Option<Algorithm> = name.parse().ok();
    let symmetric = [Algorithm::HS256, Algorithm::HS384, Algorithm::HS512];
    known
        .filter(|algorithm| !symmetric.contains(algorithm))
        .ok_or_else(|| AuthError::Algorithm(name.to_owned()))
}

fn read(path: &std::path::Path) -> Result<(JwkSet, Option<SystemTime>), String> {
    let data = std::fs::metadata(path).map_err(|error| error.to_string())?;
    if data.len() > JWKS_BYTES {
        return Err(format!("it has more than {JWKS_BYTES} bytes"));
    }
    let text = std::fs::read(path).map_err(|error| error.to_string())?;
    let set: JwkSet =
        serde_json::from_slice(&text).map_err(|_| "it is not a JWK set (RFC 7517)".to_owned())?;
    if set.keys.is_empty() {
        return Err("it has no keys".to_owned());
    }
    Ok((set, data.modified().ok()))
}
