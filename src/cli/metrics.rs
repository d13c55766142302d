//! `laneway metrics`: the catalogue, as it is compiled in.

use clap::Args;

use super::output::{Output, line, table};
use crate::telemetry::metrics::CATALOGUE;

#[derive(Args)]
pub struct MetricsCommand {
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

impl MetricsCommand {
    pub fn run(&self) -> anyhow::Result<()> {
        let kind = |kind: &str| match kind {
            "IntCounterVec" => "counter",
            "IntGaugeVec" => "gauge",
            _ => "histogram",
        };
        match self.output {
            Output::Table => {
                let row = |row: &crate::telemetry::metrics::Described| {
                    vec![row.name.to_owned(), kind(row.kind).to_owned(), row.labels.join(","), row.meaning.to_owned()]
                };
                table(&["NAME", "KIND", "LABELS", "MEANING"], &CATALOGUE.iter().map(row).collect::<Vec<_>>());
            }
            Output::Json => {
                let rows: Vec<serde_json::Value> = CATALOGUE
                    .iter()
                    .map(|row| {
                        serde_json::json!({
                            "name": row.name, "kind": kind(row.kind), "labels": row.labels, "meaning": row.meaning
                        })
                    })
                    .collect();
                line(&serde_json::Value::from(rows).to_string());
            }
        }
        Ok(())
    }
}
