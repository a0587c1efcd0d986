//! `cargo xtask lab`: the lab by hand. Every verb works on a lab by its name; exit codes of programs pass through.

use std::{
    env,
    io::Read,
    path::PathBuf,
    process::{ExitCode, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand};
use mesh_tests::{Lab, LabConfig, Place, lab, mesh, state};

use crate::{build, setup, shell};

/// The lab and what to do with it.
#[derive(Debug, Args)]
pub struct Options {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Args)]
struct Name {
    /// The lab's name.
    #[arg(long, default_value = "lab")]
    name: String,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Starts a lab; returns when every enrolled pod is captured and every probe passes.
    Up {
        #[command(flatten)]
        name: Name,
        /// Kubernetes YAML: a file or a directory.
        #[arg(short = 'f', long = "file")]
        files: Vec<PathBuf>,
        /// How many nodes, unless the files say.
        #[arg(long, default_value_t = 2)]
        nodes: usize,
        /// Without agents and controller.
        #[arg(long)]
        no_mesh: bool,
        /// Runs the programs built with optimizations.
        #[arg(long)]
        release: bool,
    },
    /// Runs a command in a pod (`NS/POD`), or with `--node` on a node.
    Exec {
        #[command(flatten)]
        name: Name,
        /// The place is a node, not a pod.
        #[arg(long)]
        node: bool,
        /// `NS/POD`, or a node's name.
        place: String,
        /// The command.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Runs mesh-ctl against the lab.
    Ctl {
        #[command(flatten)]
        name: Name,
        /// mesh-ctl's arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Prints what a pod (`NS/POD`), an agent (`NODE`) or the `controller` wrote; without a name, all agents.
    Logs {
        #[command(flatten)]
        name: Name,
        /// `NS/POD`, a node's name or `controller`.
        of: Option<String>,
    },
    /// Adds or deletes pods.
    #[command(subcommand)]
    Pod(PodVerb),
    /// Applies more documents of any kind: pods, services, policies.
    Apply {
        #[command(flatten)]
        name: Name,
        /// Kubernetes YAML: files, directories, or `-` for the standard input.
        #[arg(short = 'f', long = "file", required = true)]
        files: Vec<PathBuf>,
    },
    /// Shows the labs of this machine, or one of them.
    Status {
        /// The lab's name; all labs without it.
        #[arg(long)]
        name: Option<String>,
    },
    /// Removes a lab, also one whose owner was killed.
    Down {
        #[command(flatten)]
        name: Name,
    },
}

#[derive(Debug, Subcommand)]
enum PodVerb {
    /// Adds the pods of the files; returns when they are captured and ready.
    Add {
        #[command(flatten)]
        name: Name,
        /// Kubernetes YAML: files, directories, or `-` for the standard input.
        #[arg(short = 'f', long = "file", required = true)]
        files: Vec<PathBuf>,
    },
    /// Deletes pods.
    Delete {
        #[command(flatten)]
        name: Name,
        /// `NS/POD`.
        #[arg(required = true)]
        pods: Vec<String>,
    },
}

/// The verb.
pub fn run(options: Options) -> Result<ExitCode> {
    if let Verb::Up { release, no_mesh, .. } = &options.verb
        && env::var_os("NODEMESH_PROGRAMS").is_none()
    {
        setup::ensure_all()?;
        if !no_mesh {
            let programs = build::programs(&build::Options { release: *release })?;
            return with_programs(&programs);
        }
    }
    if let Some(code) = shell::again_as_root()? {
        return Ok(code);
    }
    perform(options.verb)
}

/// Runs the same verb again in a process that knows where the programs are, as root.
pub fn with_programs(programs: &std::path::Path) -> Result<ExitCode> {
    let mut command = shell::root_command("env")?;
    let mut pair = std::ffi::OsString::from("NODEMESH_PROGRAMS=");
    pair.push(programs);
    command.arg(pair).arg(env::current_exe()?).args(env::args_os().skip(1));
    Ok(shell::exit(command.status().context("run this program again")?))
}

fn perform(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Up {
            name: Name { name },
            files,
            nodes,
            no_mesh,
            ..
        } => {
            setup::check_kernel()?;
            let started = Instant::now();
            let mut config = LabConfig::new(&name);
            config.files = files;
            config.nodes = nodes;
            config.mesh = !no_mesh;
            config.progress = |step| eprintln!("lab: {step}");
            let lab = Lab::up(config)?;
            let pods = lab.state()?.pods.len();
            lab.keep()?;
            println!(
                "lab {name} is up with {pods} pods in {}",
                shell::time(started.elapsed())
            );
        }
        Verb::Exec {
            name: Name { name },
            node,
            place,
            command,
        } => {
            let lab = Lab::open(&name)?;
            let place = if node { Place::Node(&place) } else { Place::Pod(&place) };
            let status = lab.site(place)?.run(&command).status().context("run the command")?;
            return Ok(shell::exit(status));
        }
        Verb::Ctl {
            name: Name { name },
            args,
        } => {
            let lab = Lab::open(&name)?;
            let status = mesh::ctl_command(&lab.state()?)?
                .args(args)
                .stdin(Stdio::inherit())
                .status();
            return Ok(shell::exit(status.context("run mesh-ctl")?));
        }
        Verb::Logs {
            name: Name { name },
            of,
        } => logs(&Lab::open(&name)?, of.as_deref())?,
        Verb::Pod(PodVerb::Add {
            name: Name { name },
            files,
        })
        | Verb::Apply {
            name: Name { name },
            files,
        } => {
            let lab = Lab::open(&name)?;
            lab.apply(&read_all(&files)?)?;
        }
        Verb::Pod(PodVerb::Delete {
            name: Name { name },
            pods,
        }) => {
            let lab = Lab::open(&name)?;
            for pod in pods {
                lab.delete_pod(&pod)?;
                println!("pod {pod} deleted");
            }
        }
        Verb::Status { name } => match name {
            Some(name) => status(&Lab::open(&name)?)?,
            None => list()?,
        },
        Verb::Down { name: Name { name } } => {
            let existed = state::directory(&name).exists();
            lab::remove(&name)?;
            ensure!(existed, "no lab is called {name:?}");
            println!("lab {name} is gone");
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn read_all(files: &[PathBuf]) -> Result<String> {
    let mut text = String::new();
    for file in files {
        if file.as_os_str() == "-" {
            text.push_str("---\n");
            std::io::stdin().read_to_string(&mut text)?;
            text.push('\n');
            continue;
        }
        let items = lab::read_manifests(file)?;
        text.push_str(&mesh_tests::kube::to_yaml(items.iter().map(|item| &item.value))?);
    }
    Ok(text)
}

fn logs(lab: &Lab, of: Option<&str>) -> Result<()> {
    match of {
        Some("controller") => print!("{}", lab.controller_log()?),
        Some(pod) if pod.contains('/') => print!("{}", lab.logs(pod)?),
        Some(node) => {
            lab.state()?.node(node)?;
            print!("{}", lab.agent_log(node)?);
        }
        None => {
            for node in lab.state()?.nodes {
                println!("--- agent on {}", node.name);
                print!("{}", lab.agent_log(&node.name)?);
            }
        }
    }
    Ok(())
}

fn list() -> Result<()> {
    let labs = state::labs();
    if labs.is_empty() {
        println!("no lab runs on this machine");
    }
    for name in labs {
        match state::load(&name) {
            Ok(state) => {
                let owner = match state.owner {
                    None => String::from("kept"),
                    Some(owner) if owner.alive() => format!("of process {}", owner.pid),
                    Some(_) => String::from("its owner is gone"),
                };
                println!(
                    "{name}: {} nodes, {} pods, {}, {owner}",
                    state.nodes.len(),
                    state.pods.len(),
                    if state.mesh { "meshed" } else { "without mesh" }
                );
            }
            Err(error) => println!("{name}: broken ({error:#}); `cargo xtask lab down --name {name}` removes it"),
        }
    }
    Ok(())
}

fn status(lab: &Lab) -> Result<()> {
    let state = lab.state()?;
    println!(
        "{:<28} {:<10} {:<16} {:<24} {:<9} READY",
        "POD", "NODE", "IPV4", "IPV6", "ENROLLED"
    );
    for pod in &state.pods {
        println!(
            "{:<28} {:<10} {:<16} {:<24} {:<9} {}",
            pod.full_name(),
            pod.node,
            pod.addresses[0].to_string(),
            pod.addresses[1].to_string(),
            pod.enrolled,
            pod.ready
        );
    }
    println!();
    println!("{:<28} ADDRESSES", "SERVICE");
    for service in &state.services {
        let addresses: Vec<_> = service.addresses.iter().map(ToString::to_string).collect();
        let addresses = if addresses.is_empty() {
            "headless".into()
        } else {
            addresses.join(", ")
        };
        println!("{:<28} {addresses}", format!("{}/{}", service.namespace, service.name));
    }
    if state.mesh {
        println!();
        let output = lab.ctl(&["status"])?;
        print!("{}", output.stdout);
        if !output.status.success() {
            bail!("mesh-ctl status: {output}");
        }
    }
    Ok(())
}
