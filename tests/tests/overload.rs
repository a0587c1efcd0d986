//! One tenant asks for everything: places, descriptors, memory, the disk, the processor. What the others notice of it is
//! measured, what it gets itself is a refusal with a name, and afterwards everything is as before.
//!
//! `NODEMESH_SCALE=10` makes the counts ten times as large, on a machine that is good for it. Figures are printed; what is
//! asserted leaves room for a machine that does other things at the same time.

#[path = "overload/memory.rs"]
mod memory;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use memory::Bound;
use mesh_tests::{Background, Lab, LabConfig, until};
use serde_json::Value as Json;

/// How long anything may take that happens by itself.
const LIMIT: Duration = Duration::from_secs(40);
/// Who asks for everything, and who asks for little, on one node.
const GREEDY: &str = "tenants/greedy";
const MODEST: &str = "tenants/modest";
/// Both their nodes, source's and destination's.
const NODES: [&str; 2] = ["node-1", "node-2"];
const HOLD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/overload/hold.py");

/// Each tenant has a destination of its own on the other node, so that what they share is the mesh.
const TENANTS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: tenants, labels: {nodemesh.io/mesh: enabled}}
---
apiVersion: nodemesh.io/v1alpha1
kind: MeshPolicy
metadata: {name: strict, namespace: tenants}
spec: {targetRefs: [{kind: Namespace, name: tenants}], mtls: {mode: strict}}
"#;
const TENANT: &str = r#"
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: NAME, namespace: tenants}
---
apiVersion: v1
kind: Pod
metadata: {name: NAME, namespace: tenants, labels: {app: NAME}}
spec:
  nodeName: node-1
  serviceAccountName: NAME
  containers: [{name: main, command: [sleep, infinity]}]
---
apiVersion: v1
kind: Pod
metadata: {name: NAME-far, namespace: tenants, labels: {app: NAME-far}}
spec:
  nodeName: node-2
  serviceAccountName: NAME
  containers:
  - name: serve
    command: [PROGRAMS/bench-load, serve, "8080", "9090"]
    readinessProbe: {tcpSocket: {port: 8080}}
---
apiVersion: v1
kind: Service
metadata: {name: NAME-far, namespace: tenants}
spec:
  selector: {app: NAME-far}
  ports: [{name: http, port: 8080}, {name: tcp-opaque, port: 9090}]
"#;

fn lab(name: &str, config: Option<&Path>) -> Result<Lab> {
    let programs = mesh_tests::mesh::find_programs()?.display().to_string();
    let tenant = |name: &str| TENANT.replace("NAME", name).replace("PROGRAMS", &programs);
    let documents = [TENANTS, &tenant("greedy"), &tenant("modest")].concat();
    let mut lab = LabConfig::test(name).manifest(documents);
    if let Some(config) = config {
        lab = lab.agent_arg(&format!("--config={}", config.display()));
    }
    Lab::up(lab)
}

fn scaled(count: usize) -> usize {
    let scale = std::env::var("NODEMESH_SCALE").ok().and_then(|text| text.parse().ok());
    count * scale.unwrap_or(1)
}

fn program(lab: &Lab, name: &str) -> Result<String> {
    Ok(lab.state()?.programs.join(name).display().to_string())
}

fn destination(lab: &Lab, tenant: &str) -> Result<String> {
    Ok(lab.service_ip(&format!("{tenant}-far"))?.to_string())
}

/// Connections that the greedy tenant holds.
struct Held {
    program: Background,
    stop: PathBuf,
    lines: usize,
}

impl Held {
    /// Opens them, and returns when each is open or refused, with how many of them are what.
    fn open(lab: &Lab, kind: &str, port: u16, count: usize) -> Result<(Held, Json)> {
        let number = lab.state()?.counter;
        let stop = lab.directory().join(format!("stop-{number}"));
        let (host, port, count) = (destination(lab, GREEDY)?, port.to_string(), count.to_string());
        let argv = ["python3", HOLD, kind, &host, &port, &count, &stop.display().to_string()];
        let mut held = Held {
            program: lab.exec_background(GREEDY, &argv)?,
            stop,
            lines: 0,
        };
        let seen = held.line()?;
        Ok((held, seen))
    }

