//! The body of a submission → the session or the message that it asks for.

use std::collections::BTreeMap;

use crds::{
    AgenticSession, AgenticSessionSpec,
    session::{self, LlmSettings, PermissionMode, ToolRule, Tools},
};
use kube::core::ObjectMeta;
use protocol::names::{annotation, api, label};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::super::{ApiError, compat::Who, create::user};
use crate::{commands::is_id, compat::Settings};

/// Longest prompt, bytes.
const MAX_PROMPT: usize = 100_000;
/// Longest workspace, bytes.
const MAX_WORKSPACE: usize = 1024;
/// Seconds of a task in a workspace's session that names no timeout.
const DEFAULT_TIMEOUT: u32 = 3600;
/// Longest timeout, seconds.
const MAX_TIMEOUT: u32 = 604_800;

/// A task.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewTask {
    /// Its id, 1 to 128 letters, digits and `-_.:`; chosen when absent.
    pub task_id: Option<String>,
    /// What the agent is told, at most 100,000 bytes.
    #[schemars(length(min = 1, max = 100_000))]
    pub prompt: String,
    /// Names the session that tasks with `session.reuse_existing` share. It is no path on a disk: a session's files are its own.
    #[schemars(length(max = 1024))]
    pub workspace: Option<String>,
    /// How the agent works.
    #[serde(default)]
    pub options: Option<NewOptions>,
    /// In which session.
    #[serde(default)]
    pub session: Option<NewSession>,
}

/// How the agent works.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewOptions {
    /// Tools that run; what the permission mode would ask for beside them is denied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allowed_tools: Option<Vec<String>>,
    /// `acceptEdits`, `bypassPermissions`, `default`, `dontAsk` or `plan`. When absent: `default` with `allowed_tools`, else
    /// `bypassPermissions`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub permission_mode: Option<PermissionMode>,
    /// Responses of the model at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_turns: Option<u32>,
    /// Seconds at most; 3600 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 604_800))]
    pub timeout: Option<u32>,
}

/// In which session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewSession {
    /// `true`: in that of the workspace, which is created when there is none; `false` or absent: in one of its own.
    #[serde(default)]
    pub reuse_existing: bool,
}

/// What a task in a workspace's session may use up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Responses of the model.
    pub max_turns: u32,
    /// Seconds.
    pub timeout: u32,
}

/// A task that can be honoured.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub id: String,
    pub prompt: String,
    pub workspace: String,
    pub options: NewOptions,
    pub reuse: bool,
    settings: Settings,
}

/// What a task asked for, as it is kept: an equal one is the same task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    prompt_sha256: String,
    workspace: String,
    options: NewOptions,
    reuse_existing: bool,
    /// What it may use up.
    pub limits: Limits,
}

impl Kept {
    /// The workspace that it named.
    pub fn workspace(&self) -> &str {
        &self.workspace
    }
}

impl NewTask {
    pub(super) fn checked(self, settings: &Settings) -> Result<Asked, ApiError> {
        let Self {
            task_id,
            prompt,
            workspace,
            options,
            session,
        } = self;
        let id = task_id.filter(|id| !id.is_empty());
        let id = id.unwrap_or_else(|| format!("task-{}", uuid::Uuid::new_v4()));
        if !is_id(&id) {
            return Err(ApiError::unprocessable(format!(
                "task_id {id:?} cannot be a task's: use 1 to 128 letters, digits and `-_.:`, not `prompt`"
            )));
        }
        if prompt.is_empty() || prompt.len() > MAX_PROMPT || prompt.contains('\0') {
            return Err(ApiError::unprocessable(format!(
                "prompt must have 1 to {MAX_PROMPT} bytes and no NUL character"
            )));
        }
        let workspace = workspace.unwrap_or_default();
        if workspace.len() > MAX_WORKSPACE || workspace.contains(char::is_control) {
            return Err(ApiError::unprocessable(format!(
                "workspace must have at most {MAX_WORKSPACE} bytes and no control characters"
            )));
        }
        let reuse = session.unwrap_or_default().reuse_existing;
        if reuse && workspace.is_empty() {
            return Err(ApiError::unprocessable(
                "session.reuse_existing needs workspace, which names the session to be reused",
            ));
        }
        let options = options.unwrap_or_default();
        let within = |name: &str, value: Option<u32>, most: u32| match value {
            Some(value) if !(1..=most).contains(&value) => {
                Err(ApiError::unprocessable(format!("options.{name} must be 1 to {most}")))
            }
            _ => Ok(()),
        };
        within("max_turns", options.max_turns, 1_000_000)?;
        within("timeout", options.timeout, MAX_TIMEOUT)?;
        Ok(Asked {
            id,
            prompt,
            workspace,
            options,
            reuse,
            settings: settings.clone(),
        })
    }
}

