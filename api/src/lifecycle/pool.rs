//! Environments kept ready before their session: made ahead of need, replaced when claimed, changed, dead or old.
//!
//! The rows of `warm_environment` say what there should be; each look compares them with the exams and with what is seen.
//! Claiming one is the store's ([`crate::store::Store::provision`]): the pool only notices that the row has gone.
use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Lifecycle, Subject,
    decide::{START_TIMEOUT_MS, Seen},
    flight::{Done, Kind, pause_between},
    make::{Making, Stop, Witness},
};
use crate::{
    environment::{Create, Observation},
    reason::{Reason, ReasonCode},
    store::{StoreError, WarmEnvironment, WarmExam, WarmState},
};

/// One is kept so long, ms: the backend's own limit of its life counts from its making, and must cover a whole session after that.
const KEPT_MS: i64 = 12 * 3_600_000;
/// So long before that, ms, its successor is made.
const SUCCESSION_MS: i64 = 10 * 60_000;
/// Of one exam, so many are on their way at once: sessions that start cold must not wait behind the pool.
const AT_ONCE: usize = 8;
/// The first and the longest pause of an exam whose environments fail.
const FAILING: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));

/// An exam whose environments fail.
#[derive(Debug, Clone, Copy)]
pub(super) struct Failing {
    failures: u32,
    until: Instant,
    /// By the database's clock, ms: an exam that was changed later is tried at once.
    at: i64,
}

/// What is to be done about one warm environment.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    /// Nothing.
    Rest,
    /// See that it is made, answers and is set up.
    Make {
        /// It has just been named, by this process.
        new: bool,
    },
    /// It seems lost: look at it directly.
    Confirm,
    /// Take it out of the pool; the reason if it failed.
    End(Option<Reason>),
    /// Destroy it, and then its row.
    Destroy,
}

/// What the pool is to do.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    /// One for each row, in their order.
    steps: Vec<Step>,
    /// Exams with too few.
    short: Vec<WarmExam>,
}

/// Decides about all of them: a pure function of the rows, the exams, what is seen, and the time.
fn plan(rows: &[WarmEnvironment], exams: &[WarmExam], observation: &Observation, now: i64) -> Plan {
    let mut plan = Plan::default();
    let mut fresh: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    let mut aged: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (index, row) in rows.iter().enumerate() {
        let cut_off = observation.environments.get(&row.id).is_some_and(|observed| observed.cut_off);
        let step = match alone(row, &Seen::at(Some(row.id), observation), now) {
            Step::Rest if cut_off => {
                let why = "The machine of the environment is away.";
                Step::End(Some(Reason::new(ReasonCode::EnvironmentLost, why)))
            }
            step => step,
        };
        if matches!(step, Step::Rest | Step::Make { .. } | Step::Confirm) {
            let group = if row.created_at > freshest(now) { &mut fresh } else { &mut aged };
            group.entry(&row.exam_id).or_default().push(index);
        }
        plan.steps.push(step);
    }
    for exam in exams {
        let fresh = fresh.remove(exam.exam_id.as_str()).unwrap_or_default();
        let ready = fresh.iter().filter(|index| rows.get(**index).is_some_and(is_ready)).count();
        // The newest are too many; the old have had their successors.
        let mut surplus: Vec<usize> = fresh.iter().copied().skip(exam.warm).collect();
        if ready >= exam.warm {
            surplus.extend(aged.remove(exam.exam_id.as_str()).unwrap_or_default());
        }
        for index in surplus {
            if let Some(step) = plan.steps.get_mut(index) {
                *step = Step::End(None);
            }
        }
        if fresh.len() < exam.warm {
            plan.short.push(exam.clone());
        }
    }
    plan
}

fn is_ready(row: &WarmEnvironment) -> bool {
    row.state == WarmState::Ready
}

/// Made before this, ms, it needs a successor.
const fn freshest(now: i64) -> i64 {
    now.saturating_sub(KEPT_MS - SUCCESSION_MS)
}

/// Decides about one without a look at the others.
fn alone(row: &WarmEnvironment, seen: &Seen, now: i64) -> Step {
    let age = now.saturating_sub(row.created_at);
    let lost = seen.loss();
    match (row.state, seen) {
        (WarmState::Ending, _) => Step::Destroy,
        _ if !row.wanted || age >= KEPT_MS => Step::End(None),
        _ if lost.is_some() => Step::End(lost),
        (WarmState::Making, _) if age >= START_TIMEOUT_MS => Step::End(Some(ReasonCode::StartTimeout.into())),
        (WarmState::Making, _) => Step::Make { new: false },
        (WarmState::Ready, Seen::Absent) => Step::Confirm,
        (WarmState::Ready, _) => Step::Rest,
    }
}

