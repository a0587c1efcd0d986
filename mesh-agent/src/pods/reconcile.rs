//! Reconciliation: bring what is held to what is wanted, pod by pod, and say how each stands.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use mesh_abi::{PORTS_MAX, PortSet};
use mesh_api::workload::{ObjectName, Workload};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout, timeout_at},
};

use super::{
    CaptureTimes, Chain, Directory, Leave, Netns, Pod, PodError, PodListeners, PodStatus, Sandboxes, Serving,
    WorkerCommand,
    gate::{Gate, GateConfig},
    kept::Kept,
    listeners::{self, Group},
    sever,
};
use crate::{
    keeper::Direction,
    kernel::{HostedCapture, Kernel, KernelError, NetnsCookie, PodCapture},
};

/// How long workers may take to serve new listeners before their pods are called not captured.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an agent that leaves looks for a keeper that is just being replaced, and for a successor: longer than agents
/// take to notice that their keeper is another one.
const KEEPER_LAST_LOOK: Duration = Duration::from_millis(1500);
/// The pause between two such looks.
const KEEPER_PAUSE: Duration = Duration::from_millis(20);

/// The pods of this node.
pub struct Pods {
    kernel: Arc<Kernel>,
    workers: Vec<mpsc::Sender<WorkerCommand>>,
    home: Arc<Netns>,
    held: BTreeMap<ObjectName, Held>,
    statuses: BTreeMap<ObjectName, PodStatus>,
    directory: Directory,
    /// On Kubernetes: where pods are found, and what becomes of the others.
    gate: Option<Gate>,
    times: CaptureTimes,
    kept: Option<Kept>,
    /// Whether pods that an earlier agent captured and nobody wants any more have been retired.
    is_swept: bool,
    /// Whether the workloads wanted are known to be the newest.
    is_sure: bool,
}

/// A pod that the agent holds.
struct Held {
    pod: Arc<Pod>,
    outbound: Vec<SocketAddr>,
    inbound: Vec<SocketAddr>,
    /// One member of each steered group, to enter into the kernel's map when addresses change.
    steered: Vec<TcpListener>,
    /// Each worker, and the listeners made for it that it has not been given.
    seats: Vec<Seat>,
    /// Whether the kernel knows the pod's present workload.
    is_enrolled: bool,
    /// Whether the time of its capture has been noted.
    is_timed: bool,
    /// For a keeper that comes back, and for a worker that lost its own; empty without a keeper.
    copies: Vec<Group>,
    /// What the pod's capture leaves out.
    reservation: Option<String>,
}

/// One worker's part in serving a pod.
enum Seat {
    /// Its listeners wait to be handed over.
    Ready {
        outbound: Vec<TcpListener>,
        inbound: Vec<TcpListener>,
    },
    /// It was given listeners and has not confirmed them.
    Asked,
    /// It serves.
    Serving,
}

/// A confirmation awaited: whose, of which worker.
struct Wait {
    name: ObjectName,
    worker: usize,
    confirmed: oneshot::Receiver<()>,
}

impl Pods {
    /// No pods yet. `workers` are the data workers' command queues, in their order.
    pub fn new(kernel: Arc<Kernel>, workers: Vec<mpsc::Sender<WorkerCommand>>) -> io::Result<Pods> {
        Ok(Pods {
            kernel,
            workers,
            home: Arc::new(Netns::current()?),
            held: BTreeMap::new(),
            statuses: BTreeMap::new(),
            directory: Directory::default(),
            gate: None,
            times: CaptureTimes::default(),
            kept: None,
            is_swept: false,
            is_sure: true,
        })
    }

    /// Finds pods by their UIDs among the sandboxes, and classifies every sandbox.
    pub fn with_gate(mut self, config: GateConfig) -> Result<Pods, KernelError> {
        self.gate = Some(Gate::new(config, self.kernel.clone(), self.home.cookie())?);
        Ok(self)
    }

