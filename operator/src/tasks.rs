//! Tasks that end with whoever started them, so that a process that stops at any line stops whole.

use tokio_util::task::AbortOnDropHandle;

/// Does something in a task of its own and waits for it: what wakes it wakes nobody else. Panics if it does.
pub async fn joined<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    match AbortOnDropHandle::new(tokio::spawn(work)).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is going down, and with it whoever waits.
            Err(_) => std::future::pending().await,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    #[should_panic(expected = "as it does here")]
    async fn a_panic_of_what_is_waited_for_is_ones_own() {
        joined(async { panic!("as it does here") }).await;
    }
}
