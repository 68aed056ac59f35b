use rstest::rstest;

use super::*;

fn lease(kernel: &str, second: i64, released: bool) -> Lease {
    Lease {
        attempt: 1,
        pod_uid: "p".into(),
        kernel: kernel.into(),
        renewed_at: Timestamp::from_second(second).unwrap(),
        released,
        waits: false,
    }
}

#[rstest]
#[case::it_ended(lease("other", 99, true), 0)]
#[case::same_node(lease("ours", 99, false), 0)]
#[case::other_node_just_now(lease("other", 100, false), 45)]
#[case::other_node_a_while_ago(lease("other", 70, false), 45)]
#[case::other_node_long_ago(lease("other", 100 - 630, false), 15)]
#[case::other_node_longer_ago(lease("other", 100 - 900, false), 0)]
#[case::a_clock_ahead(lease("other", 500, false), 45)]
#[case::a_clock_behind(lease("other", 100 - 300, false), 45)]
#[case::a_kernel_that_cannot_be_told(lease("", 100, false), 45)]
#[case::same_node_that_waited_itself(Lease { waits: true, ..lease("ours", 60, false) }, 45)]
#[case::it_waited_and_ended(Lease { waits: true, ..lease("ours", 60, true) }, 0)]
fn a_runner_waits_for_one_that_may_still_be_at_work(#[case] found: Lease, #[case] seconds: u64) {
    assert_eq!(fence(&found, &lease("ours", 100, false)), Duration::from_secs(seconds));
}

#[test]
fn two_kernels_that_cannot_be_told_are_not_the_same() {
    assert_eq!(fence(&lease("", 99, false), &lease("", 100, false)), FENCE);
}

#[tokio::test]
async fn a_higher_attempt_ends_a_lower_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = Guard::take(dir.path(), 1, "pod-a").await.unwrap();
    first.renew().unwrap();
    let lease = Lease {
        attempt: 2,
        ..lease("other", 1, false)
    };
    replace(&dir.path().join("lease"), &serde_json::to_vec(&lease).unwrap()).unwrap();
    assert!(matches!(first.renew(), Err(StateError::Superseded { attempt: 2 })));
    drop(first);
    assert!(matches!(
        Guard::take(dir.path(), 1, "pod-a").await,
        Err(StateError::Superseded { attempt: 2 })
    ));
}

#[tokio::test(start_paused = true)]
async fn who_reads_for_long_renews_the_lease_when_it_is_time_and_learns_who_has_come() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lease");
    let mut first = Guard::take(dir.path(), 1, "pod-a").await.unwrap();
    std::fs::remove_file(&path).unwrap();
    first.renew_in_time().unwrap();
    assert!(!path.exists(), "not yet");
    tokio::time::advance(RENEW).await;
    first.renew_in_time().unwrap();
    assert!(path.exists());
    let lease = Lease {
        attempt: 2,
        ..lease("other", 1, false)
    };
    replace(&path, &serde_json::to_vec(&lease).unwrap()).unwrap();
    first.renew_in_time().unwrap();
    tokio::time::advance(RENEW).await;
    assert!(matches!(
        first.renew_in_time(),
        Err(StateError::Superseded { attempt: 2 })
    ));
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_ran_out_before_it_was_kept_is_not_held() {
    let dir = tempfile::tempdir().unwrap();
    let guard = Guard::take(dir.path(), 1, "pod-a").await.unwrap();
    tokio::time::advance(EXPIRE).await;
    let mut keeper = guard.keep();
    assert!(!keeper.holding().is_held());
    assert!(matches!(keeper.lost().await, StateError::Expired));
}

