//! What a pod's state means for a session. Pure: time comes in only as the patience that a doubt deserves.
use std::time::Duration;

use k8s_openapi::api::core::v1::{ContainerStateTerminated, ContainerStatus, Pod};

use super::{
    cluster::plain,
    pod::{AGENT, ENVIRONMENT, SESSION, SESSION_ID},
};
use crate::{
    environment::{Observed, Phase},
    identity::EnvironmentId,
    reason::{Reason, ReasonCode},
};

/// A container that cannot be made is tried again by kubelet: what was a race is over by then.
const CREATE_PATIENCE: Duration = Duration::from_secs(4);
/// A pull that has just failed; once kubelet says that it backs off, its next attempt is 10 s and more away.
const PULL_PATIENCE: Duration = Duration::from_secs(3);

/// A first process that has ended may have been ended: why and by whom the pod or its events say a moment later.
const END_PATIENCE: Duration = Duration::from_secs(3);

/// What kubelet says when its container runtime does not answer, whatever it was asked for.
const RUNTIME_AWAY: &str = "code = Unavailable desc = connection error";

/// Indices into [`crate::session::STEPS`].
const PLACE: usize = 0;
const IMAGE: usize = 1;
const START: usize = 2;

/// What a pod's state says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reading {
    /// As it is now.
    pub(super) phase: Phase,
    /// What it becomes if it stays so.
    pub(super) doubt: Option<Doubt>,
}

impl Reading {
    /// For who does not wait: a first process that has ended is a failure, whatever may explain it later.
    pub(super) fn settled(self) -> Phase {
        match (self.phase, self.doubt) {
            (Phase::Up, Some(doubt)) => Phase::Failed(doubt.reason),
            (phase, _) => phase,
        }
    }
}

/// A state that may pass, and is a failure when it has stood for a while.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Doubt {
    pub(super) reason: Reason,
    pub(super) patience: Duration,
}

/// Whose pod this is; `None` for one that Carrel has not made.
pub(super) fn environment_id(pod: &Pod) -> Option<EnvironmentId> {
    pod.metadata.labels.as_ref()?.get(ENVIRONMENT)?.parse().ok()
}

/// A pod as the seam shows it, in a phase that the caller has found.
pub(super) fn observed(pod: &Pod, phase: Phase) -> Observed {
    let metadata = &pod.metadata;
    Observed {
        phase,
        name: metadata.name.clone().unwrap_or_default(),
        namespace: metadata.namespace.clone().unwrap_or_default(),
        created_at: metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_millisecond()),
        cut_off: is_cut_off(pod),
        owner: metadata.labels.as_ref().and_then(|labels| labels.get(SESSION_ID)?.parse().ok()),
    }
}

/// kubelet says of a pod that it is ready as long as its containers are. Only the control plane, when it hears nothing from the node any
/// more, says the one without the other.
fn is_cut_off(pod: &Pod) -> bool {
    let stands = |kind, wanted| condition(pod, kind).is_some_and(|(status, ..)| status == wanted);
    stands("Ready", "False") && stands("ContainersReady", "True")
}

/// Reads a pod. `unschedulable` is how long one may find no node; `fetched` whether the session's image is known to be there.
pub(super) fn read(pod: &Pod, unschedulable: Duration, fetched: bool) -> Reading {
    let certain = |phase| Reading { phase, doubt: None };
    if pod.metadata.deletion_timestamp.is_some() {
        return certain(Phase::Ending);
    }
    let status = pod.status.as_ref();
    let containers = status.and_then(|status| status.container_statuses.as_deref()).unwrap_or_default();
    let session = containers.iter().find(|container| container.name == SESSION);
    let ended = session.and_then(|session| session.state.as_ref()?.terminated.as_ref());
    if ended.is_some()
        || matches!(status.and_then(|status| status.phase.as_deref()), Some("Failed" | "Succeeded"))
    {
        let reason = failure(pod, ended);
        let started = ended.is_some_and(|ended| ended.reason.as_deref() != Some("StartError"));
        if reason.code == ReasonCode::EnvironmentCrashed && started {
            return Reading { phase: Phase::Up, doubt: Some(Doubt { reason, patience: END_PATIENCE }) };
        }
        return certain(Phase::Failed(reason));
    }
    if session.is_some_and(|session| session.state.as_ref().is_some_and(|state| state.running.is_some())) {
        return certain(Phase::Up);
    }
    let scheduled =
        pod.spec.as_ref().is_some_and(|spec| spec.node_name.as_ref().is_some_and(|node| !node.is_empty()));
    if !scheduled {
        let doubt = condition(pod, "PodScheduled").filter(|(status, ..)| *status == "False").map(
            |(_, reason, message)| {
                let details = format!("no node takes the pod: {reason}: {message}");
                Doubt { reason: Reason::new(ReasonCode::Unschedulable, details), patience: unschedulable }
            },
        );
        return Reading { phase: Phase::Starting { step: PLACE, reachable: false }, doubt };
    }
    let step = if fetched { START } else { IMAGE };
    Reading { phase: Phase::Starting { step, reachable: true }, doubt: containers.iter().find_map(waiting) }
}

