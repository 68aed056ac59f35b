//! Which model API and which Langfuse the demo uses, and the Secrets that say so to the session.

use std::env;

use anyhow::Result;
use protocol::names::{LANGFUSE_CONFIG, LANGFUSE_KEYS, RUNNER_SECRETS, env as variable};
use serde_json::{Value, json};

use super::Kubectl;

/// What the mock model and the trace collector accept; as in `tests/deploy/tools.yaml`.
const FAKE_KEY: &str = "sk-ant-fake-000000000000000000000000000000000000";
const FAKE_PUBLIC_KEY: &str = "pk-lf-fake-0000";
const FAKE_SECRET_KEY: &str = "sk-lf-fake-0000-5b0f2c6d9e7a";
const MOCK_MODEL: &str = "http://mock-model.agentic-test-tools.svc:8080";
const TRACE_COLLECTOR: &str = "http://trace-collector.agentic-test-tools.svc:3000";

/// The user's own, where the environment has them.
pub(super) struct Keys {
    model: Option<Model>,
    langfuse: Option<Langfuse>,
}

struct Model {
    key: String,
    base_url: Option<String>,
}

struct Langfuse {
    host: String,
    public_key: String,
    secret_key: String,
}

impl Keys {
    pub(super) fn from_environment() -> Self {
        let value = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        let model = value(variable::ANTHROPIC_API_KEY).map(|key| Model {
            key,
            base_url: value(variable::ANTHROPIC_BASE_URL),
        });
        // Traces leave the machine only where the prompts do so anyway.
        let langfuse = model.as_ref().and_then(|_| {
            Some(Langfuse {
                host: value(variable::LANGFUSE_HOST)?,
                public_key: value(variable::LANGFUSE_PUBLIC_KEY)?,
                secret_key: value(variable::LANGFUSE_SECRET_KEY)?,
            })
        });
        Self { model, langfuse }
    }

    pub(super) fn announcement(&self) -> &'static str {
        match self.model {
            Some(_) => "ANTHROPIC_API_KEY is set: the session uses the real model API, and it costs a little",
            None => "ANTHROPIC_API_KEY is not set: the session uses a mock model that follows the script in its prompt",
        }
    }

    pub(super) fn need_egress(&self) -> bool {
        self.model.is_some()
    }

    pub(super) fn need_test_tools(&self) -> bool {
        self.model.is_none() || self.langfuse.is_none()
    }

    /// Where a trace can be seen.
    pub(super) fn trace(&self, id: &str) -> String {
        match &self.langfuse {
            Some(langfuse) => format!("{} (trace {id})", langfuse.host),
            None => format!(
                "in the trace collector, which answers as Langfuse does:\n  \
                 kubectl -n {} port-forward svc/trace-collector 3000 &\n  \
                 curl -u {FAKE_PUBLIC_KEY}:{FAKE_SECRET_KEY} http://127.0.0.1:3000/api/public/traces/{id}",
                super::TEST_TOOLS
            ),
        }
    }

    pub(super) fn apply(&self, kubectl: &Kubectl<'_>, namespace: &str) -> Result<()> {
        kubectl.apply(&self.objects(namespace))
    }

    fn objects(&self, namespace: &str) -> [Value; 3] {
        let mut model = match &self.model {
            Some(model) => json!({variable::ANTHROPIC_API_KEY: model.key}),
            None => json!({variable::ANTHROPIC_API_KEY: FAKE_KEY, variable::ANTHROPIC_BASE_URL: MOCK_MODEL}),
        };
        if let Some(url) = self.model.as_ref().and_then(|model| model.base_url.as_ref()) {
            model[variable::ANTHROPIC_BASE_URL] = json!(url);
        }
        let (host, public_key, secret_key) = match &self.langfuse {
            Some(langfuse) => (
                langfuse.host.as_str(),
                langfuse.public_key.as_str(),
                langfuse.secret_key.as_str(),
            ),
            None => (TRACE_COLLECTOR, FAKE_PUBLIC_KEY, FAKE_SECRET_KEY),
        };
        let object = |kind: &str, name: &str, field: &str, data: Value| {
            json!({
                "apiVersion": "v1",
                "kind": kind,
                "metadata": {"name": name, "namespace": namespace},
                field: data,
            })
        };
        let traces = json!({variable::LANGFUSE_ENABLED: "true", variable::LANGFUSE_HOST: host});
        let trace_keys = json!({variable::LANGFUSE_PUBLIC_KEY: public_key, variable::LANGFUSE_SECRET_KEY: secret_key});
        [
            object("Secret", RUNNER_SECRETS[0], "stringData", model),
            object("ConfigMap", LANGFUSE_CONFIG, "data", traces),
            object("Secret", LANGFUSE_KEYS, "stringData", trace_keys),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paths;

    #[test]
    fn the_fake_keys_are_those_that_the_test_tools_accept() {
        let manifest = std::fs::read_to_string(paths::workspace().join("tests/deploy/tools.yaml")).unwrap();
        for key in [FAKE_KEY, FAKE_PUBLIC_KEY, FAKE_SECRET_KEY] {
            assert!(manifest.contains(key), "{key}");
        }
    }

    #[test]
    fn a_real_key_never_meets_the_mock_and_a_fake_one_never_the_real_api() {
        let real = Keys {
            model: Some(Model {
                key: "own".into(),
                base_url: None,
            }),
            langfuse: None,
        };
        assert_eq!(real.objects("n")[0]["stringData"], json!({"ANTHROPIC_API_KEY": "own"}));
        assert!(real.need_egress());
        let none = Keys {
            model: None,
            langfuse: None,
        };
        assert_eq!(none.objects("n")[0]["stringData"]["ANTHROPIC_BASE_URL"], MOCK_MODEL);
        assert!(!none.need_egress());
    }
}
