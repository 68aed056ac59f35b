//! The API server refuses, is slow to say so, loses answers, or tells nothing: when that is over all sessions end as they would
//! have, nothing was made twice, and meanwhile the operator did not hammer.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use crds::Phase;
use futures::StreamExt as _;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, StreamBody};
use kube::{
    ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams},
    client::{Body, DynBody},
};
use protocol::Outcome;
use rstest::rstest;
use serde_json::json;
use tokio::sync::watch;

use crate::{
    plane::{jobs_created, operator_config},
    wire::{self, Fate, Wire, is_watch, is_write},
    world::{World, report, until},
};

/// What goes wrong for as long as it is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// Every write is answered by this status, and not carried out.
    Status(u16),
    /// Every read is answered by this status.
    Reads(u16),
    /// The connection is reset before a write is sent.
    Reset,
    /// The connection is reset when the write is carried out.
    ResetAfter,
    /// Watches are told that they are too late.
    Gone,
    /// Watches stay open and say nothing, until they end as the server ends them.
    Silent,
    /// Lists and watches for the whole cache are refused: what happens meanwhile is never seen.
    Blind,
}

/// One fault, on and off.
#[derive(Clone)]
struct Faulty {
    fault: Fault,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    broken: AtomicBool,
    met: AtomicUsize,
    /// Changes when the watches are cut that were asked for before.
    cut: watch::Sender<()>,
    /// First answers to lists for the caches, by address, as a stale server would give them again.
    lists: Mutex<HashMap<String, (http::HeaderMap, bytes::Bytes)>>,
    /// Remember the lists, or give the remembered ones, each once.
    stale: AtomicUsize,
}

const LIVE: usize = 0;
const RECORD: usize = 1;
const REPLAY: usize = 2;

impl Faulty {
    fn new(fault: Fault) -> Self {
        Self {
            fault,
            state: Arc::default(),
        }
    }

    fn break_it(&self) {
        self.state.broken.store(true, Ordering::SeqCst);
        self.state.cut.send_replace(());
    }

    fn repair(&self) {
        self.state.broken.store(false, Ordering::SeqCst);
        self.state.cut.send_replace(());
    }

    fn met(&self) -> usize {
        self.state.met.load(Ordering::SeqCst)
    }

    /// The body ends when watches are cut; what `silent` says is whether anything of it arrives.
    fn cut(mut cut: watch::Receiver<()>, silent: bool) -> Fate {
        Fate::Through(Box::new(move |answer| {
            let (head, body) = answer.into_parts();
            let frames = body.into_data_stream().map(|bytes| bytes.map(hyper_frame));
            let told = async move { cut.changed().await };
            let body: Box<DynBody> = if silent {
                let nothing = futures::stream::pending().take_until(Box::pin(told));
                Box::new(StreamBody::new(nothing))
            } else {
                Box::new(StreamBody::new(frames.take_until(Box::pin(told))))
            };
            Response::from_parts(head, body)
        }))
    }

    fn stale(&self, request: &Request<Body>) -> Option<Fate> {
        let uri = request.uri().to_string();
        // The caches' lists come in pages; reads of one session do not.
        if request.method() != http::Method::GET
            || is_watch(request)
            || !uri.contains("limit=")
            || uri.contains("events")
        {
            return None;
        }
        match self.state.stale.load(Ordering::SeqCst) {
            RECORD => {
                let state = self.state.clone();
                Some(Fate::Through(Box::new(move |answer| {
                    let (head, body) = answer.into_parts();
                    let headers = head.headers.clone();
                    let kept = futures::stream::once(async move {
                        let whole = body.collect().await?.to_bytes();
                        state
                            .lists
                            .lock()
                            .unwrap()
                            .entry(uri)
                            .or_insert((headers, whole.clone()));
                        Ok::<_, tower::BoxError>(hyper_frame(whole))
                    });
                    Response::from_parts(head, Box::new(StreamBody::new(Box::pin(kept))) as Box<DynBody>)
                })))
            }
            REPLAY => {
                let (headers, body) = self.state.lists.lock().unwrap().remove(&uri)?;
                self.state.met.fetch_add(1, Ordering::SeqCst);
                let mut answer = Response::new(whole(body));
                *answer.headers_mut() = headers;
                Some(Fate::Instead(answer))
            }
            _ => None,
        }
    }
}

