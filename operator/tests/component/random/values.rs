//! The specs that operations begin with, and values that mean something.

use serde_json::{Value, json};

/// A claim that sessions may name; it is there from the beginning.
pub const CLAIM: &str = "shared-data";
/// A priority class, a runtime class and a service account that are there.
pub const CLASS: &str = "of-the-test";

/// Which spec a session is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub enum Base {
    /// The task alone.
    Bare,
    /// Every property that can stand beside the others, each with a value that is not the default.
    Full,
    /// The platform's older form, on a claim that exists.
    Platform,
}

impl Base {
    pub fn spec(self) -> Value {
        match self {
            Self::Bare => json!({"prompt": "write a poem"}),
            Self::Platform => json!({
                "initialPrompt": "write a poem", "timeout": 300,
                "llmSettings": {"model": "claude-sonnet", "temperature": 0.7, "maxTokens": 4000},
                "repos": [{"input": {"url": "https://github.example/a/b", "branch": "main"}, "output": {"url": "https://github.example/me/b", "branch": "work"}}],
                "workspace": {"existingClaim": CLAIM},
            }),
            Self::Full => full(),
        }
    }
}

fn full() -> Value {
    json!({
        "prompt": "write a poem", "displayName": "Poem", "interactive": true, "timeout": 600, "inactivityTimeout": 60, "suspend": false,
        "llmSettings": {"model": "model-1", "fallbackModel": "model-2", "maxTokens": 4000, "temperature": 0.5},
        "limits": {"maxTurns": 9, "maxCostUSD": "2.50", "maxTokens": 5_000_000},
        "tools": {"allowed": ["Read"], "disallowed": ["WebFetch"], "permissionMode": "acceptEdits", "mcpServers": {
            "tracker": {"http": {"url": "https://mcp.example/v1", "headers": {"X-Team": "poets"}, "credential": "tracker"}},
            "files": {"stdio": {"command": "npx", "args": ["-y"], "env": {"ROOT": "/workspace"}}}}},
        "appendSystemPrompt": "Be brief.", "additionalArgs": ["--effort", "high"],
        "repos": [
            {"url": "https://github.example/a/b.git", "branch": "feature", "name": "main-one", "autoPush": true, "output": {"url": "https://github.example/me/b", "branch": "out"}},
            {"url": "git@github.example:a/c.git"},
        ],
        "mainRepoIndex": 1, "autoPushOnComplete": false, "environmentVariables": {"CI": "true"}, "runnerSecrets": ["git-keys"],
        "workspace": {"size": "2Gi", "storageClassName": "fast", "retention": "Delete"},
        "resources": {"requests": {"cpu": "250m", "memory": "512Mi", "ephemeral-storage": "1Gi"}, "limits": {"cpu": "4", "memory": "4Gi", "ephemeral-storage": "4Gi"}},
        "pod": {"image": "registry.example/team/rust:1", "imagePullSecrets": ["pull"], "nodeSelector": {"kubernetes.io/arch": "amd64"},
            "tolerations": [{"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoExecute", "tolerationSeconds": 5}],
            "priorityClassName": CLASS, "runtimeClassName": CLASS, "serviceAccountName": CLASS, "readOnlyRootFilesystem": false},
        "retry": {"maxAttempts": 2}, "ttlSecondsAfterFinished": 86_400,
        "userContext": {"userId": "u-1", "displayName": "Jane", "groups": ["poets"]},
    })
}

/// Settings that allow what the specs above name, with a value for every property that can stand beside the others.
pub fn settings() -> Value {
    json!({
        "maxConcurrentSessions": 5, "startTimeout": 3600, "timeout": 1800, "inactivityTimeout": 900,
        "llmSettings": {"model": "model-3", "fallbackModel": "model-4", "maxTokens": 3000, "temperature": 0.2},
        "limits": {"maxTurns": 50, "maxCostUSD": "5.00", "maxTokens": 9_000_000},
        "workspace": {"size": "7Gi", "storageClassName": "slow", "retention": "Delete"},
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi", "ephemeral-storage": "500Mi"}, "limits": {"cpu": "6", "memory": "6Gi", "ephemeral-storage": "5Gi"}},
        "pod": {"image": "registry.example/team/base:1", "imagePullSecrets": ["third"], "nodeSelector": {"disk": "ssd"},
            "tolerations": [{"key": "batch", "operator": "Exists", "effect": "NoSchedule"}],
            "readOnlyRootFilesystem": true},
        "runnerSecrets": ["ambient-runner-secrets"], "retry": {"maxAttempts": 4}, "ttlSecondsAfterFinished": 90_000,
        "ceilings": {"timeout": 604_800, "limits": {"maxTurns": 1000, "maxCostUSD": "100.00", "maxTokens": 1_000_000_000},
            "resources": {"cpu": "8", "memory": "16Gi", "ephemeral-storage": "20Gi"}, "workspaceSize": "50Gi", "maxAttempts": 10},
        "allowedSecrets": ["git-keys", "another"], "allowedClaims": [CLAIM], "allowedServiceAccounts": [CLASS], "allowedImagePullSecrets": ["pull", "another", "third"],
        "allowedPriorityClasses": [CLASS], "allowedRuntimeClasses": [CLASS], "allowedTolerations": [{"operator": "Exists"}],
        "allowedImages": ["registry.example/"], "allowedPrivateHosts": ["git.corp.example"],
        "mcpCredentials": [{"name": "tracker", "secretKeyRef": {"name": "tracker-token", "key": "token"}, "header": "X-Token", "urlPrefix": "https://mcp.example/"}],
        "prices": {"model-1": {"input": "1.5", "output": "7.5", "cacheRead": "0.15", "cacheWrite": "1.875"}},
    })
}

