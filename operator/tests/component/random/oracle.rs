//! Two namespaces: one in which a sequence is lived, and a clean one in which what it ends with is made at once.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

use crds::Phase;
use kube::ResourceExt as _;
use protocol::Reason;
use serde_json::{Value, json};

use super::{
    PATIENCE,
    digest::{self, digest},
    operation::{Operation, Vocabulary},
    rest::{comes_to_rest, finish},
    scene::{Came, NAME, Scene},
    schema::{self, Mutation},
    values::{self, Base},
};
use crate::world::until;

/// What the specs as they are come to, under the settings that allow all.
static PLAIN: Mutex<BTreeMap<Base, Value>> = Mutex::new(BTreeMap::new());

/// What was done.
#[derive(Default)]
pub struct Tally {
    pub sequences: usize,
    pub taken: usize,
    pub refused: usize,
    /// Refused, or answered by a condition that says what is wrong.
    pub invalid: usize,
    pub tried: BTreeSet<Mutation>,
}

impl Tally {
    pub fn done(&self) -> usize {
        self.taken + self.refused
    }

    pub fn add(&mut self, other: &Self) {
        self.sequences += other.sequences;
        self.taken += other.taken;
        self.refused += other.refused;
        self.invalid += other.invalid;
        self.tried.extend(other.tried.iter().cloned());
    }
}

/// The two namespaces.
pub struct Pair {
    lived: Scene,
    clean: Scene,
    clicks: u64,
    /// The settings are as they were when the claim was made: it is not changed after that.
    as_settled: bool,
}

impl Pair {
    pub async fn new(number: usize, vocabulary: Arc<Vocabulary>) -> Self {
        let (lived, clean) = (format!("random-{number}-lived"), format!("random-{number}-clean"));
        let (lived, clean) = tokio::join!(Scene::new(&lived, vocabulary.clone()), Scene::new(&clean, vocabulary));
        Self {
            lived,
            clean,
            clicks: 0,
            as_settled: true,
        }
    }

    /// Lives a sequence to its end, and takes away what is left.
    pub async fn live(&mut self, operations: &[Operation]) -> Tally {
        self.lived.put_settings(values::settings()).await;
        let mut tally = Tally {
            sequences: 1,
            ..Tally::default()
        };
        let mut as_made = true;
        self.as_settled = true;
        for operation in operations {
            let came = self.lived.act(operation).await;
            match came {
                Came::Taken => tally.taken += 1,
                Came::Refused => tally.refused += 1,
                Came::Nothing => continue,
            }
            let complains = match self.lived.session().await.and_then(|s| s.status?.reason) {
                Some(reason) => reason == Reason::ConfigError.as_str(),
                None => false,
            };
            tally.invalid += usize::from(came == Came::Refused || complains);
            match operation {
                Operation::Create {
                    changed: Some(changed),
                    base,
                    queued,
                } => {
                    tally.tried.insert(changed.clone());
                    if came == Came::Taken && as_made && !queued {
                        self.acts(*base, changed).await;
                    }
                }
                Operation::Edit(changed) => {
                    tally.tried.insert(changed.clone());
                    if came == Came::Taken {
                        self.reaches_the_pod().await;
                    }
                }
                Operation::Settings(changed) => {
                    tally.tried.extend(changed.clone());
                    as_made &= came != Came::Taken;
                    self.as_settled &= came != Came::Taken;
                }
                // Of these the next session of this name may find something.
                Operation::Quota(_) | Operation::Occupy { .. } | Operation::EditClaim(_) => as_made = false,
                _ => {}
            }
        }
        Box::pin(self.ends_as_on_a_clean_namespace()).await;
        tokio::join!(leaves_nothing(&self.lived), leaves_nothing(&self.clean));
        tally
    }

    /// What was accepted of a changed spec shows in the children, or is answered by a condition.
    async fn acts(&self, base: Base, changed: &Mutation) {
        let plain = self.plain(base).await;
        let vocabulary = &self.lived.vocabulary;
        let mut spec = base.spec();
        schema::mutate(&vocabulary.session, changed, &mut spec);
        schema::tidy(&mut spec);
        if says_the_same(&base.spec(), &spec) || shows_elsewhere(changed, &spec) {
            return;
        }
        let now = made(&self.lived).await;
        assert_ne!(plain, now, "{changed:?} of {base:?} was accepted and shows nowhere");
    }

    /// What a spec comes to as it is.
    async fn plain(&self, base: Base) -> Value {
        if let Some(plain) = PLAIN.lock().unwrap().get(&base) {
            return plain.clone();
        }
        self.clean.put_settings(values::settings()).await;
        assert_eq!(self.clean.create(base.spec(), json!({}), json!({})).await, Came::Taken);
        let plain = made(&self.clean).await;
        self.clean.deleted().await;
        self.clean.settings(None).await;
        PLAIN.lock().unwrap().insert(base, plain.clone());
        plain
    }

