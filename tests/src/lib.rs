//! What the tests of the whole product use: a mock of the model API, a collector of traces, and the cluster at hand.

pub mod bench;
pub mod cli;
pub mod git;
pub mod http;
pub mod mcp;
pub mod model;
pub mod ssh;
pub mod traces;
