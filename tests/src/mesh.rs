//! The mesh's own programs in a lab: one controller, one agent per node, and `mesh-ctl` for the operator.
//!
//! Everything they keep lies below the lab's directory: stores, sockets, logs and, per node, a bpffs mount of its own,
//! so that unmounting it lets every pinned program and map go at once.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    cgroup, plan,
    process::{self, Output, Site},
    state::{self, State},
    wait,
};

/// How long a controller or an agent may take to start.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long an agent may drain after it was asked to end.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// The port of the controller's gRPC.
const CONTROLLER_PORT: u16 = 15010;
/// The port of an agent's metrics.
pub const METRICS_PORT: u16 = 15020;

/// Where the mesh's programs are: `NODEMESH_PROGRAMS`, else beside this program or one directory above it, as cargo
/// puts them.
pub fn find_programs() -> Result<PathBuf> {
    if let Some(directory) = std::env::var_os("NODEMESH_PROGRAMS") {
        return Ok(directory.into());
    }
    let program = std::env::current_exe()?;
    let places = program.ancestors().skip(1).take(2);
    Ok(places
        .into_iter()
        .find(|place| place.join("mesh-ctl").exists())
        .or(program.parent())
        .context("this program has no directory")?
        .to_path_buf())
}

/// The controller's directory.
fn controller_directory(lab: &str) -> PathBuf {
    state::directory(lab).join("controller")
}

/// The controller's socket for operators.
pub fn operator_socket(lab: &str) -> PathBuf {
    controller_directory(lab).join("operator.sock")
}

/// An agent's directory.
fn agent_directory(lab: &str, node: &str) -> PathBuf {
    state::directory(lab).join("agents").join(node)
}

/// An agent's socket for administration.
pub fn admin_socket(lab: &str, node: &str) -> PathBuf {
    agent_directory(lab, node).join("admin.sock")
}

/// A keeper's socket.
pub fn keeper_socket(lab: &str, node: &str) -> PathBuf {
    agent_directory(lab, node).join("keeper.sock")
}

/// The socket of one generation of a node's agents.
fn generation_socket(lab: &str, node: &str, generation: u64) -> PathBuf {
    agent_directory(lab, node).join(format!("admin-{generation}.sock"))
}

/// The log of an agent.
pub fn agent_log(lab: &str, node: &str) -> PathBuf {
    state::directory(lab).join("logs").join(format!("agent-{node}.log"))
}

/// The access log of an agent: one JSON object per connection and request.
pub fn access_log(lab: &str, node: &str) -> PathBuf {
    state::directory(lab).join("logs").join(format!("access-{node}.jsonl"))
}

/// The log of the controller.
pub fn controller_log(lab: &str) -> PathBuf {
    state::directory(lab).join("logs/controller.log")
}

/// Where an agent pins its programs and maps.
fn pin_directory(lab: &str, node: &str) -> PathBuf {
    agent_directory(lab, node).join("bpf")
}

/// The cgroup of an agent, beside its node's.
pub fn agent_cgroup(lab_cgroup: &Path, node: &str) -> PathBuf {
    lab_cgroup.join(format!("agent-{node}"))
}

/// The cgroup of one generation of a node's agents; where there is no keeper, all of them are in the agent's own.
pub fn generation_cgroup(state: &State, lab_cgroup: &Path, node: &str, generation: u64) -> PathBuf {
    let agent = agent_cgroup(lab_cgroup, node);
    if state.keeper {
        agent.join(format!("g{generation}"))
    } else {
        agent
    }
}

/// The cgroup of a node's keeper.
pub fn keeper_cgroup(lab_cgroup: &Path, node: &str) -> PathBuf {
    lab_cgroup.join(format!("keeper-{node}"))
}

/// The cgroup of the controller.
pub fn controller_cgroup(lab_cgroup: &Path) -> PathBuf {
    lab_cgroup.join("controller")
}