fn hyper_frame(bytes: bytes::Bytes) -> http_body::Frame<bytes::Bytes> {
    http_body::Frame::data(bytes)
}

pub fn whole(bytes: impl Into<bytes::Bytes>) -> Box<DynBody> {
    let frame = Ok::<_, tower::BoxError>(hyper_frame(bytes.into()));
    Box::new(StreamBody::new(futures::stream::iter([frame])))
}

/// A refusal as the API server words it.
pub fn refusal(code: u16) -> Response<Box<DynBody>> {
    let reason = match code {
        403 => "Forbidden",
        409 => "Conflict",
        410 => "Expired",
        422 => "Invalid",
        429 => "TooManyRequests",
        503 => "ServiceUnavailable",
        _ => "InternalError",
    };
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code, "reason": reason, "message": "the test says so"});
    let mut answer = Response::new(whole(serde_json::to_vec(&status).unwrap()));
    *answer.status_mut() = StatusCode::from_u16(code).unwrap();
    answer
        .headers_mut()
        .insert("content-type", "application/json".parse().unwrap());
    if code == 429 {
        answer.headers_mut().insert("retry-after", "1".parse().unwrap());
    }
    answer
}

impl Wire for Faulty {
    fn fate(&self, request: &Request<Body>) -> Fate {
        if let Some(fate) = self.stale(request) {
            return fate;
        }
        // From before it is decided, so that a watch whose answer is still on its way is cut, too.
        let cut = self.state.cut.subscribe();
        // Without its lease an operator ends, which is another story.
        let lease = request.uri().path().contains("/leases");
        let broken = self.state.broken.load(Ordering::SeqCst) && !lease;
        let (watch, write) = (is_watch(request), is_write(request));
        let for_cache = watch || request.uri().query().is_some_and(|query| query.contains("limit="));
        let met = match self.fault {
            Fault::Status(_) | Fault::Reset | Fault::ResetAfter => broken && write,
            Fault::Reads(_) => broken && !write,
            Fault::Gone | Fault::Silent => broken && watch,
            Fault::Blind => broken && for_cache,
        };
        if !met {
            return if watch { Self::cut(cut, false) } else { Fate::Pass };
        }
        self.state.met.fetch_add(1, Ordering::SeqCst);
        match self.fault {
            Fault::Status(code) | Fault::Reads(code) => Fate::Instead(refusal(code)),
            Fault::Reset => Fate::Reset { sent: false },
            Fault::ResetAfter => Fate::Reset { sent: true },
            Fault::Gone => Fate::Instead(refusal(410)),
            Fault::Silent => Self::cut(cut, true),
            Fault::Blind => Fate::Instead(refusal(503)),
        }
    }
}

/// How long it is broken: so long that one who does not wait longer and longer is told from one who does.
const BROKEN_FOR: Duration = Duration::from_secs(15);
/// Requests of one session in that time: a few at once, then at waits that double.
const AT_MOST: usize = 60;
/// The same when the lists of all caches are refused: of each, some at once.
const AT_MOST_FOR_CACHES: usize = 200;

async fn operator_on(world: &mut World, wire: &Faulty) {
    let client = wire::client(operator_config(&world.namespace).await, wire.clone());
    world.start_operator_with(client);
}

/// From its first pod to the end.
async fn completes(world: &World) {
    let pod = world.pod("poem", 1).await;
    world.status_when("poem", |s| s.pod_uid == pod.uid()).await;
    world.start(&pod).await;
    world.phase("poem", Phase::Running).await;
    world.end(&pod, 3, Some(&report(Outcome::Succeeded, 1))).await;
    world.phase("poem", Phase::Completed).await;
    until("the report to be let go", async || {
        world
            .pod_now(&pod)
            .await
            .is_none_or(|pod| pod.finalizers().is_empty())
            .then_some(())
    })
    .await;
    assert_eq!(jobs_created(&world.namespace), ["poem-job"]);
}

