//! The kernel side, seen from the agent: loads the programs, pins them, and speaks to their maps.
//!
//! [`Kernel::attach`] is the agent's first act and [`Kernel::enrol`] the last step of taking a pod in. What is pinned
//! stays when the agent dies, so that a captured pod is refused rather than let through unguarded; the next agent
//! updates the pinned links in place and keeps the pinned maps. Only [`Kernel::remove`] undoes it.
//!
//! All methods take `&self`, are cheap system calls and may be called from any thread. Nothing here knows policy.

mod cgroup;
pub mod direct;
mod guard;
mod hosted;
mod links;
mod load;
pub mod log;
pub mod lost;
mod maps;
pub mod memory;
mod sys;

use std::{
    collections::BTreeSet,
    fmt, fs, io,
    net::{IpAddr, SocketAddr},
    os::fd::{BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use aya_log::EbpfLogger;
use mesh_abi::{
    ABI_VERSION, Addr, Config, Endpoint, FAIL_PASS, FAIL_REFUSE, FlowKey, GUARD_OFF, NODE_ADDRESSES_MAX,
    POD_ADDRESSES_MAX, PodEntry, PortSet, Reason, SteerEntry,
};
use parking_lot::Mutex;

pub use cgroup::{cgroup_id, cgroup2_root, node_addresses, own_cgroup_id};
pub use guard::Stranger;
pub use hosted::HostedCapture;
use links::steer_pin;
use maps::Maps;

/// The oldest kernel that the programs were tested on.
pub const KERNEL_MIN: (u32, u32) = (6, 1);

/// The cookie of a network namespace (`SO_NETNS_COOKIE`): never used again while the machine is up. A pod that shares the
/// node's namespace is known by a number of its own instead: see [`NetnsCookie::hosted`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetnsCookie(pub u64);

impl fmt::Display for NetnsCookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// What the kernel does with an enrolled pod's connections while no agent listens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FailMode {
    /// They are refused at once.
    #[default]
    Refuse,
    /// They go on as if there were no mesh.
    Pass,
    /// They wait in the listeners, which a keeper holds; without a listener they are refused.
    Hold,
}

/// Where and how to attach.
#[derive(Clone, Debug)]
pub struct KernelConfig {
    /// The cgroup2 directory whose processes are looked at: the node's root or a subtree.
    pub cgroup: PathBuf,
    /// The directory on a bpffs that holds pinned maps and links; its name should carry the instance and
    /// [`mesh_abi::ABI_VERSION`]. A bpffs is mounted for it if there is none.
    pub pin_dir: PathBuf,
    /// What happens while no agent listens.
    pub fail_mode: FailMode,
    /// The addresses that the node's kubelet probes from, at most [`NODE_ADDRESSES_MAX`]; see [`node_addresses`]. Those
    /// that become known later are added by [`Kernel::add_node_addresses`].
    pub node_addresses: Vec<IpAddr>,
    /// The node's own network namespace, in which its kubelet lives.
    pub home: NetnsCookie,
    /// Whether debug builds of the programs log each decision.
    pub debug: bool,
}

/// Why the kernel side could not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The kernel lacks what the programs need, such as `bpf_get_netns_cookie` in every hook.
    #[error("kernel {release} is older than {}.{}", KERNEL_MIN.0, KERNEL_MIN.1)]
    TooOld {
        /// The kernel's release.
        release: String,
    },
    /// The bpffs could not be made ready.
    #[error("bpffs for {}", .path.display())]
    Bpffs {
        /// The pin directory, or the mount point.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The cgroup could not be opened or found.
    #[error("cgroup {}", .path.display())]
    Cgroup {
        /// The cgroup's directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The object was refused: the kernel lacks something, or the object is of another ABI version.
    #[error("loading the kernel programs (ABI version {ABI_VERSION})")]
    Load(#[source] Box<aya::EbpfError>),
    /// One program was refused by the verifier.
    #[error("loading kernel program {name}")]
    Program {
        /// The program.
        name: &'static str,
        /// The verifier's reason.
        source: Box<aya::programs::ProgramError>,
    },
    /// The object lacks a program or map of the contract.
    #[error("the kernel object has no {0}")]
    Missing(&'static str),
    /// The pin directory belongs to another version of the contract.
    #[error("{} holds maps of ABI version {found}, this agent speaks {ABI_VERSION}", .pin_dir.display())]
    Abi {
        /// The pin directory.
        pin_dir: PathBuf,
        /// The version found.
        found: u32,
    },
    /// A link could not be made, updated or removed.
    #[error("link {name}")]
    Link {
        /// The link's pin name.
        name: String,
        /// The system's reason.
        source: io::Error,
    },
    /// A map could not be read or written.
    #[error("map {map}")]
    Map {
        /// The map's name.
        map: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// A map is full.
    #[error("map {0} is full")]
    Full(&'static str),
    /// A pod or node has more addresses than an entry holds.
    #[error("more than {max} addresses")]
    TooManyAddresses {
        /// The bound.
        max: usize,
    },
}

/// A pod to be captured: everything that the kernel programs need to know about it.
#[derive(Clone, Copy, Debug)]
pub struct PodCapture<'a> {
    /// The cookie of the pod's network namespace.
    pub cookie: NetnsCookie,
    /// The pod's network namespace.
    pub netns: BorrowedFd<'a>,
    /// The pod's addresses, the primary one first.
    pub addresses: &'a [IpAddr],
    /// Where the agent listens for captured IPv4 connections, in the pod's network namespace.
    pub outbound_v4: Option<SocketAddr>,
    /// The same for IPv6; none where the namespace has no IPv6.
    pub outbound_v6: Option<SocketAddr>,
    /// A listening socket (of a `SO_REUSEPORT` group) for steered IPv4 connections.
    pub inbound_v4: Option<BorrowedFd<'a>>,
    /// The same for IPv6.
    pub inbound_v6: Option<BorrowedFd<'a>>,
    /// Destination ports that are not captured.
    pub exclude_outbound: PortSet,
    /// Local ports that are not steered.
    pub exclude_inbound: PortSet,
    /// Ports that the node's kubelet probes.
    pub probes: PortSet,
}

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapGauge {
    /// The map's name.
    pub map: &'static str,
    /// Entries in it now.
    pub entries: u64,
    /// Its bound.
    pub max: u64,
}

/// How often the kernel programs gave a reason since they were first attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReasonCount {
    /// The reason.
    pub reason: Reason,
    /// How often, over all CPUs.
    pub count: u64,
}

/// Reads the kernel programs' log lines into the `log` facade, which tracing-subscriber takes in.
pub type KernelLogger = EbpfLogger<&'static dyn ::log::Log>;

/// The loaded and attached kernel programs of one agent.
pub struct Kernel {
    maps: Arc<Maps>,
    steer_program: OwnedFd,
    pin_dir: PathBuf,
    /// Enrolment and retirement write several maps; one at a time.
    writer: Mutex<()>,
    /// Presented peers: see [`Peers`].
    peers: Arc<Peers>,
    /// The listeners of pods that share the node's namespace.
    hosted: hosted::Listeners,
    logger: Mutex<Option<KernelLogger>>,
    /// Shared lock on the pin directory: tells the next agent that this one lives.
    _generation: fs::File,
    resumed: bool,
}

/// The presented peers. A port may be bound again as soon as a socket is closed, that is before the guard of its last
/// use is dropped: each presentation has a tag, and a guard removes its own only.
struct Peers {
    maps: Arc<Maps>,
    next_tag: Mutex<u16>,
}

/// Shows a source's address to a destination's application; the entry goes when this is dropped.
#[must_use]
pub struct PeerGuard {
    peers: Arc<Peers>,
    key: FlowKey,
    tag: u16,
}

impl Peers {
    fn present(&self, key: &FlowKey, shown: SocketAddr) -> Result<u16, KernelError> {
        let mut next_tag = self.next_tag.lock();
        *next_tag = next_tag.wrapping_add(1);
        let entry = Endpoint {
            tag: *next_tag,
            ..shown.into()
        };
        self.maps.peers.set(key, &entry)?;
        Ok(entry.tag)
    }

    fn withdraw(&self, key: &FlowKey, tag: u16) -> Result<(), KernelError> {
        let _nobody_presents = self.next_tag.lock();
        match self.maps.peers.get(key)? {
            Some(entry) if entry.tag == tag => self.maps.peers.delete(key),
            _ => Ok(()),
        }
    }
}

impl Drop for PeerGuard {
    fn drop(&mut self) {
        if let Err(error) = self.peers.withdraw(&self.key, self.tag) {
            tracing::warn!(%error, "removing a presented peer");
        }
    }
}

impl Kernel {
    /// Loads the programs, pins maps and links, and takes over what an earlier agent left pinned.
    ///
    /// Needs root and a kernel of [`KERNEL_MIN`] or later. When this returns, pods enrolled by an earlier agent are captured
    /// still; none is enrolled anew.
    pub fn attach(config: &KernelConfig) -> Result<Kernel, KernelError> {
        let entry = config_entry(config)?;
        load::attach(config, &entry)
    }

    /// Detaches everything that is pinned in the directory, unpins it and removes the directory. Pods go on as if
    /// there were no mesh. A directory that does not exist is no error.
    pub fn remove(pin_dir: &Path) -> Result<(), KernelError> {
        links::remove(pin_dir)
    }

    /// Whether an earlier agent's pinned maps were found and kept.
    pub fn resumed(&self) -> bool {
        self.resumed
    }

    /// The pin directory.
    pub fn pin_dir(&self) -> &Path {
        &self.pin_dir
    }

    /// Adds addresses that the node's kubelet probes from to those it was attached with. What exceeds
    /// [`NODE_ADDRESSES_MAX`] is left out: probes from there are judged like any other connection.
    pub fn add_node_addresses(&self, ips: &[IpAddr]) -> Result<(), KernelError> {
        let _writer = self.writer.lock();
        let old = self.maps.config.get(&0)?.unwrap_or_default();
        let mut new = old;
        for addr in ips.iter().map(|ip| Addr::from(*ip)) {
            if new.is_node(&addr) {
                continue;
            }
            match new.node.iter_mut().find(|place| place.is_none()) {
                Some(place) => *place = addr,
                None => tracing::warn!(ip = %IpAddr::from(addr), "more than {NODE_ADDRESSES_MAX} node addresses"),
            }
        }
        if new == old {
            Ok(())
        } else {
            self.maps.config.set(&0, &new)
        }
    }

    /// Captures a pod, or changes what is known about a captured one in place; live connections are not touched.
    ///
    /// Outbound is taken first: if a later step fails, the pod's connections are refused rather than let through.
    pub fn enrol(&self, pod: &PodCapture<'_>) -> Result<(), KernelError> {
        let addresses = pod_addresses(pod.addresses)?;
        let _writer = self.writer.lock();
        let old = self.maps.pods.get(&pod.cookie.0)?;
        let entry = PodEntry {
            agent4: pod.outbound_v4.map_or(Endpoint::NONE, Endpoint::from),
            agent6: pod.outbound_v6.map_or(Endpoint::NONE, Endpoint::from),
            addresses,
            exclude_outbound: pod.exclude_outbound,
        };
        self.maps.pods.set(&pod.cookie.0, &entry)?;
        let steer = SteerEntry {
            netns: pod.cookie.0,
            probes: pod.probes,
            exclude_inbound: pod.exclude_inbound,
        };
        for addr in addresses.iter().filter(|addr| !addr.is_none()) {
            let listener = if addr.is_v4() { pod.inbound_v4 } else { pod.inbound_v6 };
            match listener {
                Some(listener) => self.maps.listeners.set(addr, listener)?,
                None => self.maps.listeners.delete(addr)?,
            }
            self.maps.steer.set(addr, &steer)?;
        }
        links::steer(&self.pin_dir, pod.cookie, &self.steer_program, pod.netns)?;
        for gone in old.iter().flat_map(|old| &old.addresses) {
            if !gone.is_none() && !addresses.contains(gone) {
                self.forget_address(gone, pod.cookie)?;
            }
        }
        Ok(())
    }

    /// Lets a pod go: its next connections are direct again. Live ones are not touched. A pod that is not captured
    /// is no error.
    pub fn retire(&self, cookie: NetnsCookie) -> Result<(), KernelError> {
        let _writer = self.writer.lock();
        if let Some(cgroup_id) = cookie.cgroup_id() {
            return self.maps.hosted.delete(&cgroup_id);
        }
        links::unpin(&self.pin_dir.join(steer_pin(cookie)))?;
        self.forget_pod(cookie)
    }

    /// Every pod that is captured now, also those that an earlier agent enrolled.
    pub fn enrolled(&self) -> Result<BTreeSet<NetnsCookie>, KernelError> {
        let hosted = self.maps.hosted.keys()?.into_iter().map(NetnsCookie::hosted);
        Ok(self
            .maps
            .pods
            .keys()?
            .into_iter()
            .map(NetnsCookie)
            .chain(hosted)
            .collect())
    }

    /// The destination that a captured connection asked for, by the namespace and the address of its source as
    /// `accept` gave it. Taken once; `None` means that the kernel holds none, and the connection must be refused.
    pub fn take_original_destination(&self, cookie: NetnsCookie, source: SocketAddr) -> Option<SocketAddr> {
        let key = match cookie.cgroup_id() {
            Some(cgroup_id) => self.hosted.flow_key(cgroup_id, source)?,
            None => FlowKey::new(cookie.0, source.into()),
        };
        match self.maps.flows.take(&key) {
            Ok(destination) => destination.map(SocketAddr::from),
            Err(error) => {
                tracing::warn!(%error, %cookie, %source, "taking an original destination");
                None
            }
        }
    }

    /// Shows `shown` as the peer of the connection which the agent's socket at `local`, in the namespace, is about to
    /// make to the pod's application. Call it between `bind` and `connect`; keep the guard as long as the connection.
    pub fn present_peer(
        &self,
        cookie: NetnsCookie,
        local: SocketAddr,
        shown: SocketAddr,
    ) -> Result<PeerGuard, KernelError> {
        let key = FlowKey::new(cookie.0, local.into());
        let tag = self.peers.present(&key, shown)?;
        Ok(PeerGuard {
            peers: self.peers.clone(),
            key,
            tag,
        })
    }

    /// How full each bounded map is. Walks the maps: for a scrape, not for the data path.
    pub fn gauges(&self) -> Vec<MapGauge> {
        self.maps.gauges()
    }

    /// How often each reason was given, over all CPUs.
    pub fn reasons(&self) -> Result<Vec<ReasonCount>, KernelError> {
        self.maps.reasons()
    }

    /// The log lines of the kernel programs, once; `None` when they do not log. Debug builds with
    /// [`KernelConfig::debug`] only.
    pub fn take_logger(&self) -> Option<KernelLogger> {
        self.logger.lock().take()
    }

    /// Forgets an address unless it belongs to another pod by now.
    fn forget_address(&self, addr: &Addr, cookie: NetnsCookie) -> Result<(), KernelError> {
        if self.maps.steer.get(addr)?.is_some_and(|entry| entry.netns == cookie.0) {
            self.maps.steer.delete(addr)?;
            self.maps.listeners.delete(addr)?;
        }
        Ok(())
    }

    fn forget_pod(&self, cookie: NetnsCookie) -> Result<(), KernelError> {
        let Some(entry) = self.maps.pods.get(&cookie.0)? else {
            return Ok(());
        };
        self.maps.pods.delete(&cookie.0)?;
        for addr in entry.addresses.iter().filter(|addr| !addr.is_none()) {
            self.forget_address(addr, cookie)?;
        }
        Ok(())
    }

    /// Removes what belongs to network namespaces that are gone, and points the steering links of the living at
    /// this agent's program. `alone` says that no other agent lives, so that every presented peer is dead too.
    fn sweep(&self, alone: bool) -> Result<(), KernelError> {
        let alive = links::update_steering(&self.pin_dir, &self.steer_program)?;
        for cookie in self.maps.pods.keys()?.into_iter().map(NetnsCookie) {
            if !alive.contains(&cookie) {
                tracing::info!(%cookie, "sweeping a dead pod");
                self.forget_pod(cookie)?;
            }
        }
        for addr in self.maps.steer.keys()? {
            let entry = self.maps.steer.get(&addr)?;
            if entry.is_some_and(|entry| !alive.contains(&NetnsCookie(entry.netns))) {
                self.maps.steer.delete(&addr)?;
                self.maps.listeners.delete(&addr)?;
            }
        }
        for flow in self.direct_flows()? {
            // A namespace that is gone has taken its sockets along; what has closed is still to be told.
            if flow.closed == 0 && !alive.contains(&NetnsCookie(flow.netns)) {
                self.maps.direct_flows.delete(&flow.socket)?;
            }
        }
        for key in self.maps.peers.keys()? {
            if alone || !alive.contains(&NetnsCookie(key.netns)) {
                self.maps.peers.delete(&key)?;
            }
        }
        Ok(())
    }
}

fn config_entry(config: &KernelConfig) -> Result<Config, KernelError> {
    if config.node_addresses.len() > NODE_ADDRESSES_MAX {
        return Err(KernelError::TooManyAddresses {
            max: NODE_ADDRESSES_MAX,
        });
    }
    let mut node = [Addr::NONE; NODE_ADDRESSES_MAX];
    for (place, ip) in node.iter_mut().zip(&config.node_addresses) {
        *place = (*ip).into();
    }
    Ok(Config {
        abi_version: ABI_VERSION,
        fail_mode: match config.fail_mode {
            FailMode::Refuse | FailMode::Hold => FAIL_REFUSE,
            FailMode::Pass => FAIL_PASS,
        },
        debug: config.debug.into(),
        guard: GUARD_OFF,
        home: config.home.0,
        node,
    })
}

fn pod_addresses(ips: &[IpAddr]) -> Result<[Addr; POD_ADDRESSES_MAX], KernelError> {
    if ips.len() > POD_ADDRESSES_MAX {
        return Err(KernelError::TooManyAddresses { max: POD_ADDRESSES_MAX });
    }
    let mut addresses = [Addr::NONE; POD_ADDRESSES_MAX];
    for (place, ip) in addresses.iter_mut().zip(ips) {
        *place = (*ip).into();
    }
    Ok(addresses)
}
