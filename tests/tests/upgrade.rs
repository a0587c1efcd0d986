//! Agents come and go, with a keeper beside them: what the pods see of it must be nothing but time.
//!
//! A generation is replaced as a rolling update does it: the new agent starts beside the old one, and when it is ready
//! the old one is asked to end. Crashes are kills at lines of the log that tell how far the hand-over is.

mod shop_lab;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_tests::{Lab, LabConfig, Packets, until};
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
            Ok((queued(&lab)? > 0).then_some(()))
        })?;
        let began = Instant::now();
        lab.start_agent(node)?;
        for waiting in waiting {
            let answer = waiting
                .wait(LIMIT)?
                .ok()
                .with_context(|| format!("when the agent of {node} was killed"))?;
            ensure!(
                answer.starts_with("HTTP/1.1 200 "),
                "when the agent of {node} was killed: {answer}"
            );
        }
        println!("{node}: served {:?} after the start", began.elapsed());
    }
    let packets = Packets::parse(capture.stop()?)?;
    assert_eq!(packets.count(MARKER), 0, "nothing between nodes is in the clear");
    lab.down()
}

/// Connections in the queues of the agents' listeners in the visitor's namespace.
fn queued(lab: &Lab) -> Result<usize> {
    let sockets = lab.shell(VISITOR, "ss -Htln sport = :15001 or sport = :15006")?;
    let queues = sockets
        .lines()
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<usize>().ok());
    Ok(queues.sum())
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