    /// Limits that were changed are told to a runner at work, or it is said why not.
    async fn reaches_the_pod(&self) {
        until("the pod to be told of its limits", async || {
            let Some(session) = self.lived.session().await else {
                return Some(());
            };
            let status = session.status.clone().unwrap_or_default();
            let live = matches!(status.phase, Phase::Creating | Phase::Running);
            let pod = self.lived.pod().await.filter(|pod| live && pod.uid() == status.pod_uid);
            let (Some(pod), false) = (pod, session.metadata.deletion_timestamp.is_some()) else {
                return Some(());
            };
            let said = status
                .conditions
                .iter()
                .any(|c| c.reason == Reason::ConfigError.as_str());
            let told: Option<Value> = pod
                .annotations()
                .get("vteam.ambient-code/limits")
                .and_then(|text| serde_json::from_str(text).ok());
            // Somebody's nonsense there is not the operator's word.
            let Some(told) = told else { return Some(()) };
            let wanted = [
                ("timeout", session.spec.timeout),
                ("inactivityTimeout", session.spec.inactivity_timeout),
            ];
            let same = wanted
                .iter()
                .all(|(name, wanted)| wanted.is_none_or(|wanted| told[name] == wanted));
            let turns = session.spec.limits.as_ref().and_then(|limits| limits.max_turns);
            let same = same && turns.is_none_or(|turns| told["maxTurns"] == turns);
            (same || said).then_some(())
        })
        .await;
    }

    /// The session as it is in the end, with a fresh run, is what the same one is on a clean namespace.
    async fn ends_as_on_a_clean_namespace(&mut self) {
        self.lived.clear().await;
        let Some(_) = self.lived.session().await else { return };
        if self
            .lived
            .session()
            .await
            .is_some_and(|s| s.metadata.deletion_timestamp.is_some())
        {
            return self.lived.gone().await;
        }
        self.clicks += 1;
        Box::pin(comes_to_rest(&self.lived, self.clicks)).await;
        self.lived.patch(json!({"spec": {"suspend": false}})).await;
        let Some(session) = self.lived.session().await else {
            return;
        };
        if is_ephemeral(&session) {
            // Its workspace went with its pod, and so it has no other run: the same session follows it.
            make(&self.lived, &session).await;
        }
        self.make_the_same(&session).await;
        self.comes_to_the_same("made").await;
        tokio::join!(self.lived.quiet(), self.clean.quiet());
        let phase = self
            .clean
            .session()
            .await
            .and_then(|session| Some(session.status?.phase));
        if phase != Some(Phase::Creating) {
            return;
        }
        let ended = tokio::join!(finish(&self.lived), finish(&self.clean));
        assert_eq!(ended.0, ended.1, "both end, or of both nobody makes the pod");
        if !ended.0 {
            return;
        }
        self.comes_to_the_same("ended").await;
        let last = Mutex::new((Value::Null, Value::Null));
        let same = until("the same status", async || {
            let (lived, clean) = (
                digest::status(&self.lived.world, NAME).await,
                digest::status(&self.clean.world, NAME).await,
            );
            let same = lived == clean;
            *last.lock().unwrap() = (lived, clean);
            same.then_some(())
        });
        or_say(same, || {
            let last = last.lock().unwrap();
            difference(&last.0, &last.1)
        })
        .await;
    }

    /// The same session and the same settings, on the clean namespace.
    async fn make_the_same(&self, session: &crds::AgenticSession) {
        let settings = self
            .lived
            .api::<crds::ProjectSettings>()
            .get_opt(crds::project_settings::NAME)
            .await
            .unwrap();
        if let Some(settings) = settings {
            assert_eq!(
                self.clean
                    .put_settings(serde_json::to_value(settings.spec).unwrap())
                    .await,
                Came::Taken
            );
        } else {
            self.clean.settings(None).await;
        }
        make(&self.clean, session).await;
    }

    async fn comes_to_the_same(&self, when: &str) {
        let last = Mutex::new((Value::Null, Value::Null));
        let same = until("the same children", async || {
            let (mut lived, mut clean) = (
                digest(&self.lived.world, NAME).await,
                digest(&self.clean.world, NAME).await,
            );
            for found in [&mut lived, &mut clean] {
                if !self.as_settled && !found.is_null() {
                    found["claims"] = Value::Null;
                }
            }
            // The namespace may give it no time after its end.
            let is_gone = lived.is_null() && when == "ended";
            let same = lived == clean && (is_gone || lived["says"]["reason"].is_string());
            *last.lock().unwrap() = (lived, clean);
            same.then_some(())
        });
        or_say(same, || {
            let last = last.lock().unwrap();
            format!("when {when}: {}", difference(&last.0, &last.1))
        })
        .await;
    }
}

