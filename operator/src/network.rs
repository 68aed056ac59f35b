//! The `NetworkPolicy` of each namespace with sessions: what their pods may reach, and that nothing may reach them.
//!
//! A session's Job is made when the policy is there. One of its name that is not ours is the admin's word and stays as it is; one of
//! ours that was changed or taken away is put right. It goes when the namespace has had no session, and no pod of one, for a while.

mod keeper;

use std::{
    collections::HashMap,
    str::FromStr,
    sync::{Mutex, MutexGuard, PoisonError},
};

use k8s_openapi::{
    api::networking::v1::{NetworkPolicy, NetworkPolicyEgressRule, NetworkPolicySpec},
    apimachinery::pkg::apis::meta::v1::LabelSelector,
};
use kube::{ResourceExt as _, api::ObjectMeta};
use protocol::names::label;
use serde_json::Value;
use tokio::sync::watch;

pub use keeper::run;

use crate::{
    context::Context,
    session::{ApplyError, create},
};

/// Name of the policy.
pub const NAME: &str = "agentic-sessions";

/// What the pods of sessions may reach: rules of a `NetworkPolicy`'s `spec.egress`.
#[derive(Clone, Debug, PartialEq)]
pub struct Egress(Vec<NetworkPolicyEgressRule>);

impl FromStr for Egress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rules = serde_json::from_str(text).and_then(|mut rules| {
            as_stored(&mut rules);
            serde_json::from_value(rules)
        });
        rules.map(Self).map_err(|error| {
            format!("failed to read the egress rules: give the list of a NetworkPolicy's spec.egress as JSON: {error}")
        })
    }
}

/// What the API server makes of rules: lists and labels without an entry are left out, a port is TCP's unless it says otherwise.
fn as_stored(rules: &mut Value) {
    match rules {
        Value::Object(fields) => {
            fields.retain(|name, value| match value {
                Value::Array(entries) => !entries.is_empty(),
                Value::Object(labels) => name != "matchLabels" || !labels.is_empty(),
                _ => true,
            });
            if fields.contains_key("port") {
                fields.entry("protocol").or_insert_with(|| "TCP".into());
            }
            fields.values_mut().for_each(as_stored);
        }
        Value::Array(entries) => entries.iter_mut().for_each(as_stored),
        _ => {}
    }
}

/// The policies, as a watch has them.
pub struct Network {
    policies: Mutex<HashMap<String, Seen>>,
    /// The first list is complete.
    listed: watch::Sender<bool>,
}

impl Default for Network {
    fn default() -> Self {
        Self {
            policies: Mutex::default(),
            listed: watch::Sender::new(false),
        }
    }
}

/// A policy of our name.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    uid: String,
    /// It carries our label.
    ours: bool,
    /// It says what we want it to say.
    right: bool,
}

/// What is done about the policy of a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Nothing,
    Make,
    PutRight,
    Remove,
    TellForeign,
}

/// What is done about the policy of a namespace that needs one, or does not.
fn step(needed: bool, seen: Option<&Seen>) -> Step {
    match (needed, seen) {
        (true, None) => Step::Make,
        (true, Some(Seen { ours: false, .. })) => Step::TellForeign,
        (true, Some(Seen { right: false, .. })) => Step::PutRight,
        (false, Some(Seen { ours: true, .. })) => Step::Remove,
        (true, Some(_)) | (false, _) => Step::Nothing,
    }
}

/// Makes the policy of a namespace, if there is none of its name: a session begins only then.
pub async fn ensure(context: &Context, namespace: &str) -> Result<(), ApplyError> {
    let Some(egress) = &context.settings.session_egress else {
        return Ok(());
    };
    let network = &context.network;
    // Fails only when the operator is stopping; then nothing is begun either.
    let _ = network.listed.subscribe().wait_for(|listed| *listed).await;
    if network.seen().contains_key(namespace) {
        return Ok(());
    }
    match create(&context.client, namespace, "NetworkPolicy", &policy(namespace, egress)).await {
        // The watch has not told yet, or somebody was faster.
        Err(ApplyError::Exists { .. }) => Ok(()),
        result => result,
    }
}

fn policy(namespace: &str, egress: &Egress) -> NetworkPolicy {
    let labels = [(label::MANAGED_BY, label::MANAGER), (label::NAME, label::APPLICATION)];
    NetworkPolicy {
        metadata: ObjectMeta {
            name: Some(NAME.to_owned()),
            namespace: Some(namespace.to_owned()),
            labels: Some(labels.map(|(name, value)| (name.to_owned(), value.to_owned())).into()),
            ..ObjectMeta::default()
        },
        spec: Some(spec(egress)),
    }
}

/// No rule for what comes in, so nothing does.
fn spec(egress: &Egress) -> NetworkPolicySpec {
    NetworkPolicySpec {
        pod_selector: Some(LabelSelector {
            match_labels: Some([(label::MANAGED_BY.to_owned(), label::MANAGER.to_owned())].into()),
            ..LabelSelector::default()
        }),
        policy_types: Some(vec!["Ingress".to_owned(), "Egress".to_owned()]),
        egress: Some(egress.0.clone()).filter(|rules| !rules.is_empty()),
        ingress: None,
    }
}

impl Network {
    fn seen(&self) -> MutexGuard<'_, HashMap<String, Seen>> {
        // Every change is whole.
        self.policies.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who may change policies may take the label off: then it is theirs.
pub fn is_ours(policy: &NetworkPolicy) -> bool {
    policy.labels().get(label::MANAGED_BY).map(String::as_str) == Some(label::MANAGER)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(ours: bool, right: bool) -> Seen {
        let uid = "uid-1".to_owned();
        Seen { uid, ours, right }
    }

    #[test]
    fn a_policy_is_made_put_right_and_removed_and_one_that_is_not_ours_is_told_of_alone() {
        for (needed, there, expected) in [
            (true, None, Step::Make),
            (true, Some(seen(true, true)), Step::Nothing),
            (true, Some(seen(true, false)), Step::PutRight),
            (true, Some(seen(false, true)), Step::TellForeign),
            (true, Some(seen(false, false)), Step::TellForeign),
            (false, None, Step::Nothing),
            (false, Some(seen(true, true)), Step::Remove),
            (false, Some(seen(true, false)), Step::Remove),
            (false, Some(seen(false, true)), Step::Nothing),
        ] {
            assert_eq!(step(needed, there.as_ref()), expected, "{needed} {there:?}");
        }
    }

    #[test]
    fn egress_rules_are_those_of_a_network_policy_and_nothing_comes_in() {
        let egress: Egress = r#"[{"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8"]}}]}]"#
            .parse()
            .unwrap();
        let spec = serde_json::to_value(spec(&egress)).unwrap();
        assert_eq!(spec["policyTypes"], serde_json::json!(["Ingress", "Egress"]));
        assert_eq!(spec.get("ingress"), None);
        assert_eq!(spec["egress"][0]["to"][0]["ipBlock"]["except"][0], "10.0.0.0/8");
        assert!("{}".parse::<Egress>().unwrap_err().contains("spec.egress"));
    }
}
