//! How commands print: a table for people, or one JSON document.

use std::io::{ErrorKind, Write};
use std::sync::OnceLock;
use std::time::Duration;

use clap::ValueEnum;

use crate::telemetry::terminal::plain;

/// The first write to standard output that failed. A command ends with it (`failed`).
static FAILED: OnceLock<std::io::Error> = OnceLock::new();

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    #[default]
    Table,
    Json,
}

/// Prints one line, without characters that act on a terminal. False where it cannot be written: the command may end then.
pub fn line(text: &str) -> bool {
    write(&plain(text))
}

/// Prints several lines, each as [`line`] does.
pub fn document(text: &str) -> bool {
    text.lines().all(line)
}

/// Prints a line to standard error, without characters that act on a terminal.
pub fn note(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{}", plain(text));
}

/// Prints what was made for a terminal, such as a help text.
pub fn raw(text: &str) -> bool {
    write(text.strip_suffix('\n').unwrap_or(text))
}

fn write(text: &str) -> bool {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Ok(()) => true,
        Err(error) => {
            let _ = FAILED.set(error);
            false
        }
    }
}

/// Why not everything was printed. A reader that has gone (`| head`) is no failure.
pub fn failed() -> Option<&'static std::io::Error> {
    FAILED.get().filter(|error| error.kind() != ErrorKind::BrokenPipe)
}

/// `3h 20m`, `45s`, `0.2s`.
pub fn short(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0 => format!("{:.1}s", time.as_secs_f64()),
        1..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m {}s", seconds / 60, seconds % 60),
        3_600..86_400 => format!("{}h {}m", seconds / 3_600, seconds / 60 % 60),
        _ => format!("{}d {}h", seconds / 86_400, seconds / 3_600 % 24),
    }
}

/// How long so much work takes where it becomes less by `per_second`; none where nothing is known of that. In seconds, and for
/// people.
pub fn drains_in(work: u64, per_second: Option<f64>) -> (Option<f64>, String) {
    match per_second {
        _ if work == 0 => (None, "-".to_owned()),
        None => (None, "-".to_owned()),
        Some(rate) if rate > 0.0 => {
            let seconds = work as f64 / rate;
            (Some(seconds), short(Duration::from_secs_f64(seconds.min(1e9))))
        }
        Some(_) => (None, "never, at this rate".to_owned()),
    }
}

/// Prints rows with aligned columns, a line each.
pub fn table(head: &[&str], rows: &[Vec<String>]) {
    let plain_row = |row: &Vec<String>| row.iter().map(|cell| plain(cell).into_owned()).collect();
    let rows: Vec<Vec<String>> = rows.iter().map(plain_row).collect();
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = head.iter().enumerate().map(|(n, title)| width(n).max(title.chars().count())).collect();
    let row_of = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells.zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        line(padded.join("  ").trim_end());
    };
    row_of(&mut head.iter().copied());
    for row in &rows {
        row_of(&mut row.iter().map(String::as_str));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_drains_in_time_or_never() {
        assert_eq!(drains_in(600, Some(10.0)), (Some(60.0), "1m 0s".into()));
        assert_eq!(drains_in(600, Some(0.0)), (None, "never, at this rate".into()));
        assert_eq!(drains_in(600, Some(-3.0)), (None, "never, at this rate".into()));
        assert_eq!((drains_in(600, None).1, drains_in(0, Some(1.0)).1), ("-".into(), "-".into()));
    }

    #[test]
    fn spans_are_short() {
        let spans = [(200, "0.2s"), (45_000, "45s"), (125_000, "2m 5s"), (12_000_000, "3h 20m"), (90_000_000, "1d 1h")];
        for (millis, text) in spans {
            assert_eq!(short(Duration::from_millis(millis)), text);
        }
    }
}
