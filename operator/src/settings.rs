//! What the operator is told when it starts.

use std::{net::SocketAddr, str::FromStr};

use protocol::names::USER_ID;

use crate::network::Egress;

/// Turns `AgenticSession`s into Jobs and records what became of them.
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "agentic-operator", version)]
pub struct Settings {
    /// What goes into a session's pod.
    #[command(flatten)]
    pub pod: PodSettings,
    /// The one namespace whose sessions are run; all namespaces when absent.
    #[arg(long, env = "WATCH_NAMESPACE")]
    pub watch_namespace: Option<String>,
    /// Where `/metrics`, `/healthz` and `/readyz` are served.
    #[arg(long, env = "METRICS_ADDRESS", default_value = "0.0.0.0:8080")]
    pub metrics_address: SocketAddr,
    /// Most sessions that are reconciled at once; also bounds the connections to the API server.
    #[arg(long, env = "CONCURRENCY", default_value_t = 16)]
    pub concurrency: u16,
    /// What the pods of sessions may reach: the list of a `NetworkPolicy`'s `spec.egress` as JSON. The operator keeps such a policy in
    /// each namespace with sessions. Absent: it keeps none.
    #[arg(long, env = "SESSION_EGRESS")]
    pub session_egress: Option<Egress>,
    /// How long things last.
    #[command(flatten)]
    pub timing: TimingSettings,
    /// The Lease of which one operator at a time is the holder.
    #[command(flatten)]
    pub lease: LeaseSettings,
}

/// How long things last, in seconds. Those that are hidden are the product's own; tests shorten them.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct TimingSettings {
    /// Seconds for which an ended attempt's Job and pod, and with them the log, are kept once the outcome is recorded.
    #[arg(long, env = "JOB_RETENTION", default_value_t = 3_600)]
    pub job_retention: u32,
    /// How long an image may fail to be pulled, or a container to be made, before the attempt is given up.
    #[arg(long, hide = true, default_value_t = 300)]
    pub container_grace: u32,
    /// First wait between attempts; it doubles.
    #[arg(long, hide = true, default_value_t = 10)]
    pub retry_first_wait: u32,
    /// First wait between drain Jobs; it grows with the time since the run's end.
    #[arg(long, hide = true, default_value_t = 30)]
    pub drain_first_wait: u32,
    /// Longest wait between drain Jobs.
    #[arg(long, hide = true, default_value_t = 3_600)]
    pub drain_longest_wait: u32,
    /// How long after a run's end records are still delivered.
    #[arg(long, hide = true, default_value_t = 86_400)]
    pub drain_bound: u32,
    /// How long a node may be unreachable before its pods are given up.
    #[arg(long, hide = true, default_value_t = 300)]
    pub node_loss: u32,
    /// How long a deleted pod is held for a session that cannot be read.
    #[arg(long, hide = true, default_value_t = 600)]
    pub hold_unreadable: u32,
    /// How long what is left of a session that is gone may take to go by itself.
    #[arg(long, hide = true, default_value_t = 15)]
    pub orphan_grace: u32,
    /// How long a namespace's `NetworkPolicy` stays behind its last session.
    #[arg(long, hide = true, default_value_t = 60)]
    pub network_kept: u32,
}

impl Default for TimingSettings {
    fn default() -> Self {
        Self {
            job_retention: 3_600,
            container_grace: 300,
            retry_first_wait: 10,
            drain_first_wait: 30,
            drain_longest_wait: 3_600,
            drain_bound: 86_400,
            node_loss: 300,
            hold_unreadable: 600,
            orphan_grace: 15,
            network_kept: 60,
        }
    }
}

/// What goes into a session's pod.
#[derive(Clone, Debug, clap::Args)]
pub struct PodSettings {
    /// Image of both containers of a session's pod.
    #[arg(long, env = "RUNNER_IMAGE")]
    pub runner_image: String,
    /// Base of the gateway's WebSocket, such as `ws://agentic-gateway.agentic.svc:8080`. Absent: runners have no uplink.
    #[arg(long, env = "GATEWAY_URL")]
    pub gateway_url: Option<String>,
    /// User and group of a session's containers. `none` leaves them to the cluster, as `OpenShift` wants it.
    #[arg(long, env = "RUN_AS_USER", default_value_t = RunAs::User(USER_ID))]
    pub run_as_user: RunAs,
    /// When images of a session's pod are pulled.
    #[arg(long, env = "IMAGE_PULL_POLICY", value_enum, default_value_t = PullPolicy::IfNotPresent)]
    pub image_pull_policy: PullPolicy,
}

/// When an image is pulled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum PullPolicy {
    /// At each start.
    Always,
    /// When the node does not have it.
    IfNotPresent,
    /// The node must have it.
    Never,
}

impl PullPolicy {
    /// The policy as a container's spec has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Always => "Always",
            Self::IfNotPresent => "IfNotPresent",
            Self::Never => "Never",
        }
    }
}

impl Settings {
    /// The one watched namespace, if not all. A variable that is set to nothing names none.
    pub fn scope(&self) -> Option<&str> {
        self.watch_namespace.as_deref().filter(|name| !name.is_empty())
    }
}

impl PodSettings {
    /// Base of the gateway's WebSocket, if there is one. A variable that is set to nothing names none.
    pub fn gateway(&self) -> Option<&str> {
        self.gateway_url.as_deref().filter(|url| !url.is_empty())
    }
}

/// The Lease of which one operator at a time is the holder.
#[derive(Clone, Debug, clap::Args)]
pub struct LeaseSettings {
    /// Name of the Lease.
    #[arg(long = "lease-name", env = "LEASE_NAME", default_value = "agentic-operator")]
    pub name: String,
    /// Namespace of the Lease: the operator's own.
    #[arg(long = "lease-namespace", env = "POD_NAMESPACE", default_value = "default")]
    pub namespace: String,
    /// Who this process is among the candidates: the name of its pod.
    #[arg(long = "identity", env = "POD_NAME", default_value_t = default_identity())]
    pub identity: String,
}

/// User and group of a session's containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunAs {
    /// This user, which is its own group.
    User(i64),
    /// Whatever the cluster assigns.
    ClusterDecides,
}

impl std::fmt::Display for RunAs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::User(id) => write!(f, "{id}"),
            Self::ClusterDecides => f.write_str("none"),
        }
    }
}

impl FromStr for RunAs {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("none", _) => Ok(Self::ClusterDecides),
            // Root is what Pod Security `restricted` refuses.
            (_, Ok(id)) if id > 0 => Ok(Self::User(id)),
            _ => Err(format!(
                "failed to read {text:?} as a user: give a number above 0, or none"
            )),
        }
    }
}

/// Two processes without a name of their own must not take each other for the holder.
fn default_identity() -> String {
    format!("agentic-operator-{:08x}", rand::random::<u32>())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[test]
    fn the_image_is_all_that_must_be_given() {
        let settings = Settings::try_parse_from(["agentic-operator", "--runner-image", "r:1"]).unwrap();
        assert_eq!(settings.pod.run_as_user, RunAs::User(10001));
        assert_eq!((settings.pod.gateway(), settings.scope()), (None, None));
        let (given, built_in) = (settings.timing, TimingSettings::default());
        assert_eq!(format!("{given:?}"), format!("{built_in:?}"));
    }

    #[test]
    fn a_user_is_a_number_above_0_or_none() {
        assert_eq!("none".parse(), Ok(RunAs::ClusterDecides));
        assert_eq!("1000".parse(), Ok(RunAs::User(1000)));
        assert!("0".parse::<RunAs>().unwrap_err().contains("above 0"));
    }
}
