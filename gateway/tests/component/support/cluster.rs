//! An API server that knows tokens, rights and sessions, as far as the gateway asks.

mod api;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
};

use axum::body::Body;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch};

#[derive(Clone)]
pub struct Cluster {
    pub address: SocketAddr,
    shared: Shared,
}

type Shared = Arc<Inner>;

struct Inner {
    state: Mutex<Known>,
    /// Number of events so far.
    events: watch::Sender<usize>,
    /// Whether a read is being held.
    held: watch::Sender<bool>,
    /// Namespace whose creates are held, and how many are.
    creates: watch::Sender<(Option<String>, usize)>,
}

#[derive(Default)]
struct Known {
    version: u64,
    sessions: BTreeMap<(String, String), Value>,
    history: Vec<(u64, Value)>,
    tokens: BTreeMap<String, Token>,
    rights: BTreeSet<(String, String, String)>,
    reviews: usize,
    hold_unknown: bool,
    finalized: BTreeSet<String>,
    refuse_create: Option<Value>,
    reads: usize,
    held_read: Option<usize>,
    down: bool,
}

#[derive(Clone)]
struct Token {
    user: String,
    audience: &'static str,
    pod: Option<String>,
}

const API_SERVER: &str = "https://kubernetes.default.svc";

impl Cluster {
    pub async fn start() -> Self {
        let shared = Arc::new(Inner {
            state: Mutex::default(),
            events: watch::channel(0).0,
            held: watch::channel(false).0,
            creates: watch::channel((None, 0)).0,
        });
        let router = api::router(&shared);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { address, shared }
    }

    pub fn client(&self) -> kube::Client {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let config = kube::Config::new(format!("http://{}", self.address).parse().unwrap());
        kube::Client::try_from(config).unwrap()
    }

    /// A client without sockets, for tests that turn the clock.
    pub fn client_without_sockets(&self) -> kube::Client {
        let service = tower::ServiceBuilder::new()
            .map_request(|request: http::Request<kube::client::Body>| request.map(Body::new))
            .service(api::router(&self.shared));
        kube::Client::new(service, "default")
    }

    pub fn kubeconfig(&self) -> String {
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": format!("http://{}", self.address)}}],
            "users": [{"name": "test", "user": {}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        })
        .to_string()
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.shared.state.lock().unwrap()
    }

    /// A token for the API server.
    pub fn caller(&self, token: &str, user: &str) {
        let user = user.to_owned();
        let audience = API_SERVER;
        self.known().tokens.insert(
            token.to_owned(),
            Token {
                user,
                audience,
                pod: None,
            },
        );
    }

    pub fn revoke(&self, token: &str) {
        self.known().tokens.remove(token);
    }

    /// A projected token of a pod, for the gateway.
    pub fn runner(&self, token: &str, pod: Option<&str>) {
        let (user, pod) = (
            "system:serviceaccount:team-a:default".to_owned(),
            pod.map(str::to_owned),
        );
        let audience = protocol::names::GATEWAY_AUDIENCE;
        self.known()
            .tokens
            .insert(token.to_owned(), Token { user, audience, pod });
    }

    pub fn allow(&self, user: &str, verbs: &[&str], namespace: &str) {
        for verb in verbs {
            self.known()
                .rights
                .insert((user.to_owned(), (*verb).to_owned(), namespace.to_owned()));
        }
    }

    pub fn deny(&self, user: &str, verb: &str, namespace: &str) {
        self.known()
            .rights
            .remove(&(user.to_owned(), verb.to_owned(), namespace.to_owned()));
    }

    pub fn reviews(&self) -> usize {
        self.known().reviews
    }

    /// Sessions of this name stay when they are deleted, as long as nobody takes their finalizer.
    pub fn finalize(&self, name: &str) {
        self.known().finalized.insert(name.to_owned());
    }

    /// Tokens that nobody knows are not answered.
    pub fn hold_unknown(&self) {
        self.known().hold_unknown = true;
    }

    pub fn refuse_create(&self, status: Value) {
        self.known().refuse_create = Some(status);
    }

    /// The answer to the next read but `others`, as true as it then is, will arrive late.
    pub fn hold_read(&self, others: usize) {
        let mut known = self.known();
        known.held_read = Some(known.reads + others);
    }

    /// When that read waits.
    pub async fn read_is_held(&self) {
        self.shared.held.subscribe().wait_for(|held| *held).await.unwrap();
    }

