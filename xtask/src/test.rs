//! `cargo xtask test`: every test of the workspace, as root, counted.
//!
//! Cargo builds as the developer; the test programs then run one after the other as root, because kernel programs and
//! network namespaces need it. Without root it fails and says so. The last line is the sum over all programs.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::Value;

use crate::{build, setup, shell, test_kube::Run};

/// Which tests.
#[derive(Debug, Args)]
pub struct Options {
    /// Only tests whose name contains this.
    filter: Option<String>,
    /// Builds the mesh's own programs with optimizations.
    #[arg(long)]
    release: bool,
    /// Only the tests on a Kubernetes cluster.
    #[arg(long, conflicts_with = "no_kube")]
    kube: bool,
    /// Without the tests on a Kubernetes cluster.
    #[arg(long)]
    no_kube: bool,
    /// Leaves the Kubernetes cluster running.
    #[arg(long)]
    keep: bool,
}

/// The sums over test programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub passed: u64,
    pub failed: u64,
    pub ignored: u64,
}

impl Counts {
    pub fn add(&mut self, other: Counts) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }
}

/// The verb.
pub fn run(options: &Options) -> Result<ExitCode> {
    let started = Instant::now();
    shell::require_sudo().context("the tests need root: they load eBPF programs and make network namespaces")?;
    setup::check_kernel()?;
    setup::ensure_all()?;
    let ready = Instant::now();
    let programs = build::programs(&build::Options {
        release: options.release,
    })?;
    // The tests on a cluster are of one package.
    let tests = build_tests(if options.kube {
        &["-p", "mesh-tests"]
    } else {
        &["--workspace"]
    })?;
    ensure!(!tests.is_empty(), "cargo built no test program");
    let filter = options.filter.as_deref();
    let (on_cluster, local): (Vec<_>, Vec<_>) = tests.into_iter().partition(|test| Run::needed_by(&test.name));
    let local = if options.kube { Vec::new() } else { local };
    // A cluster takes a minute: none is started for a filter that picks no test on it.
    let mut wanted = Vec::new();
    for test in on_cluster {
        if !options.no_kube && picks_any(&test, filter)? {
            wanted.push(test);
        }
    }
    let built = Instant::now();

    let mut total = Counts::default();
    let mut broken = Vec::new();
    for test in &local {
        println!("\n=== {} ({})", test.name, test.kind);
        let (counts, good) = run_test(test, &programs, filter, None)?;
        total.add(counts);
        if !good {
            broken.push(test.name.clone());
        }
    }
    if !wanted.is_empty() {
        println!("\n=== a Kubernetes cluster for {} test programs", wanted.len());
        let run = Run::start(options.release, options.keep)?;
        for test in &wanted {
            println!("\n=== {} ({}, cluster {})", test.name, test.kind, run.name());
            let (counts, good) = run_test(test, &programs, filter, Some(run.name()))?;
            total.add(counts);
            if !good {
                broken.push(test.name.clone());
                // At once: the next test changes the cluster.
                run.collect_logs(&test.name);
            }
        }
    }
    if filter.is_none() && !options.kube {
        println!("\n=== documentation");
        let mut command = shell::cargo();
        command
            .args(["test", "--doc", "--workspace", "--locked", "--target-dir"])
            .arg(shell::target()?);
        let (counts, good) = count(command)?;
        total.add(counts);
        if !good {
            broken.push("documentation".into());
        }
    }

    println!(
        "\nsetup {}, build {}, tests {}, in all {}",
        shell::time(ready - started),
        shell::time(built - ready),
        shell::time(built.elapsed()),
        shell::time(started.elapsed())
    );
    if !broken.is_empty() {
        println!("failed: {}", broken.join(", "));
    }
    if total.ignored > 0 {
        println!("ignored: {} (this workspace ignores no test)", total.ignored);
    }
    println!("{} passed, {} failed", total.passed, total.failed);
    let good = broken.is_empty() && total.failed == 0 && total.ignored == 0;
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A test program that cargo built.
pub struct TestProgram {
    pub name: String,
    pub kind: String,
    pub program: PathBuf,
    /// Its package's directory, in which it runs.
    pub package: PathBuf,
}

/// Builds test programs: of the packages that these arguments of cargo name.
pub fn build_tests(packages: &[&str]) -> Result<Vec<TestProgram>> {
    let mut command = shell::cargo();
    command.arg("test").args(packages);
    command.args(["--locked", "--no-run", "--message-format=json-render-diagnostics"]);
    command.arg("--target-dir").arg(shell::target()?);
    let mut child = command.stdout(Stdio::piped()).spawn().context("run cargo test")?;
    let output = child.stdout.take().context("no output of cargo")?;
    let mut tests = Vec::new();
    for line in BufReader::new(output).lines() {
        let Ok(message) = serde_json::from_str::<Value>(&line?) else {
            continue;
        };
        let text = |pointer: &str| message.pointer(pointer).and_then(Value::as_str);
        if message["profile"]["test"] == true
            && let (Some(program), Some(manifest), Some(name)) =
                (text("/executable"), text("/manifest_path"), text("/target/name"))
        {
            tests.push(TestProgram {
                name: name.to_string(),
                kind: text("/target/kind/0").unwrap_or("test").to_string(),
                program: program.into(),
                package: Path::new(manifest).parent().unwrap_or(Path::new("/")).to_path_buf(),
            });
        }
    }
    ensure!(child.wait()?.success(), "the tests do not build");
    // Unit tests first: when they fail, the end-to-end tests only say the same at greater length.
    tests.sort_by_key(|test| (test.package.ends_with("tests"), test.kind == "test", test.name.clone()));
    Ok(tests)
}

/// Whether a filter picks a test of the program.
fn picks_any(test: &TestProgram, filter: Option<&str>) -> Result<bool> {
    let Some(filter) = filter else {
        return Ok(true);
    };
    let listing = shell::read(Command::new(&test.program).args(["--list", filter]))?;
    Ok(listing.lines().any(|line| line.ends_with(": test")))
}

/// Runs a test program; tests on a cluster one at a time, because they share it.
fn run_test(
    test: &TestProgram,
    programs: &Path,
    filter: Option<&str>,
    cluster: Option<&str>,
) -> Result<(Counts, bool)> {
    let mut command = shell::root_command("env")?;
    let assign = |name: &str, value: &Path| {
        let mut pair = std::ffi::OsString::from(format!("{name}="));
        pair.push(value);
        pair
    };
    command.arg(assign("NODEMESH_PROGRAMS", programs));
    command.arg(assign("CARGO_MANIFEST_DIR", &test.package));
    command.arg(assign("PATH", Path::new(&shell::root_path())));
    command.arg("RUST_BACKTRACE=0");
    if let Some(name) = cluster {
        command.arg(format!("{}={name}", mesh_tests::cluster::NAME_VARIABLE));
    }
    command.arg(&test.program).args(filter).current_dir(&test.package);
    if cluster.is_some() {
        command.arg("--test-threads=1");
    }
    count(command)
}

/// Runs a test program, shows its output and sums its result lines.
fn count(mut command: Command) -> Result<(Counts, bool)> {
    let what = shell::show(&command);
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("run {what}"))?;
    let output = child.stdout.take().context("no output of the test")?;
    let mut counts = Counts::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        if let Some(result) = result_line(&line) {
            counts.add(result);
        }
    }
    Ok((counts, child.wait()?.success()))
}

/// Reads `test result: ok. 8 passed; 0 failed; 0 ignored; …`.
pub fn result_line(line: &str) -> Option<Counts> {
    let rest = line.trim().strip_prefix("test result: ")?;
    let number = |word: &str| {
        let before = rest.split(';').find_map(|part| part.trim().strip_suffix(word))?;
        before.split_whitespace().next_back()?.parse().ok()
    };
    Some(Counts {
        passed: number("passed")?,
        failed: number("failed")?,
        ignored: number("ignored")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_are_counted() {
        let line = "test result: FAILED. 7 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 1.78s";
        let want = Counts {
            passed: 7,
            failed: 1,
            ignored: 2,
        };
        assert_eq!(result_line(line), Some(want));
        for other in ["running 8 tests", "test result: ok", "test a ... ok", ""] {
            assert_eq!(result_line(other), None, "{other}");
        }
    }
}
