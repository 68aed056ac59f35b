//! Turns `AgenticSession`s into Jobs, and records what became of them.

mod backoff;
mod calls;
mod clock;
mod connection;
mod context;
mod events;
mod lease;
mod metrics;
mod network;
mod nodes;
mod orphans;
mod pods;
mod preflight;
mod project_settings;
mod run;
mod server;
mod session;
mod settings;
mod strays;
mod tasks;
pub mod uninstall;
mod writes;

pub use calls::{Counted, Writes};
pub use clock::Clock;
pub use connection::bounded;
pub use network::Egress;
pub use run::{Error, run};
pub use settings::{LeaseSettings, PodSettings, PullPolicy, RunAs, Settings, TimingSettings};
