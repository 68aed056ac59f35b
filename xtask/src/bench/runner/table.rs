//! Numbers and how they are shown.

use std::{fmt::Write as _, fs, path::Path, time::Duration};

use anyhow::{Context as _, Result};

use super::{measure::Sample, peers::Peer};

/// The middle one.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// The least.
pub(super) fn minimum(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

/// User and system time as bash writes them.
pub(super) fn cpu(times: &str) -> Duration {
    let sum: f64 = times
        .split_whitespace()
        .filter_map(|word| word.parse::<f64>().ok())
        .sum();
    Duration::from_secs_f64(sum)
}

/// The table of the sessions, and what each peer adds to the CLI alone.
pub(super) fn sessions(samples: &[Vec<Sample>; 3]) -> String {
    type Pick = fn(&Sample) -> f64;
    let columns: [Pick; 4] = [
        |sample| sample.result.as_secs_f64() * 1_000.0,
        |sample| sample.exit.as_secs_f64() * 1_000.0,
        |sample| sample.cpu.as_secs_f64() * 1_000.0,
        |sample| sample.own_pss as f64 / 1_024.0,
    ];
    let mut text = String::from(
        "Median (least) of a session of one answer. What is added is the difference to the CLI alone.\n\n\
         | | to result, ms | to exit, ms | CPU of all, ms | memory beside the CLI, MiB |\n| --- | --- | --- | --- | --- |\n",
    );
    let all = |samples: &[Sample], pick: Pick| samples.iter().map(pick).collect::<Vec<f64>>();
    for (peer, own) in Peer::ALL.into_iter().zip(samples) {
        let _ = write!(text, "| {} |", peer.name());
        for pick in columns {
            let values = all(own, pick);
            let _ = write!(text, " {:.1} ({:.1}) |", median(&values), minimum(&values));
        }
        text += "\n";
    }
    for (peer, own) in Peer::ALL.into_iter().zip(samples).skip(1) {
        let _ = write!(text, "| {} adds |", peer.name());
        for pick in columns {
            let (values, base) = (all(own, pick), all(&samples[0], pick));
            let _ = write!(
                text,
                " {:+.1} ({:+.1}) |",
                median(&values) - median(&base),
                minimum(&values) - minimum(&base)
            );
        }
        text += "\n";
    }
    text + "\n"
}

/// Replaces a part of the document between its two marks, or adds it at the end.
pub(in crate::bench) fn write(document: &Path, part: &str, text: &str) -> Result<()> {
    let (begin, end) = (format!("<!-- {part}: begin -->\n"), format!("<!-- {part}: end -->\n"));
    let old = fs::read_to_string(document).unwrap_or_default();
    let new = match (old.find(&begin), old.find(&end)) {
        (Some(from), Some(to)) if from < to => {
            format!("{}{begin}\n{}\n{}", &old[..from], text.trim_end(), &old[to..])
        }
        _ => format!("{old}\n{begin}\n{}\n{end}", text.trim_end()),
    };
    fs::write(document, new).with_context(|| format!("failed to write {}", document.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_and_the_least_are_found() {
        assert_eq!((median(&[3.0, 1.0, 2.0]), median(&[4.0, 1.0, 2.0, 3.0])), (2.0, 2.5));
        assert_eq!(minimum(&[3.0, 1.0, 2.0]).to_bits(), 1.0_f64.to_bits());
    }

    #[test]
    fn a_part_of_the_document_is_replaced_and_the_rest_stays() {
        let folder = tempfile::tempdir().unwrap();
        let document = folder.path().join("benchmarks.md");
        fs::write(&document, "# Measured\n").unwrap();
        for text in ["first", "second"] {
            write(&document, "runner", text).unwrap();
        }
        let text = fs::read_to_string(&document).unwrap();
        assert_eq!(
            text,
            "# Measured\n\n<!-- runner: begin -->\n\nsecond\n<!-- runner: end -->\n"
        );
    }
}
