//! The repositories of a session: cloned before its first turn, saved and pushed at a normal end.

use protocol::record::{GitBody, LogLevel};
use protocol::report::RepoReport;
use protocol::{Kind, Outcome, spec::Repo};
use tokio::time::{Duration, timeout};

use super::ladder::KILLED;
use super::{Attempt, End};
use crate::agent::{Agent, FromShim, Spawn, ToShim};
use crate::config::Config;
use crate::workspace::git::{GitError, bundle, clone, push, save};

/// How long commit and bundle of one repository may take.
const SAVING: Duration = Duration::from_mins(5);
/// How long the push of one repository may take.
const PUSHING: Duration = Duration::from_mins(10);
/// How much of what the agent container says is kept.
const MAX_SAID: usize = 4_096;

impl Attempt {
    /// Clones what is not in the workspace yet.
    pub(super) async fn clone_repos(&mut self, config: &Config) -> Result<(), End> {
        for (index, repo) in config.repos.list.iter().enumerate() {
            let cloned = self.meanwhile(true, clone::clone(&config.repos, repo)).await?;
            let cloned = match cloned {
                Ok(cloned) => cloned,
                Err(error) => return Err(self.not_cloned(repo, &error)),
            };
            self.repos.push(RepoReport {
                index,
                commit: cloned.pushed.clone().unwrap_or_else(|| cloned.placed.commit.clone()),
                branch: branch(config, repo, cloned.pushed.is_some()),
                pushed: cloned.pushed.is_some(),
            });
            if cloned.before {
                continue;
            }
            let body = GitBody {
                name: repo.name.clone(),
                url: cloned.url,
                branch: cloned.placed.branch,
                commit: cloned.placed.commit,
                pushed: false,
                error: None,
            };
            self.journal.record(Kind::Git, &body)?;
            for note in cloned.notes {
                self.journal.log(LogLevel::Warning, note)?;
            }
        }
        Ok(())
    }

    fn not_cloned(&mut self, repo: &Repo, error: &GitError) -> End {
        let body = GitBody {
            name: repo.name.clone(),
            url: crate::workspace::git::remote::Remote::parse(&repo.url)
                .map_or_else(|_| String::new(), |remote| remote.url),
            branch: repo.branch.clone().unwrap_or_default(),
            error: Some(error.to_string()),
            ..GitBody::default()
        };
        if let Err(error) = self.journal.record(Kind::Git, &body) {
            return error.into();
        }
        End::new(error.clone_outcome(), error.to_string())
    }

    /// After a normal end: pushes what is asked for. A repository that cannot be pushed does not keep the next from it.
    pub(super) async fn push_repos(&mut self, config: &Config, end: End) -> End {
        let normal = matches!(
            end.outcome,
            Outcome::Succeeded | Outcome::Inactive | Outcome::EndedByRequest
        );
        let any = config.repos.list.iter().any(|repo| repo.push);
        if !normal || !any {
            return end;
        }
        match Box::pin(self.push_all(config)).await {
            Ok(None) => end,
            Ok(Some(failed)) | Err(failed) => failed,
        }
    }

    async fn push_all(&mut self, config: &Config) -> Result<Option<End>, End> {
        if self.agent.is_none() {
            self.open_agent(config).await?;
        }
        let mut failed = None;
        for (index, repo) in config.repos.list.iter().enumerate().filter(|(_, repo)| repo.push) {
            let before = self.repos.iter().find(|report| report.index == index && report.pushed);
            let before = before.map(|report| report.commit.clone());
            let pushed = Box::pin(self.push_one(config, repo, before.as_deref())).await?;
            let target = push::target(&config.repos, repo);
            let (url, target_branch) =
                target.map_or_else(|_| (String::new(), String::new()), |target| (target.url, target.branch));
            let mut body = GitBody {
                name: repo.name.clone(),
                url,
                branch: target_branch,
                ..GitBody::default()
            };
            match pushed {
                // Nothing that was not there before.
                Ok(None) => continue,
                Ok(Some(commit)) => {
                    body.commit.clone_from(&commit);
                    body.pushed = true;
                    if let Some(report) = self.repos.iter_mut().find(|report| report.index == index) {
                        report.commit = commit;
                        report.pushed = true;
                        report.branch = branch(config, repo, true);
                    }
                }
                Err(error) => {
                    let said = error.to_string();
                    failed.get_or_insert_with(|| {
                        let message = format!("{said}; the work stays in the session's workspace");
                        End::new(error.push_outcome(), message)
                    });
                    body.error = Some(said);
                }
            }
            self.journal.record(Kind::Git, &body)?;
        }
        Ok(failed)
    }

