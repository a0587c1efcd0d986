//! A run: three nodes with their agents, applications, a controller, a network, and what happens to them.
//!
//! [`run`] is all there is from outside: a plan in, a report or the first failure out. Everything happens on one thread,
//! on a paused clock that jumps to the next timer when nothing is left to do, so that minutes pass in milliseconds and a
//! plan has one course. A failure is noted where it is seen; the run goes on to its end, and the first one counts.

pub mod apps;
pub mod authority;
pub mod checks;
pub mod controller;
pub mod mesh;
pub mod node;
pub mod plan;
pub mod search;

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    fmt,
    future::Future,
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use mesh_api::identity::SpiffeId;
use real_tokio::time::Instant;

use self::{
    apps::{App, Asked, Outcome},
    authority::Rotated,
    controller::Controller,
    mesh::{Mesh, NODES},
    node::{Generation, Node},
    plan::{Operation, Plan, Step},
};
use crate::net::{Network, SystemClock, TcpStream};

/// How long everything that was asked for may take to end once nothing goes wrong any more.
const ENDING: Duration = Duration::from_secs(180);
/// After that: idle tunnels and drains are over.
const QUIET: Duration = Duration::from_secs(240);
/// Lines of the trace that are kept.
const TRACE_MAX: usize = 4_000;

/// What a run came to.
#[derive(Clone, Default)]
pub struct Report {
    /// A hash of everything that was traced, and of what the network carried: equal for equal runs.
    pub trace: u64,
    pub requests: usize,
    pub flows: usize,
    pub served: usize,
    pub refused: usize,
    pub failed: usize,
    pub revisions: usize,
    pub generations: usize,
    /// What was traced, as far as it is kept.
    pub lines: Vec<String>,
}

impl Report {
    /// Counts another run in.
    pub fn add(&mut self, other: &Report) {
        self.requests += other.requests;
        self.flows += other.flows;
        self.served += other.served;
        self.refused += other.refused;
        self.failed += other.failed;
        self.revisions += other.revisions;
        self.generations += other.generations;
    }
}

impl fmt::Debug for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} requests and {} flows, of which {} were served, {} refused, {} broken off; {} revisions, {} agents",
            self.requests, self.flows, self.served, self.refused, self.failed, self.revisions, self.generations
        )
    }
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Failure {
    pub what: String,
    pub trace: Vec<String>,
}

/// A run's world.
pub struct World {
    pub calm: bool,
    pub mesh: Mesh,
    pub network: Arc<Network>,
    pub controller: Rc<Controller>,
    pub nodes: Vec<Node>,
    pub apps: Vec<App>,
    pub asked: RefCell<BTreeMap<u64, Asked>>,
    /// Idle connections of sources.
    pub kept: RefCell<BTreeMap<(usize, usize), Vec<TcpStream>>>,
    /// Requests that reached the account with a rate limit: on which node and when.
    pub limited: RefCell<Vec<(usize, Instant)>>,
    pub state_dir: PathBuf,
    switched_at: Cell<Option<Instant>>,
    next: Cell<u64>,
    failures: RefCell<Vec<String>>,
    lines: RefCell<Vec<String>>,
    hash: Cell<u64>,
    began: Instant,
}

/// Runs a worker as its thread does.
async fn executor(worker: impl Future<Output = ()>) {
    worker.await;
}

impl World {
    fn new(plan: &Plan, state_dir: &Path) -> Rc<World> {
        let mesh = Mesh::new(plan.seed, plan.limits);
        let network = Network::install(plan.seed);
        for pod in &mesh.pods {
            network.add_pod(pod.node, pod.netns, pod.address);
        }
        Rc::new(World {
            calm: plan.calm,
            controller: Rc::new(Controller::new(plan.seed, &mesh, &plan.first)),
            nodes: (0..NODES).map(|_| Node::default()).collect(),
            apps: mesh.pods.iter().map(|_| App::default()).collect(),
            mesh,
            network,
            asked: RefCell::default(),
            kept: RefCell::default(),
            limited: RefCell::default(),
            state_dir: state_dir.to_owned(),
            switched_at: Cell::new(None),
            next: Cell::new(1),
            failures: RefCell::default(),
            lines: RefCell::default(),
            hash: Cell::new(0xcbf2_9ce4_8422_2325),
            began: Instant::now(),
        })
    }

