//! `cargo xtask bench`: the mesh against direct connections, in one run on one lab.
//!
//! Each figure is measured in several rounds, direct and mesh in turn, so that a busy machine harms both; the table
//! shows medians with their spread, and ratios to direct. Absolute numbers are this machine's; ratios are the mesh's.

use std::{
    fs,
    os::unix::fs::chown,
    process::ExitCode,
    time::{Instant, SystemTime},
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use mesh_tests::{Lab, LabConfig};
use serde::Serialize;
use serde_json::Value;

use crate::{build, setup, shell};

/// How long and how often.
#[derive(Debug, Args)]
pub struct Options {
    /// How often each figure is measured.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How long each measurement takes, in seconds.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// The rate of the latency measurement, in requests per second.
    #[arg(long, default_value_t = 1000)]
    rate: u32,
    /// Only figures whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// The lab's name.
    #[arg(long, default_value = "bench")]
    name: String,
}

/// The size of an answer of the bulk measurement.
const BULK: u64 = 256 << 20;
/// Kernel clock ticks per second in /proc: fixed at 100 for user space on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;

/// Where the server is, seen from the source.
const PLACES: [&str; 2] = ["cross node", "same node"];
/// How the source reaches it.
const PATHS: [&str; 2] = ["direct", "mesh"];

/// A figure: what is run, which field of its result counts, and whether more is better.
struct Figure {
    name: &'static str,
    unit: &'static str,
    load: &'static str,
    field: &'static str,
    scale: f64,
    more_is_better: bool,
}

const FIGURES: &[Figure] = &[
    Figure {
        name: "latency p50",
        unit: "us",
        load: "latency",
        field: "p50_us",
        scale: 1.0,
        more_is_better: false,
    },
    Figure {
        name: "latency p99",
        unit: "us",
        load: "latency",
        field: "p99_us",
        scale: 1.0,
        more_is_better: false,
    },
    Figure {
        name: "requests",
        unit: "1/s",
        load: "requests",
        field: "per_second",
        scale: 1.0,
        more_is_better: true,
    },
    Figure {
        name: "machine CPU per request",
        unit: "us",
        load: "requests",
        field: "machine_cpu_us",
        scale: 1.0,
        more_is_better: false,
    },
    Figure {
        name: "agents' CPU per request",
        unit: "us",
        load: "requests",
        field: "agent_cpu_us",
        scale: 1.0,
        more_is_better: false,
    },
    Figure {
        name: "new connections",
        unit: "1/s",
        load: "connections",
        field: "per_second",
        scale: 1.0,
        more_is_better: true,
    },
    Figure {
        name: "bulk",
        unit: "MiB/s",
        load: "bulk",
        field: "bytes_per_second",
        scale: 1.0 / 1048576.0,
        more_is_better: true,
    },
];

#[derive(Debug, Serialize)]
struct Report {
    unix_seconds: u64,
    kernel: String,
    cpus: usize,
    rounds: usize,
    seconds: f64,
    rate: u32,
    figures: Vec<Row>,
    agents: Vec<Agent>,
}

#[derive(Debug, Serialize)]
struct Row {
    figure: String,
    unit: String,
    place: String,
    direct: Spread,
    mesh: Spread,
    /// Mesh divided by direct.
    ratio: Option<f64>,
    more_is_better: bool,
}

#[derive(Debug, Serialize)]
struct Agent {
    node: String,
    rss_before_bytes: u64,
    rss_after_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Spread {
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = match values.len() % 2 {
            0 => (values[middle - 1] + values[middle]) / 2.0,
            _ => values[middle],
        };
        Spread {
            median,
            min: values[0],
            max: values[values.len() - 1],
        }
    }
}

/// The verb.
pub fn run(options: &Options) -> Result<ExitCode> {
    ensure!(options.rounds > 0, "at least one round");
    if std::env::var_os("NODEMESH_PROGRAMS").is_none() {
        shell::require_sudo().context("the bench needs root")?;
        setup::ensure_all()?;
        let programs = build::programs(&build::Options { release: true })?;
        return crate::lab::with_programs(&programs);
    }
    if let Some(code) = shell::again_as_root()? {
        return Ok(code);
    }
    let started = Instant::now();
    mesh_tests::lab::replace(&options.name)?;
    let mut config = LabConfig::new(&options.name).manifest(manifest());
    config.service_rules = false;
    config.progress = |step| eprintln!("bench: {step}");
    let lab = Lab::up(config)?;
    let report = measure(&lab, options)?;
    lab.down()?;
    print(&report);
    write(&report)?;
    println!("bench took {}", shell::time(started.elapsed()));
    Ok(ExitCode::SUCCESS)
}

/// In and out of the mesh: a source on node-1, a server on each node.
fn manifest() -> String {
    let mut text = String::new();
    for (namespace, label) in [("mesh", "enabled"), ("direct", "disabled")] {
        text.push_str(&format!(
            "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}, labels: {{nodemesh.io/mesh: {label}}}}}\n\
             ---\napiVersion: v1\nkind: Pod\nmetadata: {{name: source, namespace: {namespace}}}\n\
             spec: {{nodeName: node-1, serviceAccountName: source, containers: [{{name: main, command: [sleep, infinity]}}]}}\n"
        ));
        for (name, node) in [("cross", "node-2"), ("same", "node-1")] {
            text.push_str(&format!(
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\n\
                 spec:\n  nodeName: {node}\n  serviceAccountName: {name}\n  containers:\n  - name: main\n\
                 \x20   command: [sh, -c, 'exec \"$NODEMESH_PROGRAMS/lab-load\" serve 8080 {name}']\n\
                 \x20   ports: [{{name: http, containerPort: 8080}}]\n\
                 \x20   readinessProbe: {{tcpSocket: {{port: 8080}}}}\n\
                 ---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
                 spec: {{selector: {{app: {name}}}, ports: [{{name: http, port: 80, targetPort: http}}]}}\n"
            ));
        }
    }
    text
}

fn measure(lab: &Lab, options: &Options) -> Result<Report> {
    let agents = agent_processes(lab)?;
    let before: Vec<u64> = agents
        .iter()
        .map(|(_, pid)| resident_bytes(*pid))
        .collect::<Result<_>>()?;
    let wanted = |figure: &&Figure| {
        options
            .only
            .as_ref()
            .is_none_or(|only| figure.name.contains(only.as_str()))
    };
    let figures: Vec<&Figure> = FIGURES.iter().filter(wanted).collect();
    let mut loads: Vec<&str> = figures.iter().map(|figure| figure.load).collect();
    loads.dedup();
    // values[figure][place][path] holds one value of each round.
    let mut values = vec![vec![vec![Vec::new(); PATHS.len()]; PLACES.len()]; figures.len()];
    for round in 0..options.rounds {
        for load in &loads {
            for (place, place_name) in PLACES.iter().enumerate() {
                for (path, path_name) in PATHS.iter().enumerate() {
                    eprintln!("bench: round {}: {load}, {place_name}, {path_name}", round + 1);
                    let result = one(lab, &agents, load, place, path, options)
                        .with_context(|| format!("{load}, {place_name}, {path_name}"))?;
                    for (index, figure) in figures.iter().enumerate().filter(|(_, figure)| figure.load == *load) {
                        let value = result[figure.field].as_f64().context("a result without a number")?;
                        values[index][place][path].push(value * figure.scale);
                    }
                }
            }
        }
    }
    let mut rows = Vec::new();
    for (figure, places) in figures.iter().zip(values) {
        for (place, mut paths) in PLACES.iter().zip(places) {
            let mesh = Spread::of(paths.pop().context("no values")?);
            let direct = Spread::of(paths.pop().context("no values")?);
            rows.push(Row {
                figure: figure.name.into(),
                unit: figure.unit.into(),
                place: (*place).into(),
                direct,
                mesh,
                ratio: (direct.median > 0.0).then(|| mesh.median / direct.median),
                more_is_better: figure.more_is_better,
            });
        }
    }
    let memory = agents.iter().zip(before).map(|((node, pid), before)| {
        Ok(Agent {
            node: node.clone(),
            rss_before_bytes: before,
            rss_after_bytes: resident_bytes(*pid)?,
        })
    });
    Ok(Report {
        unix_seconds: SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs(),
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().into(),
        cpus: std::thread::available_parallelism()?.get(),
        rounds: options.rounds,
        seconds: options.seconds,
        rate: options.rate,
        agents: memory.collect::<Result<_>>()?,
        figures: rows,
    })
}

fn one(lab: &Lab, agents: &[(String, u32)], load: &str, place: usize, path: usize, options: &Options) -> Result<Value> {
    let server = ["cross", "same"][place];
    let namespace = ["direct", "mesh"][path];
    // Direct has no translation of Service addresses on its way; the mesh has, and that is part of its work.
    let authority = match path {
        0 => format!("{}:8080", lab.pod_ip(&format!("direct/{server}"))?),
        _ => server.to_string(),
    };
    let program = lab.state()?.programs.join("lab-load").display().to_string();
    let seconds = options.seconds.to_string();
    let rate = options.rate.to_string();
    let (verb, url, more): (&str, String, Vec<&str>) = match load {
        "latency" => (
            "http",
            format!("http://{authority}/"),
            vec!["--connections", "8", "--rate", &rate],
        ),
        "requests" => ("http", format!("http://{authority}/"), vec!["--connections", "32"]),
        "connections" => ("connect", format!("http://{authority}/"), vec!["--connections", "8"]),
        _ => (
            "bulk",
            format!("http://{authority}/bytes/{BULK}"),
            vec!["--timeout", "60"],
        ),
    };
    let mut argv = vec![program.as_str(), verb, &url, "--seconds", &seconds];
    argv.extend(more);
    let (agent_before, machine_before) = (agent_seconds(agents)?, machine_seconds()?);
    let said = lab.exec(&format!("{namespace}/source"), &argv)?.ok()?;
    let (agent, machine) = (
        agent_seconds(agents)? - agent_before,
        machine_seconds()? - machine_before,
    );
    let mut result: Value = serde_json::from_str(&said).with_context(|| format!("lab-load said {said}"))?;
    let answered = result["statuses"]["200"].as_f64().unwrap_or(0.0);
    ensure!(answered > 0.0, "no request was answered: {result}");
    ensure!(result["errors"] == serde_json::json!({}), "requests failed: {result}");
    result["agent_cpu_us"] = (agent * 1e6 / answered).into();
    result["machine_cpu_us"] = (machine * 1e6 / answered).into();
    Ok(result)
}

fn agent_processes(lab: &Lab) -> Result<Vec<(String, u32)>> {
    let mut found = Vec::new();
    for node in lab.state()?.nodes {
        found.extend(
            lab.agent_pids(&node.name)?
                .into_iter()
                .map(|pid| (node.name.clone(), pid)),
        );
    }
    Ok(found)
}

/// The CPU time that the agents used until now.
fn agent_seconds(agents: &[(String, u32)]) -> Result<f64> {
    let mut ticks = 0.0;
    for (_, pid) in agents {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let fields: Vec<&str> = stat.rsplit_once(')').context("no name")?.1.split_whitespace().collect();
        for index in [11, 12] {
            ticks += fields.get(index).context("a short line")?.parse::<f64>()?;
        }
    }
    Ok(ticks / TICKS_PER_SECOND)
}

/// The CPU time that the machine used until now, all but idling.
fn machine_seconds() -> Result<f64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let line = stat.lines().next().context("an empty /proc/stat")?;
    let ticks: Vec<f64> = line
        .split_whitespace()
        .skip(1)
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    // user, nice, system, (idle, iowait), irq, softirq.
    let busy: f64 = [0, 1, 2, 5, 6].iter().filter_map(|index| ticks.get(*index)).sum();
    Ok(busy / TICKS_PER_SECOND)
}

