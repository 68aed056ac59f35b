//! Tasks that end with whoever started them, so that a process that stops at any line stops whole.

use futures::{Stream, StreamExt as _, stream};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

/// Items of a stream that wait to be taken.
const AHEAD: usize = 1_024;

/// Spawns a task that ends when the handle is dropped.
pub fn spawn<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> AbortOnDropHandle<T> {
    AbortOnDropHandle::new(tokio::spawn(work))
}

/// Does something in a task of its own and waits for it: what wakes it wakes nobody else. Panics if it does.
pub async fn joined<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    match spawn(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is going down, and with it whoever waits.
            Err(_) => std::future::pending().await,
        },
    }
}

/// The same for a stream.
pub fn apart<S>(stream: S) -> impl Stream<Item = S::Item> + Send + 'static
where
    S: Stream<Item: Send> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(AHEAD);
    let task = spawn(async move {
        let mut stream = std::pin::pin!(stream);
        while let Some(item) = stream.next().await {
            if sender.send(item).await.is_err() {
                return;
            }
        }
    });
    stream::unfold((receiver, task), |(mut receiver, task)| async {
        receiver.recv().await.map(|item| (item, (receiver, task)))
    })
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn what_is_done_apart_ends_with_who_waits_for_it() {
        let (held, dropped) = oneshot::channel::<()>();
        let mut stream = Box::pin(apart(stream::iter(0..3).chain(stream::once(async move {
            let _held = held;
            std::future::pending().await
        }))));
        for expected in 0..3 {
            assert_eq!(stream.next().await, Some(expected));
        }
        drop(stream);
        assert!(dropped.await.is_err(), "nobody holds it any more");
    }

    #[tokio::test]
    #[should_panic(expected = "as it does here")]
    async fn a_panic_of_what_is_waited_for_is_ones_own() {
        joined(async { panic!("as it does here") }).await;
    }
}
