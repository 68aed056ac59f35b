//! No secret is within the agent's reach, while the agent works.

use anyhow::{Context as _, Result, ensure};
use crds::Phase;
use serde_json::json;
use tests::traces::FAKE_SECRET_KEY;

use crate::harness::command::kubectl_with;
use crate::harness::mock::Mock;
use crate::harness::scene::marker;
use crate::harness::volume::on_volume;
use crate::harness::wait::SOON;
use crate::harness::{Keys, Scene, scene};

/// A key that is nowhere else; the mock accepts it, see `tests/deploy/tools.yaml`.
const CANARY: &str = "sk-ant-fake-canary-5b0f2c6d9e7a4f318c24";
/// One of no known form and of no known name, in the other Secret that runners get.
const OTHER_CANARY: &str = "Zq7.fake+canary+of+another+tool.81f4";

/// Looks everywhere that a shell can look. Each `$P` is a regular expression that does not match itself.
const SEARCH: &str = r#"
search() { grep -a -l -s -E "$P" "$@" | sed 's/^/found in /'; }
env | grep -q -E "$P" && echo "found in the shell's environment"
search /proc/[0-9]*/environ /proc/[0-9]*/cmdline /proc/[0-9]*/mountinfo
for fd in /proc/[0-9]*/fd/*; do
  target=$(readlink "$fd")
  case "$target" in /dev/*|pipe:*|socket:*|anon_inode:*|/proc/*) ;; *) [ -f "$fd" ] && search "$fd" ;; esac
done
for place in /*; do
  case "$place" in /proc|/sys|/dev) ;; *) grep -r -a -l -s -E "$P" "$place" | sed 's/^/found in /' ;; esac
done
search /dev/termination-log; grep -r -a -l -s -E "$P" /dev/shm | sed 's/^/found in /'
while read -r _ _ _ _ point _; do
  case "$point" in *secret*|*serviceaccount*|/data|/data/*) echo "found mount $point" ;; esac
done < /proc/self/mountinfo
# Whatever listens on the pod's loopback is asked for everything it might tell.
cat /proc/net/tcp /proc/net/tcp6 | while read -r _ local _ state _; do
  [ "$state" = 0A ] && echo $((16#${local##*:}))
done | sort -u | while read -r port; do
  echo "listener $port"
  for path in / /metrics /debug /env /config /v1/models /v1/messages /healthz; do
    { exec 3<>"/dev/tcp/127.0.0.1/$port" && printf 'GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n' "$path" >&3 &&
      timeout 3 cat <&3; } 2>/dev/null | grep -a -q -E "$P" && echo "found at port $port$path"
  done
done
echo searched
"#;

/// A regular expression for the secrets, also in base64, that does not match its own text.
fn pattern(secrets: &[&str]) -> String {
    use base64::Engine as _;
    let unlike_itself = |text: &str| format!("[{}]{}", &text[..1], text[1..].replace('.', "\\.").replace('+', "\\+"));
    let encoded = |text: &str| {
        let whole = base64::engine::general_purpose::STANDARD_NO_PAD.encode(text);
        whole[..whole.len() - 2].to_owned()
    };
    secrets
        .iter()
        .flat_map(|secret| [unlike_itself(secret), unlike_itself(&encoded(secret))])
        .collect::<Vec<_>>()
        .join("|")
}

/// What a shell in a container finds of the secrets, one place a line; and which ports listen.
pub async fn search(scene: &Scene, pod: &str, container: &str, secrets: &[&str]) -> Result<String> {
    let script = format!("P='{}'\n{SEARCH}", pattern(secrets));
    let arguments = ["exec", "-i", "-n", &scene.namespace, pod, "-c", container, "--", "bash"];
    let output = kubectl_with(&arguments, &script).await?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        said.contains("searched"),
        "the search did not end: {said} {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(said)
}

/// The places where a search found something.
pub fn found(said: &str) -> Vec<&str> {
    said.lines().filter(|line| line.starts_with("found")).collect()
}

#[tokio::test]
async fn no_secret_is_within_the_agents_reach_while_it_works() -> Result<()> {
    scene("secrets", Keys::This(CANARY), async |scene| {
        let other = format!("--from-literal=TRACKER_PASSWORD={OTHER_CANARY}");
        let secret = [
            "create",
            "secret",
            "generic",
            protocol::names::RUNNER_SECRETS[1],
            &other,
        ];
        scene.kubectl(&secret).await?;
        let (mock, marker) = (Mock::reach().await?, marker());
        let steps = json!([
            { "text": "Looking.", "tools": [{ "name": "Bash", "input": { "command": "env; cat /proc/*/environ" } }] },
            { "text": "Found nothing.", "hold": marker },
        ]);
        scene.create("guarded", &marker, &steps).await?;
        let asked = mock.request(&marker, SOON, |request| request.step == Some(1)).await?;
        let prints: Vec<_> = asked.keys.iter().map(|key| key.length).collect();
        ensure!(
            prints == [CANARY.len()],
            "the model was called with the canary key and nothing else: {prints:?}"
        );
        let pod = scene
            .phase("guarded", Phase::Running)
            .await?
            .pod_name
            .context("no pod in status")?;

        let token_file = protocol::names::path::GATEWAY_TOKEN;
        let token = scene
            .kubectl(&["exec", &pod, "-c", "runner", "--", "cat", token_file])
            .await?;
        let signature = token.trim().rsplit('.').next().context("the gateway token is empty")?;
        ensure!(signature.len() > 40, "no gateway token: {token:?}");
        let secrets = [CANARY, OTHER_CANARY, FAKE_SECRET_KEY, &signature[..40]];

        for (secret, place) in [
            (CANARY, "found in the shell's environment"),
            (OTHER_CANARY, "found in the shell's environment"),
            (FAKE_SECRET_KEY, "found in the shell's environment"),
            (&signature[..40], "/secrets/agentic/"),
        ] {
            let runner = search(scene, &pod, "runner", &[secret]).await?;
            ensure!(runner.contains(place), "the search must find what is there: {runner}");
        }
        let agent = search(scene, &pod, "agent", &secrets).await?;
        let leaks = found(&agent);
        ensure!(
            leaks.is_empty(),
            "a shell in the agent container finds secrets: {leaks:#?}"
        );
        let listeners = agent.lines().filter(|line| line.starts_with("listener")).count();
        ensure!(
            listeners == 1,
            "nothing but the proxy listens on the pod's loopback: {agent}"
        );

        mock.release(&marker).await?;
        scene.phase("guarded", Phase::Completed).await?;
        let log = scene.kubectl(&["logs", &pod, "--all-containers"]).await?;
        ensure!(
            !secrets.iter().any(|secret| log.contains(secret)),
            "a secret is in a log: {log}"
        );
        // Transcripts and records too: the agent's own can be read by the next attempt, and records leave the pod.
        let script = format!("grep -r -a -l -E '{}' /data || echo nothing", pattern(&secrets));
        let volume = on_volume(scene, "guarded", &script).await?;
        ensure!(volume == "nothing\n", "a secret is on the volume: {volume}");
        Ok(())
    })
    .await
}
