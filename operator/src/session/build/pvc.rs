//! The claim that holds a session's workspace, conversation and spool.

use crds::session::Retention;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, PersistentVolumeClaimSpec, VolumeResourceRequirements};

use super::{Request, meta};
use crate::session::validate::Claim;

/// Name of the claim of a session's own.
pub fn own_claim_name(session: &str) -> String {
    format!("ambient-workspace-{session}")
}

/// A session's own claim; `None` when it uses one that exists, or none.
pub fn claim(request: &Request) -> Option<PersistentVolumeClaim> {
    let Claim::Own {
        size,
        storage_class,
        retention,
    } = &request.claim
    else {
        return None;
    };
    let mut metadata = meta(request, own_claim_name(&request.name), "workspace");
    if *retention == Retention::Retain {
        // Garbage collection takes what has an owner; the label still says whose it is.
        metadata.owner_references = None;
    }
    Some(PersistentVolumeClaim {
        metadata,
        spec: Some(PersistentVolumeClaimSpec {
            access_modes: Some(vec!["ReadWriteOnce".to_owned()]),
            resources: Some(VolumeResourceRequirements {
                requests: Some([("storage".to_owned(), size.clone())].into()),
                ..VolumeResourceRequirements::default()
            }),
            storage_class_name: storage_class.clone(),
            ..PersistentVolumeClaimSpec::default()
        }),
        ..PersistentVolumeClaim::default()
    })
}
