//! CPU, memory and disk of an agent.

use std::collections::BTreeMap;

use k8s_openapi::{api::core::v1::ResourceRequirements, apimachinery::pkg::api::resource::Quantity};
use kube::KubeSchema;
use serde::{Deserialize, Serialize};

/// CPU, memory and ephemeral storage of the agent's container.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resources {
    /// What the scheduler sets aside.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests: Option<Amounts>,
    /// What the container may use at most. More than 0: to Kubernetes a limit of 0 is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(
        validation = Rule::new("!has(self.cpu) || (type(self.cpu) == int ? self.cpu > 0 : !isQuantity(self.cpu) || quantity(self.cpu).isGreaterThan(quantity('0')))").message("limits.cpu must be more than 0, which would be no limit: leave it out or give an amount"),
        validation = Rule::new("!has(self.memory) || (type(self.memory) == int ? self.memory > 0 : !isQuantity(self.memory) || quantity(self.memory).isGreaterThan(quantity('0')))").message("limits.memory must be more than 0, which would be no limit: leave it out or give an amount"),
        validation = Rule::new("!has(self.ephemeral__dash__storage) || (type(self.ephemeral__dash__storage) == int ? self.ephemeral__dash__storage > 0 : !isQuantity(self.ephemeral__dash__storage) || quantity(self.ephemeral__dash__storage).isGreaterThan(quantity('0')))").message("limits.ephemeral-storage must be more than 0, which would be no limit: leave it out or give an amount")
    )]
    pub limits: Option<Amounts>,
}

/// Amounts of the three resources that sessions may set.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Amounts {
    /// Processor time, in cores. Example: `500m`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("type(self) == int ? self >= 0 : isQuantity(self) && !quantity(self).isLessThan(quantity('0'))").message("cpu must be a quantity that is not negative, such as 500m"))]
    pub cpu: Option<Quantity>,
    /// Memory, in bytes. Example: `4Gi`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("type(self) == int ? self >= 0 : isQuantity(self) && !quantity(self).isLessThan(quantity('0'))").message("memory must be a quantity that is not negative, such as 4Gi"))]
    pub memory: Option<Quantity>,
    /// Disk space of the container outside the workspace, in bytes. Example: `2Gi`
    #[serde(default, skip_serializing_if = "Option::is_none", rename = "ephemeral-storage")]
    #[x_kube(validation = Rule::new("type(self) == int ? self >= 0 : isQuantity(self) && !quantity(self).isLessThan(quantity('0'))").message("ephemeral-storage must be a quantity that is not negative, such as 2Gi"))]
    pub ephemeral_storage: Option<Quantity>,
}

impl From<&Amounts> for BTreeMap<String, Quantity> {
    fn from(amounts: &Amounts) -> Self {
        let Amounts {
            cpu,
            memory,
            ephemeral_storage,
        } = amounts;
        [
            ("cpu", cpu),
            ("memory", memory),
            ("ephemeral-storage", ephemeral_storage),
        ]
        .into_iter()
        .filter_map(|(name, amount)| Some((name.to_owned(), amount.clone()?)))
        .collect()
    }
}

impl From<&Resources> for ResourceRequirements {
    fn from(resources: &Resources) -> Self {
        Self {
            requests: resources.requests.as_ref().map(Into::into),
            limits: resources.limits.as_ref().map(Into::into),
            ..Self::default()
        }
    }
}