/// The memory that a process holds now.
pub fn resident_bytes(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .context("no VmRSS")?;
    let kibibytes: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kibibytes * 1024)
}

fn print(report: &Report) {
    println!(
        "\n{} CPUs, kernel {}, {} rounds of {} s; medians (least to most)\n",
        report.cpus, report.kernel, report.rounds, report.seconds
    );
    println!(
        "{:<26} {:<11} {:<6} {:>30} {:>30} {:>8}",
        "figure", "place", "unit", "direct", "mesh", "ratio"
    );
    for row in &report.figures {
        let show = |spread: &Spread| format!("{:.0} ({:.0} to {:.0})", spread.median, spread.min, spread.max);
        let ratio = row.ratio.map_or("-".into(), |ratio| format!("{ratio:.2}"));
        println!(
            "{:<26} {:<11} {:<6} {:>30} {:>30} {:>8}",
            row.figure,
            row.place,
            row.unit,
            show(&row.direct),
            show(&row.mesh),
            ratio
        );
    }
    for agent in &report.agents {
        let mebibytes = |bytes: u64| bytes as f64 / 1048576.0;
        println!(
            "agent on {}: {:.1} MiB resident before, {:.1} MiB after",
            agent.node,
            mebibytes(agent.rss_before_bytes),
            mebibytes(agent.rss_after_bytes)
        );
    }
}

