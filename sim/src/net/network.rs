//! The simulated network: who listens where, what is on its way, which links are down.
//!
//! Between two nodes each write takes some milliseconds, in order within its direction; on one node it arrives at once.
//! What is drawn is drawn per write and per connection, never per byte: the lengths of TLS's handshake messages differ
//! from run to run (signatures do), and a run must not hang on them. A link that is down keeps what is on its way, as TCP
//! would by sending it again; a connection that is cut ends with a reset on both sides.

use std::{
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Arc, Weak},
    task::Waker,
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use real_tokio::{sync::Notify, time::Instant};

use super::{
    inspect::Inspector,
    socket::{Connection, Ends, TcpStream},
};
use crate::chance::Random;

/// Connections that wait in a listener; further ones come back after a second, as a lost SYN does.
const BACKLOG_MAX: usize = 128;
const SYN_RETRY: Duration = Duration::from_secs(1);

/// Which listener of a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Door {
    /// An application's.
    App(u16),
    /// The agent's, for what the pod connects to.
    Outbound,
    /// The agent's, for what comes to the pod.
    Inbound,
}

/// A listening socket's queue.
#[derive(Debug, Default)]
pub struct Backlog {
    state: Mutex<BacklogState>,
}

#[derive(Debug, Default)]
struct BacklogState {
    waiting: VecDeque<(TcpStream, SocketAddr)>,
    wakers: Vec<Waker>,
}

impl Backlog {
    /// The next connection, or a place among those who wait for one.
    pub fn poll_accept(&self, waker: &Waker) -> Option<(TcpStream, SocketAddr)> {
        let mut state = self.state.lock();
        let next = state.waiting.pop_front();
        if next.is_none() && !state.wakers.iter().any(|known| known.will_wake(waker)) {
            state.wakers.push(waker.clone());
        }
        next
    }

    /// Connections that wait.
    pub fn waiting(&self) -> usize {
        self.state.lock().waiting.len()
    }

    fn push(&self, stream: TcpStream, source: SocketAddr) {
        let wakers = {
            let mut state = self.state.lock();
            state.waiting.push_back((stream, source));
            std::mem::take(&mut state.wakers)
        };
        wakers.into_iter().for_each(Waker::wake);
    }
}

/// A way between two nodes.
#[derive(Debug, Default)]
struct Link {
    down: bool,
    /// Added to every delay.
    slow: Duration,
    held: Vec<Event>,
}

/// What is on its way in one direction of a connection.
#[derive(Debug)]
pub(super) enum Parcel {
    Data(Bytes),
    Fin,
    Reset,
}

#[derive(Debug)]
struct Event {
    connection: Weak<Connection>,
    /// The side that sent it.
    from: usize,
    parcel: Parcel,
}

struct Core {
    random: Random,
    /// The node of each namespace, and the addresses of pods.
    nodes: BTreeMap<u64, usize>,
    addresses: BTreeMap<IpAddr, u64>,
    doors: BTreeMap<(u64, Door), Arc<Backlog>>,
    links: BTreeMap<(usize, usize), Link>,
    events: BTreeMap<(Instant, u64), Event>,
    sequence: u64,
    port: u16,
    connections: BTreeMap<u64, Weak<Connection>>,
    carried: u64,
    faults: Vec<String>,
}

/// The network of a run.
pub struct Network {
    core: Mutex<Core>,
    earlier: Notify,
    healed: Notify,
}

thread_local! {
    static NETWORK: RefCell<Option<Arc<Network>>> = const { RefCell::new(None) };
}

/// The network of this thread's run.
pub(super) fn current() -> io::Result<Arc<Network>> {
    NETWORK
        .with_borrow(|network| network.clone())
        .ok_or_else(|| io::ErrorKind::NetworkDown.into())
}

fn pair(a: usize, b: usize) -> (usize, usize) {
    (a.min(b), a.max(b))
}

impl Network {
    /// A network without anybody, and the one of this thread from now on.
    pub fn install(seed: u64) -> Arc<Network> {
        let network = Arc::new(Network {
            core: Mutex::new(Core {
                random: Random::new(seed, "network"),
                nodes: BTreeMap::new(),
                addresses: BTreeMap::new(),
                doors: BTreeMap::new(),
                links: BTreeMap::new(),
                events: BTreeMap::new(),
                sequence: 0,
                port: 10_000,
                connections: BTreeMap::new(),
                carried: 0,
                faults: Vec::new(),
            }),
            earlier: Notify::new(),
            healed: Notify::new(),
        });
        NETWORK.set(Some(network.clone()));
        network
    }

    /// Takes the thread's network away.
    pub fn uninstall() {
        NETWORK.set(None);
    }

