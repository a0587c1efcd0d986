//! A node: what outlives its agents (listeners, kernel, disk), and the generations of its agent.
//!
//! A generation is the agent's own code: worker, pool, engines, credentials, traffic state, the view's state machine. What
//! stands around them in `agent.rs` and `session.rs` is done here in its place. Killed, its tasks and sockets go at once.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet, VecDeque},
    future::Future,
    io::{self, Write},
    pin::Pin,
    rc::{Rc, Weak},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use mesh_api::{
    identity::SpiffeId,
    view::View,
    wire::{Report, TrustRoots},
    workload::{ObjectName, Revision},
};
use parking_lot::Mutex;
use real_tokio::{
    sync::{mpsc, oneshot},
    task::{JoinHandle, LocalSet},
    time::Instant,
};

use super::{
    World,
    authority::bundle_of,
    controller::Message,
    mesh::{domain, node_name},
};
use crate::{
    capture,
    drain::{self, Trigger},
    event::{AccessLog, Events, EventsConfig, LogFormat},
    identity::{
        CredentialStore, TrustBundle,
        issue::{Issuer, SignError, Signed, Signer, SigningRequest},
        keep::Keep,
    },
    kernel::{Kernel, NetnsCookie},
    net::{Clock, StdListener, SystemClock, network::Door},
    pods::{Directory, Leave, Pod, PodListeners, Serving, WorkerCommand},
    sync::watch,
    traffic::Traffic,
    view::{
        Published,
        sync::{Action, Greeting, Held, Input, State, step},
    },
    worker::{PathConfig, Shared, Worker},
};

/// How long a generation with a successor waits for its connections.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long it keeps connections for a last request.
const IDLE: Duration = Duration::from_secs(60);
const GRACE: Duration = Duration::from_secs(5);
/// How long a new generation may take to serve.
const START_PATIENCE: Duration = Duration::from_secs(20);
/// Bytes of lines that may wait; more would be lost, which the checks would see.
const LOG_BYTES_MAX: usize = 16 << 20;

/// What outlives the agents of a node.
#[derive(Default)]
pub struct Node {
    pub kernel: Arc<Kernel>,
    /// The snapshot on disk.
    pub disk: RefCell<Option<Arc<Held>>>,
    pub generations: RefCell<Vec<Rc<Generation>>>,
}

/// A span of time in which a generation served by a revision.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub revision: u64,
    pub from: Instant,
    pub until: Option<Instant>,
}

/// One agent process.
pub struct Generation {
    pub node: usize,
    pub number: usize,
    pub traffic: Arc<Traffic>,
    pub view: Arc<Published<View>>,
    pub credentials: Arc<CredentialStore>,
    pub spans: RefCell<Vec<Span>>,
    pub worker: RefCell<Weak<Worker>>,
    pub lines: Arc<Mutex<Vec<u8>>>,
    pub alive: Cell<bool>,
    /// It was killed, so that its records are not all there.
    pub killed: Cell<bool>,
    pub draining: Cell<bool>,
    /// Guards that were open when a drain ended.
    pub left: Cell<usize>,
    trigger: Trigger,
    commands: mpsc::Sender<WorkerCommand>,
    stand_back: RefCell<Option<oneshot::Sender<()>>>,
    serving: watch::Receiver<bool>,
    process: RefCell<Option<JoinHandle<()>>>,
}

/// The sink of an access log.
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The tasks of a process, polled as one.
struct Process(LocalSet);

impl Future for Process {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.0).poll(cx)
    }
}

/// Has certificates signed by the run's authority.
struct SimSigner {
    world: Weak<World>,
    node: usize,
}

impl Signer for SimSigner {
    async fn sign(&self, requests: Vec<SigningRequest>) -> Result<Signed, SignError> {
        let world = self
            .world
            .upgrade()
            .ok_or_else(|| SignError("the run is over".to_owned()))?;
        let pause = world.controller.pause(40);
        real_tokio::time::sleep(pause).await;
        let controller = &world.controller;
        if controller.down.get() || (!world.calm && controller.one_in(6)) {
            return Err(SignError("the controller is away".to_owned()));
        }
        let here: BTreeSet<SpiffeId> = world.identities_on(self.node);
        let sign = |request: &SigningRequest| match here.contains(&request.identity) {
            true => Ok(controller.authority.sign(&request.csr, &request.identity)),
            false => Err("no such pod on this node".to_owned()),
        };
        Ok(Signed {
            bundle: bundle_of(&controller.authority.roots()),
            chains: requests.iter().map(sign).collect(),
        })
    }
}

