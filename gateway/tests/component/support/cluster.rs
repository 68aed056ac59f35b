//! An API server that knows tokens, rights and sessions, as far as the gateway asks.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, Query, State},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use http::StatusCode;
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
        let router = router(&shared);
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
            .service(router(&self.shared));
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

fn router(shared: &Shared) -> Router {
    let sessions = "/apis/vteam.ambient-code/v1alpha1/namespaces/{namespace}/agenticsessions";
    Router::new()
        .route("/version", get(version))
        .route("/apis/authentication.k8s.io/v1/tokenreviews", post(review))
        .route("/apis/authorization.k8s.io/v1/subjectaccessreviews", post(access))
        .route("/apis/vteam.ambient-code/v1alpha1/agenticsessions", get(list_or_watch))
        .route(sessions, get(list).post(create))
        .route(&format!("{sessions}/{{name}}"), get(read).delete(delete).patch(patch))
        .with_state(shared.clone())
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

fn failure(code: u16, reason: &str, message: &str) -> Response {
    let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message});
    (StatusCode::from_u16(code).unwrap(), Json(status)).into_response()
}

async fn version(State(shared): State<Shared>) -> Response {
    if shared.state.lock().unwrap().down {
        return failure(500, "InternalError", "down");
    }
    let parts = [
        "major",
        "minor",
        "gitVersion",
        "gitCommit",
        "gitTreeState",
        "buildDate",
        "goVersion",
        "compiler",
        "platform",
    ];
    Json(
        parts
            .iter()
            .map(|part| ((*part).to_owned(), json!("1")))
            .collect::<serde_json::Map<_, _>>(),
    )
    .into_response()
}

async fn review(State(shared): State<Shared>, Json(mut review): Json<Value>) -> Response {
    let held = {
        let mut known = shared.state.lock().unwrap();
        if known.down {
            return failure(500, "InternalError", "down");
        }
        known.reviews += 1;
        let audience = review["spec"]["audiences"][0].as_str().unwrap_or(API_SERVER);
        let token = known.tokens.get(review["spec"]["token"].as_str().unwrap());
        let token = token.filter(|token| token.audience == audience);
        review["status"] = match token {
            Some(Token { user, audience, pod }) => {
                let mut user = json!({"username": user, "groups": ["system:authenticated"]});
                if let Some(pod) = pod {
                    user["extra"] = json!({"authentication.kubernetes.io/pod-uid": [pod]});
                }
                json!({"authenticated": true, "user": user, "audiences": [audience]})
            }
            None => json!({"authenticated": false, "error": "unknown"}),
        };
        token.is_none() && known.hold_unknown
    };
    if held {
        std::future::pending::<()>().await;
    }
    (StatusCode::CREATED, Json(review)).into_response()
}

async fn access(State(shared): State<Shared>, Json(mut review): Json<Value>) -> (StatusCode, Json<Value>) {
    let known = shared.state.lock().unwrap();
    let (spec, text) = (&review["spec"], |value: &Value| {
        value.as_str().unwrap_or_default().to_owned()
    });
    let attributes = &spec["resourceAttributes"];
    let right = (
        text(&spec["user"]),
        text(&attributes["verb"]),
        text(&attributes["namespace"]),
    );
    let ours = attributes["group"] == "vteam.ambient-code" && attributes["resource"] == "agenticsessions";
    review["status"] = json!({"allowed": ours && known.rights.contains(&right)});
    (StatusCode::CREATED, Json(review))
}

fn items(known: &Known, namespace: Option<&str>) -> Value {
    let chosen = known
        .sessions
        .iter()
        .filter(|((of, _), _)| namespace.is_none_or(|namespace| namespace == of));
    json!({
        "apiVersion": "vteam.ambient-code/v1alpha1", "kind": "AgenticSessionList",
        "metadata": {"resourceVersion": known.version.to_string()},
        "items": chosen.map(|(_, session)| session).collect::<Vec<_>>(),
    })
}

async fn list(State(shared): State<Shared>, Path(namespace): Path<String>) -> Json<Value> {
    Json(items(&shared.state.lock().unwrap(), Some(&namespace)))
}

