use clap::Args;
#[derive(Args)]
pub struct Load {}
impl Load { pub async fn run(&self) -> anyhow::Result<()> { Ok(()) } }
