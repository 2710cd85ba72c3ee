//! What an exam is: read from YAML files and from the API's JSON alike.
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One exam. Fields and defaults are described in `docs/exams.md`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Exam {
    /// `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`.
    pub id: String,
    /// For people.
    pub title: String,
    /// 1 to 10080 (a week).
    pub duration_minutes: u32,
    /// A session that is ready and never used ends after this. Default 900.
    #[serde(default = "default_start_within")]
    pub start_within_seconds: u32,
    /// A shell without its client is kept this long. Default 300.
    #[serde(default = "default_reconnect_window")]
    pub reconnect_window_seconds: u32,
    /// Environments kept ready before anybody asks. Default 0.
    #[serde(default)]
    pub warm: u32,
    /// Where candidates work.
    #[serde(default)]
    pub environment: EnvironmentSpec,
}

const fn default_start_within() -> u32 {
    900
}

const fn default_reconnect_window() -> u32 {
    300
}

/// What an exam asks of its environments. Sizes are bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EnvironmentSpec {
    /// Container image; the local environment has none and uses the machine's own system, read-only.
    pub image: Option<String>,
    /// Login shell; default: the image's own for the user, else `/bin/bash`, else `/bin/sh`.
    pub shell: Option<String>,
    /// The user inside.
    pub user: Option<String>,
    /// Variables every process gets.
    pub env: BTreeMap<String, String>,
    /// A script run once before ready.
    pub setup: Option<String>,
    /// Thousandths of a core.
    pub cpu: Option<u64>,
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// Bytes of writable storage.
    pub storage: Option<u64>,
    /// Processes and threads at once.
    pub processes: Option<u32>,
    /// What may be reached from inside.
    pub network: Network,
    /// Kubernetes RuntimeClass.
    pub runtime_class: Option<String>,
    /// May an SSH client open TCP connections to the environment's own loopback?
    pub allow_port_forward: bool,
}

/// What may be reached from inside an environment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", untagged)]
pub enum Network {
    /// Nothing but its own loopback.
    #[default]
    None,
    /// Public addresses.
    Internet,
    /// These networks, in CIDR notation.
    Cidrs(Vec<String>),
}

impl Default for EnvironmentSpec {
    fn default() -> Self {
        Self {
            image: None,
            shell: None,
            user: None,
            env: BTreeMap::new(),
            setup: None,
            cpu: None,
            memory: None,
            storage: None,
            processes: None,
            network: Network::None,
            runtime_class: None,
            allow_port_forward: false,
        }
    }
}
