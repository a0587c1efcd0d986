//! Kernels of Debian's releases, fetched by apt with an own configuration: the machine's own lists stay as they are.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use crate::shell;

/// The package that stands for a release's newest kernel for virtual machines.
const PACKAGE: &str = "linux-image-cloud-amd64";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// An unpacked kernel.
#[derive(Debug)]
pub struct Image {
    /// Its release, as `uname -r` says it.
    pub release: String,
    /// The kernel itself.
    pub vmlinuz: PathBuf,
    /// The directory with `lib/modules/<release>`.
    pub root: PathBuf,
}

/// The archive that this machine's own packages come from.
fn archive() -> Result<String> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    let texts: Vec<String> = files.iter().filter_map(|file| fs::read_to_string(file).ok()).collect();
    archive_in(&texts).context("no archive of Debian in apt's sources: this verb runs on Debian")
}

/// The first address of a Debian archive (not of its security updates) in apt's sources of either form.
fn archive_in(sources: &[String]) -> Option<String> {
    let lines = sources.iter().flat_map(|text| text.lines());
    let mut addresses = lines.flat_map(|line| {
        let is_source = line.starts_with("URIs:") || line.starts_with("deb ");
        line.split_whitespace()
            .filter(move |word| is_source && word.contains("://"))
    });
    addresses
        .find(|address| !address.contains("security"))
        .map(|address| address.trim_end_matches('/').to_owned())
}

/// Apt's tools with an own list of sources, own lists and an own cache.
struct Apt {
    directory: PathBuf,
}

impl Apt {
    fn new(directory: &Path, suite: &str) -> Result<Apt> {
        for below in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(directory.join(below))?;
        }
        let source = format!("deb [signed-by={KEYRING}] {} {suite} main\n", archive()?);
        fs::write(directory.join("sources.list"), source)?;
        Ok(Apt {
            directory: directory.to_owned(),
        })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for (option, below) in [
            ("Dir::Etc::sourcelist", "sources.list"),
            ("Dir::State::lists", "lists"),
            ("Dir::Cache", "cache"),
        ] {
            command.arg("-o");
            command.arg(format!("{option}={}", self.directory.join(below).display()));
        }
        command.args(["-o", "Dir::Etc::sourceparts=/dev/null", "-o", "APT::Sandbox::User=root"]);
        command.args(["-o", "APT::Architecture=amd64", "-o", "Acquire::Languages=none", "-qq"]);
        command.current_dir(&self.directory);
        command
    }
}

/// The newest kernel of a release of Debian, fetched and unpacked below the directory unless it is there.
pub fn fetch(suite: &str, directory: &Path) -> Result<Image> {
    let apt = Apt::new(&directory.join("apt"), suite)?;
    shell::run(apt.command("apt-get").arg("update")).with_context(|| format!("the lists of {suite}"))?;
    let depends = shell::read(apt.command("apt-cache").args(["depends", "--important", PACKAGE]))?;
    let package = kernel_package(&depends).with_context(|| format!("{suite} has no {PACKAGE}"))?;
    let release = package.trim_start_matches("linux-image-").to_owned();
    let root = directory.join(&release);
    if !root.join("complete").exists() {
        let parts = shell::read(apt.command("apt-cache").args(["depends", "--important", &package]))?;
        let mut packages = vec![package.clone()];
        packages.extend(kernel_parts(&parts));
        shell::run(apt.command("apt-get").arg("download").args(&packages))?;
        fs::create_dir_all(&root)?;
        for archive in fs::read_dir(&apt.directory)?.flatten().map(|entry| entry.path()) {
            if archive.extension().is_some_and(|end| end == "deb") {
                shell::run(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&root))?;
                fs::remove_file(archive)?;
            }
        }
        fs::write(root.join("complete"), "")?;
    }
    let vmlinuz = [
        root.join("boot").join(format!("vmlinuz-{release}")),
        root.join("usr/lib/modules").join(&release).join("vmlinuz"),
    ];
    let Some(vmlinuz) = vmlinuz.into_iter().find(|path| path.exists()) else {
        bail!("{package} holds no kernel");
    };
    let root = if root.join("lib/modules").exists() {
        root
    } else {
        root.join("usr")
    };
    ensure!(
        root.join("lib/modules").join(&release).exists(),
        "{package} holds no modules"
    );
    Ok(Image { release, vmlinuz, root })
}

/// The kernel's own package among what the standing one depends on.
fn kernel_package(depends: &str) -> Option<String> {
    let names = depends.lines().filter_map(|line| line.trim().strip_prefix("Depends:"));
    names
        .map(str::trim)
        .find(|name| name.starts_with("linux-image-") && name.chars().any(|c| c.is_ascii_digit()))
        .map(str::to_owned)
}

/// Where Debian packs the kernel and its modules apart from the package that stands for both.
fn kernel_parts(depends: &str) -> Vec<String> {
    let names = depends.lines().filter_map(|line| line.trim().strip_prefix("Depends:"));
    names
        .map(|name| name.trim().to_owned())
        .filter(|name| name.starts_with("linux-binary-") || name.starts_with("linux-modules-"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_read_from_sources_of_either_form() {
        let security = "Types: deb\nURIs: http://mirror.example/debian-security\nSuites: x\n".to_owned();
        let modern = "Types: deb\nURIs: http://mirror.example/debian/\nSuites: x\n".to_owned();
        let old = "# deb http://no.example/debian x main\ndeb http://mirror.example/debian x main\n".to_owned();
        let expected = Some("http://mirror.example/debian".to_owned());
        assert_eq!(archive_in(&[security.clone(), modern]), expected);
        assert_eq!(archive_in(&[old]), expected);
        assert_eq!(archive_in(&[security]), None);
    }

    #[test]
    fn the_kernel_is_what_its_standing_package_depends_on() {
        let said = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-50-cloud-amd64\n";
        assert_eq!(
            kernel_package(said).as_deref(),
            Some("linux-image-6.1.0-50-cloud-amd64")
        );
        assert_eq!(kernel_package("linux-image-cloud-amd64\n"), None);
        let apart = "linux-image-7.2\n |Depends: dracut\n  Depends: linux-binary-7.2\n  Depends: linux-modules-7.2\n";
        assert_eq!(kernel_parts(apart), ["linux-binary-7.2", "linux-modules-7.2"]);
    }
}
