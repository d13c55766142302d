//! `laneway migrate`: prepares the store.

use anyhow::Context;
use clap::Args;
use serde_json::json;

use super::Common;
use super::output::{Output, line};
use crate::app::open;
use crate::store::job_status::JobStatusStore;

#[derive(Args)]
pub struct Migrate {
    /// Show what would be done.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    common: Common,
}

impl Migrate {
    pub async fn run(&self) -> anyhow::Result<()> {
        let config = self.common.config.load(&[], &[])?;
        let store = open::job_status(&config)?;
        let file = open::store_file(&open::store_url(&config));
        if self.dry_run && file.is_some_and(|file| !file.exists()) {
            return self.tell(&JobStatusStore::migrations());
        }
        if let Some(folder) = open::store_file(&open::store_url(&config)).as_deref().and_then(std::path::Path::parent) {
            std::fs::create_dir_all(folder).with_context(|| format!("store.url: {}", folder.display()))?;
        }
        let done = if self.dry_run { store.pending().await? } else { store.migrate().await? };
        self.tell(&done)
    }

    fn tell(&self, done: &[String]) -> anyhow::Result<()> {
        match self.common.output {
            Output::Json => drop(line(&json!({"job_status": done, "executed": !self.dry_run}).to_string())),
            Output::Table if done.is_empty() => drop(line("job_status: nothing to do")),
            Output::Table => {
                let verb = if self.dry_run { "would apply" } else { "applied" };
                for name in done {
                    line(&format!("job_status: {verb} the migration {name:?}"));
                }
            }
        }
        Ok(())
    }
}
