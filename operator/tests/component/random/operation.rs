//! What is done to a session, its namespace and its children.

use crds::{session_crd, settings_crd};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use serde::{Deserialize, Serialize};

use super::{
    schema::{self, Mutation, Property},
    values::Base,
};

/// One operation; those that find nothing to act on do nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Operation {
    /// The session is deleted, if there is one, and made at once of this spec.
    Create {
        base: Base,
        changed: Option<Mutation>,
        /// It asks for a queue that admits its Jobs.
        queued: bool,
    },
    /// Its spec is changed, as far as that is allowed.
    Edit(Mutation),
    Suspend(bool),
    /// A start is asked for.
    Click(u8),
    /// Something of its metadata that is nobody's business is changed.
    Mark(Mark),
    /// The session is deleted.
    Delete(Propagation),
    /// Another is made under a name like this, looked at, and deleted.
    Namesake(String),
    /// The admin's word: the settings that allow all, changed; or none.
    Settings(Option<Mutation>),
    /// What the cluster does with the newest pod.
    Pod(Happening),
    DeletePod {
        force: bool,
    },
    EditPod(Edit),
    DeleteJob(Propagation),
    EditJob(Edit),
    DeleteClaim,
    EditClaim(Edit),
    /// Somebody has the next Job's name, or the claim's.
    Occupy {
        job: bool,
    },
    /// A quota that lets no pod and no claim through comes or goes.
    Quota(bool),
    /// Something that the pod refers to comes or goes.
    Keys(bool),
    /// The operator is killed and another started.
    Restart,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Propagation {
    Background,
    Foreground,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mark {
    Label,
    Annotation,
    Finalizer,
    Owner,
    /// As anybody may try who may write the session: the status subresource is the operator's.
    Status,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Happening {
    Starts,
    Succeeds,
    Fails,
    Stops,
    LosesModel,
    Crashes,
    IsEvicted,
    FindsNoImage,
    FindsNoNode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Edit {
    /// A label and an annotation of somebody else.
    Foreign,
    /// Our annotations are overwritten with nonsense.
    Nonsense,
    /// Our annotations are taken away.
    Bare,
    /// It belongs to nobody any more.
    Orphan,
    /// Somebody else's finalizer.
    Finalizer,
    /// Of a Job: it is suspended, or let go on.
    Suspend(bool),
    /// Of a Job: it has a second left.
    Deadline,
}

/// What operations are made from.
pub struct Vocabulary {
    pub session: Vec<Property>,
    pub settings: Vec<Property>,
    /// Every rule at every property of a session, in an order of this seed's.
    shuffled: Vec<Mutation>,
    shuffled_settings: Vec<Mutation>,
}

impl Vocabulary {
    pub fn new(seed: u64) -> Self {
        use rand::seq::SliceRandom as _;
        let session = schema::properties(&session_crd());
        let settings = schema::properties(&settings_crd());
        let mut random = StdRng::seed_from_u64(seed);
        let (mut shuffled, mut shuffled_settings) = (schema::all(&session), schema::all(&settings));
        shuffled.shuffle(&mut random);
        shuffled_settings.shuffle(&mut random);
        Self {
            session,
            settings,
            shuffled,
            shuffled_settings,
        }
    }

    pub fn all(&self) -> usize {
        self.shuffled.len() + self.shuffled_settings.len()
    }

    /// The operations of a sequence. The first creates; of the rules at properties, sequences take one after the other, so that
    /// enough of them take all.
    pub fn sequence(&self, seed: u64, number: u64, length: usize) -> Vec<Operation> {
        let mut random = StdRng::seed_from_u64(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(number));
        let mut turn = usize::try_from(number).unwrap() * length;
        let mut operations = vec![Operation::Create {
            base: *[Base::Bare, Base::Full, Base::Platform].choose(&mut random).unwrap(),
            changed: None,
            queued: random.random_bool(0.1),
        }];
        while operations.len() < length {
            turn += 1;
            operations.push(self.operation(&mut random, turn));
        }
        operations
    }

    fn operation(&self, random: &mut StdRng, turn: usize) -> Operation {
        let propagation = |random: &mut StdRng| {
            if random.random_bool(0.7) {
                Propagation::Background
            } else {
                Propagation::Foreground
            }
        };
        match random.random_range(0..100) {
            0..22 => Operation::Create {
                base: *[Base::Full, Base::Full, Base::Platform, Base::Bare]
                    .choose(random)
                    .unwrap(),
                changed: Some(self.shuffled[turn % self.shuffled.len()].clone()),
                queued: random.random_bool(0.05),
            },
            22..34 => {
                let mutable: Vec<_> = self.session.iter().filter(|p| is_limit(&p.path)).cloned().collect();
                Operation::Edit(schema::any(&mutable, random))
            }
            34..40 => Operation::Edit(schema::any(&self.session, random)),
            40..47 => Operation::Settings(
                (!turn.is_multiple_of(8)).then(|| self.shuffled_settings[turn % self.shuffled_settings.len()].clone()),
            ),
            47..52 => Operation::Suspend(random.random_bool(0.5)),
            52..56 => Operation::Click(random.random_range(0..9)),
            56..59 => Operation::Mark(
                *[
                    Mark::Label,
                    Mark::Annotation,
                    Mark::Finalizer,
                    Mark::Owner,
                    Mark::Status,
                ]
                .choose(random)
                .unwrap(),
            ),
            59..61 => Operation::Delete(propagation(random)),
            61..63 => Operation::Namesake(names(random)),
            63..79 => Operation::Pod(
                *[
                    Happening::Starts,
                    Happening::Starts,
                    Happening::Starts,
                    Happening::Succeeds,
                    Happening::Succeeds,
                    Happening::Fails,
                    Happening::Stops,
                    Happening::LosesModel,
                    Happening::Crashes,
                    Happening::IsEvicted,
                    Happening::FindsNoImage,
                    Happening::FindsNoNode,
                ]
                .choose(random)
                .unwrap(),
            ),
            79..82 => Operation::DeletePod {
                force: random.random_bool(0.4),
            },
            82..85 => Operation::EditPod(
                *[Edit::Foreign, Edit::Nonsense, Edit::Bare, Edit::Finalizer]
                    .choose(random)
                    .unwrap(),
            ),
            85..88 => Operation::DeleteJob(propagation(random)),
            88..92 => Operation::EditJob(
                *[
                    Edit::Foreign,
                    Edit::Nonsense,
                    Edit::Bare,
                    Edit::Finalizer,
                    Edit::Suspend(true),
                    Edit::Suspend(false),
                    Edit::Deadline,
                ]
                .choose(random)
                .unwrap(),
            ),
            92..94 => Operation::DeleteClaim,
            94..96 => Operation::EditClaim(*[Edit::Foreign, Edit::Bare, Edit::Orphan].choose(random).unwrap()),
            96 => Operation::Occupy {
                job: random.random_bool(0.5),
            },
            97 => Operation::Quota(random.random_bool(0.5)),
            98 => Operation::Keys(random.random_bool(0.5)),
            _ => Operation::Restart,
        }
    }
}

/// Fields of the spec that may be changed after creation.
pub fn may_change(path: &str) -> bool {
    path == "suspend" || is_limit(path)
}

/// The same but for `suspend`, which has an operation of its own.
fn is_limit(path: &str) -> bool {
    let top = path.split('.').next().unwrap_or_default();
    [
        "displayName",
        "timeout",
        "inactivityTimeout",
        "limits",
        "ttlSecondsAfterFinished",
    ]
    .contains(&top)
}

fn names(random: &mut StdRng) -> String {
    match random.random_range(0..7) {
        0 => "n".repeat(52),
        1 => "n".repeat(53),
        2 => "n".repeat(63),
        3 => "n".repeat(253),
        4 => "a.name.with.dots".to_owned(),
        5 => "poem-job".to_owned(),
        _ => "Not_A_Name".to_owned(),
    }
}
