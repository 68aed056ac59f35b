//! Repositories: cloned, worked on, pushed, with a credential that the agent cannot reach.

use anyhow::{Context as _, Result, ensure};
use crds::session::{ObjectName, Repo, RepoOutput};
use crds::{AgenticSessionSpec, Phase};
use serde_json::{Value, json};
use tests::model::FAKE_KEY;
use tests::model::script::prompt;

use crate::harness::command::apply;
use crate::harness::git::{Git, HOST};
use crate::harness::mock::Mock;
use crate::harness::scene::{marker, small};
use crate::harness::ssh::{self, Ssh};
use crate::harness::volume::on_volume;
use crate::harness::wait::SOON;
use crate::harness::{Keys, MODEL_URL, Scene, scene};
use crate::secrets::{found, search};

/// The fake credential for the git server.
const TOKEN: &str = "ghp_fake0e2e7c41d98a23f6b05c4d";

/// A git server, the keys for it, and the admin's word that it may be private.
async fn served<'a>(scene: &'a Scene, repository: &str) -> Result<Git<'a>> {
    served_for(scene, repository, ["GITHUB_TOKEN", "GITHUB_HOST"]).await
}

/// The same with the entries of the Secret that have these names.
async fn served_for<'a>(scene: &'a Scene, repository: &str, [token, host]: [&str; 2]) -> Result<Git<'a>> {
    // First: the operator knows of it before the server is there.
    scene.settings(&json!({ "allowedPrivateHosts": ["git"] })).await?;
    let git = Git::serve(scene, TOKEN, &[repository]).await?;
    let secret = json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": protocol::names::RUNNER_SECRETS[0] },
        "stringData": { "ANTHROPIC_API_KEY": FAKE_KEY, "ANTHROPIC_BASE_URL": MODEL_URL, token: TOKEN, host: HOST,
                        "ca.crt": git.ca } });
    apply(&scene.namespace, &secret.to_string()).await?;
    Ok(git)
}

fn session(repository: &str, branch: &str, marker: &str, steps: &Value) -> AgenticSessionSpec {
    AgenticSessionSpec {
        prompt: Some(prompt(marker, steps)),
        repos: vec![Repo {
            url: Some(format!("https://{HOST}/{repository}.git")),
            branch: Some("main".to_owned()),
            auto_push: Some(true),
            output: Some(RepoOutput {
                branch: Some(branch.to_owned()),
                ..RepoOutput::default()
            }),
            ..Repo::default()
        }],
        ..small()
    }
}

fn bash(command: &str) -> Value {
    json!({ "name": "Bash", "input": { "command": command, "description": "t" } })
}

