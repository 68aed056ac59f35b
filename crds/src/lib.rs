//! API types of the operator.

pub mod condition;
mod generate;
pub mod phase;
pub mod project_settings;
pub mod session;

pub use generate::{crd_yaml, crds, schema_digest, session_crd, settings_crd};
pub use phase::Phase;
pub use project_settings::{ProjectSettings, ProjectSettingsSpec};
pub use session::{AgenticSession, AgenticSessionSpec, AgenticSessionStatus};
