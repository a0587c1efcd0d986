//! What must always hold, looked at while a run runs and at its end.

use std::{collections::BTreeMap, rc::Rc};

use real_tokio::time::Instant;
use serde_json::Value;

use super::{
    ENDING, QUIET, Report, World,
    apps::{Asked, Outcome},
    mesh::{ACCOUNTS, BROKEN, CONNECTIONS_MAX, FLOW, NODES, RATE, REQUESTS_MAX, service},
    node::Generation,
};
use crate::traffic::BreakerState;
use mesh_api::view::Destination;

/// What the agents of a node said of a pair of accounts in a span of time.
#[derive(Clone, Copy, Debug)]
pub struct Permits {
    /// One of the views that were served by permits it.
    pub any: bool,
    /// All of them do.
    pub all: bool,
}

impl World {
    /// Whether the node's agents permitted it between two moments.
    pub fn permits(&self, node: usize, from: usize, to: usize, since: Instant, until: Instant) -> Permits {
        let truths = self.controller.truths.borrow();
        let generations = self.nodes[node].generations.borrow();
        let mut permits = Permits { any: false, all: true };
        for generation in generations.iter() {
            for span in generation.spans.borrow().iter() {
                let overlaps = span.from <= until && span.until.is_none_or(|end| end >= since);
                if let Some(truth) = truths.get(&span.revision).filter(|_| overlaps) {
                    permits.any |= truth.table[from][to];
                    permits.all &= truth.table[from][to];
                }
            }
        }
        permits.all &= permits.any;
        permits
    }

    /// Requests at the applications behind the breaker: no more than the agents let through together.
    pub fn check_breaker(&self) {
        let pods = self
            .mesh
            .pods
            .iter()
            .zip(&self.apps)
            .filter(|(pod, _)| pod.account == BROKEN);
        let busy: u32 = pods.map(|(_, app)| app.busy.get()).sum();
        let agents: usize = self.nodes.iter().map(|node| node.generations.borrow().len()).sum();
        // A retry may overtake the end of the attempt before it, one for each of an agent's requests.
        let max = 2 * REQUESTS_MAX.min(CONNECTIONS_MAX) * agents as u32;
        if busy > max {
            self.fail(format!(
                "{busy} requests at once behind a breaker that lets {max} through"
            ));
        }
    }

    /// Nothing goes wrong any more: everything that was asked for must end, and then nothing may be left.
    pub(super) async fn settle(self: &Rc<Self>) -> Report {
        self.trace(|| "settles".to_owned());
        let until = Instant::now() + ENDING;
        while Instant::now() < until {
            real_tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            if self.asked.borrow().values().all(|asked| asked.ended.is_some()) {
                break;
            }
        }
        for asked in self.asked.borrow().values().filter(|asked| asked.ended.is_none()) {
            self.fail(format!("{} has no outcome: {asked:?}", asked.id));
        }
        self.kept.borrow_mut().clear();
        real_tokio::time::sleep(QUIET).await;
        for node in 0..NODES {
            match self.current(node) {
                None => self.fail(format!("node {node} has no agent")),
                Some(generation) => self.check_idle(&generation),
            }
            let generations = self.nodes[node].generations.borrow();
            for generation in generations.iter().filter(|g| g.draining.get() && !g.killed.get()) {
                if generation.alive.get() || generation.left.get() > 0 {
                    let left = generation.left.get();
                    self.fail(format!(
                        "node {node} generation {}: its drain left {left}",
                        generation.number
                    ));
                }
            }
            let entries = self.nodes[node].kernel.entries();
            if entries != (0, 0) {
                self.fail(format!(
                    "node {node}: entries are left in the kernel's maps: {entries:?}"
                ));
            }
        }
        let open = self.network.open_connections();
        if !open.is_empty() {
            self.fail(format!("connections are left: {open:#?}"));
        }
        self.report()
    }

