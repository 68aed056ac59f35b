//! The termination report's file.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use protocol::Report;

/// Where the report goes: opened once, overwritten in place.
pub struct ReportFile {
    file: File,
    path: PathBuf,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
#[error("failed to write the termination report {path}")]
pub struct ReportError {
    path: PathBuf,
    #[source]
    source: std::io::Error,
}

impl ReportFile {
    /// Opens it. The kubelet's file is a bind mount that exists; it is neither replaced nor truncated.
    pub fn open(path: &Path) -> Result<Self, ReportError> {
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(|source| ReportError {
                path: path.to_owned(),
                source,
            })?;
        Ok(Self {
            file,
            path: path.to_owned(),
        })
    }

    /// Replaces the report by one write of a fixed length, so that a reader sees the old one or the new one.
    pub fn write(&self, report: &Report) -> Result<(), ReportError> {
        self.file
            .write_all_at(&report.to_bytes(), 0)
            .map_err(|source| ReportError {
                path: self.path.clone(),
                source,
            })?;
        crate::kill_point::pass("report-written");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use protocol::Outcome;

    use super::*;

    #[test]
    fn a_later_report_leaves_nothing_of_an_earlier_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("termination-log");
        let file = ReportFile::open(&path).unwrap();
        let long = Report {
            result: "x".repeat(4_000),
            ..Report::new(Outcome::Running, 1)
        };
        file.write(&long).unwrap();
        let last = Report {
            result: "short".into(),
            ..Report::new(Outcome::Succeeded, 1)
        };
        file.write(&last).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.len(), protocol::report::SIZE);
        assert_eq!(Report::from_message(&text).unwrap(), last);
    }
}
