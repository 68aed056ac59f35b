//! `runner`: drives a session's attempt; `runner agent`: the shim in the agent container.
fn main() {}
