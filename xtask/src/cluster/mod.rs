//! Kubernetes clusters without Docker, of the real components.

mod certificates;
mod cgroups;
mod cleanup;

mod control_plane;
mod forwarder;
mod kubeconfig;
mod kueue;
mod named;
mod network;
mod node;
mod processes;
mod servers;
mod templates;

pub use control_plane::ControlPlane;
pub use forwarder::forward;
pub use named::{Cluster, Extent};
