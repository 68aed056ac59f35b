use std::{net::SocketAddr, time::Duration};

use futures::SinkExt as _;
use gateway::store::PageSize;
use protocol::{
    Kind,
    frame::{Ack, GatewayFrame, Hello, Welcome, close},
};
use rstest::rstest;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    time::{Instant, sleep_until},
};

use crate::support::{
    Served,
    cluster::Cluster,
    record, records,
    runner::{Runner, hello},
    soon,
};

/// A session of pod `p1` with token `t1`.
async fn served() -> Served {
    let served = Served::new().await;
    served.cluster.running("s", "u", "p1");
    served.cluster.runner("t1", Some("p1"));
    served
}

async fn stored(served: &Served) -> Vec<String> {
    let page = PageSize {
        records: usize::MAX >> 1,
        bytes: usize::MAX,
    };
    let records = served.gateway.log.read("u", 0, page).await.unwrap();
    records
        .into_iter()
        .map(|record| String::from_utf8(record.whole().unwrap().to_vec()).unwrap())
        .collect()
}

#[tokio::test]
async fn records_are_acknowledged_once_they_are_stored_byte_for_byte() {
    let served = served().await;
    let (mut runner, welcome) = Runner::admitted(served.address, &hello("s", "u", "p1"), "t1").await;
    assert_eq!(
        welcome,
        Welcome {
            acked_seq: 0,
            spool: None
        }
    );
    let sent = records(1, 3);
    assert_eq!(runner.deliver(&sent[..2]).await, 2);
    assert_eq!(runner.deliver(&sent[2..]).await, 3);
    assert_eq!(stored(&served).await, sent);
}

#[tokio::test]
async fn a_runner_that_comes_back_is_told_how_far_its_spool_is_stored_and_may_resend() {
    let served = served().await;
    let hello = hello("s", "u", "p1");
    let (mut runner, _) = Runner::admitted(served.address, &hello, "t1").await;
    assert_eq!(runner.deliver(&records(1, 5)).await, 5);
    drop(runner);
    let (mut runner, welcome) = Runner::admitted(served.address, &hello, "t1").await;
    assert_eq!((welcome.acked_seq, welcome.spool.as_deref()), (5, Some("spool-1")));
    assert_eq!(runner.deliver(&records(2, 6)).await, 6);
    assert_eq!(stored(&served).await, records(1, 6));
}

