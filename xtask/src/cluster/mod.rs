//! Kubernetes clusters without Docker, of the real components.

mod certificates;
mod control_plane;
mod kubeconfig;
mod processes;
mod servers;

pub use control_plane::ControlPlane;
