//! Commands: what clients tell a session's agent. Each is kept before its sender is told so, sent to the session's runner
//! until that has answered, and answered by the gateway when the session is over without it.

use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use protocol::frame::{GatewayFrame, MAX_COMMAND_ID};
use tokio::time::{MissedTickBehavior, interval};

use crate::{
    Gateway,
    sessions::{Delivered, Target, View},
    store::{
        Progress, StoreError,
        commands::{Accepted, Answer, Command, MAX_PENDING, NewCommand, Waiting},
    },
};

/// How often it is looked whether commands have expired.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// How often answered commands are forgotten.
const FORGET_EVERY: Duration = Duration::from_hours(1);
/// How long after an end that nobody reported it is waited for the runner's word.
const PATIENCE: SignedDuration = SignedDuration::from_hours(1);

/// Why a command is not taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its id cannot be one.
    #[error(
        "the id {0:?} cannot be a command's: use 1 to {MAX_COMMAND_ID} letters, digits and `-_.:`, not `prompt`; or none, and one is chosen"
    )]
    Id(String),
    /// The session is over.
    #[error(
        "{target} is {phase}: start its next run with POST /api/projects/{namespace}/agentic-sessions/{name}/start, then send again",
        namespace = target.namespace(), name = target.name()
    )]
    Over {
        /// Which.
        target: Target,
        /// How.
        phase: crds::Phase,
    },
    /// It takes no messages.
    #[error(
        "{0} is not interactive: it works on its prompt and ends; create a session with `interactive: true` to send it messages"
    )]
    OneShot(Target),
    /// There is no turn to interrupt.
    #[error("{0} has no turn yet that could be interrupted")]
    NoTurn(Target),
    /// The id is taken.
    #[error("{target} has another command with the id {id:?}: an id stands for one command, choose another")]
    Taken {
        /// Which.
        target: Target,
        /// The id.
        id: String,
    },
    /// Too many.
    #[error("{0} has {MAX_PENDING} commands without an answer: wait for some of them")]
    Full(Target),
    /// It could not be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Whether a client may use this as a command's id. No slash: the runner's own ids have one, and it stands in paths.
pub fn is_id(id: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
    (1..=MAX_COMMAND_ID).contains(&id.len())
        && id.bytes().all(fits)
        && !matches!(id, "." | "..")
        && id != protocol::identity::PROMPT_COMMAND
}

/// An id of the gateway's own: clients' have no slash.
pub fn own_id(what: &str, of: impl std::fmt::Display) -> String {
    format!("gateway/{what}/{of}")
}

/// Keeps a command; it is on disk when this returns. An equal one with the same id is the same command, whatever became of
/// it.
pub async fn send(
    gateway: &Gateway,
    target: &Target,
    view: &View,
    frame: GatewayFrame,
    asked: String,
) -> Result<Command, Error> {
    let id = id(&frame);
    if !is_id(id) {
        return Err(Error::Id(id.to_owned()));
    }
    keep(gateway, target, view, frame, asked).await
}

/// What the gateway itself tells a session's runner, under an id that no client can have: see [`own_id`].
pub async fn send_own(gateway: &Gateway, target: &Target, view: &View, frame: GatewayFrame) -> Result<Command, Error> {
    let asked = serde_json::json!({"gateway": id(&frame)}).to_string();
    keep(gateway, target, view, frame, asked).await
}

async fn keep(
    gateway: &Gateway,
    target: &Target,
    view: &View,
    frame: GatewayFrame,
    asked: String,
) -> Result<Command, Error> {
    let id = id(&frame).to_owned();
    // A client that did not hear our answer asks again, perhaps after the session's end.
    if let Some(known) = gateway.log.command(&view.uid, &id).await? {
        return if known.asked == asked {
            Ok(known)
        } else {
            Err(taken(target, id))
        };
    }
    if view.phase.is_terminal() && !view.starting {
        return Err(Error::Over {
            target: target.clone(),
            phase: view.phase,
        });
    }
    if matches!(frame, GatewayFrame::UserMessage(_)) && !view.interactive {
        return Err(Error::OneShot(target.clone()));
    }
    let command = NewCommand {
        session: view.uid.clone(),
        namespace: target.namespace().to_owned(),
        name: target.name().to_owned(),
        id: id.clone(),
        frame: serde_json::to_string(&frame).unwrap_or_default(),
        asked,
    };
    match gateway.log.keep(command).await? {
        Accepted::New(command) => {
            gateway.live.channel(&view.uid).commanded();
            Ok(command)
        }
        Accepted::Same(command) => Ok(command),
        Accepted::Other => Err(taken(target, id)),
        Accepted::Full => Err(Error::Full(target.clone())),
    }
}

fn taken(target: &Target, id: String) -> Error {
    Error::Taken {
        target: target.clone(),
        id,
    }
}

/// The id of a command's frame.
pub fn id(frame: &GatewayFrame) -> &str {
    match frame {
        GatewayFrame::UserMessage(command) => &command.id,
        GatewayFrame::Interrupt(command) => &command.id,
        GatewayFrame::EndSession(command) => &command.id,
        GatewayFrame::PermissionResponse(command) => &command.id,
        GatewayFrame::FileRequest(command) => &command.id,
        GatewayFrame::FileChunk(command) => &command.id,
        GatewayFrame::Welcome(_) | GatewayFrame::Ack(_) | GatewayFrame::Conflict(_) => "",
    }
}

