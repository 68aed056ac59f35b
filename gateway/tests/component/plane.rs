//! The gateway on a real API server, under the rules that are installed.

use std::{
    fs,
    io::Write as _,
    process::Stdio,
    sync::{Arc, OnceLock},
};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use gateway::store::memory::MemoryLog;
use jiff::Timestamp;
use k8s_openapi::api::{
    authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
    core::v1::{Pod, ServiceAccount},
};
use kube::{
    Api, Client, Config,
    api::{DeleteParams, Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use protocol::{frame::close, names::GATEWAY_AUDIENCE};
use serde_json::{Value, json};
use xtask::cluster::ControlPlane;

use crate::support::{
    DEADLINE, Served, records,
    runner::{Runner, hello},
    soon,
    sse::http,
};

/// The gateway's rules, as they are installed.
const INSTALLED: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests/base/gateway.yaml"));
const GATEWAY: &str = "system:serviceaccount:agentic-system:agentic-gateway";

static PLANE: OnceLock<ControlPlane> = OnceLock::new();

/// Started by whoever comes first.
fn plane() -> &'static ControlPlane {
    PLANE.get_or_init(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let plane = ControlPlane::start().expect("the control plane starts");
        apply(&plane, &crds::crd_yaml().unwrap());
        let established = [
            "wait",
            "--for=condition=Established",
            "crd/agenticsessions.vteam.ambient-code",
            "--timeout=30s",
        ];
        // kubectl fails at once on a definition that has no conditions yet.
        let deadline = std::time::Instant::now() + DEADLINE;
        while let Err(said) = try_kubectl(&plane, &established, "") {
            assert!(std::time::Instant::now() < deadline, "{said}");
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        for rule in INSTALLED
            .split("\n---")
            .filter(|document| document.contains("\nkind: ClusterRole"))
        {
            apply(&plane, rule);
        }
        plane
    })
}

fn apply(plane: &ControlPlane, manifest: &str) {
    kubectl(plane, &["apply", "--server-side", "-f", "-"], manifest);
}

fn kubectl(plane: &ControlPlane, arguments: &[&str], input: &str) -> String {
    try_kubectl(plane, arguments, input).unwrap_or_else(|said| panic!("kubectl {arguments:?}: {said}\n{input}"))
}

/// What it says on stdout, or on stderr if it fails.
fn try_kubectl(plane: &ControlPlane, arguments: &[&str], input: &str) -> Result<String, String> {
    let mut kubectl = plane.kubectl().unwrap();
    let kubectl = kubectl
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = kubectl.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(output.stderr)
    };
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    said.map(text).map_err(text)
}

async fn client(user: Option<&str>) -> Client {
    let plane = tokio::task::spawn_blocking(plane).await.unwrap();
    let kubeconfig = Kubeconfig::read_from(plane.kubeconfig()).unwrap();
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .unwrap();
    config.auth_info.impersonate = user.map(str::to_owned);
    config.auth_info.impersonate_groups = user.map(|_| vec!["system:authenticated".to_owned()]);
    Client::try_from(config).unwrap()
}

/// A gateway with the rights of the installed one; `cluster` is an administrator.
async fn served() -> Served<Client> {
    let (gateway, admin) = (client(Some(GATEWAY)).await, client(None).await);
    Served::on(gateway, admin, Arc::new(MemoryLog::default())).await
}

