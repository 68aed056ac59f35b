//! All sessions as lists show them, kept by the watch: a list asks nothing of the API server.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use crds::Phase;
use kube::{ResourceExt as _, api::DynamicObject};
use protocol::names::label;
use serde_json::{Value, value::RawValue};

use crate::sessions::Target;

/// Characters of a text in a list; what is longer is cut, so that 10,000 sessions have room.
pub const MAX_TEXT: usize = 256;

/// A session in a list.
#[derive(Clone, Debug)]
pub struct Entry {
    /// When it was created and its name: the order of lists, newest first.
    pub key: (String, String),
    /// Where it is.
    pub phase: Phase,
    /// The session, JSON, with its texts cut.
    pub item: Arc<RawValue>,
    /// UID of the session.
    pub uid: String,
    /// The API of another system by which it was created, see [`protocol::names::label::API`].
    pub api: Option<Box<str>>,
    /// What a search looks at, in lower case.
    search: Box<str>,
    version: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Catalog {
    projects: HashMap<String, HashMap<String, Entry>>,
}

/// What of a project's sessions is wanted.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Part of the name, the display name or the (cut) prompt.
    pub search: Option<String>,
    /// In one of these phases, or in any.
    pub phases: HashSet<Phase>,
    /// Behind this key.
    pub after: Option<(String, String)>,
}

impl Catalog {
    /// Takes a session as it is now, unless a newer one is known.
    pub fn put(&mut self, target: &Target, object: &DynamicObject) {
        let Some(entry) = entry(object) else { return };
        let project = self.projects.entry(target.namespace().to_owned()).or_default();
        match project.get(target.name()) {
            Some(known) if known.version >= entry.version => {}
            _ => {
                project.insert(target.name().to_owned(), entry);
            }
        }
    }

    /// Takes a session out, if it is (still) this one.
    pub fn remove(&mut self, target: &Target, uid: Option<&str>) {
        let Some(project) = self.projects.get_mut(target.namespace()) else {
            return;
        };
        if project
            .get(target.name())
            .is_some_and(|entry| uid.is_none_or(|uid| uid == entry.uid))
        {
            project.remove(target.name());
        }
        if project.is_empty() {
            self.projects.remove(target.namespace());
        }
    }

    /// The sessions that an API of another system created, newest first; of all projects when none is named.
    pub fn of_api(&self, project: Option<&str>, api: &str) -> Vec<Entry> {
        let projects = self.projects.iter();
        let projects = projects.filter(|(name, _)| project.is_none_or(|project| project == name.as_str()));
        let sessions = projects.flat_map(|(_, sessions)| sessions.values());
        let mut found: Vec<_> = sessions
            .filter(|entry| entry.api.as_deref() == Some(api))
            .cloned()
            .collect();
        found.sort_by(|a, b| b.key.cmp(&a.key));
        found
    }

    /// The sessions that are wanted, newest first.
    pub fn list(&self, project: &str, wanted: &Wanted) -> Vec<Entry> {
        let search = wanted.search.as_deref().map(str::to_lowercase);
        let sessions = self.projects.get(project).into_iter().flat_map(HashMap::values);
        let mut found: Vec<_> = sessions
            .filter(|entry| wanted.phases.is_empty() || wanted.phases.contains(&entry.phase))
            .filter(|entry| search.as_deref().is_none_or(|search| entry.search.contains(search)))
            .filter(|entry| wanted.after.as_ref().is_none_or(|after| entry.key < *after))
            .cloned()
            .collect();
        found.sort_by(|a, b| b.key.cmp(&a.key));
        found
    }
}

