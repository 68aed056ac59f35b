//! What "acknowledged" means, seen from outside.

use crate::support::{
    cluster::Cluster,
    process::Process,
    records,
    runner::{Runner, hello},
    soon,
};

const FRAMES: u64 = 20;

#[derive(Debug, PartialEq, Eq)]
enum Seen {
    /// The log was written to.
    Written,
    /// What was written is on disk.
    Synced,
    /// A frame acknowledged.
    Acknowledged(u64),
}

/// What a line of `strace -f -y` says. A call that was interrupted by another thread's has its end in a line of its own.
fn seen(line: &str, syncing: &mut bool) -> Option<Seen> {
    let is_log = line.contains("events.db-wal>");
    if line.contains("pwrite64(") && is_log {
        return Some(Seen::Written);
    }
    if line.contains("fdatasync(") && is_log {
        if line.contains("<unfinished") {
            *syncing = true;
            return None;
        }
        assert!(line.ends_with("= 0"), "{line}");
        return Some(Seen::Synced);
    }
    if line.contains("fdatasync resumed>") && *syncing {
        *syncing = false;
        assert!(line.ends_with("= 0"), "{line}");
        return Some(Seen::Synced);
    }
    let (_, ack) = line.split_once(r#"{\"ack\":{\"seq\":"#)?;
    let digits: String = ack.chars().take_while(char::is_ascii_digit).collect();
    Some(Seen::Acknowledged(digits.parse().unwrap()))
}

#[tokio::test]
async fn before_each_acknowledgement_the_log_is_written_and_synced() {
    tokio::task::spawn_blocking(xtask::packages::ensure_strace)
        .await
        .unwrap()
        .expect("strace is needed");
    let cluster = Cluster::start().await;
    cluster.running("s", "u", "p1");
    cluster.runner("t1", Some("p1"));
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace");
    let calls = "trace=pwrite64,fdatasync,fsync,write,writev,sendto,sendmsg";
    // -D: the gateway is our child and the tracer is not, so that neither outlives this test.
    let strace = [
        "strace",
        "-D",
        "-f",
        "-y",
        "-s",
        "64",
        "-e",
        calls,
        "-o",
        trace.to_str().unwrap(),
    ];
    let mut process = Process::start_under(&strace, &cluster, folder.path()).await;
    let pid = process.child.id().unwrap();
    let traced = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    assert_eq!(traced.file_name().unwrap(), "agentic-gateway");
    let (mut runner, _) = Runner::admitted(process.address, &hello("s", "u", "p1"), "t1").await;
    for seq in 1..=FRAMES {
        assert_eq!(runner.deliver(&records(seq, seq)).await, seq);
    }
    let text = soon("the trace", async {
        loop {
            let text = String::from_utf8_lossy(&std::fs::read(&trace).unwrap()).into_owned();
            if text.contains(&format!(r#"{{\"ack\":{{\"seq\":{FRAMES}}}"#)) {
                return text;
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
    let (mut written, mut synced, mut acknowledged, mut syncing) = (false, false, 0, false);
    for line in text.lines() {
        match seen(line, &mut syncing) {
            Some(Seen::Written) => (written, synced) = (true, false),
            Some(Seen::Synced) => synced = true,
            Some(Seen::Acknowledged(seq)) => {
                assert!(
                    written && synced,
                    "seq {seq} acknowledged, written: {written}, synced: {synced}"
                );
                (written, synced) = (false, false);
                acknowledged = seq;
            }
            None => {}
        }
    }
    assert_eq!(acknowledged, FRAMES);
    process.child.kill().await.unwrap();
    eprintln!("{FRAMES} frames: before each acknowledgement a write to the log and an fdatasync that ended");
}
