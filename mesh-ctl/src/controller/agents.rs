//! What the controller knows of each agent: connected or not, the revision it holds, what it refused, its pods.
//!
//! Kept in memory only: an agent says it all again when it connects. Sessions write, `status` and waits read.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::SystemTime,
};

use mesh_api::{
    wire::{CertificateReport, PodReport, control, operator},
    workload::Revision,
};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How many agents are remembered; beyond that the one that is disconnected for longest is forgotten.
pub const AGENTS_MAX: usize = 10_000;
/// How much of a nack's reason is kept.
const REASON_BYTES_MAX: usize = 2048;

/// One agent.
#[derive(Clone, Debug, Default)]
pub struct Agent {
    /// The session that speaks for it; 0 while it is disconnected.
    session: u64,
    superseded: CancellationToken,
    version: String,
    abi_version: u32,
    held: Revision,
    /// The revision that it acked to this process; what it only says that it holds is not one.
    acked: Revision,
    nacked: Revision,
    nack_reason: String,
    last_seen: Option<SystemTime>,
    certificate_expires: Option<SystemTime>,
    address: String,
    pods: Vec<PodReport>,
    certificates: Vec<CertificateReport>,
}

#[derive(Default)]
struct State {
    agents: BTreeMap<String, Agent>,
    sessions: u64,
    /// Nodes that joined by token since and have not connected yet.
    joined: BTreeSet<String>,
}

/// All agents.
pub struct Agents {
    state: Mutex<State>,
    changes: watch::Sender<u64>,
}

/// A connected agent's hold on its entry; dropping it marks the agent as disconnected.
pub struct Session {
    agents: Arc<Agents>,
    node: String,
    id: u64,
    superseded: CancellationToken,
}

/// What a connected agent holds and refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The revision that it holds.
    pub held: Revision,
    /// The revision that it refused last; 0 once it holds a later one.
    pub nacked: Revision,
    /// Why.
    pub reason: String,
}

/// How far a revision has come.
#[derive(Debug, Default)]
pub struct Progress {
    /// Connected agents that have not answered.
    pub waiting_for: Vec<String>,
    /// Connected agents that refused it.
    pub nacked: Vec<operator::NodeStatus>,
}

fn unix(time: Option<SystemTime>) -> i64 {
    time.map_or(0, |time| super::unix_seconds(time) as i64)
}

impl Agent {
    fn to_wire(&self, node: &str) -> operator::NodeStatus {
        operator::NodeStatus {
            node: node.to_owned(),
            connected: self.session != 0,
            agent_version: self.version.clone(),
            abi_version: self.abi_version,
            held_revision: self.held.0,
            nacked_revision: self.nacked.0,
            nack_reason: self.nack_reason.clone(),
            last_seen_unix: unix(self.last_seen),
            certificate_expires_unix: unix(self.certificate_expires),
            status: Some(control::AgentStatus {
                pods: self.pods.iter().cloned().map(Into::into).collect(),
                certificates: self.certificates.iter().cloned().map(Into::into).collect(),
            }),
            address: if self.session == 0 {
                String::new()
            } else {
                self.address.clone()
            },
        }
    }
}

impl Default for Agents {
    fn default() -> Agents {
        Agents {
            state: Mutex::default(),
            changes: watch::Sender::new(0),
        }
    }
}

impl Agents {
    /// Begins a session. One that the same node had before is over: its holder learns so from [`Session::superseded`].
    pub fn connect(
        self: &Arc<Self>,
        node: &str,
        hello: (String, u32, Revision),
        address: String,
        certificate_expires: Option<SystemTime>,
        now: SystemTime,
    ) -> Session {
        let mut state = self.state.lock();
        state.sessions += 1;
        let id = state.sessions;
        if state.agents.len() >= AGENTS_MAX && !state.agents.contains_key(node) {
            let gone = state.agents.iter().filter(|(_, agent)| agent.session == 0);
            if let Some(oldest) = gone
                .min_by_key(|(_, agent)| agent.last_seen)
                .map(|(node, _)| node.clone())
            {
                state.agents.remove(&oldest);
            }
        }
        let agent = state.agents.entry(node.to_owned()).or_default();
        agent.session = id;
        agent.superseded.cancel();
        let superseded = CancellationToken::new();
        agent.superseded = superseded.clone();
        (agent.version, agent.abi_version, agent.held) = hello;
        agent.address = address;
        agent.certificate_expires = certificate_expires;
        agent.last_seen = Some(now);
        drop(state);
        self.tell();
        Session {
            agents: self.clone(),
            node: node.to_owned(),
            id,
            superseded,
        }
    }

    /// The node has joined by token.
    pub fn joined(&self, node: &str) {
        let mut state = self.state.lock();
        if state.joined.len() < AGENTS_MAX {
            state.joined.insert(node.to_owned());
        }
    }

