//! A namespace with an operator of its own, and what a test does there in the place of users and kubelets.

mod kubelet;

use std::{
    fmt::Debug,
    net::{SocketAddr, TcpListener},
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

use crds::{AgenticSession, AgenticSessionStatus, Phase};
use k8s_openapi::api::{
    batch::v1::Job,
    core::v1::{Namespace, Pod},
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{ListParams, Patch, PatchParams, PostParams},
};
use operator::{LeaseSettings, PodSettings, PullPolicy, RunAs, Settings, TimingSettings};
use protocol::{Outcome, Report, names::label, report::Delivery};
use serde_json::{Value, json};
use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

pub use kubelet::Kubelet;

use crate::plane::{admin, grant, operator_config};

/// Generous: all tests share a control plane and a few cores.
pub const PATIENCE: Duration = Duration::from_mins(3);
const POLL: Duration = Duration::from_millis(50);

/// A namespace.
pub struct World {
    pub client: Client,
    pub namespace: String,
    pub metrics: std::net::SocketAddr,
    /// How long things last; tests shorten them before they start an operator.
    pub timing: TimingSettings,
    /// What the pods of sessions may reach; no policy when absent.
    pub egress: Option<operator::Egress>,
    operator: Option<(JoinHandle<()>, CancellationToken)>,
}

impl World {
    /// A fresh namespace in which an operator works.
    pub async fn new(name: &str) -> Self {
        let mut world = Self::without_operator(name).await;
        world.start_operator().await;
        world
    }

    /// A fresh namespace.
    pub async fn without_operator(name: &str) -> Self {
        let client = admin().await;
        let namespace = Namespace {
            metadata: kube::core::ObjectMeta {
                name: Some(name.to_owned()),
                labels: Some([("pod-security.kubernetes.io/enforce".to_owned(), "restricted".to_owned())].into()),
                ..Default::default()
            },
            ..Namespace::default()
        };
        Api::all(client.clone())
            .create(&PostParams::default(), &namespace)
            .await
            .unwrap();
        let granted = name.to_owned();
        tokio::task::spawn_blocking(move || grant(&granted)).await.unwrap();
        // Pods need their namespace's account, which a controller makes.
        let accounts: Api<k8s_openapi::api::core::v1::ServiceAccount> = Api::namespaced(client.clone(), name);
        until("the default account", async || {
            accounts.get_opt("default").await.unwrap()
        })
        .await;
        Self {
            client,
            namespace: name.to_owned(),
            metrics: free_address(),
            timing: TimingSettings::default(),
            egress: None,
            operator: None,
        }
    }

    /// What the operator of this namespace is told.
    pub fn settings(&self) -> Settings {
        Settings {
            pod: PodSettings {
                runner_image: "registry.test/runner:7".into(),
                gateway_url: Some("ws://gateway.test:8080".into()),
                run_as_user: RunAs::User(10001),
                image_pull_policy: PullPolicy::IfNotPresent,
            },
            watch_namespace: Some(self.namespace.clone()),
            metrics_address: self.metrics,
            concurrency: 4,
            session_egress: self.egress.clone(),
            timing: self.timing,
            lease: LeaseSettings {
                name: "agentic-operator".into(),
                namespace: self.namespace.clone(),
                // One identity through all lives: the next need not wait for the lease of one that was killed.
                identity: "operator-of-the-test".into(),
            },
        }
    }

    pub async fn start_operator(&mut self) {
        let client = Client::try_from(operator_config(&self.namespace).await).unwrap();
        self.start_operator_with(client);
    }

    pub fn start_operator_with(&mut self, client: impl Into<operator::Counted> + Send + 'static) {
        // One that was killed may still have its own.
        if self.metrics.port() != 0 {
            self.metrics = free_address();
        }
        let stop = CancellationToken::new();
        let (settings, token) = (self.settings(), stop.clone());
        let task =
            tokio::spawn(async move { operator::run(client, settings, token).await.expect("the operator runs") });
        self.operator = Some((task, stop));
    }

    /// Whether the operator that was started has neither ended nor panicked.
    pub fn operator_is_up(&self) -> bool {
        self.operator.as_ref().is_some_and(|(task, _)| !task.is_finished())
    }

    /// Ends the operator as SIGKILL would: between two instructions.
    pub async fn kill_operator(&mut self) {
        let (task, _) = self.operator.take().unwrap();
        task.abort();
        let _ = task.await;
    }

    /// Ends the operator as SIGTERM would.
    pub async fn stop_operator(&mut self) {
        let (task, stop) = self.operator.take().unwrap();
        stop.cancel();
        task.await.unwrap();
    }

    pub fn sessions(&self) -> Api<AgenticSession> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub fn jobs(&self) -> Api<Job> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub async fn create(&self, name: &str, spec: Value) -> AgenticSession {
        self.sessions()
            .create(&PostParams::default(), &session(name, spec))
            .await
            .unwrap()
    }

    /// The admin's word for the namespace.
    pub async fn settle(&self, spec: Value) {
        let settings: Api<crds::ProjectSettings> = Api::namespaced(self.client.clone(), &self.namespace);
        let object = json!({
            "apiVersion": "vteam.ambient-code/v1alpha1", "kind": "ProjectSettings",
            "metadata": {"name": "projectsettings"}, "spec": spec,
        });
        let object = serde_json::from_value(object).unwrap();
        settings.create(&PostParams::default(), &object).await.unwrap();
    }

    /// What the admin of the namespace decides, in place of what was decided before.
    pub async fn settings_of_the_namespace(&self, mut spec: Value) {
        // An apply that takes the last field away would leave a null.
        spec.as_object_mut()
            .unwrap()
            .entry("startTimeout")
            .or_insert(json!(3_600));
        let settings: Api<crds::ProjectSettings> = Api::namespaced(self.client.clone(), &self.namespace);
        let name = crds::project_settings::NAME;
        let object = json!({"apiVersion": "vteam.ambient-code/v1alpha1", "kind": "ProjectSettings", "metadata": {"name": name}, "spec": spec});
        let apply = PatchParams::apply("admin").force();
        settings.patch(name, &apply, &Patch::Apply(object)).await.unwrap();
    }

    pub async fn status(&self, name: &str) -> AgenticSessionStatus {
        self.sessions().get(name).await.unwrap().status.unwrap_or_default()
    }

    pub async fn patch(&self, name: &str, patch: Value) {
        self.sessions()
            .patch(name, &PatchParams::default(), &Patch::Merge(patch))
            .await
            .unwrap();
    }

    /// Waits for a status.
    pub async fn status_when(&self, name: &str, is: impl Fn(&AgenticSessionStatus) -> bool) -> AgenticSessionStatus {
        let last = std::cell::RefCell::new(AgenticSessionStatus::default());
        let wait = until("a status", async || {
            let status = self.status(name).await;
            let found = is(&status);
            last.replace(status.clone());
            found.then_some(status)
        });
        tokio::select! {
            status = wait => status,
            () = tokio::time::sleep(PATIENCE / 10 * 9) => panic!("{}: status stays {:#?}", self.namespace, last.borrow()),
        }
    }

    pub async fn phase(&self, name: &str, phase: Phase) -> AgenticSessionStatus {
        self.status_when(name, |status| status.phase == phase).await
    }

    /// Waits for the pod of an attempt.
    pub async fn pod(&self, session: &str, attempt: u32) -> Pod {
        let of_attempt =
            ListParams::default().labels(&format!("{}={session},{}={attempt}", label::SESSION, label::ATTEMPT));
        let found = until("a pod", async || {
            self.pods().list(&of_attempt).await.unwrap().items.into_iter().next()
        });
        tokio::select! {
            pod = found => pod,
            () = tokio::time::sleep(PATIENCE / 10 * 9) => {
                let job = self.jobs().get_opt(&format!("{session}-job")).await;
                let status = self.status(session).await;
                panic!("{}/{session}: no pod of attempt {attempt}; its first Job {job:#?}; its status {status:#?}", self.namespace)
            }
        }
    }

    pub async fn pod_now(&self, pod: &Pod) -> Option<Pod> {
        self.pods()
            .get_opt(&pod.name_any())
            .await
            .unwrap()
            .filter(|now| now.uid() == pod.uid())
    }

    /// What a page of the operator's own server says.
    pub async fn page(&self, path: &str) -> Option<(u16, String)> {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut connection = tokio::net::TcpStream::connect(self.metrics).await.ok()?;
        connection
            .write_all(format!("GET {path} HTTP/1.1\r\nhost: o\r\nconnection: close\r\n\r\n").as_bytes())
            .await
            .ok()?;
        let mut answer = String::new();
        connection.read_to_string(&mut answer).await.ok()?;
        Some((answer.split(' ').nth(1)?.parse().ok()?, answer))
    }

    /// How often the operator has looked at a session with success.
    pub async fn looks(&self) -> u64 {
        let page = self.page("/metrics").await.map(|(_, text)| text).unwrap_or_default();
        let line = page
            .lines()
            .find(|line| line.starts_with(r#"agentic_operator_reconciles_total{result="ok"}"#));
        line.and_then(|line| line.split(' ').nth(1)?.parse().ok()).unwrap_or(0)
    }
}

impl Drop for World {
    /// A test that failed leaves no operator at work.
    fn drop(&mut self) {
        if let Some((task, _)) = &self.operator {
            task.abort();
        }
    }
}

/// Where an operator can serve. No other test is given the same, and the kernel gives none of these to connections: it has its own from
/// 32768 on.
fn free_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let number = std::process::id() + u32::from(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = 20_000 + (number % 10_000) as u16;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

/// A report of an attempt that did some work.
pub fn report(outcome: Outcome, attempt: u32) -> Report {
    Report {
        turns: 3,
        usage: protocol::Usage {
            input_tokens: 11,
            output_tokens: 22,
            cache_read_input_tokens: 33,
            cache_creation_input_tokens: 44,
        },
        cost_usd: Some(protocol::NanoUsd(12_345_000)),
        last_seq: 17,
        acked_seq: 17,
        events: Delivery::Delivered,
        sdk_session_id: Some("conversation-1".into()),
        trace_id: Some("trace-1".into()),
        result: "a haiku".into(),
        ..Report::new(outcome, attempt)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "reads better with json! in place")]
pub fn session(name: &str, spec: Value) -> AgenticSession {
    let object = json!({"apiVersion": "vteam.ambient-code/v1alpha1", "kind": "AgenticSession", "metadata": {"name": name}, "spec": spec});
    serde_json::from_value(object).unwrap()
}

/// Asks until there is an answer.
pub async fn until<T: Debug>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = ask().await {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(POLL).await;
    }
}