    fn line(&mut self) -> Result<Json> {
        let line = until("a word of the one who holds connections", LIMIT * 2, || {
            let line = self.program.stdout().lines().nth(self.lines).map(str::to_owned);
            ensure!(
                line.is_some() || self.program.running()?,
                "it ended: {}",
                self.program.stderr()
            );
            Ok(line)
        })?;
        self.lines += 1;
        serde_json::from_str(&line).with_context(|| line)
    }

    /// Closes them all; says how many lived until now.
    fn close(mut self) -> Result<u64> {
        fs::write(&self.stop, "")?;
        let said = self.line()?;
        let output = self.program.wait(LIMIT)?;
        ensure!(output.status.success(), "{output}");
        said["alive"].as_u64().with_context(|| said.to_string())
    }
}

/// What the modest tenant sees of its few requests over one kept connection.
fn modest(lab: &Lab, seconds: &str) -> Result<Json> {
    let address = format!("{}:8080", destination(lab, MODEST)?);
    let load = program(lab, "bench-load")?;
    let argv = [
        &load,
        "keep",
        &address,
        "/bytes/1024",
        "--rate",
        "50",
        "--seconds",
        seconds,
    ];
    let said = lab.exec(MODEST, &argv)?.ok()?;
    let seen: Json = serde_json::from_str(&said).with_context(|| said)?;
    let none_failed = seen["errors"].as_object().is_some_and(|errors| errors.is_empty());
    ensure!(
        none_failed && seen["answered"].as_u64() > Some(0),
        "the modest tenant: {seen:#}"
    );
    Ok(seen)
}

/// The same, as soon as what others asked for fills the buffers that it may fill: until then there is one processor.
fn modest_in_the_end(lab: &Lab) -> Result<()> {
    until("answers for the modest tenant", LIMIT, || modest(lab, "1").map(Some)).map(drop)
}

/// A new connection of the modest tenant's, with one request.
fn modest_is_served(lab: &Lab) -> Result<()> {
    let url = format!("http://{}:8080/bytes/10", destination(lab, MODEST)?);
    let argv = ["curl", "-sS", "--fail", "--max-time", "10", "-o", "/dev/null", &url];
    lab.exec(MODEST, &argv)?.ok().map(drop)
}

fn refused(lab: &Lab, node: &str) -> Result<f64> {
    let metrics = lab.metrics(node)?;
    Ok(metrics.sum("nodemesh_agent_refusals_total", &[("reason", "capacity")]))
}

fn event(lab: &Lab, node: &str, name: &str) -> Result<f64> {
    Ok(lab
        .metrics(node)?
        .sum("nodemesh_agent_events_total", &[("event", name)]))
}

/// The one process of a node's agent.
fn agent(lab: &Lab, node: &str) -> Result<u32> {
    let pids = lab.agent_pids(node)?;
    ensure!(pids.len() == 1, "{pids:?}");
    Ok(pids[0])
}

fn descriptors(lab: &Lab, node: &str) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{}/fd", agent(lab, node)?))?.count())
}

fn resident(lab: &Lab, node: &str) -> Result<u64> {
    lab.memory(&[agent(lab, node)?])
}

/// What must be as before when it is over.
struct Before {
    pids: Vec<u32>,
    descriptors: Vec<usize>,
    memory: Vec<u64>,
}

impl Before {
    fn look(lab: &Lab) -> Result<Before> {
        modest_is_served(lab)?;
        Ok(Before {
            pids: NODES.map(|node| agent(lab, node)).into_iter().collect::<Result<_>>()?,
            descriptors: NODES
                .map(|node| descriptors(lab, node))
                .into_iter()
                .collect::<Result<_>>()?,
            memory: NODES
                .map(|node| resident(lab, node))
                .into_iter()
                .collect::<Result<_>>()?,
        })
    }

    /// The same processes serve, and hold neither descriptors nor memory of what was.
    fn is_back(&self, lab: &Lab) -> Result<()> {
        for node in NODES {
            let closed = || Ok((lab.metrics(node)?.sum("nodemesh_agent_records_open", &[]) <= 4.0).then_some(()));
            until("the end of what was open", LIMIT, closed)?;
        }
        modest_is_served(lab)?;
        modest(lab, "0.5")?;
        for (number, node) in NODES.into_iter().enumerate() {
            ensure!(agent(lab, node)? == self.pids[number], "{node} has another agent");
            // Idle tunnels may stay: 128 of a pair and worker at the most, and for no longer than a minute.
            let bound = self.descriptors[number] + 2 * 2 * 128 + 32;
            let now = descriptors(lab, node)?;
            ensure!(
                now <= bound,
                "{now} descriptors on {node}, {} before",
                self.descriptors[number]
            );
            // The allocator gives back at its next look.
            let bound = self.memory[number] + 24 * 1024;
            let slim = || Ok((resident(lab, node)? <= bound).then_some(()));
            let slim = until("the memory back", LIMIT, slim);
            slim.with_context(|| {
                format!(
                    "{:?} KiB on {node}, {} before",
                    resident(lab, node),
                    self.memory[number]
                )
            })?;
        }
        Ok(())
    }
}

