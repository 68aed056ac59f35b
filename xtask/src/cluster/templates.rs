//! The node's configuration files, filled in.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};

pub(super) const CONTAINERD: &str = include_str!("../../../cluster/node/containerd.toml");
pub(super) const CNI: &str = include_str!("../../../cluster/node/cni.conflist");
pub(super) const KUBELET: &str = include_str!("../../../cluster/node/kubelet.yaml");
pub(super) const KUBE_PROXY: &str = include_str!("../../../cluster/node/kube-proxy.yaml");
pub(super) const COREFILE: &str = include_str!("../../../cluster/node/Corefile");
pub(super) const COREFILE_HOST: &str = include_str!("../../../cluster/node/Corefile.host");
pub(super) const STORAGE: &str = include_str!("../../../cluster/node/storage.yaml");

/// Values for the names between `@`.
pub(super) type Values<'a> = [(&'a str, String)];

/// Writes a template with every `@NAME@` replaced; a name without a value is an error.
pub(super) fn write(file: &Path, template: &str, values: &Values<'_>) -> Result<()> {
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(file, filled(template, values)?).with_context(|| format!("failed to write {}", file.display()))
}

fn filled(template: &str, values: &Values<'_>) -> Result<String> {
    let mut text = template.to_owned();
    for (name, value) in values {
        text = text.replace(&format!("@{name}@"), value);
    }
    if let Some(line) = text.lines().find(|line| line.matches('@').count() >= 2) {
        bail!("a template has a name without a value: {line}");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_without_a_value_is_refused() {
        let values = [("RUN", "/run/x".to_owned())];
        assert_eq!(filled("a: @RUN@/y", &values).unwrap(), "a: /run/x/y");
        assert!(filled("a: @RUN@/@STATE@", &values).is_err());
    }
}