    /// Notes what must not be.
    pub fn fail(&self, what: String) {
        self.trace(|| format!("FAILURE: {what}"));
        self.failures.borrow_mut().push(what);
    }

    /// A line of the trace.
    pub fn trace(&self, line: impl FnOnce() -> String) {
        let line = format!("{:>9.3} {}", self.began.elapsed().as_secs_f64(), line());
        let fold = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        self.hash.set(line.bytes().fold(self.hash.get(), fold));
        let mut lines = self.lines.borrow_mut();
        if lines.len() < TRACE_MAX {
            lines.push(line);
        }
    }

    pub fn next_id(&self) -> u64 {
        self.next.set(self.next.get() + 1);
        self.next.get()
    }

    pub fn identities_on(&self, node: usize) -> BTreeSet<SpiffeId> {
        let here = self.mesh.pods.iter().filter(|pod| pod.node == node);
        here.map(|pod| mesh::identity(pod.account)).collect()
    }

    /// Waits until an agent has the credentials of its node: until then it is new to the mesh.
    async fn has_credentials(&self, generation: &Generation) -> bool {
        let deadline = Instant::now() + ENDING;
        for identity in self.identities_on(generation.node) {
            if generation.credentials.ready(&identity, deadline).await.is_none() {
                return false;
            }
        }
        true
    }

    fn note_asked(&self, id: u64, from: usize, to: usize, flow: bool, post: bool) {
        let what = if flow { "flow" } else { "request" };
        self.trace(|| format!("{what} {id}: {} > {}", self.mesh.pods[from].name, mesh::ACCOUNTS[to]));
        let asked = Asked {
            id,
            from,
            to,
            flow,
            post,
            began: Instant::now(),
            ended: None,
            arrived: 0,
            answered: 0,
            reused: false,
        };
        self.asked.borrow_mut().insert(id, asked);
    }

    fn note_outcome(&self, id: u64, outcome: Outcome) {
        self.trace(|| format!("{id}: {outcome:?}"));
        let mut all = self.asked.borrow_mut();
        let Some(asked) = all.get_mut(&id) else { return };
        if asked.ended.is_some() {
            return self.fail(format!("{id} has ended twice"));
        }
        asked.ended = Some((Instant::now(), outcome));
    }

    /// The generation of a node that takes new connections.
    pub fn current(&self, node: usize) -> Option<Rc<Generation>> {
        let generations = self.nodes[node].generations.borrow();
        let mut serving = generations.iter().rev().filter(|g| g.alive.get() && !g.draining.get());
        serving.next().cloned()
    }

    fn spawn(self: &Rc<Self>, task: impl Future<Output = ()> + 'static) {
        real_tokio::task::spawn_local(task);
    }

    /// Does something later.
    fn later(self: &Rc<Self>, after: Duration, what: impl AsyncFnOnce(Rc<World>) + 'static) {
        let world = self.clone();
        self.spawn(async move {
            real_tokio::time::sleep(after).await;
            what(world).await;
        });
    }

