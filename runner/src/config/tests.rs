use std::collections::HashMap;

use secrecy::ExposeSecret as _;

use super::*;
use crate::proxy::Credential;

fn pod() -> HashMap<&'static str, &'static str> {
    HashMap::from([
        (env::AGENTIC_SESSION_UID, "6fa459ea-ee8a-3ca4-894e-db77e160355e"),
        (env::AGENTIC_SESSION_NAME, "hello"),
        (env::AGENTIC_SESSION_NAMESPACE, "team"),
        (env::POD_UID, "pod-1"),
        (env::ATTEMPT, "3"),
        (env::PROMPT, "do it"),
        (env::AGENTIC_SPEC_JSON, r#"{"run":2,"usedSeconds":40}"#),
        (env::TIMEOUT, "90"),
    ])
}

fn config(vars: &HashMap<&'static str, &'static str>) -> Result<Config, ConfigError> {
    Config::from_env(&|name| {
        vars.get(name)
            .filter(|value| !value.is_empty())
            .map(|value| (*value).to_owned())
    })
}

#[test]
fn a_pod_is_read_from_its_environment() {
    let config = config(&pod()).unwrap();
    assert_eq!((config.attempt, config.run, config.used.as_secs()), (Some(3), 2, 40));
    assert_eq!(config.limits.timeout, Some(90));
    assert_eq!(
        config.folders.state.to_str(),
        Some("/data/sessions/6fa459ea-ee8a-3ca4-894e-db77e160355e/state")
    );
    assert!(config.upstream.is_none() && config.gateway.is_none() && config.langfuse.is_none());
}

#[test]
fn progress_is_shown_where_the_transcript_is_and_not_among_records() {
    let mut vars = pod();
    let text = config(&vars).unwrap();
    assert!(Arc::ptr_eq(&text.stdout.unwrap(), &text.repos.progress.unwrap()));
    vars.insert(env::LOG_FORMAT, "json");
    let json = config(&vars).unwrap();
    assert!(json.stdout.is_some() && json.repos.progress.is_none());
}

#[test]
fn a_key_comes_before_a_token_and_an_empty_one_is_none() {
    let mut vars = pod();
    vars.insert(env::ANTHROPIC_API_KEY, "");
    vars.insert(env::ANTHROPIC_AUTH_TOKEN, "fake-token");
    vars.insert(env::ANTHROPIC_BASE_URL, "http://model.example/");
    let upstream = config(&vars).unwrap().upstream.unwrap();
    assert_eq!(upstream.base_url, "http://model.example");
    let Credential::Secrets(secrets) = upstream.credential else {
        panic!("what the Secrets hold")
    };
    assert!(secrets.value(env::ANTHROPIC_API_KEY).is_none());
    let token = secrets.value(env::ANTHROPIC_AUTH_TOKEN).unwrap();
    assert_eq!(token.expose_secret(), "fake-token");
}

#[rstest::rstest]
#[case::ours([("VERTEX_ENABLED", "true"), ("VERTEX_PROJECT_ID", "p"), ("VERTEX_REGION", "us-east5")])]
#[case::the_clis([("CLAUDE_CODE_USE_VERTEX", "1"), ("ANTHROPIC_VERTEX_PROJECT_ID", "p"), ("CLOUD_ML_REGION", "us-east5")])]
fn vertex_is_known_by_either_name(#[case] names: [(&'static str, &'static str); 3]) {
    let mut vars = pod();
    vars.extend(names);
    assert!(config(&vars).unwrap().upstream.is_none(), "there is no token yet");
    vars.insert(env::VERTEX_USER_TOKEN, "fake-token");
    let upstream = config(&vars).unwrap().upstream.unwrap();
    assert_eq!(upstream.base_url, "https://us-east5-aiplatform.googleapis.com/v1");
    assert_eq!(upstream.vertex.unwrap().project, "p");
    vars.insert(names[1].0, "");
    assert!(config(&vars).is_err(), "a project is needed");
}

#[test]
fn what_comes_from_a_secret_is_held_and_what_the_operator_sets_is_not() {
    let vars = [
        ("PROMPT", "say it"),
        ("KUBERNETES_PORT", "tcp://10.0.0.1"),
        ("OUR_KEY", "v"),
        ("EMPTY", ""),
    ];
    let held = held_in_pod(
        vars.into_iter()
            .map(|(name, value)| (name.to_owned(), value.to_owned())),
    );
    assert_eq!(
        held.iter().map(|held| held.name.as_str()).collect::<Vec<_>>(),
        ["OUR_KEY"]
    );
}

#[test]
fn what_is_missing_or_unreadable_is_named() {
    let mut vars = pod();
    vars.remove(env::POD_UID);
    assert!(config(&vars).err().unwrap().to_string().contains("POD_UID is not set"));
    let mut vars = pod();
    vars.insert(env::ATTEMPT, "first");
    assert!(config(&vars).err().unwrap().to_string().contains("ATTEMPT=\"first\""));
}
