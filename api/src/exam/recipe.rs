//! All that an environment is made from.
use serde::{Deserialize, Serialize};

use super::{EnvironmentSpec, Exam};

/// What an environment may live beyond its session's longest life: the backend's own net must never be the first to act.
const SLACK_SECONDS: u64 = 15 * 60;

/// The part of an exam that its environments are made from. Environments of equal recipes can stand in for each other;
/// a changed title or reconnect window changes no recipe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recipe {
    /// What it is.
    pub environment: EnvironmentSpec,
    /// The longest that one session can have it, from ready to its end.
    pub longest_seconds: u64,
}

impl Recipe {
    /// Of an exam as it stands.
    #[must_use]
    pub fn of(exam: &Exam) -> Self {
        let longest = u64::from(exam.duration_minutes) * 60 + u64::from(exam.start_within_seconds);
        Self { environment: exam.environment.clone(), longest_seconds: longest }
    }

    /// After this many seconds an environment made for a session ends by itself.
    #[must_use]
    pub const fn lifetime_seconds(&self) -> u64 {
        self.longest_seconds.saturating_add(SLACK_SECONDS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_changes_with_what_makes_the_environment_and_with_nothing_else() {
        let exam = Exam::from_yaml("id: e\ntitle: T\nduration_minutes: 60\n").unwrap();
        let recipe = Recipe::of(&exam);
        assert_eq!(recipe.lifetime_seconds(), 60 * 60 + 900 + 900);
        let mut same = exam.clone();
        same.title = "Another".to_owned();
        same.warm = 7;
        same.reconnect_window_seconds = 1;
        assert_eq!(Recipe::of(&same), recipe);
        for change in [
            |exam: &mut Exam| exam.duration_minutes += 1,
            |exam: &mut Exam| exam.start_within_seconds += 1,
            |exam: &mut Exam| exam.environment.setup = Some("true".to_owned()),
        ] {
            let mut other = exam.clone();
            change(&mut other);
            assert_ne!(Recipe::of(&other), recipe);
        }
        let text = serde_json::to_string(&recipe).unwrap();
        assert_eq!(serde_json::from_str::<Recipe>(&text).unwrap(), recipe);
    }
}
