//! `uninstall` against an API server that remembers what was asked of it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use http::{Method, Request, Response, StatusCode};
use kube::client::Body;
use serde_json::{Value, json};

use super::*;

/// An API server that knows a running session, one that has ended, and what was asked of it.
#[derive(Default)]
struct Cluster {
    asked: Vec<String>,
    /// How often all pods of all namespaces were asked for, in part and whole.
    all_pods: (usize, usize),
    patches: BTreeMap<String, Value>,
    lists_until_ended: usize,
}

impl Cluster {
    fn answer(&mut self, method: &Method, uri: &http::Uri, in_part: bool, body: &[u8]) -> (StatusCode, Value) {
        let (path, query) = (uri.path(), uri.query().unwrap_or_default());
        self.asked.push(format!("{method} {path}"));
        if method == Method::PATCH {
            self.patches
                .insert(path.to_owned(), serde_json::from_slice(body).unwrap());
            return (
                StatusCode::OK,
                if path.ends_with("/scale") {
                    json!({"metadata": {}})
                } else {
                    pod("any", "Failed")
                },
            );
        }
        match path {
            "/api/v1/namespaces/agents/pods" | "/apis/networking.k8s.io/v1/networkpolicies" => {
                (StatusCode::OK, list_of(&[]))
            }
            // Somebody else's Job of that label stands in no list of those that name a session.
            "/apis/batch/v1/jobs" if !query.contains("session-uid") => {
                (StatusCode::OK, list_of(&[job("payroll", &json!([]))]))
            }
            "/apis/batch/v1/jobs" => (
                StatusCode::OK,
                list_of(&[job("live-job", &json!([])), job("done-job", &complete())]),
            ),
            "/api/v1/pods" if !query.contains("session-uid") => {
                if in_part {
                    self.all_pods.0 += 1;
                } else {
                    self.all_pods.1 += 1;
                }
                let mut somebody_elses = pod("somebody-elses", "Running");
                somebody_elses["metadata"]["finalizers"] = json!(["other/finalizer"]);
                let freed = |pod: &Value| {
                    let path = format!(
                        "/api/v1/namespaces/team/pods/{}",
                        pod["metadata"]["name"].as_str().unwrap()
                    );
                    self.patches.contains_key(&path)
                };
                let mut all = vec![pod("live", "Failed"), pod("done", "Succeeded"), pod("stray", "Failed")];
                all.retain(|pod| !freed(pod));
                all.push(somebody_elses);
                (StatusCode::OK, list_of(&all))
            }
            "/api/v1/namespaces/team/pods" if query.contains("metadata.name%3Dstray") => {
                (StatusCode::OK, list_of(&[pod("stray", "Failed")]))
            }
            "/api/v1/pods" => {
                let phase = if self.lists_until_ended == 0 {
                    "Failed"
                } else {
                    "Running"
                };
                self.lists_until_ended = self.lists_until_ended.saturating_sub(1);
                (StatusCode::OK, list_of(&[pod("live", phase), pod("done", "Succeeded")]))
            }
            "/apis/batch/v1/namespaces/team/jobs/live-job" => (StatusCode::OK, job("live-job", &json!([]))),
            _ => {
                let status =
                    json!({"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404, "message": path});
                (StatusCode::NOT_FOUND, status)
            }
        }
    }
}

fn list_of(items: &[Value]) -> Value {
    json!({"metadata": {}, "items": items})
}

fn job(name: &str, conditions: &Value) -> Value {
    json!({"metadata": {"name": name, "namespace": "team", "uid": format!("uid-of-{name}")}, "status": {"conditions": conditions}})
}

fn complete() -> Value {
    json!([{"type": "Complete", "status": "True"}])
}

fn pod(name: &str, phase: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "team", "resourceVersion": "7", "finalizers": ["other/finalizer", REPORT_FINALIZER]},
        "spec": {"nodeName": "node-a", "containers": []},
        "status": {"phase": phase},
    })
}

