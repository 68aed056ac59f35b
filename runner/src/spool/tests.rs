use std::fs;

use proptest::prelude::*;

use super::*;

fn body(n: usize) -> Box<RawValue> {
    raw(Kind::Cli, &serde_json::json!({ "n": n, "pad": "x".repeat(n % 97) })).unwrap()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

fn fill(dir: &Path, records: usize) -> Vec<String> {
    let mut spool = Spool::open(dir, |_| ()).unwrap();
    (0..records)
        .map(|n| serde_json::to_string(&spool.append(1, 1, Kind::Cli, body(n)).unwrap()).unwrap())
        .collect()
}

fn reopened(dir: &Path) -> (Spool, Vec<Record>) {
    let mut seen = Vec::new();
    let spool = Spool::open(dir, |record| seen.push(record.clone())).unwrap();
    (spool, seen)
}

#[test]
fn records_come_back_with_the_bytes_that_were_written() {
    let dir = tempfile::tempdir().unwrap();
    let written = fill(dir.path(), 50);
    let (spool, seen) = reopened(dir.path());
    assert_eq!(spool.next_seq(), 51);
    let mut reader = spool.reader(1);
    let mut read = Vec::new();
    loop {
        let batch = reader.read(50, 700).unwrap();
        if batch.is_empty() {
            break;
        }
        read.extend(batch.into_iter().map(|stored| stored.bytes.get().to_owned()));
    }
    assert_eq!(read, written);
    assert_eq!(seen.len(), 50);
}

#[test]
fn the_id_stays_and_another_spool_has_another() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fill(one.path(), 1);
    fill(two.path(), 1);
    let id = reopened(one.path()).0.id().to_owned();
    assert_eq!(reopened(one.path()).0.id(), id);
    assert_ne!(reopened(two.path()).0.id(), id);
}

#[test]
fn nothing_is_durable_before_it_is_synced_and_all_of_it_is_after() {
    runtime().block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let mut spool = Spool::open(dir.path(), |_| ()).unwrap();
        assert_eq!(spool.progress().borrow().durable, 0);
        let last = (0..1_000)
            .map(|n| spool.append(1, 1, Kind::Cli, body(n)).unwrap().seq)
            .last()
            .unwrap();
        spool.durable(last).await.unwrap();
        assert_eq!(spool.reader(last).read(last, 1).unwrap()[0].seq, last);
        assert!(spool.reader(last).read(last - 1, 1).unwrap().is_empty());
    });
}

#[test]
fn an_end_sums_its_own_attempt_only() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = Spool::open(dir.path(), |_| ()).unwrap();
    spool.append(1, 1, Kind::Cli, body(1)).unwrap();
    spool.append_end(1, Outcome::Lost).unwrap();
    let second = spool.append(2, 1, Kind::Cli, body(2)).unwrap();
    drop(spool);
    // Sums go on where the spool is opened again.
    let (mut spool, _) = reopened(dir.path());
    assert_eq!(spool.last_attempt(), (2, false));
    let third = spool.append(2, 1, Kind::Cli, body(3)).unwrap();
    let end = spool.append_end(1, Outcome::Succeeded).unwrap();
    let end: EndBody = serde_json::from_str(end.body.get()).unwrap();
    let bytes = [second, third]
        .map(|record| serde_json::to_vec(&record).unwrap())
        .concat();
    assert_eq!((end.last_seq, end.bytes), (4, bytes.len() as u64));
    assert_eq!(end.sha256, hex::encode(Sha256::digest(&bytes)));
}

#[test]
fn a_record_that_is_appended_again_keeps_its_body_and_says_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = Spool::open(dir.path(), |_| ()).unwrap();
    let first = spool.append(1, 1, Kind::Cli, body(7)).unwrap();
    spool.skip_to(40);
    let gap = GapBody {
        from: Some(2),
        to: Some(39),
        length: None,
    };
    spool.append(1, 1, Kind::Gap, raw(Kind::Gap, &gap).unwrap()).unwrap();
    let again = spool.append_again(first.clone()).unwrap();
    assert_eq!(
        (again.seq, again.was, again.body.get()),
        (41, Some(1), first.body.get())
    );
    drop(spool);
    let (spool, seen) = reopened(dir.path());
    assert_eq!(seen.iter().map(|record| record.seq).collect::<Vec<_>>(), [1, 40, 41]);
    assert_eq!(
        spool.reader(2).read(41, 1 << 20).unwrap().len(),
        2,
        "a reader goes over the hole"
    );
}

