//! Not here yet.
use anyhow::{Result, bail};
use std::process::ExitCode;
/// Options.
#[derive(Debug, clap::Args)]
pub struct Options {}
/// The verb.
pub fn run(_: &Options) -> Result<ExitCode> {
    bail!("not here yet")
}
