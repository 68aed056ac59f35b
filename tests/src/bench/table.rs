//! A table of results in Markdown.

/// Rows of a bound, what was measured, and whether it holds.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<[String; 4]>,
}

impl Table {
    /// Adds something that is only told.
    pub fn tell(&mut self, what: &str, measured: impl Into<String>) {
        self.row(what, measured.into(), String::new(), String::new());
    }

    /// Adds something that is held to a bound.
    pub fn hold(&mut self, what: &str, measured: impl Into<String>, bound: impl Into<String>, holds: bool) {
        self.row(
            what,
            measured.into(),
            bound.into(),
            if holds { "yes" } else { "**no**" }.into(),
        );
    }

    fn row(&mut self, what: &str, measured: String, bound: String, holds: String) {
        eprintln!("    {what}: {measured}");
        self.rows.push([what.to_owned(), measured, bound, holds]);
    }

    /// The table as Markdown.
    pub fn markdown(&self) -> String {
        let head = "| | measured | bound | holds |\n| --- | --- | --- | --- |\n".to_owned();
        self.rows.iter().fold(head, |text, [what, measured, bound, holds]| {
            text + &format!("| {what} | {measured} | {bound} | {holds} |\n")
        })
    }
}

/// The value below which `part` (0 to 1) of the sorted values lie; 0 of none.
pub fn quantile(sorted: &[f64], part: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted
        .get((last as f64 * part).round() as usize)
        .copied()
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_a_value_that_was_measured() {
        let sorted: Vec<f64> = (0..=100).map(f64::from).collect();
        assert_eq!(
            [quantile(&sorted, 0.5), quantile(&sorted, 0.99), quantile(&[], 0.5)].map(|value| value as i64),
            [50, 99, 0]
        );
    }
}