fn entry(object: &DynamicObject) -> Option<Entry> {
    let mut item = serde_json::to_value(object).ok()?;
    if let Some(metadata) = item["metadata"].as_object_mut() {
        metadata.remove("managedFields");
    }
    cut(&mut item);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_lowercase();
    let spec = &item["spec"];
    let parts = [
        &item["metadata"]["name"],
        &spec["displayName"],
        &spec["prompt"],
        &spec["initialPrompt"],
    ];
    let search = parts.map(text).join("\n").into();
    let created = item["metadata"]["creationTimestamp"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    Some(Entry {
        key: (created, object.name_any()),
        phase: serde_json::from_value(item["status"]["phase"].clone()).unwrap_or_default(),
        item: RawValue::from_string(item.to_string()).ok()?.into(),
        search,
        uid: object.uid().unwrap_or_default(),
        api: object.labels().get(label::API).map(|api| api.as_str().into()),
        version: object.resource_version().and_then(|version| version.parse().ok())?,
    })
}

/// Cuts long texts.
fn cut(value: &mut Value) {
    match value {
        Value::String(text) => {
            if let Some((end, _)) = text.char_indices().nth(MAX_TEXT) {
                text.truncate(end);
                text.push('…');
            }
        }
        Value::Array(items) => items.iter_mut().for_each(cut),
        Value::Object(members) => members.values_mut().for_each(cut),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn catalog(sessions: &[(&str, &str, &str, &str)]) -> Catalog {
        let mut catalog = Catalog::default();
        for (version, (name, created, phase, prompt)) in sessions.iter().enumerate() {
            let object = json!({
                "metadata": {"namespace": "team-a", "name": name, "uid": format!("uid-{name}"),
                    "resourceVersion": (version + 1).to_string(), "creationTimestamp": created, "managedFields": [{}]},
                "spec": {"prompt": prompt}, "status": {"phase": phase},
            });
            let target = Target::new("team-a", name).unwrap();
            catalog.put(&target, &serde_json::from_value(object).unwrap());
        }
        catalog
    }

    fn names(entries: &[Entry]) -> Vec<&str> {
        entries.iter().map(|entry| entry.key.1.as_str()).collect()
    }

    #[test]
    fn lists_are_newest_first_by_phase_and_by_part_of_name_or_prompt() {
        let catalog = catalog(&[
            ("a", "2026-01-01T00:00:01Z", "Running", "Write a Haiku"),
            ("b", "2026-01-01T00:00:03Z", "Failed", "p"),
            ("c", "2026-01-01T00:00:02Z", "Running", "p"),
        ]);
        let list = |wanted: Wanted| catalog.list("team-a", &wanted);
        assert_eq!(names(&list(Wanted::default())), ["b", "c", "a"]);
        let phases = HashSet::from([Phase::Running]);
        assert_eq!(
            names(&list(Wanted {
                phases,
                ..Wanted::default()
            })),
            ["c", "a"]
        );
        let search = |text: &str| Some(text.to_owned());
        assert_eq!(
            names(&list(Wanted {
                search: search("hAIKU"),
                ..Wanted::default()
            })),
            ["a"]
        );
        let after = Some(("2026-01-01T00:00:03Z".to_owned(), "b".to_owned()));
        assert_eq!(
            names(&list(Wanted {
                after,
                ..Wanted::default()
            })),
            ["c", "a"]
        );
        assert!(catalog.list("team-b", &Wanted::default()).is_empty());
    }

    #[test]
    fn an_older_word_of_a_session_changes_nothing_and_long_texts_are_cut() {
        let long = "ü".repeat(300);
        let catalog = catalog(&[("a", "2026-01-01T00:00:01Z", "Running", &long)]);
        let entry = &catalog.list("team-a", &Wanted::default())[0];
        let item: Value = serde_json::from_str(entry.item.get()).unwrap();
        assert_eq!(item["spec"]["prompt"].as_str().unwrap().chars().count(), MAX_TEXT + 1);
        assert_eq!(item["metadata"].get("managedFields"), None);
        let mut catalog = catalog;
        catalog.remove(&Target::new("team-a", "a").unwrap(), Some("uid-other"));
        assert_eq!(catalog.list("team-a", &Wanted::default()).len(), 1);
        catalog.remove(&Target::new("team-a", "a").unwrap(), Some("uid-a"));
        assert!(catalog.projects.is_empty());
    }
}