/// A namespace with a service account `client` that may work with sessions there.
fn namespace(name: &str) -> String {
    let manifest = format!(
        "{{apiVersion: v1, kind: Namespace, metadata: {{name: {name}}}}}\n---\n\
         {{apiVersion: v1, kind: ServiceAccount, metadata: {{name: client, namespace: {name}}}}}\n---\n\
         {{apiVersion: v1, kind: ServiceAccount, metadata: {{name: agent, namespace: {name}}}}}\n---\n\
         {{apiVersion: rbac.authorization.k8s.io/v1, kind: Role, metadata: {{name: sessions, namespace: {name}}}, rules: [\
         {{apiGroups: [vteam.ambient-code], resources: [agenticsessions], verbs: [get, list, create, update, delete]}}]}}\n---\n\
         {{apiVersion: rbac.authorization.k8s.io/v1, kind: RoleBinding, metadata: {{name: sessions, namespace: {name}}}, \
         roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: Role, name: sessions}}, \
         subjects: [{{kind: ServiceAccount, name: client, namespace: {name}}}]}}\n"
    );
    apply(plane(), &manifest);
    // The API server judges by what it has heard of roles and bindings, which is a moment later.
    let account = format!("system:serviceaccount:{name}:client");
    let may = [
        "auth",
        "can-i",
        "delete",
        "agenticsessions",
        "-n",
        name,
        "--as",
        &account,
    ];
    let deadline = std::time::Instant::now() + DEADLINE;
    while let Err(said) = try_kubectl(plane(), &may, "") {
        assert!(std::time::Instant::now() < deadline, "{said}");
    }
    kubectl(plane(), &["create", "token", "client", "-n", name], "")
        .trim()
        .to_owned()
}

async fn request(served: &Served<Client>, method: &str, path: &str, token: &str, body: Option<Value>) -> (u16, Value) {
    let mut request = http()
        .request(method.parse().unwrap(), served.url(path))
        .bearer_auth(token);
    if let Some(body) = body {
        request = request.json(&body);
    }
    let response = request.send().await.unwrap();
    let code = response.status().as_u16();
    (
        code,
        serde_json::from_str(&response.text().await.unwrap()).unwrap_or_default(),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_account_works_with_the_sessions_of_its_namespace_and_of_no_other() {
    let served = served().await;
    let token = namespace("rest-a");
    namespace("rest-b");
    let sessions = "/api/projects/rest-a/agentic-sessions";

    let (code, created) = request(
        &served,
        "POST",
        sessions,
        &token,
        Some(json!({"prompt": "p", "timeout": 300})),
    )
    .await;
    assert_eq!(code, 201, "{created}");
    let path = format!("{sessions}/{}", created["name"].as_str().unwrap());
    let (code, session) = request(&served, "GET", &path, &token, None).await;
    assert_eq!((code, &session["metadata"]["uid"]), (200, &created["uid"]));
    assert_eq!(
        session["spec"]["userContext"]["userId"],
        "system:serviceaccount:rest-a:client"
    );
    assert_eq!(session["status"], json!({"phase": "Pending"}));
    assert_eq!(
        request(&served, "GET", sessions, &token, None).await.1["items"]
            .as_array()
            .unwrap()
            .len(),
        1
    );

    let (code, error) = request(
        &served,
        "POST",
        "/api/projects/rest-b/agentic-sessions",
        &token,
        Some(json!({"prompt": "p"})),
    )
    .await;
    assert_eq!((code, &error["reason"]), (403, &json!("Forbidden")));
    let (code, _) = request(&served, "GET", "/api/projects/rest-b/agentic-sessions", &token, None).await;
    assert_eq!(code, 403);

    let (code, error) = request(
        &served,
        "POST",
        sessions,
        &token,
        Some(json!({"displayName": "no task"})),
    )
    .await;
    assert_eq!(code, 422);
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains("exactly one of spec.prompt"),
        "{error}"
    );
    let (code, error) = request(
        &served,
        "POST",
        sessions,
        &token,
        Some(json!({"prompt": "p", "timeout": 0})),
    )
    .await;
    assert_eq!(code, 422);
    assert!(
        error["message"].as_str().unwrap().contains("spec.timeout must be"),
        "{error}"
    );

    let (code, changed) = request(
        &served,
        "PUT",
        &path,
        &token,
        Some(json!({"timeout": 600, "prompt": "p"})),
    )
    .await;
    assert_eq!((code, &changed["spec"]["timeout"]), (200, &json!(600)), "{changed}");
    let (code, error) = request(&served, "PUT", &path, &token, Some(json!({"prompt": "other"}))).await;
    assert_eq!(code, 422);
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains("spec.prompt cannot be changed"),
        "{error}"
    );
    for (verb, suspend) in [("stop", true), ("start", false)] {
        let (code, session) = request(&served, "POST", &format!("{path}/{verb}"), &token, None).await;
        assert_eq!((code, &session["spec"]["suspend"]), (202, &json!(suspend)), "{session}");
    }
    let (code, clone) = request(&served, "POST", &format!("{path}/clone"), &token, None).await;
    assert_eq!((code, &clone["spec"]["timeout"]), (201, &json!(600)), "{clone}");

    assert_eq!(request(&served, "DELETE", &path, &token, None).await.0, 204);
    assert_eq!(request(&served, "GET", &path, &token, None).await.0, 404);
    assert_eq!(request(&served, "GET", sessions, "not.a.token", None).await.0, 401);
}

