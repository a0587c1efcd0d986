//! Where we are: the agent's own cgroup, the node's cgroup2 root, the node's addresses, and the bpffs.
//!
//! The agent's sockets are told from a pod's by mark and cgroup together: a pod may set the mark if it holds
//! CAP_NET_ADMIN, but it is not in the agent's cgroup. (Process ids would not do: pid namespaces renumber them.)

use std::{
    ffi::{CStr, CString},
    fs, io,
    mem::MaybeUninit,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::{
        fd::AsRawFd,
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::{Component, Path, PathBuf},
    ptr,
};

use mesh_abi::NODE_ADDRESSES_MAX;

use super::KernelError;

const BPF_FS_MAGIC: libc::c_long = 0xcafe_4a11;

/// The id of a cgroup2 directory, as `bpf_get_current_cgroup_id` returns it: the inode.
pub fn cgroup_id(path: &Path) -> Result<u64, KernelError> {
    fs::metadata(path)
        .map(|metadata| metadata.ino())
        .map_err(|source| KernelError::Cgroup {
            path: path.to_owned(),
            source,
        })
}

/// The mounts of the cgroup2 hierarchy in a `mountinfo`: the mount point, and the root of that mount within the
/// hierarchy. A container may see several, one of them the host's.
fn cgroup2_mounts(mountinfo: &str) -> Vec<(PathBuf, PathBuf)> {
    let mounts = mountinfo.lines().filter_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        kind.starts_with("cgroup2 ")
            .then(|| (PathBuf::from(point), PathBuf::from(root)))
    });
    mounts.collect()
}

fn read(path: &Path) -> Result<String, KernelError> {
    fs::read_to_string(path).map_err(|source| KernelError::Cgroup {
        path: path.to_owned(),
        source,
    })
}

fn none(path: &str, what: &str) -> KernelError {
    KernelError::Cgroup {
        path: path.into(),
        source: io::Error::new(io::ErrorKind::NotFound, what),
    }
}

/// The root of the cgroup2 hierarchy, as far as this process sees it.
pub fn cgroup2_root() -> Result<PathBuf, KernelError> {
    let mounts = cgroup2_mounts(&read(Path::new("/proc/self/mountinfo"))?);
    highest(&mounts).ok_or_else(|| none("/proc/self/mountinfo", "no cgroup2 file system is mounted"))
}

/// The mount whose root is nearest to the hierarchy's: in a container, the host's mount and not its own. Of several
/// at one point the last one is seen.
fn highest(mounts: &[(PathBuf, PathBuf)]) -> Option<PathBuf> {
    let rank = |root: &Path| {
        let up = root.components().filter(|part| *part == Component::ParentDir).count();
        let down = root.components().count() - up;
        (up, std::cmp::Reverse(down))
    };
    let best = mounts.iter().max_by_key(|(_, root)| rank(root));
    best.map(|(point, _)| point.clone())
}

/// Where a process whose line in `/proc/<pid>/cgroup` names `own` is to be found below the mounts.
fn places(mounts: &[(PathBuf, PathBuf)], own: &str) -> Vec<PathBuf> {
    let places = mounts.iter().filter_map(|(point, root)| {
        let below = Path::new(own).strip_prefix(root).ok()?;
        Some(point.join(below))
    });
    places.collect()
}

/// The id of the cgroup2 that this process is in.
///
/// In a cgroup namespace of its own, a container does not see its place in the host's mount; then it is looked for
/// from the first process's namespace, which is the host's for a container with the host's processes.
pub fn own_cgroup_id() -> Result<u64, KernelError> {
    match own_cgroup_id_here() {
        Ok(id) => Ok(id),
        Err(error) => {
            let thread = std::thread::spawn(|| {
                enter_cgroup_namespace(Path::new("/proc/1/ns/cgroup")).ok()?;
                own_cgroup_id_here().ok()
            });
            thread.join().ok().flatten().ok_or(error)
        }
    }
}

fn own_cgroup_id_here() -> Result<u64, KernelError> {
    let text = read(Path::new("/proc/thread-self/cgroup"))?;
    let own = text
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .ok_or_else(|| none("/proc/self/cgroup", "this process is in no cgroup2"))?;
    let mounts = cgroup2_mounts(&read(Path::new("/proc/thread-self/mountinfo"))?);
    places(&mounts, own)
        .iter()
        // One mount may cover another: only where this process is listed, it is.
        .filter(|place| lists_this_process(place))
        .find_map(|place| cgroup_id(place).ok())
        .ok_or_else(|| none(own, "this process's cgroup2 is below no mount of the hierarchy"))
}

fn lists_this_process(cgroup: &Path) -> bool {
    let own = std::process::id();
    fs::read_to_string(cgroup.join("cgroup.procs")).is_ok_and(|list| list.lines().any(|line| line.parse() == Ok(own)))
}

/// Takes the calling thread into another cgroup namespace, for good.
fn enter_cgroup_namespace(path: &Path) -> io::Result<()> {
    let namespace = fs::File::open(path)?;
    // SAFETY: a system call on a descriptor that is open; it changes the calling thread only.
    match unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWCGROUP) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The node's addresses, from the interfaces of the calling process's network namespace: without loopback and
