//! `cargo xtask bench --scale`: a world of 10,000 services, 100,000 endpoints and 5,000 policies on one controller, with
//! one real agent and hundreds of simulated ones.
//!
//! The world is documents only: its pods have addresses and no processes, so that what is measured is control and not
//! traffic. `scale-load` (an example of mesh-ctl) fills the controller, stands in for the other agents and times
//! look-ups; this file starts and stops the real programs and reads what they used. It must never judge a figure.

use std::{
    fs,
    path::PathBuf,
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use mesh_tests::{Lab, LabConfig, Place, mesh, until};
use serde_json::{Value, json};

use super::machine;
use crate::{build, setup, shell};

/// How long one step may take, whatever the machine.
const STEP_LIMIT: Duration = Duration::from_secs(900);
/// Changes of one endpoint, one after the other.
const SINGLE_CHANGES: u32 = 20;
/// The node of the real agent.
const NODE: &str = "node-1";

/// How large the world is.
#[derive(Debug, Args)]
pub struct Size {
    /// With `--scale`: services.
    #[arg(long, default_value_t = 10_000)]
    services: usize,
    /// With `--scale`: endpoints.
    #[arg(long, default_value_t = 100_000)]
    endpoints: usize,
    /// With `--scale`: policies and routes.
    #[arg(long, default_value_t = 5_000)]
    policies: usize,
    /// With `--scale`: simulated agents.
    #[arg(long, default_value_t = 500)]
    agents: usize,
}

impl Size {
    fn arguments(&self) -> Vec<String> {
        vec![
            format!("--services={}", self.services),
            format!("--endpoints={}", self.endpoints),
            format!("--policies={}", self.policies),
            format!("--nodes={}", self.agents.max(100)),
        ]
    }
}

/// Builds what is needed and gives the directory of the programs.
pub fn build() -> Result<PathBuf> {
    setup::ensure_all()?;
    let programs = build::programs(&build::Options { release: true })?;
    let mut command = shell::cargo();
    command.args([
        "build",
        "--locked",
        "--release",
        "-p",
        "mesh-ctl",
        "--example",
        "scale-load",
    ]);
    command.arg("--target-dir").arg(shell::target()?);
    shell::run(&mut command)?;
    Ok(programs)
}

/// A lab with the world in it.
struct Scene<'a> {
    lab: Lab,
    load: PathBuf,
    size: &'a Size,
}

/// Measures everything, prints it and writes it to target/bench/scale.json.
pub fn run(name: &str, size: &Size) -> Result<ExitCode> {
    let load = mesh::find_programs()?.join("examples/scale-load");
    ensure!(load.exists(), "{} is missing", load.display());
    let mut config = LabConfig::new(name).nodes(1);
    config.service_rules = false;
    config.progress = |step| eprintln!("bench: {step}");
    let scene = Scene {
        lab: Lab::up(config)?,
        load: load.clone(),
        size,
    };
    let mut report = Vec::new();
    let mut measure = |what: &str, measured: Result<Value>| -> Result<()> {
        let figures = measured.with_context(|| what.to_owned())?;
        println!("{what}: {figures}");
        report.push((what.to_owned(), figures));
        Ok(())
    };
    measure("empty", scene.used())?;
    measure("fill", scene.load("fill", &[], true))?;
    measure("the agent has it", scene.agent_catches_up())?;
    measure("filled", scene.used())?;
    measure("one endpoint", scene.single_changes())?;
    measure("start from the controller", scene.restart(false))?;
    measure("start from the disk", scene.restart(true))?;
    let agents = format!("--agents={}", size.agents);
    measure("apply", scene.on_agents("apply", &[&agents]))?;
    measure("churn, one agent", scene.on_agents("churn", &[]))?;
    measure("churn, all agents", scene.on_agents("churn", &[&agents]))?;
    measure("after all", scene.used())?;
    scene.lab.down()?;
    let views = Command::new(&load).arg("views").args(size.arguments()).output()?;
    measure("views", Ok(serde_json::from_slice(&views.stdout)?))?;
    let directory = shell::target()?.join("bench");
    fs::create_dir_all(&directory)?;
    let file = directory.join("scale.json");
    let report: serde_json::Map<String, Value> = report.into_iter().collect();
    fs::write(&file, serde_json::to_string_pretty(&report)? + "\n")?;
    println!("written to {}", file.display());
    Ok(ExitCode::SUCCESS)
}