    /// Whether this is the node's first connection since it joined by token.
    pub fn take_joined(&self, node: &str) -> bool {
        self.state.lock().joined.remove(node)
    }

    fn tell(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    /// A receiver that is marked as changed whenever any agent's entry changes.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// All agents, and `nodes` that have none yet, ordered by name.
    pub fn list(&self, nodes: impl IntoIterator<Item = String>) -> Vec<operator::NodeStatus> {
        let state = self.state.lock();
        let mut all: BTreeMap<String, operator::NodeStatus> = nodes
            .into_iter()
            .map(|node| (node.clone(), Agent::default().to_wire(&node)))
            .collect();
        all.extend(
            state
                .agents
                .iter()
                .map(|(node, agent)| (node.clone(), agent.to_wire(node))),
        );
        all.into_values().collect()
    }

    /// Whether the node's agent has acked this revision, and none since, to this process.
    pub fn has_acked(&self, node: &str, revision: Revision) -> bool {
        self.state
            .lock()
            .agents
            .get(node)
            .is_some_and(|agent| agent.acked == revision)
    }

    /// Forgets disconnected agents of nodes that are gone.
    pub fn forget_gone(&self, exists: impl Fn(&str) -> bool) {
        let mut state = self.state.lock();
        state.agents.retain(|node, agent| agent.session != 0 || exists(node));
    }

    /// What each connected agent holds, by node.
    pub fn standing(&self) -> BTreeMap<String, Standing> {
        let state = self.state.lock();
        let connected = state.agents.iter().filter(|(_, agent)| agent.session != 0);
        let standing = connected.map(|(node, agent)| {
            let standing = Standing {
                held: agent.held,
                nacked: agent.nacked,
                reason: agent.nack_reason.clone(),
            };
            (node.clone(), standing)
        });
        standing.collect()
    }

    /// The pods of connected agents that `concerns` picks, with their nodes.
    pub fn pods(&self, concerns: impl Fn(&PodReport) -> bool) -> Vec<(String, PodReport)> {
        let state = self.state.lock();
        let connected = state.agents.iter().filter(|(_, agent)| agent.session != 0);
        let pods = connected.flat_map(|(node, agent)| {
            let pods = agent.pods.iter().filter(|pod| concerns(pod));
            pods.map(|pod| (node.clone(), pod.clone()))
        });
        pods.collect()
    }

    /// How many agents are connected, and how many of them hold less than `revision`.
    pub fn count(&self, revision: Revision) -> (usize, usize) {
        let state = self.state.lock();
        let connected = state.agents.values().filter(|agent| agent.session != 0);
        connected.fold((0, 0), |(all, behind), agent| {
            (all + 1, behind + usize::from(agent.held < revision))
        })
    }

    /// How far `revision` has come among the connected agents.
    pub fn progress(&self, revision: Revision) -> Progress {
        let state = self.state.lock();
        let mut progress = Progress::default();
        for (node, agent) in state.agents.iter().filter(|(_, agent)| agent.session != 0) {
            if agent.held >= revision {
                continue;
            }
            if agent.nacked >= revision {
                progress.nacked.push(agent.to_wire(node));
            } else {
                progress.waiting_for.push(node.clone());
            }
        }
        progress
    }
}

impl Session {
    fn update(&self, change: impl FnOnce(&mut Agent)) {
        let mut state = self.agents.state.lock();
        if let Some(agent) = state.agents.get_mut(&self.node)
            && agent.session == self.id
        {
            change(agent);
            drop(state);
            self.agents.tell();
        }
    }

    /// Returns when a later connection of the same node has taken over.
    pub async fn superseded(&self) {
        self.superseded.cancelled().await;
    }

    /// It holds this revision.
    pub fn acked(&self, revision: Revision, now: SystemTime) {
        self.update(|agent| {
            agent.held = revision;
            agent.acked = revision;
            agent.last_seen = Some(now);
            if agent.nacked <= revision {
                agent.nacked = Revision(0);
                agent.nack_reason.clear();
            }
        });
    }

    /// It refused this revision.
    pub fn nacked(&self, revision: Revision, reason: &str, now: SystemTime) {
        let mut end = reason.len().min(REASON_BYTES_MAX);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        self.update(|agent| {
            agent.nacked = revision;
            agent.nack_reason = reason[..end].to_owned();
            agent.last_seen = Some(now);
        });
    }

    /// The state of its pods and credentials.
    pub fn reported(&self, pods: Vec<PodReport>, certificates: Vec<CertificateReport>, now: SystemTime) {
        self.update(|agent| {
            agent.pods = pods;
            agent.certificates = certificates;
            agent.last_seen = Some(now);
        });
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.update(|agent| agent.session = 0);
    }
}
