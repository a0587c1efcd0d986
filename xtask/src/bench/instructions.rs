//! Instructions per request: the real agents in a real lab, under callgrind.
//!
//! One request after the other on one connection goes the same way every time, so the count is the same to a few per
//! mille whatever else the machine does; wall time plays no part. Only what the agents execute is counted, not what the
//! kernel does for them. The figures in `benches/instructions.json` belong to the code beside them: a change that needs
//! more changes them too, where everybody sees it.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use mesh_tests::{Lab, until};
use serde::{Deserialize, Serialize};

use super::systems::{self, System};
use crate::{setup, shell};

/// Requests before anything is counted: connections, tunnels and caches are there then.
const WARM_UP: u64 = 300;
/// Requests that are counted.
const REQUESTS: u64 = 2000;
/// What a figure may grow without being written anew.
const GROWTH_MAX_PERCENT: u64 = 3;
/// How long the mesh may take until requests pass.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// How long a dump may take.
const DUMP_LIMIT: Duration = Duration::from_secs(20);
/// The agents' stand-in: the real one under callgrind, which counts when it is told to.
const WRAPPER: &str = "#!/bin/sh
exec valgrind --tool=callgrind --instr-atstart=no --callgrind-out-file=callgrind.%p --quiet -- 'PROGRAM' \"$@\"
";
/// The name of the directory whose `mesh-agent` is [`WRAPPER`].
const COUNTED: &str = "counted";

/// The checked-in figures.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Figures {
    /// What they are.
    about: String,
    /// Instructions per request, both agents together, by system.
    instructions_per_request: BTreeMap<String, u64>,
}

/// Installs what is needed.
pub fn install() -> Result<()> {
    let there = Command::new("valgrind").arg("--version").output();
    if there.is_ok_and(|output| output.status.success()) {
        return Ok(());
    }
    setup::install(&["valgrind"])
}

