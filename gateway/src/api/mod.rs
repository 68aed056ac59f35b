//! The HTTP APIs.

mod create;
mod error;
mod events;
pub mod health;
pub mod projects;

pub use error::ApiError;
