//! Repositories, in one shape and each with a folder of its own.

use std::collections::BTreeSet;

use crds::{
    AgenticSessionSpec,
    session::{MAX_REPOS, RepoStatus},
};
use protocol::{
    report::RepoReport,
    spec::{Repo, RepoOutput},
};

/// The repositories of a session.
pub fn repos(spec: &AgenticSessionSpec) -> Vec<Repo> {
    let push_all = spec.auto_push_on_complete.unwrap_or_default();
    // Names that are given come first: none of them gives way to one that is made here.
    let mut taken: BTreeSet<String> = spec.repos.iter().filter_map(|repo| repo.name.clone()).collect();
    let mut repos = Vec::new();
    for asked in &spec.repos {
        let (url, branch) = match &asked.input {
            Some(input) => (input.url.clone(), input.branch.clone()),
            None => (asked.url.clone().unwrap_or_default(), asked.branch.clone()),
        };
        let name = asked.name.clone().unwrap_or_else(|| {
            let base = folder(&url);
            let name = std::iter::once(base.clone())
                .chain((2..=MAX_REPOS + 1).map(|n| format!("{base}-{n}")))
                .find(|name| !taken.contains(name))
                .unwrap_or(base);
            taken.insert(name.clone());
            name
        });
        repos.push(Repo {
            url,
            branch,
            name,
            output: asked.output.as_ref().map(|output| RepoOutput {
                url: output.url.clone(),
                branch: output.branch.clone(),
            }),
            push: push_all || asked.auto_push.unwrap_or_default(),
        });
    }
    repos
}

/// What became of the repositories. A report that says nothing of one leaves what is known of it.
pub fn record(status: &mut Vec<RepoStatus>, repos: &[Repo], reports: &[RepoReport]) {
    if reports.is_empty() {
        return;
    }
    let known = std::mem::take(status);
    for (index, repo) in repos.iter().enumerate() {
        let before = known.iter().find(|known| known.name == repo.name).cloned();
        status.push(match reports.iter().find(|report| report.index == index) {
            Some(report) => said(repo, report),
            None => before.unwrap_or_else(|| RepoStatus {
                name: repo.name.clone(),
                url: repo.url.clone(),
                branch: repo.branch.clone(),
                ..RepoStatus::default()
            }),
        });
    }
}

fn said(repo: &Repo, report: &RepoReport) -> RepoStatus {
    let output = repo.output.clone().filter(|_| report.pushed).unwrap_or_default();
    let own = Some(report.branch.clone()).filter(|branch| !branch.is_empty() && report.pushed);
    RepoStatus {
        name: repo.name.clone(),
        url: output.url.unwrap_or_else(|| repo.url.clone()),
        branch: own.or(output.branch).or(repo.branch.clone()),
        commit: Some(report.commit.clone()).filter(|commit| !commit.is_empty()),
        pushed: report.pushed,
    }
}

/// `https://host/team/tool.git` → `tool`, in the letters that a folder's name may have.
fn folder(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or(url).trim_end_matches('/');
    let last = url.rsplit(['/', ':']).next().unwrap_or(url);
    let last = last.strip_suffix(".git").unwrap_or(last);
    let name: String = last
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') {
                c
            } else {
                '_'
            }
        })
        .skip_while(|c| matches!(c, '.' | '-'))
        .take(60)
        .collect();
    if name.is_empty() { "repo".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    #[rstest]
    #[case("https://git.example/team/tool.git", "tool")]
    #[case("git@git.example:tool", "tool")]
    #[case("https://git.example/team/tool/", "tool")]
    #[case("https://git.example/..", "repo")]
    #[case("https://git.example/.git", "repo")]
    #[case("https://git.example/-x%20y", "x_20y")]
    fn a_folder_is_named_after_the_repository(#[case] url: &str, #[case] expected: &str) {
        assert_eq!(folder(url), expected);
    }

    #[rstest]
    #[case::flat(json!({"url": "https://g.example/a", "branch": "b", "autoPush": true}), json!({"url": "https://g.example/a", "branch": "b", "name": "a", "push": true}))]
    #[case::platform(json!({"input": {"url": "https://g.example/a", "branch": "main"}, "output": {"url": "https://g.example/f", "branch": "w"}}), json!({"url": "https://g.example/a", "branch": "main", "name": "a", "output": {"url": "https://g.example/f", "branch": "w"}, "push": false}))]
    fn both_shapes_are_one(#[case] asked: Value, #[case] expected: Value) {
        let spec = serde_json::from_value(json!({"prompt": "p", "repos": [asked]})).unwrap();
        assert_eq!(serde_json::to_value(&repos(&spec)[0]).unwrap(), expected);
    }

    #[test]
    fn what_became_of_a_repository_is_said_with_where_it_went() {
        let spec = serde_json::from_value(json!({"prompt": "p", "repos": [
            {"url": "https://g.example/a", "branch": "main", "output": {"url": "https://g.example/fork"}},
            {"url": "https://g.example/b"},
        ]}))
        .unwrap();
        let repos = repos(&spec);
        let report = |index, branch: &str, commit: &str, pushed| RepoReport {
            index,
            branch: branch.into(),
            commit: commit.into(),
            pushed,
        };
        let mut status = Vec::new();
        record(
            &mut status,
            &repos,
            &[report(0, "", "c0", false), report(1, "", "c1", false)],
        );
        assert_eq!(
            (&*status[0].url, status[0].branch.as_deref()),
            ("https://g.example/a", Some("main"))
        );
        record(&mut status, &repos, &[report(0, "sessions/poem-12345678", "c2", true)]);
        assert_eq!(
            serde_json::to_value(&status).unwrap(),
            json!([
                {"name": "a", "url": "https://g.example/fork", "branch": "sessions/poem-12345678", "commit": "c2", "pushed": true},
                {"name": "b", "url": "https://g.example/b", "commit": "c1", "pushed": false},
            ])
        );
        record(&mut status, &repos, &[]);
        assert_eq!(status.len(), 2);
    }

    #[test]
    fn no_two_have_one_folder_and_all_are_pushed_when_that_is_asked_for() {
        let spec = serde_json::from_value(json!({"prompt": "p", "autoPushOnComplete": true, "repos": [
            {"url": "https://g.example/one/tool"}, {"url": "https://g.example/two/tool"}, {"url": "https://g.example/x", "name": "tool"},
        ]}))
        .unwrap();
        let repos = repos(&spec);
        let names: Vec<_> = repos.iter().map(|repo| &*repo.name).collect();
        assert_eq!(names, ["tool-2", "tool-3", "tool"]);
        assert!(repos.iter().all(|repo| repo.push));
    }
}
