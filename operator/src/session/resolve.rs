//! Session → `ProjectSettings` → built-in: what an attempt is made with.

use crds::{
    AgenticSessionSpec, ProjectSettingsSpec,
    session::{Amounts, Limits, LlmSettings, PodOptions, Resources},
};
use k8s_openapi::{api::core::v1::ResourceRequirements, apimachinery::pkg::api::resource::Quantity};
use protocol::{NanoUsd, names::RUNNER_SECRETS, price::Price, spec::LiveLimits};

use super::{
    quantity::exceeds,
    validate::{Claim, DEFAULT_MAX_ATTEMPTS, DEFAULT_TIMEOUT, DEFAULT_WORKSPACE_SIZE},
};

/// Idleness of an interactive session when nothing else is said, seconds.
pub const DEFAULT_INACTIVITY: u64 = 1_800;

/// A default, lowered to the ceiling; without a default the ceiling itself.
fn under<T: PartialOrd>(default: Option<T>, ceiling: Option<T>) -> Option<T> {
    match (default, ceiling) {
        (Some(default), Some(ceiling)) if default > ceiling => Some(ceiling),
        (Some(default), _) => Some(default),
        (None, ceiling) => ceiling,
    }
}

/// Everything that may change while an attempt runs.
pub fn limits(spec: &AgenticSessionSpec, settings: &ProjectSettingsSpec) -> LiveLimits {
    let none = Limits::default();
    let of = |limits: &Option<Limits>| limits.clone().unwrap_or_default();
    let (asked, default) = (spec.limits.as_ref().unwrap_or(&none), of(&settings.limits));
    let ceilings = settings.ceilings.clone().unwrap_or_default();
    let ceiling = of(&ceilings.limits);
    let seconds = |value: Option<u32>| value.map(u64::from);
    let timeout = under(
        seconds(settings.timeout).or(Some(DEFAULT_TIMEOUT)),
        seconds(ceilings.timeout),
    );
    LiveLimits {
        timeout: seconds(spec.timeout).or(timeout),
        inactivity_timeout: seconds(spec.inactivity_timeout)
            .or(seconds(settings.inactivity_timeout))
            .or(Some(DEFAULT_INACTIVITY)),
        max_turns: asked.max_turns.or(under(default.max_turns, ceiling.max_turns)),
        max_cost_usd: usd(asked).or(under(usd(&default), usd(&ceiling))),
        max_tokens: asked.max_tokens.or(under(default.max_tokens, ceiling.max_tokens)),
    }
}

/// The same as the session itself names it.
pub fn asked(spec: &AgenticSessionSpec) -> LiveLimits {
    let none = Limits::default();
    let asked = spec.limits.as_ref().unwrap_or(&none);
    LiveLimits {
        timeout: spec.timeout.map(u64::from),
        inactivity_timeout: spec.inactivity_timeout.map(u64::from),
        max_turns: asked.max_turns,
        max_cost_usd: usd(asked),
        max_tokens: asked.max_tokens,
    }
}

/// The limits of an attempt under way whose session asks for something else by now: what it asks for as before stays as it was resolved
/// when the attempt began, whatever the namespace says by now.
pub fn changed(told: LiveLimits, (before, now): (LiveLimits, LiveLimits), resolved: LiveLimits) -> LiveLimits {
    fn one<T: PartialEq>(told: T, before: &T, now: &T, resolved: T) -> T {
        if before == now { told } else { resolved }
    }
    let LiveLimits {
        timeout,
        inactivity_timeout,
        max_turns,
        max_cost_usd,
        max_tokens,
    } = now;
    LiveLimits {
        timeout: one(told.timeout, &before.timeout, &timeout, resolved.timeout),
        inactivity_timeout: one(
            told.inactivity_timeout,
            &before.inactivity_timeout,
            &inactivity_timeout,
            resolved.inactivity_timeout,
        ),
        max_turns: one(told.max_turns, &before.max_turns, &max_turns, resolved.max_turns),
        max_cost_usd: one(
            told.max_cost_usd,
            &before.max_cost_usd,
            &max_cost_usd,
            resolved.max_cost_usd,
        ),
        max_tokens: one(told.max_tokens, &before.max_tokens, &max_tokens, resolved.max_tokens),
    }
}

