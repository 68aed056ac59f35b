//! Files that are made from code: written, or compared with what is in the tree.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::{chart, paths, reference, tools};

/// Where the definitions for `kubectl apply` are, relative to the repository's root.
const DEFINITIONS: &str = "crds";
/// Folders in which every file is generated; a file that no generator makes any more must go.
const WHOLLY_GENERATED: [&str; 2] = ["manifests/base", "manifests/uninstall"];

/// Path relative to the repository's root, and content.
type Files = BTreeMap<String, String>;

/// Writes all generated files.
pub fn write() -> Result<()> {
    let root = paths::workspace();
    // The manifests are rendered from the chart, which holds a generated file itself.
    for generator in [definitions as fn(&Path) -> Result<Files>, manifests] {
        for (path, content) in generator(root)? {
            let file = root.join(&path);
            if fs::read_to_string(&file).is_ok_and(|found| found == content) {
                continue;
            }
            if let Some(folder) = file.parent() {
                fs::create_dir_all(folder)?;
            }
            fs::write(&file, content).with_context(|| format!("failed to write {path}"))?;
            println!("wrote {path}");
        }
    }
    for path in leftovers(root, &manifests(root)?)? {
        fs::remove_file(root.join(&path))?;
        println!("removed {path}");
    }
    Ok(())
}

/// Fails with the names of the files that differ from what [`write`] would make.
pub fn check() -> Result<()> {
    let root = paths::workspace();
    let mut files = definitions(root)?;
    files.extend(manifests(root)?);
    let mut stale: Vec<String> = files
        .iter()
        .filter(|(path, content)| fs::read_to_string(root.join(path)).map_or(true, |found| found != **content))
        .map(|(path, _)| path.clone())
        .collect();
    stale.extend(leftovers(root, &files)?);
    if !stale.is_empty() {
        bail!(
            "not current: {}. Run `cargo xtask generate` and commit what it writes",
            stale.join(", ")
        );
    }
    Ok(())
}

fn definitions(_root: &Path) -> Result<Files> {
    let mut files = Files::from([
        (chart::DEFINITION.to_owned(), chart::definition()?),
        (reference::REFERENCE.to_owned(), reference::reference()?),
    ]);
    for crd in crds::crds() {
        let yaml = serde_saphyr::to_string(&crd)?;
        files.insert(
            format!("{DEFINITIONS}/{}.yaml", crd.spec.names.plural),
            format!("# Made by `cargo xtask generate`. Do not edit.\n{yaml}"),
        );
    }
    Ok(files)
}

fn manifests(root: &Path) -> Result<Files> {
    tools::ensure(tools::Group::Chart)?;
    chart::manifests(root, &tools::path("helm")?)
}

fn leftovers(root: &Path, files: &Files) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for folder in WHOLLY_GENERATED.map(PathBuf::from) {
        for entry in fs::read_dir(root.join(&folder)).into_iter().flatten() {
            let path = folder.join(entry?.file_name()).to_string_lossy().into_owned();
            if !files.contains_key(&path) {
                found.push(path);
            }
        }
    }
    Ok(found)
}
