//! Two candidates and an API server that keeps one Lease.

use std::sync::{Arc, Mutex};

use http::{Method, Request, Response};
use kube::client::Body;
use rstest::rstest;
use serde_json::{Value, json};

use super::*;

#[rstest]
#[case::never_held("", 0, None, Move::Take)]
#[case::ours("me", 99, Some(15), Move::Renew)]
#[case::renewed_lately("other", 15, Some(15), Move::Wait)]
#[case::silent("other", 16, Some(15), Move::Take)]
#[case::silent_for_longer_than_it_said("other", 3, Some(2), Move::Take)]
#[case::renewed_lately_without_saying_for_how_long("other", 15, None, Move::Wait)]
fn a_lease_is_taken_from_nobody_but_the_silent(
    #[case] holder: &str,
    #[case] silent: u64,
    #[case] lasts: Option<i32>,
    #[case] expected: Move,
) {
    let spec = LeaseSpec {
        holder_identity: Some(holder.to_owned()),
        lease_duration_seconds: lasts,
        ..LeaseSpec::default()
    };
    let lease = Lease {
        spec: Some(spec),
        ..Lease::default()
    };
    assert_eq!(evaluate(&lease, "me", Duration::from_secs(silent)), expected);
}

/// How the API server is.
#[derive(Clone, Copy, Default)]
enum Health {
    #[default]
    Well,
    Failing,
    Silent,
}

#[derive(Default)]
struct Server {
    health: Health,
    lease: Option<Value>,
    version: u64,
}

impl Server {
    fn answer(&mut self, method: &Method, body: &[u8]) -> (u16, Value) {
        let sent: Value = serde_json::from_slice(body).unwrap_or_default();
        let version = |lease: &Value| lease["metadata"]["resourceVersion"].clone();
        match (method, &self.lease) {
            (&Method::GET, Some(lease)) => return (200, lease.clone()),
            (&Method::POST, None) => {}
            (&Method::PUT, Some(lease)) if version(lease) == version(&sent) => {}
            (&Method::GET, None) => return (404, json!({"kind": "Status", "reason": "NotFound", "code": 404})),
            _ => return (409, json!({"kind": "Status", "reason": "Conflict", "code": 409})),
        }
        self.version += 1;
        let mut lease = sent;
        lease["metadata"]["resourceVersion"] = json!(self.version.to_string());
        (200, self.lease.insert(lease).clone())
    }
}

type Shared = Arc<Mutex<Server>>;

fn candidate(server: &Shared, identity: &str) -> Candidate {
    let server = Arc::clone(server);
    let service = tower::service_fn(move |request: Request<Body>| {
        let server = Arc::clone(&server);
        async move {
            let (parts, body) = request.into_parts();
            let body = body.collect_bytes().await?;
            let health = server.lock().unwrap().health;
            let (status, answer) = match health {
                Health::Well => server.lock().unwrap().answer(&parts.method, &body),
                Health::Failing => (500, json!({"kind": "Status", "reason": "InternalError", "code": 500})),
                Health::Silent => std::future::pending().await,
            };
            let answer = Body::from(serde_json::to_vec(&answer).unwrap());
            Ok::<_, kube::Error>(Response::builder().status(status).body(answer).unwrap())
        }
    });
    let settings = LeaseSettings {
        namespace: "agents".to_owned(),
        name: "agentic-operator".to_owned(),
        identity: identity.to_owned(),
    };
    Candidate::new(Client::new(service, "agents"), settings)
}

fn spec(server: &Shared) -> LeaseSpec {
    let lease = server.lock().unwrap().lease.clone();
    serde_json::from_value(lease.expect("somebody made it")["spec"].clone()).unwrap()
}

fn held_by(server: &Shared) -> (Option<String>, Option<i32>) {
    let spec = spec(server);
    (spec.holder_identity, spec.lease_transitions)
}

