//! Commands to the runner, and its answers.

use protocol::{
    Kind, Record,
    frame::CommandResult,
    record::{SessionBody, UserBody},
};

use super::{Connection, End, peer::Peer};
use crate::{
    Gateway,
    files::{Attached, Order, Reply},
    project::typed,
    store::{NewRecord, commands::Answer},
};

/// The answers to commands that records are: the record of a user message is its own, of all else the runner writes one.
pub(super) fn answers(records: &[NewRecord]) -> Vec<(String, Answer)> {
    let parts = records
        .iter()
        .filter(|record| matches!(record.head.kind, Kind::User | Kind::Session));
    parts.filter_map(answer).collect()
}

fn answer(record: &NewRecord) -> Option<(String, Answer)> {
    let parsed: Record = serde_json::from_slice(&record.bytes).ok()?;
    let done = Answer::Done(Some(record.head.seq));
    if record.head.kind == Kind::User {
        let body: UserBody = serde_json::from_str(parsed.body.get()).ok()?;
        return Some((body.command, done));
    }
    match typed(&parsed)? {
        SessionBody::CommandDone { id, error } => Some((id, error.map_or(done, refused))),
        _ => None,
    }
}

/// Why a command was not carried out, as clients can show it: of the runner's words without NUL, which ends a text in many.
fn refused(error: String) -> Answer {
    Answer::Refused(if error.contains('\0') {
        error.replace('\0', "\u{fffd}")
    } else {
        error
    })
}

/// The next file frame for the runner; never, when it takes none.
pub(super) async fn next(files: &mut Option<Attached>) -> Order {
    match files {
        Some(files) => files.next().await,
        None => std::future::pending().await,
    }
}

impl Connection {
    /// Sends the commands that this connection has not sent yet and that have no answer.
    pub(super) async fn order(&mut self, gateway: &Gateway, peer: &mut Peer) -> Result<(), End> {
        // One by one: together they may be long.
        while let Some(command) = gateway.log.next(&self.session, self.sent).await? {
            self.sent = command.number;
            match command.frame() {
                Ok(frame) => peer.send(&frame).await?,
                Err(error) => {
                    tracing::error!(session_uid = self.session, id = command.id, %error, "command not understood");
                    let answer = Answer::Refused(format!("the command cannot be read any more: {error}"));
                    gateway.log.answer(&self.session, &command.id, answer).await?;
                }
            }
        }
        Ok(())
    }

    /// Takes an answer of the runner.
    pub(super) async fn answered(&mut self, gateway: &Gateway, result: CommandResult) -> Result<(), End> {
        let Some(Reply::Result(result)) = self.channel.files.reply(Reply::Result(result)) else {
            return Ok(());
        };
        let CommandResult { id, error, seq } = result;
        let answer = error.map_or(Answer::Done(seq), refused);
        gateway.log.answer(&self.session, &id, answer).await?;
        Ok(())
    }
}