    /// Takes in which sandboxes there are; the next reconciliation acts on it.
    pub fn set_sandboxes(&mut self, sandboxes: Arc<Sandboxes>) {
        if let Some(gate) = &mut self.gate {
            gate.set_sandboxes(sandboxes);
        }
    }

    /// Whether the kernel refused pods that can be classified by now: reconcile.
    pub fn meet_strangers(&mut self) -> bool {
        self.gate.as_mut().is_some_and(Gate::meet_strangers)
    }

    /// What can be done before there is a view: pods that are trusted may connect.
    pub fn await_view(&mut self) {
        if let Some(gate) = &mut self.gate {
            let captured = self.kernel.enrolled().unwrap_or_default();
            gate.classify(None, &captured);
        }
    }

    /// How long captures took, from the sandbox's birth.
    pub fn times(&self) -> CaptureTimes {
        self.times.clone()
    }

    /// Takes listeners from the keeper at that path, and has it hold every listener that is made.
    pub fn with_keeper(mut self, path: PathBuf) -> Pods {
        let mut kept = Kept::new(path);
        kept.connect();
        self.kept = Some(kept);
        self
    }

    /// Says whether the workloads wanted are known to be the newest. What the disk remembers may be older than what another
    /// generation has captured meanwhile: as long as that is possible, nothing is retired that this agent does not hold.
    pub fn set_sure(&mut self, is_sure: bool) {
        self.is_sure = is_sure;
    }

    /// Whether there is a keeper that holds what it should; true without one.
    pub fn is_kept(&self) -> bool {
        self.kept.as_ref().is_none_or(Kept::is_well)
    }

    /// Lets go of every pod, which stays captured, and says how this agent leaves.
    pub async fn leave(mut self) -> Leave {
        if self.kept.is_none() {
            return Leave::default();
        }
        let deadline = Instant::now() + KEEPER_LAST_LOOK;
        let mut is_same = true;
        loop {
            is_same &= self.keep_again().is_empty();
            match &mut self.kept {
                // A successor that has just lost the keeper says again that it serves; until then this one goes on.
                Some(kept) if kept.is_well() => {
                    let successor = kept.successor();
                    if successor || Instant::now() >= deadline {
                        return Leave {
                            held: is_same && kept.is_well(),
                            successor,
                        };
                    }
                }
                // One that is just being replaced: what it holds is worth a moment.
                Some(kept) if Instant::now() < deadline => kept.look_now(),
                _ => return Leave::default(),
            }
            tokio::time::sleep(KEEPER_PAUSE).await;
        }
    }

    /// The pods held, for the workers.
    pub fn directory(&self) -> Directory {
        self.directory.clone()
    }

    /// How each pod of this node stands, by name.
    pub fn statuses(&self) -> Vec<PodStatus> {
        self.statuses.values().cloned().collect()
    }

    /// Whether every enrolled pod is captured; if not, reconcile again soon.
    pub fn is_settled(&self) -> bool {
        self.is_swept && self.is_kept() && self.statuses.values().all(PodStatus::is_settled)
    }

