//! Leader election: one operator at a time works. Sessions stay safe with two (names and preconditions see to that), but two
//! would do everything twice.

#[cfg(test)]
mod tests;

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::{Api, Client, api::PostParams};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::settings::LeaseSettings;

/// Others wait this long after the last renewal that they saw.
const DURATION: Duration = Duration::from_secs(15);
/// A holder that could not renew for so long stops: well before others may start.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_secs(2);

/// The Lease could not be kept.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another holds it now.
    #[error("failed to keep the lease: {0} holds it now")]
    Taken(String),
    /// The API server did not take a renewal in time.
    #[error("failed to renew the lease within {} s", RENEW_DEADLINE.as_secs())]
    Late,
}

/// What to do about a Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Move {
    /// It is free, or its holder is silent.
    Take,
    /// It is ours.
    Renew,
    /// Another's.
    Wait,
}

/// A candidate for the Lease.
pub struct Candidate {
    leases: Api<Lease>,
    settings: LeaseSettings,
    /// Version of the Lease and when it was first seen: a holder is silent when its version stays, by our own clock.
    seen: Option<(String, Instant)>,
}

impl Candidate {
    /// A candidate.
    pub fn new(client: Client, settings: LeaseSettings) -> Self {
        Self {
            leases: Api::namespaced(client, &settings.namespace),
            settings,
            seen: None,
        }
    }

    /// Waits until the Lease is ours: false when `stop` came first.
    ///
    /// A try that is under way is not broken off by `stop`: it may be the one that succeeds, and the Lease is given back then.
    pub async fn acquire(&mut self, stop: &CancellationToken) -> bool {
        loop {
            match tokio::time::timeout(RENEW_DEADLINE, self.attempt()).await {
                Ok(Ok(None)) => {
                    tracing::info!(lease = self.settings.name, identity = self.settings.identity, "leading");
                    return true;
                }
                Ok(Ok(Some(holder))) => tracing::debug!(holder, "waiting for the lease"),
                Ok(Err(error)) => {
                    tracing::warn!(lease = self.settings.name, namespace = self.settings.namespace, %error, "failed to acquire the lease");
                }
                Err(_) => {
                    tracing::warn!(
                        lease = self.settings.name,
                        namespace = self.settings.namespace,
                        "failed to acquire the lease: the API server does not answer"
                    );
                }
            }
            tokio::select! {
                () = stop.cancelled() => return false,
                () = tokio::time::sleep(crate::backoff::jittered(RETRY)) => {}
            }
        }
    }

    /// Renews the Lease until `stop`, or until it is lost.
    pub async fn keep(&mut self, stop: &CancellationToken) -> Result<(), Error> {
        let mut renewed = Instant::now();
        loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(RETRY) => {}
            }
            let left = RENEW_DEADLINE.saturating_sub(renewed.elapsed());
            match tokio::time::timeout(left, self.attempt()).await {
                Ok(Ok(None)) => renewed = Instant::now(),
                Ok(Ok(Some(holder))) => return Err(Error::Taken(holder)),
                Ok(Err(error)) => tracing::warn!(%error, "failed to renew the lease"),
                Err(_) => return Err(Error::Late),
            }
            if renewed.elapsed() >= RENEW_DEADLINE {
                return Err(Error::Late);
            }
        }
    }

    /// Gives the Lease back, so that the next holder need not wait.
    pub async fn release(&mut self) {
        let ours = self.leases.get_opt(&self.settings.name).await.ok().flatten();
        let Some(mut lease) = ours.filter(|lease| holder(lease) == self.settings.identity) else {
            return;
        };
        let spec = lease.spec.get_or_insert_default();
        spec.holder_identity = Some(String::new());
        spec.lease_duration_seconds = Some(1);
        if let Err(error) = self
            .leases
            .replace(&self.settings.name, &PostParams::default(), &lease)
            .await
        {
            tracing::warn!(%error, "failed to release the lease");
        }
    }

    /// One try to take or renew: `None` when the Lease is ours, else who holds it.
    async fn attempt(&mut self) -> kube::Result<Option<String>> {
        let name = self.settings.name.clone();
        let Some(lease) = self.leases.get_opt(&name).await? else {
            let metadata = ObjectMeta {
                name: Some(name),
                ..ObjectMeta::default()
            };
            let lease = Lease {
                metadata,
                spec: Some(self.spec(None)),
            };
            return raced(self.leases.create(&PostParams::default(), &lease).await);
        };
        let silent_for = self.watch(&lease);
        match evaluate(&lease, &self.settings.identity, silent_for) {
            Move::Wait => Ok(Some(holder(&lease).to_owned())),
            Move::Take | Move::Renew => {
                let spec = Some(self.spec(Some(&lease)));
                // A PUT with the version that was read: of two that take it, one gets 409.
                raced(
                    self.leases
                        .replace(&name, &PostParams::default(), &Lease { spec, ..lease })
                        .await,
                )
            }
        }
    }

    /// For how long the Lease has not changed, by our clock.
    fn watch(&mut self, lease: &Lease) -> Duration {
        let version = lease.metadata.resource_version.clone().unwrap_or_default();
        match &self.seen {
            Some((seen, since)) if *seen == version => since.elapsed(),
            _ => {
                self.seen = Some((version, Instant::now()));
                Duration::ZERO
            }
        }
    }

    fn spec(&self, before: Option<&Lease>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        let before = before.and_then(|lease| Some((holder(lease), lease.spec.as_ref()?)));
        let ours = before
            .filter(|(holder, _)| *holder == self.settings.identity)
            .map(|(_, spec)| spec);
        let transitions = before.and_then(|(_, spec)| spec.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.settings.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            acquire_time: ours.and_then(|spec| spec.acquire_time.clone()).or(Some(now.clone())),
            renew_time: Some(now),
            lease_transitions: Some(if ours.is_some() {
                transitions
            } else {
                transitions.saturating_add(1)
            }),
            ..LeaseSpec::default()
        }
    }
}

/// A lost race means that somebody else has it, who is seen at the next try.
fn raced(written: kube::Result<Lease>) -> kube::Result<Option<String>> {
    match written {
        Ok(_) => Ok(None),
        Err(kube::Error::Api(status)) if status.is_conflict() || status.is_already_exists() => {
            Ok(Some("another".to_owned()))
        }
        Err(error) => Err(error),
    }
}

fn holder(lease: &Lease) -> &str {
    lease
        .spec
        .as_ref()
        .and_then(|spec| spec.holder_identity.as_deref())
        .unwrap_or_default()
}

fn evaluate(lease: &Lease, me: &str, silent_for: Duration) -> Move {
    let lasts = lease
        .spec
        .as_ref()
        .and_then(|spec| spec.lease_duration_seconds)
        .and_then(|s| u64::try_from(s).ok());
    match holder(lease) {
        "" => Move::Take,
        holder if holder == me => Move::Renew,
        _ if silent_for > lasts.map_or(DURATION, Duration::from_secs) => Move::Take,
        _ => Move::Wait,
    }
}
