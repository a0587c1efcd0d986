//! Directories that appear and vanish, told by the kernel (inotify).
//!
//! A cgroup's birth and end are changes of its parent directory. Watches of directories that are gone end by
//! themselves. An overflow of the kernel's queue is told as such: the caller looks at everything anew.

use std::{
    ffi::{CString, OsStr, OsString},
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use tokio::io::unix::AsyncFd;

/// Bytes read at once: some hundred events.
const BUFFER: usize = 16 * 1024;
/// The fixed part of `struct inotify_event`.
const HEAD: usize = 16;

/// A watched directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Watch(i32);

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A directory appeared in a watched one.
    Made(Watch, OsString),
    /// A directory vanished from a watched one.
    Gone(Watch, OsString),
    /// The watched directory itself is gone.
    Ended(Watch),
    /// Changes were lost.
    Lost,
}

/// An inotify instance.
#[derive(Debug)]
pub struct Inotify(AsyncFd<OwnedFd>);

impl Inotify {
    /// A new instance; needs a runtime.
    pub fn new() -> io::Result<Inotify> {
        // SAFETY: a system call without pointers.
        let fd = unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us; an `OwnedFd` is the same descriptor until it is
        // dropped.
        Ok(Inotify(unsafe { AsyncFd::register(OwnedFd::from_raw_fd(fd)) }?))
    }

    /// Watches a directory; one that is watched already keeps its watch.
    pub fn add(&self, dir: &Path) -> io::Result<Watch> {
        let path = CString::new(dir.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mask = libc::IN_CREATE | libc::IN_DELETE | libc::IN_ONLYDIR;
        // SAFETY: the path is a C string that outlives the call.
        match unsafe { libc::inotify_add_watch(self.0.as_raw_fd(), path.as_ptr(), mask) } {
            wd if wd >= 0 => Ok(Watch(wd)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Waits for changes. Cancelling loses none.
    pub async fn changes(&self) -> io::Result<Vec<Change>> {
        let mut buffer = [0_u8; BUFFER];
        loop {
            let mut ready = self.0.readable().await?;
            let read = ready.try_io(|fd| {
                // SAFETY: the buffer is ours and of the length given.
                let read = unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
                usize::try_from(read).map_err(|_| io::Error::last_os_error())
            });
            match read {
                Ok(read) => return read.map(|len| parse(buffer.get(..len).unwrap_or_default())),
                Err(_would_block) => {}
            }
        }
    }
}

/// The changes of directories among the events of one read.
fn parse(mut bytes: &[u8]) -> Vec<Change> {
    let mut changes = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<HEAD>() {
        let [a, b, c, d, e, f, g, h, .., i, j, k, l] = *head;
        let watch = Watch(i32::from_ne_bytes([a, b, c, d]));
        let mask = u32::from_ne_bytes([e, f, g, h]);
        let len = u32::from_ne_bytes([i, j, k, l]) as usize;
        let Some((name, rest)) = rest.split_at_checked(len) else {
            break;
        };
        bytes = rest;
        let name = OsStr::from_bytes(name.split(|byte| *byte == 0).next().unwrap_or_default()).to_owned();
        if mask & libc::IN_Q_OVERFLOW != 0 {
            changes.push(Change::Lost);
        } else if mask & libc::IN_IGNORED != 0 {
            changes.push(Change::Ended(watch));
        } else if mask & libc::IN_ISDIR == 0 {
            // A file.
        } else if mask & libc::IN_CREATE != 0 {
            changes.push(Change::Made(watch, name));
        } else if mask & libc::IN_DELETE != 0 {
            changes.push(Change::Gone(watch, name));
        }
    }
    changes
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[tokio::test]
    async fn directories_that_come_and_go_are_told_and_files_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let inotify = Inotify::new().unwrap();
        let watch = inotify.add(dir.path()).unwrap();
        assert_eq!(inotify.add(dir.path()).unwrap(), watch, "one watch per directory");
        fs::write(dir.path().join("file"), "").unwrap();
        fs::create_dir(dir.path().join("made")).unwrap();
        fs::remove_dir(dir.path().join("made")).unwrap();
        let mut seen = Vec::new();
        while seen.len() < 2 {
            seen.extend(inotify.changes().await.unwrap());
        }
        let made = OsString::from("made");
        assert_eq!(seen, [Change::Made(watch, made.clone()), Change::Gone(watch, made)]);
        fs::remove_file(dir.path().join("file")).unwrap();
        fs::remove_dir(dir.path()).unwrap();
        assert_eq!(inotify.changes().await.unwrap(), [Change::Ended(watch)]);
    }

    #[test]
    fn an_overflow_is_told_and_a_cut_event_ends_the_reading() {
        let event = |mask: u32, len: u32, name: &[u8]| {
            let mut bytes = Vec::new();
            for word in [7, mask, 0, len] {
                bytes.extend(word.to_ne_bytes());
            }
            bytes.extend(name);
            bytes
        };
        assert_eq!(parse(&event(libc::IN_Q_OVERFLOW, 0, b"")), [Change::Lost]);
        let made = event(libc::IN_CREATE | libc::IN_ISDIR, 4, b"x\0\0\0");
        assert_eq!(parse(&made), [Change::Made(Watch(7), "x".into())]);
        assert_eq!(parse(&made[..made.len() - 1]), []);
        assert_eq!(parse(&made[..9]), []);
    }
}