impl Asked {
    pub(super) fn kept(&self) -> Kept {
        Kept {
            prompt_sha256: hex::encode(Sha256::digest(&self.prompt)),
            workspace: self.workspace.clone(),
            options: self.options.clone(),
            reuse_existing: self.reuse,
            limits: Limits {
                max_turns: self.options.max_turns.unwrap_or(self.settings.max_turns),
                timeout: self.options.timeout.unwrap_or(DEFAULT_TIMEOUT),
            },
        }
    }

    /// What the agent may use.
    pub(super) fn tools(&self) -> Option<Tools> {
        let NewOptions {
            allowed_tools,
            permission_mode,
            ..
        } = &self.options;
        let allowed: Vec<_> = allowed_tools.iter().flatten().cloned().map(ToolRule).collect();
        let mode = permission_mode.or_else(|| (!allowed.is_empty()).then_some(PermissionMode::Default));
        mode.map(|mode| Tools {
            allowed,
            permission_mode: Some(mode),
            ..Tools::default()
        })
    }

    /// The session in which it is the first task, without a name.
    pub(super) fn session(&self, who: &Who) -> AgenticSession {
        let settings = &self.settings;
        let kept = self.kept();
        let limits = session::Limits {
            max_turns: Some(kept.limits.max_turns),
            ..session::Limits::default()
        };
        let spec = AgenticSessionSpec {
            prompt: Some(self.prompt.clone()),
            display_name: Some(format!("Task {}", self.id)),
            interactive: Some(self.reuse),
            // The limits of tasks that share a session are watched by the gateway: the session's own would end it.
            timeout: if self.reuse {
                Some(settings.session_seconds)
            } else {
                self.options.timeout
            },
            limits: (!self.reuse).then_some(limits),
            inactivity_timeout: self.reuse.then_some(settings.idle_seconds),
            llm_settings: settings.model.clone().map(|model| LlmSettings {
                model: Some(model),
                ..LlmSettings::default()
            }),
            tools: self.tools(),
            user_context: Some(user(&who.caller.identity)),
            ..AgenticSessionSpec::default()
        };
        let mut labels = BTreeMap::from([(label::API.to_owned(), api::TASKS.to_owned())]);
        if self.reuse {
            labels.insert(label::WORKSPACE.to_owned(), workspace_key(&who.owner, &self.workspace));
        }
        let annotations = [
            (annotation::TASK_ID, self.id.clone()),
            (annotation::TASK_OWNER, who.owner.clone()),
            (annotation::TASK_WORKSPACE, self.workspace.clone()),
            (annotation::TASK_ASKED, json!(kept).to_string()),
        ];
        let annotations = annotations.map(|(name, value)| (name.to_owned(), value));
        AgenticSession {
            metadata: ObjectMeta {
                labels: Some(labels),
                annotations: Some(annotations.into()),
                ..ObjectMeta::default()
            },
            spec,
            status: None,
        }
    }
}

/// Name of the session that a task creates.
pub(super) fn session_name(owner: &str, id: &str) -> String {
    format!("task-{}", &digest(owner, id)[..24])
}

/// Value of the label of a workspace's session.
pub(super) fn workspace_key(owner: &str, workspace: &str) -> String {
    digest(owner, workspace)[..40].to_owned()
}

fn digest(owner: &str, text: &str) -> String {
    // An owner has no NUL, so that no two pairs are the same text.
    hex::encode(Sha256::digest(format!("{owner}\0{text}")))
}
