//! What the proxy lets through.
