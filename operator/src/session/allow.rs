//! What the admin of a namespace allows: a session that asks for more waits, and is told what it may have.

use crds::{
    AgenticSessionSpec, ProjectSettingsSpec,
    session::{ObjectName, PodOptions, Resources},
};
use protocol::names::RUNNER_SECRETS;

use super::{
    quantity::{exceeds, is_nothing},
    resolve::usd,
    validate::Invalid,
};

/// Refuses the first value that is above its ceiling or in no list.
pub fn check(spec: &AgenticSessionSpec, settings: &ProjectSettingsSpec) -> Result<(), Invalid> {
    ceilings(spec, settings)?;
    let nobody = PodOptions::default();
    let default = settings.pod.as_ref().unwrap_or(&nobody);
    let asked = spec.pod.as_ref().unwrap_or(&nobody);
    let claim = spec.workspace.as_ref().and_then(|w| w.existing_claim.as_deref());
    one(
        "spec.workspace.existingClaim",
        claim,
        None,
        "allowedClaims",
        &settings.allowed_claims,
    )?;
    let mut secrets: Vec<_> = settings.allowed_secrets.clone();
    secrets.extend(settings.runner_secrets.iter().flatten().cloned());
    secrets.extend(RUNNER_SECRETS.map(|name| ObjectName(name.to_owned())));
    for secret in spec.runner_secrets.iter().flatten() {
        one("spec.runnerSecrets", Some(&secret.0), None, "allowedSecrets", &secrets)?;
    }
    let mut pull_secrets = settings.allowed_image_pull_secrets.clone();
    pull_secrets.extend(default.image_pull_secrets.iter().cloned());
    for secret in &asked.image_pull_secrets {
        one(
            "spec.pod.imagePullSecrets",
            Some(&secret.0),
            None,
            "allowedImagePullSecrets",
            &pull_secrets,
        )?;
    }
    for (field, asked, default, list, allowed) in [
        (
            "spec.pod.priorityClassName",
            &asked.priority_class_name,
            &default.priority_class_name,
            "allowedPriorityClasses",
            &settings.allowed_priority_classes,
        ),
        (
            "spec.pod.runtimeClassName",
            &asked.runtime_class_name,
            &default.runtime_class_name,
            "allowedRuntimeClasses",
            &settings.allowed_runtime_classes,
        ),
        (
            "spec.pod.serviceAccountName",
            &asked.service_account_name,
            &default.service_account_name,
            "allowedServiceAccounts",
            &settings.allowed_service_accounts,
        ),
    ] {
        one(field, asked.as_deref(), default.as_deref(), list, allowed)?;
    }
    image(asked, default, settings)?;
    tolerations(asked, default, settings)
}

/// Refuses a priority among Kueue's Jobs that the admin has not allowed.
pub fn queue_priority(asked: Option<&str>, settings: &ProjectSettingsSpec) -> Result<(), Invalid> {
    let allowed = &settings.allowed_priority_classes;
    one(
        "label kueue.x-k8s.io/priority-class",
        asked,
        None,
        "allowedPriorityClasses",
        allowed,
    )
}

fn one(
    field: &'static str,
    asked: Option<&str>,
    default: Option<&str>,
    list: &'static str,
    allowed: &[ObjectName],
) -> Result<(), Invalid> {
    let Some(asked) = asked.filter(|asked| Some(*asked) != default) else {
        return Ok(());
    };
    if allowed.iter().any(|name| name.0 == asked) {
        return Ok(());
    }
    let names = allowed.iter().map(|name| &*name.0).chain(default);
    Err(not_allowed(field, asked, list, names.collect()))
}

fn image(asked: &PodOptions, default: &PodOptions, settings: &ProjectSettingsSpec) -> Result<(), Invalid> {
    let Some(image) = asked
        .image
        .as_deref()
        .filter(|image| Some(*image) != default.image.as_deref())
    else {
        return Ok(());
    };
    if settings.allowed_images.iter().any(|prefix| begins(image, &prefix.0)) {
        return Ok(());
    }
    let prefixes = settings.allowed_images.iter().map(|prefix| &*prefix.0);
    Err(not_allowed(
        "spec.pod.image",
        image,
        "allowedImages",
        prefixes.collect(),
    ))
}

