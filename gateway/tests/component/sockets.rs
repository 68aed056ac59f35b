//! Clients that follow a session on a WebSocket, and many clients at once.

use futures::StreamExt as _;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream,
    tungstenite::{Error, Message, client::IntoClientRequest as _},
};

use crate::support::{
    Served, end, record, records,
    runner::{Runner, hello},
    soon,
    sse::Events,
};

/// Clients on one session, and reconnects of one client. The whole numbers are asked for by `AGENTIC_CLIENTS=full`.
fn numbers() -> (usize, usize) {
    match std::env::var("AGENTIC_CLIENTS").as_deref() {
        Ok("full") => (200, 1000),
        _ => (200, 150),
    }
}

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

async fn open(served: &Served, query: &str, token: Option<&str>) -> Result<Socket, Error> {
    let url = format!(
        "ws://{}/api/projects/team-a/agentic-sessions/s/ws{query}",
        served.address
    );
    let mut request = url.into_client_request().unwrap();
    if let Some(token) = token {
        request
            .headers_mut()
            .insert("authorization", format!("Bearer {token}").parse().unwrap());
    }
    Ok(tokio_tungstenite::connect_async(request).await?.0)
}

/// The next message; `None` after the close.
async fn next(socket: &mut Socket) -> Option<Value> {
    loop {
        match soon("a message", socket.next()).await? {
            Ok(Message::Text(text)) => return Some(serde_json::from_str(&text).unwrap()),
            Ok(Message::Close(_)) => return None,
            Ok(_) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

async fn served() -> Served {
    let served = Served::new().await;
    served.cluster.running("s", "u", "p1");
    served.cluster.runner("t1", Some("p1"));
    served.cluster.caller("token", "ann");
    served.cluster.allow("ann", &["get"], "team-a");
    served
}

async fn runner(served: &Served) -> Runner {
    Runner::admitted(served.address, &hello("s", "u", "p1"), "t1").await.0
}

#[tokio::test]
async fn a_socket_is_told_what_a_stream_is_told_to_the_end() {
    let served = served().await;
    let long = record(4, protocol::Kind::Cli, &"ü".repeat(400_000));
    let mut runner = runner(&served).await;
    runner.deliver(&records(1, 3)).await;
    let mut socket = open(&served, "", Some("token")).await.unwrap();
    runner
        .deliver(&[vec![long.clone()], records(5, 6), vec![end(7)]].concat())
        .await;
    served.cluster.set(
        "team-a",
        "s",
        "u",
        &json!({"phase": "Completed", "reason": "Completed", "attempt": 1}),
    );
    let events = Events::of(&served, "s", "token", None).await.rest().await;
    let mut told = Vec::new();
    while let Some(message) = next(&mut socket).await {
        told.push(message);
    }
    let numbered =
        |events: &[Value]| -> Vec<Value> { events.iter().filter(|event| event["id"].is_string()).cloned().collect() };
    let streamed = events
        .iter()
        .map(|event| json!({"event": event.name, "id": event.id, "data": event.json()}));
    let told_numbered = numbered(&told);
    assert_eq!(told_numbered, numbered(&streamed.collect::<Vec<_>>()));
    assert_eq!(told_numbered[3]["data"], serde_json::from_str::<Value>(&long).unwrap());
    assert!(
        told.iter()
            .any(|event| event["event"] == "phase" && event["data"]["phase"] == "Completed")
    );
    assert_eq!(
        told.last().unwrap(),
        &json!({"event": "close", "data": {"reason": "ended", "lastSeq": 7}})
    );

    let mut socket = open(&served, "?cursor=u/6", Some("token")).await.unwrap();
    let mut seen = Vec::new();
    while let Some(message) = next(&mut socket).await {
        seen.push(message["event"].as_str().unwrap().to_owned());
    }
    assert_eq!(seen.iter().filter(|event| *event == "end").count(), 1);
    assert!(!seen.contains(&"cli".to_owned()));
}

#[tokio::test]
async fn a_socket_that_may_not_be_is_refused_before_the_upgrade() {
    let served = served().await;
    for (query, token, code) in [
        ("", None, 401),
        ("", Some("wrong"), 401),
        ("?cursor=garbage", Some("token"), 400),
    ] {
        match open(&served, query, token).await {
            Err(Error::Http(response)) => assert_eq!(response.status().as_u16(), code),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_page_shows_its_token_as_a_subprotocol_which_is_never_repeated() {
    let served = served().await;
    let ask = async |offer: &str| {
        let url = format!("ws://{}/api/projects/team-a/agentic-sessions/s/ws", served.address);
        let mut request = url.into_client_request().unwrap();
        request
            .headers_mut()
            .insert("sec-websocket-protocol", offer.parse().unwrap());
        tokio_tungstenite::connect_async(request).await
    };
    let bearer = "base64url.bearer.authorization.k8s.io.dG9rZW4";
    let (mut socket, answer) = ask(&format!("events.agentic.v1, {bearer}")).await.unwrap();
    assert_eq!(answer.headers()["sec-websocket-protocol"], "events.agentic.v1");
    assert_eq!(next(&mut socket).await.unwrap()["event"], "phase");
    // A wrong one, none, and one without the name of what is spoken.
    for (offer, code) in [
        ("events.agentic.v1, base64url.bearer.authorization.k8s.io.d3Jvbmc", 401),
        ("events.agentic.v1", 401),
        (bearer, 400),
    ] {
        let Err(Error::Http(answer)) = ask(offer).await else {
            panic!("{offer}")
        };
        assert_eq!(answer.status().as_u16(), code, "{offer}");
        assert!(!format!("{answer:?}").contains("dG9rZW4"), "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hundreds_of_clients_of_one_session_each_get_everything_once() {
    let served = served().await;
    let mut runner = runner(&served).await;
    runner.deliver(&records(1, 50)).await;
    let (clients, _) = numbers();
    println!("{clients} clients, half of them sockets; AGENTIC_CLIENTS=full for more");
    let mut readers = Vec::new();
    for number in 0..clients {
        if number % 2 == 0 {
            let events = Events::of(&served, "s", "token", None).await;
            readers.push(tokio::spawn(async move {
                let events = events.rest().await;
                events
                    .iter()
                    .filter_map(crate::support::sse::Event::seq)
                    .collect::<Vec<_>>()
            }));
        } else {
            let mut socket = open(&served, "", Some("token")).await.unwrap();
            readers.push(tokio::spawn(async move {
                let mut seen = Vec::new();
                while let Some(message) = next(&mut socket).await {
                    seen.extend(
                        message["id"]
                            .as_str()
                            .map(|id| id.rsplit_once('/').unwrap().1.parse::<u64>().unwrap()),
                    );
                }
                seen
            }));
        }
    }
    for seq in 51..=99 {
        runner.deliver(&records(seq, seq)).await;
    }
    runner.deliver(&[end(100)]).await;
    served
        .cluster
        .set("team-a", "s", "u", &json!({"phase": "Completed", "attempt": 1}));
    let wanted: Vec<u64> = (1..=100).collect();
    for reader in readers {
        assert_eq!(soon("the end", reader).await.unwrap(), wanted);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reconnects_again_and_again_misses_and_repeats_nothing() {
    let served = served().await;
    let mut runner = runner(&served).await;
    let (_, reconnects) = numbers();
    println!("{reconnects} reconnects; AGENTIC_CLIENTS=full for 1000");
    let (mut cursor, mut seen) = (0, Vec::new());
    for round in 1..=reconnects as u64 {
        let last = round
            .checked_sub(1)
            .filter(|_| cursor > 0)
            .map(|_| format!("u/{cursor}"));
        let mut events = Events::of(&served, "s", "token", last.as_deref()).await;
        runner.deliver(&records(2 * round - 1, 2 * round)).await;
        // Of two records one is read, then the client is gone; the other is there when it comes back.
        let seq = events.wait("cli").await.seq().unwrap();
        seen.push(seq);
        cursor = seq;
    }
    let mut events = Events::of(&served, "s", "token", Some(&format!("u/{cursor}"))).await;
    while seen.len() < 2 * reconnects {
        seen.push(events.wait("cli").await.seq().unwrap());
    }
    assert_eq!(seen, (1..=2 * reconnects as u64).collect::<Vec<_>>());
    drop(events);
    let metrics = async {
        loop {
            let text = served.gateway.metrics.text().unwrap();
            if text
                .lines()
                .any(|line| line.starts_with("agentic_gateway_streams") && line.ends_with(" 0"))
            {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    Box::pin(soon("all streams being let go", metrics)).await;
}
