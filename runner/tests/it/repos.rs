//! A session with repositories, from its clone to its push: the real CLI, a real git server.

use std::path::Path;

use protocol::spec::Repo;
use protocol::{Kind, Outcome};
use rstest::rstest;
use runner::config::Config;
use runner::workspace::git::Repos;
use serde_json::Value;
use tests::model::Logged;

use crate::common::{Session, bash, eventually, script, text};
use crate::git::Scene;
use crate::pod::{agent_container, config, drive};

/// The session with two repositories; `one` is its working folder.
fn with_repos(scene: &Scene, session: &Session, prompt: &str) -> Config {
    let base = config(session, prompt);
    let repo = |name: &str| Repo {
        url: scene.server.url(name),
        name: name.into(),
        push: true,
        ..Repo::default()
    };
    let folder = session.state().join("git");
    std::fs::create_dir_all(&folder).unwrap();
    Config {
        repos: Repos {
            list: vec![repo("one"), repo("two")],
            workspace: session.workspace(),
            folder,
            ..scene.repos()
        },
        agent: runner::config::AgentConfig {
            workspace: session.workspace().join("one").display().to_string(),
            ..base.agent
        },
        ..base
    }
}

async fn scene() -> (Scene, Session) {
    let scene = Scene::new().await;
    for name in ["one", "two"] {
        scene.server.repository(name, &[("README.md", "hello\n")]).unwrap();
    }
    (scene, Session::new().await)
}

fn git_records(session: &Session) -> Vec<(String, bool, bool)> {
    let of = |body: &Value| {
        (
            body["name"].as_str().unwrap().to_owned(),
            body["pushed"] == true,
            body["error"].is_string(),
        )
    };
    session.bodies(Kind::Git).iter().map(of).collect()
}

#[tokio::test]
async fn an_agent_works_in_a_clone_and_what_it_changed_is_pushed() {
    let (scene, session) = scene().await;
    let prompt = script(
        "MARK",
        &[
            bash("pwd; echo more >> README.md; (setsid sleep 100 >/dev/null 2>&1 &)"),
            text("Done."),
        ],
    );
    let _container = agent_container(&session);
    assert_eq!(drive(with_repos(&scene, &session, &prompt)).await, Outcome::Succeeded);
    let pushed = scene
        .server
        .git("one", &["rev-parse", "sessions/hello-6fa459ea"])
        .unwrap();
    assert_eq!(
        scene
            .server
            .git("one", &["show", &format!("{pushed}:README.md")])
            .unwrap(),
        "hello\nmore"
    );
    let report = session.report();
    let found: Vec<_> = report
        .repos
        .iter()
        .map(|repo| (repo.index, repo.pushed, repo.branch.as_str()))
        .collect();
    assert_eq!(found, [(0, true, "sessions/hello-6fa459ea"), (1, false, "")]);
    assert_eq!(report.repos[0].commit, pushed);
    assert_eq!(
        report.repos[1].commit,
        scene.server.git("two", &["rev-parse", "main"]).unwrap()
    );
    let expected = [("one", false, false), ("two", false, false), ("one", true, false)];
    assert_eq!(
        git_records(&session),
        expected.map(|(name, pushed, error)| (name.to_owned(), pushed, error))
    );
    // Not even by name: the records are for everybody who may read the session.
    let records = format!("{:?}", session.records());
    assert!(!records.contains("fake_token_of_the_tests"));
    let left = std::fs::read_dir(session.workspace())
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name());
    assert!(
        left.into_iter()
            .all(|name| !Path::new(&name).to_string_lossy().contains("bundle"))
    );
}

