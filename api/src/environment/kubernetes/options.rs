//! What an operator says about the cluster.
use std::path::PathBuf;

use clap::Args;

use crate::exam::network::check_cidr;

/// How environments are made on Kubernetes. Every flag is also a `CARREL_KUBERNETES_*` variable.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Kubernetes")]
pub struct KubernetesOptions {
    /// Namespace of the sessions' pods, used by nothing else
    #[arg(
        global = true,
        long = "kubernetes-namespace",
        env = "CARREL_KUBERNETES_NAMESPACE",
        default_value = "carrel-sessions",
        value_name = "NAME"
    )]
    pub namespace: String,
    /// Kubeconfig file; without it the cluster is found as kubectl finds it: KUBECONFIG, ~/.kube/config, in-cluster
    #[arg(
        global = true,
        long = "kubernetes-kubeconfig",
        env = "CARREL_KUBERNETES_KUBECONFIG",
        value_name = "FILE"
    )]
    pub kubeconfig: Option<PathBuf>,
    /// Image that holds the agent as /carrel-agent, for exams' images without a shell; by default the server sends the agent
    /// through the exec stream
    #[arg(
        global = true,
        long = "kubernetes-agent-image",
        env = "CARREL_KUBERNETES_AGENT_IMAGE",
        value_name = "IMAGE"
    )]
    pub agent_image: Option<String>,
    /// Absolute path of the agent in the exams' own images: then nothing is sent or copied
    #[arg(
        global = true,
        long = "kubernetes-agent-path",
        env = "CARREL_KUBERNETES_AGENT_PATH",
        value_name = "PATH",
        conflicts_with = "agent_image"
    )]
    pub agent_path: Option<String>,
    /// Image of exams that name none
    #[arg(
        global = true,
        long = "kubernetes-default-image",
        env = "CARREL_KUBERNETES_DEFAULT_IMAGE",
        value_name = "IMAGE"
    )]
    pub default_image: Option<String>,
    /// Secret in the namespace to fetch images with; may be given more than once
    #[arg(
        global = true,
        long = "kubernetes-image-pull-secret",
        env = "CARREL_KUBERNETES_IMAGE_PULL_SECRET",
        value_name = "SECRET",
        value_delimiter = ','
    )]
    pub image_pull_secret: Vec<String>,
    /// Label of the nodes that take sessions; may be given more than once
    #[arg(global = true, long = "kubernetes-node-selector",
        env = "CARREL_KUBERNETES_NODE_SELECTOR",
        value_name = "KEY=VALUE",
        value_delimiter = ',',
        value_parser = label
    )]
    pub node_selector: Vec<(String, String)>,
    /// RuntimeClass of exams that name none
    #[arg(
        global = true,
        long = "kubernetes-runtime-class",
        env = "CARREL_KUBERNETES_RUNTIME_CLASS",
        value_name = "NAME"
    )]
    pub runtime_class: Option<String>,
    /// Public addresses of the cluster or of the site that `network: internet` does not reach; private ones never are
    #[arg(
        global = true,
        long = "kubernetes-closed-cidr",
        env = "CARREL_KUBERNETES_CLOSED_CIDR",
        value_name = "CIDR",
        value_delimiter = ',',
        value_parser = network
    )]
    pub closed_cidr: Vec<String>,
    /// Part of an exam's cpu that is reserved for it on its node
    #[arg(global = true, long = "kubernetes-cpu-request-percent",
        env = "CARREL_KUBERNETES_CPU_REQUEST_PERCENT",
        default_value_t = 10,
        value_parser = clap::value_parser!(u64).range(1..=100),
        value_name = "PERCENT"
    )]
    pub cpu_request_percent: u64,
    /// Part of an exam's memory that is reserved for it on its node; less than 100 lets nodes run out of memory
    #[arg(global = true, long = "kubernetes-memory-request-percent",
        env = "CARREL_KUBERNETES_MEMORY_REQUEST_PERCENT",
        default_value_t = 100,
        value_parser = clap::value_parser!(u64).range(1..=100),
        value_name = "PERCENT"
    )]
    pub memory_request_percent: u64,
    /// A pod that no node takes is given up after this
    #[arg(
        global = true,
        long = "kubernetes-unschedulable-seconds",
        env = "CARREL_KUBERNETES_UNSCHEDULABLE_SECONDS",
        default_value_t = 8,
        value_name = "SECONDS"
    )]
    pub unschedulable_seconds: u64,
}

impl Default for KubernetesOptions {
    /// As without any flag or variable.
    fn default() -> Self {
        Self {
            namespace: "carrel-sessions".to_owned(),
            kubeconfig: None,
            agent_image: None,
            agent_path: None,
            default_image: None,
            image_pull_secret: Vec::new(),
            node_selector: Vec::new(),
            runtime_class: None,
            closed_cidr: Vec::new(),
            cpu_request_percent: 10,
            memory_request_percent: 100,
            unschedulable_seconds: 8,
        }
    }
}

/// How the agent comes into a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrival<'a> {
    /// The server sends it, see [`super::delivery`].
    Stream,
    /// A container of this image copies it.
    Image(&'a str),
    /// It is in the exam's image, at this path.
    Path(&'a str),
}

impl KubernetesOptions {
    pub(super) fn arrival(&self) -> Arrival<'_> {
        match (&self.agent_path, &self.agent_image) {
            (Some(path), _) => Arrival::Path(path),
            (None, Some(image)) => Arrival::Image(image),
            (None, None) => Arrival::Stream,
        }
    }

    /// Whether the server must have the agent's program itself.
    #[must_use]
    pub fn sends_agent(&self) -> bool {
        self.arrival() == Arrival::Stream
    }
}

fn network(text: &str) -> Result<String, String> {
    check_cidr(text)?;
    if text.ends_with("/0") {
        return Err(format!("{text:?} is every address there is: an exam with `network: none` reaches none"));
    }
    Ok(text.to_owned())
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("a label is written KEY=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        kubernetes: KubernetesOptions,
    }

    #[test]
    fn without_flags_the_options_are_their_defaults() {
        let read = Command::try_parse_from(["carrel"]).unwrap().kubernetes;
        assert_eq!(format!("{read:?}"), format!("{:?}", KubernetesOptions::default()));
    }

    #[test]
    fn lists_are_given_with_commas_or_again() {
        let read = Command::try_parse_from([
            "carrel",
            "--kubernetes-node-selector=a=b,c=",
            "--kubernetes-image-pull-secret=one",
            "--kubernetes-image-pull-secret=two",
        ])
        .unwrap()
        .kubernetes;
        assert_eq!(read.node_selector, [("a".to_owned(), "b".to_owned()), ("c".to_owned(), String::new())]);
        assert_eq!(read.image_pull_secret, ["one", "two"]);
        Command::try_parse_from(["carrel", "--kubernetes-node-selector=a"]).unwrap_err();
        Command::try_parse_from(["carrel", "--kubernetes-cpu-request-percent=0"]).unwrap_err();
    }
}
