//! Kubeconfigs with the certificates inside, so that one file is all that a client needs.

use std::{fs, net::SocketAddr, os::unix::fs::PermissionsExt, path::Path};

use anyhow::{Context, Result};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::json;

use super::certificates::Certificates;

/// Writes the kubeconfig of one of the certificates' owners for an API server at `server`.
pub(super) fn write(file: &Path, server: SocketAddr, certificates: &Certificates, user: &str) -> Result<()> {
    let encoded = |name: &str| -> Result<String> { Ok(STANDARD.encode(certificates.read(name)?)) };
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "agentic", "cluster": {
            "server": format!("https://{server}"),
            "certificate-authority-data": encoded("ca.crt")?,
        }}],
        "users": [{"name": user, "user": {
            "client-certificate-data": encoded(&format!("{user}.crt"))?,
            "client-key-data": encoded(&format!("{user}.key"))?,
        }}],
        "contexts": [{"name": "agentic", "context": {"cluster": "agentic", "user": user}}],
        "current-context": "agentic",
    });
    // JSON is YAML, and all readers of a kubeconfig read YAML.
    fs::write(file, serde_json::to_vec_pretty(&config)?)
        .and_then(|()| fs::set_permissions(file, fs::Permissions::from_mode(0o600)))
        .with_context(|| format!("failed to write {}", file.display()))
}
