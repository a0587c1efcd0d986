//! Building what the lab runs: the agent, mesh-ctl and the lab's own programs.

use std::{path::PathBuf, process::ExitCode, time::Instant};

use anyhow::Result;
use clap::Args;

use crate::{setup, shell};

/// How to build.
#[derive(Clone, Debug, Default, Args)]
pub struct Options {
    /// With optimizations, as it is deployed.
    #[arg(long)]
    pub release: bool,
}

/// The verb.
pub fn run(options: &Options) -> Result<ExitCode> {
    setup::ensure_all()?;
    let started = Instant::now();
    let programs = programs(options)?;
    println!(
        "built into {} in {}",
        programs.display(),
        shell::time(started.elapsed())
    );
    Ok(ExitCode::SUCCESS)
}

/// Builds the programs and gives their directory.
pub fn programs(options: &Options) -> Result<PathBuf> {
    let target = shell::target()?;
    let mut command = shell::cargo();
    command.args([
        "build",
        "--locked",
        "-p",
        "mesh-agent",
        "-p",
        "mesh-ctl",
        "-p",
        "mesh-tests",
        "--bins",
    ]);
    command.arg("--target-dir").arg(&target);
    if options.release {
        command.arg("--release");
    }
    shell::run(&mut command)?;
    Ok(target.join(if options.release { "release" } else { "debug" }))
}