/// Whether `prefix` is a beginning of `image` that ends where a part of the name ends: `registry.example` allows
/// `registry.example/a` and neither `registry.example.org/a` nor, since another port is another server, `registry.example:1/a`.
fn begins(image: &str, prefix: &str) -> bool {
    if image.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return false;
    }
    let Some(rest) = image.strip_prefix(prefix) else {
        return false;
    };
    let is_one_part = !rest.contains('/');
    let (first, last) = (prefix.split('/').next(), prefix.rsplit('/').next().unwrap_or_default());
    // As in image names: what has no dot before the first slash is a name at the default registry.
    let is_server = first == Some(last) && (last.contains('.') || last == "localhost");
    match rest.chars().next() {
        None => true,
        _ if prefix.ends_with('/') => true,
        _ if prefix.ends_with([':', '@']) => is_one_part,
        // A digest counts more than the tag before it.
        _ if last.contains([':', '@']) && !is_server => false,
        Some('/') => true,
        Some(':' | '@') => is_one_part && !is_server,
        Some(_) => false,
    }
}

fn tolerations(asked: &PodOptions, default: &PodOptions, settings: &ProjectSettingsSpec) -> Result<(), Invalid> {
    let text = |value| serde_json::to_string(value).unwrap_or_default();
    for toleration in &asked.tolerations {
        let mut allowed = settings.allowed_tolerations.iter().chain(&default.tolerations);
        if !allowed.any(|allowed| allowed.covers(toleration)) {
            let allowed: Vec<_> = settings.allowed_tolerations.iter().map(text).collect();
            let names = allowed.iter().map(|name| &**name).collect();
            return Err(not_allowed(
                "spec.pod.tolerations",
                &text(toleration),
                "allowedTolerations",
                names,
            ));
        }
    }
    Ok(())
}

fn not_allowed(field: &'static str, asked: &str, list: &'static str, mut names: Vec<&str>) -> Invalid {
    names.sort_unstable();
    names.dedup();
    let shown: Vec<_> = names.iter().take(SHOWN).copied().collect();
    let more = names.len().saturating_sub(SHOWN);
    let allowed = match (shown.is_empty(), more) {
        (true, _) => "none".to_owned(),
        (false, 0) => shown.join(", "),
        (false, more) => format!("{} and {more} more", shown.join(", ")),
    };
    Invalid::NotAllowed {
        field,
        asked: asked.to_owned(),
        list,
        allowed,
    }
}

/// Most allowed values that a message names.
const SHOWN: usize = 10;

fn ceilings(spec: &AgenticSessionSpec, settings: &ProjectSettingsSpec) -> Result<(), Invalid> {
    let Some(ceilings) = &settings.ceilings else {
        return Ok(());
    };
    let limits = spec.limits.clone().unwrap_or_default();
    let most = ceilings.limits.clone().unwrap_or_default();
    above("timeout", spec.timeout, ceilings.timeout)?;
    above("limits.maxTurns", limits.max_turns, most.max_turns)?;
    above("limits.maxCostUSD", usd(&limits), usd(&most))?;
    above("limits.maxTokens", limits.max_tokens, most.max_tokens)?;
    let attempts = spec.retry.and_then(|retry| retry.max_attempts);
    above("retry.maxAttempts", attempts, ceilings.max_attempts)?;
    let size = spec.workspace.as_ref().and_then(|workspace| workspace.size.as_ref());
    if let (Some(asked), Some(ceiling)) = (size, &ceilings.workspace_size)
        && exceeds(asked, ceiling)
    {
        return Err(too_much("workspace.size", &asked.0, &ceiling.0));
    }
    let Some(ceiling) = &ceilings.resources else {
        return Ok(());
    };
    let Resources { requests, limits } = spec.resources.clone().unwrap_or_default();
    for (kind, amounts) in [("requests", requests), ("limits", limits)] {
        let amounts = amounts.unwrap_or_default();
        for (name, asked, ceiling) in [
            ("cpu", &amounts.cpu, &ceiling.cpu),
            ("memory", &amounts.memory, &ceiling.memory),
            (
                "ephemeral-storage",
                &amounts.ephemeral_storage,
                &ceiling.ephemeral_storage,
            ),
        ] {
            if let (Some(asked), Some(ceiling)) = (asked, ceiling)
                && (exceeds(asked, ceiling) || kind == "limits" && is_nothing(asked))
            {
                // A limit of 0 is none to the kubelet.
                return Err(too_much(&format!("resources.{kind}.{name}"), &asked.0, &ceiling.0));
            }
        }
    }
    Ok(())
}

fn above<T: PartialOrd + ToString>(field: &str, asked: Option<T>, ceiling: Option<T>) -> Result<(), Invalid> {
    match (asked, ceiling) {
        (Some(asked), Some(ceiling)) if asked > ceiling => {
            Err(too_much(field, &asked.to_string(), &ceiling.to_string()))
        }
        _ => Ok(()),
    }
}

