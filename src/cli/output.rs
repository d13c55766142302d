//! How commands print: a table for people, or one JSON document.

use clap::ValueEnum;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    #[default]
    Table,
    Json,
}

/// Prints a line; false where nobody reads any more (`| head`).
pub fn line(text: &str) -> bool {
    use std::io::Write;
    writeln!(std::io::stdout().lock(), "{text}").is_ok()
}

/// Prints rows with aligned columns.
pub fn table(head: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = head.iter().enumerate().map(|(n, title)| width(n).max(title.chars().count())).collect();
    let row_of = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells.zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        line(padded.join("  ").trim_end());
    };
    row_of(&mut head.iter().copied());
    for row in rows {
        row_of(&mut row.iter().map(String::as_str));
    }
}