#[tokio::test]
async fn other_bytes_for_a_stored_seq_are_a_conflict_and_change_nothing() {
    let served = served().await;
    let (mut runner, _) = Runner::admitted(served.address, &hello("s", "u", "p1"), "t1").await;
    runner.deliver(&records(1, 2)).await;
    // The same length: only the checksum tells them apart.
    runner
        .send(&[record(2, Kind::Cli, "rEcord 2"), record(3, Kind::Cli, "record 3")])
        .await;
    assert!(matches!(runner.frame().await, GatewayFrame::Conflict(Ack { seq: 2 })));
    assert!(matches!(runner.frame().await, GatewayFrame::Ack(Ack { seq: 3 })));
    assert_eq!(stored(&served).await, records(1, 3));
    let metrics = served.gateway.metrics.text().unwrap();
    assert!(
        metrics.contains(r#"agentic_gateway_records_total{result="conflict"} 1"#),
        "{metrics}"
    );
}

#[tokio::test]
async fn acknowledgements_stop_before_a_hole_and_pass_it_when_it_is_filled() {
    let served = served().await;
    let hello = hello("s", "u", "p1");
    let (mut runner, _) = Runner::admitted(served.address, &hello, "t1").await;
    assert_eq!(runner.deliver(&records(1, 2)).await, 2);
    assert_eq!(runner.deliver(&records(4, 5)).await, 2);
    assert_eq!(
        stored(&served).await,
        records(1, 2),
        "readers are not shown what is behind a hole"
    );
    drop(runner);
    let (mut runner, welcome) = Runner::admitted(served.address, &hello, "t1").await;
    assert_eq!(welcome.acked_seq, 2);
    assert_eq!(runner.deliver(&records(3, 3)).await, 5);
    assert_eq!(stored(&served).await, records(1, 5));
}

#[tokio::test]
async fn a_new_spool_is_known_as_such_until_its_first_record_is_stored() {
    let served = served().await;
    let first = hello("s", "u", "p1");
    let (mut runner, _) = Runner::admitted(served.address, &first, "t1").await;
    runner.deliver(&records(1, 3)).await;
    let second = Hello {
        spool: "spool-2".to_owned(),
        ..first
    };
    for _ in 0..2 {
        let (_, welcome) = Runner::admitted(served.address, &second, "t1").await;
        assert_eq!((welcome.acked_seq, welcome.spool.as_deref()), (3, Some("spool-1")));
    }
    let (mut runner, _) = Runner::admitted(served.address, &second, "t1").await;
    assert_eq!(runner.deliver(&[record(4, Kind::Gap, "gap")]).await, 4);
    drop(runner);
    let (_, welcome) = Runner::admitted(served.address, &second, "t1").await;
    assert_eq!((welcome.acked_seq, welcome.spool.as_deref()), (4, Some("spool-2")));
}

#[rstest]
#[case::that_knows_what_is_missing(r#"{"from":4,"to":6}"#)]
#[case::that_goes_on_behind_a_longer_log("{}")]
#[tokio::test]
async fn a_spool_that_takes_over_declares_the_seqs_that_nobody_has(#[case] body: &str) {
    let served = served().await;
    let first = hello("s", "u", "p1");
    let (mut runner, _) = Runner::admitted(served.address, &first, "t1").await;
    runner.deliver(&records(1, 3)).await;
    let second = Hello {
        spool: "spool-2".to_owned(),
        ..first
    };
    let (mut runner, _) = Runner::admitted(served.address, &second, "t1").await;
    assert_eq!(runner.deliver(&records(8, 8)).await, 3);
    assert_eq!(runner.deliver(&[gap(7, body)]).await, 8);
    assert_eq!(
        stored(&served).await,
        [records(1, 3), vec![gap(7, body)], records(8, 8)].concat()
    );
}

#[tokio::test]
async fn a_line_that_was_too_long_is_no_licence_to_leave_records_out() {
    let served = served().await;
    let (mut runner, _) = Runner::admitted(served.address, &hello("s", "u", "p1"), "t1").await;
    assert_eq!(runner.deliver(&[gap(3, r#"{"length":99999999}"#)]).await, 0);
}

fn gap(seq: u64, body: &str) -> String {
    format!(r#"{{"seq":{seq},"attempt":1,"turn":1,"ts":"2026-01-02T03:04:05Z","kind":"gap","body":{body}}}"#)
}

#[tokio::test]
async fn a_newer_pod_takes_over_and_the_older_one_is_told_and_stores_nothing_more() {
    let served = served().await;
    let (mut old, _) = Runner::admitted(served.address, &hello("s", "u", "p1"), "t1").await;
    old.deliver(&records(1, 1)).await;
    served.cluster.running("s", "u", "p2");
    served.cluster.runner("t2", Some("p2"));
    let (mut new, welcome) = Runner::admitted(served.address, &hello("s", "u", "p2"), "t2").await;
    assert_eq!(welcome.acked_seq, 1);
    // It may have been closed already.
    let late = format!(r#"{{"records":[{}]}}"#, record(2, Kind::Cli, "late"));
    let _ = old
        .socket
        .send(tokio_tungstenite::tungstenite::Message::text(late))
        .await;
    assert_eq!(old.closed().await, close::SUPERSEDED);
    assert_eq!(new.deliver(&records(2, 2)).await, 2);
    assert_eq!(stored(&served).await, records(1, 2));
    let mut old = Runner::open(served.address, "s", Some("t1")).await;
    assert_eq!(old.closed().await, close::NOT_THIS_POD);
}

#[tokio::test]
async fn a_second_connection_of_a_pod_replaces_its_first() {
    let served = served().await;
    let hello = hello("s", "u", "p1");
    let (mut first, _) = Runner::admitted(served.address, &hello, "t1").await;
    let (mut second, _) = Runner::admitted(served.address, &hello, "t1").await;
    assert_eq!(first.closed().await, close::SUPERSEDED);
    assert_eq!(second.deliver(&records(1, 1)).await, 1);
}

#[tokio::test]
async fn an_older_pod_whose_look_at_the_status_took_too_long_does_not_take_the_session_back() {
    let served = served().await;
    served.cluster.runner("t2", Some("p2"));
    // It looks once to be let in, and once more to be admitted.
    served.cluster.hold_read(1);
    let mut old = Runner::open(served.address, "s", Some("t1")).await;
    old.hello(&hello("s", "u", "p1")).await;
    soon("the older pod looking", served.cluster.read_is_held()).await;
    served.cluster.running("s", "u", "p2");
    let (mut new, _) = Runner::admitted(served.address, &hello("s", "u", "p2"), "t2").await;
    served.cluster.release_read();
    assert_eq!(old.closed().await, close::NOT_THIS_POD);
    assert_eq!(new.deliver(&records(1, 2)).await, 2);
}

#[tokio::test]
async fn a_pod_that_the_status_no_longer_names_is_closed_before_the_next_one_comes() {
    let served = served().await;
    let (mut runner, _) = Runner::admitted(served.address, &hello("s", "u", "p1"), "t1").await;
    served.cluster.running("s", "u", "p2");
    assert_eq!(runner.closed().await, close::SUPERSEDED);
}

#[tokio::test]
async fn the_pod_of_an_ended_run_may_still_deliver() {
    let served = served().await;
    let (mut runner, _) = Runner::admitted(served.address, &hello("s", "u", "p1"), "t1").await;
    served
        .cluster
        .set("team-a", "s", "u", &json!({"phase": "Completed", "attempt": 1}));
    let target = gateway::sessions::Target::new("team-a", "s").unwrap();
    let view = gateway::sessions::View::default();
    let mut seen = served.gateway.watched.follow(&target, view);
    soon(
        "the watch",
        seen.wait_for(|view| view.as_ref().is_some_and(|view| view.phase.is_terminal())),
    )
    .await
    .unwrap();
    assert_eq!(runner.deliver(&records(1, 1)).await, 1);
}

#[tokio::test]
async fn a_deleted_session_closes_its_runner_for_good() {
    let served = served().await;
    let (mut runner, _) = Runner::admitted(served.address, &hello("s", "u", "p1"), "t1").await;
    served.cluster.delete("team-a", "s");
    assert_eq!(runner.closed().await, close::GONE);
}

#[rstest]
#[case::no_token("s", None, close::FORBIDDEN)]
#[case::unknown_token("s", Some("nobody's"), close::FORBIDDEN)]
#[case::token_of_a_user("s", Some("user"), close::FORBIDDEN)]
#[case::token_bound_to_no_pod("s", Some("unbound"), close::FORBIDDEN)]
#[case::another_pod("s", Some("t2"), close::NOT_THIS_POD)]
#[case::pod_of_a_session_whose_name_begins_with_this_one("s", Some("t9"), close::NOT_THIS_POD)]
#[case::no_pod_yet("new", Some("t1"), close::NOT_THIS_POD)]
#[case::no_such_session("gone", Some("t1"), close::GONE)]
#[case::no_such_name_possible("a%2Fb", Some("t1"), close::GONE)]
#[tokio::test]
async fn a_runner_that_may_not_speak_is_told_why_by_the_close_code(
    #[case] session: &str,
    #[case] token: Option<&str>,
    #[case] code: u16,
) {
    let served = served().await;
    served.cluster.running("s-9", "u9", "p9");
    served.cluster.set("team-a", "new", "u3", &json!({"phase": "Creating"}));
    served.cluster.caller("user", "somebody");
    served.cluster.runner("unbound", None);
    served.cluster.runner("t2", Some("p2"));
    served.cluster.runner("t9", Some("p9"));
    let mut runner = Runner::open(served.address, session, token).await;
    assert_eq!(runner.closed().await, code);
}

#[tokio::test]
async fn a_runner_is_asked_to_try_again_while_the_api_server_is_down() {
    let served = served().await;
    served.cluster.break_down();
    let mut runner = Runner::open(served.address, "s", Some("t1")).await;
    assert_eq!(runner.closed().await, 1013);
}

#[rstest]
#[case::another_version(Hello { protocol: 99, ..hello("s", "u", "p1") }, close::PROTOCOL)]
#[case::another_name(hello("s-9", "u", "p1"), close::PROTOCOL)]
#[case::another_pod(hello("s", "u", "p2"), close::PROTOCOL)]
#[case::an_earlier_session_of_that_name(hello("s", "u0", "p1"), close::GONE)]
#[tokio::test]
async fn a_hello_that_does_not_fit_is_refused(#[case] hello: Hello, #[case] code: u16) {
    let served = served().await;
    let mut runner = Runner::open(served.address, "s", Some("t1")).await;
    runner.hello(&hello).await;
    assert_eq!(runner.closed().await, code);
}

#[rstest]
#[case::not_json("nonsense".to_owned())]
#[case::unknown_frame(r#"{"future":1}"#.to_owned())]
#[case::no_record(r#"{"records":[{"seq":1}]}"#.to_owned())]
#[case::seq_zero(format!(r#"{{"records":[{}]}}"#, record(0, Kind::Cli, "x")))]
#[case::seq_too_large(format!(r#"{{"records":[{}]}}"#, record(1 << 32, Kind::Cli, "x")))]
#[case::out_of_order(format!(r#"{{"records":[{},{}]}}"#, record(2, Kind::Cli, "x"), record(1, Kind::Cli, "x")))]
#[case::seq_twice(r#"{"records":[{"seq":1,"seq":2,"attempt":1,"turn":1,"ts":"2026-01-02T03:04:05Z","kind":"cli","body":{}}]}"#.to_owned())]
#[case::a_gap_that_ends_behind_itself(format!(r#"{{"records":[{}]}}"#, gap(2, r#"{"from":1,"to":9}"#)))]
#[case::a_long_piece_of_a_file(format!(r#"{{"file_chunk":{{"id":"x","offset":0,"data":"{}"}}}}"#, "A".repeat(350_000)))]
#[case::a_long_answer(format!(r#"{{"command_result":{{"id":"x","error":"{}"}}}}"#, "A".repeat(5 << 20)))]
#[case::second_hello(format!(r#"{{"hello":{}}}"#, serde_json::to_string(&hello("s", "u", "p1")).unwrap()))]
#[tokio::test]
async fn what_breaks_the_protocol_closes_the_connection_and_is_not_stored(#[case] frame: String) {
    let served = served().await;
    let (mut runner, _) = Runner::admitted(served.address, &hello("s", "u", "p1"), "t1").await;
    runner.text(frame).await;
    assert_eq!(runner.closed().await, close::PROTOCOL);
    assert!(stored(&served).await.is_empty());
}

#[tokio::test]
async fn records_before_hello_are_refused() {
    let served = served().await;
    let mut runner = Runner::open(served.address, "s", Some("t1")).await;
    runner.send(&records(1, 1)).await;
    assert_eq!(runner.closed().await, close::PROTOCOL);
}

#[tokio::test]
async fn the_longest_record_is_stored_and_a_message_beyond_the_limit_is_refused() {
    let served = served().await;
    let (mut runner, _) = Runner::admitted(served.address, &hello("s", "u", "p1"), "t1").await;
    let frame = record(1, Kind::Cli, "").len();
    let longest = record(1, Kind::Cli, &"x".repeat(protocol::record::MAX_RECORD - frame));
    assert_eq!(longest.len(), protocol::record::MAX_RECORD);
    assert_eq!(runner.deliver(&[longest]).await, 1);
    let text = "x".repeat(protocol::frame::MAX_MESSAGE + 1);
    // The gateway may close while we still send.
    let _ = runner
        .socket
        .send(tokio_tungstenite::tungstenite::Message::text(text))
        .await;
    assert!(runner.next().await.is_err());
}

/// Bytes a second on a slow way.
const SLOW: f64 = 409_600.0;

/// A slow way to an address.
fn slow_way(to: SocketAddr) -> SocketAddr {
    let socket = TcpSocket::new_v4().unwrap();
    // What is buffered on the way shows nothing of how slow it is.
    socket.set_recv_buffer_size(64 << 10).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (near, _) = listener.accept().await.unwrap();
        let far = TcpStream::connect(to).await.unwrap();
        let (mut from_near, mut to_near) = near.into_split();
        let (mut from_far, mut to_far) = far.into_split();
        tokio::spawn(async move { tokio::io::copy(&mut from_far, &mut to_near).await });
        let mut piece = vec![0; 20 << 10];
        let (begun, mut passed) = (Instant::now(), 0);
        while let Ok(count @ 1..) = from_near.read(&mut piece).await {
            to_far.write_all(&piece[..count]).await.unwrap();
            passed += count;
            sleep_until(begun + Duration::from_secs_f64(passed as f64 / SLOW)).await;
        }
    });
    address
}

#[tokio::test]
async fn a_long_record_that_comes_slowly_and_steadily_is_waited_for() {
    let served = served().await;
    let way = slow_way(served.address);
    let (mut runner, _) = Runner::admitted(way, &hello("s", "u", "p1"), "t1").await;
    let long = record(1, Kind::Cli, &"x".repeat(16 << 20));
    assert_eq!(runner.deliver(&[long]).await, 1);
}

#[tokio::test]
async fn a_gateway_that_stops_acknowledges_what_it_stored_and_says_that_it_goes() {
    let folder = tempfile::tempdir().unwrap();
    let log = gateway::store::sqlite::SqliteLog::open(&folder.path().join("events.db")).unwrap();
    let cluster = Cluster::start().await;
    let served = Served::on(cluster.client(), cluster, std::sync::Arc::new(log)).await;
    served.cluster.running("s", "u", "p1");
    served.cluster.runner("t1", Some("p1"));
    let (mut runner, _) = Runner::admitted(served.address, &hello("s", "u", "p1"), "t1").await;
    assert_eq!(runner.deliver(&records(1, 9)).await, 9);
    let stop = tokio::spawn(served.stop());
    assert_eq!(runner.closed().await, 1001);
    soon("the stop", stop).await.unwrap();
}
