//! The API server's audit log: every write, whoever made it.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::required;

/// All complete events so far that have an answer.
pub fn events() -> Result<Vec<Value>> {
    let file = required("AUDIT_LOG")?;
    let text = fs::read_to_string(&file).with_context(|| format!("failed to read {}", file.display()))?;
    // The API server writes the file while we read it: its last line may be half there.
    let events = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(events.filter(|event| event["stage"] == "ResponseComplete").collect())
}

/// How often each Job of the namespace was created.
pub fn jobs_created(namespace: &str) -> Result<BTreeMap<String, usize>> {
    let mut counts = BTreeMap::new();
    for event in events()? {
        let object = &event["objectRef"];
        let created = event["verb"] == "create" && event["responseStatus"]["code"] == 201;
        if created && object["resource"] == "jobs" && object["namespace"] == namespace {
            let name = object["name"]
                .as_str()
                .context("the audit log names no Job: its level must be Metadata or more")?;
            *counts.entry(name.to_owned()).or_default() += 1;
        }
    }
    Ok(counts)
}
