//! Agents come and go, with a keeper beside them: what the pods see of it must be nothing but time.
//!
//! A generation is replaced as a rolling update does it: the new agent starts beside the old one, and when it is ready
//! the old one is asked to end. Crashes are kills at lines of the log that tell how far the hand-over is.

mod shop_lab;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::{Background, Lab, LabConfig, Packets, actors, until};
use shop_lab::*;

/// What is searched for on the wire.
const MARKER: &str = "upgrade-marker";
/// How soon an agent that is started at once after a crash must serve what waits.
const RECOVERY: Duration = Duration::from_secs(1);
/// The nodes of the shop.
const NODES: [&str; 2] = ["node-1", "node-2"];

/// The shop with keepers.
fn kept(name: &str) -> LabConfig {
    shop(name).kept()
}

#[test]
fn connections_wait_for_the_next_agent_and_nothing_is_in_the_clear() -> Result<()> {
    let lab = Lab::up(kept("hold"))?;
    let capture = lab.capture("tcp")?;
    let url = |host: &str| format!("http://{host}/?{MARKER}");
    for node in NODES {
        served_again(&lab, VISITOR, &url("cart"))?;
        lab.kill_agent(node)?;
        // Across nodes and on one node, out of pods and into them.
        let waiting: Vec<_> = ["cart", "stock", "catalog", "front"]
            .into_iter()
            .map(|host| lab.exec_background(VISITOR, &["curl", "-sSi", "--max-time", "30", &url(host)]))
            .collect::<Result<_>>()?;
        until("connections that wait in the listeners", LIMIT, || {
            Ok((queued(&lab, node)? > 0).then_some(()))
        })?;
        let began = Instant::now();
        lab.start_agent(node)?;
        for waiting in waiting {
            let answer = waiting
                .wait(LIMIT)?
                .ok()
                .with_context(|| format!("when the agent of {node} was killed"))?;
            if !answer.starts_with("HTTP/1.1 200 ") {
                bail!("when the agent of {node} was killed: {answer}{}", refusals(&lab)?);
            }
        }
        println!("{node}: served {:?} after the start", began.elapsed());
    }
    let packets = Packets::parse(capture.stop()?)?;
    assert_eq!(packets.count(MARKER), 0, "nothing between nodes is in the clear");
    lab.down()
}

/// Every record of a refusal, for people.
fn refusals(lab: &Lab) -> Result<String> {
    until("a record", LIMIT, || {
        let text = refused(lab)?;
        Ok((!text.is_empty()).then_some(text))
    })
}

fn refused(lab: &Lab) -> Result<String> {
    let mut text = String::new();
    for node in NODES {
        let records = lab.access_log(node)?;
        let refused = records.iter().filter(|record| record.get("nodemesh.refusal").is_some());
        text.extend(refused.map(|record| format!("\n{node}: {record}")));
        let lines = lab.agent_log(node)?;
        text.extend(
            lines
                .lines()
                .filter(|line| line.contains("WARN") || line.contains("ERROR"))
                .map(|line| format!("\n{node}: {line}")),
        );
    }
    Ok(text)
}

/// Connections in the queues of the agents' listeners in the pods of a node. Those are on loopback, where nothing else
/// of these labs listens, and not always at the usual ports: an agent that starts between the death of a keeper and the
/// moment when the agent before it notices finds the ports taken.
fn queued(lab: &Lab, node: &str) -> Result<usize> {
    let mut sum = 0;
    for pod in lab.state()?.pods.iter().filter(|pod| pod.node == node && pod.enrolled) {
        let sockets = lab.shell(&pod.full_name(), "ss -Htln src 127.0.0.1 or src [::1]")?;
        let queues = sockets
            .lines()
            .filter_map(|line| line.split_whitespace().nth(1)?.parse::<usize>().ok());
        sum += queues.sum::<usize>();
    }
    Ok(sum)
}

#[test]
fn after_a_crash_service_is_back_within_a_second() -> Result<()> {
    let lab = Lab::up(kept("crash"))?;
    served_again(&lab, VISITOR, "http://cart/")?;
    let short = Load::start(&lab, VISITOR, "connect", "http://catalog/", 50)?;
    let mut worst = Duration::ZERO;
    for round in 0..5 {
        let node = NODES[round % 2];
        lab.kill_agent(node)?;
        let began = Instant::now();
        lab.spawn_agent(node)?;
        served_again(&lab, VISITOR, "http://cart/")?;
        worst = worst.max(began.elapsed());
    }
    println!("{:#}", short.finish()?);
    println!("worst recovery: {worst:?}");
    ensure!(worst < 3 * RECOVERY, "recovery took {worst:?}");
    lab.down()
}