#[test]
fn damage_in_the_middle_of_the_spool_becomes_a_gap_with_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = Spool::open(dir.path(), |_| ()).unwrap();
    let big = raw(Kind::Cli, &"y".repeat(5 << 20)).unwrap();
    for _ in 0..6 {
        let seq = spool.append(1, 1, Kind::Cli, big.clone()).unwrap().seq;
        runtime().block_on(spool.durable(seq)).unwrap();
    }
    drop(spool);
    let segments = segment::list(dir.path()).unwrap();
    assert!(segments.len() >= 3, "{segments:?}");
    let (first, path) = &segments[1];
    let mut bytes = fs::read(path).unwrap();
    bytes[segment::HEADER as usize + 20] ^= 1;
    fs::write(path, bytes).unwrap();
    let (spool, _) = reopened(dir.path());
    let gap = spool.reader(7).record(7);
    runtime().block_on(spool.durable(7)).unwrap();
    let gap = gap.unwrap().or_else(|| spool.reader(7).record(7).unwrap()).unwrap();
    let gap: GapBody = serde_json::from_str(gap.body.get()).unwrap();
    assert_eq!((gap.from, gap.to), (Some(*first), Some(segments[2].0 - 1)));
}

#[test]
fn a_record_that_changed_on_the_disk_is_not_taken_for_the_one_that_was_written() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path(), 20);
    let path = segment::list(dir.path()).unwrap()[0].1.clone();
    let mut bytes = fs::read(&path).unwrap();
    // Still JSON, and still of the right length.
    let at = bytes.iter().rposition(|byte| *byte == b'x').unwrap();
    bytes[at] = b'y';
    fs::write(&path, bytes).unwrap();
    assert_eq!(reopened(dir.path()).1.len(), 19);
}

#[test]
fn a_disk_that_refuses_is_told_to_everyone_who_waits() {
    let dir = tempfile::tempdir().unwrap();
    let inner = dir.path().join("spool");
    let mut spool = Spool::open(&inner, |_| ()).unwrap();
    fs::remove_dir_all(&inner).unwrap();
    let seq = spool.append(1, 1, Kind::Cli, body(1)).unwrap().seq;
    let error = runtime().block_on(spool.durable(seq)).unwrap_err();
    assert_eq!(error.outcome(), Outcome::VolumeUnavailable);
    assert!(spool.append(1, 1, Kind::Cli, body(1)).is_err());
}

