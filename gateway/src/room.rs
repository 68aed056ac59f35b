//! Memory that requests may take while they are under way: a budget over all connections, so that no number of them can
//! take more than the process has.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What permits count: a semaphore has room for fewer permits than a budget has bytes.
const UNIT: usize = 1 << 10;

/// A budget in bytes, of which each tenant has at most a share: whoever holds all of theirs is in nobody else's way.
#[derive(Debug)]
pub struct Room {
    all: Budget,
    share: usize,
    tenants: Mutex<HashMap<String, Weak<Semaphore>>>,
}

/// What a tenant may take of a [`Room`].
#[derive(Clone, Debug)]
pub struct Tenant {
    own: Budget,
    all: Budget,
}

/// Bytes taken from a [`Room`] until dropped.
#[derive(Debug)]
pub struct Taken {
    _all: OwnedSemaphorePermit,
    _own: OwnedSemaphorePermit,
}

/// Bytes that hold their room until the last of them is dropped, wherever they are by then.
struct Held {
    bytes: Bytes,
    _room: Arc<Taken>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Taken {
    /// Makes bytes hold this room.
    pub fn hold(self: &Arc<Self>, bytes: Bytes) -> Bytes {
        let room = self.clone();
        Bytes::from_owner(Held { bytes, _room: room })
    }
}

#[derive(Clone, Debug)]
struct Budget {
    permits: Arc<Semaphore>,
    units: u32,
}

impl Room {
    /// Room for this many bytes, and so many of them for each tenant.
    pub fn new(bytes: usize, share: usize) -> Self {
        Self {
            all: Budget::new(bytes),
            share,
            tenants: Mutex::default(),
        }
    }

    /// The share of a tenant.
    pub fn of(&self, tenant: &str) -> Tenant {
        let mut tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
        let own = if let Some(permits) = tenants.get(tenant).and_then(Weak::upgrade) {
            Budget {
                permits,
                units: units(self.share),
            }
        } else {
            tenants.retain(|_, permits| permits.strong_count() > 0);
            let own = Budget::new(self.share);
            tenants.insert(tenant.to_owned(), Arc::downgrade(&own.permits));
            own
        };
        let all = self.all.clone();
        Tenant { own, all }
    }
}

impl Tenant {
    /// Waits until there is room, first come first served. More than the share is the share.
    pub async fn take(&self, bytes: usize) -> Taken {
        let units = units(bytes).min(self.own.units);
        let own = self.own.take(units).await;
        Taken {
            _all: self.all.take(units).await,
            _own: own,
        }
    }

    /// Takes room if there is some now.
    pub fn try_take(&self, bytes: usize) -> Option<Arc<Taken>> {
        let units = units(bytes).min(self.own.units);
        let own = self.own.try_take(units)?;
        Some(Arc::new(Taken {
            _all: self.all.try_take(units)?,
            _own: own,
        }))
    }

    /// The first of these lengths for which there is room now, for `times` as many bytes; else `least`, which needs none.
    pub fn length(&self, lengths: &[usize], times: usize, least: usize) -> (usize, Option<Arc<Taken>>) {
        let taken = lengths
            .iter()
            .find_map(|length| Some((*length, self.try_take(length * times)?)));
        taken.map_or((least, None), |(length, room)| (length, Some(room)))
    }
}

impl Budget {
    fn new(bytes: usize) -> Self {
        let units = units(bytes);
        Self {
            permits: Arc::new(Semaphore::new(units as usize)),
            units,
        }
    }

    fn try_take(&self, units: u32) -> Option<OwnedSemaphorePermit> {
        self.permits.clone().try_acquire_many_owned(units.min(self.units)).ok()
    }

    async fn take(&self, units: u32) -> OwnedSemaphorePermit {
        match self.permits.clone().acquire_many_owned(units.min(self.units)).await {
            Ok(permit) => permit,
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
        let room = Room::new(10 * UNIT, 10 * UNIT);
        let (first, second) = (room.of("a"), room.of("b"));
        let held = first.take(7 * UNIT).await;
        let waits = second.take(4 * UNIT);
        tokio::pin!(waits);
        assert!(waits.as_mut().now_or_never().is_none());
        drop(held);
        let _held = waits.await;
        assert!(first.take(7 * UNIT).now_or_never().is_none());
    }

    #[tokio::test]
    async fn who_has_all_of_a_share_waits_and_others_do_not() {
        let room = Room::new(10 * UNIT, 4 * UNIT);
        let _held = room.of("a").take(100 * UNIT).await;
        assert!(room.of("a").take(1).now_or_never().is_none());
        assert!(room.of("b").take(4 * UNIT).now_or_never().is_some());
    }

    #[test]
    fn bytes_hold_their_room_until_the_last_of_them_is_gone() {
        let tenant = Room::new(8 * UNIT, 4 * UNIT).of("a");
        let room = tenant.try_take(4 * UNIT).unwrap();
        let bytes = room.hold(Bytes::from_static(b"abc"));
        let rest = bytes.slice(1..);
        drop((room, bytes));
        assert!(tenant.try_take(1).is_none());
        assert_eq!(rest, "bc");
        drop(rest);
        assert!(tenant.try_take(4 * UNIT).is_some());
    }

    #[test]
    fn who_finds_no_room_for_much_takes_less() {
        let tenant = Room::new(8 * UNIT, 4 * UNIT).of("a");
        let (first, _held) = tenant.length(&[3 * UNIT, UNIT], 1, 7);
        let (second, _also) = tenant.length(&[3 * UNIT, UNIT], 1, 7);
        let (third, nothing) = tenant.length(&[3 * UNIT, UNIT], 1, 7);
        assert_eq!((first, second, third), (3 * UNIT, UNIT, 7));
        assert!(nothing.is_none());
    }

    #[tokio::test]
    async fn a_tenant_that_holds_nothing_is_forgotten() {
        let room = Room::new(10 * UNIT, 4 * UNIT);
        for tenant in 0..100 {
            drop(room.of(&tenant.to_string()).take(UNIT).await);
        }
        assert_eq!(room.tenants.lock().unwrap().len(), 1);
    }
}
