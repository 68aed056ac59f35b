//! What a shell of the agent's cannot get at: each attempt is made where the agent works, and answered. The same attempts in
//! the places that have these things show that they would be seen to succeed.

use anyhow::{Context as _, Result, ensure};
use crds::Phase;
use protocol::names::path;
use serde_json::{Value, json};

use crate::harness::command::kubectl_with;
use crate::harness::mock::Mock;
use crate::harness::scene::marker;
use crate::harness::wait::SOON;
use crate::harness::{Keys, SYSTEM, Scene, scene};

/// Says of each attempt, by its name, whether it reached what it was after. `$STATE` is the session's folder on the claim,
/// `$NEIGHBOUR` and `$PORT` are another session's pod and where its proxy listens on its own loopback.
const ATTEMPTS: &str = r#"
try() {
  name=$1; shift
  if said=$("$@" 2>&1); then echo "$name: REACHED $(printf %s "$said" | head -c 60 | tr '\n' ' ')"
  else echo "$name: no ($(printf %s "$said" | tail -n 1 | head -c 120))"; fi
}
unix() { perl -MSocket -e 'socket(my $s, PF_UNIX, SOCK_STREAM, 0) or die "$!\n"; connect($s, pack_sockaddr_un($ARGV[0])) or die "$!\n"' "$1"; }
tcp() { timeout 10 bash -c "exec 3<>/dev/tcp/$1/$2"; }
http() { # host port path header wanted
  timeout 10 bash -c 'exec 3<>/dev/tcp/$0/$1 && printf "GET %s HTTP/1.0\r\nHost: x\r\n%s\r\n" "$2" "$3" >&3 && IFS= read -r line <&3 && echo "$line" && [[ $line == *" 200 "* ]]' "$@"
}
named() { find / -path /proc -prune -o -path /sys -prune -o -type f -name "$1" -print 2>/dev/null | grep .; }
# A connection to a port of one's own choice may be one with itself.
ports() { perl -MSocket -e 'my @o; for my $p (1..65535) { socket(my $s, PF_INET, SOCK_STREAM, 0); push @o, $p if connect($s, sockaddr_in($p, inet_aton($ARGV[0]))) && getsockname($s) ne getpeername($s) } print "@o"' "$1"; }
# There is no program for it in the image.
mounts() { perl -e 'my ($n, @w) = (`uname -m` =~ /aarch64/ ? 40 : 165, "none", "/tmp", "tmpfs"); syscall($n, @w, 0, 0) == 0 or die "$!\n"'; }
runners() { for p in /proc/[0-9]*; do tr '\0' ' ' <$p/cmdline; echo; done 2>/dev/null | grep "^$RUNNER" | grep -v "^$RUNNER agent"; }

