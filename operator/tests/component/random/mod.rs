//! Random operations on sessions, their namespace and their children.
//!
//! The part that always runs is drawn by a seed that stays the same, or by `RANDOM_SEED`; `RANDOM_OPERATIONS=10000` runs so many. A sequence that
//! fails is made shorter for as long as it fails, and kept as a file of `seeds/`, which every run begins with.

mod digest;
mod operation;
mod oracle;
mod rest;
mod scene;
mod schema;
mod values;

use std::{
    collections::BTreeSet,
    panic::AssertUnwindSafe,
    path::PathBuf,
    sync::{
        Arc, Mutex, Once,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures::{FutureExt as _, StreamExt as _, stream};

use self::{
    operation::{Operation, Vocabulary},
    oracle::{Pair, Tally},
    schema::Mutation,
};

/// Operations of a sequence.
const LENGTH: usize = 20;
/// Sequences at once, when a part is tried and when a number is given: they wait more than they work.
const AT_ONCE: usize = 6;
const MANY_AT_ONCE: usize = 16;
/// Operations after which a long run tells how far it is.
const TELL: usize = 250;
/// Operations that are tried when no number is given, and for how long others are begun then.
const DRAWN: usize = 160;
const DRAWN_BY: u64 = 1_795_253_975;
const DRAWN_FOR: Duration = Duration::from_secs(45);
/// How long anything may take: less than others wait, so that what is in the way is told.
const PATIENCE: Duration = Duration::from_mins(2);
/// Tries to make a failing sequence shorter.
const SHORTER: usize = 16;

/// Panics of the product: a test's own are in `tests/`.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn watch_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if panic.location().is_none_or(|place| !place.file().contains("tests/")) {
                PANICS.lock().unwrap().push(panic.to_string());
            }
            before(panic);
        }));
    });
}

fn seeds() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/component/random/seeds")
}

/// Sequences that failed once.
fn kept() -> Vec<(String, Vec<Operation>)> {
    let mut kept: Vec<_> = std::fs::read_dir(seeds())
        .unwrap()
        .filter_map(|entry| {
            let path = entry.unwrap().path();
            (path.extension()? == "json").then(|| {
                let text = std::fs::read_to_string(&path).unwrap();
                (
                    path.file_stem().unwrap().to_string_lossy().into_owned(),
                    serde_json::from_str(&text).unwrap(),
                )
            })
        })
        .collect();
    kept.sort_by(|a, b| a.0.cmp(&b.0));
    kept
}

/// Worlds for sequences, each used again when what was in it is gone.
struct Worlds {
    free: Mutex<Vec<Pair>>,
    made: AtomicUsize,
    vocabulary: Arc<Vocabulary>,
}

impl Worlds {
    /// Carries out a sequence; the error is what did not hold. A world in which it failed is not used again.
    async fn run(&self, operations: &[Operation]) -> Result<Tally, String> {
        let free = self.free.lock().unwrap().pop();
        let live = async {
            let mut pair = match free {
                Some(pair) => pair,
                None => Pair::new(self.made.fetch_add(1, Ordering::SeqCst), self.vocabulary.clone()).await,
            };
            let tally = Box::pin(pair.live(operations)).await;
            self.free.lock().unwrap().push(pair);
            tally
        };
        // What is panicked through is dropped with it.
        let result = AssertUnwindSafe(live).catch_unwind().await.map_err(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            text.or_else(|| panic.downcast_ref::<&str>().map(|&s| s.to_owned()))
                .unwrap_or_default()
        });
        let panics = std::mem::take(&mut *PANICS.lock().unwrap());
        match panics.first() {
            Some(panic) => Err(format!("a panic: {panic}")),
            None => result,
        }
    }

    /// A shorter sequence that fails too.
    async fn shrunk(&self, operations: Vec<Operation>) -> Vec<Operation> {
        let (mut best, mut piece, mut tries) = (operations.clone(), operations.len().div_ceil(2), 0);
        while piece > 0 && tries < SHORTER {
            let mut at = 0;
            while at < best.len() && tries < SHORTER {
                let mut shorter = best.clone();
                shorter.drain(at..(at + piece).min(best.len()));
                tries += 1;
                if !shorter.is_empty() && self.run(&shorter).await.is_err() {
                    best = shorter;
                } else {
                    at += piece;
                }
            }
            piece /= 2;
        }
        best
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_done_to_sessions_they_settle_as_they_would_have_on_a_clean_namespace_and_leave_nothing() {
    watch_panics();
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seed = number("RANDOM_SEED").unwrap_or(DRAWN_BY);
    let asked = number("RANDOM_OPERATIONS").map(|n| usize::try_from(n).unwrap());
    let wanted = asked.unwrap_or(DRAWN);
    let began = Instant::now();
    let vocabulary = Arc::new(Vocabulary::new(seed));
    let worlds = Worlds {
        free: Mutex::default(),
        made: AtomicUsize::new(0),
        vocabulary: vocabulary.clone(),
    };
    let kept = kept();
    println!(
        "RANDOM_SEED={seed}, {wanted} operations at least, {} kept sequences",
        kept.len()
    );
    let total = Mutex::new(Tally::default());
    let failures = Mutex::new(Vec::new());
    let next = AtomicU64::new(0);
    let again = stream::iter(kept.into_iter().map(|(name, operations)| (name, operations, false)));
    let drawn = stream::iter(std::iter::from_fn(|| {
        let goes_on = asked.is_some() || began.elapsed() < DRAWN_FOR;
        (goes_on && total.lock().unwrap().done() < wanted).then(|| {
            let number = next.fetch_add(1, Ordering::SeqCst);
            (
                format!("{seed}-{number}"),
                vocabulary.sequence(seed, number, LENGTH),
                true,
            )
        })
    }));
    again
        .chain(drawn)
        .for_each_concurrent(
            if asked.is_some() { MANY_AT_ONCE } else { AT_ONCE },
            async |(name, operations, new)| match worlds.run(&operations).await {
                Ok(tally) => {
                    let mut total = total.lock().unwrap();
                    let before = total.done();
                    total.add(&tally);
                    if total.done() / TELL > before / TELL {
                        println!("{} operations in {:.0?}", total.done(), began.elapsed());
                    }
                }
                Err(why) => {
                    println!(
                        "sequence {name} failed: {why}\n{}",
                        serde_json::to_string(&operations).unwrap()
                    );
                    let shorter = if new && number("RANDOM_SHRINK") != Some(0) {
                        worlds.shrunk(operations).await
                    } else {
                        operations
                    };
                    let text = serde_json::to_string_pretty(&shorter).unwrap();
                    if new && number("RANDOM_SHRINK") != Some(0) {
                        std::fs::write(seeds().join(format!("{name}.json")), &text).unwrap();
                    }
                    failures.lock().unwrap().push(format!("{name}: {why}\n{text}"));
                    assert!(
                        failures.lock().unwrap().len() < 20,
                        "too many: {:#?}",
                        failures.lock().unwrap()
                    );
                }
            },
        )
        .await;
    let total = total.into_inner().unwrap();
    let tried: BTreeSet<Mutation> = total.tried.clone();
    println!(
        "RANDOM_SEED={seed}: {} operations taken, {} refused, {} invalid ({} %), {} of {} rules at properties, {} sequences, {} failures",
        total.taken,
        total.refused,
        total.invalid,
        total.invalid * 100 / total.done().max(1),
        tried.len(),
        vocabulary.all(),
        total.sequences,
        failures.lock().unwrap().len()
    );
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}
