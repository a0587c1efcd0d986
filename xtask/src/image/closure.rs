//! The files of an image: programs with the shared libraries that they load, trees, and texts made here.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::shell;

/// Whom an image knows by name.
const USERS: [(&str, u32); 3] = [("root", 0), ("nonroot", 65532), ("nobody", 65534)];

/// What lies at a path of an image.
#[derive(Clone, Debug)]
pub enum Content {
    /// An empty directory.
    Directory,
    /// A symbolic link to this target.
    Link(String),
    /// These bytes.
    Bytes(Vec<u8>),
    /// A file of this machine.
    File(PathBuf),
}

/// Files by their path in the image, without the leading slash.
#[derive(Clone, Debug, Default)]
pub struct Files(BTreeMap<String, (u32, Content)>);

impl Files {
    /// The paths in their order.
    pub fn paths(&self) -> impl Iterator<Item = &String> {
        self.0.keys()
    }

    /// The paths with mode and content, in their order.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &(u32, Content))> {
        self.0.iter()
    }

    /// A text.
    pub fn bytes(&mut self, path: &str, mode: u32, bytes: impl Into<Vec<u8>>) {
        self.0.insert(name(path), (mode, Content::Bytes(bytes.into())));
    }

    /// An empty directory.
    pub fn directory(&mut self, path: &str, mode: u32) {
        self.0.insert(name(path), (mode, Content::Directory));
    }

    /// A symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.0.insert(name(path), (0o777, Content::Link(target.into())));
    }

    /// A file of this machine.
    pub fn file(&mut self, path: &str, mode: u32, source: impl Into<PathBuf>) {
        self.0.insert(name(path), (mode, Content::File(source.into())));
    }

    /// A program of this machine with its loader and shared libraries, which keep their places.
    pub fn program(&mut self, path: &str, source: &Path) -> Result<()> {
        self.file(path, 0o755, source);
        self.libraries_of(source)
    }

    /// The loader and the shared libraries of a program or library.
    pub fn libraries_of(&mut self, source: &Path) -> Result<()> {
        // ldd fails for a program that is linked statically: it needs nothing.
        let output = Command::new("ldd").arg(source).output().context("run ldd")?;
        if !output.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            !text.contains("not found"),
            "{}: a library is missing:\n{text}",
            source.display()
        );
        for library in libraries(&text) {
            // The name under which it is looked for, with the bytes of what that leads to.
            let real = fs::canonicalize(library).with_context(|| format!("the library {library}"))?;
            self.file(library, 0o755, real);
        }
        Ok(())
    }

    /// A file, link or tree of this machine at its own place; programs and libraries in it bring what they load.
    pub fn tree(&mut self, source: &Path) -> Result<()> {
        let facts = fs::symlink_metadata(source).with_context(|| format!("read {}", source.display()))?;
        let path = source.to_string_lossy().into_owned();
        if facts.is_symlink() {
            self.link(&path, &fs::read_link(source)?.to_string_lossy());
        } else if facts.is_dir() {
            if path.ends_with("/__pycache__") {
                return Ok(());
            }
            for entry in fs::read_dir(source)? {
                self.tree(&entry?.path())?;
            }
        } else {
            self.file(&path, facts.permissions().mode() & 0o7777, source);
            if path.contains(".so") || facts.permissions().mode() & 0o111 != 0 {
                self.libraries_of(source)?;
            }
        }
        Ok(())
    }

    /// Moves what is below /bin, /lib, /lib64 and /sbin to /usr and links there, as Debian has it: a file that is named
    /// by both of its paths is in the image once.
    pub fn move_into_usr(&mut self) {
        for top in ["bin", "lib", "lib64", "sbin"] {
            let below = format!("{top}/");
            let paths: Vec<String> = self.0.keys().filter(|path| path.starts_with(&below)).cloned().collect();
            for path in paths {
                if let Some(entry) = self.0.remove(&path) {
                    self.0.insert(format!("usr/{path}"), entry);
                }
            }
            self.directory(&format!("usr/{top}"), 0o755);
            self.link(top, &format!("usr/{top}"));
        }
    }

    /// What every image has: users by name, and where names are looked up.
    pub fn base(&mut self) {
        let line = |(name, id): (&str, u32)| format!("{name}:x:{id}:{id}:{name}:/:/nologin\n");
        let users: String = USERS.map(line).concat();
        let groups: String = USERS.map(|(name, id)| format!("{name}:x:{id}:\n")).concat();
        self.bytes("etc/passwd", 0o644, users);
        self.bytes("etc/group", 0o644, groups);
        self.bytes("etc/nsswitch.conf", 0o644, "hosts: files dns\n");
        self.directory("tmp", 0o1777);
    }

    /// Whether a path is there.
    #[cfg(test)]
    pub fn contains(&self, path: &str) -> bool {
        self.0.contains_key(&name(path))
    }
}

fn name(path: &str) -> String {
    path.trim_start_matches('/').to_string()
}

/// The files in ldd's output: `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)` and the loader's own line.
fn libraries(ldd: &str) -> Vec<&str> {
    ldd.lines().filter_map(library).collect()
}

fn library(line: &str) -> Option<&str> {
    let line = line.trim();
    let path = line.split_once(" => ").map_or(line, |(_, path)| path);
    path.split(' ').next().filter(|path| path.starts_with('/'))
}

/// A copy of a program without its symbols.
pub fn stripped(program: &Path, into: &Path) -> Result<PathBuf> {
    let name = program.file_name().context("a program without a name")?;
    let target = into.join(name);
    shell::run(Command::new("strip").arg("-o").arg(&target).arg(program))?;
    Ok(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_ldd() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(
            libraries(text),
            ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]
        );
    }

    #[test]
    fn a_program_brings_its_libraries() -> Result<()> {
        let mut files = Files::default();
        files.program("/bin/cat", Path::new("/bin/cat"))?;
        assert!(files.contains("bin/cat"));
        assert!(files.paths().any(|path| path.contains("libc.so")));
        assert!(files.paths().any(|path| path.contains("ld-linux")));
        Ok(())
    }
}
