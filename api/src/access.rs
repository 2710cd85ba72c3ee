//! Who may: logins, callers and what follows from them.
//!
//! [`Access`] is a sealed value: only an accepted login makes one, so whoever asks for it in a signature cannot forget the check.
//! Every denial does the same work and gives the same answer.
use crate::identity::{SessionId, UserId};

mod auth;
mod caller;
mod jwt;

pub use self::{
    auth::{Auth, COOKIE, COOKIE_SECONDS, Cookie, LoginError, TICKET_SECONDS, Ticket, user_name},
    caller::{Caller, Entry, Scope, Scopes, UnknownScope},
    jwt::{AuthError, JwtOptions},
};

/// Somebody may use one session. Made by [`Auth`] only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    user_id: UserId,
    session_id: SessionId,
    how: How,
    watches: bool,
}

/// How somebody came in, for logs and records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// The session's password.
    Password,
    /// A public key given with the session.
    PublicKey,
    /// A single-use ticket.
    Ticket,
    /// The cookie that a ticket was traded for.
    Cookie,
    /// A caller's own bearer token.
    Bearer,
}

impl How {
    /// One word.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Password => "password",
            Self::PublicKey => "publickey",
            Self::Ticket => "ticket",
            Self::Cookie => "cookie",
            Self::Bearer => "bearer",
        }
    }
}

impl Access {
    /// Whose session it is; for staff who watch, the candidate's id.
    #[must_use]
    pub const fn user_id(&self) -> UserId {
        self.user_id
    }

    /// Which session.
    #[must_use]
    pub const fn session_id(&self) -> SessionId {
        self.session_id
    }

    /// How they came in.
    #[must_use]
    pub const fn how(&self) -> How {
        self.how
    }

    /// May they look only? What they send is dropped, and they do not start the exam's clock.
    #[must_use]
    pub const fn only_watches(&self) -> bool {
        self.watches
    }
}