/// A pod that nobody runs, and its token for the gateway.
async fn pod(admin: &Client, namespace: &str, name: &str) -> (String, String) {
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {
        "serviceAccountName": "agent", "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "runner", "image": "none.example/none"}]}});
    let pods: Api<Pod> = Api::namespaced(admin.clone(), namespace);
    let pod = pods
        .create(&PostParams::default(), &serde_json::from_value(pod).unwrap())
        .await
        .unwrap();
    let uid = pod.metadata.uid.unwrap();
    let request = TokenRequest {
        spec: Some(TokenRequestSpec {
            audiences: Some(vec![GATEWAY_AUDIENCE.to_owned()]),
            bound_object_ref: Some(BoundObjectReference {
                kind: Some("Pod".to_owned()),
                api_version: Some("v1".to_owned()),
                name: Some(name.to_owned()),
                uid: Some(uid.clone()),
            }),
            ..TokenRequestSpec::default()
        }),
        ..TokenRequest::default()
    };
    let accounts: Api<ServiceAccount> = Api::namespaced(admin.clone(), namespace);
    let token = accounts
        .create_token_request("agent", &PostParams::default(), &request)
        .await
        .unwrap();
    (uid, token.status.unwrap().token.unwrap())
}

async fn name_pod(admin: &Client, namespace: &str, session: &str, pod: &str) {
    let sessions: Api<crds::AgenticSession> = Api::namespaced(admin.clone(), namespace);
    let status = json!({"status": {"phase": "Running", "podUID": pod, "attempt": 1}});
    sessions
        .patch_status(session, &PatchParams::default(), &Patch::Merge(status))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_is_known_by_the_pod_that_its_token_is_bound_to() {
    let served = served().await;
    let caller = namespace("team-a");
    let admin = served.cluster.clone();
    apply(
        plane(),
        "{apiVersion: vteam.ambient-code/v1alpha1, kind: AgenticSession, metadata: {name: s, namespace: team-a}, spec: {prompt: p}}",
    );
    let sessions: Api<crds::AgenticSession> = Api::namespaced(admin.clone(), "team-a");
    let uid = sessions.get("s").await.unwrap().metadata.uid.unwrap();
    let (first, first_token) = pod(&admin, "team-a", "first").await;
    let (second, second_token) = pod(&admin, "team-a", "second").await;

    let mut early = Runner::open(served.address, "s", Some(&first_token)).await;
    assert_eq!(early.closed().await, close::NOT_THIS_POD, "the status names no pod yet");
    name_pod(&admin, "team-a", "s", &first).await;
    let (mut runner, _) = Runner::admitted(served.address, &hello("s", &uid, &first), &first_token).await;
    assert_eq!(runner.deliver(&records(1, 3)).await, 3);

    let mut wrong = Runner::open(served.address, "s", Some(&second_token)).await;
    assert_eq!(wrong.closed().await, close::NOT_THIS_POD);
    let mut user = Runner::open(served.address, "s", Some(&caller)).await;
    assert_eq!(user.closed().await, close::FORBIDDEN, "the token is for the API server");
    let (code, _) = request(
        &served,
        "GET",
        "/api/projects/team-a/agentic-sessions",
        &first_token,
        None,
    )
    .await;
    assert_eq!(code, 401, "a runner's token opens nothing else");

    name_pod(&admin, "team-a", "s", &second).await;
    assert_eq!(runner.closed().await, close::SUPERSEDED);
    let (mut runner, welcome) = Runner::admitted(served.address, &hello("s", &uid, &second), &second_token).await;
    assert_eq!(welcome.acked_seq, 3);

    let pods: Api<Pod> = Api::namespaced(admin.clone(), "team-a");
    pods.delete("first", &DeleteParams::default().grace_period(0))
        .await
        .unwrap();
    let refused = async {
        loop {
            let mut gone = Runner::open(served.address, "s", Some(&first_token)).await;
            if gone.closed().await == close::FORBIDDEN {
                return;
            }
        }
    };
    Box::pin(soon("the token of a deleted pod being refused", refused)).await;

    sessions.delete("s", &DeleteParams::default()).await.unwrap();
    assert_eq!(runner.closed().await, close::GONE);
}

/// The token, made anew by the cluster's own key with another time to live: from `from` to `until` seconds from now.
fn lasting(token: &str, from: i64, until: i64) -> String {
    let mut parts = token.split('.');
    let (header, claims) = (parts.next().unwrap(), parts.next().unwrap());
    let mut claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).unwrap()).unwrap();
    let now = Timestamp::now().as_second();
    for (name, value) in [("iat", now + from), ("nbf", now + from), ("exp", now + until)] {
        claims[name] = value.into();
    }
    let header: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(header).unwrap()).unwrap();
    assert_eq!(header["alg"], "ES256");
    let encoded = [&header, &claims].map(|part| URL_SAFE_NO_PAD.encode(part.to_string()));
    let signed = encoded.join(".");
    let pem = fs::read_to_string(plane().service_account_key()).unwrap();
    let key: String = pem.lines().filter(|line| !line.starts_with("-----")).collect();
    let random = ring::rand::SystemRandom::new();
    let algorithm = &ring::signature::ECDSA_P256_SHA256_FIXED_SIGNING;
    let key = ring::signature::EcdsaKeyPair::from_pkcs8(algorithm, &STANDARD.decode(key).unwrap(), &random).unwrap();
    let signature = key.sign(&random, signed.as_bytes()).unwrap();
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_whose_time_is_up_opens_nothing() {
    const HOUR: i64 = 3600;
    let served = served().await;
    let caller = namespace("expiry");
    let admin = served.cluster.clone();
    apply(
        plane(),
        "{apiVersion: vteam.ambient-code/v1alpha1, kind: AgenticSession, metadata: {name: s, namespace: expiry}, spec: {prompt: p}}",
    );
    let (uid, runner) = pod(&admin, "expiry", "first").await;
    name_pod(&admin, "expiry", "s", &uid).await;
    let path = "/api/projects/expiry/agentic-sessions";
    let ask = async |token: &str| request(&served, "GET", path, token, None).await.0;
    let ended = async |token: &str| {
        let mut runner = Runner::open_in(served.address, "expiry", "s", Some(token)).await;
        // A hello for no session: who may speak is told that, who may not is told so before.
        runner.hello(&hello("s", "another", &uid)).await;
        runner.closed().await
    };
    // Ours are as good as the cluster's, so what follows is about time alone.
    assert_eq!(ask(&lasting(&caller, -HOUR, HOUR)).await, 200);
    assert_eq!(ended(&lasting(&runner, -HOUR, HOUR)).await, close::GONE);
    for (from, until) in [(-2 * HOUR, -HOUR), (HOUR, 2 * HOUR)] {
        assert_eq!(ask(&lasting(&caller, from, until)).await, 401, "{from} to {until}");
        assert_eq!(ended(&lasting(&runner, from, until)).await, close::FORBIDDEN);
    }
}