impl Generation {
    /// Starts an agent on a node.
    pub fn start(world: &Rc<World>, node: usize) -> Rc<Generation> {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let name = node_name(node);
        let log = AccessLog::to(Box::new(Sink(lines.clone())), LogFormat::Json, &name, LOG_BYTES_MAX);
        let events = Events::new(EventsConfig {
            access_log: Some(log.expect("an access log")),
            ..EventsConfig::new(&name)
        });
        let (trigger, drain) = drain::channel();
        let (commands, receiver) = mpsc::channel(capture::COMMANDS_MAX);
        let (stand_back, stands_back) = oneshot::channel();
        let (serves, serving) = watch::channel(false);
        let shared = Arc::new(Shared {
            node: name.as_str().into(),
            view: Arc::new(Published::new(View::empty(domain()))),
            kernel: world.nodes[node].kernel.clone(),
            credentials: CredentialStore::new(),
            traffic: Traffic::new(),
            events,
            pods: Directory::default(),
            drain,
            config: PathConfig::default(),
        });
        let number = world.nodes[node].generations.borrow().len();
        let generation = Rc::new(Generation {
            node,
            number,
            traffic: shared.traffic.clone(),
            view: shared.view.clone(),
            credentials: shared.credentials.clone(),
            spans: RefCell::default(),
            worker: RefCell::default(),
            lines,
            alive: Cell::new(true),
            killed: Cell::new(false),
            draining: Cell::new(false),
            left: Cell::new(0),
            trigger,
            commands,
            stand_back: RefCell::new(Some(stand_back)),
            serving,
            process: RefCell::default(),
        });
        let local = LocalSet::new();
        let roots = world.controller.authority.roots();
        let (bundles, bundle) = watch::channel(bundle_of(&roots));
        let (wanted_out, wanted) = watch::channel(BTreeSet::new());
        let (signer, clock) = (
            SimSigner {
                world: Rc::downgrade(world),
                node,
            },
            Arc::new(SystemClock),
        );
        let keep = Keep::open(world.state_dir.join(&name)).expect("a directory");
        let held = world.nodes[node].disk.borrow().clone();
        let known = held.map(|held| bundle_of(&held.roots));
        let issuer = Issuer::new(signer, shared.credentials.clone(), clock).kept_in(keep, known);
        local.spawn_local(issuer.run(wanted));
        let control = Control {
            world: world.clone(),
            generation: generation.clone(),
            bundles,
        };
        local.spawn_local(control.run(stands_back));
        let upkeep = Upkeep {
            world: world.clone(),
            generation: Rc::downgrade(&generation),
            shared: shared.clone(),
            commands: generation.commands.clone(),
            pods: BTreeMap::new(),
        };
        local.spawn_local(upkeep.run(wanted_out, bundle, serves));
        let known = generation.clone();
        local.spawn_local(async move {
            let worker = Worker::new(shared);
            *known.worker.borrow_mut() = Rc::downgrade(&worker);
            super::executor(capture::run(worker, receiver)).await;
        });
        *generation.process.borrow_mut() = Some(real_tokio::task::spawn_local(Process(local)));
        world.nodes[node].generations.borrow_mut().push(generation.clone());
        generation
    }

    /// Whether all pods of the node are served.
    pub fn is_serving(&self) -> bool {
        *self.serving.borrow()
    }

    /// Waits until they are.
    pub async fn served(&self) -> bool {
        let mut serving = self.serving.clone();
        let waited = real_tokio::time::timeout(START_PATIENCE, serving.wait_for(|serving| *serving)).await;
        matches!(waited, Ok(Ok(_)))
    }

    /// `kill -9`.
    pub fn kill(&self) {
        self.killed.set(true);
        self.end();
    }

    fn end(&self) {
        self.alive.set(false);
        if let Some(span) = self.spans.borrow_mut().last_mut() {
            span.until.get_or_insert_with(Instant::now);
        }
        if let Some(process) = self.process.borrow_mut().take() {
            process.abort();
        }
    }