    /// Brings the pods held to those wanted: every workload of this node in the present view, enrolled or not.
    ///
    /// Idempotent; call it on every new view, and again after a while as long as it is not settled. Never call it
    /// before there is a view: what an earlier agent captured and nobody wants is retired.
    pub async fn reconcile(&mut self, wanted: &[Arc<Workload>]) {
        let enrolled: BTreeMap<&ObjectName, &Arc<Workload>> = wanted
            .iter()
            .filter(|workload| workload.enrolled)
            .map(|workload| (&workload.name, workload))
            .collect();
        if let Some(gate) = &mut self.gate {
            gate.take_view(wanted);
        }
        let others = self.keep_again();
        self.change_listeners(others).await;
        self.retire_gone(&enrolled, wanted).await;
        for workload in enrolled.values() {
            if let Err(error) = self.kernel.add_node_addresses(&workload.node_addresses) {
                tracing::error!(error = %Chain(&error), "the node's probes will be judged like any other connection");
            }
        }

        let mut problems: BTreeMap<ObjectName, PodError> = BTreeMap::new();
        for (name, workload) in &enrolled {
            if let Err(problem) = self.hold(workload) {
                problems.insert((*name).clone(), problem);
            }
        }
        // Workers must find a pod as soon as its first connection comes in.
        self.directory.replace(self.held.values().map(|held| &held.pod));

        let mut waits = Vec::new();
        for name in self.held.keys().cloned().collect::<Vec<_>>() {
            if let Err(problem) = self.guard(&name, &mut waits).await {
                problems.insert(name, problem);
            }
        }
        self.settle(waits, &mut problems).await;
        self.note_times(&problems);
        if let Some(gate) = &mut self.gate {
            let captured = self.held.values().filter(|held| held.is_enrolled);
            let captured = captured.map(|held| held.pod.cookie()).collect();
            gate.classify(Some(wanted), &captured);
        }

        self.statuses = wanted
            .iter()
            .map(|workload| (workload.name.clone(), self.status(workload, &problems)))
            .collect();
        let is_here_or_absent =
            |name: &ObjectName| self.held.contains_key(name) || problems.get(name).is_some_and(PodError::is_absence);
        if !self.is_swept && self.is_sure && enrolled.keys().all(|name| is_here_or_absent(name)) {
            self.is_swept = self.retire_strangers();
        }
        if self.statuses.values().all(PodStatus::is_settled)
            && let Some(kept) = &mut self.kept
        {
            kept.serving();
        }
    }

    /// Retires every pod; for uninstalling, not for a restart, which leaves them guarded.
    pub async fn retire_all(&mut self) {
        self.reconcile(&[]).await;
    }

    fn status(&self, workload: &Workload, problems: &BTreeMap<ObjectName, PodError>) -> PodStatus {
        let is_absent = problems.get(&workload.name).is_some_and(PodError::is_absence);
        let problem = problems.get(&workload.name).map(|problem| Chain(problem).to_string());
        let held = self.held.get(&workload.name);
        if let Some(reason) = problem.as_ref().filter(|_| !is_absent) {
            tracing::warn!(pod = %workload.name, reason, "an enrolled pod is not captured");
        }
        PodStatus {
            name: workload.name.clone(),
            enrolled: workload.enrolled,
            captured: workload.enrolled && problem.is_none() && held.is_some(),
            is_absent,
            reason: problem.or_else(|| held.and_then(|held| self.reservation(held))),
        }
    }

    fn reservation(&self, held: &Held) -> Option<String> {
        let unheld = self.kept.as_ref().and_then(Kept::problem);
        let unheld = unheld.map(|problem| format!("without an agent its connections would be refused: {problem}"));
        held.reservation.clone().or(unheld)
    }

    /// Gives a keeper that is found anew everything that this agent holds. Returns the pods for which it holds other
    /// listeners already, which another generation has made.
    fn keep_again(&mut self) -> Vec<ObjectName> {
        let Some(kept) = &mut self.kept else {
            return Vec::new();
        };
        if !kept.connect() {
            return Vec::new();
        }
        // What was withdrawn while there was no connection is found by the sweep.
        self.is_swept = false;
        let others = self.held.iter().filter(|(_, held)| {
            let cookie = held.pod.cookie();
            let mut groups = held.copies.iter();
            !groups.all(|group| {
                kept.put(cookie, group.slot, 0, &group.members).is_ok() || kept.has(cookie, group.slot, &group.members)
            })
        });
        others.map(|(name, _)| name.clone()).collect()
    }

