//! What a cluster must have: a version with native sidecars, and our CRDs.

use std::time::Duration;

use k8s_openapi::{
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition, apimachinery::pkg::version::Info,
};
use kube::{Api, Client, ResourceExt as _};
use tokio::sync::watch;

/// Native sidecars, on which a session's pod rests, are on from here.
const OLDEST: (u32, u32) = (1, 29);
const WHILE_WAITING: Duration = Duration::from_secs(2);
const WHEN_READY: Duration = Duration::from_mins(1);

/// A cluster that sessions cannot run on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server does not say its version.
    #[error("failed to ask the API server for its version")]
    Unreachable(#[source] kube::Error),
    /// It is too old, or its version cannot be read.
    #[error("failed to find Kubernetes {}.{} or newer: the API server is {found}; upgrade the cluster", OLDEST.0, OLDEST.1)]
    TooOld {
        /// The version that it says.
        found: String,
    },
}

/// Refuses clusters that are too old.
pub async fn version(client: &Client) -> Result<(), Error> {
    let info = client.apiserver_version().await.map_err(Error::Unreachable)?;
    if is_new_enough(&info) {
        Ok(())
    } else {
        Err(Error::TooOld {
            found: info.git_version,
        })
    }
}

/// Providers write minors such as `29+`.
fn is_new_enough(info: &Info) -> bool {
    let number = |text: &str| text.trim_end_matches(|c: char| !c.is_ascii_digit()).parse::<u32>().ok();
    match (number(&info.major), number(&info.minor)) {
        (Some(major), Some(minor)) => (major, minor) >= OLDEST,
        _ => false,
    }
}

/// Tells `waiting_for` what is missing, for as long as somebody listens.
pub async fn watch_crds(client: Client, waiting_for: watch::Sender<Option<String>>) {
    let installed: Api<CustomResourceDefinition> = Api::all(client);
    let expected = crds::crds();
    loop {
        let known = waiting_for.borrow().is_none();
        let mut missing = None;
        for crd in &expected {
            if missing.is_none() {
                missing = missing_of(&installed, crd, known).await;
            }
        }
        let wait = if missing.is_some() { WHILE_WAITING } else { WHEN_READY };
        waiting_for.send_if_modified(|before| {
            let changed = *before != missing;
            if changed {
                tracing::info!(waiting_for = missing, "readiness");
                *before = missing;
            }
            changed
        });
        tokio::select! {
            () = waiting_for.closed() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

async fn missing_of(
    installed: &Api<CustomResourceDefinition>,
    expected: &CustomResourceDefinition,
    known: bool,
) -> Option<String> {
    match installed.get_opt(&expected.name_any()).await {
        Ok(crd) => what_is_missing(crd.as_ref(), expected),
        // One that cannot be asked now was there before: it is not unlearnt.
        Err(_) if known => None,
        Err(error) => Some(format!("failed to read the CRD {}: {error}", expected.name_any())),
    }
}

fn what_is_missing(crd: Option<&CustomResourceDefinition>, expected: &CustomResourceDefinition) -> Option<String> {
    let name = expected.name_any();
    let Some(crd) = crd else {
        return Some(format!(
            "the CRD {name} is not installed: install the one of this release"
        ));
    };
    let established = crd.status.iter().flat_map(|s| s.conditions.iter().flatten());
    if !established
        .into_iter()
        .any(|c| c.type_ == "Established" && c.status == "True")
    {
        return Some(format!("the CRD {name} is not established yet"));
    }
    let (installed, expected) = (crds::schema_digest(crd), crds::schema_digest(expected));
    (installed != expected).then(|| {
        format!(
            "the CRD {name} is of another release (schema {}, expected {}): install the one of this release",
            installed.unwrap_or("unknown"),
            expected.unwrap_or("unknown"),
        )
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("1", "28", false)]
    #[case("1", "29", true)]
    #[case("1", "29+", true)]
    #[case("1", "101", true)]
    #[case("2", "0", true)]
    #[case("", "", false)]
    fn sidecars_need_1_29(#[case] major: &str, #[case] minor: &str, #[case] expected: bool) {
        let info = Info {
            major: major.into(),
            minor: minor.into(),
            ..Info::default()
        };
        assert_eq!(is_new_enough(&info), expected);
    }

    #[test]
    fn a_crd_of_another_release_is_not_ours() {
        let established = serde_json::json!({"conditions": [{"type": "Established", "status": "True"}], "acceptedNames": {"kind": "AgenticSession", "plural": "agenticsessions"}});
        let mut crd = crds::session_crd();
        let expected = crd.clone();
        assert!(what_is_missing(None, &expected).unwrap().contains("not installed"));
        assert!(what_is_missing(Some(&crd), &expected).unwrap().contains("established"));
        crd.status = serde_json::from_value(established).unwrap();
        assert_eq!(what_is_missing(Some(&crd), &expected), None);
        let mut other = crd.clone();
        other.metadata.annotations = None;
        assert!(
            what_is_missing(Some(&other), &expected)
                .unwrap()
                .contains("another release")
        );
    }
}
