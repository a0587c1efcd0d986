//! Attaching: check the contract, load the object over pinned maps, then swap or make each link.
//!
//! Order matters. Maps and settings are right before a program runs; the links come last. The pin directory carries
//! an advisory lock, shared by every living agent: who can have it alone knows that no other agent lives.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use aya::{
    Ebpf, EbpfLoader,
    maps::MapData,
    programs::{CgroupSock, CgroupSockAddr, Program, SkLookup, SockOps},
};
use aya_log::EbpfLogger;
use mesh_abi::{ABI_SYMBOL, ABI_VERSION, Config, REASONS, direct::STATES, maps as names, programs};
use parking_lot::Mutex;

use super::{
    KERNEL_MIN, Kernel, KernelConfig, KernelError, KernelLogger, Peers, cgroup, hosted, links,
    maps::{Listeners, Map, Maps, Queue},
    sys::{self, AttachType},
};

/// The kernel programs, compiled by build.rs.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("MESH_EBPF_OBJ"));

/// The programs that are attached to the cgroup, in the order of attachment: who follows sockets must be there before
/// who captures them.
const CGROUP_PROGRAMS: [(&str, AttachType); 8] = [
    (programs::SOCK_OPS, AttachType::SockOps),
    (programs::GETPEERNAME4, AttachType::Getpeername4),
    (programs::GETPEERNAME6, AttachType::Getpeername6),
    (programs::GETSOCKNAME4, AttachType::Getsockname4),
    (programs::GETSOCKNAME6, AttachType::Getsockname6),
    (programs::SOCK_CREATE, AttachType::SockCreate),
    (programs::CONNECT4, AttachType::Connect4),
    (programs::CONNECT6, AttachType::Connect6),
];

pub fn attach(config: &KernelConfig, entry: &Config) -> Result<Kernel, KernelError> {
    let pin_dir = &config.pin_dir;
    check_kernel(&fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default())?;
    cgroup::ensure_pin_dir(pin_dir)?;
    let (generation, alone) = lock(pin_dir)?;
    let resumed = check_abi(pin_dir)?;
    let cgroup_failed = |source| KernelError::Cgroup {
        path: config.cgroup.clone(),
        source,
    };
    let cgroup_dir = File::open(&config.cgroup).map_err(cgroup_failed)?;
    let cgroup_id = cgroup::cgroup_id(&config.cgroup)?;

    let mut ebpf = load_object(pin_dir, config.debug)?;
    let maps = Arc::new(open_maps(&ebpf)?);
    // What an earlier agent guards stays guarded: this one does not know the pods yet.
    let guard = maps.config.get(&0)?.unwrap_or_default().guard;
    maps.config.set(&0, &Config { guard, ..*entry })?;
    announce(&maps, alone)?;

    let steer_program = load_program(&mut ebpf, programs::SK_LOOKUP)?;
    let mut loaded = Vec::with_capacity(CGROUP_PROGRAMS.len());
    for (name, attach_type) in CGROUP_PROGRAMS {
        loaded.push((name, attach_type, load_program(&mut ebpf, name)?));
    }
    let logger = if config.debug { logger(&mut ebpf) } else { None };
    let kernel = Kernel {
        peers: Arc::new(Peers {
            maps: maps.clone(),
            next_tag: Mutex::new(0),
        }),
        maps,
        hosted: hosted::Listeners::new(config.home),
        steer_program,
        pin_dir: pin_dir.clone(),
        writer: Mutex::new(()),
        logger: Mutex::new(logger),
        _generation: generation,
        resumed,
    };
    kernel.sweep(alone)?;
    for (name, attach_type, program) in &loaded {
        links::cgroup(pin_dir, name, program, *attach_type, (&cgroup_dir, cgroup_id))?;
    }
    Ok(kernel)
}

/// Refuses a kernel older than [`KERNEL_MIN`]. A release that cannot be read is tried: loading will tell.
fn check_kernel(release: &str) -> Result<(), KernelError> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) < KERNEL_MIN => Err(KernelError::TooOld {
            release: release.trim().to_owned(),
        }),
        _ => Ok(()),
    }
}