/// Makes a session that says the same, in the place of one that is there.
async fn make(scene: &Scene, session: &crds::AgenticSession) {
    let (labels, annotations) = (json!(session.labels()), json!(session.annotations()));
    let spec = serde_json::to_value(&session.spec).unwrap();
    assert_eq!(scene.create(spec, labels, annotations).await, Came::Taken);
}

/// The session is deleted, and with it all that it had.
async fn leaves_nothing(scene: &Scene) {
    scene.clear().await;
    scene.deleted().await;
    scene.quiet().await;
    assert!(!scene.holds_pods().await, "a pod is held");
    scene.settings(None).await;
    scene.clear().await;
}

async fn or_say(wait: impl Future<Output = ()>, say: impl Fn() -> String) {
    tokio::select! {
        () = wait => {}
        () = tokio::time::sleep(PATIENCE) => panic!("not as on a clean namespace, {}", say()),
    }
}

/// Where two values differ, and how.
fn difference(lived: &Value, clean: &Value) -> String {
    fn below(path: &str, lived: &Value, clean: &Value, found: &mut Vec<String>) {
        match (lived, clean) {
            (Value::Object(a), Value::Object(b)) => {
                let names: BTreeSet<_> = a.keys().chain(b.keys()).collect();
                for name in names {
                    below(&format!("{path}.{name}"), &lived[name], &clean[name], found);
                }
            }
            (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
                for (at, (a, b)) in a.iter().zip(b).enumerate() {
                    below(&format!("{path}[{at}]"), a, b, found);
                }
            }
            (a, b) if a != b => found.push(format!("{path}: {a} but {b}")),
            _ => {}
        }
    }
    let mut found = Vec::new();
    below("", lived, clean, &mut found);
    found.join("\n")
}

/// What a session comes to before its pod starts.
async fn made(scene: &Scene) -> Value {
    until("the session to come to something", async || {
        // A predecessor's, held by somebody, would be waited for.
        scene.let_all_go().await;
        let found = digest(&scene.world, NAME).await;
        let reason = found["says"]["reason"].as_str()?;
        let waits = ["WaitingForVolume", "Retrying"].contains(&reason);
        let made = found["says"]["phase"] != "Pending" && found["job"].is_object();
        let refused = found["says"]["phase"] == "Pending" || found["says"]["phase"] == "Failed";
        (made || refused && !waits).then_some(found)
    })
    .await
}

pub fn is_ephemeral(session: &crds::AgenticSession) -> bool {
    let workspace = session.spec.workspace.as_ref();
    workspace.and_then(|workspace| workspace.ephemeral) == Some(true)
}

/// Whether two specs differ in nothing that means anything: what is empty is as absent.
fn says_the_same(a: &Value, b: &Value) -> bool {
    fn bare(value: &Value) -> Value {
        match value {
            Value::Object(map) => {
                let map: serde_json::Map<_, _> = map
                    .iter()
                    .map(|(name, value)| (name.clone(), bare(value)))
                    .filter(|(_, value)| !empty(value))
                    .collect();
                Value::Object(map)
            }
            other => other.clone(),
        }
    }
    fn empty(value: &Value) -> bool {
        match value {
            Value::Null => true,
            Value::Object(map) => map.is_empty(),
            Value::Array(list) => list.is_empty(),
            _ => false,
        }
    }
    bare(a) == bare(b)
}

/// What shows neither in the children nor in a condition, and why that is right.
fn shows_elsewhere(changed: &Mutation, spec: &Value) -> bool {
    match &*changed.path {
        // Shown by the spec itself, or acts at the end.
        "displayName" | "ttlSecondsAfterFinished" | "suspend" => true,
        // The first is the main one anyway.
        "mainRepoIndex" => spec["mainRepoIndex"] == 0 && spec["repos"].as_array().is_none_or(|repos| repos.len() < 2),
        // As the settings have it.
        "pod.readOnlyRootFilesystem" => spec["pod"]["readOnlyRootFilesystem"] != false,
        "runnerSecrets.[]" => spec["runnerSecrets"] == values::settings()["runnerSecrets"],
        // The container is the boundary.
        "tools.permissionMode" => spec["tools"]["permissionMode"] == "bypassPermissions",
        "autoPushOnComplete" => {
            spec["autoPushOnComplete"] != true || spec["repos"].as_array().is_none_or(Vec::is_empty)
        }
        "workspace.retention" => spec["workspace"]["retention"] != "Retain",
        _ => false,
    }
}
