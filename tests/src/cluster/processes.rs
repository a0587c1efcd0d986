//! The processes of a cluster, to be paused, slowed down and killed by tests of failures.
//!
//! A process is found by its cgroup, which is the cluster's own, and by its words: nothing outside of the cluster can
//! be met. What is paused goes on when its guard goes.

use std::{
    fs,
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use super::Cluster;

/// A process that is stopped until this value goes.
#[derive(Debug)]
pub struct Paused {
    pid: Pid,
}

/// A process that gets a small share of its time until this value goes.
#[derive(Debug)]
pub struct Slowed {
    pid: Pid,
    beat: Child,
}

impl Cluster {
    /// The process of this cluster with these first words: `["kubelet"]`, `["mesh-agent", "run"]`. `place` is a part of
    /// its cgroup's path: `cp`, `node1`, a pod's UID.
    pub fn process(&self, place: &str, words: &[&str]) -> Result<Pid> {
        let own = format!("/{}/", self.name);
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let path = entry?.path();
            let number = path.file_name().and_then(|name| name.to_str()?.parse().ok());
            let Some(pid) = number.and_then(Pid::from_raw) else {
                continue;
            };
            // A process may end while it is looked at.
            let (Ok(groups), Ok(line)) = (fs::read_to_string(path.join("cgroup")), fs::read(path.join("cmdline")))
            else {
                continue;
            };
            let inside = groups.lines().any(|line| line.contains(&own) && line.contains(place));
            let line = String::from_utf8_lossy(&line);
            let mut said = line.split('\0').map(|word| word.rsplit('/').next().unwrap_or(word));
            if inside && words.iter().all(|word| said.next() == Some(word)) {
                found.push(pid);
            }
        }
        ensure!(found.len() == 1, "{words:?} in {place} is {found:?}, not one process");
        Ok(found[0])
    }

    /// Stops a process, as [`Cluster::process`] finds it.
    pub fn pause(&self, place: &str, words: &[&str]) -> Result<Paused> {
        let pid = self.process(place, words)?;
        kill_process(pid, Signal::STOP)?;
        Ok(Paused { pid })
    }

    /// Kills a process, as [`Cluster::process`] finds it.
    pub fn kill(&self, place: &str, words: &[&str]) -> Result<()> {
        kill_process(self.process(place, words)?, Signal::KILL).context("kill")
    }

    /// Lets a process run for a fifth of the time only: 400 ms of each 500 ms it is stopped.
    pub fn slow_down(&self, place: &str, words: &[&str]) -> Result<Slowed> {
        let pid = self.process(place, words)?;
        let mut command = Command::new("sh");
        let beat = "while kill -STOP $1; do sleep 0.4; kill -CONT $1; sleep 0.1; done";
        command.args(["-c", beat, "sh", &pid.as_raw_pid().to_string()]);
        let beat = command.stdin(Stdio::null()).process_group(0).spawn();
        Ok(Slowed {
            pid,
            beat: beat.context("run sh")?,
        })
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        let _ = kill_process(self.pid, Signal::CONT);
    }
}

impl Drop for Slowed {
    fn drop(&mut self) {
        if let Some(group) = i32::try_from(self.beat.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.beat.wait();
        let _ = kill_process(self.pid, Signal::CONT);
    }
}
