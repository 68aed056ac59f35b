//! Commands in memory.

use std::sync::PoisonError;

use futures::{FutureExt as _, future::BoxFuture};
use jiff::Timestamp;

use super::MemoryLog;
use crate::store::{
    StoreError,
    commands::{Accepted, Answer, Command, CommandLog, KEPT_SECONDS, MAX_PENDING, NewCommand, Waiting},
};

/// The commands of all sessions, in order.
#[derive(Debug, Default)]
pub(super) struct Commands {
    all: Vec<(Waiting, Command, Option<Timestamp>)>,
    last: u64,
}

impl Commands {
    fn find(&mut self, session: &str, id: &str) -> Option<&mut (Waiting, Command, Option<Timestamp>)> {
        self.all
            .iter_mut()
            .find(|(of, command, _)| of.session == session && command.id == id)
    }

    fn keep(&mut self, new: NewCommand) -> Accepted {
        if let Some((_, known, _)) = self.find(&new.session, &new.id) {
            return if known.asked == new.asked {
                Accepted::Same(known.clone())
            } else {
                Accepted::Other
            };
        }
        if self.pending(&new.session, 0).len() >= MAX_PENDING {
            return Accepted::Full;
        }
        let NewCommand {
            session,
            namespace,
            name,
            id,
            frame,
            asked,
        } = new;
        self.last += 1;
        let command = Command {
            number: self.last,
            id,
            frame,
            asked,
            created: Timestamp::now(),
            answer: Answer::Pending,
        };
        let of = Waiting {
            session,
            namespace,
            name,
        };
        self.all.push((of, command.clone(), None));
        Accepted::New(command)
    }

    fn pending(&self, session: &str, after: u64) -> Vec<Command> {
        self.all
            .iter()
            .filter(|(of, command, _)| {
                of.session == session && command.number > after && command.answer == Answer::Pending
            })
            .map(|(_, command, _)| command.clone())
            .collect()
    }

    pub(super) fn answer(&mut self, session: &str, id: &str, answer: Answer) -> bool {
        match self.find(session, id) {
            Some((_, command, answered)) if command.answer == Answer::Pending => {
                command.answer = answer;
                *answered = Some(Timestamp::now());
                true
            }
            _ => false,
        }
    }

    pub(super) fn forget(&mut self, session: &str) {
        self.all.retain(|(of, ..)| of.session != session);
    }
}

impl MemoryLog {
    fn commands<T: Send + 'static>(
        &self,
        f: impl FnOnce(&mut Commands) -> T,
    ) -> BoxFuture<'static, Result<T, StoreError>> {
        let answer = f(&mut self.commands.lock().unwrap_or_else(PoisonError::into_inner));
        async move { Ok(answer) }.boxed()
    }
}

impl CommandLog for MemoryLog {
    fn keep(&self, command: NewCommand) -> BoxFuture<'static, Result<Accepted, StoreError>> {
        self.commands(|commands| commands.keep(command))
    }

    fn command(&self, session: &str, id: &str) -> BoxFuture<'static, Result<Option<Command>, StoreError>> {
        self.commands(|commands| commands.find(session, id).map(|(_, command, _)| command.clone()))
    }

    fn pending(&self, session: &str, after: u64) -> BoxFuture<'static, Result<Vec<Command>, StoreError>> {
        self.commands(|commands| commands.pending(session, after))
    }

    fn next(&self, session: &str, after: u64) -> BoxFuture<'static, Result<Option<Command>, StoreError>> {
        self.commands(|commands| commands.pending(session, after).into_iter().next())
    }

    fn waiting(&self) -> BoxFuture<'static, Result<Vec<Waiting>, StoreError>> {
        self.commands(|commands| {
            let pending = commands
                .all
                .iter()
                .filter(|(_, command, _)| command.answer == Answer::Pending);
            let mut waiting: Vec<_> = pending.map(|(of, ..)| of.clone()).collect();
            waiting.sort_by(|a, b| a.session.cmp(&b.session));
            waiting.dedup();
            waiting
        })
    }

    fn answer(&self, session: &str, id: &str, answer: Answer) -> BoxFuture<'static, Result<bool, StoreError>> {
        self.commands(|commands| commands.answer(session, id, answer))
    }

    fn forget_answered(&self, now: Timestamp) -> BoxFuture<'static, Result<(), StoreError>> {
        self.commands(|commands| {
            commands
                .all
                .retain(|(_, _, answered)| answered.is_none_or(|at| at.as_second() >= now.as_second() - KEPT_SECONDS));
        })
    }

    fn turn(&self, session: &str) -> BoxFuture<'static, Result<u32, StoreError>> {
        self.with(session, |session| {
            session
                .records
                .values()
                .next_back()
                .map_or(0, |record| record.head.turn)
        })
    }
}