fn program(state: &State, name: &str) -> Result<String> {
    let path = state.programs.join(name);
    ensure!(
        path.exists(),
        "{} is missing: run `cargo xtask build` first, or set NODEMESH_PROGRAMS",
        path.display()
    );
    Ok(path.display().to_string())
}

/// Starts the controller and waits until operators can talk to it.
pub fn start_controller(state: &State, lab_cgroup: &Path) -> Result<Child> {
    let lab = &state.name;
    let directory = controller_directory(lab);
    fs::create_dir_all(&directory)?;
    let site = Site {
        netns: plan::controller_netns(lab),
        cgroup: controller_cgroup(lab_cgroup),
        own_mounts: false,
        directory: directory.clone(),
        env: None,
    };
    cgroup::create(&site.cgroup)?;
    let address = state.plan().controller();
    let mut argv = vec![
        program(state, "mesh-ctl")?,
        "controller".into(),
        "--standalone".into(),
        format!("--listen=[::]:{CONTROLLER_PORT}"),
        format!("--tls-san={}", address.v4),
        format!("--tls-san={}", address.v6),
        format!("--data-dir={}", directory.display()),
        format!("--operator-socket={}", operator_socket(lab).display()),
    ];
    argv.extend(state.controller_args.iter().cloned());
    let child = start_in(&site, &argv, &controller_log(lab))?;
    wait::until("the controller's start", START_LIMIT, || {
        if !cgroup::populated(&site.cgroup)? {
            bail!("the controller ended:\n{}", tail(&controller_log(lab)));
        }
        let output = ctl(state, &["status", "-o", "json"])?;
        if output.status.success() {
            Ok(Some(()))
        } else {
            bail!("mesh-ctl status: {output}")
        }
    })?;
    Ok(child)
}

/// Runs `mesh-ctl` against this lab.
pub fn ctl(state: &State, args: &[&str]) -> Result<Output> {
    let mut command = ctl_command(state)?;
    let output = command
        .args(args)
        .stdin(std::process::Stdio::null())
        .output()
        .context("run mesh-ctl")?;
    Ok(output.into())
}

/// `mesh-ctl`, told which controller to talk to.
pub fn ctl_command(state: &State) -> Result<Command> {
    let mut command = Command::new(program(state, "mesh-ctl")?);
    command.arg("--socket").arg(operator_socket(&state.name));
    Ok(command)
}

/// Applies documents and waits until every agent has acknowledged the revision.
pub fn apply(state: &State, yaml: &str) -> Result<String> {
    let mut command = ctl_command(state)?;
    command.args(["policy", "apply", "-f", "-", "--wait"]);
    process::with_input(command, yaml)?
        .ok()
        .context("mesh-ctl policy apply")
}

/// Starts a keeper for a node; one that runs there is taken over. Returns when it has its place.
pub fn start_keeper(state: &State, lab_cgroup: &Path, node: &str) -> Result<Child> {
    let lab = &state.name;
    let directory = agent_directory(lab, node);
    fs::create_dir_all(&directory)?;
    let site = Site {
        netns: plan::node_netns(lab, node),
        cgroup: keeper_cgroup(lab_cgroup, node),
        own_mounts: false,
        directory: directory.clone(),
        env: None,
    };
    cgroup::create(&site.cgroup)?;
    let socket = keeper_socket(lab, node);
    let inode = |path: &Path| {
        fs::metadata(path)
            .map(|meta| std::os::unix::fs::MetadataExt::ino(&meta))
            .ok()
    };
    let before = inode(&socket);
    let argv = vec![
        program(state, "mesh-agent")?,
        "keeper".into(),
        format!("--socket={}", socket.display()),
    ];
    let child = start_in(&site, &argv, &agent_log(lab, node))?;
    wait::until(&format!("the keeper of {node}"), START_LIMIT, || {
        Ok(inode(&socket).is_some_and(|now| before != Some(now)).then_some(()))
    })
    .with_context(|| format!("its log ends:\n{}", tail(&agent_log(lab, node))))?;
    Ok(child)
}

