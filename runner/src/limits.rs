//! How much the agent may spend, and what the proxy lets through under it.
//!
//! The driver reads the limits file and calls [`crate::proxy::Proxy::set_limits`] with `(&live).into()`, as often as it
//! likes: nothing happens unless they changed. [`crate::proxy::Proxy::beyond_limits`] tells it to stop the turn.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protocol::NanoUsd;
use protocol::spec::LiveLimits;
use tokio::sync::{Notify, watch};

/// Most model calls at a time.
pub const MAX_IN_FLIGHT: usize = 16;

/// What a session may spend in all; `None`: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// US dollars.
    pub cost: Option<NanoUsd>,
    /// Tokens of all kinds.
    pub tokens: Option<u64>,
}

impl From<&LiveLimits> for Limits {
    fn from(live: &LiveLimits) -> Self {
        Self {
            cost: live.max_cost_usd,
            tokens: live.max_tokens,
        }
    }
}

/// What was, or may be, spent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// US dollars.
    pub cost: NanoUsd,
    /// Tokens of all kinds.
    pub tokens: u64,
}

impl Amount {
    /// More than any limit: a request of unknown cost goes when nothing else is in flight, and nothing goes beside it.
    pub const UNBOUNDED: Self = Self {
        cost: NanoUsd(u64::MAX),
        tokens: u64::MAX,
    };

    fn plus(self, other: Self) -> Self {
        Self {
            cost: self.cost.saturating_add(other.cost),
            tokens: self.tokens.saturating_add(other.tokens),
        }
    }
}

impl Limits {
    /// Whether `amount` stays within.
    fn hold(&self, amount: Amount) -> bool {
        self.cost.is_none_or(|limit| amount.cost <= limit) && self.tokens.is_none_or(|limit| amount.tokens <= limit)
    }

    /// Whether `amount` leaves nothing to spend.
    fn are_used_up(&self, amount: Amount) -> bool {
        self.cost.is_some_and(|limit| amount.cost >= limit) || self.tokens.is_some_and(|limit| amount.tokens >= limit)
    }
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Forward it; its reservation is taken.
    Forward,
    /// Ask again when something in flight has ended.
    Wait,
    /// The limit is used up: nothing is forwarded until it is raised.
    Beyond,
}

/// Spent and reserved amounts. A request goes out only if what is spent, what is reserved and its own reservation are
/// within the limit, or nothing is in flight: so the limit is overshot by at most one response.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ledger {
    limits: Limits,
    spent: Amount,
    /// Cost and tokens reserved; wider than an amount, so that the greatest can be added and taken away again.
    reserved: (u128, u128),
    in_flight: usize,
}

impl Ledger {
    /// A ledger of a session that has spent `spent` already.
    pub fn new(limits: Limits, spent: Amount) -> Self {
        Self {
            limits,
            spent,
            ..Self::default()
        }
    }

    /// Decides on a request that may cost `want` at most.
    pub fn ask(&mut self, want: Amount) -> Verdict {
        if self.limits.are_used_up(self.spent) {
            return Verdict::Beyond;
        }
        let alone = self.in_flight == 0;
        let fits = self.limits.hold(self.spent.plus(self.reserved()).plus(want));
        if self.in_flight >= MAX_IN_FLIGHT || !(alone || fits) {
            return Verdict::Wait;
        }
        self.in_flight += 1;
        self.reserved.0 += u128::from(want.cost.0);
        self.reserved.1 += u128::from(want.tokens);
        Verdict::Forward
    }

    fn reserved(&self) -> Amount {
        let bounded = |sum: u128| u64::try_from(sum).unwrap_or(u64::MAX);
        Amount {
            cost: NanoUsd(bounded(self.reserved.0)),
            tokens: bounded(self.reserved.1),
        }
    }

    /// A request that was let through is over: its reservation is given back, what it cost is spent.
    pub fn settle(&mut self, reserved: Amount, cost: Amount) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.reserved.0 = self.reserved.0.saturating_sub(reserved.cost.0.into());
        self.reserved.1 = self.reserved.1.saturating_sub(reserved.tokens.into());
        self.spent = self.spent.plus(cost);
    }
}

