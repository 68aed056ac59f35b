//! A gateway that says anything at all.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _};
use protocol::Outcome;
use protocol::frame::{Ack, GatewayFrame, Interrupt, RunnerFrame, UserMessage, Welcome};
use protocol::report::Delivery;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use runner::config::{Config, Gateway};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Duration, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{self, Message};

use super::mutate::mutate;
use super::{dice, each};
use crate::common::{DEADLINE, Session, script, text};
use crate::pod::{agent_container, config, drive};

/// Longest silence that a mad one bears, milliseconds; now and then one bears any.
const PATIENCE: u64 = 1_000;

/// It answers each frame with something that was changed, until it has enough of it, and is a good one in the end.
async fn mad_gateway(kept: Arc<Mutex<Vec<String>>>, seed: u64, mad: u32) -> Gateway {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}/", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let mut random = StdRng::seed_from_u64(seed);
        for connection in 0.. {
            let Ok((stream, _)) = listener.accept().await else {
                return;
            };
            let Ok(mut socket) = tokio_tungstenite::accept_async(stream).await else {
                continue;
            };
            let patience = (connection < mad && random.random_ratio(15, 16))
                .then(|| Duration::from_millis(random.random_range(0..PATIENCE)));
            while let Some(Ok(message)) = next(&mut socket, patience).await {
                let Message::Text(text) = message else { continue };
                let frame: RunnerFrame = serde_json::from_str(&text).unwrap();
                let answers = match frame {
                    _ if connection < mad => nonsense(&mut random),
                    RunnerFrame::Hello(hello) => {
                        // What the mad one seemed to have stored counts for nothing.
                        kept.lock().unwrap().clear();
                        let welcome = Welcome {
                            acked_seq: 0,
                            spool: Some(hello.spool),
                        };
                        vec![Message::text(
                            serde_json::to_string(&GatewayFrame::Welcome(welcome)).unwrap(),
                        )]
                    }
                    RunnerFrame::Records(records) => {
                        let mut kept = kept.lock().unwrap();
                        kept.extend(records.iter().map(|record| record.get().to_owned()));
                        let head: protocol::RecordHead = serde_json::from_str(kept.last().unwrap()).unwrap();
                        let ack = GatewayFrame::Ack(Ack { seq: head.seq });
                        vec![Message::text(serde_json::to_string(&ack).unwrap())]
                    }
                    _ => Vec::new(),
                };
                for answer in answers {
                    if socket.send(answer).await.is_err() {
                        break;
                    }
                }
            }
        }
    });
    Gateway { url, token_file: None }
}

async fn next(
    socket: &mut WebSocketStream<TcpStream>,
    patience: Option<Duration>,
) -> Option<Result<Message, tungstenite::Error>> {
    match patience {
        Some(patience) => timeout(patience, socket.next()).await.ok().flatten(),
        None => socket.next().await,
    }
}

fn nonsense(random: &mut StdRng) -> Vec<Message> {
    let frames = [
        GatewayFrame::Welcome(Welcome {
            acked_seq: random.random_range(0..9),
            spool: None,
        }),
        GatewayFrame::Ack(Ack {
            seq: random.random_range(0..9),
        }),
        GatewayFrame::Interrupt(Interrupt {
            id: "c-1".into(),
            turn: 7,
        }),
        GatewayFrame::UserMessage(UserMessage {
            id: "c-2".into(),
            text: "not in a one-shot".into(),
        }),
    ];
    let file = r#"{"file_request":{"id":"f","op":"read","path":"../../etc/passwd","offset":0,"length":9}}"#;
    let mut texts: Vec<String> = frames
        .iter()
        .map(|frame| serde_json::to_string(frame).unwrap())
        .collect();
    texts.push(file.to_owned());
    let mut messages = Vec::new();
    for _ in 0..random.random_range(1..4) {
        let mut bytes = texts.choose(random).unwrap().clone().into_bytes();
        if random.random_ratio(2, 3) {
            mutate(random, &mut bytes);
        }
        messages.push(match (random.random_range(0..8), String::from_utf8(bytes)) {
            (0, _) => Message::Ping(Bytes::from_static(b"?")),
            (1, _) => Message::Close(None),
            (_, Ok(text)) => Message::text(text),
            (_, Err(error)) => Message::binary(error.into_bytes()),
        });
    }
    messages
}

#[tokio::test]
async fn a_gateway_that_says_anything_at_all_keeps_nobody_from_working_and_a_good_one_gets_everything() {
    let (mut random, cases) = dice(6);
    let delivered = each(&mut random, cases, keeps_nobody_from_working).await;
    assert!(delivered.contains(&true), "a good one is reached in time");
}

/// Whether a good one was reached in time.
async fn keeps_nobody_from_working(case: u32, seed: u64) -> bool {
    let session = Session::new().await;
    let kept = Arc::default();
    let mut config = Config {
        gateway: Some(mad_gateway(Arc::clone(&kept), seed, 3).await),
        ..config(&session, &script("MARK", &[text("Done.")]))
    };
    // Others are tried meanwhile.
    config.limits.timeout = Some(10 * DEADLINE.as_secs());
    let _container = agent_container(&session);
    assert_eq!(drive(config).await, Outcome::Succeeded, "case {case}");
    assert_eq!(session.report().result, "Done.", "case {case}");
    session.assert_prompt_once("MARK");
    let spooled: Vec<_> = session
        .records()
        .iter()
        .map(|record| serde_json::to_string(record).unwrap())
        .collect();
    let kept = kept.lock().unwrap();
    assert_eq!(*kept, spooled[spooled.len() - kept.len()..], "case {case}");
    // A number of the mad one's may by chance have been that of the last record. And the time that the last records are
    // given at the end may be over before a good one is reached: then the report says so.
    let events = session.report().events;
    let complete = kept.last().is_some_and(|last| last.contains("\"kind\":\"end\""));
    assert!(
        complete || kept.is_empty() || events != Delivery::Delivered,
        "case {case}: {events:?}"
    );
    complete
}
