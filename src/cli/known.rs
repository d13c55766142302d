//! Whether a destination exists: a command for an id with a typing error would be accepted, and never do anything.

use anyhow::Context;

use super::Usage;
use crate::app::open;
use crate::app::standing::{self, Standing};
use crate::config::Config;
use crate::log::Backend;

/// # Errors
/// [`Usage`] where neither the router's progress nor the workspace has this id; names the nearest one.
pub async fn destination<B: Backend>(log: &B, config: &Config, id: &str) -> anyhow::Result<()> {
    let standing: Standing = standing::read(log).await?;
    if standing.destinations.contains_key(id) || standing.is_paused(id) {
        return Ok(());
    }
    let mut known: Vec<String> = standing.destinations.into_keys().collect();
    // Asked only for what the router does not know: a control plane that does not answer is no reason to refuse that.
    let workspace = open::workspace(config).await.with_context(|| {
        format!("destination {id} is not in the router's progress, and the workspace cannot be read (--unknown does it all the same)")
    })?;
    known.extend(workspace.destination_ids().map(ToString::to_string));
    if known.iter().any(|other| other == id) {
        return Ok(());
    }
    let near = |other: &&String| (strsim::jaro_winkler(other, id) * 1e9) as u64;
    let nearest =
        known.iter().max_by_key(near).map(|nearest| format!("; the nearest is {nearest}")).unwrap_or_default();
    anyhow::bail!(Usage(format!(
        "there is no destination {id}, neither in the workspace nor in the router's progress{nearest} (--unknown does it all the same)"
    )))
}
