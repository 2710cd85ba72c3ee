//! Cell by cell: every state, everything that can be seen, and both sides of every deadline.
use std::collections::BTreeMap;

use super::*;
use crate::{
    environment::Observed,
    identity::{EnvironmentId, SessionId, UserId},
};

const MADE: i64 = 1_000_000;
const READY: i64 = MADE + 5_000;
const STARTED: i64 = MADE + 9_000;
const DURATION: i64 = 3_600_000;
const START_WITHIN: i64 = 900_000;

fn session(state: State) -> Session {
    let reached = |from: State| state >= from;
    Session {
        id: SessionId::new(),
        user_id: UserId::new(),
        exam_id: "e".into(),
        environment_id: reached(State::Initializing).then(EnvironmentId::new),
        state,
        version: 3,
        reason: state.is_terminal().then(|| ReasonCode::Submitted.into()),
        step: 0,
        duration_ms: DURATION,
        start_within_ms: START_WITHIN,
        reconnect_window_ms: 300_000,
        created_at: MADE,
        initializing_at: reached(State::Initializing).then_some(MADE + 10),
        ready_at: reached(State::Ready).then_some(READY),
        started_at: reached(State::Running).then_some(STARTED),
        ended_at: state.is_terminal().then_some(STARTED + 1),
        released_at: None,
        active_at: if reached(State::Running) { STARTED } else { MADE },
        updated_at: STARTED,
    }
}

/// Everything that can be seen of an environment.
fn everything() -> Vec<Seen> {
    vec![
        Seen::Unknown,
        Seen::Absent,
        Seen::Present(Phase::Starting { step: 1, reachable: false }),
        Seen::Present(Phase::Starting { step: 2, reachable: true }),
        Seen::Present(Phase::Up),
        Seen::Present(Phase::Ending),
        Seen::Present(Phase::Failed(crashed())),
    ]
}

fn crashed() -> Reason {
    Reason::new(ReasonCode::EnvironmentCrashed, "exit 139")
}

fn code(step: &Step) -> Option<(State, ReasonCode)> {
    match step {
        Step::End { to, reason } => Some((*to, reason.code)),
        _ => None,
    }
}

#[test]
fn a_created_session_is_provisioned_whatever_is_seen_but_first_by_those_who_see() {
    let others = MADE + LEFT_TO_OTHERS_MS;
    for now in [MADE, others - 1] {
        assert_eq!(decide(&session(State::Created), &Seen::Unknown, now), Step::Wait { until: others });
    }
    for seen in everything() {
        let now = if seen == Seen::Unknown { others } else { MADE };
        assert_eq!(decide(&session(State::Created), &seen, now), Step::Provision, "{seen:?}");
        assert_eq!(decide(&session(State::Created), &seen, MADE + 59_999), Step::Provision, "{seen:?}");
    }
}

#[test]
fn an_initializing_session_is_started_until_its_environment_fails() {
    let lost = (State::Failed, ReasonCode::EnvironmentLost);
    for seen in everything() {
        let step = decide(&session(State::Initializing), &seen, MADE + 59_999);
        match seen {
            Seen::Present(Phase::Failed(reason)) => assert_eq!(step, end(State::Failed, reason)),
            Seen::Present(Phase::Ending) => assert_eq!(code(&step), Some(lost)),
            _ => assert_eq!(step, Step::Start, "{seen:?}"),
        }
    }
}

#[test]
fn what_is_not_ready_after_sixty_seconds_has_failed_whatever_is_seen() {
    for state in [State::Created, State::Initializing] {
        for seen in everything() {
            let step = decide(&session(state), &seen, MADE + 60_000);
            assert_eq!(code(&step), Some((State::Failed, ReasonCode::StartTimeout)), "{state} {seen:?}");
        }
    }
}

