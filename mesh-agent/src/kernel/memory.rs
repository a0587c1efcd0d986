//! Memory given back to the system: heap that a burst left free, and pages of the program that only its start needed.
//!
//! The allocator keeps what was freed in the middle of its arenas for later, which after ten thousand connections is
//! most of the process. And a start walks through nearly the whole program, whose pages then stay mapped although the
//! data path needs a fraction of them; unmapped, they are read again from the page cache when they are needed after
//! all. Nothing here may be called on the data path: an arena is locked while it is trimmed.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Free heap below this is not worth the trouble.
const FREE_BYTES_MIN: usize = 4 << 20;

/// What is known of the process's memory from one look to the next.
#[derive(Debug, Default)]
pub struct Memory {
    looks: u64,
}

impl Memory {
    /// Looks after the memory; to be called every now and then, first when the start is over.
    pub fn tidy(&mut self) {
        self.looks += 1;
        // The first look may come while the start is not quite done.
        if self.looks == 2
            && let Err(error) = forget_program()
        {
            tracing::debug!(%error, "the program's pages stay");
        }
        let (used, free) = heap();
        if is_worth_it(used, free) {
            trim();
        }
    }
}

/// Whether so much of the heap is free that giving it back pays.
fn is_worth_it(used: usize, free: usize) -> bool {
    free >= FREE_BYTES_MIN && free >= used / 2
}

/// Bytes of the heap that are in use, and that are free.
#[cfg(target_env = "gnu")]
fn heap() -> (usize, usize) {
    // SAFETY: The function takes nothing and only reads the allocator's own books, under its locks.
    let info = unsafe { libc::mallinfo2() };
    (info.uordblks, info.fordblks)
}

#[cfg(target_env = "gnu")]
fn trim() {
    // SAFETY: The function takes a number and gives only pages back that hold no allocation, under the arenas' locks.
    unsafe { libc::malloc_trim(0) };
}

/// Other allocators give back by themselves.
#[cfg(not(target_env = "gnu"))]
fn heap() -> (usize, usize) {
    (0, 0)
}

#[cfg(not(target_env = "gnu"))]
fn trim() {}

/// What this process may use of the machine's memory by its cgroup, or by those above it; `None` where nothing is said.
/// Cgroup v2, and v1 where the memory controller is there.
pub fn limit() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let numbers = directories(&groups, &mounts)
        .into_iter()
        .flat_map(|(mount, group, file)| {
            let mut found = Vec::new();
            for directory in group.ancestors() {
                let inside = directory.strip_prefix("/").unwrap_or(directory);
                found.extend(
                    fs::read_to_string(mount.join(inside).join(file))
                        .ok()
                        .as_deref()
                        .and_then(number),
                );
            }
            found
        });
    numbers.min()
}

/// A limit's file: `max` and the highest number that there is mean that there is none.
fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|bytes| *bytes < 1 << 60)
}