    /// An agent to whom nobody speaks holds nothing.
    fn check_idle(&self, generation: &Generation) {
        let who = format!("node {} generation {}", generation.node, generation.number);
        let (shown, latest) = (generation.view.load().revision().0, self.controller.latest());
        if shown != latest {
            self.fail(format!("{who} shows {shown} although {latest} is the newest"));
        }
        if !generation.is_serving() {
            self.fail(format!("{who} does not serve"));
        }
        if generation.open() > 0 {
            self.fail(format!("{who}: {} connections are left", generation.open()));
        }
        if let Some(worker) = generation.worker.borrow().upgrade() {
            let gauge = worker.tunnels.gauge();
            if (gauge.connecting, gauge.busy, gauge.ready) != (0, 0, 0) {
                self.fail(format!("{who}: tunnels are left: {gauge:?}"));
            }
        }
        for endpoint in generation.traffic.status() {
            if endpoint.active > 0 {
                self.fail(format!("{who}: {endpoint:?} counts requests that are over"));
            }
            if matches!(endpoint.breaker, BreakerState::HalfOpen { probes, .. } if probes > 0) {
                self.fail(format!("{who}: {endpoint:?} waits for probes that are over"));
            }
        }
        self.check_limits(&who, generation);
    }

    /// The breaker's limits are as free as they were at first: counted out by counting in.
    fn check_limits(&self, who: &str, generation: &Generation) {
        if !self.mesh.limits {
            return;
        }
        let view = generation.view.load();
        for port in [super::mesh::WEB, FLOW] {
            let Destination::ServicePort(port) = view.destination(service(BROKEN, port)) else {
                self.fail(format!("{who} does not know {}", ACCOUNTS[BROKEN]));
                continue;
            };
            let admit = || generation.traffic.admit(&port.backend).ok();
            let admitted: Vec<_> = std::iter::from_fn(admit).take(REQUESTS_MAX as usize + 1).collect();
            if admitted.len() != REQUESTS_MAX as usize {
                self.fail(format!(
                    "{who}: {} places of {REQUESTS_MAX} for requests are free",
                    admitted.len()
                ));
            }
            let connect = || admitted.first()?.try_connection().ok();
            let connected: Vec<_> = std::iter::from_fn(connect).take(CONNECTIONS_MAX as usize + 1).collect();
            if connected.len() != CONNECTIONS_MAX as usize {
                let free = connected.len();
                self.fail(format!(
                    "{who}: {free} places of {CONNECTIONS_MAX} for connections are free"
                ));
            }
        }
    }

    fn report(&self) -> Report {
        let asked = self.asked.borrow();
        let count = |wanted: fn(&Outcome) -> bool| {
            let ended = asked.values().filter_map(|asked| asked.ended.as_ref());
            ended.filter(|(_, outcome)| wanted(outcome)).count()
        };
        Report {
            trace: 0,
            requests: asked.values().filter(|asked| !asked.flow).count(),
            flows: asked.values().filter(|asked| asked.flow).count(),
            served: count(|outcome| matches!(outcome, Outcome::Status(200) | Outcome::Echoed)),
            refused: count(|outcome| matches!(outcome, Outcome::Status(status) if *status != 200)),
            failed: count(|outcome| matches!(outcome, Outcome::Failed(_))),
            revisions: self.controller.truths.borrow().len(),
            generations: self.nodes.iter().map(|node| node.generations.borrow().len()).sum(),
            lines: Vec::new(),
        }
    }

    /// Everything has ended: looks at outcomes, records and the wire.
    pub(super) fn conclude(&self, report: Report) -> Report {
        for fault in self.network.take_faults() {
            self.fail(fault);
        }
        let records = self.records();
        for asked in self.asked.borrow().values() {
            self.check_outcome(asked);
            if !asked.flow {
                self.check_records(asked, records.get(&asked.id).map_or(&[][..], Vec::as_slice));
            }
        }
        self.check_flow_records();
        self.check_rate();
        let carried = self.network.carried();
        Report {
            trace: self.hash.get() ^ carried,
            ..report
        }
    }

    /// The rate limit of a node's agents: in no span of time more than their buckets held and got.
    fn check_rate(&self) {
        let limited = self.limited.borrow();
        for node in 0..NODES {
            let agents = self.nodes[node].generations.borrow().len();
            let arrivals: Vec<Instant> = limited
                .iter()
                .filter(|(of, _)| *of == node)
                .map(|(_, at)| *at)
                .collect();
            for (first, from) in arrivals.iter().enumerate() {
                for (last, until) in arrivals.iter().enumerate().skip(first) {
                    let (count, span) = (last - first + 1, *until - *from);
                    let max = f64::from(RATE) * (agents as f64 + span.as_secs_f64());
                    if count as f64 > max {
                        self.fail(format!(
                            "node {node} let {count} requests in within {span:?}, of {max} at most"
                        ));
                        return;
                    }
                }
            }
        }
    }