try "the control socket" unix "$CONTROL"
try "a command to the runner" "$RUNNER" status
try "the shim's socket" unix "$SHIM"
try "the claim" ls "$DATA/sessions"
try "the session's state" ls "$STATE"
try "the state beside the workspace" ls /workspace/../state
try "the spool" named '*.spool'
try "the lease" named lease
try "writing the lease" touch "$STATE/lease"
try "the runner's process" runners
try "the first process's files" ls /proc/1/root/
try "the first process's descriptors" ls /proc/1/fd/
try "the first process's variables" cat /proc/1/environ
try "the first process's memory" head -c 1 /proc/1/mem
try "the gateway's token" cat "$TOKEN"
try "a service account" ls /var/run/secrets/kubernetes.io/serviceaccount
try "the Secrets" ls "$SECRETS"
try "the settings" ls /etc/agentic
try "another mount" mounts
try "shared memory" bash -c 'ls -A /dev/shm | grep .'
try "an abstract socket" grep '@' /proc/net/unix
try "the neighbour's proxy, here" tcp 127.0.0.1 "$PORT"
try "the neighbour's proxy, there" tcp "$NEIGHBOUR" "$PORT"
try "the gateway's sessions" http "$GATEWAY" 8080 "/api/projects/$NAMESPACE/agentic-sessions" ""
if [ -n "$LOCAL" ]; then
  here=${ANTHROPIC_BASE_URL##*:}
  try "the proxy without its token" http 127.0.0.1 "$here" /v1/models ""
  try "another path of the API" http 127.0.0.1 "$here" /v1/files "x-api-key: $ANTHROPIC_API_KEY"$'\r\n'
  echo "listening on IPv6: $(awk '$4 == "0A"' /proc/net/tcp6 | wc -l)"
  echo "own loopback: $(ports 127.0.0.1), the proxy: $here."
  echo "own pod: $(ports "$(hostname -i)")."
  echo "neighbour: $(ports "$NEIGHBOUR")."
fi
echo "all tried"
"#;

/// Attempts that succeed in the runner's container.
const THE_RUNNERS: [&str; 11] = [
    "the control socket",
    "a command to the runner",
    "the claim",
    "the session's state",
    "the spool",
    "the lease",
    "writing the lease",
    "the runner's process",
    "the gateway's token",
    "the Secrets",
    "the settings",
];

/// What the attempts are after.
struct Aim {
    uid: String,
    namespace: String,
    neighbour: String,
    port: String,
}

impl Aim {
    fn script(&self, in_the_agent: bool) -> String {
        let variables = [
            ("CONTROL", path::CONTROL_SOCKET.to_owned()),
            ("RUNNER", path::RUNNER.to_owned()),
            ("SHIM", path::SHIM_SOCKET.to_owned()),
            ("DATA", path::DATA.to_owned()),
            ("STATE", format!("{}/{}", path::DATA, path::state_dir(&self.uid))),
            ("TOKEN", path::GATEWAY_TOKEN.to_owned()),
            ("SECRETS", path::SECRETS.to_owned()),
            ("GATEWAY", format!("agentic-gateway.{SYSTEM}.svc")),
            ("NAMESPACE", self.namespace.clone()),
            ("NEIGHBOUR", self.neighbour.clone()),
            ("PORT", self.port.clone()),
            ("LOCAL", if in_the_agent { "yes" } else { "" }.to_owned()),
        ];
        let mut lines = variables.map(|(name, value)| format!("{name}='{value}'")).to_vec();
        lines.push(ATTEMPTS.to_owned());
        lines.join("\n")
    }
}

/// What a script says in a container.
async fn within(scene: &Scene, pod: &str, container: &str, script: &str) -> Result<String> {
    let arguments = ["exec", "-i", "-n", &scene.namespace, pod, "-c", container, "--", "bash"];
    let output = kubectl_with(&arguments, script).await?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A session that works until it is told to go on; gives its pod.
async fn working(scene: &Scene, mock: &Mock, name: &str, first: &Value) -> Result<(String, String, String)> {
    let marker = marker();
    let steps = json!([first, { "text": "Done.", "hold": marker }]);
    scene.create(name, &marker, &steps).await?;
    let request = mock.request(&marker, SOON, |request| request.step == Some(1)).await?;
    let status = scene.phase(name, Phase::Running).await?;
    let pod = status.pod_name.context("no pod in status")?;
    let said = request.messages().last().and_then(tool_result).unwrap_or_default();
    Ok((pod, marker, said))
}

/// The text of a tool's result.
fn tool_result(message: &Value) -> Option<String> {
    let content = &message["content"][0]["content"];
    let text = content.as_str().or_else(|| content[0]["text"].as_str())?;
    Some(text.to_owned())
}

#[tokio::test]
async fn from_the_agents_shell_nothing_of_the_runner_and_of_other_pods_is_reached() -> Result<()> {
    scene("reach", Keys::Good, async |scene| {
        let mock = Mock::reach().await?;
        let look = "echo ${ANTHROPIC_BASE_URL##*:}; hostname -i";
        let look = json!({ "tools": [{ "name": "Bash", "input": { "command": look, "description": "t" } }] });
        let (neighbour, go_on, said) = working(scene, &mock, "neighbour", &look).await?;
        let (port, address) = said.trim().split_once('\n').context("no port and address")?;

        // Its command is written when its uid is known: a script of the workspace's, put there by an administrator.
        let run = "while [ ! -e script ]; do sleep 0.2; done; bash ./script";
        let run = json!({ "tools": [{ "name": "Bash", "input": { "command": run, "description": "t" } }] });
        let marker = marker();
        let steps = json!([run, { "text": "Done.", "hold": marker }]);
        let created = scene.create("curious", &marker, &steps).await?;
        let aim = Aim {
            uid: created.metadata.uid.context("no uid")?,
            namespace: scene.namespace.clone(),
            neighbour: address.trim().to_owned(),
            port: port.trim().to_owned(),
        };
        mock.request(&marker, SOON, |request| request.step == Some(0)).await?;
        let pod = scene
            .phase("curious", Phase::Running)
            .await?
            .pod_name
            .context("no pod in status")?;
        let put = format!(
            "cat > script.part <<'END OF SCRIPT'\n{}\nEND OF SCRIPT\nmv script.part script",
            aim.script(true)
        );
        within(scene, &pod, "agent", &format!("cd {} && {put}", path::WORKSPACE)).await?;
        let request = mock.request(&marker, SOON, |request| request.step == Some(1)).await?;
        let said = request
            .messages()
            .last()
            .and_then(tool_result)
            .context("the tool said nothing")?;
        eprintln!("from the agent's shell:\n{said}");
        ensure!(
            said.trim_end().ends_with("all tried"),
            "not everything was tried: {said}"
        );
        ensure!(!said.contains("REACHED"), "the agent reaches what it must not: {said}");
        let tried = said.lines().filter(|line| line.contains(": no (")).count();
        ensure!(
            tried == ATTEMPTS.matches("\ntry \"").count() + 2,
            "{tried} attempts are answered: {said}"
        );
        let proxy = said
            .lines()
            .find_map(|line| {
                line.strip_prefix("own loopback: ")?
                    .strip_suffix('.')?
                    .split_once(", the proxy: ")
            })
            .context("no word on the own loopback")?;
        ensure!(
            proxy.0 == proxy.1,
            "only the proxy listens on the pod's loopback: {said}"
        );
        for nothing in ["listening on IPv6: 0\n", "own pod: .\n", "neighbour: .\n"] {
            ensure!(said.contains(nothing), "{nothing:?} is missing: {said}");
        }

        let runner = within(scene, &pod, "runner", &aim.script(false)).await?;
        for name in THE_RUNNERS {
            ensure!(
                runner.contains(&format!("{name}: REACHED")),
                "{name} is there: {runner}"
            );
        }
        let theirs = within(scene, &neighbour, "agent", &aim.script(false)).await?;
        ensure!(theirs.contains("the neighbour's proxy, here: REACHED"), "{theirs}");

        for marker in [&marker, &go_on] {
            mock.release(marker).await?;
        }
        scene.phase("curious", Phase::Completed).await?;
        scene.phase("neighbour", Phase::Completed).await?;
        Ok(())
    })
    .await
}
