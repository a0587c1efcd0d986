//! The example shop under test: what its pods ask of each other, and traffic that goes on while something fails.

// Each test file uses its own part of this.
#![allow(dead_code)]

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use mesh_tests::{Background, Lab, LabConfig, until};
use serde_json::Value as Json;

/// How long anything may take that happens by itself.
pub const LIMIT: Duration = Duration::from_secs(30);
/// What "at once" means on a busy machine.
pub const AT_ONCE: Duration = Duration::from_secs(2);
/// A pod of the mesh on `node-1`.
pub const VISITOR: &str = "shop/visitor";
/// A pod outside of the mesh on `node-1`.
pub const STRANGER: &str = "outside/stranger";

/// Strict mutual TLS for the whole shop.
pub const STRICT: &str = "\
apiVersion: nodemesh.io/v1alpha1
kind: MeshPolicy
metadata: {name: strict, namespace: shop}
spec: {targetRefs: [{kind: Namespace, name: shop}], mtls: {mode: strict}}
";

/// Sends `PING` to a redis over one connection, again and again, until the file of its third argument exists.
const PING: &str = r#"
import os, socket, sys, time
flow = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20)
count = 0
while not os.path.exists(sys.argv[3]):
    flow.sendall(b"PING\r\n")
    answer = flow.recv(64)
    if answer != b"+PONG\r\n":
        sys.exit("lost after %d: %r" % (count, answer))
    count += 1
    print(count, flush=True)
    time.sleep(0.02)
"#;

/// A lab with the shop.
pub fn shop(name: &str) -> LabConfig {
    LabConfig::test(name).file(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/shop"))
}

/// How `curl` fared.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its exit code: 0 for any answer, 7 for a refused connection, 52 and 56 for one that was reset.
    pub exit: i32,
    /// The status of the answer; 0 without one.
    pub status: u16,
    /// How long it took.
    pub time: Duration,
    /// The body.
    pub body: String,
}

impl Answer {
    /// That it failed, and not by waiting.
    pub fn refused_at_once(&self) -> bool {
        (self.exit != 0 || self.status == 503) && self.time < AT_ONCE
    }
}

/// Asks once from a pod, over a connection of its own.
pub fn get(lab: &Lab, pod: &str, url: &str) -> Result<Answer> {
    let argv = [
        "curl",
        "-sS",
        "--max-time",
        "20",
        "-w",
        "\n%{http_code} %{time_total}",
        url,
    ];
    let output = lab.exec(pod, &argv)?;
    let (body, facts) = output
        .stdout
        .rsplit_once('\n')
        .with_context(|| format!("curl {url}: {output}"))?;
    let (status, time) = facts.split_once(' ').with_context(|| format!("curl {url}: {output}"))?;
    Ok(Answer {
        exit: output.code(),
        status: status.parse()?,
        time: Duration::from_secs_f64(time.parse()?),
        body: body.into(),
    })
}

/// Asks until it is served; gives how long that took.
pub fn served_again(lab: &Lab, pod: &str, url: &str) -> Result<Duration> {
    let began = Instant::now();
    until(&format!("{url} served to {pod}"), LIMIT, || {
        let answer = get(lab, pod, url)?;
        ensure!(answer.exit == 0 && answer.status == 200, "{answer:?}");
        Ok(Some(began.elapsed()))
    })
}

/// Applies documents by `mesh-ctl` alone; returns when all connected agents hold them.
pub fn apply(lab: &Lab, yaml: &str) -> Result<String> {
    let output = lab.ctl_with_input(&["policy", "apply", "-f", "-", "--wait"], yaml)?;
    output.ok().context("mesh-ctl policy apply")
}

/// What `mesh-ctl status` says of a node's agent.
pub fn agent(lab: &Lab, node: &str) -> Result<Json> {
    let status = lab.ctl_json(&["status"])?;
    let agents = status["agents"].as_array().into_iter().flatten();
    let found = agents.clone().find(|agent| agent["node"] == node).cloned();
    found.with_context(|| format!("no agent of {node} in {status}"))
}

/// The newest revision.
pub fn revision(lab: &Lab) -> Result<u64> {
    let status = lab.ctl_json(&["status"])?;
    status["controller"]["revision"]
        .as_u64()
        .with_context(|| format!("no revision in {status}"))
}

