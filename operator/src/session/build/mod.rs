//! The children of a session, built from a validated request. No client here.

mod drain;
mod environment;
mod job;
mod pod;
mod pvc;
mod volumes;

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use protocol::names::label;

pub use drain::{drain, drain_name};
pub(super) use job::json;
pub use job::{deadline, job, job_name};
pub use pvc::{claim, own_claim_name};

use super::validate::Request;

/// Name, namespace, labels and owner that the children of a session share.
fn meta(request: &Request, name: String, component: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: Some(request.namespace.clone()),
        labels: Some(labels(request, component)),
        owner_references: Some(vec![request.owner.clone()]),
        ..ObjectMeta::default()
    }
}

fn labels(request: &Request, component: &str) -> BTreeMap<String, String> {
    [
        (label::MANAGED_BY, label::MANAGER),
        (label::NAME, label::APPLICATION),
        (label::COMPONENT, component),
        (label::SESSION, &request.name),
        (label::SESSION_UID, &request.uid),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .collect()
}