/// Why a container waits, if that is a fault.
fn waiting(container: &ContainerStatus) -> Option<Doubt> {
    let waiting = container.state.as_ref()?.waiting.as_ref()?;
    let reason = waiting.reason.as_deref().unwrap_or_default();
    // Of the node, and no fault of the image or the container: kubelet tries again. If it lasts, events say so.
    if waiting.message.as_deref().is_some_and(|message| message.contains(RUNTIME_AWAY)) {
        return None;
    }
    let (code, patience) = match reason {
        "InvalidImageName" | "ErrImageNeverPull" | "ImagePullBackOff" | "SignatureValidationFailed" => {
            (ReasonCode::ImagePullFailed, Duration::ZERO)
        }
        "ErrImagePull" | "ImageInspectError" | "RegistryUnavailable" => {
            (ReasonCode::ImagePullFailed, PULL_PATIENCE)
        }
        "CrashLoopBackOff" => (ReasonCode::EnvironmentCrashed, Duration::ZERO),
        "CreateContainerConfigError"
        | "CreateContainerError"
        | "RunContainerError"
        | "PreCreateHookError"
        | "PreStartHookError"
        | "PostStartHookError" => (ReasonCode::EnvironmentCrashed, CREATE_PATIENCE),
        _ => return None,
    };
    let which = if container.name == AGENT { "the agent's container" } else { "the session's container" };
    let message = waiting.message.as_deref().unwrap_or("no more is said");
    let details = format!("{which}, image {}: {reason}: {}", plain(&container.image), plain(message));
    Some(Doubt { reason: Reason::new(code, details), patience })
}

/// Why a pod that has ended did so.
fn failure(pod: &Pod, session: Option<&ContainerStateTerminated>) -> Reason {
    let status = pod.status.as_ref();
    let message = plain(status.and_then(|status| status.message.as_deref()).unwrap_or_default());
    let disruption = condition(pod, "DisruptionTarget").filter(|(status, ..)| *status == "True");
    match status.and_then(|status| status.reason.as_deref()) {
        Some("DeadlineExceeded") => {
            return Reason::new(ReasonCode::TimeExpired, "the pod has reached the end of its lifetime");
        }
        Some(word)
            if word.starts_with("OutOf") || matches!(word, "NodeAffinity" | "UnexpectedAdmissionError") =>
        {
            return Reason::new(
                ReasonCode::Unschedulable,
                format!("the node does not take the pod: {word}: {message}"),
            );
        }
        Some(word) => {
            return Reason::new(ReasonCode::EnvironmentLost, format!("the pod has ended: {word}: {message}"));
        }
        None => {}
    }
    if let Some((_, reason, message)) = disruption {
        return Reason::new(
            ReasonCode::EnvironmentLost,
            format!("the pod was taken away: {reason}: {message}"),
        );
    }
    let Some(session) = session else {
        return Reason::new(
            ReasonCode::EnvironmentLost,
            format!("the pod has ended before its session began: {message}"),
        );
    };
    let said = plain(session.message.as_deref().unwrap_or_default());
    if session.reason.as_deref() == Some("StartError")
        && let Some(bringer) = terminated(pod, AGENT)
    {
        let why = plain(bringer.message.as_deref().unwrap_or("no more is said"));
        let details = format!("the agent did not arrive: exit code {}: {why}", bringer.exit_code);
        return Reason::new(ReasonCode::EnvironmentCrashed, details);
    }
    match session.reason.as_deref() {
        Some("OOMKilled") => {
            let details = "the kernel ended the environment's first process for want of memory";
            Reason::new(ReasonCode::OutOfMemory, details)
        }
        Some("ContainerStatusUnknown") => {
            Reason::new(ReasonCode::EnvironmentLost, format!("the node has lost the container: {said}"))
        }
        word => {
            let how = match session.signal {
                Some(signal) if signal != 0 => format!("signal {signal}"),
                _ => format!("exit code {}", session.exit_code),
            };
            let details = format!(
                "the environment's first process has ended: {}, {how}: {said}",
                word.unwrap_or("no reason given")
            );
            Reason::new(ReasonCode::EnvironmentCrashed, details.trim_end_matches([':', ' ']))
        }
    }
}

fn terminated<'a>(pod: &'a Pod, container: &str) -> Option<&'a ContainerStateTerminated> {
    let containers = pod.status.as_ref()?.container_statuses.as_deref()?;
    containers.iter().find(|one| one.name == container)?.state.as_ref()?.terminated.as_ref()
}

/// Status, reason and message of a condition.
fn condition<'a>(pod: &'a Pod, kind: &str) -> Option<(&'a str, &'a str, String)> {
    let conditions = pod.status.as_ref()?.conditions.as_deref()?;
    let condition = conditions.iter().find(|condition| condition.type_ == kind)?;
    let message = plain(condition.message.as_deref().unwrap_or_default());
    Some((&condition.status, condition.reason.as_deref().unwrap_or("no reason given"), message))
}

#[cfg(test)]
#[path = "phase/tests.rs"]
mod tests;