fn too_much(field: &str, asked: &str, ceiling: &str) -> Invalid {
    Invalid::TooMuch {
        field: field.to_owned(),
        asked: asked.to_owned(),
        ceiling: ceiling.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    fn refusal(spec: &Value, settings: &Value) -> Option<String> {
        let settings = serde_json::from_value(settings.clone()).unwrap();
        let refused = check(&serde_json::from_value(spec.clone()).unwrap(), &settings);
        refused.err().map(|refused| refused.to_string())
    }

    #[rstest]
    #[case::claim(json!({"workspace": {"existingClaim": "a"}}), "spec.workspace.existingClaim: a", "allowedClaims", &[])]
    #[case::secret(json!({"runnerSecrets": ["a"]}), "spec.runnerSecrets: a", "allowedSecrets", &[json!({"runnerSecrets": ["a"]})])]
    #[case::pull_secret(
        json!({"pod": {"imagePullSecrets": ["a"]}}), "spec.pod.imagePullSecrets: a", "allowedImagePullSecrets",
        &[json!({"pod": {"imagePullSecrets": ["a"]}})],
    )]
    #[case::priority(
        json!({"pod": {"priorityClassName": "a"}}), "spec.pod.priorityClassName: a", "allowedPriorityClasses",
        &[json!({"pod": {"priorityClassName": "a"}})],
    )]
    #[case::runtime(
        json!({"pod": {"runtimeClassName": "a"}}), "spec.pod.runtimeClassName: a", "allowedRuntimeClasses",
        &[json!({"pod": {"runtimeClassName": "a"}})],
    )]
    #[case::account(
        json!({"pod": {"serviceAccountName": "a"}}), "spec.pod.serviceAccountName: a", "allowedServiceAccounts",
        &[json!({"pod": {"serviceAccountName": "a"}})],
    )]
    #[case::image(json!({"pod": {"image": "a"}}), "spec.pod.image: a", "allowedImages", &[json!({"pod": {"image": "a"}})])]
    fn a_session_names_nothing_but_what_the_admin_lists_or_gives_to_all(
        #[case] spec: Value,
        #[case] refused: &str,
        #[case] list: &str,
        #[case] given: &[Value],
    ) {
        for lists in [json!({}), json!({list: ["other", "aa"]})] {
            let said = refusal(&spec, &lists).expect("in no list");
            let expected =
                format!("{refused} is not allowed in this namespace. Allowed by spec.{list} of its ProjectSettings: ");
            assert!(said.starts_with(&expected), "{said}");
        }
        assert_eq!(refusal(&spec, &json!({list: ["other", "a"]})), None);
        for given in given {
            assert_eq!(refusal(&spec, given), None);
        }
    }

    #[test]
    fn the_built_in_secrets_may_be_named_and_no_other_is_allowed_by_being_named_first() {
        assert_eq!(refusal(&json!({"runnerSecrets": RUNNER_SECRETS}), &json!({})), None);
        let with_another = json!({"runnerSecrets": [RUNNER_SECRETS[0], "a"]});
        assert!(refusal(&with_another, &json!({})).is_some());
        let defaults = json!({"pod": {"serviceAccountName": "worker", "image": "i"}});
        let said = refusal(&json!({"pod": {"serviceAccountName": "admin"}}), &defaults).unwrap();
        assert!(
            said.contains("allowedServiceAccounts of its ProjectSettings: worker."),
            "{said}"
        );
        assert!(refusal(&json!({"pod": {"image": "j"}}), &defaults).is_some());
    }

    #[test]
    fn whoever_is_refused_is_told_what_is_allowed_but_not_at_any_length() {
        let asks = json!({"pod": {"serviceAccountName": "admin"}});
        let mut names: Vec<_> = (0..SHOWN).rev().map(|n| format!("account-{n}")).collect();
        names.push(names[0].clone());
        let ends = |settings: Value, with: &str| {
            let said = refusal(&asks, &settings).unwrap();
            assert!(
                said.contains(&format!("ProjectSettings: {with}. Ask the admin")),
                "{said}"
            );
        };
        let sorted: Vec<_> = names[..SHOWN].iter().rev().cloned().collect();
        ends(json!({"allowedServiceAccounts": names}), &sorted.join(", "));
        names.push("worker".to_owned());
        ends(
            json!({"allowedServiceAccounts": names}),
            &format!("{} and 1 more", sorted.join(", ")),
        );
        ends(json!({}), "none");
    }

    #[test]
    fn a_toleration_is_covered_by_one_of_the_list_or_of_the_defaults() {
        let (gpu, spot) = (
            json!({"key": "gpu", "operator": "Exists"}),
            json!({"key": "spot", "operator": "Exists"}),
        );
        let asks = json!({"pod": {"tolerations": [gpu, spot]}});
        assert_eq!(refusal(&asks, &json!({"allowedTolerations": [spot, gpu]})), None);
        assert_eq!(
            refusal(
                &asks,
                &json!({"allowedTolerations": [spot], "pod": {"tolerations": [gpu]}})
            ),
            None
        );
        let said = refusal(&asks, &json!({"allowedTolerations": [gpu]})).unwrap();
        assert!(
            said.starts_with("spec.pod.tolerations: {") && said.contains("spot"),
            "{said}"
        );
        assert!(
            said.contains("allowedTolerations of its ProjectSettings: {") && said.contains("gpu"),
            "{said}"
        );
    }

    #[rstest]
    #[case("timeout", json!({"timeout": 61}), json!({"timeout": 60}), json!({"timeout": 61}))]
    #[case("limits.maxTurns", json!({"limits": {"maxTurns": 3}}), json!({"limits": {"maxTurns": 2}}), json!({"limits": {"maxTurns": 3}}))]
    #[case(
        "limits.maxCostUSD", json!({"limits": {"maxCostUSD": "1.01"}}), json!({"limits": {"maxCostUSD": "1.00"}}),
        json!({"limits": {"maxCostUSD": "1.01"}}),
    )]
    #[case("limits.maxTokens", json!({"limits": {"maxTokens": 9}}), json!({"limits": {"maxTokens": 8}}), json!({"limits": {"maxTokens": 9}}))]
    #[case("retry.maxAttempts", json!({"retry": {"maxAttempts": 5}}), json!({"maxAttempts": 4}), json!({"maxAttempts": 5}))]
    #[case("workspace.size", json!({"workspace": {"size": "1025Mi"}}), json!({"workspaceSize": "1Gi"}), json!({"workspaceSize": "1025Mi"}))]
    #[case(
        "resources.requests.cpu", json!({"resources": {"requests": {"cpu": "1001m"}}}), json!({"resources": {"cpu": "1"}}),
        json!({"resources": {"cpu": "1001m", "memory": "1"}}),
    )]
    #[case(
        "resources.requests.memory", json!({"resources": {"requests": {"memory": "2Gi"}}}), json!({"resources": {"memory": "1Gi"}}),
        json!({"resources": {"memory": "2Gi", "cpu": "1"}}),
    )]
    #[case(
        "resources.limits.ephemeral-storage", json!({"resources": {"limits": {"ephemeral-storage": "2Gi"}}}),
        json!({"resources": {"ephemeral-storage": "1Gi"}}), json!({"resources": {"ephemeral-storage": "2Gi"}}),
    )]
    // A limit of 0 is none to the kubelet; a request of 0 is one.
    #[case(
        "resources.limits.memory", json!({"resources": {"limits": {"memory": "0"}, "requests": {"cpu": "0"}}}),
        json!({"resources": {"memory": "1Gi", "cpu": "1"}}), json!({"resources": {"cpu": "1"}}),
    )]
    fn what_is_above_its_ceiling_is_refused_and_the_ceiling_itself_is_not(
        #[case] field: &str,
        #[case] spec: Value,
        #[case] low: Value,
        #[case] enough: Value,
    ) {
        let said = refusal(&spec, &json!({"ceilings": low})).expect("above its ceiling");
        assert!(said.starts_with(&format!("spec.{field}: ")), "{said}");
        assert_eq!(refusal(&spec, &json!({"ceilings": enough})), None);
        assert_eq!(refusal(&spec, &json!({})), None);
    }

    #[rstest]
    #[case("registry.example", "registry.example/a:1", true)]
    #[case("registry.example", "registry.example.org/a", false)]
    #[case("registry.example", "registry.example:1/a", false)]
    #[case("registry.example:5000", "registry.example:5000/a", true)]
    #[case("registry.example/team/", "registry.example/team/a/b@sha256:1", true)]
    #[case("registry.example/team/", "registry.example/team/../evil:1", false)]
    #[case("registry.example/team/a", "registry.example/team/a:1@sha256:1", true)]
    #[case("registry.example/team/a", "registry.example/team/ab", false)]
    #[case("registry.example/app:1", "registry.example/app:1", true)]
    #[case("registry.example/app:1", "registry.example/app:1@sha256:1", false)]
    #[case("registry.example/app:1", "registry.example/app:12", false)]
    #[case("registry.example/app:", "registry.example/app:12", true)]
    #[case("ubuntu", "ubuntu:24.04", true)]
    #[case("ubuntu", "ubuntu:5000/evil/x", false)]
    #[case("ubuntu:", "ubuntu:24.04", true)]
    #[case("ubuntu:", "ubuntu:5000/evil/x", false)]
    #[case("node:20", "node:20", true)]
    #[case("node:20", "node:20/evil", false)]
    #[case("localhost", "localhost/a", true)]
    #[case("localhost", "localhost:5000/a", false)]
    fn a_prefix_allows_what_is_of_that_server_and_name(
        #[case] prefix: &str,
        #[case] image: &str,
        #[case] expected: bool,
    ) {
        assert_eq!(begins(image, prefix), expected);
    }
}
