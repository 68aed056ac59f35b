//! The runner's own log, on stderr.

use std::io::IsTerminal as _;
use std::sync::Arc;

use tracing::Level;
use tracing_subscriber::filter::{FilterExt as _, LevelFilter, Targets, filter_fn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::{Layer as _, Registry, layer::SubscriberExt as _, util::SubscriberInitExt};

use crate::outlet::Outlet;

/// stderr as the log writes it.
#[derive(Clone)]
pub struct Stderr(Arc<Outlet>);

impl<'a> MakeWriter<'a> for Stderr {
    type Writer = &'a Outlet;

    fn make_writer(&'a self) -> Self::Writer {
        &self.0
    }
}

impl Stderr {
    fn new() -> Self {
        let missing = |lines| format!("… {lines} lines of the log are not shown: nobody read them in time\n");
        Self(Arc::new(Outlet::to(std::io::stderr(), missing)))
    }
}

/// Starts the log: warnings, or what `RUST_LOG` says (`target=level,…`: the form with expressions would cost a megabyte).
/// What is returned writes the rest of it when it is dropped.
pub fn start() -> Stderr {
    let stderr = Stderr::new();
    let wanted = std::env::var("RUST_LOG").unwrap_or_default();
    let ansi = std::io::stderr().is_terminal();
    layers(&wanted, stderr.clone(), ansi).init();
    stderr
}

fn layers<W>(wanted: &str, writer: W, ansi: bool) -> impl SubscriberInitExt
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = Some(wanted)
        .filter(|wanted| !wanted.is_empty())
        .and_then(|wanted| wanted.parse::<Targets>().ok())
        .unwrap_or_else(|| Targets::new().with_default(LevelFilter::WARN));
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(ansi);
    Registry::default().with(lines.with_filter(filter.and(filter_fn(|line| may_say(*line.level(), line.target())))))
}

/// Libraries show whole requests when they are asked for everything, tokens among them; whoever may set `RUST_LOG` or read
/// the pod's log need not be somebody who may read Secrets.
fn may_say(level: Level, target: &str) -> bool {
    let own = target.split("::").next() == Some(env!("CARGO_CRATE_NAME"));
    own || level <= Level::INFO
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(Level::TRACE, "tungstenite::handshake::client", false)]
    #[case(Level::DEBUG, "hyper_util::client::legacy::pool", false)]
    #[case(Level::DEBUG, "rustls::client::hs", false)]
    #[case(Level::TRACE, "runnerless", false)]
    #[case(Level::WARN, "rustls::client::hs", true)]
    #[case(Level::TRACE, "runner::uplink", true)]
    fn libraries_say_little_whatever_is_asked_for(#[case] level: Level, #[case] target: &str, #[case] expected: bool) {
        assert_eq!(may_say(level, target), expected);
    }
}