    async fn perform(self: &Rc<Self>, operation: &Operation) {
        if !matches!(operation, Operation::Requests(_) | Operation::Flow(_)) {
            self.trace(|| format!("{operation:?}"));
        }
        match operation.clone() {
            Operation::Requests(requests) => {
                for request in requests {
                    self.spawn(self.clone().ask(request));
                }
            }
            Operation::Flow(plan) => self.spawn(self.clone().flow(plan)),
            Operation::Policy(table) => _ = self.controller.publish(&self.mesh, &table),
            Operation::Rotate => self.rotate(),
            Operation::ControllerAway(time) => {
                self.controller.set_down(true);
                self.later(time, async |world| world.controller.set_down(false));
            }
            Operation::Lie(node, lie) => self.controller.lie(node, lie),
            Operation::HandOver(node) => self.spawn(hand_over(self.clone(), node)),
            Operation::BrokenHandOver(node, after) => {
                let new = Generation::start(self, node);
                self.later(after, async move |world| {
                    new.kill();
                    if world.current(node).is_none() {
                        Generation::start(&world, node);
                    }
                });
            }
            Operation::Kill(node, after) => {
                for generation in self.nodes[node].generations.borrow().iter() {
                    if generation.alive.get() {
                        generation.kill();
                    }
                }
                self.later(after, async move |world| {
                    if world.current(node).is_none() {
                        Generation::start(&world, node);
                    }
                });
            }
            Operation::Partition(a, b, time) => {
                self.network.set_link(a, b, true);
                self.later(time, async move |world| world.network.set_link(a, b, false));
            }
            Operation::Slow(a, b, by, time) => {
                self.network.slow_link(a, b, by);
                self.later(time, async move |world| world.network.slow_link(a, b, Duration::ZERO));
            }
            Operation::Cut(a, b, one_in) => _ = self.network.cut(a, b, one_in),
            Operation::AppAway(pod, time) => {
                if !self.apps[pod].down.get() {
                    self.stop_app(pod);
                    self.later(time, async move |world| world.start_app(pod));
                }
            }
            Operation::Drops(pod, count) => self.apps[pod].drops.set(count),
            Operation::Rest => real_tokio::time::sleep(Duration::from_secs(70)).await,
        }
    }

    /// The authority's next step, if its time has come: nobody loses trust in a certificate that still lives, and nobody
    /// is shown one whose root it does not know.
    fn rotate(&self) {
        let latest = self.controller.latest();
        let all_know = (0..NODES).all(|node| {
            let generations = self.nodes[node].generations.borrow();
            let mut alive = generations.iter().filter(|generation| generation.alive.get());
            alive.all(|generation| generation.view.load().revision().0 == latest)
        });
        let long_ago = self.switched_at.get().is_none_or(|at| at.elapsed() > authority::LIFE);
        if !all_know || (self.controller.authority.is_about_to_drop() && !long_ago) {
            return;
        }
        match self.controller.authority.rotate() {
            Rotated::Roots => _ = self.controller.publish(&self.mesh, &self.controller.table()),
            Rotated::Signer => self.switched_at.set(Some(Instant::now())),
        }
    }
}

/// A new agent takes the place of a node's, or is killed if it does not come to serve.
async fn hand_over(world: Rc<World>, node: usize) {
    let new = Generation::start(&world, node);
    if !new.served().await {
        return new.kill();
    }
    let others: Vec<_> = world.nodes[node].generations.borrow().clone();
    for old in others {
        if old.number < new.number && old.alive.get() && new.alive.get() {
            world.spawn(old.leave());
        }
    }
}

/// Runs a plan to its end. Must be called within a runtime whose clock is paused, on a thread of its own.
pub async fn run(plan: &Plan, state_dir: &Path) -> Result<Report, Failure> {
    let local = real_tokio::task::LocalSet::new();
    let plan = plan.clone();
    let (world, report) = local
        .run_until(async {
            crate::chance::seed_agents(plan.seed);
            SystemClock::start();
            let world = World::new(&plan, state_dir);
            let report = live(&world, &plan.steps).await;
            (world, report)
        })
        .await;
    // Every task ends here, every log is written.
    drop(local);
    let report = world.conclude(report);
    Network::uninstall();
    let failures = world.failures.borrow();
    match failures.first() {
        None => Ok(Report {
            lines: world.lines.borrow().clone(),
            ..report
        }),
        Some(first) => Err(Failure {
            what: first.clone(),
            trace: world.lines.borrow().clone(),
        }),
    }
}

async fn live(world: &Rc<World>, steps: &[Step]) -> Report {
    world.spawn(world.network.clone().run());
    for pod in 0..world.mesh.pods.len() {
        world.start_app(pod);
    }
    for node in 0..NODES {
        let first = Generation::start(world, node);
        if !first.served().await || !world.has_credentials(&first).await {
            world.fail(format!("the first agent of node {node} does not serve"));
        }
    }
    for step in steps {
        real_tokio::time::sleep(step.after).await;
        world.perform(&step.operation).await;
    }
    world.settle().await
}