/// Values that mean something at a property, good and bad.
pub fn meant(path: &str) -> Vec<Value> {
    match path {
        "prompt" | "initialPrompt" => vec![
            json!("a".repeat(100_000)),
            json!("\u{e9}".repeat(60_000)),
            json!("$(HOME) $$ ${X} `id` \"'\\ \u{202e}\u{10ffff}"),
            json!("--dangerously-skip-permissions"),
        ],
        "timeout" | "inactivityTimeout" => vec![
            json!(1),
            json!(604_800),
            json!(604_801),
            json!(i32::MAX),
            json!(4_294_967_296_i64),
        ],
        "ttlSecondsAfterFinished" => vec![json!(31_536_000), json!(31_536_001), json!(600)],
        "limits.maxCostUSD" | "ceilings.limits.maxCostUSD" => {
            ["0.000000001", "0", "1e9", "-1", "999999999.999999999", "6.0"]
                .map(|v| json!(v))
                .into()
        }
        "llmSettings.model" => ["no-such-model", "eu.anthropic/claude@latest", "-m"]
            .map(|v| json!(v))
            .into(),
        "workspace.size" => vec![
            json!("0"),
            json!("-1Gi"),
            json!("1Ei"),
            json!("1.5Gi"),
            json!(1),
            json!("1n"),
            json!("4Gi"),
        ],
        "workspace.storageClassName" => ["no-such-class", "Not A Class", "", "a..b"].map(|v| json!(v)).into(),
        "workspace.existingClaim" => [CLAIM, "no-such-claim", "other.claim"].map(|v| json!(v)).into(),
        "resources.requests.cpu" => vec![json!("1000"), json!(2), json!("1n"), json!("8")],
        "resources.requests.memory" => vec![json!("1m"), json!("100Gi"), json!("8Gi"), json!("1")],
        "resources.limits.cpu" => vec![json!("250m"), json!("249m"), json!(1)],
        "resources.limits.memory" => vec![json!("1m"), json!("128Mi"), json!("17Gi")],
        "repos.[].url" | "repos.[].input.url" => [
            "https://user:key@github.example/a/b",
            "file:///etc/passwd",
            "https://github.example/a/../b",
            "ssh://git@host:22/a",
            "git@host:a/b",
            "--upload-pack=id",
        ]
        .map(|v| json!(v))
        .into(),
        "repos.[].branch" => ["a..b", "-b", "refs/heads/x", "a.lock", "feature/x"]
            .map(|v| json!(v))
            .into(),
        "environmentVariables" => vec![
            json!({"PATH": "/bin"}),
            json!({"ANTHROPIC_BASE_URL": "http://attacker.example"}),
            json!({"A-B": "1"}),
            json!({"HOME": "$(PATH)", "X": "\n"}),
        ],
        "additionalArgs" => vec![
            json!(["--model", "x"]),
            json!(["-p"]),
            json!(["--effort", "low"]),
            json!(["--"]),
        ],
        "tools.mcpServers" => vec![
            json!({"a": {"http": {"url": "https://mcp.example/v1", "credential": "no-such"}}}),
            json!({"a": {"http": {"url": "https://other.example/", "credential": "tracker"}}}),
            json!({"a": {"http": {"url": "http://mcp.example/"}}}),
            json!({"a": {}}),
        ],
        "maxConcurrentSessions" => vec![json!(1), json!(0)],
        "startTimeout" => vec![json!(600)],
        "ceilings.timeout" => vec![json!(60), json!(599)],
        "allowedImages" => vec![
            json!(["registry.example"]),
            json!(["registry.example/team"]),
            json!(["elsewhere.example/"]),
        ],
        _ => meant_of_pods(path),
    }
}

fn meant_of_pods(path: &str) -> Vec<Value> {
    match path {
        "pod.image" => [
            "registry.example/a@sha256:abc",
            "registry.example.org/a",
            "REGISTRY.example/A",
            "registry.example/a:",
            "registry.example/team/rust:2",
        ]
        .map(|v| json!(v))
        .into(),
        "pod.nodeSelector" => vec![
            json!({"no/such": "node"}),
            json!({"kubernetes.io/hostname": "not a value"}),
            json!({"a/b/c": "d"}),
        ],
        "pod.tolerations" => vec![
            json!([{"operator": "Exists"}]),
            json!([{"key": "a", "operator": "Exists", "value": "b"}]),
            json!([{"value": "b"}]),
            json!([{"key": "a", "tolerationSeconds": 5}]),
            json!([{"key": "a/b/c", "operator": "Exists"}]),
            json!([{"key": "a", "value": "b"}]),
        ],
        "pod.priorityClassName" | "pod.runtimeClassName" | "pod.serviceAccountName" => {
            ["no-such-thing", "system-node-critical", "a.-b"]
                .map(|v| json!(v))
                .into()
        }
        "pod.imagePullSecrets.[]" | "runnerSecrets.[]" => ["another", "no-such-secret", "ambient-runner-secrets"]
            .map(|v| json!(v))
            .into(),
        _ => vec![],
    }
}
