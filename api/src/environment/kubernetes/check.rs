//! Is the cluster ready to be used? Asked at start, and answered with the command that helps.
use futures_util::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::{
    authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec},
    core::v1::Pod,
};
use kube::{Api, api::PostParams};

use super::cluster::{Cluster, Fault, plain};
use crate::environment::EnvironmentError;

/// Group, resource, subresource and verbs: exactly the Role in `charts/rbac.yaml`.
pub(super) const RIGHTS: [(&str, &str, &str, &[&str]); 4] = [
    ("", "pods", "", &["create", "get", "list", "watch", "patch", "delete"]),
    ("", "pods", "exec", &["get", "create"]),
    ("networking.k8s.io", "networkpolicies", "", &["create", "get", "list", "delete"]),
    ("", "events", "", &["list", "watch"]),
];
/// Questions at once.
const TOGETHER: usize = 4;

/// Asks for every right, and for a pod like the ones to come, which is not made.
pub(super) async fn check(cluster: &Cluster, like: &Pod) -> Result<(), EnvironmentError> {
    let mut rights = Vec::new();
    for (group, resource, part, verbs) in RIGHTS {
        rights.extend(verbs.iter().map(|verb| ResourceAttributes {
            group: Some(group.to_owned()),
            resource: Some(resource.to_owned()),
            subresource: Some(part.to_owned()).filter(|part| !part.is_empty()),
            verb: Some((*verb).to_owned()),
            namespace: Some(cluster.namespace.clone()),
            ..ResourceAttributes::default()
        }));
    }
    let asked = stream::iter(rights).map(|right| may(cluster, right)).buffer_unordered(TOGETHER);
    let answers: Vec<Option<String>> = asked.try_collect().await?;
    let missing: Vec<String> = answers.into_iter().flatten().collect();
    let namespace = &cluster.namespace;
    if !missing.is_empty() {
        return Err(EnvironmentError::Unavailable(format!(
            "the cluster's credentials do not allow in namespace {namespace}: {}; make the Role in charts/rbac.yaml and \
             bind it to the server's account: `kubectl --namespace {namespace} apply -f charts/rbac.yaml && kubectl --namespace {namespace} \
             create rolebinding carrel-server --role=carrel-server --serviceaccount=NAMESPACE:ACCOUNT`",
            missing.join(", ")
        )));
    }
    let trial = PostParams { dry_run: true, ..PostParams::default() };
    match cluster.call(|| cluster.pods.create(&trial, like)).await {
        Ok(_) => Ok(()),
        Err(Fault::Unavailable(why)) => Err(EnvironmentError::Unavailable(why)),
        Err(fault @ Fault::Answer(_)) if fault.is_not_found() => Err(EnvironmentError::Unavailable(format!(
            "there is no namespace {namespace}: `kubectl create namespace {namespace} && kubectl label namespace {namespace} \
             pod-security.kubernetes.io/enforce=restricted`"
        ))),
        // Full is not wrong.
        Err(Fault::Answer(status)) if status.message.contains("exceeded quota") => Ok(()),
        Err(Fault::Answer(status)) => Err(EnvironmentError::Unavailable(format!(
            "namespace {namespace} does not take our pods: {}; see `kubectl describe namespace {namespace}`",
            plain(&status.message)
        ))),
    }
}

/// The right's name if it is not there.
async fn may(cluster: &Cluster, right: ResourceAttributes) -> Result<Option<String>, EnvironmentError> {
    let name = [right.verb.as_deref(), right.resource.as_deref(), right.subresource.as_deref()];
    let name = match name {
        [Some(verb), Some(resource), Some(part)] => format!("{verb} {resource}/{part}"),
        [verb, resource, _] => format!("{} {}", verb.unwrap_or_default(), resource.unwrap_or_default()),
    };
    let review = SelfSubjectAccessReview {
        spec: SelfSubjectAccessReviewSpec { resource_attributes: Some(right), non_resource_attributes: None },
        ..SelfSubjectAccessReview::default()
    };
    let reviews: Api<SelfSubjectAccessReview> = Api::all(cluster.client.clone());
    let post = PostParams::default();
    let answer = cluster.call(|| reviews.create(&post, &review)).await.map_err(|fault| match fault {
        Fault::Unavailable(why) => EnvironmentError::Unavailable(format!(
            "the cluster cannot be used: {why}; `kubectl version` shows whether it answers"
        )),
        refused @ Fault::Answer(_) => EnvironmentError::Unavailable(format!("asking for rights: {refused}")),
    })?;
    Ok(if answer.status.is_some_and(|status| status.allowed) { None } else { Some(name) })
}
