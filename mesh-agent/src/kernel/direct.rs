//! The maps of direct flows: see `mesh_abi::direct`. What may be connected without the agent is written here, and what
//! was is read. Who may is decided elsewhere.
//!
//! Generations of the agent share the maps. One of them owns the entries, and says so in the state; ends of flows are
//! taken from a queue, each once, by whoever asks.

use std::io;

use mesh_abi::{
    Endpoint,
    direct::{DirectEndpoint, DirectEntry, DirectFlow, DirectKey, DirectState, STATE_OTHERS, STATE_OWNER},
};

use super::{Kernel, KernelError};

impl Kernel {
    /// What the owner of the entries says of them.
    pub fn direct_state(&self) -> Result<DirectState, KernelError> {
        Ok(self.maps.direct_state.get(&STATE_OWNER)?.unwrap_or_default())
    }

    /// Says so, as their owner.
    pub fn set_direct_state(&self, state: &DirectState) -> Result<(), KernelError> {
        self.maps.direct_state.set(&STATE_OWNER, state)
    }

    /// Makes entries invalid that are not known to fit this view: said by an agent that is not their owner.
    pub fn outdate_direct(&self, revision: u64) -> Result<(), KernelError> {
        let others = self.maps.direct_state.get(&STATE_OTHERS)?.unwrap_or_default();
        if others.revision >= revision {
            return Ok(());
        }
        let others = DirectState {
            revision,
            ..DirectState::default()
        };
        self.maps.direct_state.set(&STATE_OTHERS, &others)
    }

    /// What every entry is for, whoever wrote it.
    pub fn direct_keys(&self) -> Result<Vec<DirectKey>, KernelError> {
        self.maps.direct.keys()
    }

    /// Lets a source's connections go without the agent from now on.
    pub fn set_direct(&self, key: &DirectKey, entry: &DirectEntry) -> Result<(), KernelError> {
        self.maps.direct.set(key, entry)
    }

    /// Takes a source's next connections to the agent.
    pub fn delete_direct(&self, key: &DirectKey) -> Result<(), KernelError> {
        self.maps.direct.delete(key)
    }

    /// The flows on record: those that are open, and those whose end was not queued.
    pub fn direct_flows(&self) -> Result<Vec<DirectFlow>, KernelError> {
        let mut flows = Vec::new();
        for socket in self.maps.direct_flows.keys()? {
            flows.extend(self.maps.direct_flows.get(&socket)?);
        }
        Ok(flows)
    }

    /// Takes a flow off the record: one whose end was not queued, or that never got under way.
    pub fn take_direct_flow(&self, socket: u64) -> Result<Option<DirectFlow>, KernelError> {
        self.maps.direct_flows.take(&socket)
    }

    /// Takes the flow that closed first.
    pub fn take_ended_flow(&self) -> Result<Option<DirectFlow>, KernelError> {
        self.maps.direct_ended.pop()
    }
}

/// An entry that leads to these endpoints, of which as many count as there are places.
pub fn direct_entry(generation: u64, decision: u64, endpoints: &[DirectEndpoint]) -> DirectEntry {
    let mut entry = DirectEntry {
        generation,
        decision,
        ..DirectEntry::default()
    };
    for (place, endpoint) in entry.endpoints.iter_mut().zip(endpoints) {
        *place = *endpoint;
        entry.count += 1;
    }
    debug_assert!(
        entry
            .endpoints
            .iter()
            .take(entry.count as usize)
            .all(|e| e.address != Endpoint::NONE)
    );
    entry
}

/// The clock that the kernel programs write down: nanoseconds, never set back.
pub fn monotonic_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a system call that fills the structure that it is given.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    debug_assert_eq!(result, 0, "{}", io::Error::last_os_error());
    (time.tv_sec as u64) * 1_000_000_000 + time.tv_nsec as u64
}