#[tokio::test(start_paused = true)]
async fn a_lease_is_one_candidates_until_it_is_silent_or_gives_it_back() {
    let server = Shared::default();
    let (mut one, mut other) = (candidate(&server, "one"), candidate(&server, "other"));
    let one_has = Some("one".to_owned());
    assert_eq!(one.attempt().await.unwrap(), None);
    let first = spec(&server);
    assert_eq!(
        (held_by(&server), first.lease_duration_seconds),
        ((one_has.clone(), Some(1)), Some(15))
    );
    assert_eq!(other.attempt().await.unwrap(), one_has);

    tokio::time::advance(DURATION).await;
    assert_eq!(one.attempt().await.unwrap(), None, "renewed");
    assert_eq!(
        (held_by(&server), spec(&server).acquire_time),
        ((one_has.clone(), Some(1)), first.acquire_time)
    );
    assert_eq!(other.attempt().await.unwrap(), one_has, "heard of a moment ago");
    tokio::time::advance(DURATION).await;
    assert_eq!(other.attempt().await.unwrap(), one_has, "not yet silent for longer");
    tokio::time::advance(Duration::from_millis(1)).await;
    assert_eq!(other.attempt().await.unwrap(), None);
    assert_eq!(held_by(&server), (Some("other".to_owned()), Some(2)));
    assert_eq!(one.attempt().await.unwrap(), Some("other".to_owned()));

    one.release().await;
    assert_eq!(
        held_by(&server),
        (Some("other".to_owned()), Some(2)),
        "another's is not given back"
    );
    other.release().await;
    assert_eq!(held_by(&server).0, Some(String::new()));
    assert_eq!(one.attempt().await.unwrap(), None, "at once");
    assert_eq!(held_by(&server), (one_has, Some(3)));
}

#[rstest]
#[case::that_fails(Health::Failing)]
#[case::that_is_silent(Health::Silent)]
#[tokio::test(start_paused = true)]
async fn a_holder_whose_api_server_is_away_stops_before_others_start_and_not_at_once(#[case] health: Health) {
    let server = Shared::default();
    let (mut one, stop) = (candidate(&server, "one"), CancellationToken::new());
    assert!(one.acquire(&stop).await);
    server.lock().unwrap().health = health;
    let since = Instant::now();
    assert!(matches!(one.keep(&stop).await, Err(Error::Late)));
    assert!(
        (RENEW_DEADLINE..DURATION).contains(&since.elapsed()),
        "{:?}",
        since.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_holder_goes_on_after_an_outage_that_ends_and_stops_when_another_holds_it() {
    let server = Shared::default();
    let (mut one, stop) = (candidate(&server, "one"), CancellationToken::new());
    assert!(one.acquire(&stop).await);
    let outages = async {
        for health in [Health::Failing, Health::Well].repeat(3) {
            server.lock().unwrap().health = health;
            tokio::time::sleep(RETRY * 3).await;
        }
        let mut lease = server.lock().unwrap().lease.clone().unwrap();
        lease["spec"]["holderIdentity"] = json!("other");
        server.lock().unwrap().lease = Some(lease);
    };
    let (kept, ()) = tokio::join!(one.keep(&stop), outages);
    assert!(matches!(kept, Err(Error::Taken(by)) if by == "other"));
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_a_lease_stops_when_told_and_who_keeps_one_too() {
    let server = Shared::default();
    let (mut one, mut other, stop) = (
        candidate(&server, "one"),
        candidate(&server, "other"),
        CancellationToken::new(),
    );
    assert!(one.acquire(&stop).await);
    let stopped = async {
        tokio::time::sleep(DURATION * 4).await;
        stop.cancel();
    };
    let (kept, led, ()) = tokio::join!(one.keep(&stop), other.acquire(&stop), stopped);
    assert!(kept.is_ok() && !led, "who renews is not silent");
    assert_eq!(held_by(&server).0, Some("one".to_owned()));
}
