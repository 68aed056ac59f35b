//! The claim that holds a session's workspace, conversation and spool.

use k8s_openapi::api::core::v1::{PersistentVolumeClaim, PersistentVolumeClaimSpec, VolumeResourceRequirements};

use super::{Request, meta};

/// Name of a session's claim.
pub fn claim_name(session: &str) -> String {
    format!("ambient-workspace-{session}")
}

/// A session's claim.
pub fn claim(request: &Request) -> PersistentVolumeClaim {
    PersistentVolumeClaim {
        metadata: meta(request, claim_name(&request.name), "workspace"),
        spec: Some(PersistentVolumeClaimSpec {
            access_modes: Some(vec!["ReadWriteOnce".to_owned()]),
            resources: Some(VolumeResourceRequirements {
                requests: Some([("storage".to_owned(), request.workspace_size.clone())].into()),
                ..VolumeResourceRequirements::default()
            }),
            storage_class_name: request.storage_class.clone(),
            ..PersistentVolumeClaimSpec::default()
        }),
        ..PersistentVolumeClaim::default()
    }
}
