//! The operator on a real control plane (etcd, API server, controller manager). Pods are moved through their phases by the
//! tests; each test has a namespace and an operator of its own, which works under the rules that are installed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "the lints' exception for tests does not see helpers"
)]

mod admission;
mod clock;
mod crash;
mod drains;
mod end;
mod faults;
mod hindered;
mod kueue;
mod life;
mod loss;
mod metrics;
mod network;
mod outcomes;
mod plane;
mod random;
mod refused;
mod restored;
mod rules;
mod runs;
mod settings;
mod strays;
mod two;
mod uninstall;
mod verbs;
mod wire;
mod world;