#[tokio::test]
async fn a_repository_is_cloned_changed_and_pushed_and_its_credential_is_nowhere_near_the_agent() -> Result<()> {
    scene("repository", Keys::None, async |scene| {
        let git = served(scene, "app").await?;
        let (mock, marker) = (Mock::reach().await?, marker());
        let steps = json!([
            { "tools": [bash("pwd; cat README.md; git log -1 --format=%s; echo 'Second line.' >> README.md; git ls-remote origin || true")] },
            { "text": "Added a line.", "hold": marker },
        ]);
        let created = scene.create_with("coder", session("app", "work", &marker, &steps)).await?;
        let request = mock.request(&marker, SOON, |request| request.step == Some(1)).await?;
        let seen = request.messages().last().map(ToString::to_string).unwrap_or_default();
        ensure!(
            seen.contains("/workspace/app") && seen.contains("First line.") && seen.contains("first"),
            "the agent works in the clone: {seen}"
        );
        let pod = scene.status("coder").await?.pod_name.context("no pod in status")?;
        let runner = search(scene, &pod, "runner", &[TOKEN]).await?;
        ensure!(!found(&runner).is_empty(), "the search must find what is there: {runner}");
        let agent = search(scene, &pod, "agent", &[TOKEN]).await?;
        ensure!(found(&agent).is_empty(), "the agent's container has the credential: {agent}");
        mock.release(&marker).await?;

        let status = scene.phase("coder", Phase::Completed).await?;
        let repo = status.repos.first().context("no repository in status")?;
        ensure!(
            repo.pushed && repo.branch.as_deref() == Some("work") && repo.name == "app",
            "{repo:?}"
        );
        let log = git.within("app", "git log -1 '--format=%H|%s|%an|%cn|%(trailers:key=Agentic-Session,valueonly)' work").await?;
        let commit = repo.commit.as_deref().context("no commit in status")?;
        let uid = created.metadata.uid.context("no uid")?;
        ensure!(log.starts_with(commit), "{log}, and in status {commit}");
        ensure!(
            log.contains("|agent|agentic-operator|") && log.contains(&format!("{}/coder", scene.namespace)),
            "{log}"
        );
        let file = git.within("app", "git show work:README.md").await?;
        ensure!(file == "First line.\nSecond line.\n", "{file}");
        ensure!(
            git.within("app", "git log --format=%s main").await? == "first\n",
            "nothing else was pushed"
        );
        let script = format!("grep -r -a -l {TOKEN} /data/sessions/{uid} || echo nothing");
        let volume = on_volume(scene, "coder", &script).await?;
        ensure!(volume == "nothing\n", "the credential is on the volume: {volume}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_refused_push_fails_with_the_servers_words_and_is_tried_again_on_request() -> Result<()> {
    scene("pushed", Keys::None, async |scene| {
        let git = served(scene, "locked").await?;
        let refuse =
            "printf '#!/bin/sh\\necho \"the branch is frozen until Monday\" >&2\\nexit 1\\n' > hooks/pre-receive";
        git.within(
            "locked",
            &format!("mkdir -p hooks && {refuse} && chmod +x hooks/pre-receive"),
        )
        .await?;
        let (mock, marker) = (Mock::reach().await?, marker());
        let steps = json!([{ "tools": [bash("echo work > work.txt")] }, { "text": "Written." }, { "text": "Again." }]);
        scene
            .create_with("stubborn", session("locked", "work", &marker, &steps))
            .await?;
        let status = scene.phase("stubborn", Phase::Failed).await?;
        ensure!(status.reason.as_deref() == Some("PushFailed"), "{status:#?}");
        ensure!(
            status
                .message
                .as_deref()
                .unwrap_or_default()
                .contains("the branch is frozen until Monday"),
            "{:?}",
            status.message
        );
        ensure!(
            !status.repos.first().context("no repository in status")?.pushed,
            "{status:#?}"
        );
        let kept = on_volume(scene, "stubborn", "cat /data/sessions/*/workspace/locked/work.txt").await?;
        ensure!(kept == "work\n", "the work stays: {kept}");

        git.within("locked", "rm hooks/pre-receive").await?;
        scene.start_again("stubborn").await?;
        let status = scene.phase_of_run("stubborn", 2, Phase::Completed).await?;
        ensure!(
            status.repos.first().context("no repository in status")?.pushed,
            "{status:#?}"
        );
        ensure!(git.within("locked", "git show work:work.txt").await? == "work\n");
        mock.prompt_was_given_once(&marker).await?;
        ensure!(git.asked().await?.contains(" with a token"));
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_repository_of_gitlab_is_cloned_and_pushed_with_its_token() -> Result<()> {
    scene("gitlab", Keys::None, async |scene| {
        let git = served_for(scene, "app", ["GITLAB_TOKEN", "GITLAB_HOST"]).await?;
        let (mock, marker) = (Mock::reach().await?, marker());
        let steps = json!([
            { "tools": [bash("env; git config --list; git ls-remote origin 2>&1; echo work > work.txt")] },
            { "text": "Written.", "hold": marker },
        ]);
        scene
            .create_with("labourer", session("app", "work", &marker, &steps))
            .await?;
        mock.request(&marker, SOON, |request| request.step == Some(1)).await?;
        let pod = scene.status("labourer").await?.pod_name.context("no pod in status")?;
        let agent = search(scene, &pod, "agent", &[TOKEN]).await?;
        ensure!(
            found(&agent).is_empty(),
            "the agent's container has the credential: {agent}"
        );
        mock.release(&marker).await?;
        let status = scene.phase("labourer", Phase::Completed).await?;
        ensure!(status.repos.first().is_some_and(|repo| repo.pushed), "{status:#?}");
        ensure!(git.within("app", "git show work:work.txt").await? == "work\n");
        ensure!(git.asked().await?.contains(" with a token"));
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_repository_over_ssh_is_cloned_and_pushed_with_the_key_of_a_secret() -> Result<()> {
    scene("ssh", Keys::Good, async |scene| {
        const SECRET: &str = "deploy-key";
        scene
            .settings(&json!({ "allowedPrivateHosts": [ssh::HOST], "allowedSecrets": [SECRET] }))
            .await?;
        let server = Ssh::serve(scene).await?;
        let secret = json!({ "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/ssh-auth",
            "metadata": { "name": SECRET },
            "stringData": { "ssh-privatekey": server.key, "known_hosts": server.known_host } });
        apply(&scene.namespace, &secret.to_string()).await?;
        let line = server.key.lines().nth(1).context("a key of one line")?;
        let (mock, marker) = (Mock::reach().await?, marker());
        let steps = json!([
            { "tools": [bash("env; cat ~/.ssh/* 2>&1; git ls-remote origin 2>&1; cat README.md; echo work > work.txt")] },
            { "text": "Written.", "hold": marker },
        ]);
        let mut spec = session("app", "work", &marker, &steps);
        spec.repos[0].url = Some(Ssh::url());
        let names = [protocol::names::RUNNER_SECRETS[0], SECRET];
        spec.runner_secrets = Some(names.map(|name| ObjectName(name.to_owned())).to_vec());
        scene.create_with("smith", spec).await?;
        let request = mock.request(&marker, SOON, |request| request.step == Some(1)).await?;
        let seen = request.messages().last().map(ToString::to_string).unwrap_or_default();
        ensure!(
            seen.contains("First line.") && !seen.contains("refs/heads/main"),
            "the agent has the clone, and no way to the server: {seen}"
        );
        let pod = scene.status("smith").await?.pod_name.context("no pod in status")?;
        let runner = search(scene, &pod, "runner", &[line]).await?;
        ensure!(!found(&runner).is_empty(), "the search must find what is there: {runner}");
        let agent = search(scene, &pod, "agent", &[line]).await?;
        ensure!(found(&agent).is_empty(), "the agent's container has the key: {agent}");
        mock.release(&marker).await?;
        let status = scene.phase("smith", Phase::Completed).await?;
        ensure!(status.repos.first().is_some_and(|repo| repo.pushed), "{status:#?}");
        ensure!(server.within("git show work:work.txt").await? == "work\n");
        ensure!(server.log().await?.contains("Accepted publickey for agent"));
        Ok(())
    })
    .await
}
