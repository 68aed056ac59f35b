//! A shim that an agent has taken over.

use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _};
use protocol::{Kind, Outcome};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use runner::agent::frame::codec;
use runner::agent::{Exit, FromShim};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::codec::Framed;

use super::mutate::{mutate, pieces};
use super::{damaged, dice, each, frames, hello};
use crate::common::{Session, script, text};
use crate::pod::{config, drive};
use crate::replay::recordings;

/// It answers with recordings and frames that were changed, ends when it likes, and
/// comes again.
async fn taken_over(listener: UnixListener, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let recordings = recordings();
    let (_, frames) = frames();
    while let Ok((stream, _)) = listener.accept().await {
        let _ = answer(stream, &mut random, &recordings, &frames).await;
    }
}

async fn answer(
    stream: UnixStream,
    random: &mut StdRng,
    recordings: &[(String, Vec<u8>)],
    frames: &[Bytes],
) -> std::io::Result<()> {
    use tokio::io::AsyncWriteExt as _;

    let mut shim = Framed::new(stream, codec());
    shim.send(hello().encode()).await?;
    // What is said to it is taken, or not.
    for _ in 0..random.random_range(0..3) {
        shim.next().await;
    }
    let stream = damaged(random, recordings);
    for piece in pieces(random, &stream) {
        let mut bytes = FromShim::Stdout(Bytes::copy_from_slice(piece)).encode();
        if random.random_ratio(1, 20) {
            bytes = frames.choose(random).unwrap().clone();
        }
        if random.random_ratio(1, 20) {
            let mut changed = bytes.to_vec();
            mutate(random, &mut changed);
            bytes = changed.into();
        }
        shim.send(bytes).await?;
        if random.random_ratio(1, 60) {
            let noise: Vec<u8> = (0..random.random_range(1..64)).map(|_| random.random()).collect();
            shim.get_mut().write_all(&noise).await?;
        }
    }
    shim.send(FromShim::Exit(Exit::default()).encode()).await
}

#[tokio::test]
async fn a_shim_that_says_anything_at_all_ends_the_attempt_and_nothing_else() {
    let (mut random, cases) = dice(12);
    each(&mut random, cases, ends_the_attempt).await;
}

async fn ends_the_attempt(case: u32, seed: u64) {
    let session = Session::new().await;
    let mut config = config(&session, &script("MARK", &[text("Done.")]));
    // It may also say nothing more for as long as it likes.
    config.limits.timeout = Some(3);
    let listener = UnixListener::bind(session.state().join("agent.sock")).unwrap();
    let shim = tokio::spawn(taken_over(listener, seed));
    let outcome = drive(config).await;
    shim.abort();
    let report = session.report();
    assert_eq!(report.outcome, outcome, "case {case}");
    assert_ne!(outcome, Outcome::Running, "case {case}");
    let records = session.records();
    assert!(
        records.iter().map(|record| record.seq).eq(1..=records.len() as u64),
        "case {case}"
    );
    assert_eq!(records.last().unwrap().kind, Kind::End, "case {case}");
    assert!(report.usage.total() == 0 && report.cost_usd.is_none_or(|cost| cost == protocol::NanoUsd::default()));
}
