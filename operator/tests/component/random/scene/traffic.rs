//! What an operator sends, counted.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use http::Request;
use kube::client::Body;
use tokio::time::Instant;

use crate::wire::{Fate, Wire, is_watch, is_write};

/// Writes that are remembered, to be told when something does not hold.
const STORY: usize = 30;

/// Counts what an operator sends.
#[derive(Clone, Default)]
pub struct Traffic(pub Arc<Counted>);

#[derive(Default)]
pub struct Counted {
    pub writes: AtomicUsize,
    pub reads: AtomicUsize,
    written: Mutex<VecDeque<(Instant, String)>>,
}

impl Counted {
    pub fn last_write(&self) -> Option<Instant> {
        self.written.lock().unwrap().back().map(|(at, _)| *at)
    }

    /// The last writes, with how long ago each was.
    pub fn story(&self) -> String {
        let written = self.written.lock().unwrap();
        let lines = written
            .iter()
            .map(|(at, what)| format!("{:.1} s ago {what}", at.elapsed().as_secs_f64()));
        lines.collect::<Vec<_>>().join("\n")
    }
}

impl Wire for Traffic {
    fn fate(&self, request: &Request<Body>) -> Fate {
        if is_write(request) {
            self.0.writes.fetch_add(1, Ordering::SeqCst);
            let mut written = self.0.written.lock().unwrap();
            if written.len() == STORY {
                written.pop_front();
            }
            written.push_back((Instant::now(), format!("{} {}", request.method(), request.uri().path())));
        } else if !is_watch(request) {
            self.0.reads.fetch_add(1, Ordering::SeqCst);
        }
        Fate::Pass
    }
}