fn config(text: &str) -> Result<tempfile::NamedTempFile> {
    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), text)?;
    Ok(file)
}

#[test]
fn a_tenant_that_takes_every_place_leaves_some_to_the_others() -> Result<()> {
    let config = config("workers: 2\npath: {connectionsMax: 100}\n")?;
    let lab = lab("places", Some(config.path()))?;
    let before = Before::look(&lab)?;
    let (held, seen) = Held::open(&lab, "ask", 8080, 400)?;
    println!("400 connections where one source may have 75 on each of two workers: {seen}");
    let open = seen["open"].as_u64().context("open")?;
    ensure!((100..=150).contains(&open), "{seen}");
    let refusals = seen["refused"].as_object().context("refused")?;
    // A reset by its own agent; 503 where it is the destination's that has no more places for this source.
    let known = ["ECONNRESET", "EPIPE", "HTTP/1.1 503 Service Unavailable"];
    ensure!(refusals.keys().all(|name| known.contains(&name.as_str())), "{seen}");
    let count: u64 = refusals.values().filter_map(Json::as_u64).sum();
    ensure!(open + count == 400, "each is served or refused: {seen}");
    let told = refused(&lab, "node-1")? + refused(&lab, "node-2")?;
    ensure!(told >= 250.0, "{told}");
    ensure!(event(&lab, "node-1", "bound-reached")? >= 1.0);
    for _ in 0..10 {
        modest_is_served(&lab)?;
    }
    modest(&lab, "1")?;
    ensure!(held.close()? == open, "those that were taken are kept");
    before.is_back(&lab)?;
    // What it gave back it may have again.
    let (held, seen) = Held::open(&lab, "ask", 8080, 100)?;
    ensure!(seen["open"] == 100, "{seen}");
    held.close()?;
    before.is_back(&lab)?;
    lab.down()
}

#[test]
fn a_process_without_descriptors_lives_on_and_recovers() -> Result<()> {
    let lab = lab("files", None)?;
    let before = Before::look(&lab)?;
    // Behind its back: it believes that it has many.
    let pid = agent(&lab, "node-1")?.to_string();
    let limit = descriptors(&lab, "node-1")? + 150;
    let status = Command::new("prlimit")
        .args(["--pid", &pid, &format!("--nofile={limit}:")])
        .status()?;
    ensure!(status.success());
    let (held, seen) = Held::open(&lab, "silent", 9090, 500)?;
    println!("500 connections with 150 descriptors left: {seen}");
    until("the event", LIMIT, || {
        let log = lab.agent_log("node-1")?;
        Ok(log.contains("descriptors or memory").then_some(()))
    })?;
    ensure!(before.pids == [agent(&lab, "node-1")?, agent(&lab, "node-2")?]);
    held.close()?;
    until("service again", LIMIT, || {
        modest_is_served(&lab)?;
        Ok(Some(()))
    })?;
    before.is_back(&lab)?;
    let said = lab.agent_log("node-1")?;
    let warnings = said.lines().filter(|line| line.contains("bound-reached")).count();
    ensure!(warnings <= 10, "it says so {warnings} times");
    lab.down()
}

#[test]
fn idle_connections_cost_little_and_hinder_nobody() -> Result<()> {
    let lab = lab("idle", None)?;
    let before = Before::look(&lab)?;
    let count = scaled(1500);
    let calm = modest(&lab, "2")?;
    let (held, seen) = Held::open(&lab, "ask", 8080, count)?;
    // On a busy machine a handshake may run out of time.
    ensure!(seen["open"].as_u64() >= Some(count as u64 * 9 / 10), "{seen}");
    let now = resident(&lab, "node-1")?;
    let each = (now.saturating_sub(before.memory[0])) as f64 / count as f64;
    let busy = modest(&lab, "2")?;
    println!(
        "{count} idle connections: {each:.1} KiB each; the modest tenant's median {} us, before {} us",
        busy["p50_us"], calm["p50_us"]
    );
    ensure!(each < 24.0, "{each} KiB for an idle connection");
    ensure!(held.close()? == seen["open"], "none is closed for being idle");
    before.is_back(&lab)?;
    lab.down()
}

