//! What becomes of a stream while its caller's rights change. The clock is the test's, so nothing here may use sockets.

use std::{sync::Arc, time::Duration};

use axum::{Router, body::Body};
use futures::StreamExt as _;
use gateway::{Gateway, store::memory::MemoryLog};
use http::Request;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use crate::support::cluster::Cluster;

async fn served() -> (Cluster, Router) {
    let cluster = Cluster::start().await;
    cluster.caller("token", "ann");
    cluster.allow("ann", &["get"], "team-a");
    cluster.running("s", "u", "p1");
    let log = Arc::new(MemoryLog::default());
    let gateway = Gateway::new(cluster.client_without_sockets(), log, CancellationToken::new());
    (cluster, gateway::router(gateway))
}

async fn events(router: &Router) -> impl Iterator<Item = (Duration, String)> {
    let request = Request::get("/api/projects/team-a/agentic-sessions/s/events")
        .header("authorization", "Bearer token")
        .body(Body::empty())
        .unwrap();
    let response = router.clone().oneshot(request).await.unwrap();
    assert_eq!(response.status(), 200);
    let begun = Instant::now();
    let chunks = response.into_body().into_data_stream().take(20).map(move |chunk| {
        let text = String::from_utf8(chunk.unwrap().to_vec()).unwrap();
        (begun.elapsed(), text)
    });
    chunks.collect::<Vec<_>>().await.into_iter()
}

#[tokio::test(start_paused = true)]
async fn a_stream_ends_within_two_minutes_after_its_caller_lost_the_right_to_read() {
    let (cluster, router) = served().await;
    let deny = async {
        tokio::time::sleep(Duration::from_secs(10)).await;
        cluster.deny("ann", "get", "team-a");
    };
    let (events, ()) = tokio::join!(events(&router), deny);
    let (when, last) = events.last().unwrap();
    assert!(last.contains(r#"{"lastSeq":0,"reason":"forbidden"}"#), "{last}");
    assert!(when <= Duration::from_mins(2), "{when:?}");
}

#[tokio::test(start_paused = true)]
async fn a_stream_ends_within_two_minutes_after_its_token_was_revoked() {
    let (cluster, router) = served().await;
    let revoke = async {
        tokio::time::sleep(Duration::from_secs(10)).await;
        cluster.revoke("token");
    };
    let (events, ()) = tokio::join!(events(&router), revoke);
    assert!(events.last().unwrap().1.contains("forbidden"));
}

#[tokio::test(start_paused = true)]
async fn a_stream_in_which_nothing_happens_says_so_and_outlives_the_api_server() {
    let (cluster, router) = served().await;
    let break_down = async {
        tokio::time::sleep(Duration::from_secs(10)).await;
        cluster.break_down();
    };
    let (events, ()) = tokio::join!(events(&router), break_down);
    let events: Vec<_> = events.collect();
    assert_eq!(events.len(), 20);
    assert!(
        events.iter().skip(1).all(|(_, text)| text == ": heartbeat\n\n"),
        "{events:?}"
    );
}
