//! Tokens of a Google account: given, or exchanged for the key of a service account (RFC 7523) or of a user.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use jiff::Timestamp;
use protocol::names::env;
use reqwest::{Client, Url};
use ring::rand::SystemRandom;
use ring::signature::{RSA_PKCS1_SHA256, RsaKeyPair};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use tokio::sync::Mutex;
use tokio::time::{Duration, Instant};

use super::credential::{Authorization, CredentialError, is_token_address};
use crate::secrets::{self, Secrets};

/// What a token is for.
const SCOPE: &str = "https://www.googleapis.com/auth/cloud-platform";
/// How long a signed request is good, seconds: what Google allows.
const GOOD: i64 = 3_600;
/// A token is not used up to its last moment.
const EARLY: Duration = Duration::from_mins(1);
/// A token is not used for longer, whatever is said of it; a time beyond all clocks cannot be reckoned with.
const LONG: Duration = Duration::from_hours(24);
/// How long the exchange may take.
const TIMEOUT: Duration = Duration::from_secs(20);
/// Most bytes of an answer that are read.
const MAX_ANSWER: usize = 64 << 10;

/// See the module.
pub struct Google {
    secrets: Secrets,
    token: Mutex<Option<Token>>,
}

struct Token {
    authorization: Authorization,
    until: Instant,
}

/// A key file.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Account {
    /// Signs for itself.
    ServiceAccount {
        /// Who.
        client_email: String,
        /// PEM.
        private_key: SecretString,
        /// Id of the key.
        #[serde(default)]
        private_key_id: String,
        /// Where tokens are.
        #[serde(default = "google_tokens")]
        token_uri: String,
    },
    /// `gcloud auth application-default login`.
    AuthorizedUser {
        /// Id of the application.
        client_id: String,
        /// Secret of the application.
        client_secret: SecretString,
        /// What a token is got for.
        refresh_token: SecretString,
        /// Where tokens are.
        #[serde(default = "google_tokens")]
        token_uri: String,
    },
}

fn google_tokens() -> String {
    "https://oauth2.googleapis.com/token".to_owned()
}

#[derive(Deserialize)]
struct Answer {
    access_token: SecretString,
    #[serde(default)]
    expires_in: u64,
}

impl Google {
    /// `None`: there is neither a token nor a key.
    pub fn new(secrets: Secrets) -> Option<Self> {
        let something = [env::VERTEX_USER_TOKEN, env::GOOGLE_APPLICATION_CREDENTIALS];
        something
            .iter()
            .any(|name| secrets.value(name).is_some())
            .then(|| Self {
                secrets,
                token: Mutex::default(),
            })
    }

    /// Whether there is a token, or a key that can sign.
    pub fn check(&self) -> Result<(), CredentialError> {
        match self.secrets.value(env::VERTEX_USER_TOKEN) {
            Some(token) => Authorization::bearer(token).map(drop),
            None => Account::read(&self.secrets)?.request(Timestamp::now()).map(drop),
        }
    }

    /// The token that was given, or one for the key.
    pub async fn current(&self, client: &Client) -> Result<Authorization, CredentialError> {
        if let Some(token) = self.secrets.value(env::VERTEX_USER_TOKEN) {
            return Authorization::bearer(token);
        }
        let mut token = self.token.lock().await;
        if let Some(known) = token.as_ref().filter(|token| Instant::now() < token.until) {
            return Ok(known.authorization.clone());
        }
        let fresh = Account::read(&self.secrets)?.token(client).await?;
        self.secrets.tell("access_token", fresh.authorization.secret());
        Ok(token.insert(fresh).authorization.clone())
    }

    /// A token other than this one.
    pub async fn renewed(&self, client: &Client, refused: &Authorization) -> Result<Authorization, CredentialError> {
        {
            let mut token = self.token.lock().await;
            // Somebody else may have renewed it already.
            if token
                .as_ref()
                .is_some_and(|token| token.authorization.value == refused.value)
            {
                *token = None;
            }
        }
        self.current(client).await
    }
}

