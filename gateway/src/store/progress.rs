//! How far a session's log goes, and how it goes on over what will never come.

use protocol::{Kind, RecordHead};
use serde::{Deserialize, Serialize};

/// Seqs passed at most in one transaction: other sessions wait for it.
pub(super) const PASSED: usize = 10_000;

/// How far a session's log goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Last seq without a hole before it, holes that a `gap` record declares apart; 0: none. Readers are shown no more than
    /// this.
    pub acked: u64,
    /// Last seq stored.
    pub last: u64,
    /// Highest attempt whose `end` record is stored; 0: none.
    pub ended: u32,
    /// Records up to this seq were removed to make room, but for `end` records; 0: none.
    pub removed: u64,
}

impl Progress {
    /// The farther of two views of one log.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            acked: self.acked.max(other.acked),
            last: self.last.max(other.last),
            ended: self.ended.max(other.ended),
            removed: self.removed.max(other.removed),
        }
    }

    /// Takes a newly stored record into account.
    pub(super) fn add(&mut self, head: &RecordHead) {
        self.last = self.last.max(head.seq);
        if head.kind == Kind::End {
            self.ended = self.ended.max(head.attempt);
        }
        if head.seq == self.acked + 1 {
            self.acked = head.seq;
        }
    }

    /// Whether something is stored behind a hole, which may have been closed.
    pub(super) fn has_hole(&self) -> bool {
        self.acked < self.last
    }

    /// Moves `acked` over the seqs stored behind it and over those that will never come, both in order. Each is looked at
    /// once. `true`: there is more to pass, after other sessions had their turn.
    pub(super) fn pass<E>(
        &mut self,
        mut stored: impl Iterator<Item = Result<u64, E>>,
        mut missing: impl Iterator<Item = Result<Missing, E>>,
    ) -> Result<bool, E> {
        let (mut seq, mut gap) = (stored.next().transpose()?, missing.next().transpose()?);
        for _ in 0..PASSED {
            let next = self.acked + 1;
            if let Some(at) = seq.filter(|at| *at <= next) {
                self.acked = self.acked.max(at);
                seq = stored.next().transpose()?;
            } else if let Some(Missing { last, .. }) = gap.filter(|gap| gap.first <= next) {
                self.acked = self.acked.max(last);
                gap = missing.next().transpose()?;
            } else {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Seqs that a `gap` record says will never come: acknowledgements pass over them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    /// The first.
    pub first: u64,
    /// The last.
    pub last: u64,
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    fn pass(progress: &mut Progress, stored: &[u64], missing: &[Missing]) -> bool {
        let (stored, missing) = (stored.iter().map(|seq| Ok(*seq)), missing.iter().map(|gap| Ok(*gap)));
        let Ok(more) = progress.pass::<Infallible>(stored, missing);
        more
    }

    #[test]
    fn no_more_is_passed_at_once_than_others_can_wait_for() {
        let mut progress = Progress::default();
        let (stored, missing): (Vec<_>, Vec<_>) = (1..PASSED as u64)
            .map(|n| {
                (
                    2 * n,
                    Missing {
                        first: 2 * n - 1,
                        last: 2 * n - 1,
                    },
                )
            })
            .unzip();
        let behind = |acked: u64| {
            (
                stored.partition_point(|seq| *seq <= acked),
                missing.partition_point(|gap| gap.last <= acked),
            )
        };
        let mut rounds = 0;
        loop {
            let (first, gap) = behind(progress.acked);
            rounds += 1;
            if !pass(&mut progress, &stored[first..], &missing[gap..]) {
                break;
            }
        }
        assert_eq!((progress.acked, rounds), (2 * (PASSED as u64 - 1), 2));
    }

    proptest! {
        #[test]
        fn what_is_passed_is_stored_or_missing_and_what_is_not_is_neither(
            stored in prop::collection::btree_set(1..40_u64, 0..30),
            gaps in prop::collection::vec((1..40_u64, 0..9_u64), 0..9),
            acked in 0..9_u64,
        ) {
            let stored: Vec<_> = stored.into_iter().collect();
            let mut missing: Vec<_> = gaps.into_iter().map(|(first, more)| Missing { first, last: first + more }).collect();
            missing.sort_by_key(|gap| gap.first);
            let mut progress = Progress { acked, ..Progress::default() };
            prop_assert!(!pass(&mut progress, &stored, &missing));
            let is_there = |seq: &u64| stored.contains(seq) || missing.iter().any(|gap| gap.first <= *seq && *seq <= gap.last);
            prop_assert!((acked + 1..=progress.acked).all(|seq| is_there(&seq)));
            prop_assert!(!is_there(&(progress.acked + 1)));
        }
    }
}
