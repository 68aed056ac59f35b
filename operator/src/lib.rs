//! Placeholder.
pub mod uninstall;
