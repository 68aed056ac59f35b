//! What a developer needs: pinned tools, a Kubernetes cluster without Docker, images, generated files.
//!
//! The library half exists for tests, which start their own API server with [`cluster::ControlPlane`].

pub mod bench;
pub mod chart;
pub mod claude_cli;
pub mod cluster;
pub mod command;
pub mod demo;
pub mod e2e;
pub mod generate;
pub mod images;
pub mod long_runs;
pub mod packages;
pub mod paths;
pub mod postgres;
pub mod progress;
pub mod quality;
pub mod reference;
mod schemathesis;
mod small_disk;
mod target;
pub mod tools;
mod websocat;
mod websockets;

pub use claude_cli::claude_cli;
pub use paths::cache as cache_dir;
pub use schemathesis::schemathesis;
pub use small_disk::small_disk;
pub use websocat::websocat;
pub use websockets::python_websockets;