/// Answers the commands of ended sessions, until the gateway stops.
pub async fn run(gateway: Arc<Gateway>) {
    let mut look = interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut forget = interval(FORGET_EVERY);
    loop {
        let done = tokio::select! {
            _ = look.tick() => expire_all(&gateway).await,
            _ = forget.tick() => gateway.log.forget_answered(Timestamp::now()).await,
            () = gateway.shutdown.cancelled() => return,
        };
        if let Err(error) = done {
            tracing::warn!(%error, "commands not looked at");
        }
    }
}

async fn expire_all(gateway: &Gateway) -> Result<(), StoreError> {
    for waiting in gateway.log.waiting().await? {
        expire(gateway, &waiting).await?;
    }
    Ok(())
}

/// Answers the commands of a session if it is over.
pub async fn expire(gateway: &Gateway, waiting: &Waiting) -> Result<(), StoreError> {
    let Waiting {
        session,
        namespace,
        name,
    } = waiting;
    if !gateway.watched.is_synced() {
        return Ok(());
    }
    let view = Target::new(namespace, name).and_then(|target| gateway.watched.view(&target));
    let view = view.filter(|view| view.uid == *session);
    // The log is read after the view: an end that the view knows of is in the log if it ever came.
    let progress = gateway.log.state(session).await?.progress;
    let Some(error) = verdict(view.as_ref(), progress, Timestamp::now()) else {
        return Ok(());
    };
    for command in gateway.log.pending(session, 0).await? {
        let answer = Answer::Expired(error.clone());
        gateway.log.answer(session, &command.id, answer).await?;
    }
    Ok(())
}

/// Why a session's commands without an answer will get none; `None`: they may. A runner's answers are records, so when all of
/// them are here and a command's is not among them, it was not carried out.
fn verdict(view: Option<&View>, progress: Progress, now: Timestamp) -> Option<String> {
    let Some(view) = view else {
        return Some("the session was deleted before the command was answered".to_owned());
    };
    if !view.phase.is_terminal() || view.starting {
        return None;
    }
    let end = match &view.reason {
        Some(reason) => format!("the session's run ended ({}, {reason})", view.phase),
        None => format!("the session's run ended ({})", view.phase),
    };
    let complete = progress.ended >= view.attempt && progress.acked >= progress.last;
    let waited = || view.ended.is_some_and(|ended| now.duration_since(ended) >= PATIENCE);
    match view.delivered {
        Delivered::No => None,
        _ if complete => Some(format!(
            "{end} before the command was carried out: start the session and send it again"
        )),
        Delivered::Final => Some(format!(
            "{end} and not all of its records arrived: it is not known whether the command was carried out"
        )),
        Delivered::Unknown if waited() => Some(format!(
            "{end} and nobody heard of its last records: it is not known whether the command was carried out"
        )),
        Delivered::Unknown => None,
    }
}

#[cfg(test)]
mod tests {
    use crds::Phase;
    use rstest::rstest;

    use super::*;

    const END: &str = "2026-01-02T03:04:05Z";

    #[rstest]
    #[case::running(Phase::Running, false, Delivered::Unknown, 1, 0, "")]
    #[case::all_records_are_here(
        Phase::Completed,
        false,
        Delivered::Final,
        2,
        0,
        "before the command was carried out"
    )]
    #[case::the_end_record_is_here(
        Phase::Stopped,
        false,
        Delivered::Unknown,
        2,
        0,
        "before the command was carried out"
    )]
    #[case::records_are_still_to_come(Phase::Failed, false, Delivered::No, 2, 0, "")]
    #[case::the_next_run_is_asked_for(Phase::Stopped, true, Delivered::Final, 2, 0, "")]
    #[case::records_were_lost(Phase::Failed, false, Delivered::Final, 1, 0, "not known whether")]
    #[case::nothing_was_heard_yet(Phase::Failed, false, Delivered::Unknown, 1, 60, "")]
    #[case::nothing_was_heard_for_an_hour(Phase::Failed, false, Delivered::Unknown, 1, 3600, "not known whether")]
    fn a_command_expires_when_nothing_more_can_be_heard_of_it(
        #[case] phase: Phase,
        #[case] starting: bool,
        #[case] delivered: Delivered,
        #[case] attempt_ended: u32,
        #[case] seconds_later: i64,
        #[case] says: &str,
    ) {
        let ended: Timestamp = END.parse().unwrap();
        let view = View {
            phase,
            starting,
            delivered,
            attempt: 2,
            ended: Some(ended),
            ..View::default()
        };
        let progress = Progress {
            acked: 5,
            last: 5,
            ended: attempt_ended,
            ..Progress::default()
        };
        let verdict = verdict(Some(&view), progress, ended + SignedDuration::from_secs(seconds_later));
        match verdict {
            Some(error) => assert!(!says.is_empty() && error.contains(says), "{error}"),
            None => assert_eq!(says, ""),
        }
    }

    #[test]
    fn an_id_fits_into_a_path_and_is_no_id_of_the_runner() {
        for id in ["a", "review-1", "0d51:4f0a_8.f6b"] {
            assert!(is_id(id), "{id}");
        }
        let own = own_id("interrupt", 2);
        for id in [
            "",
            "prompt",
            &own,
            "continue/1",
            "file/1",
            "a b",
            "ü",
            "..",
            &"x".repeat(129),
        ] {
            assert!(!is_id(id), "{id}");
        }
    }
}
