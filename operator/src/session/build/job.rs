//! The Job of an attempt.

use k8s_openapi::{
    api::{
        batch::v1::{Job, JobSpec},
        core::v1::PodTemplateSpec,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use protocol::names::{REPORT_FINALIZER, annotation, component, label};

use super::{Request, labels, meta, pod};
use crate::{
    session::{observed::Resolved, plan::Attempt},
    settings::PodSettings,
};

/// Beyond start and running time, when the Job controller ends what the operator did not.
const DEADLINE_SLACK: i64 = 600;

/// Name of the Job of an attempt: the platform's own name for the first.
pub fn job_name(session: &str, attempt: u32) -> String {
    match attempt {
        1 => format!("{session}-job"),
        n => format!("{session}-job-{n}"),
    }
}

/// The Job of an attempt: one pod, never a second.
pub fn job(request: &Request, attempt: Attempt, settings: &PodSettings) -> Job {
    let resolved = Resolved {
        generation: request.generation,
        used_seconds: attempt.used_seconds,
        start_timeout: request.start_timeout,
        max_attempts: request.max_attempts,
        limits: request.limits,
        asked: Some(request.asked),
    };
    let mut metadata = meta(request, job_name(&request.name, attempt.number), component::ATTEMPT);
    metadata
        .labels
        .get_or_insert_default()
        .insert(label::ATTEMPT.to_owned(), attempt.number.to_string());
    // Kueue finds its Jobs by it.
    if let Some(queue) = &request.queue {
        let labels = metadata.labels.get_or_insert_default();
        labels.insert(label::KUEUE_QUEUE.to_owned(), queue.clone());
        labels.extend(
            request
                .queue_priority
                .iter()
                .map(|class| (label::KUEUE_PRIORITY.to_owned(), class.clone())),
        );
    }
    metadata.annotations = Some([(annotation::RESOLVED.to_owned(), json(&resolved))].into());
    Job {
        metadata,
        spec: Some(JobSpec {
            backoff_limit: Some(0),
            // No second pod beside one that is still being deleted.
            pod_replacement_policy: Some("Failed".to_owned()),
            active_deadline_seconds: Some(deadline(&resolved)),
            // Whoever admits Jobs lets it begin.
            suspend: (request.queue.is_some() || attempt.held).then_some(true),
            template: template(request, attempt, settings),
            ..JobSpec::default()
        }),
        ..Job::default()
    }
}

/// When the Job controller ends an attempt, seconds after its start.
pub fn deadline(resolved: &Resolved) -> i64 {
    let remaining = resolved.timeout().saturating_sub(resolved.used_seconds);
    let seconds = resolved.start_timeout.saturating_add(remaining);
    i64::try_from(seconds)
        .unwrap_or(i64::MAX)
        .saturating_add(DEADLINE_SLACK)
}

fn template(request: &Request, attempt: Attempt, settings: &PodSettings) -> PodTemplateSpec {
    let mut labels = labels(request, component::ATTEMPT);
    labels.insert(label::ATTEMPT.to_owned(), attempt.number.to_string());
    PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(labels),
            annotations: Some([(annotation::LIMITS.to_owned(), json(&request.limits))].into()),
            finalizers: Some(vec![REPORT_FINALIZER.to_owned()]),
            ..ObjectMeta::default()
        }),
        spec: Some(pod::spec(request, attempt, settings)),
    }
}

