//! The image of applications for tests on the cluster: real programs of this machine's packages, and our own.
//!
//! Pods run it as `localhost/nodemesh/test:dev` with the command that they want: nginx, redis, python, curl, grpc,
//! `lab-load`, the echo application.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{
    image::{self, Files, Image, Platform},
    shell,
};

/// The name that pods use.
pub const NAME: &str = "localhost/nodemesh/test:dev";
/// Whole packages: programs with their modules.
const PACKAGES: [&str; 9] = [
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "nginx",
    "nginx-common",
    "python3-grpcio",
    "python3-protobuf",
    "python3.11",
    "python3.11-minimal",
    "python3-six",
];
/// Single programs, for `kubectl exec` and for the commands of pods.
const PROGRAMS: [&str; 31] = [
    "base64",
    "cat",
    "curl",
    "cut",
    "date",
    "dash",
    "echo",
    "env",
    "false",
    "grep",
    "head",
    "hostname",
    "id",
    "ip",
    "ls",
    "mkdir",
    "nghttp",
    "openssl",
    "printf",
    "python3",
    "redis-cli",
    "redis-server",
    "sed",
    "seq",
    "sh",
    "sleep",
    "sort",
    "stat",
    "tail",
    "timeout",
    "true",
];
/// Our own.
const OWN: [&str; 1] = ["lab-load"];

/// Writes the image into the cache and gives its file.
pub fn write(programs: &Path, cache: &Path) -> Result<PathBuf> {
    let mut files = Files::default();
    files.base();
    files.bytes("etc/mime.types", 0o644, "text/html html;\n");
    for package in PACKAGES {
        let Ok(listing) = shell::read(Command::new("dpkg").args(["-L", package])) else {
            // Debian's versions split packages differently; what a test misses, it names.
            continue;
        };
        for path in listing.lines().map(Path::new) {
            let wanted = [
                "/usr/share/doc",
                "/usr/share/man",
                "/usr/share/lintian",
                "/etc/init.d",
                "/lib/systemd",
            ];
            if wanted.iter().any(|prefix| path.starts_with(prefix)) {
                continue;
            }
            if fs::symlink_metadata(path).is_ok_and(|facts| !facts.is_dir()) {
                files.tree(path)?;
            }
        }
    }
    for name in PROGRAMS {
        let places = ["/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"];
        let found = places
            .iter()
            .map(|place| Path::new(place).join(name))
            .find(|path| path.exists());
        let found = found.with_context(|| format!("{name} is not installed: `cargo xtask setup`"))?;
        // Debian's /bin is a link to /usr/bin; in the image everything is in /usr/bin.
        files.program(&format!("/usr/bin/{name}"), &fs::canonicalize(&found)?)?;
    }
    for name in OWN {
        files.program(&format!("/usr/bin/{name}"), &programs.join(name))?;
    }
    for name in ["client", "server"] {
        files.program(
            &format!("/usr/bin/echo-{name}"),
            &cache.join("bin").join(format!("echo-{name}")),
        )?;
    }
    files.move_into_usr();
    let image = Image {
        platform: Platform::host(),
        entrypoint: Vec::new(),
        user: String::new(),
        labels: Default::default(),
        files,
        compress: false,
    };
    let path = cache.join("test.tar");
    image::write(&path, &[NAME], &[image])?;
    Ok(path)
}