impl Scene<'_> {
    /// CPU seconds of the controller and of the agent.
    fn cpu(&self) -> Result<[f64; 2]> {
        let controller = mesh::controller_cgroup(self.lab.cgroup());
        let agent = mesh::agent_cgroup(self.lab.cgroup(), NODE);
        Ok([machine::cgroup_seconds(&controller)?, machine::cgroup_seconds(&agent)?])
    }

    /// The memory of both.
    fn used(&self) -> Result<Value> {
        let mib = |cgroup: PathBuf| -> Result<f64> { Ok(machine::resident(&[cgroup])? as f64 / f64::from(1 << 20)) };
        Ok(json!({
            "controller_mib": mib(mesh::controller_cgroup(self.lab.cgroup()))?,
            "agent_mib": mib(mesh::agent_cgroup(self.lab.cgroup(), NODE))?,
        }))
    }

    /// Runs a verb of scale-load where it can reach both doors of the controller.
    fn load(&self, verb: &str, more: &[&str], sized: bool) -> Result<Value> {
        let socket = mesh::operator_socket(self.lab.name()).display().to_string();
        let mut argv = vec![
            self.load.display().to_string(),
            verb.to_owned(),
            "--socket".to_owned(),
            socket,
        ];
        argv.extend(more.iter().map(|argument| (*argument).to_owned()));
        if sized {
            argv.extend(self.size.arguments());
        }
        let output = self.lab.site(Place::Controller)?.exec(&argv, STEP_LIMIT)?;
        serde_json::from_str(&output.ok()?).context("scale-load says something else than JSON")
    }

    fn on_agents(&self, verb: &str, more: &[&str]) -> Result<Value> {
        let before = self.cpu()?;
        let more = [&["--address=127.0.0.1:15010"][..], more].concat();
        let mut figures = self.load(verb, &more, verb == "churn")?;
        let waited = self.agent_catches_up()?;
        let after = self.cpu()?;
        if let Value::Object(figures) = &mut figures {
            figures.insert("controller_cpu_seconds".into(), json!(after[0] - before[0]));
            figures.insert("agent_cpu_seconds".into(), json!(after[1] - before[1]));
            figures.insert("real_agent_behind_seconds".into(), waited["seconds"].clone());
        }
        Ok(figures)
    }

    /// Waits until the agent holds the newest revision.
    fn agent_catches_up(&self) -> Result<Value> {
        let started = Instant::now();
        until("the agent has the newest revision", STEP_LIMIT, || {
            let status = self.lab.ctl_json(&["status"])?;
            let agents = status["agents"].as_array().context("no agents")?;
            let ours = agents.iter().find(|agent| agent["node"] == NODE).context("no agent")?;
            Ok((ours["current"] == true).then_some(()))
        })?;
        Ok(json!({"seconds": started.elapsed().as_secs_f64()}))
    }

    /// One endpoint goes and comes, by an apply of its own each time.
    fn single_changes(&self) -> Result<Value> {
        let before = self.cpu()?;
        let rate = ["--rate=2", "--applies=2", &format!("--seconds={}", SINGLE_CHANGES / 2)];
        let mut figures = self.load("churn", &rate, true)?;
        self.agent_catches_up()?;
        let after = self.cpu()?;
        let each = |index: usize| (after[index] - before[index]) * 1000.0 / f64::from(SINGLE_CHANGES);
        if let Value::Object(figures) = &mut figures {
            figures.insert("controller_cpu_ms_each".into(), json!(each(0)));
            figures.insert("agent_cpu_ms_each".into(), json!(each(1)));
        }
        Ok(figures)
    }

    /// Ends the agent and starts it again; with its snapshot the controller is gone meanwhile, without it there is only
    /// the controller.
    fn restart(&self, from_disk: bool) -> Result<Value> {
        if from_disk {
            self.lab.kill_controller()?;
        }
        self.lab.stop_agent(NODE)?;
        if !from_disk {
            let state = self.lab.directory();
            let found = Command::new("find")
                .arg(&state)
                .args(["-name", "snapshot*", "-delete"])
                .status()?;
            ensure!(found.success(), "the snapshot cannot be removed");
        }
        let before = self.cpu()?;
        let started = Instant::now();
        self.lab.start_agent(NODE)?;
        let ready = started.elapsed();
        let holds = until("the agent's view", STEP_LIMIT, || {
            let resources = self.lab.metrics(NODE)?.sum("nodemesh_agent_view_resources", &[]);
            Ok((resources as usize >= self.size.endpoints).then(|| started.elapsed()))
        })?;
        let after = self.cpu()?;
        let used = self.used();
        if from_disk {
            self.lab.start_controller()?;
        }
        Ok(json!({
            "ready_seconds": ready.as_secs_f64(),
            "has_view_seconds": holds.as_secs_f64(),
            "agent_cpu_seconds": after[1] - before[1],
            "used": used.unwrap_or_default(),
        }))
    }
}
