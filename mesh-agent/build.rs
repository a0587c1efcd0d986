//! Compiles the kernel programs and hands the object's path to the crate.
//!
//! Three routes, the first that is there: `MESH_EBPF_OBJ_PREBUILT` names a ready object; `MESH_EBPF_RUSTC` or
//! Debian's `/usr/bin/rustc` has a core library for `bpfel-unknown-none`; rustup's nightly builds one. If none is
//! there the build stops and says which command sets the machine up.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

const TARGET: &str = "bpfel-unknown-none";
const PROGRAM: &str = "mesh-ebpf-programs";
const SETUP: &str = "run `cargo xtask setup`: it installs rustc-web, libstd-rust-web-dev-bpf and bpf-linker";

fn main() {
    for variable in ["MESH_EBPF_OBJ_PREBUILT", "MESH_EBPF_RUSTC"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let workspace = PathBuf::from(variable("CARGO_MANIFEST_DIR")).join("..");
    for source in [
        "mesh-ebpf/src",
        "mesh-ebpf/Cargo.toml",
        "mesh-abi/src",
        "mesh-abi/Cargo.toml",
        "Cargo.lock",
    ] {
        println!("cargo:rerun-if-changed={}", workspace.join(source).display());
    }
    let object = match env::var_os("MESH_EBPF_OBJ_PREBUILT") {
        Some(path) => fs::canonicalize(&path)
            .unwrap_or_else(|error| stop(&format!("MESH_EBPF_OBJ_PREBUILT={}: {error}", path.display()))),
        None => compile(&workspace),
    };
    println!("cargo:rustc-env=MESH_EBPF_OBJ={}", object.display());
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| stop(&format!("cargo did not set {name}")))
}

fn stop(problem: &str) -> ! {
    println!("cargo:warning={problem}");
    eprintln!("\nerror: {problem}\n");
    std::process::exit(1)
}

/// A compiler that brings its own core library for the kernel's target.
fn ready_compiler() -> Option<PathBuf> {
    let candidate = env::var_os("MESH_EBPF_RUSTC").map_or_else(|| PathBuf::from("/usr/bin/rustc"), PathBuf::from);
    let output = Command::new(&candidate).args(["--print", "sysroot"]).output().ok()?;
    let sysroot = String::from_utf8(output.stdout).ok()?;
    let library = Path::new(sysroot.trim()).join("lib/rustlib").join(TARGET).join("lib");
    let has_core = fs::read_dir(library)
        .ok()?
        .flatten()
        .any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"));
    has_core.then_some(candidate)
}

fn has_nightly() -> bool {
    Command::new("rustup")
        .args(["run", "nightly", "rustc", "--version"])
        .output()
        .is_ok_and(|output| output.status.success())
}

fn compile(workspace: &Path) -> PathBuf {
    let target_dir = PathBuf::from(variable("OUT_DIR")).join("ebpf");
    let arch = variable("CARGO_CFG_TARGET_ARCH");
    // -Ctarget-cpu=v3 for atomics whose result is used; --btf for the maps' types and the verifier's line numbers.
    let flags = [
        format!("--cfg=bpf_target_arch=\"{arch}\""),
        "-Ctarget-cpu=v3".to_owned(),
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
    ];
    let mut cargo = match ready_compiler() {
        Some(rustc) => {
            let mut cargo = Command::new(variable("CARGO"));
            clean(&mut cargo);
            cargo.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1").arg("build");
            cargo
        }
        None if has_nightly() => {
            let mut cargo = Command::new("rustup");
            clean(&mut cargo);
            cargo.args(["run", "nightly", "cargo", "build", "-Zbuild-std=core"]);
            cargo
        }
        None => stop(&format!("no compiler for the kernel programs ({TARGET}): {SETUP}")),
    };
    let status = cargo
        .current_dir(workspace)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .args([
            "--release",
            "--locked",
            "--package",
            "mesh-ebpf",
            "--bins",
            "--target",
            TARGET,
            "--target-dir",
        ])
        .arg(&target_dir)
        .status()
        .unwrap_or_else(|error| stop(&format!("cargo for the kernel programs: {error}")));
    if !status.success() {
        stop(&format!(
            "the kernel programs did not compile; if a tool is missing, {SETUP}"
        ));
    }
    target_dir.join(TARGET).join("release").join(PROGRAM)
}

/// The child is another build with another compiler: nothing of this one may leak into it.
fn clean(cargo: &mut Command) {
    for variable in [
        "RUSTC",
        "RUSTUP_TOOLCHAIN",
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "CARGO_BUILD_TARGET",
        "CARGO_TARGET_DIR",
    ] {
        cargo.env_remove(variable);
    }
}
