//! The `bpf(2)` commands that the agent needs, by raw system call: map elements, pins and links.
//!
//! aya loads the object; it has no way to update a link's program or to detach one, and its map handles borrow the
//! loaded object. Every function here is one system call on descriptors that the caller owns.

use std::{
    ffi::CString,
    io,
    mem::{MaybeUninit, size_of},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
const BPF_MAP_GET_NEXT_KEY: libc::c_int = 4;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_MAP_LOOKUP_AND_DELETE_ELEM: libc::c_int = 21;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;
const BPF_LINK_DETACH: libc::c_int = 34;

/// `enum bpf_attach_type` of our programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum AttachType {
    SockCreate = 2,
    SockOps = 3,
    Connect4 = 10,
    Connect6 = 11,
    Getpeername4 = 29,
    Getpeername6 = 30,
    Getsockname4 = 31,
    Getsockname6 = 32,
    SkLookup = 36,
}

/// What a link is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkTarget {
    /// The cgroup of that id; 0 when it is gone.
    Cgroup(u64),
    /// The network namespace of that inode; 0 when it is gone.
    Netns(u32),
    /// Something that is not ours.
    Other,
}

#[repr(C)]
struct Elem {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct Object {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

#[repr(C)]
struct Create {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
struct Update {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

#[repr(C)]
struct Detach {
    link_fd: u32,
}

#[repr(C)]
struct InfoByFd {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// The head of `struct bpf_link_info`, with the union read as the cgroup's or the netns's member.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    prog_id: u32,
    pad: u32,
    target: [u8; 16],
}

const LINK_TYPE_CGROUP: u32 = 3;
const LINK_TYPE_NETNS: u32 = 5;

/// # Safety
/// `attr` must be the attribute structure of `command`, and every pointer in it must be valid for what the kernel
/// reads and writes there.
unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the caller vouches for the attribute; the size is that of the structure passed.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn raw(fd: &impl AsFd) -> u32 {
    fd.as_fd().as_raw_fd().cast_unsigned()
}

fn address<T>(value: &T) -> u64 {
    std::ptr::from_ref(value) as u64
}

fn is_missing(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOENT)
}

/// Reads an element into `value`, which is returned; `None` when there is none.
///
/// # Safety
/// `K` and `V` must be plain integers of exactly the map's key and value size (for a per-CPU map: all CPUs' values).
pub unsafe fn lookup<K, V>(map: &impl AsFd, key: &K, take: bool) -> io::Result<Option<V>> {
    let mut value = MaybeUninit::<V>::uninit();
    let mut attr = Elem {
        map_fd: raw(map),
        pad: 0,
        key: address(key),
        value: value.as_mut_ptr() as u64,
        flags: 0,
    };
    let command = if take {
        BPF_MAP_LOOKUP_AND_DELETE_ELEM
    } else {
        BPF_MAP_LOOKUP_ELEM
    };
    // SAFETY: key and value have the map's sizes by the caller's promise.
    match unsafe { bpf(command, &mut attr) } {
        // SAFETY: the kernel filled the whole value.
        Ok(_) => Ok(Some(unsafe { value.assume_init() })),
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Takes the first value out of a queue; `None` when it is empty.
///
/// # Safety
/// `V` must be plain integers of exactly the map's value size.
pub unsafe fn pop<V>(queue: &impl AsFd) -> io::Result<Option<V>> {
    let mut value = MaybeUninit::<V>::uninit();
    let mut attr = Elem {
        map_fd: raw(queue),
        pad: 0,
        key: 0,
        value: value.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: the value has the map's size by the caller's promise; a queue has no key.
    match unsafe { bpf(BPF_MAP_LOOKUP_AND_DELETE_ELEM, &mut attr) } {
        // SAFETY: the kernel filled the whole value.
        Ok(_) => Ok(Some(unsafe { value.assume_init() })),
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads the values of all CPUs into the slice.
///
/// # Safety
/// `K` must have the map's key size, and `values` must have a place for each possible CPU's 8-byte value.
pub unsafe fn lookup_per_cpu<K>(map: &impl AsFd, key: &K, values: &mut [u64]) -> io::Result<()> {
    let mut attr = Elem {
        map_fd: raw(map),
        pad: 0,
        key: address(key),
        value: values.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: sizes by the caller's promise.
    unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut attr) }.map(drop)
}

/// Writes an element.
///
/// # Safety
/// `K` and `V` must be plain integers of exactly the map's key and value size.
pub unsafe fn update<K, V>(map: &impl AsFd, key: &K, value: &V) -> io::Result<()> {
    let mut attr = Elem {
        map_fd: raw(map),
        pad: 0,
        key: address(key),
        value: address(value),
        flags: 0,
    };
    // SAFETY: sizes by the caller's promise.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attr) }.map(drop)
}

/// Deletes an element; one that is not there is no error.
///
/// # Safety
/// `K` must be plain integers of exactly the map's key size.
pub unsafe fn delete<K>(map: &impl AsFd, key: &K) -> io::Result<()> {
    let mut attr = Elem {
        map_fd: raw(map),
        pad: 0,
        key: address(key),
        value: 0,
        flags: 0,
    };
    // SAFETY: size by the caller's promise.
    match unsafe { bpf(BPF_MAP_DELETE_ELEM, &mut attr) } {
        Err(error) if !is_missing(&error) => Err(error),
        _ => Ok(()),
    }
}

/// The key after `key`, or the first one.
///
/// # Safety
/// `K` must be plain integers of exactly the map's key size.
pub unsafe fn next_key<K>(map: &impl AsFd, key: Option<&K>) -> io::Result<Option<K>> {
    let mut next = MaybeUninit::<K>::uninit();
    let mut attr = Elem {
        map_fd: raw(map),
        pad: 0,
        key: key.map_or(0, address),
        value: next.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: sizes by the caller's promise.
    match unsafe { bpf(BPF_MAP_GET_NEXT_KEY, &mut attr) } {
        // SAFETY: the kernel filled the whole key.
        Ok(_) => Ok(Some(unsafe { next.assume_init() })),
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn owned(fd: libc::c_long) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us; descriptors fit an i32.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

/// Pins a link at a path on a bpffs.
pub fn pin(object: &impl AsFd, at: &Path) -> io::Result<()> {
    let at = path(at)?;
    let mut attr = Object {
        pathname: at.as_ptr() as u64,
        bpf_fd: raw(object),
        file_flags: 0,
    };
    // SAFETY: the path is a C string that outlives the call.
    unsafe { bpf(BPF_OBJ_PIN, &mut attr) }.map(drop)
}

/// Opens a pinned map or link; `None` when nothing is pinned there.
pub fn open_pinned(at: &Path) -> io::Result<Option<OwnedFd>> {
    let at = path(at)?;
    let mut attr = Object {
        pathname: at.as_ptr() as u64,
        bpf_fd: 0,
        file_flags: 0,
    };
    // SAFETY: the path is a C string that outlives the call.
    match unsafe { bpf(BPF_OBJ_GET, &mut attr) } {
        Ok(fd) => Ok(Some(owned(fd))),
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Attaches a program to a cgroup or network namespace.
pub fn link(program: &impl AsFd, target: &impl AsFd, attach_type: AttachType) -> io::Result<OwnedFd> {
    let mut attr = Create {
        prog_fd: raw(program),
        target_fd: raw(target),
        attach_type: attach_type as u32,
        flags: 0,
    };
    // SAFETY: the attribute holds integers only.
    unsafe { bpf(BPF_LINK_CREATE, &mut attr) }.map(owned)
}

/// Swaps a link's program atomically.
pub fn update_link(link: &impl AsFd, program: &impl AsFd) -> io::Result<()> {
    let mut attr = Update {
        link_fd: raw(link),
        new_prog_fd: raw(program),
        flags: 0,
        old_prog_fd: 0,
    };
    // SAFETY: the attribute holds integers only.
    unsafe { bpf(BPF_LINK_UPDATE, &mut attr) }.map(drop)
}

/// Detaches a link at once; the last close of a pinned link would do it some time later.
pub fn detach_link(link: &impl AsFd) -> io::Result<()> {
    let mut attr = Detach { link_fd: raw(link) };
    // SAFETY: the attribute holds integers only.
    unsafe { bpf(BPF_LINK_DETACH, &mut attr) }.map(drop)
}

/// What a link is attached to.
pub fn link_target(link: &impl AsFd) -> io::Result<LinkTarget> {
    let mut info = LinkInfo::default();
    let mut attr = InfoByFd {
        bpf_fd: raw(link),
        info_len: size_of::<LinkInfo>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    // SAFETY: the kernel writes at most `info_len` bytes into `info`, which are integers.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    let [a, b, c, d, e, f, g, h, ..] = info.target;
    Ok(match info.kind {
        LINK_TYPE_CGROUP => LinkTarget::Cgroup(u64::from_ne_bytes([a, b, c, d, e, f, g, h])),
        LINK_TYPE_NETNS => LinkTarget::Netns(u32::from_ne_bytes([a, b, c, d])),
        _ => LinkTarget::Other,
    })
}