    /// Gives the commit that was pushed, when there was something to push.
    async fn push_one(
        &mut self,
        config: &Config,
        repo: &Repo,
        before: Option<&str>,
    ) -> Result<Result<Option<String>, GitError>, End> {
        let name = bundle::new_name(&config.repos);
        let mut again = false;
        let said = loop {
            bundle::remove_leftovers(&config.repos);
            let spawn = match save::spawn(&config.repos, repo, &config.agent.mount, &name, before, again) {
                Ok(spawn) => spawn,
                Err(error) => return Ok(Err(error)),
            };
            match self.run_in_agent(spawn).await? {
                Ok(said) => break said,
                Err(Lost { why, said }) => {
                    again |= said.starts_with(save::FIT);
                    self.agent_lost(false, &why).await?;
                    if self.agent.is_none() {
                        self.open_agent(config).await?;
                    }
                }
            }
        };
        match save::saved(&repo.name, &said) {
            Ok(save::Saved::Bundle) => {}
            Ok(save::Saved::Same) => return Ok(Ok(None)),
            Err(error) => return Ok(Err(error)),
        }
        let work = async {
            crate::kill_point::pass("bundled");
            let taken = bundle::take(&config.repos, repo, &name).await;
            crate::kill_point::pass("taken");
            bundle::remove(&config.repos, &name);
            let commit = taken?;
            match timeout(PUSHING, push::push(&config.repos, repo, &commit)).await {
                Ok(pushed) => pushed.map(|()| Some(commit)),
                Err(_) => Err(GitError::Git {
                    action: format!("push {}", repo.name),
                    said: format!("Operation timed out after {} s", PUSHING.as_secs()),
                }),
            }
        };
        self.meanwhile(false, work).await
    }

    /// Runs a process in the agent container, alone there; gives what it wrote to stdout.
    pub(super) async fn run_in_agent(&mut self, spawn: Spawn) -> Result<Result<String, Lost>, End> {
        let Some(mut agent) = self.agent.take() else {
            return Ok(Ok(String::new()));
        };
        let said = self.meanwhile(false, timeout(SAVING, run(&mut agent, spawn))).await;
        self.agent = Some(agent);
        Ok(said?.unwrap_or_else(|_| Ok("unfit it could not be committed in time".to_owned())))
    }
}

/// What the report says of a branch: it is named where the spec does not name it.
fn branch(config: &Config, repo: &Repo, pushed: bool) -> String {
    push::target(&config.repos, repo)
        .ok()
        .filter(|target| pushed && target.own)
        .map(|target| target.branch)
        .unwrap_or_default()
}

/// The agent container was lost while a process ran there.
pub(super) struct Lost {
    why: String,
    /// What the process had written to stdout.
    said: String,
}

async fn run(agent: &mut Agent, spawn: Spawn) -> Result<String, Lost> {
    let mut said = Vec::new();
    let lost = |why: String, said: &[u8]| {
        let said = String::from_utf8_lossy(said).into_owned();
        Err(Lost { why, said })
    };
    // What the agent left running would go on to change what is committed.
    if !agent.clear(KILLED).await {
        return lost("it does not answer".to_owned(), &said);
    }
    if let Err(error) = agent.send(&ToShim::Spawn(spawn)) {
        return lost(error.to_string(), &said);
    }
    loop {
        match agent.next().await {
            Ok(FromShim::Stdout(bytes)) => {
                let room = MAX_SAID.saturating_sub(said.len());
                said.extend_from_slice(&bytes[..bytes.len().min(room)]);
            }
            Ok(FromShim::Exit(_)) => return Ok(String::from_utf8_lossy(&said).into_owned()),
            Ok(FromShim::SpawnFailed(why)) => return Ok(format!("unfit {why}")),
            Ok(_) => {}
            Err(error) => return lost(error.to_string(), &said),
        }
    }
}
