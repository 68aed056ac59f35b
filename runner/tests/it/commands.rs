//! Commands of the gateway over connections that break: each is carried out once, and answered until that arrives.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use futures::{SinkExt as _, StreamExt as _};
use protocol::frame::{
    Ack, CommandResult, EndSession, GatewayFrame, Hello, Interrupt, PermissionResponse, RunnerFrame, UserMessage,
    Welcome,
};
use protocol::{Kind, Outcome, RecordHead};
use runner::config::{Config, Gateway};
use serde_json::value::RawValue;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

use crate::common::{Session, bash, eventually, script, text};
use crate::pod::{agent_container, config, drive};

/// A gateway that asks for what was not answered, on each connection again.
#[derive(Default)]
pub struct Asking {
    pub commands: Vec<GatewayFrame>,
    /// What was stored, and seqs that came again with other bytes.
    pub records: BTreeMap<u64, String>,
    pub conflicts: Vec<u64>,
    pub answers: BTreeMap<String, Vec<CommandResult>>,
    /// Connections that are broken off as soon as the commands are sent.
    break_off: usize,
    hellos: Vec<Hello>,
    acked: u64,
}

pub type Shared = Arc<Mutex<Asking>>;

pub async fn gateway(asking: Asking) -> (Gateway, Shared) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}/", listener.local_addr().unwrap());
    let shared = Arc::new(Mutex::new(asking));
    let state = Arc::clone(&shared);
    tokio::spawn(async move {
        let mut serving: Option<JoinHandle<()>> = None;
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            // Whoever comes last is listened to, as by the real one.
            serving.iter().for_each(JoinHandle::abort);
            let state = Arc::clone(&state);
            serving = Some(tokio::spawn(async move {
                // A runner may die before it has said what it wants.
                if let Ok(socket) = tokio_tungstenite::accept_async(stream).await {
                    serve(socket, &state).await;
                }
            }));
        }
    });
    (Gateway { url, token_file: None }, shared)
}

async fn serve(mut socket: WebSocketStream<TcpStream>, state: &Shared) {
    let (mut asked, mut welcomed) = (0, false);
    let mut tick = tokio::time::interval(std::time::Duration::from_millis(20));
    loop {
        let mut frames = Vec::new();
        tokio::select! {
            message = socket.next() => match message {
                Some(Ok(Message::Text(text))) => frames.extend(take(&text, state)),
                Some(Ok(_)) => {}
                _ => return,
            },
            _ = tick.tick() => {}
        }
        let break_off = {
            let mut state = state.lock().unwrap();
            welcomed |= frames.iter().any(|frame| matches!(frame, GatewayFrame::Welcome(_)));
            let open = |command: &&String| !state.answers.contains_key(*command);
            let ids: Vec<String> = state.commands.iter().map(id).collect();
            let due = ids.iter().skip(asked).filter(open).count() * usize::from(welcomed);
            if welcomed && asked < ids.len() {
                frames.extend(state.commands[asked..].iter().map(again));
                asked = ids.len();
            }
            let break_off = due > 0 && state.break_off > 0;
            state.break_off -= usize::from(break_off);
            break_off
        };
        for frame in frames {
            let text = serde_json::to_string(&frame).unwrap();
            if socket.send(Message::Text(text.into())).await.is_err() {
                return;
            }
        }
        if break_off {
            return;
        }
    }
}