/// The amount; the CRD's rules leave nothing that is none.
pub fn usd(limits: &Limits) -> Option<NanoUsd> {
    limits.max_cost_usd.as_deref()?.parse().ok()
}

/// The model and how it works.
pub fn llm(spec: &AgenticSessionSpec, settings: &ProjectSettingsSpec) -> LlmSettings {
    let asked = spec.llm_settings.clone().unwrap_or_default();
    let default = settings.llm_settings.clone().unwrap_or_default();
    LlmSettings {
        model: asked.model.or(default.model),
        fallback_model: asked.fallback_model.or(default.fallback_model),
        max_tokens: asked.max_tokens.or(default.max_tokens),
        temperature: asked.temperature.or(default.temperature),
    }
}

/// The volume.
pub fn claim(spec: &AgenticSessionSpec, settings: &ProjectSettingsSpec) -> Claim {
    let asked = spec.workspace.clone().unwrap_or_default();
    if let Some(name) = asked.existing_claim {
        return Claim::Existing(name);
    }
    let default = settings.workspace.clone().unwrap_or_default();
    let ceiling = settings.ceilings.as_ref().and_then(|c| c.workspace_size.clone());
    let built_in = || Quantity(DEFAULT_WORKSPACE_SIZE.to_owned());
    let size = asked
        .size
        .unwrap_or_else(|| lowered(default.size.unwrap_or_else(built_in), ceiling.as_ref()));
    if asked.ephemeral.unwrap_or_default() {
        return Claim::Ephemeral { size };
    }
    Claim::Own {
        size,
        storage_class: asked.storage_class_name.or(default.storage_class_name),
        retention: asked.retention.or(default.retention).unwrap_or_default(),
    }
}

fn lowered(amount: Quantity, ceiling: Option<&Quantity>) -> Quantity {
    match ceiling {
        Some(ceiling) if exceeds(&amount, ceiling) => ceiling.clone(),
        _ => amount,
    }
}

/// Image and placement.
pub fn pod(spec: &AgenticSessionSpec, settings: &ProjectSettingsSpec) -> PodOptions {
    let asked = spec.pod.clone().unwrap_or_default();
    let default = settings.pod.clone().unwrap_or_default();
    PodOptions {
        image: asked.image.or(default.image),
        image_pull_secrets: or(asked.image_pull_secrets, default.image_pull_secrets),
        node_selector: if asked.node_selector.is_empty() {
            default.node_selector
        } else {
            asked.node_selector
        },
        tolerations: or(asked.tolerations, default.tolerations),
        priority_class_name: asked.priority_class_name.or(default.priority_class_name),
        runtime_class_name: asked.runtime_class_name.or(default.runtime_class_name),
        service_account_name: asked.service_account_name.or(default.service_account_name),
        read_only_root_filesystem: asked.read_only_root_filesystem.or(default.read_only_root_filesystem),
    }
}

fn or<T>(asked: Vec<T>, default: Vec<T>) -> Vec<T> {
    if asked.is_empty() { default } else { asked }
}

/// The Secrets of the runner; the two built-in ones when nobody names any.
pub fn secrets(spec: &AgenticSessionSpec, settings: &ProjectSettingsSpec) -> Vec<String> {
    let named = spec.runner_secrets.as_ref().or(settings.runner_secrets.as_ref());
    named.map_or_else(
        || RUNNER_SECRETS.map(str::to_owned).to_vec(),
        |names| names.iter().map(|name| name.0.clone()).collect(),
    )
}

/// Attempts of a run.
pub fn attempts(spec: &AgenticSessionSpec, settings: &ProjectSettingsSpec) -> u32 {
    let asked = spec.retry.and_then(|retry| retry.max_attempts);
    let default = settings
        .retry
        .and_then(|retry| retry.max_attempts)
        .or(Some(DEFAULT_MAX_ATTEMPTS));
    let ceiling = settings.ceilings.as_ref().and_then(|c| c.max_attempts);
    asked.or(under(default, ceiling)).unwrap_or(DEFAULT_MAX_ATTEMPTS)
}

