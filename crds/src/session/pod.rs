//! Image and placement of a session's pod.

use std::collections::BTreeMap;

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{OBJECT_NAME, ObjectName};

/// Image and placement of the session's pod. What is named must be allowed by the namespace's `ProjectSettings`; `nodeSelector` and
/// `readOnlyRootFilesystem` need no leave.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodOptions {
    /// Image of the agent's container, with the tools that the task needs: a Linux image with glibc, bash and git; runner and CLI are
    /// copied in. The product's own when absent. Must begin with one of `allowedImages`. Example: `registry.example.com/team/rust:1`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512), regex(pattern = "^[A-Za-z0-9][A-Za-z0-9._:/@-]*$"))]
    pub image: Option<String>,
    /// Secrets with which the image is pulled; each in `allowedImagePullSecrets`. Beside them those of the service account count.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub image_pull_secrets: Vec<ObjectName>,
    /// Labels that a node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    #[x_kube(
        validation = Rule::new(format!("self.all(k, k.size() <= 317 && k.matches('{KEY}') && self[k].matches('{VALUE}'))"))
            .message("pod.nodeSelector must have labels of Kubernetes' form, such as kubernetes.io/arch: amd64")
    )]
    pub node_selector: BTreeMap<String, LabelValue>,
    /// Taints that the pod takes; each covered by an entry of `allowedTolerations`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub tolerations: Vec<Toleration>,
    /// Priority class of the pod; one of `allowedPriorityClasses`. The cluster's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = OBJECT_NAME))]
    pub priority_class_name: Option<String>,
    /// Runtime class of the pod, such as a sandbox; one of `allowedRuntimeClasses`. The cluster's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = OBJECT_NAME))]
    pub runtime_class_name: Option<String>,
    /// Service account of the pod; one of `allowedServiceAccounts`. Its token is not mounted; it counts for image pulls and for policies
    /// of the cluster. `default` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = OBJECT_NAME))]
    pub service_account_name: Option<String>,
    /// `false`: the agent may write into its container's root, for instance to install packages; what it writes there is lost with the
    /// pod. `true` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_only_root_filesystem: Option<bool>,
}

/// Value of a label.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct LabelValue(#[schemars(length(max = 63))] pub String);

/// What Kubernetes takes as the key of a label or taint: a name of its own, as a rule behind a domain.
const KEY: &str = "^([a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$";
/// What it takes as the value of one.
const VALUE: &str = "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$";

/// A taint that a pod takes.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.key) || (has(self.operator) && self.operator == 'Exists')")
        .message("a toleration without key takes every taint and must say so by operator Exists: give the key of the taint"),
    validation = Rule::new("!has(self.value) || self.value == '' || !has(self.operator) || self.operator == 'Equal'")
        .message("a toleration with operator Exists takes every value: leave out the value, or the operator"),
    validation = Rule::new("!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')")
        .message("tolerationSeconds of a toleration must stand beside effect NoExecute, which alone sends pods off")
)]
pub struct Toleration {
    /// Key of the taint; every taint when absent, with operator `Exists`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 317), regex(pattern = KEY))]
    pub key: Option<String>,
    /// `Equal` when absent: the value must be the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operator: Option<TolerationOperator>,
    /// Value of the taint, with `Equal`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63), regex(pattern = VALUE))]
    pub value: Option<String>,
    /// Effect of the taint; every effect when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effect: Option<TaintEffect>,
    /// With `NoExecute`: how long the pod stays on a node that gets the taint; for ever when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 604_800))]
    pub toleration_seconds: Option<i64>,
}

/// How key and value of a toleration are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TolerationOperator {
    /// Any value.
    Exists,
    /// This value.
    Equal,
}

/// What a taint does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TaintEffect {
    /// Keeps pods away.
    NoSchedule,
    /// Keeps pods away where it can.
    PreferNoSchedule,
    /// Keeps pods away and sends off those that are there.
    NoExecute,
}

impl From<&Toleration> for k8s_openapi::api::core::v1::Toleration {
    fn from(toleration: &Toleration) -> Self {
        let Toleration {
            key,
            operator,
            value,
            effect,
            toleration_seconds,
        } = toleration;
        Self {
            key: key.clone(),
            operator: operator.map(|operator| {
                match operator {
                    TolerationOperator::Exists => "Exists",
                    TolerationOperator::Equal => "Equal",
                }
                .to_owned()
            }),
            value: value.clone(),
            effect: effect.map(|effect| {
                match effect {
                    TaintEffect::NoSchedule => "NoSchedule",
                    TaintEffect::PreferNoSchedule => "PreferNoSchedule",
                    TaintEffect::NoExecute => "NoExecute",
                }
                .to_owned()
            }),
            toleration_seconds: *toleration_seconds,
        }
    }
}

impl Toleration {
    /// Whether whoever may have `self` may have `other`: every taint that `other` takes, `self` takes.
    pub fn covers(&self, other: &Self) -> bool {
        let any_value = self.operator == Some(TolerationOperator::Exists);
        let key = match &self.key {
            None => any_value,
            Some(_) => self.key == other.key,
        };
        let value = any_value || (other.operator != Some(TolerationOperator::Exists) && self.value == other.value);
        key && value && (self.effect.is_none() || self.effect == other.effect)
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    #[rstest]
    #[case::same(json!({"key": "gpu", "value": "a"}), json!({"key": "gpu", "value": "a"}), true)]
    #[case::another_value(json!({"key": "gpu", "value": "a"}), json!({"key": "gpu", "value": "b"}), false)]
    #[case::any_value(json!({"key": "gpu", "operator": "Exists"}), json!({"key": "gpu", "value": "b"}), true)]
    #[case::any_value_asked_for(json!({"key": "gpu", "value": "a"}), json!({"key": "gpu", "operator": "Exists"}), false)]
    #[case::every_taint(json!({"operator": "Exists"}), json!({"key": "x", "effect": "NoExecute"}), true)]
    #[case::every_taint_asked_for(json!({"key": "gpu", "operator": "Exists"}), json!({"operator": "Exists"}), false)]
    #[case::another_effect(json!({"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}), json!({"key": "gpu", "operator": "Exists", "effect": "NoExecute"}), false)]
    #[case::every_effect_asked_for(json!({"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}), json!({"key": "gpu", "operator": "Exists"}), false)]
    fn a_toleration_covers_what_it_takes_itself(#[case] has: Value, #[case] wants: Value, #[case] covers: bool) {
        let toleration = |value| serde_json::from_value::<Toleration>(value).unwrap();
        assert_eq!(toleration(has).covers(&toleration(wants)), covers);
    }
}