impl Account {
    /// Reads the key: the JSON itself, the path of its file, or the entry of a Secret that has it.
    pub fn read(secrets: &Secrets) -> Result<Self, CredentialError> {
        const NAME: &str = env::GOOGLE_APPLICATION_CREDENTIALS;
        let value = secrets.value(NAME).ok_or(CredentialError::Gone)?;
        let text = value.expose_secret();
        let json = if text.starts_with('{') {
            text.as_bytes().to_vec()
        } else {
            let path = std::path::Path::new(text);
            let entry = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            secrets::read(path)
                .ok()
                .or_else(|| secrets.file(entry))
                .ok_or(CredentialError::Key(NAME))?
        };
        if let Ok(text) = std::str::from_utf8(&json) {
            secrets.tell(NAME, text);
        }
        serde_json::from_slice(&json).map_err(|_| CredentialError::Key(NAME))
    }

    async fn token(self, client: &Client) -> Result<Token, CredentialError> {
        let asked = Instant::now();
        let (uri, form) = self.request(Timestamp::now())?;
        let url = Url::parse(&uri).ok().filter(is_token_address);
        let url = url.ok_or(CredentialError::Key("token_uri"))?;
        let unreachable = |error: reqwest::Error| CredentialError::Unreachable(error.without_url().to_string());
        let request = client
            .post(url)
            .timeout(TIMEOUT)
            .header("content-type", "application/x-www-form-urlencoded")
            .body(form);
        let mut response = request.send().await.map_err(unreachable)?;
        let status = response.status();
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(unreachable)? {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_ANSWER {
                break;
            }
        }
        if !status.is_success() {
            let text = String::from_utf8_lossy(&body);
            return Err(CredentialError::Refused {
                status: status.as_u16(),
                body: text.chars().take(200).collect(),
            });
        }
        let answer: Answer = serde_json::from_slice(&body)
            .map_err(|_| CredentialError::Unreachable("the answer has no access_token".to_owned()))?;
        let life = Duration::from_secs(answer.expires_in).min(LONG);
        Ok(Token {
            authorization: Authorization::bearer(answer.access_token)?,
            until: asked + life.saturating_sub(EARLY),
        })
    }

    /// Where to ask, and what.
    fn request(self, now: Timestamp) -> Result<(String, String), CredentialError> {
        match self {
            Self::ServiceAccount {
                client_email,
                private_key,
                private_key_id,
                token_uri,
            } => {
                let claims = serde_json::json!({
                    "iss": client_email, "scope": SCOPE, "aud": token_uri,
                    "iat": now.as_second(), "exp": now.as_second() + GOOD,
                });
                let head = serde_json::json!({ "alg": "RS256", "typ": "JWT", "kid": private_key_id });
                let signed = signed(&head, &claims, private_key.expose_secret())?;
                let form = [
                    ("grant_type", "urn:ietf:params:oauth:grant-type:jwt-bearer"),
                    ("assertion", &signed),
                ];
                Ok((token_uri, encoded(&form)))
            }
            Self::AuthorizedUser {
                client_id,
                client_secret,
                refresh_token,
                token_uri,
            } => {
                let form = [
                    ("grant_type", "refresh_token"),
                    ("client_id", &client_id),
                    ("client_secret", client_secret.expose_secret()),
                    ("refresh_token", refresh_token.expose_secret()),
                ];
                Ok((token_uri, encoded(&form)))
            }
        }
    }
}

fn encoded(form: &[(&str, &str)]) -> String {
    let mut url = Url::parse("form:").ok();
    if let Some(url) = &mut url {
        url.query_pairs_mut().extend_pairs(form);
    }
    url.and_then(|url| url.query().map(str::to_owned)).unwrap_or_default()
}

/// A JWT signed with a key in PEM (PKCS #8).
fn signed(head: &serde_json::Value, claims: &serde_json::Value, pem: &str) -> Result<String, CredentialError> {
    let bad = || CredentialError::Key("private_key");
    let lines: String = pem
        .lines()
        .filter(|line| !line.starts_with("-----"))
        .map(str::trim)
        .collect();
    let der = STANDARD.decode(lines).map_err(|_| bad())?;
    let key = RsaKeyPair::from_pkcs8(&der).map_err(|_| bad())?;
    let parts = [head, claims].map(|part| URL_SAFE_NO_PAD.encode(part.to_string()));
    let text = parts.join(".");
    let mut signature = vec![0; key.public().modulus_len()];
    key.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), text.as_bytes(), &mut signature)
        .map_err(|_| bad())?;
    Ok(format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature)))
}