    /// Serves what the listeners of these pods hold already, and lets go of them: their places are taken by those that
    /// the keeper holds, so that all generations have the same ones.
    async fn change_listeners(&mut self, names: Vec<ObjectName>) {
        for name in names {
            let Some(held) = self.held.remove(&name) else { continue };
            tracing::info!(pod = %name, "another generation's listeners take the place of ours");
            for worker in &self.workers {
                let _a_worker_that_is_gone_serves_nobody =
                    timeout(CONFIRM_TIMEOUT, worker.send(WorkerCommand::Retire(held.pod.cookie()))).await;
            }
        }
    }

    async fn retire_gone(&mut self, enrolled: &BTreeMap<&ObjectName, &Arc<Workload>>, all: &[Arc<Workload>]) {
        let gate = self.gate.as_ref();
        let gone: Vec<ObjectName> = self
            .held
            .iter()
            .filter(|(name, held)| {
                enrolled
                    .get(name)
                    .is_none_or(|workload| held.is_replaced_by(workload, gate))
            })
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            let Some(cookie) = self.held.get(&name).map(|held| held.pod.cookie()) else {
                continue;
            };
            if let Some(gate) = &mut self.gate {
                gate.release(cookie, all.iter().find(|workload| workload.name == name).map(|w| &**w));
            }
            if let Err(error) = self.kernel.retire(cookie) {
                // It stays held, so that the next reconciliation tries again.
                tracing::error!(pod = %name, error = %Chain(&error), "a pod could not be retired");
                continue;
            }
            self.held.remove(&name);
            if let Some(kept) = &mut self.kept {
                kept.withdraw(cookie);
            }
            tracing::info!(pod = %name, %cookie, "a pod is retired");
            for worker in &self.workers {
                let _a_worker_that_is_gone_serves_nobody =
                    timeout(CONFIRM_TIMEOUT, worker.send(WorkerCommand::Retire(cookie))).await;
            }
        }
    }

    /// Opens a pod's network namespace and makes its listeners, unless that is done.
    fn hold(&mut self, workload: &Arc<Workload>) -> Result<(), PodError> {
        if workload.host_network {
            return self.hold_hosted(workload);
        }
        let sandbox = match &self.gate {
            Some(gate) if workload.netns.is_none() => Some(gate.place(workload)?),
            _ => None,
        };
        let workload = &match sandbox {
            Some(sandbox) => sandbox.complete(workload),
            None => workload.clone(),
        };
        if is_held(&mut self.held, workload) {
            return Ok(());
        }
        let netns = match sandbox {
            Some(sandbox) => sandbox.netns.clone().ok_or(PodError::NoProcess)?,
            None => Arc::new(open(workload)?),
        };
        if workload.addresses.is_empty() {
            return Err(match sandbox {
                Some(_) => PodError::BareSandbox,
                None => PodError::NoAddress,
            });
        }
        if netns.cookie() == self.home.cookie() {
            return Err(PodError::HostNetwork);
        }
        if let Some((name, _)) = self.held.iter().find(|(_, held)| held.pod.cookie() == netns.cookie()) {
            return Err(PodError::SharedNetns(name.clone()));
        }
        let held = Held::new(
            Pod::new((*workload).clone(), netns),
            self.workers.len(),
            self.kept.as_mut(),
        )
        .map_err(PodError::Listen)?;
        self.held.insert(workload.name.clone(), held);
        Ok(())
    }

    /// Makes the listeners of a pod that shares the node's namespace, unless that is done.
    fn hold_hosted(&mut self, workload: &Arc<Workload>) -> Result<(), PodError> {
        let gate = self.gate.as_ref().ok_or(PodError::NodeNetwork)?;
        let cgroup_id = gate.place_hosted(workload)?;
        if workload.addresses.is_empty() {
            return Err(PodError::BareSandbox);
        }
        if is_held(&mut self.held, workload) {
            return Ok(());
        }
        let pod = Pod::hosted(workload.clone(), self.home.clone(), cgroup_id);
        let held = Held::new(pod, self.workers.len(), self.kept.as_mut()).map_err(PodError::Listen)?;
        self.held.insert(workload.name.clone(), held);
        Ok(())
    }

    /// Notes how long it took to capture pods that are new.
    fn note_times(&mut self, problems: &BTreeMap<ObjectName, PodError>) {
        let Some(gate) = &self.gate else { return };
        for (name, held) in &mut self.held {
            if held.is_timed || problems.contains_key(name) {
                continue;
            }
            held.is_timed = true;
            let workload = held.pod.workload();
            if let Some(sandbox) = gate.sandbox(&workload).filter(|sandbox| sandbox.is_new) {
                let took = Instant::now().duration_since(sandbox.born);
                tracing::debug!(pod = %name, took_ms = took.as_millis(), "a new pod is captured and served");
                self.times.note(took);
            }
        }
    }

    /// Has the kernel capture a held pod and the workers serve it, as far as that is not done.
    async fn guard(&mut self, name: &ObjectName, waits: &mut Vec<Wait>) -> Result<(), PodError> {
        let Some(held) = self.held.get_mut(name) else {
            return Ok(());
        };
        if !held.is_enrolled {
            if self.gate.is_some() && !held.pod.is_hosted() {
                learn_callers(&self.kernel, &held.pod.workload().addresses);
            }
            held.enrol(&self.kernel)?;
            // Before the workers serve it, so that no connection of ours is among them.
            if self.gate.as_mut().is_some_and(|gate| gate.is_cold(held.pod.cookie())) {
                match sever(held.pod.netns()) {
                    Ok(ended) => tracing::info!(pod = %name, ended, "connections from before the capture are ended"),
                    Err(error) => tracing::error!(pod = %name, %error, "connections from before the capture go on"),
                }
            }
        }
        for (index, worker) in self.workers.iter().enumerate() {
            let Some(seat) = held.seats.get_mut(index) else {
                return Err(PodError::Worker(index));
            };
            let (outbound, inbound) = match std::mem::replace(seat, Seat::Asked) {
                Seat::Ready { outbound, inbound } => (outbound, inbound),
                Seat::Serving => {
                    *seat = Seat::Serving;
                    continue;
                }
                // It lost the listeners that it was given: it gets the same ones that the keeper holds, for nobody else
                // serves those, or else new ones in the same groups.
                Seat::Asked if !held.copies.is_empty() => {
                    let all = self.workers.len();
                    let copies = |direction| copies(&held.copies, direction, index, all).map_err(PodError::Listen);
                    (copies(Direction::Outbound)?, copies(Direction::Inbound)?)
                }
                Seat::Asked => {
                    let netns = held.pod.netns();
                    let join = |groups: &[SocketAddr]| listeners::join(netns, groups).map_err(PodError::Listen);
                    (join(&held.outbound)?, join(&held.inbound)?)
                }
            };
            let (confirm, confirmed) = oneshot::channel();
            let command = PodListeners {
                pod: held.pod.clone(),
                outbound,
                inbound,
                serving: Serving(confirm),
            };
            match timeout(CONFIRM_TIMEOUT, worker.send(WorkerCommand::Serve(command))).await {
                Ok(Ok(())) => waits.push(Wait {
                    name: name.clone(),
                    worker: index,
                    confirmed,
                }),
                Ok(Err(_)) | Err(_) => return Err(PodError::Worker(index)),
            }
        }
        Ok(())
    }

    /// Awaits the workers' confirmations, all until one deadline.
    async fn settle(&mut self, waits: Vec<Wait>, problems: &mut BTreeMap<ObjectName, PodError>) {
        let deadline = Instant::now() + CONFIRM_TIMEOUT;
        for Wait {
            name,
            worker,
            confirmed,
        } in waits
        {
            let is_confirmed = matches!(timeout_at(deadline, confirmed).await, Ok(Ok(())));
            let seat = self.held.get_mut(&name).and_then(|held| held.seats.get_mut(worker));
            match seat {
                Some(seat) if is_confirmed => *seat = Seat::Serving,
                _ => {
                    problems.entry(name).or_insert(PodError::Worker(worker));
                }
            }
        }
    }

    /// Retires what an earlier agent captured and this one does not hold; says whether that is done.
    fn retire_strangers(&mut self) -> bool {
        let captured = match self.kernel.enrolled() {
            Ok(captured) => captured,
            Err(error) => {
                tracing::error!(error = %Chain(&error), "captured pods could not be listed");
                return false;
            }
        };
        let mut is_done = true;
        for cookie in captured {
            if self.held.values().any(|held| held.pod.cookie() == cookie) {
                continue;
            }
            match self.kernel.retire(cookie) {
                Ok(()) => tracing::info!(%cookie, "a pod of an earlier agent is retired"),
                Err(error) => {
                    tracing::error!(%cookie, error = %Chain(&error), "a pod of an earlier agent could not be retired");
                    is_done = false;
                }
            }
        }
        if let Some(kept) = &mut self.kept {
            for cookie in kept.namespaces() {
                if !self.held.values().any(|held| held.pod.cookie() == cookie) {
                    kept.withdraw(cookie);
                }
            }
        }
        is_done
    }
}