/// The source of everything in the labs of actors.
const SOURCE: &str = "up/source";

/// One source, and a destination on each node.
fn roll(name: &str) -> Result<(Lab, tempfile::NamedTempFile)> {
    let config = tempfile::NamedTempFile::new()?;
    configure(&config, 2)?;
    let documents = [
        actors::namespace("up", true),
        actors::source(SOURCE, "node-1"),
        actors::destination("up/far", "node-2", &[]),
        actors::destination("up/near", "node-1", &[]),
        actors::service("up/far", "pod", "far"),
        actors::service("up/near", "pod", "near"),
    ];
    let lab = LabConfig::test(name)
        .kept()
        .manifest(documents.concat())
        .agent_arg(&format!("--config={}", config.path().display()));
    Ok((Lab::up(lab)?, config))
}

/// What the next generations are told.
fn configure(config: &tempfile::NamedTempFile, workers: usize) -> Result<()> {
    let text = format!("workers: {workers}\ndrain: {{patience: 5m, idle: 10s, alone: 1s}}\n");
    Ok(std::fs::write(config.path(), text)?)
}

/// Connections that are open all the time, and requests that never stop.
struct Traffic {
    loads: Vec<(&'static str, Load)>,
    flows: Vec<(String, Background)>,
    calls: Vec<Background>,
}

impl Traffic {
    fn start(lab: &Lab) -> Result<Traffic> {
        let (lines, rpc) = (actors::LINES.to_string(), actors::RPC.to_string());
        let mut traffic = Traffic {
            loads: vec![
                ("kept, far", Load::start(lab, SOURCE, "http", "http://far/", 40)?),
                ("kept, near", Load::start(lab, SOURCE, "http", "http://near/", 40)?),
                ("kept, mostly idle", Load::start(lab, SOURCE, "http", "http://far/", 2)?),
                ("new, far", Load::start(lab, SOURCE, "connect", "http://far/", 20)?),
                ("new, near", Load::start(lab, SOURCE, "connect", "http://near/", 20)?),
            ],
            flows: Vec::new(),
            calls: Vec::new(),
        };
        for host in ["far", "near"] {
            let open = [
                vec!["hold", host, &lines],
                vec!["hold", host, "80", "upgrade"],
                vec!["idle", host, &lines],
                vec!["chat", host, &rpc],
            ];
            for words in open {
                let flow = actors::start(lab, SOURCE, &words);
                let flow = flow.with_context(|| format!("{}{}", words.join(" "), refused(lab).unwrap_or_default()))?;
                traffic.flows.push((words.join(" "), flow));
            }
            traffic.calls.push(actors::start(lab, SOURCE, &["calls", host, &rpc])?);
        }
        Ok(traffic)
    }

    /// Ends everything; not one request may have failed, and not one connection may have been cut.
    fn finish(self, lab: &Lab) -> Result<()> {
        self.finish_with(lab, 0)
    }

