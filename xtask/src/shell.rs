//! Running other programs, and becoming root when a verb needs it.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

/// The workspace's directory.
pub fn root() -> PathBuf {
    // Cargo sets the variable at run time too; the constant serves a program that was copied out of cargo's hands.
    let manifest = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| OsString::from(env!("CARGO_MANIFEST_DIR")));
    let manifest = PathBuf::from(manifest);
    manifest.parent().map_or(manifest.clone(), Path::to_path_buf)
}

/// Cargo's target directory: this program lies in `<target>/<profile>/`.
pub fn target() -> Result<PathBuf> {
    let program = env::current_exe()?;
    let target = program
        .ancestors()
        .nth(2)
        .context("this program is not in a target directory")?;
    Ok(target.to_path_buf())
}

/// Cargo, as this program was started by it. Variables that it set for this program are not for others.
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(name);
        }
    }
    command
}

/// Runs a command with this terminal and fails if it fails.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("run {}", show(command)))?;
    ensure!(status.success(), "{}: {status}", show(command));
    Ok(())
}

/// Runs a command and gives its standard output.
pub fn read(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("run {}", show(command)))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {}\n{said}", show(command), output.status);
    String::from_utf8(output.stdout).with_context(|| format!("{}: no UTF-8", show(command)))
}

/// A command's words.
pub fn show(command: &Command) -> String {
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect();
    words.join(" ")
}

/// Whether this process is root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A command that runs as root: by sudo if this process is not.
pub fn root_command(program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    require_sudo()?;
    let mut command = Command::new("sudo");
    command.arg("--").arg(program);
    Ok(command)
}

/// Fails, and says so, unless this process is root or can become it.
pub fn require_sudo() -> Result<()> {
    if is_root() {
        return Ok(());
    }
    let sudo = Command::new("sudo").arg("-v").status();
    match sudo {
        Ok(status) if status.success() => Ok(()),
        Ok(_) => bail!("this needs root, and sudo refused it"),
        Err(_) => bail!("this needs root, and there is no sudo: run it as root"),
    }
}

/// This process's PATH and the places where Debian keeps root's programs (`nft`, `tcpdump`), which a user's is without.
pub fn root_path() -> OsString {
    let mut path = env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin");
    path
}

/// Runs this very program again as root with the same arguments; `None` if this process is root already.
pub fn again_as_root() -> Result<Option<ExitCode>> {
    if is_root() {
        return Ok(None);
    }
    require_sudo()?;
    let mut command = Command::new("sudo");
    let mut path = OsString::from("PATH=");
    path.push(root_path());
    command.arg("--").arg("env").arg(path);
    for name in [
        "HOME",
        "CARGO",
        "CARGO_HOME",
        "RUSTUP_HOME",
        "NODEMESH_PROGRAMS",
        "NODEMESH_KUBE",
        "NODEMESH_KUBE_CACHE",
        "RUST_BACKTRACE",
    ] {
        if let Some(value) = env::var_os(name) {
            let mut pair = OsString::from(format!("{name}="));
            pair.push(value);
            command.arg(pair);
        }
    }
    command.arg(env::current_exe()?).args(env::args_os().skip(1));
    let status = command.status().context("run sudo")?;
    Ok(Some(exit(status)))
}

/// The exit code to pass on.
pub fn exit(status: std::process::ExitStatus) -> ExitCode {
    let code = mesh_tests::process::exit_code(status);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

/// A duration for people.
pub fn time(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..60 => format!("{:.1} s", duration.as_secs_f64()),
        _ => format!("{} min {} s", seconds / 60, seconds % 60),
    }
}