#[tokio::test(start_paused = true)]
async fn two_runners_of_one_node_do_not_both_get_in() {
    let dir = tempfile::tempdir().unwrap();
    let first = Guard::take(dir.path(), 1, "pod-a").await.unwrap();
    assert!(matches!(
        Guard::take(dir.path(), 2, "pod-b").await,
        Err(StateError::Superseded { .. })
    ));
    first.release().unwrap();
    Guard::take(dir.path(), 2, "pod-b").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_is_taken_over_is_noticed_with_the_next_renewal() {
    let dir = tempfile::tempdir().unwrap();
    let mut keeper = Guard::take(dir.path(), 1, "pod-a").await.unwrap().keep();
    let lease = Lease {
        attempt: 3,
        ..lease("other", 1, false)
    };
    replace(&dir.path().join("lease"), &serde_json::to_vec(&lease).unwrap()).unwrap();
    let begun = Instant::now();
    assert!(matches!(keeper.lost().await, StateError::Superseded { attempt: 3 }));
    assert!(begun.elapsed() <= RENEW + Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn a_lease_of_another_pod_is_noticed_at_once_when_somebody_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut keeper = Guard::take(dir.path(), 1, "pod-a").await.unwrap().keep();
    let lease = Lease {
        attempt: 1,
        pod_uid: "pod-b".into(),
        ..lease("other", 1, false)
    };
    replace(&dir.path().join("lease"), &serde_json::to_vec(&lease).unwrap()).unwrap();
    let begun = Instant::now();
    keeper.check();
    assert!(matches!(keeper.lost().await, StateError::Superseded { attempt: 1 }));
    assert!(begun.elapsed() < RENEW);
}

/// Not only after the wait: it would be at work with its successor until its next renewal.
#[tokio::test(start_paused = true)]
async fn a_runner_on_another_node_learns_of_the_next_one_while_that_one_still_waits() {
    let dir = tempfile::tempdir().unwrap();
    let elsewhere = Lease {
        renewed_at: Timestamp::now(),
        ..lease("other", 0, false)
    };
    replace(&dir.path().join("lease"), &serde_json::to_vec(&elsewhere).unwrap()).unwrap();
    let mut owner = Guard {
        lease: elsewhere,
        path: dir.path().join("lease"),
        renewed: Instant::now(),
        _lock: File::create(dir.path().join("lock of the other node")).unwrap(),
    };
    let begun = Instant::now();
    let next = Guard::take(dir.path(), 2, "pod-b");
    let (next, told) = tokio::join!(next, async {
        sleep(RENEW).await;
        owner.renew()
    });
    assert!(matches!(told, Err(StateError::Superseded { attempt: 2 })), "{told:?}");
    assert!(begun.elapsed() >= FENCE && !next.unwrap().lease.waits);
}

#[tokio::test(start_paused = true)]
async fn who_writes_knows_when_the_lease_is_lost() {
    let (held, lost) = watch::channel(Held::Since(Instant::now()));
    let holding = Holding(lost);
    tokio::time::advance(EXPIRE.saturating_sub(Duration::from_secs(1))).await;
    assert!(holding.is_held());
    tokio::time::advance(Duration::from_secs(2)).await;
    assert!(!holding.is_held());
    held.send_replace(Held::Since(Instant::now()));
    assert!(holding.is_held());
    held.send_replace(Held::By(2));
    assert!(!holding.is_held());
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_cannot_be_renewed_is_given_up() {
    // No renewal comes, as with a volume that hangs.
    let (held, lost) = watch::channel(Held::Since(Instant::now()));
    let guard = Arc::new(Mutex::new(None));
    let mut keeper = Keeper {
        lost,
        guard,
        check: Arc::default(),
        task: tokio::spawn(std::future::pending()),
    };
    let begun = Instant::now();
    assert!(matches!(keeper.lost().await, StateError::Expired));
    assert_eq!(begun.elapsed().as_secs(), EXPIRE.as_secs());
    drop(held);
}

#[test]
fn a_volume_that_cannot_be_written_says_whose_it_is() {
    let error = prepare(Path::new("/proc/nowhere")).unwrap_err().to_string();
    assert!(error.contains("/proc belongs to 0:0"), "{error}");
}

#[test]
fn a_full_volume_is_said_with_the_next_renewal_and_the_end_can_still_be_written() {
    const TEST: &str =
        "workspace::state::tests::a_full_volume_is_said_with_the_next_renewal_and_the_end_can_still_be_written";
    let Some(disk) = xtask::small_disk(TEST, "1m").unwrap() else {
        return;
    };
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        prepare(&disk).unwrap();
        let mut keeper = Guard::take(&disk, 1, "pod-a").await.unwrap().keep();
        let mut filling = File::create(disk.join("filling")).unwrap();
        while filling.write_all(&[0; 4096]).is_ok() {}
        keeper.check();
        let lost = timeout(Duration::from_mins(1), keeper.lost()).await.unwrap();
        assert!(matches!(lost, StateError::Full), "{lost}");
        assert!(keeper.holding().is_held(), "nobody else has it");
        let error = prepare(&disk).unwrap_err().to_string();
        assert!(
            error.contains("workspace.size") && !error.contains("belongs to"),
            "{error}"
        );
    });
}
