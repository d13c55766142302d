//! `laneway check`: everything that would keep the engine from running, at once.

use clap::Args;
use serde_json::{Value, json};

use super::output::{Output, line, table};
use super::{ConfigArgs, Found};
use crate::app::check::{self, Finding, State};
use crate::clock::Clock;

#[derive(Args)]
pub struct Check {
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    #[command(flatten)]
    config: ConfigArgs,
}

impl Check {
    pub async fn run(&self) -> anyhow::Result<()> {
        let found = match self.config.load(&[], &[]) {
            Ok(config) => check::run(&config, &Clock::system()).await,
            Err(error) => vec![Finding::problem(
                "configuration",
                format!("{error:#}"),
                "`laneway config defaults` shows every key",
            )],
        };
        match self.output {
            Output::Table => {
                let cells = |it: &Finding| {
                    vec![it.state.as_str().to_owned(), it.subject.clone(), it.says.clone(), it.remedy.clone()]
                };
                table(&["STATE", "WHAT", "FOUND", "TO DO"], &found.iter().map(cells).collect::<Vec<_>>());
            }
            Output::Json => {
                let row = |it: &Finding| json!({"state": it.state.as_str(), "subject": it.subject, "says": it.says, "remedy": it.remedy});
                line(&Value::from(found.iter().map(row).collect::<Vec<_>>()).to_string());
            }
        }
        match found.iter().filter(|it| it.state == State::Problem).count() {
            0 => Ok(()),
            1 => anyhow::bail!(Found("1 problem".into())),
            count => anyhow::bail!(Found(format!("{count} problems"))),
        }
    }
}
