//! `cargo xtask fuzz`: the fuzz targets of `tests/fuzz`, on the stable toolchain.
//!
//! The targets are programs of libFuzzer. The flags are those that coverage needs, given to cargo directly, so that
//! neither a nightly toolchain nor cargo-fuzz has to be installed. What is found stays in `tests/fuzz/artifacts`.

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::{Result, bail, ensure};
use clap::Args;

use crate::shell;

/// What to fuzz and for how long.
#[derive(Debug, Args)]
pub struct Options {
    /// The target; none lists them.
    name: Option<String>,
    /// Every target, one after the other.
    #[arg(long)]
    all: bool,
    /// How long, in seconds, each.
    #[arg(long, default_value_t = 30)]
    seconds: u64,
}

/// Coverage by edges with counters and comparisons, as libFuzzer wants it.
const FLAGS: &[&str] = &[
    "--cfg",
    "fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cdebug-assertions",
    "-Coverflow-checks",
    "-Ccodegen-units=1",
];
/// Flags apply to a named target only, not to build scripts.
const TRIPLE: &str = if cfg!(target_arch = "aarch64") {
    "aarch64-unknown-linux-gnu"
} else {
    "x86_64-unknown-linux-gnu"
};

fn directory() -> PathBuf {
    shell::root().join("tests/fuzz")
}

/// The verb.
pub fn run(options: &Options) -> Result<ExitCode> {
    let targets = targets()?;
    let chosen: Vec<&String> = match &options.name {
        Some(name) => targets.iter().filter(|target| *target == name).collect(),
        None if options.all => targets.iter().collect(),
        None => {
            println!("fuzz targets: {}", targets.join(", "));
            return Ok(ExitCode::SUCCESS);
        }
    };
    ensure!(!chosen.is_empty(), "no such target; there are {}", targets.join(", "));
    // The same versions as the workspace; cargo adds only what the fuzzer itself needs.
    fs::copy(shell::root().join("Cargo.lock"), directory().join("Cargo.lock"))?;
    let build = directory().join("target");
    let mut command = shell::cargo();
    command
        .current_dir(directory())
        .args(["build", "--release", "--target", TRIPLE, "--target-dir"])
        .arg(&build)
        .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"));
    for name in &chosen {
        command.args(["--bin", name]);
    }
    shell::run(&mut command)?;
    let mut found = Vec::new();
    for name in chosen {
        println!("fuzz: {name} for {} s", options.seconds);
        let corpus = directory().join("corpus").join(name);
        let work = build.join("corpus").join(name);
        let artifacts = directory().join("artifacts").join(name);
        for path in [&corpus, &work, &artifacts] {
            fs::create_dir_all(path)?;
        }
        let mut command = std::process::Command::new(build.join(TRIPLE).join("release").join(name));
        command
            .arg(format!("-max_total_time={}", options.seconds))
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            .args([
                "-timeout=10",
                "-rss_limit_mb=2048",
                "-print_final_stats=1",
                "-verbosity=1",
            ])
            // New inputs go into the build directory; those worth keeping are moved to the corpus by hand.
            .args([&work, &corpus]);
        if !command.status()?.success() {
            found.push(name.clone());
        }
    }
    if !found.is_empty() {
        bail!("found something in {}; see tests/fuzz/artifacts", found.join(", "));
    }
    Ok(ExitCode::SUCCESS)
}

fn targets() -> Result<Vec<String>> {
    let Ok(entries) = fs::read_dir(directory().join("fuzz_targets")) else {
        return Ok(Vec::new());
    };
    let files = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = files
        .filter_map(|file| Some(file.strip_suffix(".rs")?.to_string()))
        .collect();
    names.sort();
    Ok(names)
}
