//! API types of the operator.

pub mod condition;
mod generate;
pub mod phase;
pub mod session;

pub use generate::{crd_yaml, schema_digest, session_crd};
pub use phase::Phase;
pub use session::{AgenticSession, AgenticSessionSpec, AgenticSessionStatus};
