//! A namespace for one test, with Pod Security enforced and the keys that sessions need.

use std::env;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use crds::{AgenticSession, AgenticSessionSpec, AgenticSessionStatus, Phase};
use kube::api::PostParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config, ResourceExt as _};
use protocol::names;
use serde_json::{Value, json};
use tests::http::install_crypto;
use tests::model::{FAKE_KEY, script};
use tests::traces::{FAKE_PUBLIC_KEY, FAKE_SECRET_KEY};
use tokio::sync::{OnceCell, RwLock, Semaphore};
use uuid::Uuid;

use super::command::{apply, kubectl};
use super::explain::explain;
use super::install::installed;
use super::wait::{SOON, until};
use super::{COLLECTOR_URL, COMPAT, MODEL_URL, required};

/// Tests that kill what all others use are alone.
static ALONE: RwLock<()> = RwLock::const_new(());
/// Scenes at once: each has at least one CLI, which wants 200 MiB and half a core to start.
static PLACES: Semaphore = Semaphore::const_new(4);

/// Which key the sessions of a scene have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keys<'a> {
    /// One that the mock accepts.
    Good,
    /// This one.
    This(&'a str),
    /// No Secret at all.
    None,
}

/// A test's own namespace.
pub struct Scene {
    /// Its name.
    pub namespace: String,
    /// A client with an administrator's rights.
    pub client: Client,
}

/// Runs a test in a namespace of its own, beside others. When it fails, all that can be known is printed.
pub async fn scene(name: &str, keys: Keys<'_>, test: impl AsyncFnOnce(&Scene) -> Result<()>) -> Result<()> {
    installed().await?;
    let _shared = ALONE.read().await;
    let _place = PLACES.acquire().await.context("the semaphore was closed")?;
    play(name, keys, test).await
}

/// The one namespace of the task API and the claude-code API; it stays when a test is done.
static COMPAT_READY: OnceCell<()> = OnceCell::const_new();

/// Runs a test beside others in the namespace of the task API and the claude-code API.
pub async fn compat_scene(test: impl AsyncFnOnce() -> Result<()>) -> Result<()> {
    installed().await?;
    let _shared = ALONE.read().await;
    let _place = PLACES.acquire().await.context("the semaphore was closed")?;
    COMPAT_READY.get_or_try_init(compat_namespace).await?;
    let result = test().await;
    if let Err(error) = &result {
        eprintln!("=== a test failed in namespace {COMPAT}: {error:#}");
        explain(COMPAT).await;
        eprintln!("=== end of {COMPAT}");
    }
    result
}