#[test]
fn on_a_full_disk_the_end_is_written_into_reserved_space() {
    const TEST: &str = "spool::tests::on_a_full_disk_the_end_is_written_into_reserved_space";
    let Some(dir) = xtask::small_disk(TEST, "1m").unwrap() else {
        return;
    };
    let mut spool = Spool::open(&dir, |_| ()).unwrap();
    let mut written = 0;
    let error = loop {
        written += 1;
        let body = raw(Kind::Cli, &"x".repeat(700)).unwrap();
        match spool.append(3, 1, Kind::Cli, body) {
            Ok(record) if record.seq % 50 == 0 => {
                if let Err(error) = runtime().block_on(spool.durable(record.seq)) {
                    break error;
                }
            }
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(error.outcome(), Outcome::DiskFull);
    // Of what is there nothing is read again: it may be very much.
    let (segment, aside) = (segment::path(&dir, 1), dir.join("aside"));
    fs::rename(&segment, &aside).unwrap();
    let end = spool.append_end(1, Outcome::DiskFull).unwrap();
    runtime().block_on(spool.durable(end.seq)).unwrap();
    fs::rename(&aside, &segment).unwrap();
    assert!(end.seq > 500 && end.seq <= written + 1, "{} of {written}", end.seq);
    drop(spool);
    let mut sums = Sums::default();
    let mut ends = Vec::new();
    let mut scanner = Scanner::of(&dir).unwrap();
    while let Some((record, bytes)) = scanner.next().unwrap() {
        if record.kind == Kind::End {
            ends.push(serde_json::from_str::<EndBody>(record.body.get()).unwrap());
            assert_eq!(*ends.last().unwrap(), sums.end(Outcome::DiskFull));
        }
        sums.add(record.seq, record.attempt, record.kind, &bytes);
    }
    assert_eq!(ends.len(), 1);
    assert_eq!((ends[0].last_seq, sums.attempt), (end.seq - 1, 3));
    // Somebody made room: the next attempt goes on, and keeps a reserve again.
    fs::write(dir.join("x"), "").unwrap();
    let (spool, records) = reopened(&dir);
    assert_eq!(records.len() as u64, end.seq);
    assert_eq!(spool.last_attempt(), (3, true));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever is in the files: reading ends, and what is read has the checksum that it was written with.
    #[test]
    fn any_bytes_are_read_or_cut(files in prop::collection::vec((0_u64..50, prop::collection::vec(any::<u8>(), 0..200), any::<bool>()), 0..4)) {
        let dir = tempfile::tempdir().unwrap();
        fill(dir.path(), 3);
        for (seq, bytes, header) in files {
            let mut file = if header { [b"AGSPOOL1".as_slice(), &[b'0'; 36]].concat() } else { Vec::new() };
            if bytes.len() % 2 == 0 {
                segment::encode(&mut file, &bytes);
            }
            file.extend(bytes);
            fs::write(segment::path(dir.path(), seq + 4), file).unwrap();
        }
        let (mut spool, _) = reopened(dir.path());
        let next = spool.append(1, 1, Kind::Cli, body(9)).unwrap();
        runtime().block_on(spool.durable(next.seq)).unwrap();
        let read = spool.reader(1).read(next.seq, usize::MAX).unwrap();
        prop_assert!(read.windows(2).all(|pair| pair[0].seq < pair[1].seq));
        prop_assert!(read.iter().take(3).map(|stored| stored.seq).eq(1..=3));
    }

    /// Whatever a crash leaves of the last bytes: what is read is a prefix of what was written, and writing goes on.
    #[test]
    fn a_torn_tail_is_cut_and_only_it(records in 1_usize..40, torn in 0_usize..400, flip in any::<Option<u8>>()) {
        let dir = tempfile::tempdir().unwrap();
        let written = fill(dir.path(), records);
        let path = segment::list(dir.path()).unwrap()[0].1.clone();
        let mut bytes = fs::read(&path).unwrap();
        let whole = bytes.len();
        let kept = whole - torn.min(whole - segment::HEADER as usize);
        bytes.truncate(kept);
        if let Some(bit) = flip && kept > segment::HEADER as usize {
            bytes[kept - 1] ^= bit.max(1);
        }
        fs::write(&path, &bytes).unwrap();
        let (mut spool, seen) = reopened(dir.path());
        let seen: Vec<_> = seen.iter().map(|record| serde_json::to_string(record).unwrap()).collect();
        prop_assert!(written.starts_with(&seen));
        if torn == 0 && flip.is_none() {
            prop_assert_eq!(seen.len(), records);
        }
        let next = spool.append(1, 1, Kind::Cli, body(9)).unwrap();
        prop_assert_eq!(next.seq as usize, seen.len() + 1);
        drop(spool);
        let (_, again) = reopened(dir.path());
        prop_assert_eq!(again.len(), seen.len() + 1);
    }
}

#[test]
fn who_has_lost_the_lease_writes_nothing_more_and_cuts_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let (holding, lose) = Holding::to_be_lost();
    let mut spool = Spool::open(dir.path(), |_| ()).unwrap();
    spool.write_while(holding);
    let first = spool.append(1, 1, Kind::Cli, body(1)).unwrap();
    runtime.block_on(spool.durable(first.seq)).unwrap();
    lose();
    let size = |dir: &Path| -> u64 {
        let files = fs::read_dir(dir).unwrap().flatten();
        files.map(|file| file.metadata().unwrap().len()).sum()
    };
    let before = size(dir.path());
    let late = spool.append(1, 1, Kind::Cli, body(2)).unwrap();
    let refused = runtime.block_on(spool.durable(late.seq)).unwrap_err();
    assert!(matches!(refused, SpoolError::NotOurs), "{refused}");
    drop(spool);
    assert_eq!(size(dir.path()), before);
    assert_eq!(reopened(dir.path()).1.len(), 1);
}
