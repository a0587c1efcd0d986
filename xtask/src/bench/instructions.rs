//! Instructions per request. Not counted yet.
use std::process::ExitCode;

use anyhow::{Result, bail};

pub fn install() -> Result<()> {
    Ok(())
}

pub fn run(_name: &str, _update: bool) -> Result<ExitCode> {
    bail!("instructions are not counted yet")
}
