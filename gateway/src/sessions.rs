//! `AgenticSession`s as the API server holds them: read live, created, deleted.

use std::time::Duration;

use crds::{AgenticSession, AgenticSessionStatus, Phase, condition};
use jiff::Timestamp;
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams, Preconditions},
    core::ApiResource,
};
use protocol::{
    Reason,
    names::{annotation, label},
};
use serde_json::Value;

/// Longest wait for the API server.
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused or failed.
    #[error("failed to {verb} {what}: {source}")]
    Api {
        /// What was asked.
        verb: &'static str,
        /// Of which object.
        what: String,
        /// Why not.
        source: kube::Error,
    },
    /// The API server did not answer.
    #[error("failed to {verb} {what}: the API server did not answer within {} s; try again", TIMEOUT.as_secs())]
    Timeout {
        /// What was asked.
        verb: &'static str,
        /// Of which object.
        what: String,
    },
}

/// Waits for the API server, but not for ever.
pub async fn bounded<T>(
    verb: &'static str,
    what: impl FnOnce() -> String,
    call: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, Error> {
    match tokio::time::timeout(TIMEOUT, call).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(source)) => Err(Error::Api {
            verb,
            what: what(),
            source,
        }),
        Err(_) => Err(Error::Timeout { verb, what: what() }),
    }
}

/// Where a session is. Both parts are names as Kubernetes allows them, so that neither can lead a request astray.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    namespace: String,
    name: String,
}

impl Target {
    /// `None`: no object can have that name.
    pub fn new(namespace: &str, name: &str) -> Option<Self> {
        (is_namespace(namespace) && is_name(name)).then(|| Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AgenticSession {}/{}", self.namespace, self.name)
    }
}

/// Whether a namespace can have this name (RFC 1123 label).
pub fn is_namespace(text: &str) -> bool {
    text.len() <= 63 && is_label(text)
}

fn is_name(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_label)
}

fn is_label(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    !text.is_empty() && text.bytes().all(inner) && !text.starts_with('-') && !text.ends_with('-')
}

/// Whether the records of a session have all arrived, by the operator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Delivered {
    /// Nobody knows.
    #[default]
    Unknown,
    /// Not yet.
    No,
    /// All that will come have come.
    Final,
}

/// The part of a session that streams and runners depend on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// UID of the CR.
    pub uid: String,
    /// Version of the CR: of two views the one with the higher is newer.
    pub version: u64,
    /// Where it is.
    pub phase: Phase,
    /// Why.
    pub reason: Option<String>,
    /// Why, for people.
    pub message: Option<String>,
    /// The pod that may write its records.
    pub pod: Option<String>,
    /// Number of the current attempt.
    pub attempt: u32,
    /// When the run ended.
    pub ended: Option<Timestamp>,
    /// Whether its records have arrived.
    pub delivered: Delivered,
    /// Seq of the last record that the log is known to have had; 0: none.
    pub acked: u64,
    /// Its run has ended, and the next one is asked for.
    pub starting: bool,
    /// It stays for further messages.
    pub interactive: bool,
}

/// Whether an ended session is about to begin its next run: see the resource's annotation and `suspend`.
fn starting(object: &DynamicObject, status: &AgenticSessionStatus) -> bool {
    let suspended = object.data["spec"]["suspend"] == true;
    let asked = object.annotations().get(annotation::START_REQUESTED_AT);
    let by_itself = status.phase == Phase::Stopped && status.reason.as_deref() == Some(Reason::StoppedByUser.as_str());
    status.phase.is_terminal() && !suspended && (by_itself || asked != status.handled_start_request.as_ref())
}

impl From<&DynamicObject> for View {
    fn from(object: &DynamicObject) -> Self {
        let status = object.data.get("status").cloned().unwrap_or(Value::Null);
        let status: AgenticSessionStatus = match serde_json::from_value(status) {
            Ok(status) => status,
            Err(error) => {
                tracing::warn!(session = object.name_any(), namespace = object.namespace(), %error, "status not understood");
                AgenticSessionStatus::default()
            }
        };
        let delivered = status
            .conditions
            .iter()
            .find(|condition| condition.type_ == condition::EVENTS_DELIVERED);
        Self {
            starting: starting(object, &status),
            interactive: object.data["spec"]["interactive"] == true,
            uid: object.uid().unwrap_or_default(),
            version: object
                .resource_version()
                .and_then(|version| version.parse().ok())
                .unwrap_or_default(),
            phase: status.phase,
            reason: status.reason,
            message: status.message,
            pod: status.pod_uid.filter(|uid| !uid.is_empty()),
            attempt: status.attempt.unwrap_or_default(),
            ended: status.completion_time.map(|time| time.0),
            acked: status.acked_seq.unwrap_or_default(),
            delivered: match delivered {
                Some(condition) if condition.status == "True" || condition.reason == condition::LOST => {
                    Delivered::Final
                }
                Some(condition) if condition.status == "False" => Delivered::No,
                _ => Delivered::Unknown,
            },
        }
    }
}

