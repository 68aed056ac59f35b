//! CPU, memory and disk of an agent.

use std::collections::BTreeMap;

use k8s_openapi::{api::core::v1::ResourceRequirements, apimachinery::pkg::api::resource::Quantity};
use kube::{KubeSchema, core::Rule};
use serde::{Deserialize, Serialize};

/// CPU, memory and ephemeral storage of the agent's container.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = within("cpu"),
    validation = within("memory"),
    validation = within("ephemeral-storage")
)]
pub struct Resources {
    /// What the scheduler sets aside. At most the limit, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests: Option<Amounts>,
    /// What the container may use at most. More than 0: to Kubernetes a limit of 0 is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(
        validation = bound("limits", "cpu"),
        validation = bound("limits", "memory"),
        validation = bound("limits", "ephemeral-storage")
    )]
    pub limits: Option<Amounts>,
}

/// The name of an amount as CEL has it.
fn field(name: &str) -> String {
    name.replace('-', "__dash__")
}

/// An amount that bounds is more than 0.
pub(crate) fn bound(of: &str, name: &str) -> Rule {
    let (amount, of) = (format!("self.{}", field(name)), format!("{of}.{name}"));
    Rule::new(format!(
        "!has({amount}) || (type({amount}) == int ? {amount} > 0 : !isQuantity({amount}) || quantity({amount}).isGreaterThan(quantity('0')))"
    ))
    .message(&*format!("{of} must be more than 0, which would be no limit: leave it out or give an amount"))
}

/// A request is at most the limit. What is no quantity is refused by the amount's own rule.
fn within(name: &str) -> Rule {
    let field = field(name);
    let (request, limit) = (format!("self.requests.{field}"), format!("self.limits.{field}"));
    Rule::new(format!(
        "!has(self.requests) || !has(self.limits) || !has({request}) || !has({limit}) \
         || !isQuantity(string({request})) || !isQuantity(string({limit})) \
         || !quantity(string({request})).isGreaterThan(quantity(string({limit})))"
    ))
    .message(&*format!(
        "requests.{name} must not be above limits.{name}: ask for less, or raise the limit"
    ))
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
