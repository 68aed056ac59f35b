//! The volume of a session.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::OBJECT_NAME;

/// The volume of a session: the claim `ambient-workspace-<name>`, or one that exists.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.existingClaim) || (!has(self.size) && !has(self.storageClassName) && !has(self.retention))")
        .message("spec.workspace.existingClaim is used as it is and always kept: leave out size, storageClassName and retention"),
    validation = Rule::new("!has(self.ephemeral) || !self.ephemeral || (!has(self.existingClaim) && !has(self.storageClassName) && !has(self.retention))")
        .message("a workspace with spec.workspace.ephemeral has no claim: leave out existingClaim, storageClassName and retention")
)]
pub struct Workspace {
    /// Size of the volume; 5Gi when absent. With `ephemeral`, how much the workspace may use of the node's disk;
    /// the pod requests as much of it (`ephemeral-storage`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(
        validation = Rule::new("!(type(self) == string) || (self.size() <= 32 && isQuantity(self) && quantity(self).isGreaterThan(quantity('0')))")
            .message("spec.workspace.size must be a positive quantity, such as 5Gi"),
        validation = Rule::new("!(type(self) == int) || self > 0").message("spec.workspace.size must be a positive quantity, such as 5Gi")
    )]
    pub size: Option<Quantity>,

    /// Storage class of the volume; the cluster's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = OBJECT_NAME))]
    pub storage_class_name: Option<String>,

    /// Name of a claim that exists and is among `allowedClaims` of the namespace's `ProjectSettings`. The agent works in its folder
    /// `workspace`, which sessions with the same claim share. A claim of the session's own when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = OBJECT_NAME))]
    pub existing_claim: Option<String>,

    /// What becomes of the claim when the session is deleted; `Delete` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<Retention>,

    /// `true`: no claim; the workspace is on the disk of the pod's node and goes with the pod. It starts faster, and is for sessions
    /// that are thrown away. A pod that uses more than `size` is evicted. What goes with the pod: files and conversation, so that no
    /// attempt follows one whose agent may have begun, and no start request or `suspend: false` goes on with one that ended; and
    /// records that no gateway has acknowledged when the pod ends, which `EventsDelivered` then counts as `Lost`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ephemeral: Option<bool>,
}

/// What becomes of a session's claim when the session is deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Retention {
    /// It is deleted too.
    #[default]
    Delete,
    /// It stays, and another session can take it as `existingClaim`.
    Retain,
}

/// What the volumes of a namespace's sessions are like.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkspaceDefaults {
    /// Size of the volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(
        validation = Rule::new("!(type(self) == string) || (self.size() <= 32 && isQuantity(self) && quantity(self).isGreaterThan(quantity('0')))")
            .message("spec.workspace.size must be a positive quantity, such as 5Gi"),
        validation = Rule::new("!(type(self) == int) || self > 0").message("spec.workspace.size must be a positive quantity, such as 5Gi")
    )]
    pub size: Option<Quantity>,

    /// Storage class of the volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = OBJECT_NAME))]
    pub storage_class_name: Option<String>,

    /// What becomes of the claim when the session is deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<Retention>,
}