/// A struct of numbers and strings always serialises.
pub(in crate::session) fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::{
        session::{build, validate::tests::checked},
        settings::{PullPolicy, RunAs},
    };

    pub(in crate::session::build) const SECOND: Attempt = Attempt {
        number: 2,
        run: 7,
        used_seconds: 40,
        held: false,
    };

    pub(in crate::session::build) fn settings() -> PodSettings {
        PodSettings {
            runner_image: "registry.test/runner:7".into(),
            gateway_url: Some("ws://agentic-gateway.agentic.svc:8080/".into()),
            run_as_user: RunAs::User(10001),
            image_pull_policy: PullPolicy::IfNotPresent,
        }
    }

    pub(in crate::session::build) fn request() -> Request {
        checked(json!({
            "prompt": "costs $5, $(HOME) and $$",
            "timeout": 120,
            "llmSettings": {"model": "claude-test-1"},
            "environmentVariables": {"CI": "true", "PRICE": "$(CI)"},
            "workspace": {"size": "3Gi", "storageClassName": "fast"},
            "resources": {"limits": {"memory": "2Gi"}},
            "userContext": {"userId": "sappho", "displayName": "Sappho of Lesbos"},
        }))
        .unwrap()
    }

    #[test]
    fn the_job_of_an_attempt() {
        insta::assert_yaml_snapshot!(job(&request(), SECOND, &settings()));
    }

    #[test]
    fn the_claim_of_a_session() {
        insta::assert_yaml_snapshot!(build::claim(&request()));
    }

    #[test]
    fn a_workspace_that_goes_with_the_pod_has_a_bound_and_no_claim() {
        let spec = json!({"prompt": "p", "workspace": {"ephemeral": true, "size": "3Gi"}});
        let request = checked(spec).unwrap();
        assert_eq!(build::claim(&request), None);
        let job = job(&request, SECOND, &settings());
        let pod = job.spec.unwrap().template.spec.unwrap();
        let volumes = serde_json::to_value(pod.volumes).unwrap();
        assert_eq!(
            volumes[0],
            json!({"name": "workspace", "emptyDir": {"sizeLimit": "3Gi"}})
        );
        assert!(!volumes.to_string().contains("persistentVolumeClaim"), "{volumes}");
    }

    #[test]
    fn without_a_gateway_there_is_neither_address_nor_token() {
        let with = job(&request(), SECOND, &settings());
        let without = job(
            &request(),
            SECOND,
            &PodSettings {
                gateway_url: None,
                ..settings()
            },
        );
        assert!(json(&with).contains("WEBSOCKET_URL") && json(&with).contains("serviceAccountToken\":{"));
        assert!(!json(&without).contains("WEBSOCKET_URL") && !json(&without).contains("serviceAccountToken\":{"));
    }

    #[test]
    fn where_the_cluster_assigns_users_none_is_named() {
        let job = json(&job(
            &request(),
            SECOND,
            &PodSettings {
                run_as_user: RunAs::ClusterDecides,
                ..settings()
            },
        ));
        assert!(!job.contains("10001") && !job.contains("fsGroup") && job.contains("runAsNonRoot"));
    }

    #[test]
    fn names_of_the_longest_session_fit_a_label() {
        assert!(job_name(&"n".repeat(52), 999_999).len() <= 63);
        assert_eq!(job_name("poem", 1), "poem-job");
        assert_eq!(job_name("poem", 12), "poem-job-12");
    }

    /// What the kubelet makes of a value (`k8s.io/kubernetes/third_party/forked/golang/expansion`), with these variables set.
    fn expanded(value: &str) -> String {
        let mut out = String::new();
        let mut rest = value;
        while let Some(at) = rest.find('$') {
            out.push_str(&rest[..at]);
            rest = &rest[at + 1..];
            if let Some(after) = rest.strip_prefix('$') {
                out.push('$');
                rest = after;
            } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|r| r.split_once(')')) {
                out = out + "<value of " + name + ">";
                rest = after;
            } else {
                out.push('$');
            }
        }
        out + rest
    }

    #[test]
    fn nothing_that_an_author_writes_is_replaced_by_a_secret() {
        let steals = "$(ANTHROPIC_API_KEY)";
        let mut request = checked(json!({
            "prompt": steals, "appendSystemPrompt": steals, "additionalArgs": [steals], "environmentVariables": {"A": steals},
            "llmSettings": {"model": steals, "fallbackModel": steals}, "userContext": {"userId": steals},
            "repos": [{"url": steals, "branch": steals, "output": {"branch": steals}}],
            "tools": {"allowed": [steals], "mcpServers": {"m": {"stdio": {"command": steals, "args": [steals], "env": {"B": steals}}}}},
        }))
        .unwrap();
        request.pod.image = Some("i".into());
        let pod = job(&request, SECOND, &settings()).spec.unwrap().template.spec.unwrap();
        let containers = pod.containers.iter().chain(pod.init_containers.iter().flatten());
        let mut arrived = 0;
        for container in containers {
            let lines = container.command.iter().chain(&container.args).flatten();
            assert!(lines.into_iter().all(|line| !line.contains('$')), "{container:?}");
            for value in container.env.iter().flatten().filter_map(|v| v.value.as_ref()) {
                let value = expanded(value);
                assert!(!value.contains("<value of"), "{value}");
                arrived += value.matches(steals).count();
            }
        }
        assert_eq!(arrived, 14, "all arrives as it was written");
    }

    proptest! {
        #[test]
        fn any_prompt_arrives_byte_for_byte(prompt in "[ -~$()A{}\n]{1,60}|\\PC{1,40}") {
            let request = Request { prompt: prompt.clone(), ..request() };
            let job = job(&request, SECOND, &settings());
            let pod = job.spec.unwrap().template.spec.unwrap();
            let variable = pod.containers[0].env.iter().flatten().find(|v| v.name == "PROMPT").unwrap();
            prop_assert_eq!(expanded(variable.value.as_ref().unwrap()), prompt);
        }
    }
}
