//! What the CLI goes on with by itself once a task is over.

use protocol::{Kind, Record, record::SessionBody};

use super::{
    super::{line::Line, typed},
    MAX_QUESTIONS, Task,
};

impl Task {
    /// What comes of it once it is over: it is told to nobody, but the task's limits hold there too.
    pub(super) fn take_by_itself(&mut self, record: &Record) {
        match record.kind {
            Kind::Session => match typed(record) {
                Some(SessionBody::TurnStarted { turn }) => self.by_itself = Some(turn),
                Some(SessionBody::TurnEnded { .. }) => self.rests(),
                Some(SessionBody::CliStarted { .. }) => self.questions.clear(),
                Some(SessionBody::PermissionAnswered { request_id, .. }) => {
                    self.questions.remove(&request_id);
                }
                _ => {}
            },
            Kind::Cli if self.by_itself.is_some() => match Line::of(record) {
                Line::Assistant(response) if response.counts && response.id != self.last_message => {
                    self.rounds_by_itself += 1;
                    response.id.clone_into(&mut self.last_message);
                }
                Line::Question(id) if self.questions.len() < MAX_QUESTIONS => {
                    self.questions.insert(id);
                }
                Line::Withdrawn(id) => {
                    self.questions.remove(&id);
                }
                _ => {}
            },
            Kind::End => self.rests(),
            _ => {}
        }
    }

    fn rests(&mut self) {
        self.by_itself = None;
        self.questions.clear();
    }
}
