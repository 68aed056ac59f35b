//! SIGKILL for a container, as the kernel or a power cut would: it does not hear of it.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use uuid::Uuid;

use super::command::{apply, kubectl};
use super::wait::{SOON, until};
use super::{SHELL_IMAGE, Scene, TOOLS};

/// The only pod with this `app.kubernetes.io/name`, as JSON.
pub async fn pod_of(namespace: &str, application: &str) -> Result<Value> {
    let selector = format!("app.kubernetes.io/name={application}");
    let list = kubectl(&["get", "pods", "-n", namespace, "-l", &selector, "-o", "json"]).await?;
    let list: Value = serde_json::from_str(&list)?;
    let pods = list["items"].as_array().context("kubectl gave no list")?;
    ensure!(pods.len() == 1, "{} pods of {application}, one expected", pods.len());
    Ok(pods[0].clone())
}

/// Kills the main container of the application's pod and returns that pod's name.
pub async fn kill(namespace: &str, application: &str) -> Result<String> {
    let pod = pod_of(namespace, application).await?;
    let name = pod["metadata"]["name"].as_str().context("a pod without name")?;
    let id = pod["status"]["containerStatuses"][0]["containerID"]
        .as_str()
        .and_then(|id| id.split("://").nth(1));
    let id = id.with_context(|| format!("pod {name} has no running container"))?;
    kill_container(id)
        .await
        .with_context(|| format!("to kill {application}"))?;
    Ok(name.to_owned())
}

/// Id of a container as the container runtime knows it.
pub async fn container_id(scene: &Scene, pod: &str, container: &str) -> Result<String> {
    let pod: Value = serde_json::from_str(&scene.kubectl(&["get", "pod", pod, "-o", "json"]).await?)?;
    let all = ["containerStatuses", "initContainerStatuses"].map(|field| pod["status"][field].as_array().cloned());
    let found = all
        .into_iter()
        .flatten()
        .flatten()
        .find(|status| status["name"] == container);
    let id = found
        .as_ref()
        .and_then(|found| found["containerID"].as_str()?.split("://").nth(1));
    Ok(id
        .with_context(|| format!("container {container} does not run"))?
        .to_owned())
}

/// Kills all processes of a container.
pub async fn kill_container(id: &str) -> Result<()> {
    let said = on_node(&format!(
        "for p in /proc/[0-9]*; do if grep -q {id} $p/cgroup 2>/dev/null; then kill -9 ${{p#/proc/}} && echo killed; fi; done"
    ))
    .await?;
    ensure!(
        said.contains("killed"),
        "no process of {id} was found to be killed: {said:?}"
    );
    Ok(())
}

/// Has the kernel kill a container's first process for memory. It takes the largest process first, and would take the tools and the
/// CLI for it, so they are gone before, and the first process is made the one that it likes best.
pub async fn kill_for_memory(id: &str) -> Result<()> {
    let said = on_node(&EATER.replace("ID", id)).await?;
    ensure!(said.contains("gone"), "the first process of {id} lives: {said:?}");
    Ok(())
}

/// The first process stands still meanwhile, so that it does not have the runner start the CLI again.
const EATER: &str = r#"
first=
for p in /proc/[0-9]*; do
    grep -q ID $p/cgroup 2>/dev/null || continue
    if tr '\0' ' ' <$p/cmdline | grep -q 'runner agent'; then first=${p#/proc/}; fi
done
[ "$first" ] || { echo no first process; exit 1; }
kill -STOP $first
for p in /proc/[0-9]*; do
    [ ${p#/proc/} = $first ] && continue
    if grep -q ID $p/cgroup 2>/dev/null; then kill -9 ${p#/proc/}; fi
done
own=$(sed -n 's/^[0-9]*:memory://p' /proc/$first/cgroup)
if [ "$own" ]; then
    group=/sys/fs/cgroup/memory$own limit=memory.limit_in_bytes
else
    group=/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/$first/cgroup) limit=memory.max
fi
# What the dead have used is given back a moment later.
for try in $(seq 100); do
    echo 33554432 2>/dev/null >$group/$limit && break
    sleep 0.1
done
echo 1000 >/proc/$first/oom_score_adj
# Files in memory belong to no process: a shell that writes them is smaller than the first process.
sh -c "x=\$(head -c 65536 /dev/zero | tr '\0' x)
    echo \$\$ >$group/cgroup.procs
    while echo \$x; do :; done >/dev/shm/full" 2>/dev/null &
eater=$!
for try in $(seq 600); do
    if [ ! -e /proc/$first ] || grep -q '^State:.Z' /proc/$first/status; then
        # The container is not over before its control group is empty.
        kill -9 $eater 2>/dev/null
        echo gone
        exit
    fi
    sleep 0.1
done
kill -9 $eater 2>/dev/null
echo it lives
"#;

/// Command lines of what still runs of a pod.
pub async fn processes_of_pod(uid: &str) -> Result<String> {
    // In names of control groups the dashes may be underscores.
    let name = format!("{uid}\\|{}", uid.replace('-', "_"));
    on_node(&format!(
        "for p in /proc/[0-9]*; do if grep -q '{name}' $p/cgroup 2>/dev/null; then tr '\\0' ' ' <$p/cmdline; echo; fi; done"
    ))
    .await
}

/// What a script says that sees and may kill all processes of the node, and may change what they may use.
async fn on_node(script: &str) -> Result<String> {
    let killer = format!("killer-{}", Uuid::new_v4().simple());
    let manifest = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": killer },
        "spec": {
            "hostPID": true, "restartPolicy": "Never", "terminationGracePeriodSeconds": 0,
            "containers": [{ "name": "kill", "image": SHELL_IMAGE, "imagePullPolicy": "IfNotPresent",
                "command": ["sh", "-c", script], "securityContext": { "runAsUser": 0, "privileged": true },
                "volumeMounts": [{ "name": "groups", "mountPath": "/sys/fs/cgroup" }] }],
            "volumes": [{ "name": "groups", "hostPath": { "path": "/sys/fs/cgroup" } }],
        },
    });
    apply(TOOLS, &manifest.to_string()).await?;
    let phase = until("the end of the pod that sees the node's processes", SOON, async || {
        let phase = kubectl(&["get", "pod", "-n", TOOLS, &killer, "-o", "jsonpath={.status.phase}"]).await?;
        Ok((phase == "Succeeded" || phase == "Failed").then_some(phase))
    })
    .await?;
    let said = kubectl(&["logs", "-n", TOOLS, &killer]).await?;
    ensure!(phase == "Succeeded", "{phase}: {said}");
    kubectl(&["delete", "pod", "-n", TOOLS, &killer, "--wait=false"]).await?;
    Ok(said)
}

/// Waits until the pod's container runs again after a kill and is ready.
pub async fn came_back(namespace: &str, application: &str, killed: &str) -> Result<()> {
    until(&format!("{application} to come back"), SOON, async || {
        let pod = pod_of(namespace, application).await?;
        let container = &pod["status"]["containerStatuses"][0];
        let again = pod["metadata"]["name"] != killed || container["restartCount"].as_u64().unwrap_or_default() > 0;
        Ok((again && container["ready"] == true).then_some(()))
    })
    .await
}