impl Lifecycle {
    /// One look at the pool. What is at work is added to `subjects`.
    pub(super) async fn tend(
        self: &Arc<Self>,
        rows: &[WarmEnvironment],
        observation: &Observation,
        subjects: &mut HashSet<Subject>,
    ) -> Result<(), StoreError> {
        let exams = self.store.warm_exams().await?;
        let now = self.now_ms();
        let Plan { steps, short } = plan(rows, &exams, observation, now);
        for (row, step) in rows.iter().zip(steps) {
            subjects.insert(Subject::Warm(row.id));
            self.attend(row, step);
        }
        self.failing().retain(|id, _| exams.iter().any(|exam| exam.exam_id == *id));
        for exam in short {
            let failing = self.failing().get(&exam.exam_id).copied();
            let at_once = match failing.filter(|failing| failing.at >= exam.updated_at) {
                Some(failing) if failing.until > Instant::now() => continue,
                Some(_) => 1,
                None => AT_ONCE,
            };
            for row in self.store.plan_warm(&exam.exam_id, freshest(now), at_once).await? {
                subjects.insert(Subject::Warm(row.id));
                self.attend(&row, Step::Make { new: true });
            }
        }
        Ok(())
    }

    fn attend(self: &Arc<Self>, row: &WarmEnvironment, step: Step) {
        let subject = Subject::Warm(row.id);
        let kind = match step {
            Step::Rest => return self.rest(subject, false),
            Step::Make { .. } => Kind::Start,
            Step::Confirm => Kind::Confirm,
            Step::End(_) => Kind::End,
            Step::Destroy => Kind::Destroy,
        };
        let span = tracing::info_span!("warm", environment_id = %row.id, exam_id = row.exam_id);
        let (this, row) = (Arc::clone(self), row.clone());
        self.take_off(subject, kind, span, |cancel| async move {
            let done = match step {
                Step::Rest => Ok(Done::Yes),
                Step::Make { new } => this.warm_up(&row, new, &cancel).await,
                Step::Confirm => this.confirm_warm(&row).await,
                Step::End(failure) => this.retire(&row, failure).await,
                Step::Destroy => this.destroy_warm(&row).await,
            };
            done.unwrap_or_else(|error| {
                tracing::warn!(%error, "a warm environment could not be recorded");
                Done::Again
            })
        });
    }

    async fn warm_up(
        self: &Arc<Self>,
        row: &WarmEnvironment,
        new: bool,
        cancel: &CancellationToken,
    ) -> Result<Done, StoreError> {
        let Some(recipe) = self.store.warm_recipe(row.id).await? else { return Ok(Done::Yes) };
        let request = Create {
            environment_id: row.id,
            owner: None,
            exam_id: row.exam_id.clone(),
            lifetime_seconds: recipe.lifetime_seconds().saturating_add(KEPT_MS.unsigned_abs() / 1000),
            spec: recipe.environment,
        };
        let making = Making { lifecycle: self, request: &request, new, turns: &self.warming, cancel };
        match making.run(&mut Nobody).await {
            Ok(()) => {
                if self.store.move_warm(row.id, WarmState::Making, WarmState::Ready).await? {
                    tracing::info!("a warm environment is ready");
                    self.failing().remove(&row.exam_id);
                }
                Ok(Done::Yes)
            }
            Err(Stop::Yield) => Ok(Done::Yes),
            Err(Stop::Again) => Ok(Done::Again),
            // Perhaps only from here: what nobody makes in time is given up.
            Err(Stop::Fail(reason)) if reason.code == ReasonCode::ClusterUnavailable => Ok(Done::Again),
            Err(Stop::Fail(reason)) => self.retire(row, Some(reason)).await,
        }
    }

    async fn confirm_warm(&self, row: &WarmEnvironment) -> Result<Done, StoreError> {
        match self.loss(row.id).await {
            Some(reason) => self.retire(row, Some(reason)).await,
            None => Ok(Done::Again),
        }
    }

    /// No claim takes it from now on.
    async fn retire(&self, row: &WarmEnvironment, failure: Option<Reason>) -> Result<Done, StoreError> {
        if !self.store.move_warm(row.id, row.state, WarmState::Ending).await? {
            return Ok(Done::Yes);
        }
        let Some(Reason { code, technical_details }) = failure else {
            tracing::info!("a warm environment is not wanted any more");
            return Ok(Done::Yes);
        };
        let mut all = self.failing();
        let failures = all.get(&row.exam_id).map_or(0, |failing| failing.failures).saturating_add(1);
        let pause = pause_between(FAILING, failures);
        let failing = Failing { failures, until: Instant::now() + pause, at: self.now_ms() };
        all.insert(row.exam_id.clone(), failing);
        tracing::warn!(
            reason = code.as_str(),
            details = technical_details,
            next_attempt_seconds = pause.as_secs(),
            "a warm environment has failed"
        );
        Ok(Done::Yes)
    }

    async fn destroy_warm(&self, row: &WarmEnvironment) -> Result<Done, StoreError> {
        if self.destroy_environment(row.id).await == Done::Again {
            return Ok(Done::Again);
        }
        self.store.forget_warm(row.id).await.map(|()| Done::Yes)
    }

