//! The runner as a whole: the real binary, the real CLI, the mock model.

mod common;
mod crash;
mod local;
mod shim;