    /// Leaves its place to a successor, as an agent does on SIGTERM.
    pub async fn leave(self: Rc<Self>) {
        if !self.alive.get() || self.draining.replace(true) {
            return;
        }
        let leave = Leave {
            held: true,
            successor: true,
        };
        let _ = self.commands.send(WorkerCommand::Drain(leave)).await;
        self.trigger.keep_idle(IDLE);
        if let Some(stand_back) = self.stand_back.borrow_mut().take() {
            let _ = stand_back.send(());
        }
        let drained = self.trigger.finish(PATIENCE, GRACE).await;
        self.left.set(drained.left);
        self.trigger.end();
        // The worker's task has its turn to end.
        real_tokio::time::sleep(Duration::from_millis(5)).await;
        self.end();
    }

    /// Connections and requests under way.
    pub fn open(&self) -> usize {
        self.trigger.open()
    }

    fn note(&self, revision: Revision) {
        let (now, mut spans) = (Instant::now(), self.spans.borrow_mut());
        if let Some(span) = spans.last_mut() {
            span.until.get_or_insert(now);
        }
        spans.push(Span {
            revision: revision.0,
            from: now,
            until: None,
        });
    }
}

/// The controller's stream: does what the state machine says, as `session` does.
struct Control {
    world: Rc<World>,
    generation: Rc<Generation>,
    bundles: watch::Sender<Arc<TrustBundle>>,
}

