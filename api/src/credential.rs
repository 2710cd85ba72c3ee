//! Secrets and what is kept of them: API keys and tickets of our own making, session passwords, public keys.
//!
//! Nothing here knows who may do what: that is [`crate::access`]. No type of this module prints a secret.
mod argon;
mod key;
mod password;
mod public_key;
mod secret;

pub use self::{
    key::{KeyError, ServerKey},
    password::{Overloaded, Password, Passwords},
    public_key::{PublicKey, PublicKeyError},
    secret::{Secret, SecretKind},
};
pub use crate::access::{Auth, LoginError};
