//! `cargo xtask kernels`: the real programs in virtual machines that run other kernels.
//!
//! Each machine boots a kernel of Debian's in QEMU and sees this machine's files read-only, with a memory overlay for
//! whatever it writes: the very test programs that cargo built here run there. The kernel tests and the end-to-end
//! tests must pass on every kernel that the agent supports, and the agent must refuse the one that it does not by its
//! name. Nothing of the host is changed but the cache in the target directory.

mod archive;
mod guest;

use std::{path::Path, process::ExitCode, time::Instant};

use anyhow::{Result, bail, ensure};
use clap::Args;

use self::guest::{Guest, Job};
use crate::{
    build, setup, shell,
    test::{Counts, TestProgram, build_tests},
};

/// What the machines need that the other verbs do not.
const PACKAGES: &[&str] = &["busybox-static", "kmod", "qemu-system-x86", "xz-utils"];
/// End-to-end tests that every kernel must pass.
const END_TO_END: &[&str] = &["routing", "wire", "upgrade"];

/// Which kernels.
#[derive(Debug, Args)]
pub struct Options {
    /// Only this kernel, by its name in the list; may be given several times.
    #[arg(long, value_name = "NAME")]
    kernel: Vec<String>,
    /// Only tests whose name contains this.
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// QEMU's accelerator: `tcg` runs everywhere, `kvm` where the machine lends its hardware.
    #[arg(long, default_value = "tcg")]
    accel: String,
    /// Lists the kernels and ends.
    #[arg(long)]
    list: bool,
}

/// A kernel that is tried.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// What people call it.
    name: &'static str,
    /// The release of Debian whose kernel it is.
    suite: &'static str,
    /// What must come of it.
    expected: Expected,
}

/// What must come of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    /// Every test passes.
    Works,
    /// The agent ends at once and says why.
    Refused,
}

const KERNELS: &[Kernel] = &[
    Kernel {
        name: "5.10",
        suite: "bullseye",
        expected: Expected::Refused,
    },
    Kernel {
        name: "6.1",
        suite: "bookworm",
        expected: Expected::Works,
    },
    Kernel {
        name: "6.12",
        suite: "trixie",
        expected: Expected::Works,
    },
    Kernel {
        name: "newest",
        suite: "sid",
        expected: Expected::Works,
    },
];

/// The verb.
pub fn run(options: &Options) -> Result<ExitCode> {
    if options.list {
        for kernel in KERNELS {
            println!("{:8} of {}: {:?}", kernel.name, kernel.suite, kernel.expected);
        }
        return Ok(ExitCode::SUCCESS);
    }
    for name in &options.kernel {
        if !KERNELS.iter().any(|kernel| kernel.name == name) {
            let names: Vec<_> = KERNELS.iter().map(|kernel| kernel.name).collect();
            bail!("no kernel {name:?}: expected one of {}", names.join(", "));
        }
    }
    shell::require_sudo()?;
    setup::ensure_all()?;
    setup::ensure(PACKAGES)?;
    let programs = build::programs(&build::Options { release: false })?;
    let tests = build_tests(&["--workspace"])?;
    let cache = shell::target()?.join("kernels");
    let chosen = KERNELS
        .iter()
        .filter(|kernel| options.kernel.is_empty() || options.kernel.iter().any(|name| name == kernel.name));
    let mut rows = Vec::new();
    for kernel in chosen {
        let started = Instant::now();
        let image = archive::fetch(kernel.suite, &cache.join(kernel.name))?;
        println!("\n=== kernel {} ({})", kernel.name, image.release);
        let guest = Guest {
            image: &image,
            directory: cache.join(kernel.name),
            accel: &options.accel,
        };
        let outcome = match kernel.expected {
            Expected::Works => works(&guest, &tests, &programs, options.filter.as_deref()),
            Expected::Refused => refused(&guest, &programs, &image.release),
        };
        let text = match &outcome {
            Ok(text) => text.clone(),
            Err(error) => format!("FAILED: {error:#}"),
        };
        rows.push((kernel.name, image.release, text, started.elapsed(), outcome.is_ok()));
    }
    println!();
    for (name, release, text, time, _) in &rows {
        println!("{name:8} {release:32} {text} ({})", shell::time(*time));
    }
    let good = rows.iter().all(|row| row.4);
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs the kernel tests and the end-to-end tests in the machine.
fn works(guest: &Guest<'_>, tests: &[TestProgram], programs: &Path, filter: Option<&str>) -> Result<String> {
    let mut chosen = Vec::new();
    for name in ["kernel"].iter().chain(END_TO_END) {
        match tests.iter().find(|test| test.name == *name && test.kind == "test") {
            Some(test) => chosen.push(test),
            None => bail!("cargo built no test program {name:?}"),
        }
    }
    let jobs: Vec<Job> = chosen
        .iter()
        .map(|test| Job::test(&test.program, &test.package, programs, filter))
        .collect();
    let output = guest.run(&jobs)?;
    let mut total = Counts::default();
    for line in output.lines() {
        if let Some(counts) = crate::test::result_line(line) {
            total.add(counts);
        }
    }
    ensure!(
        output.exits.len() == jobs.len() && output.exits.iter().all(|code| *code == 0) && total.failed == 0,
        "{} passed, {} failed; exit codes {:?}",
        total.passed,
        total.failed,
        output.exits
    );
    ensure!(total.passed > 0, "no test has run");
    Ok(format!("{} passed, {} failed", total.passed, total.failed))
}

/// Starts the agent in the machine: it must end, and name the kernel and what it needs.
fn refused(guest: &Guest<'_>, programs: &Path, release: &str) -> Result<String> {
    let agent = programs.join("mesh-agent");
    let output = guest.run(&[Job::refusal(&agent)])?;
    let said = output
        .lines()
        .find(|line| line.contains("is older than"))
        .map(str::trim)
        .map(str::to_owned);
    match (said, output.exits.as_slice()) {
        (Some(said), [code]) if *code != 0 && said.contains(release) => Ok(format!("refused: {said}")),
        (said, exits) => bail!("expected a refusal that names {release}; it said {said:?} and exited with {exits:?}"),
    }
}
