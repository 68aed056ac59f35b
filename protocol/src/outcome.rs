//! How an attempt ended, and why a session is where it is.

use serde::{Deserialize, Serialize};

/// What the runner says of its attempt. Exit code and reason are functions of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Outcome {
    /// Not ended: a report with it was left behind by a runner that died.
    Running,
    /// The agent finished its task.
    Succeeded,
    /// An interactive session was idle for its inactivity timeout.
    Inactive,
    /// An interactive session was ended by `end_session`.
    EndedByRequest,
    /// A one-shot's turn was interrupted by a user.
    StoppedByUser,
    /// Told to stop (SIGTERM).
    Stopped,
    /// The agent ended with an error, or the API refused a request (400, 404).
    AgentError,
    /// The limit of rounds was reached.
    MaxTurns,
    /// The limit of cost or tokens was reached.
    BudgetExceeded,
    /// The running time was used up.
    Timeout,
    /// There is no credential for the model API.
    NoCredentials,
    /// The model API refused the credential (401, 403).
    InvalidCredentials,
    /// The session's configuration cannot work.
    ConfigError,
    /// The model API was overloaded, answered 5xx or could not be reached.
    ModelUnavailable,
    /// The model API answered 429.
    RateLimited,
    /// A repository could not be reached.
    CloneUnreachable,
    /// A repository refused to be cloned.
    CloneRefused,
    /// A repository could not be reached at the end.
    PushUnreachable,
    /// A repository refused the push.
    PushRefused,
    /// The agent container was lost too often.
    AgentLost,
    /// The agent ran out of memory too often.
    OutOfMemory,
    /// The volume cannot be used.
    VolumeUnavailable,
    /// The volume is full.
    DiskFull,
    /// Another pod drives the session, or the lease could not be kept.
    Superseded,
    /// The runner met a fault of its own.
    RunnerError,
    /// A drain's: records are left that the gateway did not take.
    Undelivered,
    /// Written into the log for an attempt that left no end of its own.
    Lost,
}

impl Outcome {
    /// Exit code of the runner: 0 done, 1 agent error, 2 configuration or credentials, 3 limit, 4 timeout,
    /// 75 try again (`EX_TEMPFAIL`), 143 told to stop (128 + SIGTERM).
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Succeeded | Self::Inactive | Self::EndedByRequest | Self::StoppedByUser => 0,
            Self::AgentError | Self::PushRefused | Self::AgentLost | Self::OutOfMemory => 1,
            Self::NoCredentials | Self::InvalidCredentials | Self::ConfigError | Self::CloneRefused => 2,
            Self::MaxTurns | Self::BudgetExceeded => 3,
            Self::Timeout => 4,
            Self::Running
            | Self::ModelUnavailable
            | Self::RateLimited
            | Self::CloneUnreachable
            | Self::PushUnreachable
            | Self::VolumeUnavailable
            | Self::DiskFull
            | Self::Superseded
            | Self::RunnerError
            | Self::Undelivered
            | Self::Lost => 75,
            Self::Stopped => 143,
        }
    }

    /// The reason that a session has after this outcome, when nothing else explains its end.
    ///
    /// `None`: the outcome says nothing of why; the operator looks at the pod (told to stop, died, superseded).
    pub fn reason(self) -> Option<Reason> {
        Some(match self {
            Self::Succeeded | Self::EndedByRequest => Reason::Completed,
            Self::Inactive => Reason::Inactivity,
            Self::StoppedByUser => Reason::StoppedByUser,
            Self::AgentError => Reason::AgentError,
            Self::MaxTurns => Reason::MaxTurns,
            Self::BudgetExceeded => Reason::BudgetExceeded,
            Self::Timeout => Reason::Timeout,
            Self::NoCredentials => Reason::NoCredentials,
            Self::InvalidCredentials => Reason::InvalidCredentials,
            Self::ConfigError => Reason::ConfigError,
            Self::ModelUnavailable => Reason::ModelUnavailable,
            Self::RateLimited => Reason::RateLimited,
            Self::CloneUnreachable | Self::CloneRefused => Reason::CloneFailed,
            Self::PushUnreachable | Self::PushRefused => Reason::PushFailed,
            Self::AgentLost => Reason::AgentLost,
            Self::OutOfMemory => Reason::OOMKilled,
            Self::VolumeUnavailable => Reason::VolumeUnavailable,
            Self::DiskFull => Reason::DiskFull,
            Self::RunnerError => Reason::RunnerCrashed,
            Self::Running | Self::Stopped | Self::Superseded | Self::Undelivered | Self::Lost => return None,
        })
    }

    /// Whether another attempt may succeed where this one did not, through no change of the session.
    pub fn is_transient(self) -> bool {
        matches!(
            self,
            Self::ModelUnavailable
                | Self::RateLimited
                | Self::CloneUnreachable
                | Self::PushUnreachable
                | Self::VolumeUnavailable
                | Self::DiskFull
                | Self::RunnerError
        )
    }
}

