//! The credential of the model API: read again per use, exchanged and refreshed where it is a Google account's.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, header};
use protocol::names::env;
use reqwest::{Client, Url};
use secrecy::{ExposeSecret as _, SecretString};

use super::google::Google;
use crate::secrets::Secrets;

/// A credential of the model API.
#[derive(Clone)]
pub enum Credential {
    /// Sent as `x-api-key`.
    ApiKey(SecretString),
    /// Sent as `Authorization: Bearer`.
    Bearer(SecretString),
    /// `ANTHROPIC_API_KEY` or `ANTHROPIC_AUTH_TOKEN`, as it is at each use.
    Secrets(Secrets),
    /// A Google account's: a token that was given, or one that its key is exchanged for.
    Google(Arc<Google>),
}

/// Why there is no credential for a request.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// It is not there (any more).
    #[error("failed to find a credential of the model API: the Secrets have none any more")]
    Gone,
    /// It cannot stand in a header.
    #[error(
        "failed to use the model API's credential: it has characters that a header cannot carry, such as a line break"
    )]
    Header,
    /// A Google key that is none.
    #[error("failed to read {0} as a Google account's key: give the JSON file that Google Cloud made")]
    Key(&'static str),
    /// The exchange was not answered.
    #[error("failed to exchange the Google account's key for a token: {0}")]
    Unreachable(String),
    /// The exchange was refused.
    #[error("failed to exchange the Google account's key for a token: the answer is {status}: {body}")]
    Refused {
        /// Status of the answer.
        status: u16,
        /// Its beginning.
        body: String,
    },
}

impl CredentialError {
    /// Whether it may work in a while.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable(_) => true,
            Self::Refused { status, .. } => *status >= 500 || *status == 429,
            Self::Gone | Self::Header | Self::Key(_) => false,
        }
    }
}

/// A credential as it stands in a request.
#[derive(Clone)]
pub struct Authorization {
    /// Header.
    pub name: HeaderName,
    /// Its value, marked sensitive.
    pub value: HeaderValue,
    secret: SecretString,
}

impl Authorization {
    /// Sent as `x-api-key`.
    pub fn key(key: SecretString) -> Result<Self, CredentialError> {
        Self::of(
            HeaderName::from_static("x-api-key"),
            key.expose_secret().to_owned(),
            key,
        )
    }

    /// Sent as `Authorization: Bearer`.
    pub fn bearer(token: SecretString) -> Result<Self, CredentialError> {
        Self::of(
            header::AUTHORIZATION,
            format!("Bearer {}", token.expose_secret()),
            token,
        )
    }

    fn of(name: HeaderName, text: String, secret: SecretString) -> Result<Self, CredentialError> {
        let mut value = HeaderValue::try_from(text).map_err(|_| CredentialError::Header)?;
        value.set_sensitive(true);
        Ok(Self { name, value, secret })
    }

    /// The credential itself, so that an answer that repeats it can be told.
    pub fn secret(&self) -> &str {
        self.secret.expose_secret()
    }

    /// A text with the credential replaced, should a gateway repeat it.
    pub fn taken_out_of(&self, body: Bytes) -> Bytes {
        // A byte that is no text, wherever it stands, must not keep it from being found.
        let text = String::from_utf8_lossy(&body);
        if self.secret().is_empty() || !text.contains(self.secret()) {
            return body;
        }
        Bytes::from(text.replace(self.secret(), "[redacted]"))
    }
}

impl Credential {
    /// What the Secrets hold for the public API or a gateway; `None`: nothing.
    pub fn anthropic(secrets: &Secrets) -> Option<Self> {
        read(secrets).map(|_| Self::Secrets(secrets.clone()))
    }

    /// What the Secrets hold for Vertex AI; `None`: nothing.
    pub fn google(secrets: &Secrets) -> Option<Self> {
        Google::new(secrets.clone()).map(|google| Self::Google(Arc::new(google)))
    }

    /// Whether there is one that can be used, as far as can be told without asking anybody.
    pub async fn check(&self, client: &Client) -> Result<(), CredentialError> {
        match self {
            Self::Google(google) => google.check(),
            other => other.current(client).await.map(drop),
        }
    }

    /// As it is now.
    pub async fn current(&self, client: &Client) -> Result<Authorization, CredentialError> {
        match self {
            Self::ApiKey(key) => Authorization::key(key.clone()),
            Self::Bearer(token) => Authorization::bearer(token.clone()),
            Self::Secrets(secrets) => read(secrets).unwrap_or(Err(CredentialError::Gone)),
            Self::Google(google) => google.current(client).await,
        }
    }

    /// Another one than `refused`, when there is one by now.
    pub async fn renewed(&self, client: &Client, refused: &Authorization) -> Option<Authorization> {
        let renewed = match self {
            Self::ApiKey(_) | Self::Bearer(_) => return None,
            Self::Secrets(_) => self.current(client).await,
            Self::Google(google) => google.renewed(client, refused).await,
        };
        renewed.ok().filter(|renewed| renewed.value != refused.value)
    }
}

fn read(secrets: &Secrets) -> Option<Result<Authorization, CredentialError>> {
    let key = secrets.value(env::ANTHROPIC_API_KEY).map(Authorization::key);
    key.or_else(|| secrets.value(env::ANTHROPIC_AUTH_TOKEN).map(Authorization::bearer))
}

/// Whether a token may be asked for here: not in plain text over a network.
pub fn is_token_address(url: &Url) -> bool {
    url.scheme() == "https" || (url.scheme() == "http" && super::client::is_loopback(url))
}