    /// A pod's namespace on a node.
    pub fn add_pod(&self, node: usize, netns: u64, address: IpAddr) {
        let mut core = self.core.lock();
        core.nodes.insert(netns, node);
        core.addresses.insert(address, netns);
    }

    /// Opens a door; it stands open until it is closed, whoever accepts there.
    pub fn open(&self, netns: u64, door: Door) -> Arc<Backlog> {
        self.core.lock().doors.entry((netns, door)).or_default().clone()
    }

    /// Closes a door: what waits behind it is reset, who comes is refused.
    pub fn close(&self, netns: u64, door: Door) {
        let closed = self.core.lock().doors.remove(&(netns, door));
        if let Some(backlog) = closed {
            let waiting = std::mem::take(&mut backlog.state.lock().waiting);
            for (stream, _) in waiting {
                stream.reset_on_close();
            }
        }
    }

    /// Moves what is due. Runs as long as the world does.
    pub async fn run(self: Arc<Self>) {
        loop {
            let next = self.core.lock().events.keys().next().copied();
            match next {
                None => self.earlier.notified().await,
                Some((at, _)) if at > Instant::now() => {
                    let _ = real_tokio::time::timeout_at(at, self.earlier.notified()).await;
                }
                Some(_) => self.deliver_next(),
            }
        }
    }

    fn deliver_next(&self) {
        let event = {
            let mut core = self.core.lock();
            let Some((_, event)) = core.events.pop_first() else {
                return;
            };
            core.carried += 1;
            let Some(connection) = event.connection.upgrade() else {
                return;
            };
            let link = core
                .links
                .entry(pair(connection.nodes[0], connection.nodes[1]))
                .or_default();
            if link.down && connection.nodes[0] != connection.nodes[1] {
                link.held.push(event);
                return;
            }
            event
        };
        if let Some(connection) = event.connection.upgrade() {
            connection.arrive(self, event.from, event.parcel);
        }
    }

    /// Sends something on a connection. `flying`: something else is on its way there in this direction.
    pub(super) fn send(
        &self,
        connection: &Arc<Connection>,
        from: usize,
        parcel: Parcel,
        not_before: Instant,
    ) -> Instant {
        let local = connection.nodes[0] == connection.nodes[1];
        let now = Instant::now();
        let at = {
            let mut core = self.core.lock();
            let delay = if local {
                Duration::ZERO
            } else {
                core.delay(pair(connection.nodes[0], connection.nodes[1]))
            };
            (now + delay).max(not_before)
        };
        if local {
            connection.arrive(self, from, parcel);
            return at;
        }
        let mut core = self.core.lock();
        core.sequence += 1;
        let key = (at, core.sequence);
        core.events.insert(
            key,
            Event {
                connection: Arc::downgrade(connection),
                from,
                parcel,
            },
        );
        let first = core.events.keys().next() == Some(&key);
        drop(core);
        if first {
            self.earlier.notify_one();
        }
        at
    }

    /// One way between two nodes: waits as long as a packet would.
    async fn travel(&self, from: usize, to: usize) {
        if from == to {
            return;
        }
        let delay = self.core.lock().delay(pair(from, to));
        real_tokio::time::sleep(delay).await;
        loop {
            let healed = self.healed.notified();
            if !self
                .core
                .lock()
                .links
                .get(&pair(from, to))
                .is_some_and(|link| link.down)
            {
                return;
            }
            healed.await;
        }
    }

    /// What an agent's socket in a namespace reaches.
    pub(super) async fn connect(&self, netns: u64, bound: Option<SocketAddr>, to: SocketAddr) -> io::Result<TcpStream> {
        let unreachable = || io::Error::from(io::ErrorKind::HostUnreachable);
        let (from_node, to_node, target, own) = {
            let core = self.core.lock();
            let target = *core.addresses.get(&to.ip()).ok_or_else(unreachable)?;
            let node = |netns: &u64| core.nodes.get(netns).copied().ok_or_else(unreachable);
            let own = core.addresses.iter().find(|(_, of)| **of == netns).map(|(ip, _)| *ip);
            (node(&netns)?, node(&target)?, target, own.ok_or_else(unreachable)?)
        };
        // The agent's own socket in the pod's namespace reaches the application; all others are steered.
        let door = if target == netns {
            Door::App(to.port())
        } else {
            Door::Inbound
        };
        let source = bound.unwrap_or_else(|| SocketAddr::new(own, self.port()));
        let ends = Ends {
            addresses: [source, to],
            nodes: [from_node, to_node],
            netns: [netns, target],
            door,
        };
        self.handshake(ends, (target, door)).await
    }

