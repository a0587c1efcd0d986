//! `mesh-ctl`: the operator's command line, and the controller as a subcommand.
//!
//! The command line speaks to the controller's Unix socket, or by a kubeconfig to an API server and through it to the
//! controller; it decides nothing that the controller would decide otherwise. Tables are for people, `-o json` for programs. Results go to standard output, everything
//! else to standard error, and the exit code says what came of it.

#![forbid(unsafe_code)]

mod check;
mod connect;
mod controller;
mod doctor;
mod explain;
mod get;
mod held;
mod install;
mod join;
mod kubernetes;
mod manifests;
mod output;
mod plan;
mod policy;
mod status;
mod uninstall;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{CommandFactory, Parser};

use crate::{
    connect::{Failure, World},
    kubernetes::KubeArgs,
};

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  refused or failed: a document is invalid, an agent refused a revision, something is not there
  2  the command line is wrong
  3  no controller or API server answers
  4  the time is over (--wait --timeout)";

/// Nodemesh's operator command line and controller.
#[derive(Debug, Parser)]
#[command(name = "mesh-ctl", version, after_help = EXIT_CODES, after_long_help = EXIT_CODES)]
struct Arguments {
    /// The socket of a standalone controller [default: /run/nodemesh/operator.sock if it is there, else the cluster of
    /// the kubeconfig].
    #[arg(long, global = true, value_name = "PATH", env = "MESH_CTL_SOCKET")]
    socket: Option<PathBuf>,
    #[command(flatten)]
    kube: KubeArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Documents in and out: apply, get, delete, plan, check, explain.
    #[command(subcommand)]
    Policy(policy::PolicyCommand),
    /// Agents, the revision each holds, its pods and certificates.
    Status(status::StatusArgs),
    /// Versions of this program and of the controller.
    Version(join::VersionArgs),
    /// Join tokens for agents.
    #[command(subcommand)]
    Token(join::TokenCommand),
    /// The trust bundle as PEM, for agents to verify the controller by.
    Bundle,
    /// Put the mesh into a cluster and wait until it works.
    Install(install::InstallArgs),
    /// Bring the mesh in a cluster to this program's version.
    Upgrade(install::UpgradeArgs),
    /// Take the mesh out of a cluster, and every trace of it from the nodes.
    Uninstall(uninstall::UninstallArgs),
    /// Whether the mesh in a cluster is well, and what would be right where it is not.
    Doctor(doctor::DoctorArgs),
    /// Run the controller.
    Controller(Box<controller::ControllerConfig>),
    /// A completion script for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
}

/// A duration in the Gateway API's form.
fn duration(text: &str) -> Result<Duration, String> {
    let duration: mesh_api::policy::Duration = text
        .parse()
        .map_err(|e: mesh_api::policy::DurationError| format!("{e}, such as 90s or 1h30m"))?;
    Ok(duration.as_std())
}

async fn run(arguments: Arguments) -> Result<(), Failure> {
    let kube = arguments.kube.clone();
    let world = World::of(arguments.socket, arguments.kube);
    let world = &world;
    match arguments.command {
        Command::Policy(command) => policy::run(command, world).await,
        Command::Status(args) => status::run(args, world).await,
        Command::Version(args) => join::version(args, world).await,
        Command::Token(command) => join::token(command, world).await,
        Command::Bundle => join::bundle(world).await,
        Command::Install(args) => install::install(args, world).await,
        Command::Upgrade(args) => install::upgrade(args, world).await,
        Command::Uninstall(args) => uninstall::run(args, world).await,
        Command::Doctor(args) => doctor::run(args, world).await,
        Command::Controller(config) => controller::run(*config, &kube)
            .await
            .map_err(|error| Failure::refused(format!("{error:#}"))),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "mesh-ctl", &mut script);
            output::print(&String::from_utf8_lossy(&script));
            Ok(())
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Fails only if there is a default already, which is then as good.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = match &arguments.command {
        Command::Controller(_) => tokio::runtime::Builder::new_multi_thread().enable_all().build(),
        _ => tokio::runtime::Builder::new_current_thread().enable_all().build(),
    };
    let result = match runtime {
        Ok(runtime) => runtime.block_on(run(arguments)),
        Err(error) => Err(Failure::refused(format!("cannot start: {error}"))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            for line in failure.lines() {
                eprintln!("error: {line}");
            }
            ExitCode::from(failure.exit_code())
        }
    }
}