/// Waits until all agents are connected and hold the newest revision.
pub fn all_current(lab: &Lab) -> Result<()> {
    until("agents connected and current", LIMIT, || {
        let status = lab.ctl_json(&["status"])?;
        let agents = status["agents"].as_array().cloned().unwrap_or_default();
        let good = agents
            .iter()
            .all(|agent| agent["connected"] == true && agent["current"] == true);
        ensure!(good && agents.len() == 2, "{status:#}");
        Ok(Some(()))
    })
}

/// How often an event of the agent itself happened on a node.
pub fn events(lab: &Lab, node: &str, event: &str) -> Result<f64> {
    Ok(lab
        .metrics(node)?
        .sum("nodemesh_agent_events_total", &[("event", event)]))
}

/// Waits until a node's access log has a record of which `good` is true.
pub fn record(lab: &Lab, node: &str, good: impl Fn(&Json) -> bool) -> Result<Json> {
    until("the record in the access log", LIMIT, || {
        let records = lab.access_log(node)?;
        let last = records.last().cloned();
        let found = records.into_iter().rev().find(&good);
        found.map(Some).with_context(|| format!("the last one is {last:?}"))
    })
}

fn stop_file(lab: &Lab) -> PathBuf {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    lab.directory()
        .join(format!("stop-{}", NUMBER.fetch_add(1, Ordering::Relaxed)))
}

/// Requests that go on beside the test.
#[derive(Debug)]
pub struct Load {
    program: Background,
    stop: PathBuf,
}

impl Load {
    /// Starts requests at a rate: `http` over four kept connections, `connect` each over its own.
    pub fn start(lab: &Lab, pod: &str, kind: &str, url: &str, rate: u32) -> Result<Load> {
        let stop = stop_file(lab);
        let program = lab.state()?.programs.join("lab-load").display().to_string();
        let (rate, path) = (rate.to_string(), stop.display().to_string());
        let argv = [
            &program,
            kind,
            url,
            "--rate",
            &rate,
            "--connections",
            "4",
            "--seconds",
            "300",
            "--stop",
            &path,
        ];
        Ok(Load {
            program: lab.exec_background(pod, &argv)?,
            stop,
        })
    }

    /// Ends the requests and gives what their sender counted.
    pub fn finish(self) -> Result<Json> {
        std::fs::write(&self.stop, "")?;
        let said = self.program.wait(LIMIT)?.ok()?;
        serde_json::from_str(&said).with_context(|| said)
    }

    /// The same, and every single one must have been served.
    pub fn finish_served(self) -> Result<Json> {
        let seen = self.finish()?;
        let requests = seen["requests"].as_u64().unwrap_or(0);
        ensure!(
            requests > 0 && seen["statuses"]["200"] == requests,
            "not all were served: {seen:#}"
        );
        Ok(seen)
    }
}

/// One connection to the shop's redis that is never still.
#[derive(Debug)]
pub struct Flow {
    program: Background,
    stop: PathBuf,
}

impl Flow {
    /// Opens it, and returns when it carries something.
    pub fn open(lab: &Lab, pod: &str, host: &str) -> Result<Flow> {
        let stop = stop_file(lab);
        let argv = ["python3", "-uc", PING, host, "6379", &stop.display().to_string()];
        let mut flow = Flow {
            program: lab.exec_background(pod, &argv)?,
            stop,
        };
        flow.goes_on()?;
        Ok(flow)
    }

    fn count(&self) -> u64 {
        self.program
            .stdout()
            .lines()
            .last()
            .and_then(|line| line.parse().ok())
            .unwrap_or(0)
    }

    /// That it still carries something both ways.
    pub fn goes_on(&mut self) -> Result<()> {
        let wanted = self.count() + 3;
        until("answers on the open connection", LIMIT, || {
            ensure!(self.program.running()?, "it ended: {}", self.program.stderr());
            Ok((self.count() >= wanted).then_some(()))
        })
    }

    /// Closes it; it must have been whole until now.
    pub fn close(mut self) -> Result<()> {
        self.goes_on()?;
        std::fs::write(&self.stop, "")?;
        self.program.wait(LIMIT)?.ok().map(drop)
    }

    /// That it is cut, and that its application is told so by a reset, not by an end that looks clean.
    pub fn expect_reset(self) -> Result<()> {
        let output = self.program.wait(LIMIT)?;
        ensure!(output.stderr.contains("ConnectionResetError"), "not a reset: {output}");
        Ok(())
    }

    /// That it is cut, however its application learns of it.
    pub fn expect_cut(self) -> Result<()> {
        let output = self.program.wait(LIMIT)?;
        ensure!(!output.status.success(), "nothing happened to it: {output}");
        Ok(())
    }
}