/// Where this process's memory is accounted: a mount, the group below it, and the name of the file of limits.
fn directories(groups: &str, mounts: &str) -> Vec<(PathBuf, PathBuf, &'static str)> {
    let mut found = Vec::new();
    for line in mounts.lines() {
        let Some((mount, kind)) = line.split_once(" - ") else {
            continue;
        };
        let mut fields = mount.split(' ').skip(3);
        let (Some(root), Some(point)) = (fields.next(), fields.next()) else {
            continue;
        };
        let (controller, file) = match kind.split(' ').next() {
            Some("cgroup2") => ("", "memory.max"),
            Some("cgroup") if kind.rsplit([' ', ',']).any(|word| word == "memory") => {
                ("memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        for group in groups.lines() {
            let mut fields = group.splitn(3, ':').skip(1);
            let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else {
                continue;
            };
            if controllers.split(',').any(|name| name == controller) {
                // A container sees its own group as the root of the mount.
                let group = Path::new("/").join(Path::new(group).strip_prefix(root).unwrap_or(Path::new("")));
                found.push((point.into(), group, file));
            }
        }
    }
    found
}

/// Unmaps the pages of the program's code.
fn forget_program() -> io::Result<()> {
    for (from, to) in code(&fs::read_to_string("/proc/self/maps")?) {
        // SAFETY: The kernel itself has just named this range as a private mapping of a file that may be executed and
        // not written. Nobody has changed such pages, so that the kernel reads the same bytes from the file again.
        let done = unsafe { libc::madvise(from as *mut libc::c_void, to - from, libc::MADV_DONTNEED) };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The ranges of code from files in the text of `/proc/self/maps`. Read-only data is left out: the loader has written
/// addresses into some of it.
fn code(maps: &str) -> Vec<(usize, usize)> {
    maps.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let (range, rights, _, _, inode) = (
                words.next()?,
                words.next()?,
                words.next()?,
                words.next()?,
                words.next()?,
            );
            if rights != "r-xp" || inode == "0" {
                return None;
            }
            let (from, to) = range.split_once('-')?;
            let number = |text| usize::from_str_radix(text, 16).ok();
            Some((number(from)?, number(to)?)).filter(|(from, to)| from < to)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_from_files_is_forgotten() {
        let maps = "\
55d0c0000000-55d0c0100000 r--p 00000000 fe:00 1234 /usr/bin/mesh-agent
55d0c0100000-55d0c0a00000 r-xp 00100000 fe:00 1234 /usr/bin/mesh-agent
55d0c0a00000-55d0c0b00000 rw-p 00a00000 fe:00 1234 /usr/bin/mesh-agent
7ffd00000000-7ffd00001000 r-xp 00000000 00:00 0 [vdso]
7f0000000000-7f0000001000 rwxp 00000000 fe:00 99 /tmp/jit
short line
";
        assert_eq!(code(maps), [(0x55d0_c010_0000, 0x55d0_c0a0_0000)]);
    }

    #[test]
    fn a_heap_is_trimmed_when_much_of_it_is_free() {
        for (used, free, worth) in [
            (10 << 20, 1 << 20, false),
            (1 << 20, 3 << 20, false),
            (6 << 20, 4 << 20, true),
            (100 << 20, 40 << 20, false),
            (100 << 20, 60 << 20, true),
        ] {
            assert_eq!(is_worth_it(used, free), worth, "{used} {free}");
        }
    }

    #[test]
    fn limits_are_looked_for_where_memory_is_accounted() {
        let mounts = "\
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
36 31 0:33 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
        let hybrid = "4:memory:/a/b\n1:cpu:/c\n0::/d\n";
        let group = |mount: &str, group: &str, file| (PathBuf::from(mount), PathBuf::from(group), file);
        assert_eq!(
            directories(hybrid, mounts),
            [
                group("/sys/fs/cgroup/memory", "/a/b", "memory.limit_in_bytes"),
                group("/sys/fs/cgroup/unified", "/d", "memory.max"),
            ]
        );
        let container = "30 23 0:26 /kubepods/pod1 /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(
            directories("0::/kubepods/pod1/x\n", container),
            [group("/sys/fs/cgroup", "/x", "memory.max")]
        );
        assert_eq!(
            directories("0::/\n", container),
            [group("/sys/fs/cgroup", "/", "memory.max")]
        );
        assert_eq!(number("268435456\n"), Some(256 << 20));
        assert_eq!((number("max\n"), number("9223372036854771712\n")), (None, None));
    }

    #[test]
    fn a_process_goes_on_without_the_pages_it_gave_back() {
        let mut memory = Memory::default();
        let kept: Vec<Vec<u8>> = (0..200).map(|number| vec![number; 5000]).collect();
        (0..3).for_each(|_| memory.tidy());
        assert!(
            kept.iter()
                .zip(0..200)
                .all(|(bytes, number)| bytes.iter().all(|byte| *byte == number))
        );
    }
}