#[test]
fn a_ready_or_running_session_waits_for_its_deadline_while_its_environment_is_not_known_to_be_gone() {
    for (state, until) in [(State::Ready, READY + START_WITHIN), (State::Running, STARTED + DURATION)] {
        for seen in everything() {
            for now in [MADE, until - 1] {
                let step = decide(&session(state), &seen, now);
                match &seen {
                    Seen::Absent => assert_eq!(step, Step::Confirm),
                    Seen::Present(Phase::Failed(reason)) => {
                        assert_eq!(step, end(State::Failed, reason.clone()));
                    }
                    Seen::Present(Phase::Ending) => {
                        assert_eq!(code(&step), Some((State::Failed, ReasonCode::EnvironmentLost)));
                    }
                    Seen::Unknown | Seen::Present(_) => {
                        assert_eq!(step, Step::Wait { until }, "{state} {seen:?} {now}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_session_that_is_never_used_ends_to_the_millisecond_whatever_is_seen() {
    for seen in everything() {
        let step = decide(&session(State::Ready), &seen, READY + START_WITHIN);
        assert_eq!(code(&step), Some((State::Terminated, ReasonCode::NeverStarted)), "{seen:?}");
    }
}

#[test]
fn an_exam_ends_to_the_millisecond_whatever_is_seen() {
    for seen in everything() {
        for late in [0, 1, DURATION * 10] {
            let step = decide(&session(State::Running), &seen, STARTED + DURATION + late);
            assert_eq!(code(&step), Some((State::Terminated, ReasonCode::TimeExpired)), "{seen:?}");
        }
    }
}

#[test]
fn idleness_of_twice_the_duration_is_the_last_net() {
    let abandoned = Some((State::Terminated, ReasonCode::Abandoned));
    // Of a session that may wait longer to be used than twice its duration.
    let mut ready = session(State::Ready);
    ready.active_at = READY;
    ready.start_within_ms = DURATION * 5;
    assert_eq!(decide(&ready, &Seen::Unknown, READY), Step::Wait { until: READY + DURATION * 2 });
    assert_eq!(code(&decide(&ready, &Seen::Unknown, READY + DURATION * 2)), abandoned);
    // Of a running one whose row says that it was active long before it started.
    let mut running = session(State::Running);
    running.active_at = STARTED - DURATION * 2 + 1;
    assert_eq!(decide(&running, &Seen::Unknown, STARTED), Step::Wait { until: STARTED + 1 });
    assert_eq!(code(&decide(&running, &Seen::Unknown, STARTED + 1)), abandoned);
}

#[test]
fn an_ended_session_is_destroyed_and_one_that_never_had_an_environment_released() {
    for state in [State::Terminated, State::Failed] {
        for seen in everything() {
            for now in [0, MADE, i64::MAX] {
                let mut session = session(state);
                assert_eq!(decide(&session, &seen, now), Step::Destroy, "{state} {seen:?}");
                session.environment_id = None;
                assert_eq!(decide(&session, &seen, now), Step::Release, "{state} {seen:?}");
            }
        }
    }
}

#[test]
fn every_end_that_is_decided_is_a_legal_change() {
    for state in State::ALL {
        for seen in everything() {
            for now in [0, MADE, MADE + 60_000, READY + START_WITHIN, STARTED + DURATION, i64::MAX] {
                if let Step::End { to, .. } = decide(&session(state), &seen, now) {
                    assert!(state.next().contains(&to), "{state} -> {to} ({seen:?}, {now})");
                }
            }
        }
    }
}

#[test]
fn limits_that_overflow_are_never_reached() {
    for state in [State::Ready, State::Running] {
        let mut session = session(state);
        session.duration_ms = i64::MAX;
        session.start_within_ms = i64::MAX;
        assert_eq!(decide(&session, &Seen::Unknown, MADE), Step::Wait { until: i64::MAX });
    }
}

#[test]
fn an_absence_counts_only_in_a_complete_look_of_a_backend_that_answers() {
    let session = session(State::Running);
    let id = session.environment_id.unwrap();
    let mut look = Observation { complete: false, unavailable: None, environments: BTreeMap::new() };
    assert_eq!(Seen::of(&session, &look), Seen::Unknown);
    look.complete = true;
    assert_eq!(Seen::of(&session, &look), Seen::Absent);
    look.unavailable = Some("no route".into());
    assert_eq!(Seen::of(&session, &look), Seen::Unknown);
    let observed = Observed {
        cut_off: false,
        phase: Phase::Up,
        name: "n".into(),
        namespace: "local".into(),
        created_at: MADE,
        owner: None,
    };
    look.environments.insert(id, observed);
    assert_eq!(Seen::of(&session, &look), Seen::Present(Phase::Up));
}
