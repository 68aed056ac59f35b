//! Each verb of the operator on its own, refused in each way that an API server has, under an operator at work and under one that has
//! just begun: when that is over every session ends as it would have, and each object was made once.
//!
//! All are `API_FAULTS=all cargo test -p operator --test component verbs:: -- --nocapture`; otherwise those that differ most.

use std::{
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Instant,
};

use crds::Phase;
use futures::{FutureExt as _, StreamExt as _, stream};
use http::{Method, Request};
use kube::{
    api::{DeleteParams, ListParams},
    client::Body,
};
use protocol::Outcome;
use serde_json::json;

use crate::{
    faults::refusal,
    plane::{operator_config, writes},
    wire::{self, Fate, Wire, is_watch},
    world::{World, report, until},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Get,
    List,
    Watch,
    Create,
    Patch,
    Delete,
}

const VERBS: [Verb; 6] = [
    Verb::Get,
    Verb::List,
    Verb::Watch,
    Verb::Create,
    Verb::Patch,
    Verb::Delete,
];

impl Verb {
    /// Of what lies in a namespace. Without its lease an operator ends, which is another story.
    fn of(request: &Request<Body>) -> Option<Self> {
        let path = request.uri().path();
        let below = path.split_once("/namespaces/")?.1;
        // Behind the namespace and the kind.
        let named = below.split('/').nth(2).is_some();
        match *request.method() {
            _ if path.contains("/leases") => None,
            Method::GET if is_watch(request) => Some(Self::Watch),
            Method::GET if named => Some(Self::Get),
            Method::GET => Some(Self::List),
            Method::POST => Some(Self::Create),
            Method::PATCH | Method::PUT => Some(Self::Patch),
            Method::DELETE => Some(Self::Delete),
            _ => None,
        }
    }
}

/// How it is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Status(u16),
    Reset,
}

const FAULTS: [Fault; 6] = [
    Fault::Status(403),
    Fault::Status(409),
    Fault::Status(422),
    Fault::Status(429),
    Fault::Status(500),
    Fault::Reset,
];

/// What is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Trial {
    verb: Verb,
    fault: Fault,
    /// The operator begins anew while it is broken.
    begins: bool,
}

/// One verb, refused for as long as it is broken.
#[derive(Clone)]
struct Refusing {
    trial: Trial,
    broken: Arc<AtomicBool>,
    met: Arc<AtomicUsize>,
}

impl Wire for Refusing {
    fn fate(&self, request: &Request<Body>) -> Fate {
        if !self.broken.load(Ordering::SeqCst) || Verb::of(request) != Some(self.trial.verb) {
            return Fate::Pass;
        }
        self.met.fetch_add(1, Ordering::SeqCst);
        match self.trial.fault {
            Fault::Status(code) => Fate::Instead(refusal(code)),
            Fault::Reset => Fate::Reset { sent: false },
        }
    }
}

/// Refusals that are waited for before it is repaired: by then it was tried again.
const MET: usize = 3;

async fn start(world: &mut World, wire: &Refusing) {
    let client = wire::client(operator_config(&world.namespace).await, wire.clone());
    world.start_operator_with(client);
}

