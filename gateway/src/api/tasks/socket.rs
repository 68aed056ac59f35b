//! A task's events on a WebSocket.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::{Extension, Request, State},
    response::Response,
};
use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _};
use hyper_util::rt::TokioIo;
use tokio::time::{Interval, timeout};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};

use super::{
    super::{
        Get,
        compat::{Ours, TaskError, Who, is_forbidden},
        events::every,
        projects::follower,
    },
    Named,
    find::Found,
    status::{end_by_session, end_by_view, existing_task, is_last, last},
};
use crate::{
    Gateway,
    compat::folds::{Fold, read},
    follow::{CloseReason, Follower, Item},
    ingest::upgrade,
    metrics::Counted,
    project::tasks::{Event, Task},
    server::Place,
    sessions::View,
};

/// Name of what is spoken, for pages that must show a key: they offer it beside the key.
const EVENTS: &str = "tasks.agentic.v1";
/// Longest message that a client may send: it has nothing to say but pongs.
const MAX_SENT: usize = 4 << 10;
/// How long a client may take for a message.
const TAKEN_WITHIN: Duration = Duration::from_mins(1);
/// Proxies cut connections that say nothing for a minute.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// Pings without a word from the client after which it is taken for gone.
const MAX_UNANSWERED: u32 = 3;
/// How often it is asked whether the caller may still read.
const RECHECK: Duration = Duration::from_mins(1);
/// How long a close may take to be answered.
const CLOSE_WITHIN: Duration = Duration::from_secs(3);
/// What a connection costs at least.
const READ_BUFFER: usize = 4 << 10;

pub(super) async fn connect(
    State(gateway): State<Arc<Gateway>>,
    Ours { who, .. }: Ours<Get, TaskError>,
    Named(id): Named,
    place: Option<Extension<Place>>,
    request: Request,
) -> Result<Response, TaskError> {
    let found = existing_task(&gateway, &who, &id).await?;
    let (response, upgrade) = upgrade::accept(request, EVENTS)?;
    let held = (gateway.tasks.token(), place);
    // A task that came as a message begins with its record; what is before it is of others.
    let before = found.sent.as_ref().and_then(|command| command.answer.seq());
    let cursor = before.map_or(0, |seq| seq.saturating_sub(1));
    let reader = Reader {
        follower: follower(
            &gateway,
            &found.target,
            found.view.clone(),
            cursor,
            &who.caller.identity.user,
        ),
        _counted: gateway.metrics.stream(),
        gateway,
        found,
        fold: Fold::default(),
        item: None,
        heartbeat: every(HEARTBEAT),
        recheck: every(RECHECK),
        who,
    };
    tokio::spawn(async move {
        let _held = held;
        let Ok(upgraded) = upgrade.await else { return };
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER)
            .max_message_size(Some(MAX_SENT))
            .max_frame_size(Some(MAX_SENT));
        let socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config)).await;
        reader.serve(socket).await;
    });
    Ok(response)
}

type Socket = WebSocketStream<TokioIo<hyper::upgrade::Upgraded>>;

/// A client that follows a task.
struct Reader {
    gateway: Arc<Gateway>,
    follower: Follower,
    found: Found,
    fold: Fold,
    /// What was read and not dealt with yet.
    item: Option<Item>,
    who: Who,
    heartbeat: Interval,
    recheck: Interval,
    _counted: Counted,
}

/// What a client is given next.
enum Next {
    Events(Vec<Event>),
    Ping,
    /// The stream is over before the task is.
    Close(CloseCode, &'static str),
}

impl Reader {
    async fn serve(mut self, mut socket: Socket) {
        let mut unanswered = 0;
        let (code, reason) = loop {
            tokio::select! {
                next = self.next() => match next {
                    Next::Ping => {
                        unanswered += 1;
                        if unanswered > MAX_UNANSWERED || !sent(&mut socket, Message::Ping(Bytes::new())).await {
                            return;
                        }
                    }
                    Next::Close(code, reason) => break (code, reason),
                    Next::Events(events) => {
                        let over = events.iter().any(is_last);
                        for event in events {
                            let Ok(text) = serde_json::to_string(&event) else { return };
                            drop(event);
                            if !sent(&mut socket, Message::text(text)).await {
                                return;
                            }
                        }
                        if over {
                            break (CloseCode::Normal, "");
                        }
                    }
                },
                message = socket.next() => match message {
                    Some(Ok(Message::Close(_)) | Err(_)) | None => return,
                    Some(Ok(_)) => unanswered = 0,
                },
            }
        };
        let close = CloseFrame {
            code,
            reason: reason.into(),
        };
        let closed = async {
            let _ = socket.close(Some(close)).await;
            while let Some(Ok(_)) = socket.next().await {}
        };
        let _ = timeout(CLOSE_WITHIN, closed).await;
    }

