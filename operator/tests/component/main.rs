//! The operator on a real control plane (etcd, API server, controller manager). Pods are moved through their phases by the
//! tests; each test has a namespace and an operator of its own, which works under the rules that are installed.

mod end;
mod life;
mod plane;
mod uninstall;
mod rules;
mod world;