/// A session is stopped and goes on, another begins, and a third is deleted, while the verb is refused.
async fn outlived(trial: Trial, namespace: &str) -> String {
    let mut world = World::without_operator(namespace).await;
    world.timing.retry_first_wait = 1;
    world.timing.orphan_grace = 1;
    let wire = Refusing {
        trial,
        broken: Arc::default(),
        met: Arc::default(),
    };
    let _kubelet = world.kubelet();
    start(&mut world, &wire).await;
    for name in ["stops", "goes"] {
        world.create(name, json!({"prompt": "p"})).await;
        world.start(&world.pod(name, 1).await).await;
        world.phase(name, Phase::Running).await;
    }
    wire.broken.store(true, Ordering::SeqCst);
    let since = Instant::now();
    if trial.begins {
        world.kill_operator().await;
        start(&mut world, &wire).await;
    }
    world.create("begins", json!({"prompt": "p"})).await;
    world.patch("stops", json!({"spec": {"suspend": true}})).await;
    let background = DeleteParams::background();
    world.sessions().delete("goes", &background).await.unwrap();
    // An operator at work begins a watch only when the server has ended the last one.
    let least = if trial.verb == Verb::Watch && !trial.begins {
        1
    } else {
        MET
    };
    until("the refusals", async || {
        (wire.met.load(Ordering::SeqCst) >= least).then_some(())
    })
    .await;
    wire.broken.store(false, Ordering::SeqCst);
    let repaired = Instant::now();

    world.phase("stops", Phase::Stopped).await;
    world.patch("stops", json!({"spec": {"suspend": false}})).await;
    for (name, attempt) in [("begins", 1), ("stops", 2)] {
        let pod = world.pod(name, attempt).await;
        world.start(&pod).await;
        world.phase(name, Phase::Running).await;
        world.end(&pod, 3, Some(&report(Outcome::Succeeded, attempt))).await;
        world.phase(name, Phase::Completed).await;
    }
    assert!(world.operator_is_up(), "the operator has ended");
    for name in ["begins", "stops"] {
        world.sessions().delete(name, &background).await.unwrap();
    }
    until("nothing to be left", async || {
        let jobs = world.jobs().list(&ListParams::default()).await.unwrap().items;
        let pods = world.pods().list(&ListParams::default()).await.unwrap().items;
        (jobs.is_empty() && pods.is_empty()).then_some(())
    })
    .await;
    made_once(namespace);
    format!(
        "met {} times in {:?}, over {:?} after that",
        wire.met.load(Ordering::SeqCst),
        repaired - since,
        repaired.elapsed()
    )
}

/// Three claims, four Jobs, each made once.
fn made_once(namespace: &str) {
    let named = |kind: &str| {
        let of_kind = writes(namespace).into_iter().filter(|entry| {
            entry["verb"] == "create"
                && entry["objectRef"]["resource"] == kind
                && !entry["objectRef"]["subresource"].is_string()
        });
        let mut names: Vec<_> = of_kind
            .map(|entry| entry["objectRef"]["name"].as_str().unwrap().to_owned())
            .collect();
        names.sort();
        names
    };
    assert_eq!(named("jobs"), ["begins-job", "goes-job", "stops-job", "stops-job-2"]);
    let claims = ["begins", "goes", "stops"].map(|name| format!("ambient-workspace-{name}"));
    assert_eq!(named("persistentvolumeclaims"), claims);
}

fn trials() -> Vec<Trial> {
    let every = VERBS.into_iter().flat_map(|verb| FAULTS.map(|fault| (verb, fault)));
    let every = every.flat_map(|(verb, fault)| [false, true].map(|begins| Trial { verb, fault, begins }));
    match std::env::var("API_FAULTS").as_deref() {
        Ok("all") => every.collect(),
        Ok(verb) => every.filter(|trial| format!("{:?}", trial.verb) == verb).collect(),
        // Where the rights to one verb are missing, and where what is written is not taken.
        Err(_) => every
            .filter(|trial| match trial.fault {
                Fault::Status(403) => trial.begins == matches!(trial.verb, Verb::Get | Verb::List | Verb::Watch),
                Fault::Status(422) => matches!(trial.verb, Verb::Create | Verb::Patch) && trial.begins,
                _ => false,
            })
            .collect(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_verb_is_refused_and_however_all_ends_well_when_that_is_over() {
    let trials = trials();
    let tried = trials.len();
    assert!(tried > 0, "API_FAULTS is all, or one of {VERBS:?}");
    let failures: Vec<_> = stream::iter(trials)
        .map(async |trial| {
            let Trial { verb, fault, begins } = trial;
            let fault = format!("{fault:?}").replace(['(', ')'], "");
            let namespace = format!("verbs-{verb:?}-{fault}-{begins}").to_lowercase();
            // One that fails does not keep the others from being tried.
            let outlived = AssertUnwindSafe(Box::pin(outlived(trial, &namespace)))
                .catch_unwind()
                .await;
            println!(
                "{trial:?}: {}",
                outlived.as_deref().unwrap_or(&String::from("failed, see above"))
            );
            outlived.is_err().then_some(trial)
        })
        .buffer_unordered(8)
        .filter_map(std::future::ready)
        .collect()
        .await;
    println!("{tried} refusals tried, {} failed", failures.len());
    assert!(failures.is_empty(), "{failures:?}");
}
