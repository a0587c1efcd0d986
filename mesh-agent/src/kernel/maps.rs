//! A typed handle per map: the one place in user space that knows each map's key and value.
//!
//! A handle is a descriptor of its own, so it outlives the loaded object and may be used from any thread. Missing
//! entries are `None`, never errors.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::{io, marker::PhantomData, os::fd::OwnedFd};

use aya::Pod;
use mesh_abi::{
    Addr, Config, Endpoint, FlowKey, PodEntry, Reason, SteerEntry,
    announce::{Announcement, Tuple},
    direct::{DirectEntry, DirectFlow, DirectKey, DirectState},
    maps as names,
};

use super::{KernelError, MapGauge, ReasonCount, sys};

/// A hash or array map with keys `K` and values `V`.
pub struct Map<K, V> {
    fd: OwnedFd,
    name: &'static str,
    max: u32,
    kinds: PhantomData<fn(K) -> V>,
}

/// Every map of the contract that user space reads or writes.
pub struct Maps {
    pub config: Map<u32, Config>,
    pub agents: Map<u64, u64>,
    pub guarded: Map<u64, u64>,
    pub known: Map<u64, u64>,
    pub strangers: Map<u64, u64>,
    pub pods: Map<u64, PodEntry>,
    pub hosted: Map<u64, PodEntry>,
    pub steer: Map<Addr, SteerEntry>,
    pub listeners: Listeners,
    pub flows: Map<FlowKey, Endpoint>,
    pub peers: Map<FlowKey, Endpoint>,
    pub announced: Map<Tuple, Announcement>,
    pub direct_state: Map<u32, DirectState>,
    pub direct: Map<DirectKey, DirectEntry>,
    pub direct_flows: Map<u64, DirectFlow>,
    pub direct_ended: Queue<DirectFlow>,
    pub reasons: Map<u32, u64>,
}

/// A queue of values `V`.
pub struct Queue<V> {
    fd: OwnedFd,
    name: &'static str,
    kinds: PhantomData<fn() -> V>,
}

/// The socket hash: addresses to listening sockets.
pub struct Listeners(Map<Addr, u32>);

impl<K: Pod, V: Pod> Map<K, V> {
    /// A handle of a map which the loaded object declares with exactly these types.
    pub fn new(fd: OwnedFd, name: &'static str, max: u32) -> Map<K, V> {
        Map {
            fd,
            name,
            max,
            kinds: PhantomData,
        }
    }

    fn error(&self, source: io::Error) -> KernelError {
        match source.raw_os_error() {
            Some(libc::E2BIG | libc::ENOSPC) => KernelError::Full(self.name),
            _ => KernelError::Map { map: self.name, source },
        }
    }

    /// The value of a key.
    pub fn get(&self, key: &K) -> Result<Option<V>, KernelError> {
        // SAFETY: `K` and `V` are the map's own types; both are plain data.
        unsafe { sys::lookup(&self.fd, key, false) }.map_err(|error| self.error(error))
    }

    /// The value of a key, which is removed.
    pub fn take(&self, key: &K) -> Result<Option<V>, KernelError> {
        // SAFETY: as in `get`.
        unsafe { sys::lookup(&self.fd, key, true) }.map_err(|error| self.error(error))
    }

    /// Sets the value of a key.
    pub fn set(&self, key: &K, value: &V) -> Result<(), KernelError> {
        // SAFETY: as in `get`.
        unsafe { sys::update(&self.fd, key, value) }.map_err(|error| self.error(error))
    }

    /// Removes a key; one that is not there is no error.
    pub fn delete(&self, key: &K) -> Result<(), KernelError> {
        // SAFETY: as in `get`.
        unsafe { sys::delete(&self.fd, key) }.map_err(|error| self.error(error))
    }

    /// All keys, as far as they are there during the walk. Bounded: a walk that concurrent deletions throw back to
    /// the start ends all the same.
    pub fn keys(&self) -> Result<Vec<K>, KernelError> {
        let mut keys: Vec<K> = Vec::new();
        for _ in 0..2 * u64::from(self.max) {
            // SAFETY: as in `get`.
            match unsafe { sys::next_key(&self.fd, keys.last()) }.map_err(|error| self.error(error))? {
                Some(key) => keys.push(key),
                None => break,
            }
        }
        Ok(keys)
    }

    fn gauge(&self) -> Result<MapGauge, KernelError> {
        Ok(MapGauge {
            map: self.name,
            entries: self.keys()?.len() as u64,
            max: self.max.into(),
        })
    }
}

impl<V: Pod> Queue<V> {
    /// A handle of a queue which the loaded object declares with exactly this type.
    pub fn new(fd: OwnedFd, name: &'static str) -> Queue<V> {
        Queue {
            fd,
            name,
            kinds: PhantomData,
        }
    }

    /// The first value, which is removed.
    pub fn pop(&self) -> Result<Option<V>, KernelError> {
        // SAFETY: `V` is the map's own type; it is plain data.
        unsafe { sys::pop(&self.fd) }.map_err(|source| KernelError::Map { map: self.name, source })
    }
}

impl Listeners {
    /// A handle of the socket hash.
    pub fn new(fd: OwnedFd) -> Listeners {
        Listeners(Map::new(fd, names::LISTENERS, names::STEER_MAX))
    }

    /// Steers the address's connections to a listening socket, or to the `SO_REUSEPORT` group that it belongs to.
    pub fn set(&self, addr: &Addr, listener: BorrowedFd<'_>) -> Result<(), KernelError> {
        self.0.set(addr, &listener.as_raw_fd().cast_unsigned())
    }

    /// Steers the address's connections nowhere.
    pub fn delete(&self, addr: &Addr) -> Result<(), KernelError> {
        match self.0.delete(addr) {
            // A listener that was closed has left the map by itself; the kernel says so in its own way.
            Err(KernelError::Map { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            result => result,
        }
    }
}

impl Maps {
    /// How full the bounded maps are; a map that cannot be walked is left out.
    pub fn gauges(&self) -> Vec<MapGauge> {
        let gauges = [
            self.agents.gauge(),
            self.known.gauge(),
            self.strangers.gauge(),
            self.pods.gauge(),
            self.hosted.gauge(),
            self.steer.gauge(),
            self.listeners.0.gauge(),
            self.flows.gauge(),
            self.peers.gauge(),
            self.direct.gauge(),
            self.direct_flows.gauge(),
            self.announced.gauge(),
        ];
        gauges
            .into_iter()
            .filter_map(|gauge| gauge.inspect_err(|error| tracing::warn!(%error, "walking a map")).ok())
            .collect()
    }

    /// The sum over all CPUs of each reason's count.
    pub fn reasons(&self) -> Result<Vec<ReasonCount>, KernelError> {
        let cpus = aya::util::nr_cpus().map_err(|(_, source)| KernelError::Map {
            map: names::REASONS,
            source,
        })?;
        let mut values = vec![0_u64; cpus];
        let mut counts = Vec::with_capacity(Reason::ALL.len());
        for reason in Reason::ALL {
            // SAFETY: the key is a u32, and there is one 8-byte value for each possible CPU.
            unsafe { sys::lookup_per_cpu(&self.reasons.fd, &(reason as u32), &mut values) }
                .map_err(|error| self.reasons.error(error))?;
            counts.push(ReasonCount {
                reason,
                count: values.iter().sum(),
            });
        }
        Ok(counts)
    }
}
