//! What people and programs are shown: tables, JSON, YAML, and times in words.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::connect::Failure;

/// How a result is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Columns for people.
    #[default]
    Table,
    /// JSON for programs.
    Json,
    /// YAML.
    Yaml,
}

/// Prints to standard output. A reader that went away (`| head`) is no error of ours.
pub fn print(text: &str) {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes());
    let _ = out.flush();
}

/// Prints a value as JSON or YAML.
pub fn print_value(value: &impl Serialize, format: Format) -> Result<(), Failure> {
    let text = match format {
        Format::Yaml => mesh_api::yaml::to_string(value).map_err(|e| Failure::refused(e.to_string()))?,
        Format::Json | Format::Table => {
            let mut text = serde_json::to_string_pretty(value).map_err(|e| Failure::refused(e.to_string()))?;
            text.push('\n');
            text
        }
    };
    print(&text);
    Ok(())
}

/// A table with its columns as wide as need be.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings.
    pub fn new(headings: &[&str]) -> Table {
        Table {
            rows: vec![headings.iter().map(|h| (*h).to_owned()).collect()],
        }
    }

    /// Adds a row; an empty cell is shown as `-`.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells = cells
            .into_iter()
            .map(|cell| if cell.is_empty() { "-".to_owned() } else { cell });
        self.rows.push(cells.collect());
    }

    /// Whether there are no rows below the headings.
    pub fn is_empty(&self) -> bool {
        self.rows.len() < 2
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(cell);
                line.extend(std::iter::repeat_n(' ', width - cell.chars().count() + 2));
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// `3d4h`, `58m`, `12s`.
fn span(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{}s", seconds % 60),
        (0, ..) => format!("{hours}h{minutes}m"),
        (1..10, ..) => format!("{days}d{hours}h"),
        _ => format!("{days}d"),
    }
}

/// `in 58m3s`, `12s ago`; `-` for 0.
pub fn when(unix: i64, now: SystemTime) -> String {
    let now = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
    match unix {
        0 => String::new(),
        _ if unix > now => format!("in {}", span(unix.abs_diff(now))),
        _ => format!("{} ago", span(unix.abs_diff(now))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_are_said_in_two_units() {
        let now = UNIX_EPOCH + Duration::from_secs(10_000_000);
        let at = |offset: i64| when(10_000_000 + offset, now);
        assert_eq!(at(5), "in 5s");
        assert_eq!(at(0), "0s ago");
        assert_eq!(at(3599), "in 59m59s");
        assert_eq!(at(3600), "in 1h0m");
        assert_eq!(at(-90_000), "1d1h ago");
        assert_eq!(at(86400 * 3650), "in 3650d");
        assert_eq!(when(0, now), "");
    }

    #[test]
    fn columns_line_up_and_lines_do_not_trail() {
        let mut table = Table::new(&["NAME", "X"]);
        table.row(["käse".into(), "".into()]);
        table.row(["longer-name".into(), "1".into()]);
        assert_eq!(table.to_string(), "NAME         X\nkäse         -\nlonger-name  1\n");
    }
}