/// Starts an agent of a node.
pub fn start_agent(state: &State, lab_cgroup: &Path, node: &str, generation: u64) -> Result<Child> {
    let (site, argv) = agent(state, lab_cgroup, node, generation)?;
    start_in(&site, &argv, &agent_log(&state.name, node))
}

/// Starts an agent of a node that is held at each line of its log.
pub fn step_agent(
    state: &State,
    lab_cgroup: &Path,
    node: &str,
    generation: u64,
    steps: &mut process::Steps,
) -> Result<Child> {
    let (site, argv) = agent(state, lab_cgroup, node, generation)?;
    steps.start(site.run(&argv))
}

/// Where an agent runs and how.
fn agent(state: &State, lab_cgroup: &Path, node: &str, generation: u64) -> Result<(Site, Vec<String>)> {
    let lab = &state.name;
    let directory = agent_directory(lab, node);
    let pins = pin_directory(lab, node);
    fs::create_dir_all(&directory)?;
    mount_bpffs(&pins)?;
    let token = directory.join("join-token");
    if !token.exists() {
        let text = ctl(state, &["token", "create", "--node", node])?
            .ok()
            .context("make a join token")?;
        fs::write(&token, text.trim())?;
        let bundle = ctl(state, &["bundle"])?.ok().context("read the trust bundle")?;
        fs::write(directory.join("trust-bundle.pem"), bundle)?;
    }
    let site = Site {
        netns: plan::node_netns(lab, node),
        cgroup: generation_cgroup(state, lab_cgroup, node, generation),
        own_mounts: false,
        directory: directory.clone(),
        env: None,
    };
    cgroup::create(&site.cgroup)?;
    let address = state.plan().controller();
    let mut argv = vec![
        program(state, "mesh-agent")?,
        "run".into(),
        format!("--node={node}"),
        format!("--controller={}:{CONTROLLER_PORT}", address.v4),
        format!("--join-token-file={}", token.display()),
        format!("--trust-bundle={}", directory.join("trust-bundle.pem").display()),
        format!("--state-dir={}", directory.join("state").display()),
        format!("--cgroup={}", lab_cgroup.join(node).display()),
        format!("--pin-root={}", pins.display()),
        format!("--instance={node}"),
        format!("--admin-socket={}", generation_socket(lab, node, generation).display()),
        format!("--access-log-path={}", access_log(lab, node).display()),
        "--log-format=text".into(),
    ];
    if state.keeper {
        argv.push(format!("--keeper={}", keeper_socket(lab, node).display()));
    }
    argv.extend(state.agent_args.iter().cloned());
    Ok((site, argv))
}

/// Starts a program and returns when it is in its cgroup: from then on, an empty cgroup means that it has ended.
fn start_in(site: &Site, argv: &[String], log: &Path) -> Result<Child> {
    let mut child = process::detach(site.run(argv), log)?;
    let what = format!("{} in its cgroup", argv.first().map_or("a program", String::as_str));
    wait::until(&what, START_LIMIT, || {
        let there = cgroup::populated(&site.cgroup)? || child.try_wait()?.is_some();
        Ok(there.then_some(()))
    })?;
    Ok(child)
}

