//! The Job that delivers what an ended run left on the claim: the attempt's pod without agent and without secrets of the model.

use k8s_openapi::api::{
    batch::v1::{Job, JobSpec},
    core::v1::{Container, EnvVar, PodSpec, PodTemplateSpec, Volume},
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use protocol::names::{REPORT_FINALIZER, component, container, path};

use super::{Request, labels, meta, pod};
use crate::{session::plan::Attempt, settings::PodSettings};

/// How long a drain's pod may work, seconds.
const POD_SECONDS: i64 = 300;
/// How long a drain's Job may take, its pod's start included, seconds.
const JOB_SECONDS: i64 = 1_200;

/// Name of a session's drain Job of this number.
pub fn drain_name(session: &str, number: u32) -> String {
    format!("{session}-drain-{number}")
}

/// A drain Job: one pod, never a second. `attempt` is the last one of the run that it delivers.
pub fn drain(request: &Request, number: u32, attempt: Attempt, settings: &PodSettings) -> Job {
    Job {
        metadata: meta(request, drain_name(&request.name, number), component::DRAIN),
        spec: Some(JobSpec {
            backoff_limit: Some(0),
            pod_replacement_policy: Some("Failed".to_owned()),
            active_deadline_seconds: Some(JOB_SECONDS),
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta {
                    labels: Some(labels(request, component::DRAIN)),
                    finalizers: Some(vec![REPORT_FINALIZER.to_owned()]),
                    ..ObjectMeta::default()
                }),
                spec: Some(only_the_runner(pod::spec(request, attempt, settings))),
            },
            ..JobSpec::default()
        }),
        ..Job::default()
    }
}

/// Where it runs and as whom stays; agent, secrets and what only they need goes.
fn only_the_runner(mut pod: PodSpec) -> PodSpec {
    pod.init_containers = None;
    pod.active_deadline_seconds = Some(POD_SECONDS);
    let volumes = pod.volumes.take().unwrap_or_default();
    pod.containers.retain(|c| c.name == container::RUNNER);
    for runner in &mut pod.containers {
        without_secrets(runner, &volumes);
    }
    let mounted = |volume: &Volume| {
        let mounts = pod.containers.iter().flat_map(|c| c.volume_mounts.iter().flatten());
        mounts.into_iter().any(|mount| mount.name == volume.name)
    };
    pod.volumes = Some(volumes.iter().filter(|volume| mounted(volume)).cloned().collect());
    pod
}

fn without_secrets(runner: &mut Container, volumes: &[Volume]) {
    runner.args = Some(vec!["drain".to_owned()]);
    runner.env_from = None;
    let is_plain = |variable: &EnvVar| {
        let from = variable.value_from.as_ref();
        from.is_none_or(|from| from.secret_key_ref.is_none() && from.config_map_key_ref.is_none())
    };
    runner.env.get_or_insert_default().retain(is_plain);
    let keeps = |name: &str| {
        // Its annotation of limits is the attempt's; the socket leads to the agent.
        volumes
            .iter()
            .any(|volume| volume.name == name && !has_secret(volume) && volume.downward_api.is_none())
    };
    let mounts = runner.volume_mounts.get_or_insert_default();
    mounts.retain(|mount| keeps(&mount.name) && mount.mount_path != path::SHIM_DIR);
}

fn has_secret(volume: &Volume) -> bool {
    let projected = volume.projected.iter().flat_map(|p| p.sources.iter().flatten());
    volume.secret.is_some() || projected.into_iter().any(|source| source.secret.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::build::job::tests::{SECOND, request, settings};

    #[test]
    fn the_job_of_a_drain() {
        insta::assert_yaml_snapshot!(drain(&request(), 3, SECOND, &settings()));
    }

    #[test]
    fn a_drain_has_no_secret_and_no_agent() {
        let job = serde_json::to_string(&drain(&request(), 3, SECOND, &settings())).unwrap();
        assert!(
            !job.contains("secretRef") && !job.contains("secretKeyRef") && !job.contains("\"secret\""),
            "{job}"
        );
        assert!(
            !job.contains("initContainers") && job.contains("serviceAccountToken\":{"),
            "{job}"
        );
    }

    #[test]
    fn names_of_the_longest_session_fit_a_label() {
        assert!(drain_name(&"n".repeat(52), 9_999).len() <= 63);
    }
}
