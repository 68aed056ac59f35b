//! What the collector was sent.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::observation::Observation;

/// An export, accepted or not.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Export {
    /// When it came, RFC 3339.
    pub at: String,
    /// Status that it was answered with; 0 when it was left without an answer.
    pub status: u16,
    /// Value of `x-langfuse-ingestion-version`.
    pub version: Option<String>,
    /// Value of `content-encoding`.
    pub encoding: Option<String>,
    /// Size of the body as it came.
    pub bytes: usize,
    /// Spans in it, as far as it was decoded.
    pub spans: usize,
    /// Why it was refused.
    pub error: Option<String>,
}

/// Everything so far.
#[derive(Debug, Default)]
pub struct Store {
    /// Every export, oldest first.
    pub exports: Vec<Export>,
    observations: Vec<Observation>,
}

impl Store {
    /// Takes the observations of an export. The same span with the same start replaces the older one, as Langfuse's
    /// database does when it merges; with another start it becomes a second row.
    pub fn add(&mut self, observations: Vec<Observation>) {
        for new in observations {
            let key =
                |observation: &Observation| (observation.trace.clone(), observation.id.clone(), observation.start);
            match self.observations.iter_mut().find(|old| key(old) == key(&new)) {
                Some(old) => *old = new,
                None => self.observations.push(new),
            }
        }
    }

    /// Observations in order of their start.
    pub fn observations(&self, wanted: impl Fn(&Observation) -> bool) -> Vec<&Observation> {
        let mut found: Vec<_> = self
            .observations
            .iter()
            .filter(|observation| wanted(observation))
            .collect();
        found.sort_by_key(|observation| observation.start);
        found
    }

    /// Traces as `GET /api/public/traces` gives them.
    pub fn traces(&self) -> Vec<Value> {
        let mut traces: BTreeMap<&str, Vec<&Observation>> = BTreeMap::new();
        for observation in self.observations(|_| true) {
            traces.entry(&observation.trace).or_default().push(observation);
        }
        traces.into_values().map(|observations| trace(&observations)).collect()
    }
}

fn trace(observations: &[&Observation]) -> Value {
    let root = observations.iter().find(|observation| observation.parent.is_none());
    let wide = |of: fn(&Observation) -> Option<String>| observations.iter().find_map(|observation| of(observation));
    let parsed = |text: Option<&String>| {
        text.map(|text| serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.clone())))
    };
    let first = observations.first();
    json!({
        "id": first.map(|observation| &observation.trace),
        "timestamp": first.and_then(|observation| observation.start_time()),
        "name": wide(|observation| observation.of_trace.name.clone()),
        "sessionId": wide(|observation| observation.of_trace.session.clone()),
        "userId": wide(|observation| observation.of_trace.user.clone()),
        "release": wide(|observation| observation.of_trace.release.clone()),
        "environment": first.map(|observation| &observation.of_trace.environment),
        "tags": first.map(|observation| &observation.of_trace.tags),
        "metadata": first.map(|observation| &observation.of_trace.metadata),
        "input": parsed(root.and_then(|root| root.input.as_ref())),
        "output": parsed(root.and_then(|root| root.output.as_ref())),
        "observations": observations.iter().map(|observation| &observation.id).collect::<Vec<_>>(),
    })
}
