//! Kueue on loopback: its definitions and webhooks as its own source has them, its manager as one of the control plane's daemons.

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use super::{processes::Processes, servers::flag};
use crate::{command, tools};

const NAME: &str = "kueue";
const NAMESPACE: &str = "kueue-system";
const SERVICE: &str = "kueue-webhook-service";
const SECRET: &str = "kueue-webhook-server-cert";
const PATIENCE: Duration = Duration::from_mins(2);

/// Kinds of which Kueue converts versions; it does not start before their definitions can be told by whom.
const CONVERTED: [&str; 5] = [
    "clusterqueues",
    "cohorts",
    "localqueues",
    "multikueueclusters",
    "workloads",
];

/// Installs Kueue and starts its manager; returns when its webhooks answer.
pub(super) fn start(processes: &Processes, state: &Path, kubeconfig: &Path) -> Result<()> {
    let folder = state.join(NAME);
    fs::create_dir_all(&folder).with_context(|| format!("failed to create {}", folder.display()))?;
    let (webhooks, probes) = (free()?, free()?);
    let components = tools::source(NAME)?.join("config/components");
    let kubectl = |words: &[&str]| -> Result<Command> {
        let mut kubectl = Command::new(tools::path("kubectl")?);
        kubectl.env("KUBECONFIG", kubeconfig).args(words);
        Ok(kubectl)
    };
    for manifest in [
        surroundings(webhooks),
        definitions(&components.join("crd/bases"), webhooks)?,
        on_loopback(&read(&components.join("webhook/manifests.yaml"))?, webhooks)?,
    ] {
        let mut apply = kubectl(&["apply", "--server-side", "-f", "-"])?;
        command::with_input(&mut apply, manifest.as_bytes())?;
    }
    let begun = Instant::now();
    // kubectl fails at once on a definition that has no conditions yet.
    while let Err(error) = command::quiet(&mut kubectl(&["wait", "--for=condition=Established", "crd", "--all"])?) {
        if begun.elapsed() > PATIENCE {
            return Err(error);
        }
        thread::sleep(Duration::from_millis(100));
    }

    let file = folder.join("configuration.yaml");
    fs::write(&file, configuration(&folder, webhooks, probes))?;
    processes.spawn(
        NAME,
        &tools::path(NAME)?,
        &[
            flag("config", &file.display().to_string()),
            flag("kubeconfig", &kubeconfig.display().to_string()),
        ],
    )?;
    let mut secret = kubectl(&["get", "secret", SECRET, "--namespace", NAMESPACE, "--output=json"])?;
    processes.wait(NAME, PATIENCE, || mount(&mut secret, &folder).is_ok())?;
    processes.wait(NAME, PATIENCE, || is_ready(probes))
}

fn free() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

fn read(file: &Path) -> Result<String> {
    fs::read_to_string(file).with_context(|| format!("failed to read {}", file.display()))
}

/// The namespace, the Secret that Kueue writes its certificate to, and a Service that leads to loopback, with no pod behind it.
fn surroundings(webhooks: SocketAddr) -> String {
    json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET, "namespace": NAMESPACE}},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": SERVICE, "namespace": NAMESPACE},
            "spec": {"type": "ExternalName", "externalName": webhooks.ip().to_string()},
        },
    ]})
    .to_string()
}

/// The definitions of Kueue's kinds, each with who converts its versions.
fn definitions(folder: &Path, webhooks: SocketAddr) -> Result<String> {
    let service = json!({"namespace": NAMESPACE, "name": SERVICE, "port": webhooks.port(), "path": "/convert"});
    let webhook = json!({"conversionReviewVersions": ["v1"], "clientConfig": {"service": service}});
    let conversion = json!({"strategy": "Webhook", "webhook": webhook});
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("failed to read {}", folder.display()))? {
        let definition = read(&entry?.path())?;
        let is_converted = |plural| definition.contains(&format!("\n  name: {plural}.kueue.x-k8s.io\n"));
        if CONVERTED.iter().any(is_converted) {
            ensure!(definition.matches("\nspec:\n").count() == 1, "a definition has no spec");
            all.push(definition.replace("\nspec:\n", &format!("\nspec:\n  conversion: {conversion}\n")));
        } else {
            all.push(definition);
        }
    }
    Ok(all.join("\n---\n"))
}

/// The webhooks with the names and the port that kustomize would put in.
fn on_loopback(manifest: &str, webhooks: SocketAddr) -> Result<String> {
    const PLACE: &str = "      name: webhook-service\n      namespace: system\n";
    ensure!(manifest.contains(PLACE), "Kueue's webhooks are asked in another way");
    let place = format!(
        "      name: {SERVICE}\n      namespace: {NAMESPACE}\n      port: {}\n",
        webhooks.port()
    );
    Ok(manifest
        .replace(PLACE, &place)
        .replace("\n  name: mutating-", "\n  name: kueue-mutating-")
        .replace("\n  name: validating-", "\n  name: kueue-validating-"))
}

/// Kueue's own defaults, but for where it listens and what it finds here.
fn configuration(certificates: &Path, webhooks: SocketAddr, probes: SocketAddr) -> String {
    json!({
        "apiVersion": "config.kueue.x-k8s.io/v1beta2",
        "kind": "Configuration",
        "namespace": NAMESPACE,
        "health": {"healthProbeBindAddress": probes.to_string()},
        "metrics": {"bindAddress": "0"},
        "webhook": {"host": webhooks.ip().to_string(), "port": webhooks.port(), "certDir": certificates},
        "leaderElection": {"leaderElect": false},
        "internalCertManagement": {"enable": true, "webhookServiceName": SERVICE, "webhookSecretName": SECRET},
        "integrations": {"frameworks": ["batch/job", "pod"]},
        // Its server listens on all addresses.
        "featureGates": {"VisibilityOnDemand": false},
    })
    .to_string()
}

/// The kubelet's part: what Kueue has written to its Secret appears in its folder.
fn mount(secret: &mut Command, folder: &Path) -> Result<()> {
    let secret: Value = serde_json::from_str(&command::output(secret)?)?;
    // Kueue begins when the certificate is there.
    for name in ["tls.key", "tls.crt"] {
        let encoded = secret["data"][name].as_str().context("no certificate was made yet")?;
        let half = folder.join(format!("{name}.half"));
        fs::write(&half, STANDARD.decode(encoded)?)?;
        fs::rename(&half, folder.join(name))?;
    }
    Ok(())
}

fn is_ready(probes: SocketAddr) -> bool {
    let answer = || -> std::io::Result<String> {
        let mut connection = TcpStream::connect(probes)?;
        connection.set_read_timeout(Some(Duration::from_secs(5)))?;
        connection.write_all(b"GET /readyz HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        connection.read_to_string(&mut answer)?;
        Ok(answer)
    };
    answer().is_ok_and(|answer| answer.starts_with("HTTP/1.0 200"))
}