#[test]
fn slow_readers_are_buffered_for_within_bounds() -> Result<()> {
    let lab = lab("slow", None)?;
    let before = Before::look(&lab)?;
    let count = scaled(60);
    for port in [8080, 9090] {
        let (held, seen) = Held::open(&lab, "slow", port, count)?;
        ensure!(seen["open"] == count, "{seen}");
        modest_in_the_end(&lab)?;
        for (number, node) in NODES.into_iter().enumerate() {
            let more = resident(&lab, node)?.saturating_sub(before.memory[number]);
            let each = more as f64 / count as f64;
            println!("a reader of port {port} that reads nothing of 64 MB: {each:.0} KiB on {node}");
            // What the relay could not pass on: 64 KiB each way, sealed and open; sockets are the kernel's.
            ensure!(each < 400.0, "{each} KiB for each slow reader on {node}");
        }
        ensure!(held.close()? == count as u64, "nobody is cut for reading slowly");
        before.is_back(&lab)?;
    }
    lab.down()
}

#[test]
fn a_full_disk_stops_nothing() -> Result<()> {
    let lab = lab("disk", None)?;
    let before = modest_is_served(&lab);
    before?;
    let state = lab.directory().join("agents/node-1/state");
    let log = lab.directory().join("logs/access-node-1.jsonl");
    lab.kill_agent("node-1")?;
    let kept = lab.directory().join("kept");
    shell(&format!(
        "cp -a {state} {kept} && mount -t tmpfs -o size=1m tmpfs {state} && cp -a {kept}/. {state}/ && rm -f {log} && ln -s {state}/access.jsonl {log}",
        state = state.display(),
        kept = kept.display(),
        log = log.display(),
    ))?;
    lab.start_agent("node-1")?;
    until("service", LIMIT, || {
        modest_is_served(&lab)?;
        Ok(Some(()))
    })?;
    let logged = |lab: &Lab| Ok::<_, anyhow::Error>(lab.access_log("node-1")?.len());
    until("lines in the access log", LIMIT, || {
        Ok((logged(&lab)? > 0).then_some(()))
    })?;

    let fill = state.join("fill");
    // It ends when nothing more fits.
    let filled = Command::new("dd")
        .args(["if=/dev/zero", "bs=4096", &format!("of={}", fill.display())])
        .output()?;
    ensure!(!filled.status.success(), "the disk should be full");
    modest(&lab, "1")?;
    let dropped = |lab: &Lab| {
        Ok::<_, anyhow::Error>(
            lab.metrics("node-1")?
                .sum("nodemesh_agent_access_log_dropped_total", &[]),
        )
    };
    until("lines that had no room", LIMIT, || {
        modest_is_served(&lab)?;
        Ok((dropped(&lab)? > 0.0).then_some(()))
    })?;
    // A change takes effect, although it cannot be kept.
    let deny = "apiVersion: nodemesh.io/v1alpha1\nkind: AccessPolicy\nmetadata: {name: nobody, namespace: tenants}\nspec:\n  \
                targetRefs: [{kind: Service, name: greedy-far}]\n  action: Deny\n  rules: [{to: [{ports: [8080]}]}]\n";
    lab.ctl_with_input(&["policy", "apply", "-f", "-", "--wait"], deny)?
        .ok()?;
    until("the event", LIMIT, || {
        Ok((event(&lab, "node-1", "snapshot-unwritten")? >= 1.0).then_some(()))
    })?;
    let url = format!("http://{}:8080/bytes/10", destination(&lab, GREEDY)?);
    let status = lab.exec(GREEDY, &["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", &url])?;
    ensure!(status.stdout == "403", "{status}");

    // And when there is room again, everything is written again.
    let written = || Ok::<_, anyhow::Error>(fs::metadata(state.join("snapshot"))?.modified()?);
    let outdated = written()?;
    fs::remove_file(&fill)?;
    until("the revision that had no room is written", LIMIT, || {
        Ok((written()? > outdated).then_some(()))
    })?;
    let lines = logged(&lab)?;
    until("lines in the access log again", LIMIT, || {
        modest_is_served(&lab)?;
        Ok((logged(&lab)? > lines).then_some(()))
    })?;
    let outdated = written()?;
    let deleted = ["policy", "delete", "AccessPolicy", "nobody", "-n", "tenants", "--wait"];
    lab.ctl(&deleted)?.ok()?;
    until("the next revision is written", LIMIT, || {
        Ok((written()? > outdated).then_some(()))
    })?;
    let revision = lab.ctl_json(&["status"])?["controller"]["revision"].as_u64();
    lab.kill_controller()?;
    lab.kill_agent("node-1")?;
    lab.start_agent("node-1")?;
    let loaded = lab.admin("node-1", "/debug/view")?;
    let loaded: Json = serde_json::from_str(&loaded).with_context(|| loaded)?;
    ensure!(
        loaded["revision"].as_u64() == revision,
        "the newest revision was kept: {revision:?}, {}",
        loaded["revision"]
    );
    lab.down()
}