async fn compat_namespace() -> Result<()> {
    if kubectl(&["get", "namespace", COMPAT]).await.is_ok() {
        return Ok(());
    }
    Scene::named(COMPAT.to_owned(), Keys::Good).await?;
    // Ten sessions at once fit on a small node.
    let settings = json!({
        "apiVersion": "vteam.ambient-code/v1alpha1", "kind": "ProjectSettings", "metadata": {"name": "projectsettings"},
        "spec": {"workspace": {"size": "64Mi"}, "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}}},
    });
    apply(COMPAT, &settings.to_string()).await?;
    Ok(())
}

/// The same for a test that disturbs the operator or the gateway, so that it must be alone.
pub async fn disturbing(name: &str, test: impl AsyncFnOnce(&Scene) -> Result<()>) -> Result<()> {
    installed().await?;
    let _alone = ALONE.write().await;
    play(name, Keys::Good, test).await
}

async fn play(name: &str, keys: Keys<'_>, test: impl AsyncFnOnce(&Scene) -> Result<()>) -> Result<()> {
    let scene = Scene::new(name, keys).await?;
    let result = test(&scene).await;
    if let Err(error) = &result {
        eprintln!("=== {name} failed in namespace {}: {error:#}", scene.namespace);
        explain(&scene.namespace).await;
        eprintln!("=== end of {name}");
    }
    if result.is_ok() || env::var_os("KEEP_NAMESPACES").is_none() {
        kubectl(&["delete", "namespace", &scene.namespace, "--wait=false"]).await?;
    }
    result
}

async fn client() -> Result<Client> {
    install_crypto();
    let file = Kubeconfig::read_from(required("KUBECONFIG")?)?;
    let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

impl Scene {
    async fn new(name: &str, keys: Keys<'_>) -> Result<Self> {
        let client = client().await?;
        let namespace = format!("e2e-{name}-{}", &Uuid::new_v4().simple().to_string()[..6]);
        Self::with(client, namespace, keys).await
    }

    async fn named(namespace: String, keys: Keys<'_>) -> Result<Self> {
        let client = client().await?;
        Self::with(client, namespace, keys).await
    }

    async fn with(client: Client, namespace: String, keys: Keys<'_>) -> Result<Self> {
        kubectl(&["create", "namespace", &namespace]).await?;
        kubectl(&[
            "label",
            "namespace",
            &namespace,
            "pod-security.kubernetes.io/enforce=restricted",
        ])
        .await?;
        let scene = Self { namespace, client };
        scene.langfuse().await?;
        match keys {
            Keys::Good => scene.key(FAKE_KEY).await?,
            Keys::This(key) => scene.key(key).await?,
            Keys::None => {}
        }
        Ok(scene)
    }

    async fn langfuse(&self) -> Result<()> {
        let host = format!("--from-literal=LANGFUSE_HOST={COLLECTOR_URL}");
        let enabled = "--from-literal=LANGFUSE_ENABLED=true";
        self.kubectl(&["create", "configmap", names::LANGFUSE_CONFIG, enabled, &host])
            .await?;
        let public = format!("--from-literal=LANGFUSE_PUBLIC_KEY={FAKE_PUBLIC_KEY}");
        let secret = format!("--from-literal=LANGFUSE_SECRET_KEY={FAKE_SECRET_KEY}");
        self.kubectl(&["create", "secret", "generic", names::LANGFUSE_KEYS, &public, &secret])
            .await?;
        Ok(())
    }

    async fn key(&self, key: &str) -> Result<()> {
        let key = format!("--from-literal=ANTHROPIC_API_KEY={key}");
        let url = format!("--from-literal=ANTHROPIC_BASE_URL={MODEL_URL}");
        self.kubectl(&["create", "secret", "generic", names::RUNNER_SECRETS[0], &key, &url])
            .await?;
        Ok(())
    }

    /// Runs kubectl in the namespace.
    pub async fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        kubectl(&[&["-n", &self.namespace], arguments].concat()).await
    }

    /// What the namespace's admin decides.
    pub async fn settings(&self, spec: &Value) -> Result<()> {
        let settings = json!({ "apiVersion": "vteam.ambient-code/v1alpha1", "kind": "ProjectSettings",
            "metadata": { "name": "projectsettings" }, "spec": spec });
        apply(&self.namespace, &settings.to_string()).await?;
        Ok(())
    }

    /// Asks for the session's next run.
    pub async fn start_again(&self, name: &str) -> Result<()> {
        let request = format!("{}={}", names::annotation::START_REQUESTED_AT, Uuid::new_v4());
        self.kubectl(&["annotate", "agenticsession", name, "--overwrite", &request])
            .await?;
        Ok(())
    }

    /// Waits until this run has this phase.
    pub async fn phase_of_run(&self, name: &str, run: u32, wanted: Phase) -> Result<AgenticSessionStatus> {
        until(&format!("run {run} of session {name}"), SOON, async || {
            Ok((self.status(name).await?.run == Some(run)).then_some(()))
        })
        .await?;
        self.phase(name, wanted).await
    }

    /// The namespace's sessions.
    pub fn sessions(&self) -> Api<AgenticSession> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Creates a session whose prompt says `marker` to a reader and `steps` to the mock.
    pub async fn create(&self, name: &str, marker: &str, steps: &Value) -> Result<AgenticSession> {
        self.create_with(
            name,
            AgenticSessionSpec {
                prompt: Some(script::prompt(marker, steps)),
                ..small()
            },
        )
        .await
    }

    /// Creates a session.
    pub async fn create_with(&self, name: &str, spec: AgenticSessionSpec) -> Result<AgenticSession> {
        let session = AgenticSession::new(name, spec);
        self.sessions()
            .create(&PostParams::default(), &session)
            .await
            .context("failed to create a session")
    }

    /// The session's status.
    pub async fn status(&self, name: &str) -> Result<AgenticSessionStatus> {
        Ok(self.sessions().get(name).await?.status.unwrap_or_default())
    }

    /// The session's UID.
    pub async fn uid(&self, name: &str) -> Result<String> {
        self.sessions().get(name).await?.uid().context("a session without UID")
    }

    /// Waits for a phase; an end other than this one is an error at once.
    pub async fn phase(&self, name: &str, wanted: Phase) -> Result<AgenticSessionStatus> {
        self.phase_within(name, wanted, SOON).await
    }

    /// The same with a deadline of one's own.
    pub async fn phase_within(&self, name: &str, wanted: Phase, deadline: Duration) -> Result<AgenticSessionStatus> {
        let status = until(&format!("session {name} to be {wanted}"), deadline, async || {
            let status = self.status(name).await?;
            let there = status.phase == wanted || (status.phase.is_terminal() && wanted.is_terminal());
            Ok(there.then_some(status))
        })
        .await?;
        if status.phase != wanted {
            bail!(
                "session {name} is {} and not {wanted}: {:?} {:?}",
                status.phase,
                status.reason,
                status.message
            );
        }
        Ok(status)
    }
}

/// The spec of a session with a small volume; the prompt is still to come.
pub fn small() -> AgenticSessionSpec {
    AgenticSessionSpec {
        timeout: Some(600),
        workspace: Some(crds::session::Workspace {
            size: Some(k8s_openapi::apimachinery::pkg::api::resource::Quantity(
                "256Mi".to_owned(),
            )),
            ..crds::session::Workspace::default()
        }),
        ..AgenticSessionSpec::default()
    }
}

/// A word that no other session says.
pub fn marker() -> String {
    format!("marker-{}", Uuid::new_v4().simple())
}
