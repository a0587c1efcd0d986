//! `mesh-agent`: arguments, diagnostics and the exit code. What the agent does is in the library.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong arguments or configuration.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, Subcommand};
use mesh_agent::{
    config::{AgentConfig, ConfigFlags, LogConfig, STATE_DIR, instance_of},
    event::LogFormat,
    kernel::Kernel,
};
use tracing_subscriber::EnvFilter;

#[derive(Parser)]
#[command(
    name = "mesh-agent",
    version,
    about = "The node agent of Nodemesh",
    max_term_width = 100
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve this node
    Run(Box<ConfigFlags>),
    /// Hold the listeners of this node's pods while agents come and go; runs beside the agent, and outlives it
    Keeper {
        /// The keeper's socket; an older keeper there is taken over
        #[arg(long, value_name = "PATH", default_value = "/run/nodemesh/keeper.sock")]
        socket: PathBuf,
    },
    /// Ask an agent how it is: exit code 0 for yes, 1 for no
    Probe {
        /// Whether it serves (ready) or runs (live)
        #[arg(value_parser = ["ready", "live"])]
        what: String,
        /// Its admin socket
        #[arg(long, value_name = "PATH", default_value = "/run/nodemesh/agent.sock")]
        socket: PathBuf,
    },
    /// Take every trace of the mesh from this node: kernel programs, pins, sockets, state. No agent may run
    Uninstall {
        /// Whose pins: the node's name, unless the agent was started with another instance
        #[arg(long, value_name = "NAME", env = "NODEMESH_NODE")]
        instance: String,
        /// The bpffs directory of all instances
        #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/nodemesh")]
        pin_root: PathBuf,
        /// The directory of sockets; it is emptied
        #[arg(long, value_name = "DIR", default_value = "/run/nodemesh")]
        run_dir: PathBuf,
        /// The directory of what outlives a restart; it is removed
        #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
        state_dir: PathBuf,
        /// Stay until SIGTERM, so that a DaemonSet can tell which nodes are clean
        #[arg(long)]
        stay: bool,
    },
    /// Detach the kernel programs that an agent left pinned; pods go on as if there were no mesh
    Detach {
        /// Which agent's: its node's name, unless it was started with another instance
        #[arg(long, value_name = "NAME")]
        instance: String,
        /// The bpffs directory of all instances
        #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/nodemesh")]
        pin_root: PathBuf,
    },
    /// Print the version and the ABI of the kernel programs
    Version,
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Run(flags) => run(&flags),
        Command::Keeper { socket } => {
            // No filter: its engine alone would take more memory than the keeper has.
            tracing_subscriber::fmt()
                .with_writer(std::io::stderr)
                .with_ansi(false)
                .init();
            finish(mesh_agent::keeper::run(&socket))
        }
        Command::Probe { what, socket } => finish(probe(&what, &socket)),
        Command::Uninstall {
            instance,
            pin_root,
            run_dir,
            state_dir,
            stay,
        } => finish(uninstall(&pin_root, &instance, &run_dir, &state_dir, stay)),
        Command::Detach { instance, pin_root } => finish(detach(&pin_root, &instance)),
        Command::Version => {
            println!(
                "mesh-agent {} (kernel ABI {})",
                env!("CARGO_PKG_VERSION"),
                mesh_abi::ABI_VERSION
            );
            ExitCode::SUCCESS
        }
    }
}

fn run(flags: &ConfigFlags) -> ExitCode {
    let config = match AgentConfig::load(flags) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    if let Err(error) = open_log(&config.log) {
        eprintln!("configuration: log.filter: {error}");
        return ExitCode::from(2);
    }
    finish(mesh_agent::agent::run(config))
}