    /// Nothing is lost when the future is dropped: an item stays until it is dealt with.
    async fn next(&mut self) -> Next {
        loop {
            if let Some(item) = self.item.clone() {
                let next = self.deal_with(item).await;
                self.item = None;
                if let Some(next) = next {
                    return next;
                }
            }
            tokio::select! {
                biased;
                _ = self.recheck.tick() => if is_forbidden(&self.gateway, &self.who).await {
                    return Next::Close(CloseCode::Policy, "the key may no longer read the task");
                },
                item = self.follower.next() => match item {
                    Some(item) => self.item = Some(item),
                    None => return Next::Close(CloseCode::Normal, ""),
                },
                _ = self.heartbeat.tick() => return self.refused().await.unwrap_or(Next::Ping),
            }
        }
    }

    /// The end of a task that never reached the agent, in a session that goes on.
    async fn refused(&mut self) -> Option<Next> {
        let sent = self.found.sent.as_ref()?;
        let command = self.gateway.log.command(&self.found.view.uid, &sent.id).await;
        self.found.sent = Some(command.ok()??);
        let mut task = self.task();
        end_by_session(&mut task, &self.found);
        self.over(&task)
    }

    async fn deal_with(&mut self, item: Item) -> Option<Next> {
        match item {
            Item::Record(stored) => {
                let uid = self.found.view.uid.clone();
                let record = match read(&*self.gateway.log, &uid, &stored).await {
                    Ok(record) => record?,
                    Err(error) => {
                        tracing::error!(session_uid = uid, seq = stored.seq, %error, "stream ended");
                        return Some(Next::Close(
                            CloseCode::Again,
                            "the event log cannot be read: connect again",
                        ));
                    }
                };
                let mut events = self.fold.take(&record);
                // What happens in other tasks of the session is not its client's.
                let newest = self.fold.tasks.all().last();
                events.retain(|_| newest.is_some_and(|task| task.command == self.found.command));
                for event in &mut events {
                    event.set_task(&self.found.id);
                }
                let ended = self.ended_by_another();
                events.extend(ended);
                (!events.is_empty()).then_some(Next::Events(events))
            }
            Item::Phase(view) => {
                let mut task = self.task();
                if view.phase == crds::Phase::Pending {
                    end_by_view(&mut task, &view);
                }
                self.found.view = view;
                self.over(&task)
            }
            Item::Delta(_) | Item::Gap(_) | Item::Removed { .. } => None,
            Item::Close(close) => Some(self.closed(close.reason).await),
        }
    }

    fn task(&self) -> Task {
        self.fold.tasks.of(&self.found.command).cloned().unwrap_or_default()
    }

    fn over(&self, task: &Task) -> Option<Next> {
        task.is_over().then(|| Next::Events(vec![last(task, &self.found.id)]))
    }

    /// The last event of a task that another one took the place of.
    fn ended_by_another(&self) -> Option<Event> {
        let newest = self.fold.tasks.all().last()?;
        let task = self.fold.tasks.of(&self.found.command)?;
        (newest.command != task.command && task.is_over()).then(|| last(task, &self.found.id))
    }

    /// All records that will come have come: the task ends as its session did.
    async fn closed(&mut self, reason: CloseReason) -> Next {
        if reason == CloseReason::Shutdown || reason == CloseReason::Unavailable {
            return Next::Close(CloseCode::Restart, "connect again");
        }
        let mut task = self.task();
        if let Ok(Some(command)) = self
            .gateway
            .log
            .command(&self.found.view.uid, &self.found.command)
            .await
        {
            self.found.sent = Some(command);
        }
        if reason == CloseReason::Deleted {
            self.found.view.phase = crds::Phase::Stopped;
            self.found.view.reason = Some("Deleted".to_owned());
            self.found.view.message = Some("the task's session was deleted".to_owned());
        }
        end_by_session(&mut task, &self.found);
        let View { phase, ended, .. } = self.found.view;
        let (why, message) = (self.found.view.reason.clone(), self.found.view.message.clone());
        task.end_with_session(
            phase,
            why.as_deref(),
            message.as_deref(),
            ended.unwrap_or_else(jiff::Timestamp::now),
        );
        Next::Events(vec![last(&task, &self.found.id)])
    }
}

async fn sent(socket: &mut Socket, message: Message) -> bool {
    matches!(timeout(TAKEN_WITHIN, socket.send(message)).await, Ok(Ok(())))
}
