//! Memory that requests may take while they are under way: a budget over all connections, so that no number of them can
//! take more than the process has.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What permits count: a semaphore has room for fewer permits than a budget has bytes.
const UNIT: usize = 1 << 10;

/// A budget in bytes. Clones share it.
#[derive(Clone, Debug)]
pub struct Room {
    permits: Arc<Semaphore>,
    units: u32,
}

/// Bytes taken from a [`Room`] until dropped.
#[derive(Debug)]
pub struct Taken(#[expect(dead_code, reason = "its drop gives the bytes back")] OwnedSemaphorePermit);

impl Room {
    /// Room for this many bytes.
    pub fn new(bytes: usize) -> Self {
        let units = units(bytes);
        Self {
            permits: Arc::new(Semaphore::new(units as usize)),
            units,
        }
    }

    /// Waits until there is room, first come first served. More than all of it is all of it.
    pub async fn take(&self, bytes: usize) -> Taken {
        let permits = self.permits.clone().acquire_many_owned(units(bytes).min(self.units));
        match permits.await {
            Ok(permit) => Taken(permit),
            // Nobody closes it.
            Err(_) => std::future::pending().await,
        }
    }
}

fn units(bytes: usize) -> u32 {
    bytes.div_ceil(UNIT).try_into().unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn who_finds_no_room_waits_until_there_is() {
        let room = Room::new(10 * UNIT);
        let first = room.take(7 * UNIT).await;
        let second = room.take(4 * UNIT);
        tokio::pin!(second);
        assert!(second.as_mut().now_or_never().is_none());
        drop(first);
        let _second = second.await;
        assert!(room.take(7 * UNIT).now_or_never().is_none());
    }

    #[tokio::test]
    async fn more_than_all_is_all() {
        let room = Room::new(UNIT);
        let _all = room.take(100 * UNIT).await;
        assert!(room.take(1).now_or_never().is_none());
    }
}