/// Why a session or a condition is what it is: one enum for `status.reason`, conditions, Events and metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Reason {
    /// The task is done.
    Completed,
    /// The agent ended with an error.
    AgentError,
    /// `limits.maxTurns` was reached.
    MaxTurns,
    /// `limits.maxCostUSD` or `limits.maxTokens` was reached.
    BudgetExceeded,
    /// `timeout` was reached.
    Timeout,
    /// No credential for the model API.
    NoCredentials,
    /// The model API refused the credential.
    InvalidCredentials,
    /// The model API was overloaded or could not be reached.
    ModelUnavailable,
    /// The model API limited the rate.
    RateLimited,
    /// A repository could not be cloned.
    CloneFailed,
    /// A repository could not be pushed.
    PushFailed,
    /// Killed for memory.
    OOMKilled,
    /// The agent container was lost too often.
    AgentLost,
    /// The pod was evicted.
    Evicted,
    /// The pod was preempted.
    Preempted,
    /// The pod's node was lost.
    NodeLost,
    /// The pod was deleted by somebody.
    PodDeleted,
    /// The pod cannot be made or started as asked.
    ConfigError,
    /// The API server refused the pod.
    PodRejected,
    /// A quota is used up.
    QuotaExceeded,
    /// The volume cannot be used.
    VolumeUnavailable,
    /// A disk is full.
    DiskFull,
    /// The runner crashed or was killed.
    RunnerCrashed,
    /// An image cannot be pulled.
    ImagePullFailed,
    /// No node takes the pod.
    Unschedulable,
    /// Stopped by `suspend` or a user's interrupt.
    StoppedByUser,
    /// Idle for `inactivityTimeout`.
    Inactivity,
    /// Waits for its turn.
    Queued,
    /// It has a place among those that may run.
    Admitted,
    /// `suspend` at creation.
    Suspended,
    /// The pod is gone and left no report.
    OutcomeUnknown,
    /// An object of a name that the session needs belongs to somebody else.
    NameConflict,
    /// The session's pod is being made.
    Creating,
    /// The session's pod runs.
    Running,
    /// Another attempt follows.
    Retrying,
    /// The claim waits for its pod or is not bound yet.
    WaitingForVolume,
    /// The volume is bound.
    VolumeBound,
    /// There is no claim: the workspace goes with the pod.
    Ephemeral,
    /// All records are acknowledged.
    Delivered,
    /// Something was not delivered in time; the message has the numbers.
    Undelivered,
    /// What was not delivered will not come any more; the message has the numbers.
    Lost,
    /// There is no gateway.
    NoGateway,
    /// Traces are not configured.
    TracingOff,
}

impl Reason {
    /// The reason as it stands in status and conditions.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "Completed",
            Self::AgentError => "AgentError",
            Self::MaxTurns => "MaxTurns",
            Self::BudgetExceeded => "BudgetExceeded",
            Self::Timeout => "Timeout",
            Self::NoCredentials => "NoCredentials",
            Self::InvalidCredentials => "InvalidCredentials",
            Self::ModelUnavailable => "ModelUnavailable",
            Self::RateLimited => "RateLimited",
            Self::CloneFailed => "CloneFailed",
            Self::PushFailed => "PushFailed",
            Self::OOMKilled => "OOMKilled",
            Self::AgentLost => "AgentLost",
            Self::Evicted => "Evicted",
            Self::Preempted => "Preempted",
            Self::NodeLost => "NodeLost",
            Self::PodDeleted => "PodDeleted",
            Self::ConfigError => "ConfigError",
            Self::PodRejected => "PodRejected",
            Self::QuotaExceeded => "QuotaExceeded",
            Self::VolumeUnavailable => "VolumeUnavailable",
            Self::DiskFull => "DiskFull",
            Self::RunnerCrashed => "RunnerCrashed",
            Self::ImagePullFailed => "ImagePullFailed",
            Self::Unschedulable => "Unschedulable",
            Self::StoppedByUser => "StoppedByUser",
            Self::Inactivity => "Inactivity",
            Self::Queued => "Queued",
            Self::Admitted => "Admitted",
            Self::Suspended => "Suspended",
            Self::OutcomeUnknown => "OutcomeUnknown",
            Self::NameConflict => "NameConflict",
            Self::Creating => "Creating",
            Self::Running => "Running",
            Self::Retrying => "Retrying",
            Self::WaitingForVolume => "WaitingForVolume",
            Self::VolumeBound => "VolumeBound",
            Self::Ephemeral => "Ephemeral",
            Self::Delivered => "Delivered",
            Self::Undelivered => "Undelivered",
            Self::Lost => "Lost",
            Self::NoGateway => "NoGateway",
            Self::TracingOff => "TracingOff",
        }
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