/// Takes the shared lock of a living agent; also says whether there is no other.
fn lock(pin_dir: &Path) -> Result<(File, bool), KernelError> {
    let failed = |source| KernelError::Bpffs {
        path: pin_dir.to_owned(),
        source,
    };
    let dir = File::open(pin_dir).map_err(failed)?;
    let flock = |operation| {
        // SAFETY: a system call on a descriptor that is open.
        match unsafe { libc::flock(dir.as_raw_fd(), operation) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    let alone = flock(libc::LOCK_EX | libc::LOCK_NB).is_ok();
    flock(libc::LOCK_SH).map_err(failed)?;
    Ok((dir, alone))
}

/// Refuses pinned maps of another version; returns whether there are pinned maps at all.
fn check_abi(pin_dir: &Path) -> Result<bool, KernelError> {
    let at = pin_dir.join(names::CONFIG);
    let failed = |source| KernelError::Map {
        map: names::CONFIG,
        source,
    };
    let Some(fd) = sys::open_pinned(&at).map_err(failed)? else {
        return Ok(false);
    };
    let found = Map::<u32, Config>::new(fd, names::CONFIG, 1)
        .get(&0)?
        .unwrap_or_default()
        .abi_version;
    match found {
        0 => Ok(false),
        ABI_VERSION => Ok(true),
        _ => Err(KernelError::Abi {
            pin_dir: pin_dir.to_owned(),
            found,
        }),
    }
}

fn load_object(pin_dir: &Path, is_debug: bool) -> Result<Ebpf, KernelError> {
    let mut loader = EbpfLoader::new();
    // No program reads the kernel's own types, so its BTF is not needed; and the symbol's name carries the version:
    // an object of another version lacks it and is refused here.
    loader.btf(None).override_global(ABI_SYMBOL, &ABI_VERSION, true);
    // Below every level's number: the verifier removes the logging.
    let log_level: u8 = if is_debug { u8::MAX } else { 0 };
    loader.override_global(aya_log::LEVEL, &log_level, false);
    let pins: Vec<(&'static str, PathBuf)> = names::ALL.iter().map(|name| (*name, pin_dir.join(name))).collect();
    for (name, path) in &pins {
        loader.map_pin_path(name, path.as_path());
    }
    loader.load(OBJECT).map_err(|error| KernelError::Load(Box::new(error)))
}

fn map_fd(ebpf: &Ebpf, name: &'static str) -> Result<OwnedFd, KernelError> {
    use aya::maps::Map as Loaded;
    let data: &MapData = match ebpf.map(name) {
        Some(
            Loaded::Array(data)
            | Loaded::HashMap(data)
            | Loaded::LruHashMap(data)
            | Loaded::PerCpuArray(data)
            | Loaded::Queue(data)
            | Loaded::SockHash(data),
        ) => data,
        _ => return Err(KernelError::Missing(name)),
    };
    data.fd()
        .as_fd()
        .try_clone_to_owned()
        .map_err(|source| KernelError::Map { map: name, source })
}

fn open_maps(ebpf: &Ebpf) -> Result<Maps, KernelError> {
    Ok(Maps {
        config: Map::new(map_fd(ebpf, names::CONFIG)?, names::CONFIG, 1),
        agents: Map::new(map_fd(ebpf, names::AGENTS)?, names::AGENTS, names::AGENTS_MAX),
        guarded: Map::new(map_fd(ebpf, names::GUARDED)?, names::GUARDED, names::GUARDED_MAX),
        known: Map::new(map_fd(ebpf, names::KNOWN)?, names::KNOWN, names::KNOWN_MAX),
        strangers: Map::new(map_fd(ebpf, names::STRANGERS)?, names::STRANGERS, names::STRANGERS_MAX),
        pods: Map::new(map_fd(ebpf, names::PODS)?, names::PODS, names::PODS_MAX),
        hosted: Map::new(map_fd(ebpf, names::HOSTED)?, names::HOSTED, names::HOSTED_MAX),
        steer: Map::new(map_fd(ebpf, names::STEER)?, names::STEER, names::STEER_MAX),
        listeners: Listeners::new(map_fd(ebpf, names::LISTENERS)?),
        flows: Map::new(
            map_fd(ebpf, names::ORIG_BY_FLOW)?,
            names::ORIG_BY_FLOW,
            names::FLOWS_MAX,
        ),
        peers: Map::new(map_fd(ebpf, names::PEERS)?, names::PEERS, names::PEERS_MAX),
        announced: Map::new(map_fd(ebpf, names::ANNOUNCED)?, names::ANNOUNCED, names::ANNOUNCED_MAX),
        direct_state: Map::new(map_fd(ebpf, names::DIRECT_STATE)?, names::DIRECT_STATE, STATES),
        direct: Map::new(map_fd(ebpf, names::DIRECT)?, names::DIRECT, names::DIRECT_MAX),
        direct_flows: Map::new(
            map_fd(ebpf, names::DIRECT_FLOWS)?,
            names::DIRECT_FLOWS,
            names::DIRECT_FLOWS_MAX,
        ),
        direct_ended: Queue::new(map_fd(ebpf, names::DIRECT_ENDED)?, names::DIRECT_ENDED),
        reasons: Map::new(map_fd(ebpf, names::REASONS)?, names::REASONS, REASONS),
    })
}

/// Enters the agent's cgroup into the set whose marked sockets pass. Generations of an upgrade live side by side; an
/// agent that is alone forgets the dead ones, and the oldest goes when the set is full.
fn announce(maps: &Maps, alone: bool) -> Result<(), KernelError> {
    let own = cgroup::own_cgroup_id()?;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let mut others = Vec::new();
    for id in maps.agents.keys()? {
        if id != own {
            others.push((maps.agents.get(&id)?.unwrap_or_default(), id));
        }
    }
    others.sort_unstable();
    let excess = if alone {
        others.len()
    } else {
        (others.len() + 1).saturating_sub(names::AGENTS_MAX as usize)
    };
    for (_, id) in others.iter().take(excess) {
        maps.agents.delete(id)?;
    }
    maps.agents.set(&own, &now)
}

fn load_program(ebpf: &mut Ebpf, name: &'static str) -> Result<OwnedFd, KernelError> {
    let failed = |source| KernelError::Program {
        name,
        source: Box::new(source),
    };
    let program = ebpf.program_mut(name).ok_or(KernelError::Missing(name))?;
    match program {
        Program::CgroupSockAddr(program) => CgroupSockAddr::load(program),
        Program::CgroupSock(program) => CgroupSock::load(program),
        Program::SockOps(program) => SockOps::load(program),
        Program::SkLookup(program) => SkLookup::load(program),
        _ => return Err(KernelError::Missing(name)),
    }
    .map_err(failed)?;
    let fd = program.fd().map_err(failed)?;
    fd.as_fd().try_clone_to_owned().map_err(|source| KernelError::Link {
        name: name.to_owned(),
        source,
    })
}

/// The reader of the programs' log lines. A kernel side that cannot log is no reason not to start.
fn logger(ebpf: &mut Ebpf) -> Option<KernelLogger> {
    EbpfLogger::init(ebpf)
        .inspect_err(|error| tracing::warn!(%error, "kernel programs do not log"))
        .ok()
}

#[cfg(test)]
mod tests {
    use super::check_kernel;

    #[test]
    fn old_kernels_are_refused_with_their_name() {
        let cases = [
            ("6.18.44-fc-v669\n", true),
            ("6.1.0-13-cloud-amd64", true),
            ("7.0", true),
            ("5.15.0", false),
            ("6.0.19", false),
            ("unreadable", true),
        ];
        for (release, good) in cases {
            assert_eq!(check_kernel(release).is_ok(), good, "{release}");
        }
        let error = check_kernel("5.10.0-28\n").unwrap_err();
        assert_eq!(error.to_string(), "kernel 5.10.0-28 is older than 6.1");
    }
}
