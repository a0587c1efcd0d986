//! Network namespaces by name: making and removing them, and running a closure inside one.
//!
//! A thread enters a namespace and never comes back: [`within`] gives it the closure, waits for it and lets it end, so
//! that no other code can run in the wrong namespace.

use std::{
    fs::File,
    io::Write,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Where `ip netns` keeps its namespaces.
pub const DIRECTORY: &str = "/run/netns";

/// The file of a named namespace.
pub fn path(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

/// Makes namespaces. One at a time on a machine: the first `ip netns add` also makes the mount that holds them, and
/// two of those at once would hide each other's.
pub fn create(names: &[String]) -> Result<()> {
    std::fs::create_dir_all(crate::state::ROOT)?;
    let lock = File::create(Path::new(crate::state::ROOT).join(".netns-lock"))?;
    lock.lock()?;
    let lines: Vec<String> = names.iter().map(|name| format!("netns add {name}")).collect();
    batch(None, &lines)
}

/// Removes namespaces; one that does not exist is fine.
pub fn remove(names: &[String]) -> Result<()> {
    let lines: Vec<String> = names
        .iter()
        .filter(|name| path(name).exists())
        .map(|name| format!("netns del {name}"))
        .collect();
    batch(None, &lines)
}

/// The named namespaces that begin with `prefix`.
pub fn list(prefix: &str) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(DIRECTORY) else {
        return Vec::new();
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| name.starts_with(prefix)).collect()
}

/// Gives the lines to one `ip -batch`, inside the namespace if one is named.
pub fn batch(netns: Option<&str>, lines: &[String]) -> Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    let mut command = Command::new("ip");
    if let Some(name) = netns {
        command.args(["-n", name]);
    }
    command.args(["-batch", "-"]);
    feed(command, &lines.join("\n"))
}

/// Runs a command with `input` on its standard input and fails with what it said.
pub fn feed(mut command: Command, input: &str) -> Result<()> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("run {command:?}"))?;
    let mut stdin = child.stdin.take().context("no standard input")?;
    stdin.write_all(input.as_bytes())?;
    stdin.write_all(b"\n")?;
    drop(stdin);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?}: {}\n{}\ninput:\n{input}", output.status, said.trim());
    }
    Ok(())
}

/// Runs `work` on a thread of its own inside the namespace.
pub fn within<T: Send>(name: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let file = File::open(path(name)).with_context(|| format!("open the network namespace {name}"))?;
    thread::scope(|scope| {
        scope
            .spawn(|| {
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                    .with_context(|| format!("enter the network namespace {name}"))?;
                work()
            })
            .join()
            .map_err(|_| anyhow!("the thread in the network namespace {name} panicked"))?
    })
}

/// Writes settings below `/proc/sys/net` of the namespace.
pub fn sysctl(name: &str, settings: &[(&str, &str)]) -> Result<()> {
    within(name, || {
        for (key, value) in settings {
            let file = Path::new("/proc/sys/net").join(key);
            std::fs::write(&file, value).with_context(|| format!("write {} in {name}", file.display()))?;
        }
        Ok(())
    })
}

/// Fails, and says what to do, unless this process is root.
pub fn require_root() -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "the lab needs root: it makes network namespaces and loads eBPF programs. Run it with sudo."
    );
    Ok(())
}