/// link-local ones, at most [`NODE_ADDRESSES_MAX`].
pub fn node_addresses() -> io::Result<Vec<IpAddr>> {
    let mut list: *mut libc::ifaddrs = ptr::null_mut();
    // SAFETY: `list` is a valid place for the pointer.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut addresses = Vec::new();
    let mut next = list;
    // SAFETY: the list is the kernel's, ends with a null pointer, and is freed only below.
    while let Some(entry) = unsafe { next.as_ref() } {
        next = entry.ifa_next;
        // kube-proxy keeps the addresses of all Services on an interface, in one of its modes: nobody calls from there.
        // SAFETY: `ifa_name` is a C string of the list.
        if unsafe { CStr::from_ptr(entry.ifa_name) } == c"kube-ipvs0" {
            continue;
        }
        // SAFETY: `ifa_addr` is null or points to an address of the family that it names.
        let Some(ip) = (unsafe { ip_of(entry.ifa_addr) }) else {
            continue;
        };
        let is_usable = match ip {
            IpAddr::V4(ip) => !ip.is_loopback(),
            IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
        };
        if is_usable && !addresses.contains(&ip) && addresses.len() < NODE_ADDRESSES_MAX {
            addresses.push(ip);
        }
    }
    // SAFETY: `list` came from `getifaddrs` and is freed once.
    unsafe { libc::freeifaddrs(list) };
    Ok(addresses)
}

/// # Safety
/// `address` must be null or point to a socket address of the family that it names.
unsafe fn ip_of(address: *const libc::sockaddr) -> Option<IpAddr> {
    // SAFETY: by the caller's promise; every socket address begins with its family.
    let family = unsafe { address.as_ref() }?.sa_family;
    match i32::from(family) {
        libc::AF_INET => {
            // SAFETY: the family says that this is a `sockaddr_in`.
            let address = unsafe { &*address.cast::<libc::sockaddr_in>() };
            Some(Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: the family says that this is a `sockaddr_in6`.
            let address = unsafe { &*address.cast::<libc::sockaddr_in6>() };
            Some(Ipv6Addr::from(address.sin6_addr.s6_addr).into())
        }
        _ => None,
    }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn is_bpffs(path: &Path) -> io::Result<bool> {
    let path = c_path(path)?;
    let mut stat = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the path is a C string, and the structure is written before it is read.
    if unsafe { libc::statfs(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `statfs` succeeded.
    Ok(unsafe { stat.assume_init() }.f_type == BPF_FS_MAGIC)
}

/// Makes the pin directory, on a bpffs which is mounted if there is none: at `/sys/fs/bpf` for a directory below it,
/// else at the directory's parent.
pub fn ensure_pin_dir(pin_dir: &Path) -> Result<(), KernelError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| KernelError::Bpffs { path, source }
    };
    let existing = pin_dir.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"));
    if !is_bpffs(existing).map_err(failed(existing))? {
        let usual = Path::new("/sys/fs/bpf");
        let point = if pin_dir.starts_with(usual) {
            usual
        } else {
            pin_dir.parent().unwrap_or(pin_dir)
        };
        fs::create_dir_all(point).map_err(failed(point))?;
        let target = c_path(point).map_err(failed(point))?;
        // SAFETY: all arguments are C strings that outlive the call, or null.
        let result = unsafe { libc::mount(c"bpf".as_ptr(), target.as_ptr(), c"bpf".as_ptr(), 0, ptr::null()) };
        if result != 0 {
            return Err(failed(point)(io::Error::last_os_error()));
        }
        tracing::info!(path = %point.display(), "mounted a bpffs");
    }
    fs::create_dir_all(pin_dir).map_err(failed(pin_dir))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::{cgroup2_mounts, highest, places};

    const HYBRID: &str = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw";
    const CONTAINER: &str = "700 600 0:26 /../../.. /host/sys/fs/cgroup rw - cgroup2 cgroup rw
701 600 0:26 / /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw";

    #[test]
    fn the_own_cgroup_is_found_below_the_right_mount() {
        let cases = [
            (HYBRID, "/", vec!["/sys/fs/cgroup/unified/"]),
            (HYBRID, "/lab/agent", vec!["/sys/fs/cgroup/unified/lab/agent"]),
            // In a cgroup namespace of its own, only the namespace's mount speaks of paths as /proc does.
            (CONTAINER, "/", vec!["/sys/fs/cgroup/"]),
            ("", "/", vec![]),
        ];
        for (mountinfo, own, expected) in cases {
            let expected: Vec<PathBuf> = expected.into_iter().map(PathBuf::from).collect();
            assert_eq!(places(&cgroup2_mounts(mountinfo), own), expected, "{own}");
        }
    }

    #[test]
    fn the_hosts_mount_is_told_from_the_containers_own() {
        let covered = "700 600 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup rw
701 600 0:26 /../../.. /sys/fs/cgroup rw - cgroup2 cgroup rw";
        let shared = "700 600 0:26 /kubepods/pod1/c /sys/fs/cgroup ro - cgroup2 cgroup rw
701 600 0:26 / /host/cgroup rw - cgroup2 cgroup rw";
        let cases = [
            (HYBRID, Some("/sys/fs/cgroup/unified")),
            (CONTAINER, Some("/host/sys/fs/cgroup")),
            (covered, Some("/sys/fs/cgroup")),
            (shared, Some("/host/cgroup")),
            ("", None),
        ];
        for (mountinfo, expected) in cases {
            assert_eq!(
                highest(&cgroup2_mounts(mountinfo)),
                expected.map(PathBuf::from),
                "{mountinfo}"
            );
        }
    }
}