fn take(text: &str, state: &Shared) -> Option<GatewayFrame> {
    let mut state = state.lock().unwrap();
    match serde_json::from_str(text).unwrap() {
        RunnerFrame::Hello(hello) => {
            let spool = (state.acked > 0).then(|| hello.spool.clone());
            state.hellos.push(hello);
            let acked_seq = state.acked;
            Some(GatewayFrame::Welcome(Welcome { acked_seq, spool }))
        }
        RunnerFrame::Records(records) => {
            for record in &records {
                let head: RecordHead = serde_json::from_str(record.get()).unwrap();
                let stored = state.records.entry(head.seq).or_insert_with(|| record.get().to_owned());
                if stored != record.get() {
                    state.conflicts.push(head.seq);
                }
            }
            let head: RecordHead = serde_json::from_str(records.last()?.get()).unwrap();
            state.acked = state.acked.max(head.seq);
            Some(GatewayFrame::Ack(Ack { seq: head.seq }))
        }
        RunnerFrame::CommandResult(result) => {
            state.answers.entry(result.id.clone()).or_default().push(result);
            None
        }
        _ => None,
    }
}

pub fn id(command: &GatewayFrame) -> String {
    match command {
        GatewayFrame::UserMessage(command) => command.id.clone(),
        GatewayFrame::Interrupt(command) => command.id.clone(),
        GatewayFrame::EndSession(command) => command.id.clone(),
        GatewayFrame::PermissionResponse(command) => command.id.clone(),
        _ => String::new(),
    }
}

fn again(command: &GatewayFrame) -> GatewayFrame {
    serde_json::from_str(&serde_json::to_string(command).unwrap()).unwrap()
}

pub fn message(id: &str, text: &str) -> GatewayFrame {
    GatewayFrame::UserMessage(UserMessage {
        id: id.to_owned(),
        text: text.to_owned(),
    })
}

pub fn ask(state: &Shared, command: GatewayFrame) {
    state.lock().unwrap().commands.push(command);
}

async fn answer(state: &Shared, id: &str) -> CommandResult {
    let answer = || Some(state.lock().unwrap().answers.get(id)?.last()?.clone());
    eventually(&format!("an answer to {id}"), || answer().is_some()).await;
    answer().unwrap()
}

fn interactive(session: &Session, prompt: &str, gateway: Gateway) -> Config {
    let mut config = config(session, prompt);
    config.options.interactive = true;
    config.gateway = Some(gateway);
    config
}

