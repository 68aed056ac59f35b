//! Waiting for a condition, with a deadline.

use std::time::Duration;

use anyhow::{Result, bail};
use tokio::time::{Instant, sleep};

/// Long enough for anything that should happen by itself on a small, busy machine.
pub const SOON: Duration = Duration::from_mins(3);
const EVERY: Duration = Duration::from_millis(250);

/// Asks again and again until there is an answer. An error counts as no answer yet and is told at the end.
pub async fn until<T>(what: &str, deadline: Duration, mut ask: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
    let end = Instant::now() + deadline;
    loop {
        let last = match ask().await {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => String::new(),
            Err(error) => format!("; the last error: {error:#}"),
        };
        if Instant::now() >= end {
            bail!("not within {deadline:?}: {what}{last}");
        }
        sleep(EVERY).await;
    }
}
