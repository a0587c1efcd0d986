//! The guard against pods that nobody has looked at: see `mesh_abi::guard`.
//!
//! While it is up, a network namespace below a guarded cgroup must be enrolled or known, else what it connects to is
//! refused; and what arrives in one that the agent has closed. It outlives the agent as captured pods do: a pod that is born while no agent lives stays refused until one
//! has looked at it.

use std::{collections::BTreeSet, os::fd::BorrowedFd, path::Path};

use mesh_abi::{Config, GUARD_OFF, GUARD_REFUSE};

use super::{
    Kernel, KernelError, NetnsCookie, cgroup,
    links::{self, steer_pin},
};

/// A namespace that was refused because it is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stranger {
    /// The namespace.
    pub cookie: NetnsCookie,
    /// The cgroup2 of a process of it: the inode of its directory.
    pub cgroup_id: u64,
}

impl Kernel {
    /// Guards the processes below these cgroup2 directories from now on. Every namespace that is to go on must be
    /// enrolled or known before.
    pub fn raise_guard(&self, cgroups: &[impl AsRef<Path>]) -> Result<(), KernelError> {
        self.set_guarded(cgroups)?;
        let _writer = self.writer.lock();
        self.set_guard(if cgroups.is_empty() { GUARD_OFF } else { GUARD_REFUSE })
    }

    /// Says which cgroup2 directories hold the processes of pods, whether they are guarded or not: those that share the
    /// node's network namespace are told from the node's own by it.
    pub fn set_guarded(&self, cgroups: &[impl AsRef<Path>]) -> Result<(), KernelError> {
        let _writer = self.writer.lock();
        let ids: BTreeSet<u64> = cgroups
            .iter()
            .map(|path| cgroup::cgroup_id(path.as_ref()))
            .collect::<Result<_, _>>()?;
        for id in &ids {
            self.maps.guarded.set(id, &1)?;
        }
        for old in self.maps.guarded.keys()? {
            if !ids.contains(&old) {
                self.maps.guarded.delete(&old)?;
            }
        }
        Ok(())
    }

    /// Leaves unknown namespaces alone from now on.
    pub fn lower_guard(&self) -> Result<(), KernelError> {
        let _writer = self.writer.lock();
        self.set_guard(GUARD_OFF)
    }

    fn set_guard(&self, guard: u32) -> Result<(), KernelError> {
        let old = self.maps.config.get(&0)?.unwrap_or_default();
        if old.guard == guard {
            return Ok(());
        }
        self.maps.config.set(&0, &Config { guard, ..old })
    }

    /// Says that a namespace is not enrolled and may connect.
    pub fn know(&self, cookie: NetnsCookie) -> Result<(), KernelError> {
        self.maps.known.set(&cookie.0, &1)
    }

    /// Takes that back, or forgets a namespace that is gone.
    pub fn forget(&self, cookie: NetnsCookie) -> Result<(), KernelError> {
        self.maps.known.delete(&cookie.0)
    }

    /// Every namespace that is known, also by an earlier agent.
    pub fn known(&self) -> Result<BTreeSet<NetnsCookie>, KernelError> {
        Ok(self.maps.known.keys()?.into_iter().map(NetnsCookie).collect())
    }

    /// Refuses what arrives in a namespace, until it is captured or released. Its addresses are nobody's yet.
    pub fn close(&self, cookie: NetnsCookie, netns: BorrowedFd<'_>) -> Result<(), KernelError> {
        let _writer = self.writer.lock();
        links::steer(&self.pin_dir, cookie, &self.steer_program, netns)
    }

    /// Takes that back; a namespace that was not closed is no error. Not for captured pods: see [`Kernel::retire`].
    pub fn open(&self, cookie: NetnsCookie) -> Result<(), KernelError> {
        let _writer = self.writer.lock();
        links::unpin(&self.pin_dir.join(steer_pin(cookie)))
    }

    /// The namespaces refused since the last call.
    pub fn take_strangers(&self) -> Result<Vec<Stranger>, KernelError> {
        let mut strangers = Vec::new();
        for cookie in self.maps.strangers.keys()? {
            let cgroup_id = self.maps.strangers.take(&cookie)?;
            strangers.extend(cgroup_id.map(|cgroup_id| Stranger {
                cookie: NetnsCookie(cookie),
                cgroup_id,
            }));
        }
        Ok(strangers)
    }
}
