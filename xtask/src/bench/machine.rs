//! What the machine and its processes used: CPU time of control groups, of the whole machine, memory of processes.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result};

/// Kernel clock ticks per second in /proc: fixed at 100 for user space on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;

/// What was used until one moment.
pub struct Used {
    at: Instant,
    /// CPU seconds of the proxies.
    proxies: f64,
    /// CPU seconds of all that belongs to the lab.
    lab: f64,
    /// CPU seconds of everything, and those that the host took away.
    machine: f64,
}

/// What was used between two moments.
pub struct Use {
    /// CPU seconds of the proxies.
    pub proxies: f64,
    /// The share of the machine that was used by neither the lab nor idling: 0 to 1.
    pub foreign: f64,
}

impl Used {
    /// Looks now.
    pub fn now(proxies: &[PathBuf], lab: &Path) -> Result<Used> {
        Ok(Used {
            at: Instant::now(),
            proxies: proxies
                .iter()
                .map(|cgroup| cgroup_seconds(cgroup))
                .sum::<Result<f64>>()?,
            lab: cgroup_seconds(lab)?,
            machine: machine_seconds(&fs::read_to_string("/proc/stat")?)?,
        })
    }

    /// What was used since then.
    pub fn since(&self, before: &Used, cpus: usize) -> Use {
        let capacity = (self.at - before.at).as_secs_f64() * cpus as f64;
        let others = (self.machine - before.machine) - (self.lab - before.lab);
        Use {
            proxies: self.proxies - before.proxies,
            foreign: (others / capacity.max(f64::MIN_POSITIVE)).clamp(0.0, 1.0),
        }
    }
}

/// The CPU time that a control group has used.
pub fn cgroup_seconds(cgroup: &Path) -> Result<f64> {
    let file = cgroup.join("cpu.stat");
    let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    let micros = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
    Ok(micros.context("no usage_usec")?.trim().parse::<f64>()? / 1e6)
}

/// The CPU time in the text of /proc/stat: all but idling, with what the host took.
fn machine_seconds(stat: &str) -> Result<f64> {
    let line = stat.lines().next().context("an empty /proc/stat")?;
    let ticks = line.split_whitespace().skip(1).map(str::parse);
    let ticks: Vec<f64> = ticks.collect::<Result<_, _>>()?;
    // user, nice, system, (idle, iowait), irq, softirq, steal.
    let busy: f64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|index| ticks.get(*index)).sum();
    Ok(busy / TICKS_PER_SECOND)
}

/// The memory that a process holds now.
pub fn resident_bytes(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .context("no VmRSS")?;
    let kibibytes: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kibibytes * 1024)
}

/// The memory that all processes of some control groups hold now.
pub fn resident(cgroups: &[PathBuf]) -> Result<u64> {
    let mut bytes = 0;
    for cgroup in cgroups {
        for pid in fs::read_to_string(cgroup.join("cgroup.procs"))?.lines() {
            bytes += resident_bytes(pid.parse()?)?;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory_and_the_machine_time() {
        assert!(resident_bytes(std::process::id()).unwrap() > 100_000);
        assert!(machine_seconds(&fs::read_to_string("/proc/stat").unwrap()).unwrap() > 0.0);
        assert_eq!(machine_seconds("cpu  100 10 50 900 9 1 2 7 0 0\n").unwrap(), 1.7);
        assert!(machine_seconds("").is_err());
    }

    #[test]
    fn what_is_neither_ours_nor_idle_is_foreign() {
        let at = Instant::now();
        let used = |seconds, proxies, lab, machine| Used {
            at: at + std::time::Duration::from_secs(seconds),
            proxies,
            lab,
            machine,
        };
        let used_up = used(2, 1.5, 3.0, 103.2).since(&used(0, 1.0, 1.0, 100.0), 2);
        assert_eq!(used_up.proxies, 0.5);
        assert!((used_up.foreign - 0.3).abs() < 1e-9, "{}", used_up.foreign);
        // Ticks are coarse: less than nothing is nothing.
        assert_eq!(
            used(2, 0.0, 2.0, 101.9).since(&used(0, 0.0, 0.0, 100.0), 2).foreign,
            0.0
        );
    }
}
