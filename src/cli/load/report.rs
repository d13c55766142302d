//! What a run found, as a table or as JSON.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::super::output::{Output, line, table};
use super::oracle::Oracle;

pub struct Report {
    values: Vec<(&'static str, Value)>,
    problem: Option<String>,
}

impl Report {
    pub fn of(oracle: &Oracle, sent_for: Duration, judged: bool) -> Self {
        let seconds = sent_for.as_secs_f64().max(0.001);
        let accepted = oracle.accepted_count();
        let mut values = vec![
            ("accepted", json!(accepted)),
            ("accepted_per_second", rounded(accepted as f64 / seconds)),
            ("refused", json!(oracle.refused)),
            ("requests_repeated", json!(oracle.retried)),
        ];
        values
            .extend(percentiles(&oracle.accept, ["accept_p50_ms", "accept_p90_ms", "accept_p99_ms", "accept_max_ms"]));
        let mut problem = None;
        if judged {
            values.extend([
                ("delivered", json!(oracle.delivered_count())),
                ("lost", json!(oracle.missing())),
                ("duplicated_messages", json!(oracle.doubled)),
                ("duplicated_same_delivery_id", json!(oracle.doubled - oracle.doubled_otherwise)),
                ("duplicated_other_delivery_id", json!(oracle.doubled_otherwise)),
                ("out_of_order", json!(oracle.out_of_order)),
                ("foreign", json!(oracle.foreign)),
            ]);
            let names = ["end_to_end_p50_ms", "end_to_end_p90_ms", "end_to_end_p99_ms", "end_to_end_max_ms"];
            values.extend(percentiles(&oracle.end_to_end, names));
            if oracle.missing() > 0 || oracle.out_of_order > 0 {
                problem = Some(format!("{} lost, {} out of order", oracle.missing(), oracle.out_of_order));
            }
        }
        Self { values, problem }
    }

    /// What is wrong with the run, if anything: repeats are for the reader to judge.
    pub fn verdict(&self) -> Option<String> {
        self.problem.clone()
    }

    pub fn print(&self, output: Output) {
        match output {
            Output::Json => {
                let fields = self.values.iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
                line(&Value::Object(fields.collect()).to_string());
            }
            Output::Table => {
                let row = |(name, value): &(&str, Value)| vec![name.replace('_', " "), value.to_string()];
                table(&["WHAT", "VALUE"], &self.values.iter().map(row).collect::<Vec<_>>());
            }
        }
    }
}

fn percentiles(of: &Histogram<u64>, names: [&'static str; 4]) -> [(&'static str, Value); 4] {
    let at = |quantile| rounded(of.value_at_quantile(quantile) as f64 / 1_000.0);
    let [p50, p90, p99, max] = names;
    [(p50, at(0.5)), (p90, at(0.9)), (p99, at(0.99)), (max, rounded(of.max() as f64 / 1_000.0))]
}

fn rounded(value: f64) -> Value {
    json!((value * 10.0).round() / 10.0)
}
