//! A request while its session works: followed to its end, and stopped when its client goes away.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Json,
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use futures::Stream;
use http::StatusCode;
use kube::api::DynamicObject;
use serde_json::{Value, json};
use tokio::{task::JoinHandle, time::Instant};

use super::{
    super::{
        ApiError,
        compat::QueryError,
        projects::{Named, create_named},
    },
    QueryResult,
};
use crate::{
    Gateway,
    compat::{folds, places::Place},
    follow::{CloseReason, Follower, Item},
    project::claude_code::{End, Query},
    sessions::{Target, View},
};

/// How long after a create that nobody heard the answer of its session may still come: longer than an API server waits for
/// webhooks.
const COMES_WITHIN: Duration = Duration::from_mins(2);
/// How often it is looked for.
const LOOK_EVERY: Duration = Duration::from_secs(1);

type Created = Result<DynamicObject, ApiError>;

/// Deletes the session of a request whose client goes away before it is answered.
pub(super) struct Leaving {
    gateway: Option<Arc<Gateway>>,
    target: Target,
    request: String,
    /// Its creation, until it is known what came of it.
    creating: Option<JoinHandle<Created>>,
    /// It was created.
    is_there: bool,
    /// Its place among those under way, until its session is over.
    place: Option<Place>,
}

impl Leaving {
    /// Creates the session, whatever becomes of the request.
    pub(super) fn create(
        gateway: &Arc<Gateway>,
        target: &Target,
        request: String,
        session: DynamicObject,
        place: Place,
    ) -> Self {
        let creating = gateway.tasks.spawn({
            let (gateway, named) = (gateway.clone(), Named::As(target.clone()));
            async move { create_named(&gateway, named, session).await }
        });
        Self {
            gateway: Some(gateway.clone()),
            target: target.clone(),
            request,
            creating: Some(creating),
            is_there: false,
            place: Some(place),
        }
    }

    /// What came of the creation.
    pub(super) async fn created(&mut self) -> Created {
        let created = known(&mut self.creating).await;
        self.creating = None;
        self.is_there = created.is_ok();
        if is_refused(&created) {
            self.gateway = None;
        }
        created
    }

    /// The session ends by itself, or never was.
    pub(super) fn done(mut self) {
        self.gateway = None;
    }
}

async fn known(creating: &mut Option<JoinHandle<Created>>) -> Created {
    let stopped = || ApiError::busy("the session could not be created: try again", 1);
    match creating {
        Some(creating) => creating.await.unwrap_or_else(|_| Err(stopped())),
        None => Err(stopped()),
    }
}

/// There is nothing to be deleted. After any other error the session may be there all the same.
fn is_refused(created: &Created) -> bool {
    created.as_ref().is_err_and(|error| error.code().is_client_error())
}

impl Drop for Leaving {
    fn drop(&mut self) {
        let Some(gateway) = self.gateway.take() else { return };
        let (target, request) = (self.target.clone(), std::mem::take(&mut self.request));
        let (mut creating, mut is_there) = (self.creating.take(), self.is_there);
        let place = self.place.take();
        gateway.tasks.clone().spawn(async move {
            let _place = place;
            tracing::info!(
                request_id = request,
                session = target.name(),
                "the client went away: its session is deleted"
            );
            if creating.is_some() {
                let created = known(&mut creating).await;
                if is_refused(&created) {
                    return;
                }
                is_there = created.is_ok();
            }
            let until = Instant::now() + COMES_WITHIN;
            while Instant::now() < until {
                match gateway.sessions.delete(&target).await {
                    Ok(true) => return gateway.watched.unlist(&target, None),
                    // Somebody else has deleted it.
                    Ok(false) if is_there => return,
                    Ok(false) => {}
                    Err(error) => {
                        tracing::warn!(session = target.name(), %error, "session not deleted; it ends by its timeout");
                    }
                }
                // A gateway that ends waits for nothing that may never come.
                let pause = tokio::time::sleep(LOOK_EVERY);
                if gateway.shutdown.run_until_cancelled(pause).await.is_none() {
                    return;
                }
            }
        });
    }
}

/// A request that is being worked on.
pub(super) struct Running {
    gateway: Arc<Gateway>,
    follower: Follower,
    query: Query,
    view: View,
    uid: String,
    name: String,
    over: bool,
    /// It cannot be followed to its end.
    abandoned: bool,
    leaving: Leaving,
}