/// Prices of the namespace.
pub fn price(price: &crds::project_settings::ModelPrice) -> Price {
    // A US dollar per million tokens is a thousand billionths per token, so three digits behind the point are whole.
    let nanos = |text: &str| text.parse::<NanoUsd>().map_or(0, |usd| usd.0 / 1_000_000);
    let input = nanos(&price.input);
    Price {
        input,
        output: nanos(&price.output),
        cache_read: price.cache_read.as_deref().map_or(input, nanos),
        cache_write: price.cache_write.as_deref().map_or(input.saturating_mul(5) / 4, nanos),
        tier: None,
    }
}

/// What the session names, then the defaults, then the built-in amounts; all that the session does not name at most the ceiling.
///
/// A built-in request gives way to a lower limit, which the API server would refuse beside it.
pub fn resources(spec: &AgenticSessionSpec, settings: &ProjectSettingsSpec) -> ResourceRequirements {
    let asked = merged(spec.resources.as_ref(), settings.resources.as_ref());
    let mut resources = ResourceRequirements::from(&asked);
    let limits = resources.limits.get_or_insert_default();
    let requests = resources.requests.get_or_insert_default();
    // A limit below a request that is named would be refused: then there is no built-in limit.
    if !requests.contains_key("memory") {
        limits
            .entry("memory".to_owned())
            .or_insert_with(|| Quantity("4Gi".to_owned()));
    }
    for (name, amount) in [("cpu", "500m"), ("memory", "1Gi")] {
        // With a limit and no request, Kubernetes takes the limit for the request.
        let limited = asked.limits.as_ref().is_some_and(|l| match name {
            "cpu" => l.cpu.is_some(),
            _ => l.memory.is_some(),
        });
        if !limited {
            requests
                .entry(name.to_owned())
                .or_insert_with(|| Quantity(amount.to_owned()));
        }
    }
    let ceilings = settings.ceilings.as_ref().and_then(|c| c.resources.as_ref());
    let ceilings: std::collections::BTreeMap<_, _> = ceilings.map(Into::into).unwrap_or_default();
    for (name, ceiling) in &ceilings {
        limits.entry(name.clone()).or_insert_with(|| ceiling.clone());
        // What the session itself names above it is refused elsewhere.
        for amounts in [&mut *limits, &mut *requests] {
            if let Some(amount) = amounts.get_mut(name) {
                *amount = lowered(amount.clone(), Some(ceiling));
            }
        }
    }
    resources
}

/// Amount by amount; a default request gives way to a limit of the session below it, and a default limit to a request above it.
fn merged(asked: Option<&Resources>, default: Option<&Resources>) -> Resources {
    let amounts = |resources: Option<&Resources>, limits: bool| {
        let found = resources.and_then(|r| if limits { r.limits.clone() } else { r.requests.clone() });
        found.unwrap_or_default()
    };
    let (mut limits, mut requests) = (amounts(asked, true), amounts(asked, false));
    let (default_limits, default_requests) = (amounts(default, true), amounts(default, false));
    for (limit, request, default_limit, default_request) in [
        (
            &mut limits.cpu,
            &mut requests.cpu,
            default_limits.cpu,
            default_requests.cpu,
        ),
        (
            &mut limits.memory,
            &mut requests.memory,
            default_limits.memory,
            default_requests.memory,
        ),
        (
            &mut limits.ephemeral_storage,
            &mut requests.ephemeral_storage,
            default_limits.ephemeral_storage,
            default_requests.ephemeral_storage,
        ),
    ] {
        if limit.is_none() {
            *limit = default_limit.filter(|limit| !request.as_ref().is_some_and(|request| exceeds(request, limit)));
        }
        if request.is_none() {
            *request = default_request.filter(|request| !limit.as_ref().is_some_and(|limit| exceeds(request, limit)));
        }
    }
    Resources {
        requests: (requests != Amounts::default()).then_some(requests),
        limits: (limits != Amounts::default()).then_some(limits),
    }
}

#[cfg(test)]
mod tests {
    use crds::session::Retention;
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    fn read(spec: &Value, settings: &Value) -> (AgenticSessionSpec, ProjectSettingsSpec) {
        let spec = serde_json::from_value(spec.clone()).unwrap();
        (spec, serde_json::from_value(settings.clone()).unwrap())
    }