async fn list_or_watch(State(shared): State<Shared>, Query(query): Query<BTreeMap<String, String>>) -> Response {
    if !query.contains_key("watch") {
        return Json(items(&shared.state.lock().unwrap(), None)).into_response();
    }
    let from: u64 = query["resourceVersion"].parse().unwrap();
    let events = shared.events.subscribe();
    let lines = futures::stream::unfold((shared, events, 0), move |(shared, mut events, mut sent)| async move {
        loop {
            let next = shared.state.lock().unwrap().history.get(sent).cloned();
            sent += usize::from(next.is_some());
            match next {
                Some((version, event)) if version > from => {
                    return Some((Ok::<_, std::io::Error>(format!("{event}\n")), (shared, events, sent)));
                }
                Some(_) => {}
                None => drop(events.wait_for(|count| *count > sent).await.ok()?),
            }
        }
    });
    Body::from_stream(lines).into_response()
}

async fn create(State(shared): State<Shared>, Path(namespace): Path<String>, Json(session): Json<Value>) -> Response {
    // Whoever asked may go away: an API server does what it has begun.
    let done = tokio::spawn(created(shared, namespace, session));
    done.await.unwrap()
}

async fn created(shared: Shared, namespace: String, mut session: Value) -> Response {
    let mut held = shared.creates.subscribe();
    if held.borrow().0.as_ref() == Some(&namespace) {
        shared.creates.send_modify(|(_, count)| *count += 1);
        held.wait_for(|(held, _)| held.as_ref() != Some(&namespace))
            .await
            .unwrap();
    }
    if let Some(status) = shared.state.lock().unwrap().refuse_create.clone() {
        let code = status["code"].as_u64().unwrap() as u16;
        return (StatusCode::from_u16(code).unwrap(), Json(status)).into_response();
    }
    let name = session["metadata"]["name"].as_str().unwrap().to_owned();
    if shared
        .state
        .lock()
        .unwrap()
        .sessions
        .contains_key(&(namespace.clone(), name.clone()))
    {
        return failure(409, "AlreadyExists", "there is one");
    }
    session["metadata"]["namespace"] = namespace.clone().into();
    session["metadata"]["uid"] = format!("uid-of-{name}").into();
    session["metadata"]["creationTimestamp"] = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string().into();
    session["status"] = json!({"phase": "Pending"});
    (StatusCode::CREATED, Json(put(&shared, &namespace, &name, session))).into_response()
}

async fn read(State(shared): State<Shared>, Path(key): Path<(String, String)>) -> Response {
    let (found, late) = {
        let mut known = shared.state.lock().unwrap();
        if known.down {
            return failure(500, "InternalError", "down");
        }
        known.reads += 1;
        let late = known.held_read == Some(known.reads - 1);
        (known.sessions.get(&key).cloned(), late)
    };
    if late {
        let mut held = shared.held.subscribe();
        shared.held.send_replace(true);
        held.wait_for(|held| !*held).await.unwrap();
    }
    match found {
        Some(session) => Json(session).into_response(),
        None => failure(404, "NotFound", "not found"),
    }
}

/// A JSON merge patch of spec and metadata.
async fn patch(
    State(shared): State<Shared>,
    Path((namespace, name)): Path<(String, String)>,
    Json(change): Json<Value>,
) -> Response {
    let found = shared
        .state
        .lock()
        .unwrap()
        .sessions
        .get(&(namespace.clone(), name.clone()))
        .cloned();
    let Some(mut session) = found else {
        return failure(404, "NotFound", "not found");
    };
    merge(&mut session, &change);
    Json(put(&shared, &namespace, &name, session)).into_response()
}

fn merge(object: &mut Value, change: &Value) {
    for (name, value) in change.as_object().unwrap() {
        if value.is_object() {
            merge(&mut object[name], value);
        } else if value.is_null() {
            object.as_object_mut().unwrap().remove(name);
        } else {
            if object.is_null() {
                *object = json!({});
            }
            object[name] = value.clone();
        }
    }
}

async fn delete(State(shared): State<Shared>, Path((namespace, name)): Path<(String, String)>) -> Response {
    let kept = {
        let known = shared.state.lock().unwrap();
        let session = known.sessions.get(&(namespace.clone(), name.clone())).cloned();
        session.filter(|_| known.finalized.contains(&name))
    };
    if let Some(session) = kept {
        return Json(session).into_response();
    }
    match remove(&shared, &namespace, &name) {
        Some(session) => Json(session).into_response(),
        None => failure(404, "NotFound", "not found"),
    }
}
