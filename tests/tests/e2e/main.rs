//! The whole product on a real cluster, with the real CLI and the mock model. `cargo xtask e2e` runs it.

mod harness;

mod agent;
mod apply;
mod compat;
mod conversation;
mod crashes;
mod endings;
mod events;
mod first_token;
mod own_image;
mod pressure;
mod printed;
mod reach;
mod refusals;
mod replicas;
mod repositories;
mod rest;
mod resume;
mod rights;
mod secrets;
mod settings;
mod suspend;
