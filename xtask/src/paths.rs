//! Where things lie: the clone, and the cache beside it that outlives the clone.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The root of the clone that this program was built from.
pub fn workspace() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest)
}

/// Everything that is expensive to make and depends on pins only: `$AGENTIC_CACHE`, or `agentic-operator` in the user's
/// cache folder.
pub fn cache() -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("AGENTIC_CACHE").filter(|value| !value.is_empty()) {
        return std::path::absolute(&folder).context("AGENTIC_CACHE is not a usable path");
    }
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|folder| folder.is_absolute())
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache")))
        .context("failed to find a cache folder: set AGENTIC_CACHE or HOME")?;
    Ok(base.join("agentic-operator"))
}

/// State of running clusters, one folder each.
pub fn clusters() -> Result<PathBuf> {
    Ok(cache()?.join("clusters"))
}