    fn failing(&self) -> MutexGuard<'_, BTreeMap<String, Failing>> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Nobody waits for a warm environment's steps.
struct Nobody;

impl Witness for Nobody {
    async fn step(&mut self, _: usize) -> Result<(), Stop> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        environment::{Observed, Phase},
        identity::EnvironmentId,
    };

    const NOW: i64 = 100 * 3_600_000;

    fn row(state: WarmState, age: i64) -> WarmEnvironment {
        let id = EnvironmentId::new();
        WarmEnvironment { id, exam_id: "e".to_owned(), state, created_at: NOW - age, wanted: true }
    }

    fn exams(warm: usize) -> Vec<WarmExam> {
        vec![WarmExam { exam_id: "e".to_owned(), warm, updated_at: 0 }]
    }

    fn look(rows: &[WarmEnvironment]) -> Observation {
        let up = |row: &WarmEnvironment| {
            let observed = Observed {
                cut_off: false,
                phase: Phase::Up,
                name: String::new(),
                namespace: String::new(),
                created_at: row.created_at,
                owner: None,
            };
            (row.id, observed)
        };
        Observation { complete: true, unavailable: None, environments: rows.iter().map(up).collect() }
    }

    /// The steps in the order of the rows, and how many exams are short.
    fn of(rows: &[WarmEnvironment], warm: usize, look: &Observation) -> (Vec<Step>, usize) {
        let plan = plan(rows, &exams(warm), look, NOW);
        (plan.steps, plan.short.len())
    }

    #[test]
    fn one_alone() {
        let crashed = Reason::new(ReasonCode::EnvironmentCrashed, "x");
        let failed = Seen::Present(Phase::Failed(crashed.clone()));
        let up = Seen::Present(Phase::Up);
        use WarmState::{Ending, Making, Ready};
        let decided = |state, age, seen: &Seen| alone(&row(state, age), seen, NOW);
        for seen in [&Seen::Unknown, &Seen::Absent, &up] {
            assert_eq!(decided(Making, 0, seen), Step::Make { new: false });
            assert_eq!(
                decided(Making, START_TIMEOUT_MS, seen),
                Step::End(Some(ReasonCode::StartTimeout.into()))
            );
            assert_eq!(decided(Ready, KEPT_MS, seen), Step::End(None));
            assert_eq!(decided(Ending, 0, seen), Step::Destroy);
        }
        assert_eq!(decided(Ready, 0, &up), Step::Rest);
        assert_eq!(decided(Ready, 0, &Seen::Unknown), Step::Rest, "a cluster out of sight is no loss");
        assert_eq!(decided(Ready, 0, &Seen::Absent), Step::Confirm);
        for state in [Making, Ready] {
            assert_eq!(decided(state, 0, &failed), Step::End(Some(crashed.clone())));
            assert!(matches!(decided(state, 0, &Seen::Present(Phase::Ending)), Step::End(Some(_))));
            let unwanted = WarmEnvironment { wanted: false, ..row(state, 0) };
            assert_eq!(alone(&unwanted, &up, NOW), Step::End(None));
        }
    }

    #[test]
    fn as_many_as_the_exam_wants() {
        use WarmState::{Making, Ready};
        let rows = [row(Ready, 2), row(Making, 1)];
        let seen = look(&rows);
        assert_eq!(of(&rows, 3, &seen), (vec![Step::Rest, Step::Make { new: false }], 1));
        assert_eq!(of(&rows, 2, &seen), (vec![Step::Rest, Step::Make { new: false }], 0));
        assert_eq!(of(&rows, 1, &seen), (vec![Step::Rest, Step::End(None)], 0));
    }

    #[test]
    fn what_nobody_reaches_is_not_given_to_anybody() {
        use WarmState::{Making, Ready};
        let rows = [row(Ready, 2), row(Making, 1)];
        let mut seen = look(&rows);
        seen.environments.values_mut().for_each(|observed| observed.cut_off = true);
        let (steps, short) = of(&rows, 2, &seen);
        assert!(matches!(steps[0], Step::End(Some(_))), "{steps:?}");
        assert_eq!((&steps[1], short), (&Step::Make { new: false }, 1));
    }

    #[test]
    fn an_old_one_stays_until_its_successor_is_ready() {
        use WarmState::{Making, Ready};
        let old = KEPT_MS - SUCCESSION_MS;
        let rows = [row(Ready, old)];
        assert_eq!(of(&rows, 1, &look(&rows)), (vec![Step::Rest], 1));
        let rows = [row(Ready, old), row(Making, 1)];
        assert_eq!(of(&rows, 1, &look(&rows)), (vec![Step::Rest, Step::Make { new: false }], 0));
        let rows = [row(Ready, old), row(Ready, 1)];
        assert_eq!(of(&rows, 1, &look(&rows)), (vec![Step::End(None), Step::Rest], 0));
    }
}