    pub fn release_read(&self) {
        self.shared.held.send_replace(false);
    }

    /// Holds what is created in a namespace from now on, as a slow webhook does: also of those who go away.
    pub fn hold_creates(&self, namespace: &str) {
        self.shared
            .creates
            .send_modify(|held| held.0 = Some(namespace.to_owned()));
    }

    /// Waits until so many are held.
    pub async fn creates_are_held(&self, count: usize) {
        let mut held = self.shared.creates.subscribe();
        held.wait_for(|(_, held)| *held >= count).await.unwrap();
    }

    pub fn release_creates(&self) {
        self.shared.creates.send_modify(|held| held.0 = None);
    }

    /// Changes of sessions so far.
    pub fn changes(&self) -> u64 {
        self.known().version
    }

    pub fn break_down(&self) {
        self.known().down = true;
    }

    /// Makes or changes a session.
    pub fn set(&self, namespace: &str, name: &str, uid: &str, status: &Value) {
        let session = json!({
            "apiVersion": "vteam.ambient-code/v1alpha1", "kind": "AgenticSession",
            "metadata": {"namespace": namespace, "name": name, "uid": uid, "managedFields": [{"manager": "test"}]},
            "spec": {"prompt": "p", "aFieldOfTomorrow": 1}, "status": status,
        });
        put(&self.shared, namespace, name, session);
    }

    /// A session that takes messages.
    pub fn interactive(&self, name: &str, uid: &str, status: &Value) {
        let session = json!({
            "apiVersion": "vteam.ambient-code/v1alpha1", "kind": "AgenticSession",
            "metadata": {"namespace": "team-a", "name": name, "uid": uid},
            "spec": {"prompt": "p", "interactive": true}, "status": status,
        });
        put(&self.shared, "team-a", name, session);
    }

    /// Changes the status of a session that there is.
    pub fn set_status(&self, namespace: &str, name: &str, status: &Value) {
        let key = (namespace.to_owned(), name.to_owned());
        let mut session = self.known().sessions[&key].clone();
        session["status"] = status.clone();
        put(&self.shared, namespace, name, session);
    }

    /// Changes the labels of a session that there is.
    pub fn set_labels(&self, namespace: &str, name: &str, labels: &Value) {
        let key = (namespace.to_owned(), name.to_owned());
        let mut session = self.known().sessions[&key].clone();
        session["metadata"]["labels"] = labels.clone();
        put(&self.shared, namespace, name, session);
    }

    /// The sessions of a namespace, by name.
    pub fn sessions(&self, namespace: &str) -> BTreeMap<String, Value> {
        let known = self.known();
        let of = known.sessions.iter().filter(|((of, _), _)| of == namespace);
        of.map(|((_, name), session)| (name.clone(), session.clone())).collect()
    }

    /// A running session whose writer is `pod`.
    pub fn running(&self, name: &str, uid: &str, pod: &str) {
        self.set(
            "team-a",
            name,
            uid,
            &json!({"phase": "Running", "podUID": pod, "attempt": 1}),
        );
    }

    pub fn delete(&self, namespace: &str, name: &str) {
        assert!(remove(&self.shared, namespace, name).is_some());
    }
}

fn put(shared: &Shared, namespace: &str, name: &str, mut session: Value) -> Value {
    let mut known = shared.state.lock().unwrap();
    known.version += 1;
    session["metadata"]["resourceVersion"] = known.version.to_string().into();
    let old = known
        .sessions
        .insert((namespace.to_owned(), name.to_owned()), session.clone());
    let kind = if old.is_some() { "MODIFIED" } else { "ADDED" };
    let version = known.version;
    known.history.push((version, json!({"type": kind, "object": session})));
    let events = known.history.len();
    drop(known);
    shared.events.send_replace(events);
    session
}

fn remove(shared: &Shared, namespace: &str, name: &str) -> Option<Value> {
    let mut known = shared.state.lock().unwrap();
    let mut session = known.sessions.remove(&(namespace.to_owned(), name.to_owned()))?;
    known.version += 1;
    session["metadata"]["resourceVersion"] = known.version.to_string().into();
    let version = known.version;
    known
        .history
        .push((version, json!({"type": "DELETED", "object": session})));
    let events = known.history.len();
    drop(known);
    shared.events.send_replace(events);
    Some(session)
}