/// The ledger with those who wait for it, first come first served.
#[derive(Debug)]
pub struct Gate {
    ledger: Mutex<Ledger>,
    /// A fair queue of one: a great request is not overtaken for ever by small ones.
    turnstile: tokio::sync::Mutex<()>,
    changed: Notify,
    beyond: watch::Sender<bool>,
}

/// The right to forward one request. Dropped, it settles: with [`Permit::charge`].
#[derive(Debug)]
pub struct Permit {
    gate: Arc<Gate>,
    reserved: Amount,
    /// What the request has cost.
    pub charge: Amount,
}

impl Gate {
    /// A gate before this ledger.
    pub fn new(ledger: Ledger) -> Arc<Self> {
        Arc::new(Self {
            ledger: Mutex::new(ledger),
            turnstile: tokio::sync::Mutex::new(()),
            changed: Notify::new(),
            beyond: watch::Sender::new(false),
        })
    }

    /// Waits until a request that may cost `want` may be forwarded: for ever, when the limit is used up and not raised.
    pub async fn admit(self: &Arc<Self>, want: Amount) -> Permit {
        let _turn = self.turnstile.lock().await;
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // From here on a change is not missed, though nobody waits yet.
            changed.as_mut().enable();
            match self.ledger().ask(want) {
                Verdict::Forward => {
                    return Permit {
                        gate: Arc::clone(self),
                        reserved: want,
                        charge: Amount::default(),
                    };
                }
                Verdict::Wait => {}
                Verdict::Beyond => {
                    self.beyond.send_replace(true);
                }
            }
            changed.await;
        }
    }

    /// Other limits from now on. The same ones again change nothing.
    pub fn set_limits(&self, limits: Limits) {
        let used_up = {
            let mut ledger = self.ledger();
            if ledger.limits == limits {
                return;
            }
            ledger.limits = limits;
            limits.are_used_up(ledger.spent)
        };
        if !used_up {
            self.beyond.send_replace(false);
        }
        self.changed.notify_waiters();
    }

    /// The limits that hold.
    pub fn limits(&self) -> Limits {
        self.ledger().limits
    }

    /// What was spent so far.
    pub fn spent(&self) -> Amount {
        self.ledger().spent
    }

    /// What was spent before.
    /// Told once, before the first request.
    pub fn set_spent(&self, spent: Amount) {
        self.ledger().spent = spent;
        self.changed.notify_waiters();
    }

    /// True as soon as a request is held because the limit is used up.
    pub fn beyond(&self) -> watch::Receiver<bool> {
        self.beyond.subscribe()
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.gate.ledger().settle(self.reserved, self.charge);
        self.gate.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn tokens(tokens: u64) -> Amount {
        Amount {
            tokens,
            cost: NanoUsd(0),
        }
    }

    fn limit(tokens: u64) -> Limits {
        Limits {
            tokens: Some(tokens),
            cost: None,
        }
    }

    #[test]
    fn without_a_limit_sixteen_requests_are_in_flight_and_no_more() {
        let mut ledger = Ledger::default();
        for _ in 0..MAX_IN_FLIGHT {
            assert_eq!(ledger.ask(tokens(u64::MAX)), Verdict::Forward);
        }
        assert_eq!(ledger.ask(tokens(1)), Verdict::Wait);
        ledger.settle(tokens(u64::MAX), tokens(5));
        assert_eq!(ledger.ask(tokens(1)), Verdict::Forward);
    }

    #[test]
    fn a_request_greater_than_the_limit_goes_alone_and_the_next_is_beyond() {
        let mut ledger = Ledger::new(limit(100), tokens(0));
        assert_eq!(ledger.ask(tokens(1000)), Verdict::Forward);
        assert_eq!(ledger.ask(tokens(1)), Verdict::Wait);
        ledger.settle(tokens(1000), tokens(150));
        assert_eq!(ledger.ask(tokens(1)), Verdict::Beyond);
    }

    #[test]
    fn dollars_hold_as_tokens_do() {
        let limits = Limits {
            cost: Some(NanoUsd(100)),
            tokens: None,
        };
        let want = Amount {
            cost: NanoUsd(60),
            tokens: 0,
        };
        let mut ledger = Ledger::new(limits, Amount::default());
        assert_eq!(ledger.ask(want), Verdict::Forward);
        assert_eq!(ledger.ask(want), Verdict::Wait);
        ledger.settle(want, want);
        assert_eq!(ledger.ask(want), Verdict::Forward);
        ledger.settle(want, want);
        assert_eq!(ledger.ask(want), Verdict::Beyond);
    }

    #[test]
    fn a_request_of_unknown_cost_goes_alone() {
        let mut ledger = Ledger::new(limit(1_000), tokens(0));
        assert_eq!(ledger.ask(tokens(10)), Verdict::Forward);
        assert_eq!(ledger.ask(Amount::UNBOUNDED), Verdict::Wait);
        ledger.settle(tokens(10), tokens(10));
        assert_eq!(ledger.ask(Amount::UNBOUNDED), Verdict::Forward);
        assert_eq!(ledger.ask(tokens(1)), Verdict::Wait);
        ledger.settle(Amount::UNBOUNDED, tokens(10));
        assert_eq!(ledger.ask(tokens(1)), Verdict::Forward);
    }

    #[tokio::test]
    async fn a_request_beyond_the_limit_is_held_until_the_limit_is_raised() {
        let gate = Gate::new(Ledger::new(limit(100), tokens(100)));
        let mut beyond = gate.beyond();
        let held = tokio::spawn({
            let gate = Arc::clone(&gate);
            async move { gate.admit(tokens(10)).await }
        });
        let deadline = Duration::from_secs(10);
        tokio::time::timeout(deadline, beyond.wait_for(|beyond| *beyond))
            .await
            .unwrap()
            .unwrap();
        assert!(!held.is_finished());
        for same_or_still_used_up in [100, 90] {
            gate.set_limits(limit(same_or_still_used_up));
            assert!(
                *gate.beyond().borrow(),
                "the driver must not miss it between two looks at its file"
            );
        }
        gate.set_limits(limit(200));
        drop(tokio::time::timeout(deadline, held).await.unwrap().unwrap());
        assert!(!*gate.beyond().borrow());
    }

    #[tokio::test]
    async fn who_waits_goes_on_when_another_is_over() {
        let gate = Gate::new(Ledger::new(limit(100), tokens(0)));
        let mut first = gate.admit(tokens(80)).await;
        let second = tokio::spawn({
            let gate = Arc::clone(&gate);
            async move { gate.admit(tokens(80)).await }
        });
        tokio::task::yield_now().await;
        assert!(!second.is_finished());
        first.charge = tokens(10);
        drop(first);
        tokio::time::timeout(Duration::from_secs(10), second)
            .await
            .unwrap()
            .unwrap();
    }

    proptest! {
        /// Requests come and end in any order; each costs at most what it reserved.
        #[test]
        fn a_limit_is_overshot_by_at_most_one_response(
            bound in 1..2_000_u64,
            steps in prop::collection::vec((any::<bool>(), 1..500_u64, 0..100_u64, any::<prop::sample::Index>()), 1..300),
        ) {
            let mut ledger = Ledger::new(limit(bound), tokens(0));
            let mut in_flight: Vec<(u64, u64)> = Vec::new();
            let mut spent = 0;
            for (begin, want, percent, which) in steps {
                if begin {
                    if ledger.ask(tokens(want)) == Verdict::Forward {
                        in_flight.push((want, want * percent / 100));
                    }
                } else if !in_flight.is_empty() {
                    let (want, cost) = in_flight.swap_remove(which.index(in_flight.len()));
                    ledger.settle(tokens(want), tokens(cost));
                    spent += cost;
                }
                let greatest = in_flight.iter().map(|(want, _)| *want).max().unwrap_or(0);
                let outstanding: u64 = in_flight.iter().map(|(want, _)| *want).sum();
                prop_assert!(in_flight.len() <= MAX_IN_FLIGHT);
                prop_assert!(spent + outstanding <= bound.max(spent) + greatest, "more than one response beyond the limit");
                prop_assert!(in_flight.len() < 2 || spent + outstanding <= bound, "two in flight, and not both reserved");
            }
        }
    }
}