    /// An application's connection, captured: the agent's end sees `source`, the application's end `to`.
    pub async fn capture(&self, netns: u64, to: SocketAddr, note: impl FnOnce(SocketAddr)) -> io::Result<TcpStream> {
        let node = self.core.lock().nodes.get(&netns).copied();
        let node = node.ok_or(io::ErrorKind::HostUnreachable)?;
        let source = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), self.port());
        note(source);
        let ends = Ends {
            addresses: [source, to],
            nodes: [node, node],
            netns: [netns, netns],
            door: Door::Outbound,
        };
        self.handshake(ends, (netns, Door::Outbound)).await
    }

    async fn handshake(&self, ends: Ends, door: (u64, Door)) -> io::Result<TcpStream> {
        let [from, to] = ends.nodes;
        self.travel(from, to).await;
        let backlog = loop {
            let open = self.core.lock().doors.get(&door).cloned();
            match open {
                None => {
                    self.travel(to, from).await;
                    return Err(io::ErrorKind::ConnectionRefused.into());
                }
                Some(backlog) if backlog.waiting() < BACKLOG_MAX => break backlog,
                Some(_) => real_tokio::time::sleep(SYN_RETRY).await,
            }
        };
        let source = ends.addresses[0];
        let (near, far) = {
            let mut core = self.core.lock();
            core.sequence += 1;
            let id = core.sequence;
            let room = if core.random.one_in(4) { 4 * 1024 } else { 64 * 1024 };
            let dice = Random::new(core.random.draw(), "connection");
            let inspectors = (from != to).then(|| [Inspector::default(), Inspector::default()]);
            let (near, far) = TcpStream::pair(id, ends, room, dice, inspectors);
            core.connections.retain(|_, connection| connection.strong_count() > 0);
            core.connections.insert(id, Arc::downgrade(near.connection()));
            (near, far)
        };
        backlog.push(far, source);
        self.travel(to, from).await;
        Ok(near)
    }

    pub(super) fn port(&self) -> u16 {
        let mut core = self.core.lock();
        core.port = if core.port >= 65_000 { 10_000 } else { core.port + 1 };
        core.port
    }

    /// Takes the way between two nodes down, or up again.
    pub fn set_link(&self, a: usize, b: usize, down: bool) {
        let mut core = self.core.lock();
        let link = core.links.entry(pair(a, b)).or_default();
        link.down = down;
        let held = if down {
            Vec::new()
        } else {
            std::mem::take(&mut link.held)
        };
        for event in held {
            core.sequence += 1;
            let key = (Instant::now(), core.sequence);
            core.events.insert(key, event);
        }
        drop(core);
        self.earlier.notify_one();
        self.healed.notify_waiters();
    }

    /// Makes the way between two nodes slower.
    pub fn slow_link(&self, a: usize, b: usize, by: Duration) {
        self.core.lock().links.entry(pair(a, b)).or_default().slow = by;
    }

    /// Cuts connections between two nodes, each one time in `one_in`. Returns how many.
    pub fn cut(&self, a: usize, b: usize, one_in: u64) -> usize {
        let chosen: Vec<Arc<Connection>> = {
            let mut core = self.core.lock();
            let all: Vec<_> = core.connections.values().filter_map(Weak::upgrade).collect();
            let between = all.into_iter().filter(|c| pair(c.nodes[0], c.nodes[1]) == pair(a, b));
            let between: Vec<_> = between.collect();
            between.into_iter().filter(|_| core.random.one_in(one_in)).collect()
        };
        chosen.iter().for_each(|connection| connection.cut());
        chosen.len()
    }

    /// Something that must never happen has happened.
    pub(super) fn fault(&self, what: String) {
        self.core.lock().faults.push(what);
    }

    /// What was found on the wire.
    pub fn take_faults(&self) -> Vec<String> {
        std::mem::take(&mut self.core.lock().faults)
    }

    /// What was delivered so far: the same in every run of a seed.
    pub fn carried(&self) -> u64 {
        self.core.lock().carried
    }

    /// The connections of which a side is open, told by their addresses.
    pub fn open_connections(&self) -> Vec<String> {
        let core = self.core.lock();
        let live = core.connections.values().filter_map(Weak::upgrade);
        live.filter(|connection| connection.is_open())
            .map(|connection| connection.describe())
            .collect()
    }
}

impl Core {
    fn delay(&mut self, link: (usize, usize)) -> Duration {
        let slow = self.links.get(&link).map_or(Duration::ZERO, |link| link.slow);
        let jitter = if self.random.one_in(32) {
            self.random.between(5, 40)
        } else {
            self.random.below(3)
        };
        Duration::from_millis(1 + jitter) + slow
    }
}