fn finish(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The whole chain, once, here.
            eprintln!("mesh-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn open_log(config: &LogConfig) -> anyhow::Result<()> {
    let filter: EnvFilter = config.filter.parse()?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match config.format {
        LogFormat::Json => builder.json().flatten_event(true).init(),
        LogFormat::Text => builder.with_ansi(false).init(),
    }
    Ok(())
}

/// Asks over the admin socket. What it answers is printed, so that an event on the pod tells why.
fn probe(what: &str, socket: &Path) -> anyhow::Result<()> {
    let answer = mesh_agent::admin::ask(socket, &format!("/{what}z"))?;
    print!("{}", answer.body);
    anyhow::ensure!(answer.status == 200, "the agent is not {what}");
    Ok(())
}

/// Removes the pins of an instance and the files of the node, and makes sure that both are gone.
fn uninstall(pin_root: &Path, instance: &str, run_dir: &Path, state_dir: &Path, stay: bool) -> anyhow::Result<()> {
    detach(pin_root, instance)?;
    // Others may keep pins here; ours are gone. The directory is nobody's when it is empty.
    let _ = fs::remove_dir(pin_root);
    // What cannot be removed keeps nothing else.
    let mut left = Vec::new();
    match fs::read_dir(run_dir) {
        Ok(entries) => {
            for entry in entries {
                remove(&entry?.path(), &mut left);
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => left.push(format!("{}: {error}", run_dir.display())),
    }
    // Its keys are the node's and its pods': nothing of it stays.
    remove(state_dir, &mut left);
    anyhow::ensure!(left.is_empty(), "{}", left.join("; "));
    println!("the node is clean");
    if stay {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let mut term = signal(SignalKind::terminate())?;
            let mut interrupt = signal(SignalKind::interrupt())?;
            tokio::select! {
                _ = term.recv() => {}
                _ = interrupt.recv() => {}
            }
            Ok::<_, std::io::Error>(())
        })?;
    }
    Ok(())
}

/// Removes a file or a directory, if it is there; says in `left` why it cannot.
fn remove(path: &Path, left: &mut Vec<String>) {
    let removed = match path.is_dir() && !path.is_symlink() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    };
    match removed {
        Ok(()) => println!("removed {}", path.display()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => left.push(format!("{}: {error}", path.display())),
    }
}

/// Removes the pins of an instance, of every ABI version that is there.
fn detach(pin_root: &Path, instance: &str) -> anyhow::Result<()> {
    // As the agent that pinned them named it, also for a node with dots in its name.
    let prefix = format!("{}-v", instance_of(instance));
    let entries = match fs::read_dir(pin_root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            println!("nothing is pinned under {}", pin_root.display());
            return Ok(());
        }
        Err(error) => return Err(anyhow::anyhow!("{}: {error}", pin_root.display())),
    };
    let mut removed = 0;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let version = name.to_str().and_then(|name| name.strip_prefix(&prefix));
        if version.is_some_and(|version| version.parse::<u32>().is_ok()) {
            Kernel::remove(&entry.path())?;
            println!("detached {}", entry.path().display());
            removed += 1;
        }
    }
    if removed == 0 {
        println!("nothing of {instance} is pinned under {}", pin_root.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn uninstalling_takes_the_nodes_own_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        let directories = [
            "pins/ip-10-0-0-1_example_org-v2",
            "pins/ip-10-0-0-1_example_org-v3",
            "pins/ip-10-0-0-1_example_org-vX",
            "pins/other-v3",
            "run/state/credentials",
            "lib/agent/credentials",
            "lib/controller",
        ];
        for name in directories {
            fs::create_dir_all(path(name)).unwrap();
        }
        fs::write(path("run/keeper.sock"), "").unwrap();
        fs::write(path("lib/agent/credentials/key"), "").unwrap();
        // Nothing is left for the second time, which is as good.
        for _ in 0..2 {
            let node = "ip-10-0-0-1.example.org";
            uninstall(&path("pins"), node, &path("run"), &path("lib/agent"), false).unwrap();
            assert_eq!(names(&path("pins")), ["ip-10-0-0-1_example_org-vX", "other-v3"]);
            assert_eq!(names(&path("run")), [""; 0]);
            assert_eq!(names(&path("lib")), ["controller"]);
        }
    }

    #[test]
    fn what_cannot_be_removed_keeps_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let (run, state) = (root.path().join("run"), root.path().join("state"));
        fs::write(&run, "no directory").unwrap();
        fs::create_dir(&state).unwrap();
        let refused = uninstall(&root.path().join("pins"), "node-1", &run, &state, false).unwrap_err();
        assert!(refused.to_string().contains(&run.display().to_string()), "{refused}");
        assert!(!state.exists());
    }
}
