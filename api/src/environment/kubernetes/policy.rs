//! What a pod may reach. The namespace denies everything in both directions; an exam may open the way out.
use k8s_openapi::api::networking::v1::NetworkPolicy;
use serde_json::{Value, json};

use super::{
    KubernetesOptions,
    pod::{ENVIRONMENT, MANAGED, labels, name},
};
use crate::{environment::Create, exam::Network};

/// Name of the policy that closes the namespace's environments.
pub(super) const CLOSED: &str = "carrel-closed";

/// Addresses that lead back into a network of one's own, or to no single host.
const NOT_PUBLIC_V4: [&str; 12] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/4",
    "240.0.0.0/4",
];
/// As above; those that carry IPv4 addresses inside are among them.
const NOT_PUBLIC_V6: [&str; 10] = [
    "::/128",
    "::1/128",
    "64:ff9b::/96",
    "64:ff9b:1::/48",
    "100::/64",
    "2001::/32",
    "2002::/16",
    "fc00::/7",
    "fe80::/10",
    "ff00::/8",
];

/// Denies everything to every environment of the namespace; made once.
pub(super) fn closed(namespace: &str) -> Result<NetworkPolicy, String> {
    read(json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": { "name": CLOSED, "namespace": namespace, "labels": { MANAGED.0: MANAGED.1 } },
        "spec": {
            "podSelector": { "matchLabels": { MANAGED.0: MANAGED.1 } },
            "policyTypes": ["Ingress", "Egress"],
        },
    }))
}

/// Whether `found` denies what [`closed`] does.
pub(super) fn closes(found: &NetworkPolicy, closed: &NetworkPolicy) -> bool {
    let (Some(found), Some(closed)) = (&found.spec, &closed.spec) else { return false };
    found.pod_selector == closed.pod_selector
        && found.policy_types == closed.policy_types
        && found.ingress.as_ref().is_none_or(Vec::is_empty)
        && found.egress.as_ref().is_none_or(Vec::is_empty)
}

/// What an environment's exam opens; `None` when it opens nothing.
pub(super) fn opened(request: &Create, options: &KubernetesOptions) -> Result<Option<NetworkPolicy>, String> {
    let egress = match &request.spec.network {
        Network::None => return Ok(None),
        Network::Internet => internet(&options.closed_cidr),
        Network::Cidrs(networks) => {
            let to: Vec<_> = networks.iter().map(|cidr| json!({ "ipBlock": { "cidr": cidr } })).collect();
            json!([{ "to": to }])
        }
    };
    read(json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {
            "name": name(request.environment_id),
            "namespace": options.namespace,
            "labels": labels(request),
        },
        "spec": {
            "podSelector": { "matchLabels": { ENVIRONMENT: request.environment_id.to_string() } },
            "policyTypes": ["Egress"],
            "egress": egress,
        },
    }))
    .map(Some)
}

fn internet(closed: &[String]) -> Value {
    let except = |known: &[&str], v6: bool| -> Vec<String> {
        known
            .iter()
            .map(|cidr| (*cidr).to_owned())
            .chain(closed.iter().filter(|cidr| cidr.contains(':') == v6).cloned())
            .collect()
    };
    json!([
        {
            "to": [
                { "ipBlock": { "cidr": "0.0.0.0/0", "except": except(&NOT_PUBLIC_V4, false) } },
                { "ipBlock": { "cidr": "::/0", "except": except(&NOT_PUBLIC_V6, true) } },
            ],
        },
        {
            "to": [{
                "namespaceSelector": { "matchLabels": { "kubernetes.io/metadata.name": "kube-system" } },
                "podSelector": { "matchLabels": { "k8s-app": "kube-dns" } },
            }],
            "ports": [{ "protocol": "UDP", "port": 53 }, { "protocol": "TCP", "port": 53 }],
        },
    ])
}

fn read(policy: Value) -> Result<NetworkPolicy, String> {
    serde_json::from_value(policy).map_err(|error| format!("the network policy cannot be written: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{exam::EnvironmentSpec, identity::EnvironmentId};

    fn request(network: Network) -> Create {
        Create {
            environment_id: EnvironmentId::new(),
            owner: None,
            exam_id: "e".into(),
            spec: EnvironmentSpec { network, ..EnvironmentSpec::default() },
            lifetime_seconds: 60,
        }
    }

    fn written(network: Network, options: &KubernetesOptions) -> Value {
        serde_json::to_value(opened(&request(network), options).unwrap().unwrap()).unwrap()
    }

    #[test]
    fn an_exam_without_network_opens_nothing() {
        assert!(opened(&request(Network::None), &KubernetesOptions::default()).unwrap().is_none());
        let closed = serde_json::to_value(closed("n").unwrap()).unwrap();
        assert_eq!(closed["spec"]["policyTypes"], json!(["Ingress", "Egress"]));
        assert!(closed["spec"].get("ingress").is_none() && closed["spec"].get("egress").is_none());
    }

    #[test]
    fn a_policy_that_somebody_has_weakened_does_not_close() {
        let closed = closed("n").unwrap();
        let changed = |pointer: &str, value: Value| {
            let mut changed = serde_json::to_value(&closed).unwrap();
            changed["spec"][pointer] = value;
            serde_json::from_value::<NetworkPolicy>(changed).unwrap()
        };
        assert!(closes(&closed, &closed) && closes(&changed("egress", json!([])), &closed));
        assert!(!closes(&changed("egress", json!([{}])), &closed));
        assert!(!closes(&changed("ingress", json!([{}])), &closed));
        assert!(!closes(&changed("policyTypes", json!(["Ingress"])), &closed));
        assert!(!closes(&changed("podSelector", json!({ "matchLabels": { "a": "b" } })), &closed));
    }

    #[test]
    fn the_internet_is_without_private_and_closed_networks_and_never_opens_a_way_in() {
        let options = KubernetesOptions {
            closed_cidr: vec!["198.51.7.0/24".into(), "2a00::/16".into()],
            ..KubernetesOptions::default()
        };
        let policy = written(Network::Internet, &options);
        assert_eq!(policy["spec"]["policyTypes"], json!(["Egress"]));
        let [v4, v6] = policy["spec"]["egress"][0]["to"].as_array().unwrap().as_slice() else {
            panic!("{policy}")
        };
        for cidr in ["10.0.0.0/8", "169.254.0.0/16", "198.51.7.0/24"] {
            assert!(v4["ipBlock"]["except"].as_array().unwrap().contains(&json!(cidr)), "{cidr}");
        }
        for cidr in ["fc00::/7", "2a00::/16"] {
            assert!(v6["ipBlock"]["except"].as_array().unwrap().contains(&json!(cidr)), "{cidr}");
        }
        assert!(!v4["ipBlock"]["except"].as_array().unwrap().contains(&json!("2a00::/16")));
    }

    #[test]
    fn listed_networks_are_all_that_is_opened() {
        let policy = written(Network::Cidrs(vec!["10.1.0.0/16".into()]), &KubernetesOptions::default());
        assert_eq!(policy["spec"]["egress"], json!([{ "to": [{ "ipBlock": { "cidr": "10.1.0.0/16" } }] }]));
    }
}