/// Counts, compares, and writes if asked to.
pub fn run(name: &str, update: bool) -> Result<ExitCode> {
    let programs = mesh_tests::mesh::find_programs()?;
    if programs.file_name().is_none_or(|name| name != COUNTED) {
        return crate::lab::with_programs(&stand_ins(&programs)?);
    }
    // One worker: which of several takes a connection is chance, and each has tunnels and caches of its own.
    let lab = super::lab(name, &["--workers=1"])?;
    // same-l4 is a part of what l4 does, and what the kernel decides costs the agents nothing.
    let is_counted = |ours: &&systems::Ours| !["same-l4", "same-direct"].contains(&ours.name);
    let ours: Vec<_> = systems::OURS.iter().filter(is_counted).collect();
    let mut counted = BTreeMap::new();
    for system in systems::prepare(&lab, &ours, &[])?
        .iter()
        .filter(|system| system.base.is_some())
    {
        let count = count(&lab, system).with_context(|| system.title.clone())?;
        println!("{:<42} {count:>8} instructions per request", system.title);
        counted.insert(system.name.clone(), count);
    }
    lab.down()?;
    let file = shell::root().join("benches/instructions.json");
    if update {
        let figures = Figures {
            about:
                "Instructions per request, both agents together; written by `cargo xtask bench --instructions --update`"
                    .into(),
            instructions_per_request: counted,
        };
        fs::create_dir_all(file.parent().context("no directory")?)?;
        fs::write(&file, serde_json::to_string_pretty(&figures)? + "\n")?;
        println!("written to {}", file.display());
        return Ok(ExitCode::SUCCESS);
    }
    let text = fs::read_to_string(&file).with_context(|| format!("read {}; `--update` writes it", file.display()))?;
    let figures: Figures = serde_json::from_str(&text).with_context(|| file.display().to_string())?;
    let problems = judge(&figures.instructions_per_request, &counted);
    for problem in &problems {
        println!("{problem}");
    }
    Ok(if problems.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What is above the checked-in figures, or without one.
fn judge(figures: &BTreeMap<String, u64>, counted: &BTreeMap<String, u64>) -> Vec<String> {
    let mut problems = Vec::new();
    for (system, count) in counted {
        let Some(figure) = figures.get(system) else {
            problems.push(format!(
                "{system}: no figure in benches/instructions.json; `--update` writes it"
            ));
            continue;
        };
        let growth = *count as f64 / (*figure).max(1) as f64 - 1.0;
        let hundredths = |percent: u64| figure.saturating_mul(percent);
        if count.saturating_mul(100) > hundredths(100 + GROWTH_MAX_PERCENT) {
            problems.push(format!(
                "{system}: {count} instructions per request, {:.1} % more than the {figure} of benches/instructions.json \
                 (allowed: {GROWTH_MAX_PERCENT} %). Make it cheaper, or write the new figure with `--update` in the same change.",
                growth * 100.0
            ));
        } else if count.saturating_mul(100) < hundredths(100 - GROWTH_MAX_PERCENT) {
            println!(
                "{system}: {:.1} % below its figure; `--update` keeps the gain",
                -growth * 100.0
            );
        }
    }
    problems
}

/// A directory with the same programs, but the agent's stand-in.
fn stand_ins(programs: &Path) -> Result<PathBuf> {
    let directory = shell::root().join("target/bench").join(COUNTED);
    fs::create_dir_all(&directory)?;
    for entry in fs::read_dir(programs)? {
        let entry = entry?;
        let link = directory.join(entry.file_name());
        if link.symlink_metadata().is_ok() {
            fs::remove_file(&link)?;
        }
        if entry.file_name() == "mesh-agent" {
            fs::write(&link, WRAPPER.replace("PROGRAM", &entry.path().display().to_string()))?;
            fs::set_permissions(&link, fs::Permissions::from_mode(0o755))?;
        } else if entry.file_type()?.is_file() {
            symlink(entry.path(), &link)?;
        }
    }
    Ok(directory)
}

/// Instructions per request of both agents.
fn count(lab: &Lab, system: &System) -> Result<u64> {
    let agents = agents(lab)?;
    // Under callgrind agents are slow: a first try may meet one that has no credential yet.
    until("the first requests", READY_LIMIT, || {
        send(lab, system, WARM_UP).map(Some)
    })?;
    for (pid, _) in &agents {
        tell(*pid, &["instrumentation", "on"])?;
    }
    // All code is translated anew when counting begins, which takes longer than some timeouts.
    until("requests that are counted", READY_LIMIT, || {
        send(lab, system, WARM_UP).map(Some)
    })?;
    for (pid, _) in &agents {
        tell(*pid, &["zero"])?;
    }
    send(lab, system, REQUESTS)?;
    let mut instructions = 0;
    for (number, (pid, directory)) in agents.iter().enumerate() {
        let kept = kept(&format!("{}-{}.callgrind", system.name, number + 1));
        instructions += dump(*pid, directory, &kept)?;
        tell(*pid, &["instrumentation", "off"])?;
    }
    Ok(instructions / REQUESTS)
}

/// The agents' processes and the directories that they write to.
fn agents(lab: &Lab) -> Result<Vec<(u32, PathBuf)>> {
    let mut found = Vec::new();
    for node in lab.state()?.nodes {
        for pid in lab.agent_pids(&node.name)? {
            found.push((pid, fs::read_link(format!("/proc/{pid}/cwd"))?));
        }
    }
    ensure!(found.len() == 2, "expected two agents, not {}", found.len());
    Ok(found)
}

fn send(lab: &Lab, system: &System, requests: u64) -> Result<()> {
    let load = lab.state()?.programs.join("bench-load").display().to_string();
    let (address, requests) = (system.address.to_string(), requests.to_string());
    let argv = [
        &load,
        "keep",
        &address,
        "/bytes/1024",
        "--connections",
        "1",
        "--seconds",
        "60",
        "--requests",
        &requests,
    ];
    let said = lab.exec(system.source, &argv)?.ok()?;
    let said: serde_json::Value = serde_json::from_str(&said)?;
    ensure!(
        said["answered_all"].as_u64() == requests.parse().ok(),
        "not every request was answered: {said}"
    );
    Ok(())
}

/// Tells callgrind something.
fn tell(pid: u32, words: &[&str]) -> Result<()> {
    let output = Command::new("vgdb")
        .arg(format!("--pid={pid}"))
        .arg("--wait=10")
        .args(words)
        .output()
        .context("run vgdb")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "vgdb {}: {said}", words.join(" "));
    Ok(())
}

/// Where a dump stays for `callgrind_annotate`.
fn kept(name: &str) -> PathBuf {
    shell::root().join("target/bench").join(name)
}

/// Lets callgrind write what it counted since it was zeroed, reads that, and keeps a copy.
fn dump(pid: u32, directory: &Path, kept: &Path) -> Result<u64> {
    let before = files(pid, directory)?;
    tell(pid, &["dump"])?;
    until("callgrind's dump", DUMP_LIMIT, || {
        let new: Vec<PathBuf> = files(pid, directory)?
            .into_iter()
            .filter(|file| !before.contains(file))
            .collect();
        let mut sum = None;
        for file in new {
            if let Some(count) = total(&fs::read_to_string(&file)?) {
                sum = Some(sum.unwrap_or(0) + count);
                fs::copy(&file, kept)?;
            }
        }
        Ok(sum)
    })
}

fn files(pid: u32, directory: &Path) -> Result<Vec<PathBuf>> {
    let prefix = format!("callgrind.{pid}");
    let entries = fs::read_dir(directory)?.filter_map(|entry| Some(entry.ok()?.path()));
    Ok(entries
        .filter(|path| {
            path.file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| name.starts_with(&prefix))
        })
        .collect())
}

/// The last line of a dump: `totals: 123`.
fn total(text: &str) -> Option<u64> {
    text.lines()
        .rev()
        .find_map(|line| line.strip_prefix("totals:"))?
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_a_problem_above_three_percent() {
        let of = |count: u64| BTreeMap::from([("l7".to_string(), count)]);
        for (figure, counted, problems) in [(1000, 1030, 0), (1000, 1031, 1), (1000, 500, 0)] {
            assert_eq!(judge(&of(figure), &of(counted)).len(), problems, "{figure} {counted}");
        }
        assert_eq!(judge(&BTreeMap::new(), &of(1)).len(), 1);
    }

    #[test]
    fn dumps() {
        assert_eq!(total("events: Ir\nfn=(1)\n0 12\ntotals: 1234\n"), Some(1234));
        assert_eq!(total("events: Ir\n"), None);
    }
}
