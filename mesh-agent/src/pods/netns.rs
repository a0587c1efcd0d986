//! Network namespaces: opened by path, entered by the calling thread for the time of one closure.
//!
//! Entering is synchronous and never spans an await, so a worker thread may do it between two tasks (about 6 µs). A
//! guard brings the thread back even when the closure panics; a thread that cannot come back aborts the process,
//! because every socket that it made from then on would be in the wrong pod.

use std::{
    cell::OnceCell,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
};

use crate::kernel::NetnsCookie;

/// `SO_NETNS_COOKIE`, since Linux 5.14.
const SO_NETNS_COOKIE: libc::c_int = 71;

/// An open network namespace. Keeps the namespace alive.
#[derive(Debug)]
pub struct Netns {
    file: File,
    cookie: NetnsCookie,
    /// Device and inode of the namespace's file: a path may come to mean another namespace.
    inode: (u64, u64),
}

thread_local! {
    /// The thread's own namespace, opened once: the way back.
    static HOME: OnceCell<File> = const { OnceCell::new() };
}

impl Netns {
    /// Opens the namespace of that file, such as `/run/netns/x` or `/proc/<pid>/ns/net`.
    pub fn open(path: &Path) -> io::Result<Netns> {
        let file = File::open(path)?;
        let inode = identity(&file.metadata()?);
        let cookie = run_in(&file, own_cookie)??;
        Ok(Netns { file, cookie, inode })
    }

    /// The namespace of the calling thread.
    pub fn current() -> io::Result<Netns> {
        Netns::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// The namespace's cookie.
    pub fn cookie(&self) -> NetnsCookie {
        self.cookie
    }

    /// Device and inode of the namespace: what tells it from any other that lives.
    pub fn inode(&self) -> (u64, u64) {
        self.inode
    }

    /// Device and inode of the namespace that a path leads to.
    pub fn inode_at(path: &Path) -> io::Result<(u64, u64)> {
        std::fs::metadata(path).map(|metadata| identity(&metadata))
    }

    /// Whether the path leads to this very namespace still.
    pub fn is_at(&self, path: &Path) -> io::Result<bool> {
        Ok(Netns::inode_at(path)? == self.inode)
    }

    /// Runs the closure in the namespace. The closure must not block and must not call into other code's tasks.
    pub fn run<T>(&self, inside: impl FnOnce() -> T) -> io::Result<T> {
        run_in(&self.file, inside)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn identity(metadata: &std::fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

fn set(netns: &File) -> io::Result<()> {
    // SAFETY: a system call on a descriptor that is open; it changes the calling thread only.
    match unsafe { libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Brings the thread back on drop.
struct Return;

impl Drop for Return {
    fn drop(&mut self) {
        HOME.with(|home| {
            if let Err(error) = home.get().map_or_else(|| Err(io::ErrorKind::NotFound.into()), set) {
                eprintln!("cannot leave a pod's network namespace: {error}");
                std::process::abort();
            }
        });
    }
}

fn run_in<T>(netns: &File, inside: impl FnOnce() -> T) -> io::Result<T> {
    HOME.with(|home| {
        if home.get().is_none() {
            let file = File::open("/proc/thread-self/ns/net")?;
            let _set_above = home.set(file);
        }
        io::Result::Ok(())
    })?;
    set(netns)?;
    let _return = Return;
    Ok(inside())
}

/// The cookie of the calling thread's namespace.
pub(super) fn own_cookie() -> io::Result<NetnsCookie> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)?;
    cookie_of(&socket)
}

/// The cookie of the namespace that a socket is in.
pub(super) fn cookie_of(socket: &impl AsFd) -> io::Result<NetnsCookie> {
    let mut cookie = 0_u64;
    let mut size = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the option's value is a u64, whose place and size are given.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut size,
        )
    };
    if result == 0 {
        Ok(NetnsCookie(cookie))
    } else {
        Err(io::Error::last_os_error())
    }
}
