//! What the build and the tests need on a Debian machine: packages, and bpf-linker for the kernel programs.
//!
//! Only what is missing is installed. Packages that bring a service do not start it: the lab runs its own.

use std::{
    env, fs,
    path::Path,
    process::{Command, ExitCode},
    time::Instant,
};

use anyhow::{Result, ensure};

use crate::shell;

/// For the kernel programs: a rustc that ships the BPF target's library, and LLVM for bpf-linker.
const BUILD: &[&str] = &["build-essential", "rustc-web", "libstd-rust-web-dev-bpf", "llvm-22-dev"];
/// For the lab and the tests: the wires, and real programs to put into pods.
const LAB: &[&str] = &[
    "ca-certificates",
    "curl",
    "iperf3",
    "iproute2",
    "jq",
    "nftables",
    "nghttp2-client",
    "nginx-light",
    "openssl",
    "procps",
    "prometheus",
    "python3",
    "python3-grpcio",
    "redis-server",
    "redis-tools",
    "tcpdump",
    "util-linux",
];
/// For the cluster: what a node of Kubernetes runs beside Kubernetes.
const KUBE: &[&str] = &[
    "conntrack",
    "containerd",
    "containernetworking-plugins",
    "iptables",
    "runc",
];
const LINKER: &str = "bpf-linker";
const LINKER_VERSION: &str = "0.13.0";
const LLVM_BIN: &str = "/usr/lib/llvm-22/bin";
/// While this file says 101, packages do not start the services that they bring.
const SERVICE_POLICY: &str = "/usr/sbin/policy-rc.d";

/// The verb.
pub fn run() -> Result<ExitCode> {
    let started = Instant::now();
    if !ensure_all()? {
        println!("setup: nothing is missing");
    }
    println!("setup took {}", shell::time(started.elapsed()));
    Ok(ExitCode::SUCCESS)
}

/// Installs what is missing; says whether anything was.
pub fn ensure_all() -> Result<bool> {
    let packages = missing_packages();
    if !packages.is_empty() {
        install(&packages)?;
    }
    let linker = linker_is_missing();
    if linker {
        install_linker()?;
    }
    Ok(linker || !packages.is_empty())
}

/// Installs what is missing of these packages, which only one verb needs.
pub fn ensure(packages: &[&str]) -> Result<()> {
    let missing: Vec<&str> = packages
        .iter()
        .copied()
        .filter(|package| !is_installed(package))
        .collect();
    if missing.is_empty() { Ok(()) } else { install(&missing) }
}

fn is_installed(package: &str) -> bool {
    let query = Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Status}", package])
        .output();
    query.is_ok_and(|output| output.stdout == b"installed")
}

fn missing_packages() -> Vec<&'static str> {
    BUILD
        .iter()
        .chain(LAB)
        .chain(KUBE)
        .copied()
        .filter(|package| !is_installed(package))
        .collect()
}

/// Installs packages of the system.
pub fn install(packages: &[&str]) -> Result<()> {
    ensure!(
        Path::new("/usr/bin/apt-get").exists(),
        "missing: {}. This machine has no apt-get: install their equals by hand.",
        packages.join(" ")
    );
    println!("setup: installing {}", packages.join(" "));
    let script = format!(
        "set -e; export DEBIAN_FRONTEND=noninteractive\n\
         if [ ! -e {SERVICE_POLICY} ]; then\n\
           trap 'rm -f {SERVICE_POLICY}' EXIT\n\
           printf '#!/bin/sh\\nexit 101\\n' > {SERVICE_POLICY}; chmod 755 {SERVICE_POLICY}\n\
         fi\n\
         apt-get update -qq\n\
         apt-get install -y -qq --no-install-recommends {}",
        packages.join(" ")
    );
    shell::run(shell::root_command("sh")?.args(["-c", &script]))
}

fn linker_is_missing() -> bool {
    let on_path = Command::new(LINKER).arg("--version").output();
    !on_path.is_ok_and(|output| output.status.success())
}

fn install_linker() -> Result<()> {
    println!("setup: building {LINKER} {LINKER_VERSION}");
    let path = format!("{LLVM_BIN}:{}", env::var("PATH").unwrap_or_default());
    let mut command = shell::cargo();
    // Outside of the workspace, whose settings are not the linker's.
    command.current_dir("/").env("PATH", path);
    command.args([
        "install",
        LINKER,
        "--version",
        LINKER_VERSION,
        "--locked",
        "--no-default-features",
    ]);
    command.args(["--features", "llvm-22"]);
    shell::run(&mut command)?;
    ensure!(
        !linker_is_missing(),
        "{LINKER} was installed but is not found: put cargo's bin directory on PATH"
    );
    Ok(())
}

/// What a run needs and cannot install: a kernel with cgroup v2 and BPF for it.
pub fn check_kernel() -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(
        mesh_tests::cgroup::mount_in(&mounts).is_some(),
        "no cgroup2 hierarchy is mounted: `mount -t cgroup2 none /sys/fs/cgroup/unified`, or boot with the unified hierarchy"
    );
    Ok(())
}
