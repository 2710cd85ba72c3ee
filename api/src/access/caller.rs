//! A caller of the API: an API key with scopes, or a person with a signed token.
use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{identity::UserId, session::Session, store::Actor};

/// One thing that keys and roles allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// The exam platform's back end: makes sessions for any candidate, reads and ends them, gets terminal tickets for them.
    Platform,
    /// Everything, exams included.
    Operator,
    /// Reads, watches and ends any session.
    Proctor,
    /// Reads sessions and exams.
    Grader,
}

/// A word that is no scope.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a scope: platform, operator, proctor or grader")]
pub struct UnknownScope;

impl Scope {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Platform, Self::Operator, Self::Proctor, Self::Grader];

    /// As written.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Platform => "platform",
            Self::Operator => "operator",
            Self::Proctor => "proctor",
            Self::Grader => "grader",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Scope {
    type Err = UnknownScope;

    fn from_str(word: &str) -> Result<Self, UnknownScope> {
        Self::ALL.into_iter().find(|scope| scope.as_str() == word).ok_or(UnknownScope)
    }
}

/// A set of scopes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Scopes(u8);

impl Scopes {
    const fn bit(scope: Scope) -> u8 {
        match scope {
            Scope::Platform => 1,
            Scope::Operator => 2,
            Scope::Proctor => 4,
            Scope::Grader => 8,
        }
    }

    /// Is any of these in it?
    #[must_use]
    pub fn any(self, scopes: &[Scope]) -> bool {
        scopes.iter().any(|scope| self.0 & Self::bit(*scope) != 0)
    }
}

impl FromIterator<Scope> for Scopes {
    fn from_iter<I: IntoIterator<Item = Scope>>(scopes: I) -> Self {
        Self(scopes.into_iter().fold(0, |set, scope| set | Self::bit(scope)))
    }
}

/// Who calls. Made by [`super::Auth`] only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The person; `None` for a key.
    pub(super) user_id: Option<UserId>,
    /// The public id of the key; `None` for a person.
    pub(super) key_id: Option<String>,
    pub(super) scopes: Scopes,
}

impl Caller {
    /// The person; `None` for a key.
    #[must_use]
    pub const fn user_id(&self) -> Option<UserId> {
        self.user_id
    }

    /// As records name them.
    #[must_use]
    pub fn actor(&self) -> Actor {
        match (&self.key_id, self.user_id) {
            (Some(id), _) => Actor::Key(id.clone()),
            (None, Some(user)) => Actor::Candidate(user),
            (None, None) => Actor::Platform,
        }
    }

    fn owns(&self, session: &Session) -> bool {
        self.user_id == Some(session.user_id)
    }

    /// For whom they may make a session, given whom they ask for: the candidate's own id, or with a platform's or operator's key anybody's.
    #[must_use]
    pub fn may_create_for(&self, asked: Option<UserId>) -> Option<UserId> {
        match asked.or(self.user_id) {
            Some(user) if self.user_id == Some(user) => Some(user),
            other if self.scopes.any(&[Scope::Platform, Scope::Operator]) => other,
            _ => None,
        }
    }

    /// May they see the session?
    #[must_use]
    pub fn may_read(&self, session: &Session) -> bool {
        self.owns(session) || self.scopes.any(&Scope::ALL)
    }

    /// May they end it?
    #[must_use]
    pub fn may_end(&self, session: &Session) -> bool {
        self.owns(session) || self.scopes.any(&[Scope::Platform, Scope::Operator, Scope::Proctor])
    }

    /// Are they told what is for staff, such as the last lines of a set-up that failed?
    #[must_use]
    pub fn sees_details(&self) -> bool {
        self.scopes.any(&Scope::ALL)
    }

    /// May they hand it in? The candidate, or the platform in the candidate's name.
    #[must_use]
    pub fn may_submit(&self, session: &Session) -> bool {
        self.owns(session) || self.scopes.any(&[Scope::Platform, Scope::Operator])
    }

    /// Do they end it as the candidate does, and not as staff?
    #[must_use]
    pub fn ends_as_candidate(&self, session: &Session) -> bool {
        self.owns(session)
    }

    /// May they work in it, or only watch? `None`: neither.
    #[must_use]
    pub fn may_enter(&self, session: &Session) -> Option<Entry> {
        if self.owns(session) || self.scopes.any(&[Scope::Platform, Scope::Operator]) {
            Some(Entry::Work)
        } else if self.scopes.any(&[Scope::Proctor]) {
            Some(Entry::Watch)
        } else {
            None
        }
    }

    /// May they read exams? Not as a candidate: an exam's setup may hold its answers.
    #[must_use]
    pub fn may_read_exams(&self) -> bool {
        self.scopes.any(&Scope::ALL)
    }

    /// May they change exams?
    #[must_use]
    pub fn may_write_exams(&self) -> bool {
        self.scopes.any(&[Scope::Operator])
    }
}

/// What somebody does in a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Type.
    Work,
    /// Look.
    Watch,
}