impl Control {
    async fn run(self, stands_back: oneshot::Receiver<()>) {
        let node = self.generation.node;
        let held = self.world.nodes[node].disk.borrow().clone();
        if let Some(held) = &held {
            self.trust(&held.roots);
            self.publish(held);
        }
        let greeting = Greeting {
            node: node_name(node),
            trust_domain: domain(),
            version: "0",
            abi_version: 0,
        };
        let mut state = State::new(greeting, held, Duration::from_secs(4));
        let mut inputs = VecDeque::from([Input::Due]);
        let mut stream: Option<mpsc::Receiver<Message>> = None;
        let mut due: Option<Instant> = None;
        let mut back = false;
        let mut stands_back = std::pin::pin!(async move {
            if stands_back.await.is_err() {
                std::future::pending::<()>().await;
            }
        });
        let mut follow = real_tokio::time::interval(Duration::from_secs(1));
        loop {
            while let Some(input) = inputs.pop_front() {
                let (next, actions) = step(state.clone(), input, crate::random());
                state = next;
                for action in actions {
                    match action {
                        Action::Connect(Report::Hello { resume, .. }) => {
                            match self.world.controller.connect(node, resume).await {
                                Ok(opened) => {
                                    stream = Some(opened);
                                    inputs.push_back(Input::Connected {
                                        address: "controller".to_owned(),
                                    });
                                }
                                Err(reason) => inputs.push_back(Input::Lost { reason }),
                            }
                        }
                        Action::Connect(other) => self.world.fail(format!("{other:?} as the first message")),
                        Action::Disconnect => stream = None,
                        Action::Publish(held) => self.publish(&held),
                        Action::Trust(roots) => self.trust(&roots),
                        Action::Save(held) => *self.world.nodes[node].disk.borrow_mut() = Some(held),
                        Action::Wait(wait) => due = Some(Instant::now() + wait),
                        Action::Send(_) | Action::Tell(_) => {}
                    }
                }
            }
            let receive = async {
                match &mut stream {
                    Some(stream) => stream.recv().await,
                    None => std::future::pending().await,
                }
            };
            let is_due = async {
                match due {
                    Some(at) => real_tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            crate::select! {
                () = &mut stands_back, if !back => {
                    (back, due) = (true, None);
                    inputs.push_back(Input::StandBack);
                }
                message = receive => {
                    inputs.push_back(match message {
                        Some(Message::Update(update)) => Input::Update(Box::new(update)),
                        Some(Message::Garbled { revision, reason }) => Input::Garbled { revision, reason },
                        Some(Message::Replaced) => Input::Replaced { reason: "connected again".to_owned() },
                        None => Input::Lost { reason: "the controller ended the stream".to_owned() },
                    });
                }
                () = is_due, if !back => {
                    due = None;
                    inputs.push_back(Input::Due);
                }
                _ = follow.tick() => if stream.is_none() {
                    inputs.extend(self.world.nodes[node].disk.borrow().clone().map(Input::Found));
                }
            }
        }
    }

    fn publish(&self, held: &Arc<Held>) {
        let generation = &self.generation;
        let shown = generation.view.load().revision();
        if held.revision < shown {
            self.world.fail(format!(
                "node {} shows {} after {shown}",
                generation.node, held.revision
            ));
        }
        match self.world.controller.truths.borrow().get(&held.revision.0) {
            Some(truth)
                if truth.resources.len() == held.resources.len()
                    && truth
                        .resources
                        .iter()
                        .all(|(key, one)| held.resources.get(key) == Some(one))
                    && truth.roots == held.roots => {}
            Some(_) => self.world.fail(format!(
                "node {}: {} is not what was said",
                generation.node, held.revision
            )),
            None => self
                .world
                .fail(format!("node {}: nobody has made {}", generation.node, held.revision)),
        }
        let resources: Vec<_> = held.resources.values().cloned().collect();
        let name = node_name(generation.node);
        let view = View::compile_on(&name, held.trust_domain.clone(), held.revision, &resources);
        self.world.trace(|| {
            format!(
                "node {} generation {} shows {}",
                generation.node, generation.number, held.revision
            )
        });
        generation.note(held.revision);
        generation.view.publish(Arc::new(view));
    }

    fn trust(&self, roots: &TrustRoots) {
        self.bundles.send_replace(bundle_of(roots));
    }
}

/// Pods and wanted identities in step with the view.
struct Upkeep {
    world: Rc<World>,
    generation: Weak<Generation>,
    shared: Arc<Shared>,
    commands: mpsc::Sender<WorkerCommand>,
    pods: BTreeMap<ObjectName, Arc<Pod>>,
}

impl Upkeep {
    async fn run(
        mut self,
        wanted: watch::Sender<BTreeSet<SpiffeId>>,
        mut bundle: watch::Receiver<Arc<TrustBundle>>,
        serves: watch::Sender<bool>,
    ) {
        let mut changes = self.shared.view.subscribe();
        changes.mark_changed();
        loop {
            crate::select! {
                _ = changes.changed() => self.look(&wanted, &serves).await,
                changed = bundle.changed() => if changed.is_ok() {
                    let bundle = bundle.borrow_and_update().clone();
                    self.shared.credentials.set_bundle(&bundle, SystemClock.wall());
                },
            }
        }
    }

    async fn look(&mut self, wanted: &watch::Sender<BTreeSet<SpiffeId>>, serves: &watch::Sender<bool>) {
        let view = self.shared.view.load();
        if view.revision().0 == 0
            || self
                .generation
                .upgrade()
                .is_none_or(|generation| generation.draining.get())
        {
            return;
        }
        let node = node_name(self.generation.upgrade().map_or(0, |generation| generation.node));
        let here: Vec<_> = view.workloads_on(&node).cloned().collect();
        wanted.send_if_modified(|now| {
            let new: BTreeSet<SpiffeId> = here.iter().map(|workload| workload.identity.clone()).collect();
            let changed = *now != new;
            *now = new;
            changed
        });
        self.shared.traffic.retain(
            |key| view.backend(key).map(|backend| &**backend),
            |id| view.has_limit(id),
        );
        let mut new = Vec::new();
        for workload in here {
            match self.pods.get(&workload.name) {
                Some(pod) => pod.update(workload),
                None => {
                    let Some(model) = self.world.mesh.pod_named(&workload.name) else {
                        continue;
                    };
                    let pod = Arc::new(Pod::new(workload, NetnsCookie(model.netns)));
                    self.pods.insert(pod.name().clone(), pod.clone());
                    new.push(pod);
                }
            }
        }
        crate::pods::replace(&self.shared.pods, self.pods.values());
        let mut all = true;
        for pod in new {
            let (serving, confirmed) = oneshot::channel();
            // The keeper holds them: every generation accepts from the same queues.
            let listener = |door| vec![StdListener(self.world.network.open(pod.cookie().0, door))];
            let listeners = PodListeners {
                outbound: listener(Door::Outbound),
                inbound: listener(Door::Inbound),
                serving: Serving(serving),
                pod,
            };
            let _ = self.commands.send(WorkerCommand::Serve(listeners)).await;
            all &= confirmed.await.is_ok();
        }
        serves.send_replace(all);
    }
}