#[tokio::test]
async fn a_command_that_is_asked_for_on_every_connection_is_carried_out_once() {
    let session = Session::new().await;
    let (gateway, state) = gateway(Asking {
        commands: vec![
            message("c-1", &script("NEXT", &[text("Two.")])),
            message("prompt", "not for clients"),
        ],
        break_off: 3,
        ..Asking::default()
    })
    .await;
    let config = interactive(&session, &script("MARK", &[text("One.")]), gateway);
    let _container = agent_container(&session);
    let driven = tokio::spawn(drive(config));
    let first = answer(&state, "c-1").await;
    assert!(first.error.is_none() && first.seq.is_some(), "{first:?}");
    assert!(answer(&state, "prompt").await.error.is_some());
    session
        .status("both are answered", |status| {
            status.phase == runner::status::Phase::Idle && status.queued == 0 && status.rounds == 2
        })
        .await;
    let question = PermissionResponse {
        id: "c-2".into(),
        request_id: "r-9".into(),
        response: RawValue::from_string(r#"{"behavior":"allow"}"#.into()).unwrap(),
    };
    ask(&state, GatewayFrame::PermissionResponse(question));
    let refused = answer(&state, "c-2").await;
    assert!(refused.error.unwrap().contains("no such question"));
    let interrupt = Interrupt {
        id: "c-3".into(),
        turn: 1,
    };
    ask(&state, GatewayFrame::Interrupt(interrupt));
    assert!(
        answer(&state, "c-3")
            .await
            .error
            .unwrap()
            .contains("turn 1 does not run")
    );
    ask(&state, GatewayFrame::EndSession(EndSession { id: "c-4".into() }));
    assert_eq!(driven.await.unwrap(), Outcome::EndedByRequest);
    assert!(answer(&state, "c-4").await.error.is_none());

    let sent: Vec<_> = session
        .bodies(Kind::User)
        .iter()
        .map(|user| user["command"].clone())
        .collect();
    assert_eq!(sent, ["prompt", "c-1"]);
    let last = session.model.requests().pop().unwrap();
    assert_eq!(["MARK", "NEXT"].map(|marker| last.user_messages_with(marker)), [1, 1]);
    let hellos = state.lock().unwrap().hellos.clone();
    assert!(hellos.len() >= 4, "{hellos:?}");
    assert_eq!(hellos[0].cli_version, None, "nobody has met the CLI yet");
}

#[tokio::test]
async fn a_command_that_a_dead_attempt_carried_out_is_answered_and_not_done_again_by_the_next() {
    let session = Session::new().await;
    let (first_gateway, first) = gateway(Asking::default()).await;
    let prompt = script("MARK", &[bash("touch began; sleep 100")]);
    let config = interactive(&session, &prompt, first_gateway);
    let _container = agent_container(&session);
    let driven = tokio::spawn(drive(config));
    let began = session.workspace().join("began");
    eventually("the tool runs", || began.exists()).await;
    let interrupt = || {
        GatewayFrame::Interrupt(Interrupt {
            id: "c-1".into(),
            turn: 1,
        })
    };
    ask(&first, interrupt());
    let done = answer(&first, "c-1").await;
    assert!(done.error.is_none());
    session.idle(1).await;
    ask(&first, GatewayFrame::EndSession(EndSession { id: "c-2".into() }));
    assert_eq!(driven.await.unwrap(), Outcome::EndedByRequest);

    let (second_gateway, second) = gateway(Asking {
        commands: vec![interrupt()],
        ..Asking::default()
    })
    .await;
    let _container = agent_container(&session);
    let next = Config {
        attempt: Some(2),
        run: 2,
        ..interactive(&session, &prompt, second_gateway)
    };
    let driven = tokio::spawn(drive(next));
    assert_eq!(answer(&second, "c-1").await, done, "as it was answered before");
    assert_eq!(
        second.lock().unwrap().hellos[0].cli_version.as_deref(),
        Some(runner::cli::TESTED_VERSION)
    );
    ask(&second, GatewayFrame::EndSession(EndSession { id: "c-3".into() }));
    assert_eq!(driven.await.unwrap(), Outcome::EndedByRequest);
    let stopped = session.events("stopping");
    assert_eq!(
        stopped.iter().filter(|event| event["cause"] == "stoppedByUser").count(),
        1
    );
}

#[tokio::test]
async fn who_is_told_that_another_pod_drives_the_session_looks_at_the_lease_at_once() {
    let session = Session::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}/", listener.local_addr().unwrap());
    let lease = session.state().join("lease");
    let began = session.workspace().join("began");
    let prompt = script("MARK", &[bash("touch began; sleep 100")]);
    let config = interactive(&session, &prompt, Gateway { url, token_file: None });
    let _container = agent_container(&session);
    let driven = tokio::spawn(drive(config));
    let (stream, _) = listener.accept().await.unwrap();
    let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
    eventually("the tool runs", || began.exists()).await;
    let mut other: serde_json::Value = serde_json::from_slice(&std::fs::read(&lease).unwrap()).unwrap();
    other["attempt"] = 2.into();
    std::fs::write(&lease, other.to_string()).unwrap();
    let asked = session.model.requests().len();
    let started = std::time::Instant::now();
    let close = tokio_tungstenite::tungstenite::protocol::CloseFrame {
        code: protocol::frame::close::SUPERSEDED.into(),
        reason: "".into(),
    };
    socket.close(Some(close)).await.unwrap();
    assert_eq!(driven.await.unwrap(), Outcome::Superseded);
    assert!(
        started.elapsed().as_secs() < 8,
        "{:?}: sooner than the next renewal",
        started.elapsed()
    );
    session.assert_nothing_left().await;
    assert_eq!(session.model.requests().len(), asked);
    assert!(session.bodies(Kind::End).is_empty(), "the records are the other's now");
}