fn client(cluster: &Arc<Mutex<Cluster>>) -> Client {
    let cluster = Arc::clone(cluster);
    let service = tower::service_fn(move |request: Request<Body>| {
        let cluster = Arc::clone(&cluster);
        async move {
            let (parts, body) = request.into_parts();
            let body = body.collect_bytes().await?;
            let accepts = parts.headers.get("accept").and_then(|accepts| accepts.to_str().ok());
            let in_part = accepts.is_some_and(|accepts| accepts.contains("as=PartialObjectMetadataList"));
            let (status, answer) = cluster
                .lock()
                .unwrap()
                .answer(&parts.method, &parts.uri, in_part, &body);
            let answer = Body::from(serde_json::to_vec(&answer).unwrap());
            Ok::<_, kube::Error>(Response::builder().status(status).body(answer).unwrap())
        }
    });
    Client::new(service, "agents")
}

fn args(timeout_seconds: u64) -> Args {
    Args {
        namespace: "agents".to_owned(),
        deployment: "agentic-operator".to_owned(),
        selector: "app.kubernetes.io/name=agentic-operator".to_owned(),
        watch_namespace: None,
        timeout_seconds,
    }
}

fn position(cluster: &Cluster, request: &str) -> usize {
    cluster
        .asked
        .iter()
        .position(|asked| asked == request)
        .unwrap_or_else(|| panic!("no {request} in {:?}", cluster.asked))
}

const FREE_LIVE: &str = "/api/v1/namespaces/team/pods/live";
const FREE_DONE: &str = "/api/v1/namespaces/team/pods/done";

#[tokio::test]
async fn the_operator_stops_before_jobs_go_and_a_pod_is_freed_only_when_it_has_ended() {
    let cluster = Arc::new(Mutex::new(Cluster {
        lists_until_ended: 2,
        ..Cluster::default()
    }));
    run(client(&cluster), args(60)).await.unwrap();
    let cluster = cluster.lock().unwrap();
    let scaled = position(
        &cluster,
        "PATCH /apis/apps/v1/namespaces/agents/deployments/agentic-operator/scale",
    );
    let deleted = position(&cluster, "DELETE /apis/batch/v1/namespaces/team/jobs/live-job");
    let freed = position(&cluster, &format!("PATCH {FREE_LIVE}"));
    assert!(scaled < deleted && deleted < freed);
    let looks = cluster.asked[..freed]
        .iter()
        .filter(|asked| *asked == "GET /api/v1/pods")
        .count();
    assert_eq!(looks, 3, "it ran in the first two looks");
    assert_eq!(
        cluster.patches[FREE_LIVE]["metadata"]["finalizers"],
        json!(["other/finalizer"])
    );
    assert_eq!(cluster.patches[FREE_LIVE]["metadata"]["resourceVersion"], "7");
    assert!(cluster.patches.contains_key(FREE_DONE));
}

#[tokio::test]
async fn a_pod_whose_label_was_taken_off_is_freed_and_all_pods_of_a_cluster_are_read_once_and_in_part() {
    let cluster = Arc::new(Mutex::new(Cluster {
        lists_until_ended: 2,
        ..Cluster::default()
    }));
    run(client(&cluster), args(60)).await.unwrap();
    let cluster = cluster.lock().unwrap();
    assert!(cluster.patches.contains_key("/api/v1/namespaces/team/pods/stray"));
    assert!(
        !cluster
            .patches
            .contains_key("/api/v1/namespaces/team/pods/somebody-elses")
    );
    assert_eq!(cluster.all_pods, (1, 0), "there may be a hundred thousand");
}

#[tokio::test]
async fn a_finished_job_and_its_log_stay() {
    let cluster = Arc::new(Mutex::new(Cluster::default()));
    run(client(&cluster), args(60)).await.unwrap();
    assert!(
        !cluster
            .lock()
            .unwrap()
            .asked
            .iter()
            .any(|asked| asked.contains("done-job"))
    );
}

#[tokio::test]
async fn a_pod_on_a_lost_node_is_freed_at_the_deadline() {
    let cluster = Arc::new(Mutex::new(Cluster {
        lists_until_ended: usize::MAX,
        ..Cluster::default()
    }));
    run(client(&cluster), args(0)).await.unwrap();
    assert!(cluster.lock().unwrap().patches.contains_key(FREE_LIVE));
}

#[test]
fn a_pod_that_was_deleted_before_a_node_took_it_is_over() {
    let waiting = json!({"metadata": {"name": "waiting"}, "spec": {"containers": []}, "status": {"phase": "Pending"}});
    let mut deleted = waiting.clone();
    deleted["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    assert!(!is_over(&serde_json::from_value(waiting).unwrap()));
    assert!(is_over(&serde_json::from_value(deleted).unwrap()));
}