fn shell(script: &str) -> Result<()> {
    let output = Command::new("sh").args(["-ec", script]).output()?;
    ensure!(
        output.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

#[test]
fn an_agent_with_little_memory_takes_what_fits() -> Result<()> {
    const LIMIT_BYTES: u64 = 64 << 20;
    let lab = lab("memory", None)?;
    // It looks at its start how much it was given.
    lab.kill_agent("node-1")?;
    let bound = Bound::on(&lab, "node-1", LIMIT_BYTES)?;
    lab.start_agent("node-1")?;
    until("service", LIMIT, || {
        modest_is_served(&lab)?;
        Ok(Some(()))
    })?;
    let before = Before::look(&lab)?;
    let (held, seen) = Held::open(&lab, "ask", 8080, 2000)?;
    println!("2000 connections to an agent with 64 MiB: {seen}");
    ensure!(seen["open"].as_u64() > Some(50) && seen["unsettled"] == 0, "{seen}");
    ensure!(refused(&lab, "node-1")? > 0.0);
    modest(&lab, "1")?;
    held.close()?;
    let (held, seen) = Held::open(&lab, "slow", 9090, 500)?;
    println!("500 slow readers of an agent with 64 MiB: {seen}");
    modest_in_the_end(&lab)?;
    held.close()?;
    before.is_back(&lab)?;
    println!("{}", bound.words());
    lab.down()?;
    bound.remove()
}

/// Beside one who asks for everything the others are served, every time. What they wait for it is printed: on a machine
/// that does other things at the same time it says more of that machine.
#[test]
fn a_tenant_at_a_hundred_times_the_load_leaves_the_others_served() -> Result<()> {
    let lab = lab("fair", None)?;
    let before = Before::look(&lab)?;
    let address = format!("{}:8080", destination(&lab, GREEDY)?);
    let load = program(&lab, "bench-load")?;
    let storm = |kind: &'static str, connections: &str, rate: &str| {
        let (rate, path) = (rate.to_owned(), "/bytes/1024");
        let argv = [
            &load,
            kind,
            &address,
            path,
            "--connections",
            connections,
            "--rate",
            &rate,
            "--seconds",
            "3",
        ];
        lab.exec_background(GREEDY, &argv)
    };
    for (what, kind, connections, rate) in [
        ("as much as there is", "keep", "128", "0"),
        ("a storm of connections", "connect", "64", "0"),
    ] {
        for _ in 0..scaled(1) {
            let calm = modest(&lab, "2")?;
            let storm = storm(kind, connections, rate)?;
            let busy = modest(&lab, "2")?;
            let said = storm.wait(LIMIT)?.ok()?;
            let greedy: Json = serde_json::from_str(&said).with_context(|| said)?;
            let ratio = |key: &str| busy[key].as_f64().unwrap_or(f64::MAX) / calm[key].as_f64().unwrap_or(1.0);
            println!(
                "{what}: {:.0}/s beside 50/s; p50 x{:.2}, p99 x{:.2} ({} us, {} us when calm)",
                greedy["per_second"].as_f64().unwrap_or(0.0),
                ratio("p50_us"),
                ratio("p99_us"),
                busy["p99_us"],
                calm["p99_us"],
            );
        }
    }
    before.is_back(&lab)?;
    lab.down()
}
