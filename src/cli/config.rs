//! `laneway config`: what is in force and from where, and the file's schema.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::ConfigArgs;
use super::output::{Output, document, line, table};
use crate::config::{DEFAULTS, schema};

#[derive(Args)]
pub struct ConfigCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Every key with its value and where that comes from. Secrets are hidden.
    Show {
        #[arg(long, value_enum, default_value_t)]
        output: Output,
        /// Only what is not a default.
        #[arg(long)]
        changed: bool,
        #[command(flatten)]
        config: ConfigArgs,
    },
    /// The file's JSON Schema.
    Schema,
    /// Every key, commented, with its default: a file to begin with.
    Defaults {
        /// Write it there, instead of printing it. An existing file is left alone.
        file: Option<PathBuf>,
    },
}

impl ConfigCommand {
    pub fn run(&self) -> anyhow::Result<()> {
        match &self.action {
            Action::Show { output, changed, config } => show(config, *output, *changed),
            Action::Schema => {
                document(&serde_json::to_string_pretty(&schema::schema())?);
                Ok(())
            }
            Action::Defaults { file: None } => {
                document(DEFAULTS.trim_end());
                Ok(())
            }
            Action::Defaults { file: Some(path) } => {
                use std::io::Write;
                let named = |error: std::io::Error| anyhow::anyhow!("{}: {error}", path.display());
                let mut file = std::fs::File::create_new(path).map_err(named)?;
                file.write_all(DEFAULTS.as_bytes()).map_err(named)
            }
        }
    }
}

fn show(config: &ConfigArgs, output: Output, changed: bool) -> anyhow::Result<()> {
    let layers = config.layers(&[], &[])?;
    // What cannot be used is told, not shown as if it were in force.
    layers.config()?;
    let settings = layers.settings().into_iter().filter(|it| !changed || it.place.is_some());
    match output {
        Output::Table => {
            let cells = |place: Option<String>| place.unwrap_or_else(|| "default".to_owned());
            let rows: Vec<Vec<String>> =
                settings.map(|it| vec![it.key, it.value.to_string(), cells(it.place)]).collect();
            table(&["KEY", "VALUE", "FROM"], &rows);
        }
        Output::Json => {
            let rows: Vec<Value> =
                settings.map(|it| json!({"key": it.key, "value": it.value, "from": it.place})).collect();
            line(&json!(rows).to_string());
        }
    }
    Ok(())
}
