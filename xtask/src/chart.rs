//! The chart's own copy of the definition, and the manifests that are rendered from the chart.

use std::{collections::BTreeMap, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Map, Value, json};

/// Folder of the chart, relative to the repository's root.
pub const CHART: &str = "charts/agentic-operator";
/// The chart's copy of the definition, relative to the repository's root.
pub const DEFINITION: &str = "charts/agentic-operator/files/crd.yaml";
/// Namespace that the rendered manifests install into.
pub const NAMESPACE: &str = "agentic-system";

/// First line of every file that is made.
const GENERATED: &str = "# Made by `cargo xtask generate`. Do not edit.\n";
/// Folder of the rendered manifests, relative to the repository's root.
const MANIFESTS: &str = "manifests";
/// What the chart adds to the definition: Helm leaves it, and with it every session, when the release goes.
const KEEP: (&str, &str) = ("helm.sh/resource-policy", "keep");
/// Marks what Helm runs at certain times and what must not be applied together with the rest.
const HOOK: &str = "helm.sh/hook";

/// The definitions as the chart installs them.
pub fn definition() -> Result<String> {
    let mut documents = Vec::new();
    for crd in crds::crds() {
        let mut definition = serde_json::to_value(crd)?;
        definition["metadata"]["annotations"][KEEP.0] = json!(KEEP.1);
        documents.push(yaml(&definition)?);
    }
    Ok(format!("{GENERATED}{}", documents.join("---\n")))
}

/// The chart rendered for those who do not use Helm: path relative to the repository's root, and content.
///
/// Reads the chart from disk, so [`DEFINITION`] must be current.
pub fn manifests(root: &Path, helm: &Path) -> Result<BTreeMap<String, String>> {
    let objects = template(helm, &root.join(CHART), &[])?;
    let (hooks, objects): (Vec<_>, Vec<_>) = objects.into_iter().partition(is_hook);
    ensure!(!hooks.is_empty(), "the chart has no uninstall hook");

    let mut files = BTreeMap::from([("base/namespace.yaml".to_owned(), vec![namespace()])]);
    for object in objects {
        files
            .entry(format!("base/{}.yaml", component(&object)))
            .or_default()
            .push(without_helm(object));
    }
    files.insert(
        "uninstall/uninstall.yaml".to_owned(),
        hooks.into_iter().map(without_helm).collect(),
    );

    let mut written = BTreeMap::new();
    for folder in ["base", "uninstall"] {
        let names: Vec<_> = files
            .keys()
            .filter_map(|path| path.strip_prefix(folder)?.strip_prefix('/'))
            .collect();
        let kustomization =
            json!({"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": names});
        written.insert(
            format!("{MANIFESTS}/{folder}/kustomization.yaml"),
            format!("{GENERATED}{}", yaml(&kustomization)?),
        );
    }
    for (path, objects) in &files {
        let documents: Vec<_> = objects.iter().map(yaml).collect::<Result<_>>()?;
        written.insert(
            format!("{MANIFESTS}/{path}"),
            format!("{GENERATED}{}", documents.join("---\n")),
        );
    }
    Ok(written)
}

/// The objects that `helm template` makes of a chart with more arguments, such as `--set`.
pub fn template(helm: &Path, chart: &Path, arguments: &[&str]) -> Result<Vec<Value>> {
    let output = Command::new(helm)
        .args(["template", "agentic-operator"])
        .arg(chart)
        .args(["--namespace", NAMESPACE])
        // The oldest that the chart takes. A helm that was built without linker flags thinks of a version long gone.
        .args(["--kube-version", "1.29.0"])
        .args(arguments)
        .output()
        .with_context(|| format!("failed to run {}", helm.display()))?;
    ensure!(
        output.status.success(),
        "failed to render the chart: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let text = String::from_utf8(output.stdout).context("failed to read the rendered chart")?;
    let objects: Vec<Value> = serde_saphyr::from_multiple(&text).context("failed to parse the rendered chart")?;
    Ok(objects.into_iter().filter(|object| !object.is_null()).collect())
}

/// Whether an object is one of Helm's hooks.
pub fn is_hook(object: &Value) -> bool {
    !object["metadata"]["annotations"][HOOK].is_null()
}

/// File that an object belongs into.
fn component(object: &Value) -> &'static str {
    if object["kind"] == "CustomResourceDefinition" {
        return "crd";
    }
    match object["metadata"]["name"].as_str() {
        Some(name) if name.starts_with("agentic-gateway") => "gateway",
        Some(name) if name.starts_with("agentic-sessions") => "users",
        _ => "operator",
    }
}

fn namespace() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
    })
}

/// The object without what only Helm reads or may claim.
fn without_helm(mut object: Value) -> Value {
    clean(&mut object["metadata"]);
    if let Some(template) = object.pointer_mut("/spec/template/metadata") {
        clean(template);
    }
    object
}

fn clean(metadata: &mut Value) {
    for kind in ["labels", "annotations"] {
        let Some(entries) = metadata.get_mut(kind).and_then(Value::as_object_mut) else {
            continue;
        };
        entries.retain(|key, value| !key.starts_with("helm.sh/") && *value != "Helm");
        if entries == &Map::new() {
            metadata.as_object_mut().map(|metadata| metadata.remove(kind));
        }
    }
}

fn yaml(object: &Value) -> Result<String> {
    serde_saphyr::to_string(object).context("failed to write YAML")
}