fn write(report: &Report) -> Result<()> {
    let directory = shell::root().join("target/bench");
    fs::create_dir_all(&directory)?;
    let file = directory.join("latest.json");
    fs::write(&file, serde_json::to_vec_pretty(report)?).with_context(|| format!("write {}", file.display()))?;
    // Under sudo the developer shall own what the developer asked for.
    let id = |name: &str| std::env::var(name).ok()?.parse::<u32>().ok();
    if let (Some(user), Some(group)) = (id("SUDO_UID"), id("SUDO_GID")) {
        chown(&directory, Some(user), Some(group))?;
        chown(&file, Some(user), Some(group))?;
    }
    println!("written to {}", file.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        for (values, median) in [(vec![3.0], 3.0), (vec![3.0, 1.0], 2.0), (vec![9.0, 1.0, 2.0], 2.0)] {
            let spread = Spread::of(values.clone());
            assert_eq!(spread.median, median, "{values:?}");
            assert!(spread.min <= median && median <= spread.max);
        }
    }

    #[test]
    fn the_manifest_is_read() {
        let items = mesh_tests::kube::parse("bench", &manifest()).unwrap();
        assert_eq!(items.iter().filter(|item| item.kind == "Pod").count(), 6);
    }

    #[test]
    fn this_process_has_memory_and_time() {
        let pid = std::process::id();
        assert!(resident_bytes(pid).unwrap() > 100_000);
        assert!(agent_seconds(&[("x".into(), pid)]).is_ok());
        assert!(machine_seconds().unwrap() > 0.0);
    }
}
