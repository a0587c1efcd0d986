//! `cargo xtask bench`: the mesh against direct connections and against other proxies, in one run on one lab.
//!
//! Every round measures every system at the same work, in a fresh random order, and a figure's ratio is taken to the
//! direct path of its own round, so that a busy machine harms all alike. What ran on the machine beside the lab is
//! counted; a sample that others disturbed is repeated, and marked if it stays so. Absolute numbers are this machine's;
//! ratios are the mesh's. `--instructions` counts instructions instead, which noise cannot touch.

mod compare;
mod instructions;
mod machine;
mod measure;
mod peers;
mod plot;
mod report;
mod scale;
mod systems;
mod work;

use std::{path::PathBuf, process::ExitCode, time::Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use mesh_tests::{Lab, LabConfig};

use crate::{build, setup, shell};

pub use machine::resident_bytes;

/// What to measure, how long and how often.
#[derive(Debug, Args)]
pub struct Options {
    /// How often each figure is measured.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long each measurement takes, in seconds.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Only these of our systems: l7, l4, same-l7, same-l4, same-direct.
    #[arg(long, value_delimiter = ',')]
    systems: Vec<String>,
    /// Other proxies in the same rounds: all, none, or names of haproxy, floor (two HAProxy hops that only copy
    /// bytes), hop (one), nginx, envoy.
    #[arg(long, value_delimiter = ',', default_value = "all")]
    peers: Vec<String>,
    /// Only these works: quiet, steady, full, new, bulk, idle.
    #[arg(long, value_delimiter = ',')]
    works: Vec<String>,
    /// The share of the machine that others may use before a sample counts as disturbed.
    #[arg(long, default_value_t = 0.05)]
    foreign: f64,
    /// How often a disturbed sample is repeated.
    #[arg(long, default_value_t = 2)]
    repeats: usize,
    /// The order's seed; by default the time.
    #[arg(long)]
    seed: Option<u64>,
    /// Shows a report of an earlier run beside this one, or with `--with` beside another.
    #[arg(long, value_name = "BASE.json")]
    compare: Option<PathBuf>,
    /// Compares with this report and measures nothing.
    #[arg(long, value_name = "NEW.json", requires = "compare")]
    with: Option<PathBuf>,
    /// Counts instructions per request instead, and fails if they grew beyond what benches/instructions.json allows.
    #[arg(long)]
    instructions: bool,
    /// Writes the counted instructions to benches/instructions.json.
    #[arg(long, requires = "instructions")]
    update: bool,
    /// A flag for the agents, such as --agent=--workers=1; may be given several times.
    #[arg(long = "agent", value_name = "FLAG", allow_hyphen_values = true)]
    agent: Vec<String>,
    /// Measures how a large world is controlled instead: one controller, one agent and many simulated ones.
    #[arg(long)]
    scale: bool,
    #[command(flatten)]
    size: scale::Size,
    /// The lab's name.
    #[arg(long, default_value = "bench")]
    name: String,
}

/// The verb.
pub fn run(options: &Options) -> Result<ExitCode> {
    if let (Some(base), Some(new)) = (&options.compare, &options.with) {
        compare::print(&report::read(base)?, &report::read(new)?);
        return Ok(ExitCode::SUCCESS);
    }
    ensure!(options.rounds > 0, "at least one round");
    let peers = peers::wanted(if options.instructions { &[] } else { &options.peers })?;
    if std::env::var_os("NODEMESH_PROGRAMS").is_none() {
        shell::require_sudo().context("the bench needs root")?;
        if options.scale {
            return crate::lab::with_programs(&scale::build()?);
        }
        setup::ensure_all()?;
        peers::install(&peers);
        if options.instructions {
            instructions::install()?;
        }
        let programs = build::programs(&build::Options { release: true })?;
        return crate::lab::with_programs(&programs);
    }
    if let Some(code) = shell::again_as_root()? {
        return Ok(code);
    }
    let started = Instant::now();
    mesh_tests::lab::replace(&options.name)?;
    if options.scale {
        return scale::run(&options.name, &options.size);
    }
    if options.instructions {
        return instructions::run(&options.name, options.update);
    }
    // A report that cannot be read should be known before minutes of measuring.
    let base = options.compare.as_deref().map(report::read).transpose()?;
    let ours = systems::wanted(&options.systems)?;
    let works = work::wanted(&options.works)?;
    let lab = lab(
        &options.name,
        &options.agent.iter().map(String::as_str).collect::<Vec<_>>(),
    )?;
    let report = measure::run(&lab, options, &ours, &peers, &works)?;
    lab.down()?;
    report::print(&report);
    if let Some(base) = &base {
        compare::print(base, &report);
    }
    report::write(&report)?;
    println!("bench took {}", shell::time(started.elapsed()));
    Ok(ExitCode::SUCCESS)
}

/// A lab with the bench's pods.
fn lab(name: &str, agent_args: &[&str]) -> Result<Lab> {
    let mut config = LabConfig::new(name).manifest(systems::manifest());
    config.agent_args = agent_args.iter().map(|argument| (*argument).into()).collect();
    config.service_rules = false;
    config.progress = |step| eprintln!("bench: {step}");
    Lab::up(config)
}
