//! The trace: built from records, sent to Langfuse as OTLP over HTTP.
//!
//! [`spans`] maps records to spans, [`otlp`] spans to requests, [`export`] sends them.

mod export;
#[cfg(test)]
mod export_tests;
mod line;
pub mod otlp;
pub mod span;
pub mod spans;
mod text;

use protocol::names::env;
use secrecy::SecretString;

pub use self::export::Exporter;

/// Where Langfuse is when nothing is said: its chart's service in the namespace that its documentation uses.
pub const DEFAULT_HOST: &str = "http://langfuse-web.langfuse.svc.cluster.local:3000";

/// Where traces go and whose they are.
#[derive(Clone)]
pub struct LangfuseConfig {
    /// Base URL of Langfuse.
    pub host: String,
    /// Public key.
    pub public_key: String,
    /// Secret key.
    pub secret_key: SecretString,
    /// UID of the session: the trace id comes from it.
    pub session_uid: String,
    /// Name of the session: name of the trace and its session id.
    pub session_name: String,
    /// Namespace of the session.
    pub namespace: String,
    /// Run that the attempt belongs to.
    pub run: u32,
    /// Who the session is for.
    pub user: Option<protocol::spec::User>,
    /// Texts are masked: what remains is usage, models, names of tools, times.
    pub mask: bool,
    /// What the trace can be found by, beside its namespace.
    pub tags: Vec<String>,
}

/// Where Langfuse is, when it is wanted.
#[derive(Clone)]
pub struct Access {
    /// Base URL.
    pub host: String,
    /// Public key.
    pub public_key: String,
    /// Secret key.
    pub secret_key: SecretString,
    /// See [`LangfuseConfig::mask`].
    pub mask: bool,
}

/// Traces are wanted, and there are no keys for them.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "failed to send traces: LANGFUSE_ENABLED is set, but {missing} is not; put both keys into the Secret {}",
    protocol::names::LANGFUSE_KEYS
)]
pub struct NoKeys {
    missing: &'static str,
}

impl Access {
    /// Reads the environment; `None`: traces are off.
    pub fn from_env(var: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, NoKeys> {
        let filled = |name: &str| {
            var(name)
                .map(|value| value.trim().to_owned())
                .filter(|value| !value.is_empty())
        };
        let on = |name: &str| filled(name).is_some_and(|value| value == "1" || value.eq_ignore_ascii_case("true"));
        if !on(env::LANGFUSE_ENABLED) {
            return Ok(None);
        }
        let key = |missing| filled(missing).ok_or(NoKeys { missing });
        Ok(Some(Self {
            host: filled(env::LANGFUSE_HOST).unwrap_or_else(|| DEFAULT_HOST.to_owned()),
            public_key: key(env::LANGFUSE_PUBLIC_KEY)?,
            secret_key: key(env::LANGFUSE_SECRET_KEY)?.into(),
            mask: on(env::LANGFUSE_MASK_MESSAGES),
        }))
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn access(pairs: &[(&str, &str)]) -> Result<Option<Access>, NoKeys> {
        let pairs: Vec<(String, String)> = pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        Access::from_env(|name| {
            pairs
                .iter()
                .find(|(key, _)| key == name)
                .map(|(_, value)| value.clone())
        })
    }

    const KEYS: [(&str, &str); 2] = [("LANGFUSE_PUBLIC_KEY", "pk-fake"), ("LANGFUSE_SECRET_KEY", "sk-fake\n")];

    #[rstest]
    #[case("true", true)]
    #[case("1", true)]
    #[case("TRUE", true)]
    #[case("false", false)]
    #[case("", false)]
    fn traces_are_sent_when_they_are_enabled(#[case] enabled: &str, #[case] on: bool) {
        let access = access(&[KEYS[0], KEYS[1], ("LANGFUSE_ENABLED", enabled)]).unwrap();
        assert_eq!(access.map(|access| access.host), on.then(|| DEFAULT_HOST.to_owned()));
    }

    #[test]
    fn traces_without_keys_are_an_error_that_names_the_secret() {
        let error = access(&[("LANGFUSE_ENABLED", "1"), KEYS[0]]).map(|_| ()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "failed to send traces: LANGFUSE_ENABLED is set, but LANGFUSE_SECRET_KEY is not; \
             put both keys into the Secret langfuse-keys"
        );
    }
}
