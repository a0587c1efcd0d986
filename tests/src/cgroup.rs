//! The lab's control groups: where the cgroup2 hierarchy is mounted, and making, killing and removing groups in it.
//!
//! `<mount>/nodemesh-lab/<lab>/<node>/<pod>` holds the pods: `<lab>/<node>` is what a node's agent takes for the root
//! of its node, and `<lab>/<node>/host` holds what runs on the node itself. Agents and the controller live beside the
//! nodes, so that no agent captures another one.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};

use crate::wait;

/// How long killed processes may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// The mount point of the cgroup2 hierarchy in the text of `/proc/self/mountinfo`.
pub fn mount_in(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        (kind.split(' ').next()? == "cgroup2").then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    })
}

/// The cgroup of a lab, whether it exists or not.
pub fn of_lab(lab: &str) -> Result<PathBuf> {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    let mount = mount_in(&mountinfo).context("no cgroup2 hierarchy is mounted (expected at /sys/fs/cgroup)")?;
    Ok(mount.join("nodemesh-lab").join(lab))
}

/// Makes a group and its parents.
pub fn create(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("make the cgroup {}", path.display()))
}

/// Kills every process of the group and of the groups below it, and waits until they are gone.
pub fn kill(path: &Path) -> Result<()> {
    wait::until(&format!("the end of all in {}", path.display()), KILL_LIMIT, || {
        // Another process may be removing the same lab.
        if !path.exists() {
            return Ok(Some(()));
        }
        // Again and again: a process may be on its way into the group.
        fs::write(path.join("cgroup.kill"), "1").with_context(|| format!("kill the cgroup {}", path.display()))?;
        Ok((!populated(path)?).then_some(()))
    })
}

/// Whether a process lives in the group or below it.
pub fn populated(path: &Path) -> Result<bool> {
    let events = fs::read_to_string(path.join("cgroup.events"))?;
    Ok(events.lines().any(|line| line == "populated 1"))
}

/// The process ids of the group and of the groups below it.
pub fn processes(path: &Path) -> Result<Vec<u32>> {
    let text = fs::read_to_string(path.join("cgroup.procs"))?;
    let mut found: Vec<u32> = text.lines().filter_map(|line| line.parse().ok()).collect();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(processes(&entry.path())?);
        }
    }
    Ok(found)
}

/// Removes the group with the groups below it. It must hold no process.
pub fn remove(path: &Path) -> Result<()> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove(&entry.path())?;
        }
    }
    // A group whose last process has just ended may be busy for a moment.
    wait::until(
        &format!("removal of {}", path.display()),
        KILL_LIMIT,
        || match fs::remove_dir(path) {
            Ok(()) => Ok(Some(())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Some(())),
            Err(error) => Err(error.into()),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_hierarchy() {
        let hybrid = "40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_in(hybrid), Some("/sys/fs/cgroup/unified".into()));
        let unified = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(mount_in(unified), Some("/sys/fs/cgroup".into()));
        assert_eq!(mount_in("31 23 0:28 / /sys rw - sysfs sysfs rw\n"), None);
    }
}
