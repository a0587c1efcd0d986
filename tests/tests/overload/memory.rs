//! A bound on an agent's memory: a cgroup of the memory controller, of whichever version the machine has.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use mesh_tests::{Lab, cgroup, mesh, state};

/// A bound. Its group stays until [`Bound::remove`]; on cgroup2 it goes with the lab.
pub struct Bound {
    group: PathBuf,
    is_v1: bool,
}

impl Bound {
    /// Makes agents of the node that start from now on live within so much memory.
    pub fn on(lab: &Lab, node: &str, bytes: u64) -> Result<Bound> {
        let bound = match v1_mount()? {
            Some(mount) => {
                let group = mount.join(format!("nodemesh-{}-{node}", lab.name()));
                fs::create_dir_all(&group)?;
                fs::write(group.join("memory.limit_in_bytes"), bytes.to_string())?;
                Bound { group, is_v1: true }
            }
            None => {
                let group = mesh::agent_cgroup(lab.cgroup(), node);
                let above: Vec<&Path> = group.ancestors().skip(1).collect();
                for parent in above.into_iter().rev() {
                    let control = parent.join("cgroup.subtree_control");
                    if control.exists() {
                        fs::write(&control, "+memory").with_context(|| format!("+memory in {}", control.display()))?;
                    }
                }
                cgroup::create(&group)?;
                fs::write(group.join("memory.max"), bytes.to_string())?;
                Bound { group, is_v1: false }
            }
        };
        bound.stand_in(lab, node)?;
        Ok(bound)
    }

    /// Programs of which the agent joins the group before it begins.
    fn stand_in(&self, lab: &Lab, node: &str) -> Result<()> {
        let programs = lab.state()?.programs;
        let directory = lab.directory().join("bounded");
        fs::create_dir_all(&directory)?;
        for name in ["mesh-ctl", "bench-load", "lab-load"] {
            symlink(programs.join(name), directory.join(name))?;
        }
        let real = programs.join("mesh-agent");
        let join = match self.is_v1 {
            true => format!(
                "case \"$*\" in *--node={node}*) echo $$ > {}/cgroup.procs;; esac\n",
                self.group.display()
            ),
            false => String::new(),
        };
        let script = directory.join("mesh-agent");
        fs::write(&script, format!("#!/bin/sh\n{join}exec {} \"$@\"\n", real.display()))?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        state::change(lab.name(), |state| {
            state.programs = directory;
            Ok(())
        })
    }

    /// How often something was refused to the group or had to be given back because of its bound, and what it has now.
    pub fn words(&self) -> String {
        let read = |name: &str| fs::read_to_string(self.group.join(name)).unwrap_or_default();
        match self.is_v1 {
            true => format!(
                "{} bytes at most, {} times at the bound",
                read("memory.max_usage_in_bytes").trim(),
                read("memory.failcnt").trim()
            ),
            false => format!(
                "{} bytes, {}",
                read("memory.current").trim(),
                read("memory.events").replace('\n', ", ")
            ),
        }
    }

    /// Removes the group, once nothing runs in it.
    pub fn remove(self) -> Result<()> {
        match self.is_v1 {
            true => cgroup::remove(&self.group),
            // It goes with the lab.
            false => Ok(()),
        }
    }
}

fn v1_mount() -> Result<Option<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(mounts.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let has_memory = kind.starts_with("cgroup ") && kind.rsplit([' ', ',']).any(|word| word == "memory");
        has_memory.then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    }))
}
