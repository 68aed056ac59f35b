//! Who may do what: callers by their Kubernetes rights or API key, runners by the pod that their token is bound to.

pub mod api_key;
pub mod kubernetes;
pub mod runner;

use http::{HeaderMap, header::AUTHORIZATION};

use crate::Gateway;
use kubernetes::{Caller, Refusal, Verb};

/// The header of an API key.
pub const API_KEY: &str = "x-api-key";

/// What a caller shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// A Kubernetes token.
    Token(String),
    /// An API key.
    Key(String),
}

impl Credential {
    /// That of a request. An API key goes before a token, which a proxy may add.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        if let Some(key) = headers.get(API_KEY) {
            return Some(Self::Key(key.to_str().unwrap_or_default().to_owned()));
        }
        bearer(headers).map(|token| Self::Token(token.to_owned()))
    }
}

/// The bearer token of a request.
pub fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token.trim())
}

impl Gateway {
    /// Who a caller is.
    pub async fn authenticate(&self, credential: &Credential) -> Result<Caller, Refusal> {
        match credential {
            Credential::Token(token) => self.reviews.authenticate(token).await,
            Credential::Key(key) => self.keys.find(key).map(Caller::from).ok_or(Refusal::UnknownKey),
        }
    }

    /// Whether a caller may do something in a namespace, to the session `name` or to any.
    pub async fn authorize(
        &self,
        caller: &Caller,
        verb: Verb,
        namespace: &str,
        name: Option<&str>,
    ) -> Result<(), Refusal> {
        match &caller.key {
            None => self.reviews.authorize(caller, verb, namespace, name).await,
            Some(key) if key.may(verb, namespace) => Ok(()),
            Some(_) => Err(Refusal::Forbidden {
                user: caller.identity.user.clone(),
                verb: verb.as_str(),
                namespace: namespace.to_owned(),
            }),
        }
    }
}
