//! What the runner, the gateway and the operator say to each other.
//!
//! This crate knows nothing of Kubernetes clients: it holds the records of the event log, the frames of the runner's
//! WebSocket, the termination report, the outcomes and reasons of a session, prices, and every name that more than one
//! part must spell the same way.

pub mod frame;
pub mod identity;
pub mod money;
pub mod names;
pub mod outcome;
pub mod price;
pub mod record;
pub mod report;
pub mod spec;
pub mod usage;

pub use money::NanoUsd;
pub use outcome::{Outcome, Reason};
pub use record::{Kind, Record, RecordHead};
pub use report::Report;
pub use usage::Usage;