    fn check_outcome(&self, asked: &Asked) {
        let Some((ended, outcome)) = &asked.ended else { return };
        let (id, from) = (asked.id, self.mesh.pods[asked.from].account);
        if asked.post && !asked.flow && asked.arrived > 1 {
            self.fail(format!(
                "{id}, which may not be repeated, was delivered {} times",
                asked.arrived
            ));
        }
        if *outcome == Outcome::Status(200) && asked.answered == 0 {
            self.fail(format!("{id} was served by nobody"));
        }
        let nodes: Vec<usize> = self.mesh.nodes_of(asked.to).collect();
        let permits = |node: &usize| self.permits(*node, from, asked.to, asked.began, *ended);
        let served = matches!(outcome, Outcome::Status(200) | Outcome::Echoed);
        if self.calm && !served && nodes.iter().all(|node| permits(node).all) {
            self.fail(format!(
                "{id} was permitted all the time and nothing went wrong, but: {outcome:?}"
            ));
        }
        if served && !nodes.iter().any(|node| permits(node).any) {
            self.fail(format!("{id} was never permitted, but: {outcome:?}"));
        }
        let denied = nodes.iter().all(|node| !permits(node).any);
        if self.calm && denied && !asked.flow && *outcome != Outcome::Status(403) {
            self.fail(format!(
                "{id} was denied all the time and nothing went wrong, but: {outcome:?}"
            ));
        }
    }

    /// The records of requests: who reports, and by which node.
    fn records(&self) -> BTreeMap<u64, Vec<(String, usize)>> {
        let mut records: BTreeMap<u64, Vec<(String, usize)>> = BTreeMap::new();
        for (node, line) in self.lines_of_agents() {
            let path = line["url.path"].as_str().unwrap_or_default();
            let id = path
                .strip_prefix("/r/")
                .and_then(|rest| rest.split('/').next()?.parse().ok());
            if let Some(id) = id {
                let reporter = line["nodemesh.reporter"].as_str().unwrap_or_default().to_owned();
                records.entry(id).or_default().push((reporter, node));
            }
        }
        records
    }

    fn lines_of_agents(&self) -> Vec<(usize, Value)> {
        let mut all = Vec::new();
        for (number, node) in self.nodes.iter().enumerate() {
            for generation in node.generations.borrow().iter() {
                for line in generation
                    .lines
                    .lock()
                    .split(|byte| *byte == b'\n')
                    .filter(|line| !line.is_empty())
                {
                    match serde_json::from_slice(line) {
                        Ok(line) => all.push((number, line)),
                        Err(error) => self.fail(format!("a line that is no JSON: {error}")),
                    }
                }
            }
        }
        all
    }

    fn was_killed(&self, node: usize) -> bool {
        self.nodes[node]
            .generations
            .borrow()
            .iter()
            .any(|generation| generation.killed.get())
    }

    fn check_records(&self, asked: &Asked, records: &[(String, usize)]) {
        let (id, home) = (asked.id, self.mesh.pods[asked.from].node);
        let of = |who: &str| records.iter().filter(|(reporter, _)| reporter == who).count();
        let (source, destination) = (of("source"), of("destination"));
        let status = asked.ended.as_ref().and_then(|(_, outcome)| match outcome {
            Outcome::Status(status) => Some(*status),
            _ => None,
        });
        if source > 1 || (source == 0 && status.is_some() && !self.was_killed(home)) {
            self.fail(format!("{id}, {status:?}, has {source} records of its source's agent"));
        }
        let killed = (0..NODES).any(|node| self.was_killed(node));
        if !killed && (destination as u32) < asked.arrived {
            self.fail(format!(
                "{id} arrived {} times and has {destination} records there",
                asked.arrived
            ));
        }
    }

    /// Each flow has one record of its source's agent.
    fn check_flow_records(&self) {
        let lines = self.lines_of_agents();
        for node in (0..NODES).filter(|node| !self.was_killed(*node)) {
            let is_flow = |line: &Value| {
                line["nodemesh.reporter"] == "source" && line["destination.port"] == FLOW && line["url.path"].is_null()
            };
            let records = lines.iter().filter(|(of, line)| *of == node && is_flow(line)).count();
            let all = self.asked.borrow();
            let flows = all
                .values()
                .filter(|asked| asked.flow && self.mesh.pods[asked.from].node == node)
                .count();
            if records != flows {
                self.fail(format!("node {node}: {flows} flows have {records} records"));
            }
        }
    }
}