    /// The limits of the second kind have other amounts, so that a swap shows.
    #[test]
    fn limits_are_the_sessions_then_the_namespaces_under_the_ceiling_then_the_ceiling() {
        let numbers = |spec: &Value, settings: &Value| {
            let (spec, settings) = read(spec, settings);
            let found = limits(&spec, &settings);
            let cents = found.max_cost_usd.map(|usd| usd.0 / 10_000_000);
            (
                found.timeout,
                found.inactivity_timeout,
                found.max_turns,
                cents,
                found.max_tokens,
                attempts(&spec, &settings),
            )
        };
        let of =
            |turns: u32, usd: &str, tokens: u64| json!({"maxTurns": turns, "maxCostUSD": usd, "maxTokens": tokens});
        let own =
            json!({"timeout": 11, "inactivityTimeout": 0, "limits": of(12, "0.13", 14), "retry": {"maxAttempts": 5}});
        let mut settings =
            json!({"timeout": 31, "inactivityTimeout": 35, "limits": of(32, "0.33", 34), "retry": {"maxAttempts": 7}});
        assert_eq!(
            numbers(&json!({}), &json!({})),
            (Some(3_600), Some(1_800), None, None, None, 3)
        );
        assert_eq!(
            numbers(&own, &settings),
            (Some(11), Some(0), Some(12), Some(13), Some(14), 5)
        );
        assert_eq!(
            numbers(&json!({}), &settings),
            (Some(31), Some(35), Some(32), Some(33), Some(34), 7)
        );
        settings["ceilings"] = json!({"timeout": 21, "limits": of(22, "0.23", 24), "maxAttempts": 6});
        assert_eq!(
            numbers(&json!({}), &settings),
            (Some(21), Some(35), Some(22), Some(23), Some(24), 6)
        );
        settings["ceilings"] = json!({"timeout": 41, "limits": of(42, "0.43", 44), "maxAttempts": 8});
        assert_eq!(
            numbers(&json!({}), &settings),
            (Some(31), Some(35), Some(32), Some(33), Some(34), 7)
        );
        let alone = json!({"ceilings": {"timeout": 21, "limits": of(22, "0.23", 24), "maxAttempts": 2}});
        assert_eq!(
            numbers(&json!({}), &alone),
            (Some(21), Some(1_800), Some(22), Some(23), Some(24), 2)
        );
    }

    #[test]
    fn the_volume_is_the_sessions_then_the_namespaces_under_the_ceiling() {
        let resolved = |spec: &Value, settings: &Value| {
            let (spec, settings) = read(&json!({"workspace": spec}), settings);
            claim(&spec, &settings)
        };
        let own = |size: &str, class: Option<&str>, retention| Claim::Own {
            size: Quantity(size.to_owned()),
            storage_class: class.map(str::to_owned),
            retention,
        };
        let settings = json!({"workspace": {"size": "3Gi", "storageClassName": "slow", "retention": "Retain"}});
        let mut low = settings.clone();
        low["ceilings"] = json!({"workspaceSize": "2Gi"});
        let asks = json!({"size": "1Gi", "storageClassName": "fast", "retention": "Delete"});
        assert_eq!(resolved(&asks, &low), own("1Gi", Some("fast"), Retention::Delete));
        assert_eq!(
            resolved(&json!({}), &settings),
            own("3Gi", Some("slow"), Retention::Retain)
        );
        assert_eq!(resolved(&json!({}), &low), own("2Gi", Some("slow"), Retention::Retain));
        let built_in = json!({"ceilings": {"workspaceSize": "4Gi"}});
        assert_eq!(resolved(&json!({}), &built_in), own("4Gi", None, Retention::Delete));
        assert_eq!(
            resolved(&json!({"existingClaim": "c"}), &settings),
            Claim::Existing("c".to_owned())
        );
        let size = Quantity("2Gi".to_owned());
        assert_eq!(resolved(&json!({"ephemeral": true}), &low), Claim::Ephemeral { size });
    }

