//! Values of the runner's Secrets: files that are read again for each use, so that a changed Secret counts at once, and
//! variables where there is no file.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use protocol::names::RUNNER_SECRETS;
use secrecy::{ExposeSecret as _, SecretString};

use crate::redact::{Held, Vault};

/// Largest file of a Secret that is read.
const MAX_FILE: u64 = 1 << 20;
/// Entry with certificates of authorities beside the public ones.
const CA: &str = "ca.crt";

/// Looks a variable of the runner up.
type Variables = Arc<dyn Fn(&str) -> Option<SecretString> + Send + Sync>;

/// See the module.
#[derive(Clone)]
pub struct Secrets {
    /// One folder a Secret.
    folder: PathBuf,
    variables: Variables,
    /// Told of all that is read.
    vault: Vault,
}

impl Default for Secrets {
    fn default() -> Self {
        Self::new(PathBuf::new(), |_| None)
    }
}

impl Secrets {
    /// Files below `folder`, and variables.
    pub fn new(folder: PathBuf, variables: impl Fn(&str) -> Option<SecretString> + Send + Sync + 'static) -> Self {
        Self {
            folder,
            variables: Arc::new(variables),
            vault: Vault::default(),
        }
    }

    /// The same, and `vault` is told of each value before it is used.
    #[must_use]
    pub fn telling(self, vault: Vault) -> Self {
        Self { vault, ..self }
    }

    /// Has a value that comes from elsewhere remembered as one of these are.
    pub fn tell(&self, name: &str, value: &str) {
        self.vault.learn(name, value);
    }

    /// A value as it is now, without the line break that Secrets made from files end in; an empty one is none.
    pub fn value(&self, name: &str) -> Option<SecretString> {
        let from_file = self.file(name).and_then(|bytes| String::from_utf8(bytes).ok());
        let from_file = from_file.map(|text| SecretString::from(text.trim()));
        from_file
            .or_else(|| (self.variables)(name))
            .filter(|value| !value.expose_secret().is_empty())
    }

    /// An entry as it is now: of the first Secret that has it, the two built-in ones before the others.
    pub fn file(&self, entry: &str) -> Option<Vec<u8>> {
        let bytes = self
            .folders()
            .into_iter()
            .find_map(|folder| read(&folder.join(entry)).ok())?;
        if !is_public(entry)
            && let Ok(text) = std::str::from_utf8(&bytes)
        {
            self.vault.learn(entry, text);
        }
        Some(bytes)
    }

    /// Name of the Secret that [`Secrets::file`] takes an entry from.
    pub fn holder(&self, entry: &str) -> Option<String> {
        let held = |folder: &PathBuf| folder.join(entry).is_file();
        let folder = self.folders().into_iter().find(held)?;
        Some(folder.file_name()?.to_str()?.to_owned())
    }

    /// Certificates of authorities beside the public ones.
    pub fn authorities(&self) -> Option<Vec<u8>> {
        self.file(CA)
    }

    fn folders(&self) -> Vec<PathBuf> {
        if self.folder.as_os_str().is_empty() {
            return Vec::new();
        }
        let built_in = RUNNER_SECRETS.iter().map(|name| self.folder.join(name));
        let mut others: Vec<PathBuf> = entries(&self.folder);
        others.sort();
        built_in.chain(others).collect()
    }
}

/// A small file whole.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// All values in files below a folder of Secrets, for redaction; certificates are no secrets.
pub fn held_in_files(folder: &Path) -> Vec<Held> {
    let mut held = Vec::new();
    for entry in entries(folder) {
        if entry.is_dir() {
            held.extend(held_in_files(&entry));
            continue;
        }
        let name = entry.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let text = read(&entry).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        if let Some(text) = text.filter(|text| !text.trim().is_empty() && !is_public(name)) {
            held.push(Held {
                name: name.to_owned(),
                value: text.into(),
            });
        }
    }
    held
}

/// Entries that are no secrets.
fn is_public(entry: &str) -> bool {
    matches!(entry, CA | "known_hosts")
}

/// What is in a folder, but for what the kubelet keeps there for itself.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b".."))
        .map(|entry| entry.path())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(folder: &Path, name: &str, entry: &str, value: &str) {
        fs::create_dir_all(folder.join(name)).unwrap();
        fs::write(folder.join(name).join(entry), value).unwrap();
    }

    #[test]
    fn a_file_comes_before_a_variable_and_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let secrets = Secrets::new(folder.path().to_owned(), |name| Some(format!("variable {name}").into()));
        let value = || secrets.value("KEY").unwrap().expose_secret().to_owned();
        assert_eq!(value(), "variable KEY");
        secret(folder.path(), "zz-own", "KEY", "other\n");
        assert_eq!(value(), "other");
        secret(folder.path(), RUNNER_SECRETS[1], "KEY", "built-in\n");
        assert_eq!(value(), "built-in");
        secret(folder.path(), RUNNER_SECRETS[1], "KEY", "rotated");
        assert_eq!(value(), "rotated");
    }

    #[test]
    fn every_value_in_a_file_is_held() {
        let folder = tempfile::tempdir().unwrap();
        secret(folder.path(), "a", "TOKEN", "fake-1");
        secret(folder.path(), "a", "ca.crt", "public");
        secret(folder.path(), "..2026_data", "TOKEN", "twice");
        fs::write(folder.path().join("mcp"), "Bearer fake-2").unwrap();
        let mut held: Vec<String> = held_in_files(folder.path())
            .into_iter()
            .map(|held| format!("{} {}", held.name, held.value.expose_secret()))
            .collect();
        held.sort();
        assert_eq!(held, ["TOKEN fake-1", "mcp Bearer fake-2"]);
    }

    #[test]
    fn a_value_is_told_before_it_is_used_and_certificates_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let vault = Vault::default();
        let secrets = Secrets::new(folder.path().to_owned(), |_| None).telling(vault.clone());
        for token in ["fake-token-1", "fake-token-2"] {
            secret(folder.path(), "a", "TOKEN", token);
            assert_eq!(secrets.value("TOKEN").unwrap().expose_secret(), token);
            assert_eq!(vault.redactor().text(token), "[redacted TOKEN]");
        }
        secret(folder.path(), "a", "ca.crt", "public certificate");
        secrets.authorities().unwrap();
        assert_eq!(vault.redactor().text("public certificate"), "public certificate");
    }
}