/// Whether the pod is held; what is newly known of it is taken in.
fn is_held(held: &mut BTreeMap<ObjectName, Held>, workload: &Arc<Workload>) -> bool {
    let Some(held) = held.get_mut(&workload.name) else {
        return false;
    };
    if *held.pod.workload() != **workload {
        held.pod.update(workload.clone());
        held.is_enrolled = false;
    }
    true
}

/// The network namespace that a workload names.
fn open(workload: &Workload) -> Result<Netns, PodError> {
    let path = Path::new(workload.netns.as_deref().ok_or(PodError::NoNetns)?);
    Netns::open(path).map_err(|source| PodError::Netns {
        path: path.to_owned(),
        source,
    })
}

/// The kubelet's probes of a pod come from the address that the node itself would call it from: the node's, or the
/// node's end of the pod's link, as the network plugin has it.
fn learn_callers(kernel: &Kernel, addresses: &[IpAddr]) {
    let callers: Vec<IpAddr> = addresses.iter().filter_map(|ip| source_towards(*ip).ok()).collect();
    if let Err(error) = kernel.add_node_addresses(&callers) {
        tracing::error!(error = %Chain(&error), "the node's probes will be judged like any other connection");
    }
}

/// The address from which this thread's network namespace calls another; nothing is sent.
fn source_towards(ip: IpAddr) -> io::Result<IpAddr> {
    let any: IpAddr = match ip {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect((ip, 9))?;
    socket.local_addr().map(|address| address.ip())
}

/// Copies of the listeners that a worker has of each group in one direction.
fn copies(groups: &[Group], direction: Direction, worker: usize, workers: usize) -> io::Result<Vec<TcpListener>> {
    let groups = groups.iter().filter(|group| group.slot.direction == direction);
    groups
        .flat_map(|group| group.members.iter().skip(worker).step_by(workers))
        .map(TcpListener::try_clone)
        .collect()
}

impl Held {
    fn new(pod: Pod, workers: usize, kept: Option<&mut Kept>) -> io::Result<Held> {
        let is_kept = kept.is_some();
        let groups = listeners::obtain(&pod, workers, kept)?;
        let addresses = |direction| {
            let of = groups.iter().filter(|group| group.slot.direction == direction);
            of.map(|group| group.address).collect()
        };
        let mut held = Held {
            pod: Arc::new(pod),
            outbound: addresses(Direction::Outbound),
            inbound: addresses(Direction::Inbound),
            steered: Vec::new(),
            seats: Vec::with_capacity(workers),
            is_enrolled: false,
            is_timed: false,
            copies: Vec::new(),
            reservation: None,
        };
        for group in groups.iter().filter(|group| group.slot.direction == Direction::Inbound) {
            held.steered
                .extend(group.members.first().map(TcpListener::try_clone).transpose()?);
        }
        for worker in 0..workers {
            held.seats.push(Seat::Ready {
                outbound: copies(&groups, Direction::Outbound, worker, workers)?,
                inbound: copies(&groups, Direction::Inbound, worker, workers)?,
            });
        }
        if is_kept {
            held.copies = groups;
        }
        Ok(held)
    }

    /// Whether the workload of the same name is another pod: another identity or network namespace. A namespace's
    /// file that is merely gone says nothing yet.
    fn is_replaced_by(&self, workload: &Workload, gate: Option<&Gate>) -> bool {
        if workload.host_network || self.pod.is_hosted() {
            let place = gate.and_then(|gate| gate.place_hosted(workload).ok());
            let is_same = workload.host_network && place.map(NetnsCookie::hosted) == Some(self.pod.cookie());
            return !is_same || *self.pod.identity() != workload.identity;
        }
        if let Some(gate) = gate
            && workload.netns.is_none()
            && gate.sandbox(workload).and_then(|sandbox| sandbox.cookie()) != Some(self.pod.cookie())
        {
            return true;
        }
        let moved = workload
            .netns
            .as_deref()
            .is_some_and(|path| matches!(self.pod.netns().is_at(Path::new(path)), Ok(false)));
        moved || *self.pod.identity() != workload.identity
    }

    fn enrol(&mut self, kernel: &Kernel) -> Result<(), PodError> {
        let workload = self.pod.workload();
        let steered = |ipv6: bool| {
            let index = self.inbound.iter().position(|address| address.is_ipv6() == ipv6)?;
            self.steered.get(index).map(AsFd::as_fd)
        };
        let captured = |ipv6: bool| self.outbound.iter().copied().find(|address| address.is_ipv6() == ipv6);
        let mut reservations = Vec::new();
        let mut ports = |what: &str, ports: &[u16]| {
            PortSet::new(ports).unwrap_or_else(|_| {
                // What does not fit is guarded like any other port.
                reservations.push(format!("more than {PORTS_MAX} {what}: the rest is ignored"));
                PortSet::new(ports.get(..PORTS_MAX).unwrap_or_default()).unwrap_or_default()
            })
        };
        if let Some(cgroup_id) = self.pod.cookie().cgroup_id() {
            let capture = HostedCapture {
                cgroup_id,
                addresses: &workload.addresses,
                outbound_v4: captured(false),
                outbound_v6: captured(true),
                exclude_outbound: ports("excluded outbound ports", &workload.exclude_outbound_ports),
            };
            kernel.enrol_hosted(&capture)?;
            reservations.push("host network: captured as a source only".to_owned());
            return self.captured(&reservations);
        }
        let capture = PodCapture {
            cookie: self.pod.cookie(),
            netns: self.pod.netns().as_fd(),
            addresses: &workload.addresses,
            outbound_v4: captured(false),
            outbound_v6: captured(true),
            inbound_v4: steered(false),
            inbound_v6: steered(true),
            exclude_outbound: ports("excluded outbound ports", &workload.exclude_outbound_ports),
            exclude_inbound: ports("excluded inbound ports", &workload.exclude_inbound_ports),
            probes: ports("probe ports", &workload.probe_ports),
        };
        kernel.enrol(&capture)?;
        self.captured(&reservations)
    }

    fn captured(&mut self, reservations: &[String]) -> Result<(), PodError> {
        self.reservation = (!reservations.is_empty()).then(|| reservations.join("; "));
        self.is_enrolled = true;
        if self.is_timed {
            tracing::debug!(pod = %self.pod.name(), "what is known of a captured pod has changed");
        } else {
            tracing::info!(pod = %self.pod.name(), cookie = %self.pod.cookie(), "a pod is captured");
        }
        Ok(())
    }
}
