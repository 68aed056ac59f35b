//! Who asks, and whether they may: known before a byte of the request's body is read.

use std::{marker::PhantomData, sync::Arc};

use axum::{
    RequestPartsExt as _,
    extract::{FromRequestParts, Path, rejection::PathRejection},
};
use http::request::Parts;
use serde::Deserialize;

use super::ApiError;
use crate::{
    Gateway,
    auth::{
        Credential,
        kubernetes::{Caller, Verb},
    },
    body::Sender,
    sessions::{Target, is_namespace},
};

/// The right that a route asks for, as a type.
pub trait Right: Send + 'static {
    /// The right.
    const VERB: Verb;
}

macro_rules! rights {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        $(
            $(#[$doc])*
            #[derive(Debug)]
            pub struct $name;
            impl Right for $name {
                const VERB: Verb = Verb::$name;
            }
        )*
    };
}

rights! {
    /// To read a session, its events and its files.
    Get,
    /// To read all sessions of a project.
    List,
    /// To create sessions.
    Create,
    /// To change a session, and to speak with its agent.
    Update,
    /// To delete a session.
    Delete,
}

/// A caller who has the right `R` in the project of the path.
#[derive(Debug)]
pub struct OfProject<R> {
    /// Who.
    pub caller: Caller,
    /// The project: a namespace.
    pub project: String,
    _right: PhantomData<R>,
}

/// A caller who has the right `R` on the session of the path, which need not exist.
#[derive(Debug)]
pub struct OfSession<R> {
    /// Who.
    pub caller: Caller,
    /// Which session.
    pub target: Target,
    /// What the caller showed, to ask again later.
    pub credential: Credential,
    _right: PhantomData<R>,
}

#[derive(Deserialize)]
struct ProjectPath {
    project: String,
}

#[derive(Deserialize)]
struct SessionPath {
    project: String,
    session: String,
}

impl<R: Right> FromRequestParts<Arc<Gateway>> for OfProject<R> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, gateway: &Arc<Gateway>) -> Result<Self, ApiError> {
        let Path(ProjectPath { project }) = parts.extract().await.map_err(wrong_path)?;
        let (caller, _) = allowed(gateway, parts, R::VERB, &project, None).await?;
        Ok(Self {
            caller,
            project,
            _right: PhantomData,
        })
    }
}

impl<R: Right> FromRequestParts<Arc<Gateway>> for OfSession<R> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, gateway: &Arc<Gateway>) -> Result<Self, ApiError> {
        let Path(SessionPath { project, session }) = parts.extract().await.map_err(wrong_path)?;
        let target = Target::new(&project, &session).ok_or_else(|| {
            ApiError::not_found(format!(
                "no session can have the name {session:?} in namespace {project:?}"
            ))
        })?;
        let (caller, credential) = allowed(gateway, parts, R::VERB, &project, Some(&session)).await?;
        Ok(Self {
            caller,
            target,
            credential,
            _right: PhantomData,
        })
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the form of `map_err`")]
fn wrong_path(rejection: PathRejection) -> ApiError {
    ApiError::not_found(format!("the path is not understood: {rejection}"))
}

async fn allowed(
    gateway: &Gateway,
    parts: &mut Parts,
    verb: Verb,
    namespace: &str,
    name: Option<&str>,
) -> Result<(Caller, Credential), ApiError> {
    let credential = Credential::of(&parts.headers).ok_or_else(|| {
        ApiError::unauthorized(
            "no token: send a Kubernetes token in the header `Authorization: Bearer <token>`, or an API key in `X-API-Key`",
        )
    })?;
    if !is_namespace(namespace) {
        return Err(ApiError::not_found(format!(
            "no namespace can have the name {namespace:?}"
        )));
    }
    let caller = gateway.authenticate(&credential).await?;
    gateway.count(&caller)?;
    gateway.authorize(&caller, verb, namespace, name).await?;
    parts.extensions.insert(Sender(caller.identity.user.clone()));
    Ok((caller, credential))
}
