//! The whole product on a real cluster, with the real CLI and the mock model. `cargo xtask e2e` runs it.

mod harness;

mod apply;
mod crashes;
mod endings;
mod events;
mod refusals;
mod rest;
mod rights;
mod secrets;
mod suspend;