/// The container dies with all that runs there, in the middle of what is done for the push.
#[tokio::test]
async fn what_a_container_that_was_lost_could_not_hand_over_is_pushed_by_the_next() {
    let (scene, session) = scene().await;
    let mut container = agent_container(&session);
    let (filter, died) = (session.state().join("dies"), session.state().join("died"));
    let shim = container.id().unwrap();
    let died_already = died.display();
    let script_of_its_own =
        format!("#!/bin/sh\n[ -e {died_already} ] || {{ touch {died_already}; kill -9 {shim}; kill -9 0; }}\ncat\n");
    std::fs::write(&filter, script_of_its_own).unwrap();
    std::fs::set_permissions(&filter, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let change = format!(
        "echo more >> README.md; mkdir -p .git/info; echo '* filter=dies' > .git/info/attributes; git config filter.dies.clean {}",
        filter.display()
    );
    let prompt = script("MARK", &[bash(&change), text("Done.")]);
    let driven = tokio::spawn(drive(with_repos(&scene, &session, &prompt)));
    eventually("the container is lost", || died.exists()).await;
    container.wait().await.unwrap();
    let _second = agent_container(&session);
    assert_eq!(
        driven.await.unwrap(),
        Outcome::Succeeded,
        "{}",
        session.report().message
    );
    let branch = "sessions/hello-6fa459ea";
    assert_eq!(
        scene
            .server
            .git("one", &["show", &format!("{branch}:README.md")])
            .unwrap(),
        "hello\nmore"
    );
    assert_eq!(session.events("agentRestarted").len(), 1);
    assert!(session.report().repos[0].pushed);
}

/// What is begun here ends by a limit, which is known before the run or comes when the tool is at work.
#[rstest]
#[case::rounds(true, r#"{"maxTurns":1}"#, Outcome::MaxTurns)]
#[case::time(false, r#"{"timeout":1}"#, Outcome::Timeout)]
#[tokio::test]
async fn what_a_limit_ended_stays_in_the_workspace_and_is_not_pushed(
    #[case] known: bool,
    #[case] limits: &str,
    #[case] outcome: Outcome,
) {
    let (scene, session) = scene().await;
    let wait = if known { "" } else { "; sleep 100" };
    let prompt = script(
        "MARK",
        &[
            bash(&format!("echo more >> README.md; touch ../began{wait}")),
            text("Done."),
        ],
    );
    let _container = agent_container(&session);
    let tell = || std::fs::write(session.state().join("limits"), limits).unwrap();
    if known {
        tell();
    }
    let driven = tokio::spawn(drive(with_repos(&scene, &session, &prompt)));
    let began = session.workspace().join("began");
    eventually("the tool has written", || began.exists()).await;
    if !known {
        tell();
    }
    assert_eq!(driven.await.unwrap(), outcome);
    let branches = scene
        .server
        .git("one", &["for-each-ref", "--format=%(refname)"])
        .unwrap();
    assert_eq!(branches, "refs/heads/main");
    assert!(session.report().repos.iter().all(|repo| !repo.pushed));
    let kept = std::fs::read_to_string(session.workspace().join("one/README.md")).unwrap();
    assert_eq!(kept, "hello\nmore\n");
}

#[tokio::test]
async fn a_run_without_anything_new_leaves_what_others_have_built_upon_the_last_one() {
    let (scene, session) = scene().await;
    let prompt = script(
        "MARK",
        &[bash("echo more >> README.md"), text("Done."), text("Nothing to do.")],
    );
    let _container = agent_container(&session);
    assert_eq!(drive(with_repos(&scene, &session, &prompt)).await, Outcome::Succeeded);
    let branch = "refs/heads/sessions/hello-6fa459ea";
    let git = |arguments: &[&str]| scene.server.git("one", arguments).unwrap();
    let ours = git(&["rev-parse", branch]);
    let theirs = git(&["commit-tree", &format!("{ours}^{{tree}}"), "-p", &ours, "-m", "theirs"]);
    git(&["update-ref", branch, &theirs]);
    let _second = agent_container(&session);
    let again = Config {
        attempt: Some(2),
        run: 2,
        ..with_repos(&scene, &session, &prompt)
    };
    assert_eq!(drive(again).await, Outcome::Succeeded, "{}", session.report().message);
    assert_eq!(git(&["rev-parse", branch]), theirs);
    let report = &session.report().repos[0];
    assert_eq!((report.pushed, &report.commit), (true, &ours));
}

#[tokio::test]
async fn a_refused_push_fails_the_session_and_the_next_attempt_pushes_without_the_agent() {
    let (scene, session) = scene().await;
    scene.server.refuse_pushes("one", "frozen until Monday").unwrap();
    let prompt = script(
        "MARK",
        &[bash("echo more >> README.md; echo x > ../two/new"), text("Done.")],
    );
    let _container = agent_container(&session);
    assert_eq!(drive(with_repos(&scene, &session, &prompt)).await, Outcome::PushRefused);
    let report = session.report();
    assert!(report.message.contains("frozen until Monday"), "{}", report.message);
    assert!(report.message.contains("the work stays"), "{}", report.message);
    assert_eq!(
        report.repos.iter().map(|repo| repo.pushed).collect::<Vec<_>>(),
        [false, true],
        "the other one is pushed"
    );
    let asked = session
        .model
        .requests()
        .iter()
        .filter(|request| request.asks_for_message())
        .count();
    std::fs::remove_file(scene.server.path("one").join("hooks/pre-receive")).unwrap();
    let _second = agent_container(&session);
    let again = Config {
        attempt: Some(2),
        ..with_repos(&scene, &session, &prompt)
    };
    assert_eq!(drive(again).await, Outcome::Succeeded);
    assert!(session.report().repos.iter().all(|repo| repo.pushed));
    let now = session
        .model
        .requests()
        .iter()
        .filter(|request| request.asks_for_message())
        .count();
    assert_eq!(now, asked, "the model is not asked again");
    assert!(
        scene
            .server
            .git("one", &["rev-parse", "sessions/hello-6fa459ea"])
            .is_ok()
    );
}

#[tokio::test]
async fn a_repository_that_cannot_be_cloned_ends_the_session_before_the_model_is_asked() {
    let (scene, session) = scene().await;
    std::fs::write(scene.secret("GITHUB_TOKEN"), "ghp_fake_wrong").unwrap();
    let prompt = script("MARK", &[text("Done.")]);
    let _container = agent_container(&session);
    assert_eq!(
        drive(with_repos(&scene, &session, &prompt)).await,
        Outcome::CloneRefused
    );
    assert!(
        session.report().message.contains("failed to clone one"),
        "{}",
        session.report().message
    );
    assert!(!session.model.requests().iter().any(Logged::asks_for_message));
    assert_eq!(git_records(&session), [("one".to_owned(), false, true)]);
}

#[tokio::test]
async fn a_volume_without_room_for_two_copies_is_said_before_the_model_is_asked() {
    const TEST: &str = "repos::a_volume_without_room_for_two_copies_is_said_before_the_model_is_asked";
    // Too little for what must be left over, though a small repository is in it twice with ease.
    let Some(small) = xtask::small_disk(TEST, "48m").unwrap() else {
        return;
    };
    let (scene, session) = scene().await;
    let prompt = script("MARK", &[text("Done.")]);
    let base = with_repos(&scene, &session, &prompt);
    for folder in ["workspace", "git"] {
        std::fs::create_dir(small.join(folder)).unwrap();
    }
    let config = Config {
        repos: Repos {
            folder: small.join("git"),
            workspace: small.join("workspace"),
            ..base.repos
        },
        ..base
    };
    let _container = agent_container(&session);
    assert_eq!(drive(config).await, Outcome::DiskFull);
    let message = session.report().message;
    assert!(
        message.contains("MiB left") && message.contains("workspace.size"),
        "{message}"
    );
    assert!(!session.model.requests().iter().any(Logged::asks_for_message));
    assert!(session.events("cliStarted").is_empty());
}