    /// The same, but so many requests may have been under way in an agent that was killed. Open connections were in none.
    fn finish_with(self, lab: &Lab, cut_max: u64) -> Result<()> {
        let (mut problems, mut cut) = (Vec::new(), 0);
        for (what, load) in self.loads {
            let seen = load.finish()?;
            let requests = seen["requests"].as_u64().unwrap_or(0);
            println!("{what}: {requests} requests, {}", seen["errors"]);
            let served = seen["statuses"]["200"].as_u64().unwrap_or(0);
            cut += requests - served;
            if requests == 0 || requests - served > cut_max {
                problems.push(format!("{what}: not all were served: {seen:#}"));
            }
        }
        for (what, flow) in self.flows {
            let end = actors::end_of(&flow.interrupt(LIMIT)?.stdout)?;
            println!("{what}: {end}");
            if end["how"] != "stopped" {
                problems.push(format!("{what}: {end}"));
            }
        }
        for calls in self.calls {
            let end = actors::end_of(&calls.interrupt(LIMIT)?.stdout)?;
            println!("calls: {end}");
            let answers = end["answers"].as_object().context("no answers")?;
            let failed = answers
                .iter()
                .filter(|(answer, _)| !["far", "near"].contains(&answer.as_str()));
            let failed: u64 = failed.filter_map(|(_, count)| count.as_u64()).sum();
            cut += failed;
            if answers.is_empty() || failed > cut_max {
                problems.push(format!("calls: {end}"));
            }
        }
        if cut > cut_max {
            problems.push(format!("{cut} requests failed, {cut_max} may"));
        }
        if !problems.is_empty() {
            bail!("{}{}", problems.join("\n"), refused(lab)?);
        }
        Ok(())
    }
}

/// Upgrades in a row.
const ROUNDS: usize = 20;

#[test]
fn twenty_upgrades_in_a_row_lose_nothing() -> Result<()> {
    let (lab, config) = roll("roll")?;
    let traffic = Traffic::start(&lab)?;
    let began = Instant::now();
    for round in 0..ROUNDS {
        let node = NODES[round % 2];
        // Fewer workers than the generation before, and more.
        configure(&config, [1, 3, 2][round % 3])?;
        lab.upgrade_agent(node)
            .with_context(|| format!("upgrade {round} of {node}"))?;
    }
    println!("{ROUNDS} upgrades in {:?}", began.elapsed());
    traffic.finish(&lab)?;
    // Without connections there is nothing to wait for: the old generations end.
    for node in NODES {
        until("the end of the old generations", 4 * LIMIT, || {
            let alive = lab.agent_pids(node)?;
            ensure!(alive.len() == 1, "on {node} there are {alive:?}");
            Ok(Some(()))
        })?;
    }
    lab.down()
}

/// Keeps the source out of the destinations.
const DENY: &str = "\
apiVersion: nodemesh.io/v1alpha1
kind: AccessPolicy
metadata: {name: nobody, namespace: up}
spec:
  targetRefs: [{kind: Service, name: far}, {kind: Service, name: near}]
  action: Deny
  rules: [{from: [{identities: ['spiffe://cluster.local/ns/up/sa/source']}]}]
";

#[test]
fn a_draining_generation_obeys_the_newest_policy() -> Result<()> {
    let (lab, _config) = roll("obey")?;
    let lines = actors::LINES.to_string();
    let mut flows = Vec::new();
    for host in ["far", "near"] {
        flows.push((host, actors::start(&lab, SOURCE, &["hold", host, &lines])?));
    }
    for node in NODES {
        lab.upgrade_agent(node)?;
    }
    for node in NODES {
        until("two generations side by side", LIMIT, || {
            Ok((lab.agent_pids(node)?.len() == 2).then_some(()))
        })?;
    }
    for (host, flow) in &mut flows {
        ensure!(flow.running()?, "the flow to {host} ended: {}", flow.stdout());
    }
    apply(&lab, DENY)?;
    for (host, flow) in flows {
        let end = actors::end_of(&flow.wait(LIMIT)?.stdout)?;
        ensure!(end["how"] == "ConnectionResetError", "the flow to {host}: {end}");
    }
    lab.down()
}

/// The last line of an agent that finds another one, before it accepts a connection; each line holds it until it is read.
const BEFORE_SERVING: &str = "taken as soon as the agent before this one lets go";
/// The line after which nothing of its start is left.
const STARTED: &str = "controller connected";
/// Requests that a killed agent may have carried.
const CARRIED_MAX: u64 = 10;

/// Starts an agent and kills it when it has written so many lines. Returns the last one that was read.
fn kill_after(lab: &Lab, node: &str, lines: usize) -> Result<String> {
    let (generation, mut steps) = lab.step_agent(node)?;
    let mut last = String::new();
    for number in 0..lines {
        let line = steps.line()?;
        last = line.with_context(|| format!("it ended before its line {number}, after {last:?}"))?;
    }
    lab.kill_generation(node, generation)?;
    Ok(last)
}

#[test]
fn a_generation_that_dies_on_its_way_takes_nothing_with_it() -> Result<()> {
    let (lab, _config) = roll("steps")?;
    let mut lines = 0;
    for (until_line, is_serving) in [(BEFORE_SERVING, false), (STARTED, true)] {
        let traffic = Traffic::start(&lab)?;
        let mut kills = 0;
        loop {
            lines += 1;
            let said = NODES
                .into_iter()
                .map(|node| kill_after(&lab, node, lines))
                .collect::<Result<Vec<_>>>()?;
            println!("{lines}: {}", said.join(" / "));
            kills += 2;
            if said.iter().any(|said| said.contains(until_line)) {
                break;
            }
        }
        ensure!(kills >= 6, "only {kills} steps before {until_line:?}");
        // Those that lived through all this can still be replaced.
        for node in NODES {
            lab.upgrade_agent(node)?;
        }
        traffic.finish_with(&lab, if is_serving { CARRIED_MAX * kills } else { 0 })?;
    }
    let traffic = Traffic::start(&lab)?;
    traffic.finish(&lab)?;
    lab.down()
}

#[test]
fn a_keeper_can_be_replaced_and_can_die() -> Result<()> {
    let (lab, _config) = roll("keeper")?;
    let traffic = Traffic::start(&lab)?;
    let held = |node: &str| {
        until("an agent whose keeper holds everything", LIMIT, || {
            let ready = lab.admin(node, "/readyz")?;
            ensure!(ready.contains("ok keeper"), "{ready}");
            Ok(Some(()))
        })
    };
    for node in NODES {
        // A newer one takes all of it, and the older one may go.
        let old = lab.keeper_pids(node)?;
        lab.start_keeper(node)?;
        lab.terminate(&old);
        held(node)?;
        lab.upgrade_agent(node)?;
        // One that dies is given everything again by the agent.
        lab.kill_keeper(node)?;
        lab.start_keeper(node)?;
        held(node)?;
        lab.upgrade_agent(node)?;
    }
    traffic.finish(&lab)?;
    let kibibytes = lab.memory(&lab.keeper_pids("node-1")?)?;
    println!("the keeper has {kibibytes} KiB");
    for node in NODES {
        lab.kill_agent(node)?;
    }
    let waiting = lab.exec_background(SOURCE, &["curl", "-sS", "--fail", "--max-time", "30", "http://far/"])?;
    until("a connection that waits", LIMIT, || {
        Ok((queued(&lab, "node-1")? > 0).then_some(()))
    })
    .with_context(|| lab.shell(SOURCE, "ss -Htln").unwrap_or_default())?;
    for node in NODES {
        lab.start_agent(node)?;
    }
    waiting.wait(LIMIT)?.ok()?;
    lab.down()
}

/// How long agents are killed for; `NODEMESH_SOAK_SECONDS` says otherwise.
const SOAK: Duration = Duration::from_secs(20);

/// Numbers from a seed (xorshift), so that a failure can be played again with `NODEMESH_SEED`.
struct Dice(u64);

impl Dice {
    fn throw(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn agents_killed_at_random_refuse_nothing_and_send_nothing_in_the_clear() -> Result<()> {
    let seed = number("NODEMESH_SEED").unwrap_or_else(|| u64::from(std::process::id()) << 20 | 1);
    let soak = number("NODEMESH_SOAK_SECONDS").map_or(SOAK, Duration::from_secs);
    println!("NODEMESH_SEED={seed}");
    let mut dice = Dice(seed);
    let (lab, _config) = roll("random")?;
    let capture = lab.capture("tcp")?;
    let url = |host: &str| format!("http://{host}/?{MARKER}");
    let loads: Vec<Load> = ["far", "near"]
        .iter()
        .flat_map(|host| ["connect", "http"].map(|kind| Load::start(&lab, SOURCE, kind, &url(host), 30)))
        .collect::<Result<_>>()?;
    let (began, mut kills) = (Instant::now(), 0);
    while began.elapsed() < soak {
        let node = NODES[dice.throw(2) as usize];
        // Some die at once, some while they start, some after they have served for a while.
        let life = Duration::from_millis(dice.throw(1500));
        let born = Instant::now();
        until("the time to kill", LIMIT, || Ok((born.elapsed() >= life).then_some(())))?;
        lab.kill_agent(node)?;
        lab.spawn_agent(node)?;
        kills += 1;
    }
    for host in ["far", "near"] {
        let back = served_again(&lab, SOURCE, &url(host))?;
        println!("{host}: back after {back:?}");
    }
    let mut cut = 0;
    for load in loads {
        let seen = load.finish()?;
        let requests = seen["requests"].as_u64().unwrap_or(0);
        let errors = seen["errors"].as_object().context("no errors")?;
        println!("{requests} requests, {}, {errors:?}", seen["statuses"]);
        ensure!(requests > 0 && !errors.contains_key("ConnectionRefused"), "{seen:#}");
        cut += requests - seen["statuses"]["200"].as_u64().unwrap_or(0);
    }
    // Four loads of four connections each: a dead agent cannot have carried more.
    ensure!(cut <= 16 * kills, "{cut} requests failed in {kills} kills");
    println!("{kills} kills cut {cut} requests");
    let packets = Packets::parse(capture.stop()?)?;
    assert_eq!(packets.count(MARKER), 0, "nothing between nodes is in the clear");
    lab.down()
}