/// The sessions of a cluster. Objects are passed through as they are, so that a field this build does not know is not lost.
#[derive(Clone)]
pub struct Sessions {
    client: Client,
    resource: ApiResource,
}

impl Sessions {
    /// Through this client.
    pub fn new(client: Client) -> Self {
        Self {
            client,
            resource: ApiResource::erase::<AgenticSession>(&()),
        }
    }

    /// All of them, in every namespace.
    pub fn everywhere(&self) -> Api<DynamicObject> {
        Api::all_with(self.client.clone(), &self.resource)
    }

    fn of(&self, namespace: &str) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), namespace, &self.resource)
    }

    /// The session, read live.
    pub async fn get(&self, target: &Target) -> Result<Option<DynamicObject>, Error> {
        let api = self.of(target.namespace());
        bounded("get", || target.to_string(), api.get_opt(target.name())).await
    }

    /// Names and UIDs, read live, of the sessions that an API of another system created.
    pub async fn names_of_api(&self, namespace: &str, api: &str) -> Result<Vec<(String, String)>, Error> {
        let wanted = ListParams::default().labels(&format!("{}={api}", label::API));
        let sessions = self.of(namespace);
        let all = bounded(
            "list",
            || format!("the agentic sessions of {namespace}"),
            sessions.list_metadata(&wanted),
        )
        .await?;
        Ok(all
            .into_iter()
            .map(|session| (session.name_any(), session.uid().unwrap_or_default()))
            .collect())
    }

    /// Creates a session.
    pub async fn create(&self, target: &Target, session: &DynamicObject) -> Result<DynamicObject, Error> {
        let api = self.of(target.namespace());
        bounded(
            "create",
            || target.to_string(),
            api.create(&PostParams::default(), session),
        )
        .await
    }

    /// Changes a session by a JSON merge patch.
    pub async fn patch(&self, target: &Target, change: Value) -> Result<DynamicObject, Error> {
        let api = self.of(target.namespace());
        bounded(
            "patch",
            || target.to_string(),
            api.patch(target.name(), &PatchParams::default(), &Patch::Merge(change)),
        )
        .await
    }

    /// Deletes a session and, by the cluster's garbage collection, what belongs to it. `false`: there is none.
    pub async fn delete(&self, target: &Target) -> Result<bool, Error> {
        let api = self.of(target.namespace());
        match bounded(
            "delete",
            || target.to_string(),
            api.delete(target.name(), &DeleteParams::background()),
        )
        .await
        {
            Ok(_) => Ok(true),
            Err(Error::Api {
                source: kube::Error::Api(status),
                ..
            }) if status.code == 404 => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl Sessions {
    /// Deletes a session if it still is as it was read. `false`: it is not.
    pub async fn delete_as_it_is(&self, target: &Target, read: &DynamicObject) -> Result<bool, Error> {
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: read.uid(),
                resource_version: read.resource_version(),
            }),
            ..DeleteParams::background()
        };
        let api = self.of(target.namespace());
        match bounded("delete", || target.to_string(), api.delete(target.name(), &params)).await {
            Ok(_) => Ok(true),
            Err(Error::Api {
                source: kube::Error::Api(status),
                ..
            }) if matches!(status.code, 404 | 409) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("team-a", "run.1", true)]
    #[case("team-a", "", false)]
    #[case("team-a", "..", false)]
    #[case("team/a", "run", false)]
    #[case("team-a", "run/status", false)]
    #[case("team.a", "run", false)]
    #[case("team-a", "run?x", false)]
    #[case("Team", "run", false)]
    #[case("team-a", "-run", false)]
    fn only_names_that_an_object_can_have_reach_the_api_server(
        #[case] namespace: &str,
        #[case] name: &str,
        #[case] accepted: bool,
    ) {
        assert_eq!(Target::new(namespace, name).is_some(), accepted);
    }
}