/// Waits until an agent says that it is ready, and makes its socket the node's.
pub fn wait_agent_ready(state: &State, lab_cgroup: &Path, node: &str, generation: u64) -> Result<()> {
    let log = agent_log(&state.name, node);
    let cgroup = generation_cgroup(state, lab_cgroup, node, generation);
    let socket = generation_socket(&state.name, node, generation);
    let agent = program(state, "mesh-agent")?;
    let ready = wait::until(&format!("readiness of the agent on {node}"), START_LIMIT, || {
        if !cgroup::populated(&cgroup)? {
            return Ok(Some(false));
        }
        let probe = Command::new(&agent)
            .args(["probe", "ready", "--socket"])
            .arg(&socket)
            .output()?;
        ensure!(probe.status.success(), "{}", Output::from(probe));
        Ok(Some(true))
    });
    let ready = ready.with_context(|| format!("the agent's log ends:\n{}", tail(&log)))?;
    ensure!(ready, "the agent on {node} ended:\n{}", tail(&log));
    let stable = admin_socket(&state.name, node);
    let beside = stable.with_extension("new");
    // A link of a generation that never got ready.
    let _not_there_as_a_rule = fs::remove_file(&beside);
    std::os::unix::fs::symlink(&socket, &beside)?;
    fs::rename(&beside, &stable).with_context(|| format!("link {}", stable.display()))
}

/// Asks processes to end (SIGTERM).
pub fn terminate(pids: &[u32]) {
    for pid in pids {
        if let Some(pid) = i32::try_from(*pid).ok().and_then(rustix::process::Pid::from_raw) {
            // One that ended meanwhile is what we want.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
    }
}

/// Asks every generation of a node's agents to end and waits until they are gone.
pub fn stop_agent(lab_cgroup: &Path, node: &str) -> Result<()> {
    let cgroup = agent_cgroup(lab_cgroup, node);
    terminate(&cgroup::processes(&cgroup)?);
    wait::until(&format!("the end of the agent on {node}"), STOP_LIMIT, || {
        Ok((!cgroup::populated(&cgroup)?).then_some(()))
    })
}

fn mount_bpffs(directory: &Path) -> Result<()> {
    let mounted = fs::read_to_string("/proc/self/mountinfo")?;
    if mounted.lines().any(|line| line.split(' ').nth(4) == directory.to_str()) {
        return Ok(());
    }
    fs::create_dir_all(directory)?;
    run("mount", &["-t".as_ref(), "bpf".as_ref(), "bpf".as_ref(), directory])
}

/// Unmounts every file system that is mounted below a directory.
pub fn unmount_below(directory: &Path) -> Result<()> {
    let mounted = fs::read_to_string("/proc/self/mountinfo")?;
    let points = mounted.lines().filter_map(|line| line.split(' ').nth(4).map(Path::new));
    for point in points.filter(|point| point.starts_with(directory)) {
        run("umount", &[point])?;
    }
    Ok(())
}

fn run(program: &str, args: &[&Path]) -> Result<()> {
    let output = Command::new(program)
        .args(args)
        .output()
        .with_context(|| format!("run {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {args:?}: {}", said.trim());
    Ok(())
}

/// The last lines of a log.
pub fn tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

/// The pods, as `namespace/name`, that `mesh-ctl status -o json` shows as captured, under whichever node.
pub fn captured(status: &serde_json::Value) -> Vec<String> {
    use serde_json::Value;
    let mut found = Vec::new();
    match status {
        Value::Object(fields) => {
            let text = |key: &str| fields.get(key).and_then(Value::as_str);
            if let (Some(namespace), Some(name), Some(true)) = (
                text("namespace"),
                text("name"),
                fields.get("captured").and_then(Value::as_bool),
            ) {
                found.push(format!("{namespace}/{name}"));
            }
            found.extend(fields.values().flat_map(captured));
        }
        Value::Array(values) => found.extend(values.iter().flat_map(captured)),
        _ => {}
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captured_pods_of_all_nodes() {
        let pod =
            |name: &str, captured: bool| serde_json::json!({"namespace": "a", "name": name, "captured": captured});
        let status = serde_json::json!({
            "revision": 3,
            "nodes": [{"name": "n", "pods": [pod("x", true), pod("y", false)]}, {"name": "m", "pods": [pod("z", true)]}],
        });
        assert_eq!(captured(&status), ["a/x", "a/z"]);
    }
}
