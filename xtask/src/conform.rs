//! `cargo xtask kube conform`: the Gateway API's conformance suite for meshes against the running cluster, and keeping
//! the report that it writes.

use std::{fs, process::ExitCode};

use anyhow::{Context, Result};
use clap::Args;
use mesh_tests::cluster::{
    Cluster,
    conformance::{self, Findings, Suite},
};

use crate::shell;

/// How to run the suite.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Keeps the report as docs/conformance/<version of the mesh>.yaml, if every test is green.
    #[arg(long)]
    report: bool,
    /// How often, one run after the other.
    #[arg(long, default_value_t = 1)]
    runs: u32,
    /// Without enrolling the suite's namespaces: what the suite says of a cluster without a mesh.
    #[arg(long)]
    unmeshed: bool,
    /// More of the suite's own flags: `-run-test=MeshBasic`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    flags: Vec<String>,
}

/// The verb.
pub fn run(options: &Options) -> Result<ExitCode> {
    if let Some(code) = shell::again_as_root()? {
        return Ok(code);
    }
    let cluster = Cluster::shared()?;
    let suite = Suite {
        version: format!("v{}", env!("CARGO_PKG_VERSION")),
        enrolled: !options.unmeshed,
        flags: options.flags.clone(),
    };
    let mut good = true;
    let mut last = None;
    for number in 1..=options.runs {
        let findings = conformance::run(&cluster, &suite)?;
        let passed = findings.tests.values().filter(|good| **good).count();
        println!(
            "run {number} of {}: {passed} of {} tests passed",
            options.runs,
            findings.tests.len()
        );
        good &= findings.good;
        last = Some(findings);
    }
    if options.report {
        keep(&last.context("no run, no report")?)?;
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Puts a report into the tree.
fn keep(findings: &Findings) -> Result<()> {
    findings.all_green()?;
    let report = findings.report.as_deref().context("the suite wrote no report")?;
    let directory = shell::root().join("docs/conformance");
    fs::create_dir_all(&directory)?;
    let file = directory.join(format!("v{}.yaml", env!("CARGO_PKG_VERSION")));
    fs::write(&file, report)?;
    println!("{}", file.display());
    Ok(())
}
