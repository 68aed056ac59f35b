//! Who may do what: callers by their Kubernetes rights or API key, runners by the pod that their token is bound to.

pub mod api_key;
pub mod kubernetes;
pub mod rate;
pub mod runner;

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use http::{
    HeaderMap,
    header::{AUTHORIZATION, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL},
};

use crate::Gateway;
use kubernetes::{Caller, Refusal, Verb};

/// The header of an API key.
pub const API_KEY: &str = "x-api-key";

/// A subprotocol that carries a token instead of the header that pages cannot set: this, and the token in base64url. The API
/// server takes tokens the same way.
pub const BEARER_PROTOCOL: &str = "base64url.bearer.authorization.k8s.io.";

const BASE64URL: GeneralPurpose = GeneralPurpose::new(
    &alphabet::URL_SAFE,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

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
        let token = bearer(headers).map(str::to_owned);
        token.or_else(|| offered(headers)).map(Self::Token)
    }
}

/// The subprotocols that a WebSocket's client offers.
pub fn protocols(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let values = headers.get_all(SEC_WEBSOCKET_PROTOCOL).into_iter();
    values
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
}

/// The token among the subprotocols of an upgrade.
fn offered(headers: &HeaderMap) -> Option<String> {
    headers.get(SEC_WEBSOCKET_KEY)?;
    let token = protocols(headers).find_map(|protocol| protocol.strip_prefix(BEARER_PROTOCOL))?;
    String::from_utf8(BASE64URL.decode(token).ok()?)
        .ok()
        .filter(|token| !token.is_empty())
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

    /// Counts a request of a caller.
    pub fn count(&self, caller: &Caller) -> Result<(), Refusal> {
        let counted = match &caller.key {
            Some(key) => key.count(),
            None => self.rates.count(&caller.identity.user),
        };
        counted.map_err(Refusal::TooOften)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn credential(headers: &[(&'static str, &str)]) -> Option<Credential> {
        let headers = headers.iter().map(|(name, value)| {
            let name = http::HeaderName::from_static(name);
            (name, value.parse().unwrap())
        });
        Credential::of(&headers.collect())
    }

    #[test]
    fn a_token_may_come_as_a_subprotocol_of_an_upgrade_and_nowhere_else() {
        let token = |text: &str| Some(Credential::Token(text.to_owned()));
        let offer = format!("events.agentic.v1, {BEARER_PROTOCOL}dG9rZW4");
        let key = ("sec-websocket-key", "x");
        assert_eq!(credential(&[key, ("sec-websocket-protocol", &offer)]), token("token"));
        let padded = format!("{BEARER_PROTOCOL}dG9rZW4x");
        assert_eq!(credential(&[key, ("sec-websocket-protocol", &padded)]), token("token1"));
        assert_eq!(credential(&[("sec-websocket-protocol", &offer)]), None, "no upgrade");
        let header = ("authorization", "Bearer other");
        assert_eq!(
            credential(&[key, header, ("sec-websocket-protocol", &offer)]),
            token("other")
        );
        for broken in ["", "!", "_w"] {
            let offer = format!("{BEARER_PROTOCOL}{broken}");
            assert_eq!(credential(&[key, ("sec-websocket-protocol", &offer)]), None, "{broken}");
        }
    }
}