impl Running {
    pub(super) fn new(gateway: Arc<Gateway>, follower: Follower, query: Query, view: View, leaving: Leaving) -> Self {
        Self {
            gateway,
            follower,
            query,
            uid: view.uid.clone(),
            view,
            name: leaving.target.name().to_owned(),
            over: false,
            abandoned: false,
            leaving,
        }
    }

    /// What happens next: lines, and whether they are the last.
    async fn next(&mut self) -> Vec<Value> {
        loop {
            let lines = match self.follower.next().await {
                Some(Item::Record(stored)) => match folds::read(&*self.gateway.log, &self.uid, &stored).await {
                    Ok(Some(record)) => self.query.take(&record),
                    Ok(None) => Vec::new(),
                    Err(error) => {
                        self.abandoned = true;
                        self.query.end = Some(End::Failed("Unavailable".to_owned(), error.to_string()));
                        Vec::new()
                    }
                },
                Some(Item::Phase(view)) => {
                    self.view = view;
                    Vec::new()
                }
                Some(Item::Close(close)) => {
                    self.ended(close.reason);
                    Vec::new()
                }
                Some(Item::Delta(_) | Item::Gap(_) | Item::Removed { .. }) => Vec::new(),
                None => {
                    self.ended(CloseReason::Ended);
                    Vec::new()
                }
            };
            if self.query.end.is_some() || !lines.is_empty() {
                return lines;
            }
        }
    }

    /// The session is over, and no record said how.
    fn ended(&mut self, reason: CloseReason) {
        let view = &self.view;
        let (why, message) = match reason {
            CloseReason::Ended => (
                view.reason.clone().unwrap_or_else(|| view.phase.to_string()),
                view.message
                    .clone()
                    .unwrap_or_else(|| format!("the session is {}", view.phase)),
            ),
            // Nobody waits for it any more, and it goes with its request.
            CloseReason::Shutdown => (
                "Unavailable".to_owned(),
                "the gateway is being stopped: try again".to_owned(),
            ),
            other => (
                "SessionEnded".to_owned(),
                format!("the session cannot be followed any more: {}", other.as_str()),
            ),
        };
        self.abandoned = reason != CloseReason::Ended;
        self.query.end.get_or_insert(End::Failed(why, message));
    }

    /// The session ends by itself.
    fn done(self) {
        if !self.abandoned {
            self.leaving.done();
        }
    }

    fn result(&mut self, result: String) -> QueryResult {
        let messages = self.query.messages();
        let omitted = self.query.omitted();
        QueryResult {
            r#type: "result",
            result,
            session_id: self.name.clone(),
            messages,
            messages_omitted: (omitted > 0).then_some(omitted),
        }
    }

    fn failure(&self, error: &str, message: &str) -> Value {
        let details = format!("session {}, request {}", self.name, self.leaving.request);
        json!({"type": "error", "error": error, "message": message, "details": details})
    }

    pub(super) async fn answer(mut self) -> Result<Response, QueryError> {
        let end = loop {
            self.next().await;
            if let Some(end) = self.query.end.take() {
                break end;
            }
        };
        let response = match end {
            End::Answered(result) => Json(self.result(result)).into_response(),
            End::Failed(error, message) => {
                let code = status(&error);
                (code, Json(self.failure(&error, &message))).into_response()
            }
        };
        self.done();
        Ok(response)
    }

    pub(super) fn lines(self) -> impl Stream<Item = Result<Bytes, Infallible>> {
        futures::stream::unfold(Some(self), |running| async move {
            let mut running = running?;
            let mut text = String::new();
            for line in running.next().await {
                text += &line.to_string();
                text.push('\n');
            }
            if let Some(end) = running.query.end.take() {
                // As text at once: the messages in it would be much longer as values.
                text += &match end {
                    End::Answered(result) => serde_json::to_string(&running.result(result)).unwrap_or_default(),
                    End::Failed(error, message) => running.failure(&error, &message).to_string(),
                };
                text.push('\n');
                running.over = true;
            }
            let running = if running.over {
                running.done();
                None
            } else {
                Some(running)
            };
            Some((Ok(text.into()), running))
        })
    }
}

/// The HTTP status of a request that failed.
fn status(reason: &str) -> StatusCode {
    match reason {
        "Timeout" => StatusCode::GATEWAY_TIMEOUT,
        "ModelUnavailable" | "RateLimited" => StatusCode::BAD_GATEWAY,
        "Unavailable" => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}