#[rstest]
#[case::conflicts("faults-409", Fault::Status(409))]
#[case::too_many_requests("faults-429", Fault::Status(429))]
#[case::internal_errors("faults-500", Fault::Status(500))]
#[case::unavailable("faults-503", Fault::Status(503))]
#[case::no_reads("faults-reads", Fault::Reads(500))]
#[case::resets("faults-reset", Fault::Reset)]
#[case::resets_of_what_is_done("faults-reset-after", Fault::ResetAfter)]
#[case::expired_watches("faults-410", Fault::Gone)]
#[case::silent_watches("faults-silent", Fault::Silent)]
#[case::no_lists_and_no_watches("faults-blind", Fault::Blind)]
#[tokio::test(flavor = "multi_thread")]
async fn a_fault_of_the_api_server_is_outlived_without_hammering_or_doubling(
    #[case] namespace: &str,
    #[case] fault: Fault,
) {
    let mut world = World::without_operator(namespace).await;
    let wire = Faulty::new(fault);
    operator_on(&mut world, &wire).await;
    // The caches are filled and the lease is held before it breaks.
    world.create("probe", json!({"prompt": "p", "suspend": true})).await;
    world.status_when("probe", |s| s.reason.is_some()).await;
    wire.break_it();
    world.create("poem", json!({"prompt": "write a poem"})).await;
    // Not a wait for something: the time in which requests are counted.
    tokio::time::sleep(BROKEN_FOR).await;
    let met = wire.met();
    println!("{fault:?}: met {met} times in {BROKEN_FOR:?}");
    // A session that is not heard of is not written; a watch that is silent is met when it begins.
    assert!(met > 0 || fault == Fault::Silent, "the fault was not met");
    let at_most = if fault == Fault::Blind {
        AT_MOST_FOR_CACHES
    } else {
        AT_MOST
    };
    assert!(met <= at_most, "met {met} times in {BROKEN_FOR:?}");
    wire.repair();
    completes(&world).await;
    assert!(world.operator_is_up());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_made_and_deleted_while_nothing_is_seen_is_made_again() {
    let mut world = World::without_operator("faults-unseen").await;
    world.timing.retry_first_wait = 1;
    let wire = Faulty::new(Fault::Blind);
    operator_on(&mut world, &wire).await;
    world.create("poem", json!({"prompt": "write a poem"})).await;
    let first = world.pod("poem", 1).await;
    world.status_when("poem", |s| s.pod_uid == first.uid()).await;
    wire.break_it();
    // Somebody takes the pod away, finalizers and all, and then the Job: neither is seen to go.
    let free = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    world
        .pods()
        .patch(&first.name_any(), &PatchParams::default(), &free)
        .await
        .unwrap();
    let now = DeleteParams::default().grace_period(0);
    let _ = world.pods().delete(&first.name_any(), &now).await;
    world
        .jobs()
        .delete("poem-job", &DeleteParams::background())
        .await
        .unwrap();
    until("the Job to go", async || {
        world.jobs().get_opt("poem-job").await.unwrap().is_none().then_some(())
    })
    .await;
    wire.repair();
    let second = world.pod("poem", 2).await;
    world.status_when("poem", |s| s.pod_uid == second.uid()).await;
    world.start(&second).await;
    world.end(&second, 3, Some(&report(Outcome::Succeeded, 2))).await;
    world.phase("poem", Phase::Completed).await;
    assert_eq!(jobs_created(&world.namespace), ["poem-job", "poem-job-2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_list_after_a_restart_makes_nothing_twice_and_deletes_nothing() {
    let mut world = World::without_operator("faults-stale").await;
    let wire = Faulty::new(Fault::Gone);
    wire.state.stale.store(RECORD, Ordering::SeqCst);
    // What is listed now has no Job and no pod.
    world
        .create("poem", json!({"prompt": "write a poem", "suspend": true}))
        .await;
    operator_on(&mut world, &wire).await;
    world
        .status_when("poem", |s| s.reason.as_deref() == Some("Suspended"))
        .await;
    wire.state.stale.store(LIVE, Ordering::SeqCst);
    world.patch("poem", json!({"spec": {"suspend": false}})).await;
    let pod = world.pod("poem", 1).await;
    world.start(&pod).await;
    world.phase("poem", Phase::Running).await;
    world.kill_operator().await;
    wire.state.stale.store(REPLAY, Ordering::SeqCst);
    operator_on(&mut world, &wire).await;
    until("old lists to be given", async || (wire.met() > 1).then_some(())).await;
    world.end(&pod, 3, Some(&report(Outcome::Succeeded, 1))).await;
    let done = world.phase("poem", Phase::Completed).await;
    assert_eq!((done.attempt, done.run), (Some(1), Some(1)));
    assert_eq!(jobs_created(&world.namespace), ["poem-job"]);
}
