//! How many requests of the claude-code API are under way in each namespace.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

type Counts = Arc<Mutex<HashMap<String, usize>>>;

/// Those of this gateway.
#[derive(Debug, Default)]
pub struct Places(Counts);

/// A request's place, until it is dropped.
#[derive(Debug)]
pub struct Place {
    counts: Counts,
    namespace: String,
}

impl Places {
    /// A place, if fewer than `most` are taken.
    pub fn take(&self, namespace: &str, most: usize) -> Option<Place> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = counts.get(namespace).copied().unwrap_or_default();
        if taken >= most {
            return None;
        }
        counts.insert(namespace.to_owned(), taken + 1);
        Some(Place {
            counts: self.0.clone(),
            namespace: namespace.to_owned(),
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(taken) = counts.get_mut(&self.namespace) {
            *taken -= 1;
            if *taken == 0 {
                counts.remove(&self.namespace);
            }
        }
    }
}