    #[test]
    fn image_placement_and_model_are_the_sessions_and_else_the_namespaces_one_by_one() {
        let of = |n: u32| {
            json!({
                "image": format!("image-{n}"), "imagePullSecrets": [format!("pull-{n}")], "nodeSelector": {"node": format!("n-{n}")},
                "tolerations": [{"key": format!("key-{n}"), "operator": "Exists"}], "priorityClassName": format!("priority-{n}"),
                "runtimeClassName": format!("runtime-{n}"), "serviceAccountName": format!("account-{n}"),
                "readOnlyRootFilesystem": n == 1,
            })
        };
        let model = |n: u32| json!({"model": format!("m-{n}"), "fallbackModel": format!("f-{n}"), "maxTokens": n, "temperature": 1.0 / f64::from(n)});
        let settings = json!({"pod": of(2), "llmSettings": model(2)});
        let seen = |spec: &Value| {
            let (spec, settings) = read(spec, &settings);
            (json!(pod(&spec, &settings)), json!(llm(&spec, &settings)))
        };
        assert_eq!(seen(&json!({"pod": of(1), "llmSettings": model(1)})), (of(1), model(1)));
        assert_eq!(seen(&json!({})), (of(2), model(2)));
        for (field, value) in of(1).as_object().unwrap() {
            let mut expected = of(2);
            expected[field] = value.clone();
            assert_eq!(seen(&json!({"pod": {field: value}})).0, expected);
        }
    }

    #[test]
    fn secrets_that_anyone_names_take_the_place_of_the_built_in_ones() {
        let named = |spec: &Value, settings: &Value| {
            let (spec, settings) = read(spec, settings);
            secrets(&spec, &settings)
        };
        let (one, two) = (json!({"runnerSecrets": ["one"]}), json!({"runnerSecrets": ["two"]}));
        assert_eq!(named(&one, &two), ["one"]);
        assert_eq!(named(&json!({}), &two), ["two"]);
        assert_eq!(
            named(&json!({"runnerSecrets": []}), &two),
            [""; 0],
            "none is a word, too"
        );
        assert_eq!(named(&json!({}), &json!({})), RUNNER_SECRETS);
    }

    #[test]
    fn a_price_is_billionths_of_a_dollar_for_a_token() {
        let whole = json!({"input": "3", "output": "15", "cacheRead": "0.3", "cacheWrite": "3.75"});
        let of = |read: Value| price(&serde_json::from_value(read).unwrap());
        let numbers = |price: Price| (price.input, price.output, price.cache_read, price.cache_write);
        assert_eq!(numbers(of(whole)), (3_000, 15_000, 300, 3_750));
        assert_eq!(
            numbers(of(json!({"input": "0.124", "output": "1"}))),
            (124, 1_000, 124, 155)
        );
    }

    #[rstest]
    #[case::a_default(json!({}), json!({"limits": {"memory": "3Gi"}}), json!({"limits": {"memory": "3Gi"}, "requests": {"cpu": "500m"}}))]
    #[case::a_default_limit_below_a_request_of_the_session(
        json!({"requests": {"memory": "3Gi"}}), json!({"limits": {"memory": "2Gi", "cpu": "1"}}),
        json!({"limits": {"cpu": "1"}, "requests": {"memory": "3Gi"}})
    )]
    #[case::a_default_request_above_a_limit_of_the_session(
        json!({"limits": {"memory": "2Gi"}}), json!({"requests": {"memory": "3Gi", "cpu": "2"}}),
        json!({"limits": {"memory": "2Gi"}, "requests": {"cpu": "2"}})
    )]
    #[case::defaults_that_are_as_much_as_the_session_asks_for(
        json!({"limits": {"memory": "2Gi"}, "requests": {"cpu": "1"}}), json!({"requests": {"memory": "2Gi"}, "limits": {"cpu": "1"}}),
        json!({"limits": {"memory": "2Gi", "cpu": "1"}, "requests": {"memory": "2Gi", "cpu": "1"}})
    )]
    fn amounts_of_session_and_namespace_do_not_contradict_each_other(
        #[case] asked: Value,
        #[case] default: Value,
        #[case] expected: Value,
    ) {
        let (spec, settings) = read(&json!({"resources": asked}), &json!({"resources": default}));
        assert_eq!(json!(resources(&spec, &settings)), expected);
    }

    #[test]
    fn what_the_session_does_not_name_is_at_most_the_ceiling() {
        let ceilings = json!({"resources": {"cpu": "250m", "memory": "2Gi", "ephemeral-storage": "1Gi"}});
        let (spec, settings) = read(&json!({}), &json!({"ceilings": ceilings}));
        let expected = json!({
            "limits": {"cpu": "250m", "memory": "2Gi", "ephemeral-storage": "1Gi"}, "requests": {"cpu": "250m", "memory": "1Gi"},
        });
        assert_eq!(json!(resources(&spec, &settings)), expected);
    }
}
