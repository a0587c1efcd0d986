//! A data worker: one thread, one current-thread runtime, one task per connection from accept to close.
//!
//! A worker owns its listeners and its pool of tunnels, and shares with the others what must be one for the node: the
//! view, credentials, traffic state, events and the kernel. A connection never changes its worker, so that a request
//! costs no wake-up of another thread. The control thread speaks to a worker by [`WorkerCommand`] alone.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet},
    io,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

use mesh_api::view::View;
use tokio::sync::{mpsc, watch};

use crate::{
    capture,
    drain::Drain,
    event::Events,
    identity::CredentialStore,
    kernel::{Kernel, NetnsCookie},
    net::{Clock, SystemClock},
    pods::{Directory, WorkerCommand},
    traffic::Traffic,
    tunnel::{Pool, PoolConfig},
    view::Published,
};

/// Commands that may wait for a worker.
pub const COMMANDS_MAX: usize = 1024;

/// Destinations remembered as speaking first; above it the memory starts anew.
const SPEAKS_FIRST_MAX: usize = 4096;

/// Bounds and times of the path.
#[derive(Clone, Copy, Debug)]
pub struct PathConfig {
    /// Connections at once on one worker, captured and steered; further ones wait in the listeners' backlogs.
    pub connections_max: usize,
    /// How long a source may stay silent before the destination is asked whether it speaks first.
    pub silence: Duration,
    /// How long the first bytes may take to become understandable, and a handshake to be done.
    pub handshake_timeout: Duration,
    /// Time for a TCP connection to a destination without a timeout of its own.
    pub dial_timeout: Duration,
    /// How long a connection from an address that the view does not know waits for the view.
    pub view_patience: Duration,
    /// How long an opaque flow may stay without a byte; `None`: as long as it likes.
    pub idle_timeout: Option<Duration>,
}

impl Default for PathConfig {
    fn default() -> PathConfig {
        PathConfig {
            connections_max: 50_000,
            silence: Duration::from_millis(100),
            handshake_timeout: Duration::from_secs(10),
            dial_timeout: crate::net::DIAL_TIMEOUT,
            view_patience: Duration::from_secs(2),
            idle_timeout: None,
        }
    }
}

/// What all workers share.
pub struct Shared {
    /// The node's name.
    pub node: Arc<str>,
    /// The current view.
    pub view: Arc<Published<View>>,
    /// The kernel side.
    pub kernel: Arc<Kernel>,
    /// Credentials of the identities on this node.
    pub credentials: Arc<CredentialStore>,
    /// Limits, breakers, balancers.
    pub traffic: Arc<Traffic>,
    /// Log and metrics.
    pub events: Arc<Events>,
    /// The pods of this node.
    pub pods: Directory,
    /// The drain signal.
    pub drain: Drain,
    /// Bounds and times.
    pub config: PathConfig,
}

/// One worker, as its connections see it.
pub struct Worker {
    /// What all workers share.
    pub shared: Arc<Shared>,
    /// The worker's tunnels.
    pub tunnels: Pool,
    clock: SystemClock,
    open: Cell<usize>,
    free: tokio::sync::Notify,
    speaks_first: RefCell<HashSet<SocketAddr>>,
}

/// Counts one connection of a worker; dropped, its place is free.
pub struct Place(Rc<Worker>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.open.set(self.0.open.get().saturating_sub(1));
        self.0.free.notify_one();
    }
}

impl Worker {
    fn new(shared: Arc<Shared>) -> Rc<Worker> {
        let clock = SystemClock;
        let pool = PoolConfig { dial_timeout: shared.config.dial_timeout, ..PoolConfig::default() };
        let tunnels = Pool::new(pool, shared.credentials.clone(), Arc::new(clock));
        Rc::new(Worker { shared, tunnels, clock, open: Cell::new(0), free: tokio::sync::Notify::new(), speaks_first: RefCell::default() })
    }

    /// Waits until the worker may take another connection.
    pub async fn place(self: &Rc<Self>) -> Place {
        while self.open.get() >= self.shared.config.connections_max {
            self.free.notified().await;
        }
        self.open.set(self.open.get() + 1);
        Place(self.clone())
    }

    /// Whether the destination at this address was seen to speak first.
    pub fn speaks_first(&self, destination: SocketAddr) -> bool {
        self.speaks_first.borrow().contains(&destination)
    }

    /// Remembers that the destination spoke first, so that the next connection need not wait for the source's silence.
    pub fn note_speaks_first(&self, destination: SocketAddr) {
        let mut known = self.speaks_first.borrow_mut();
        if known.len() >= SPEAKS_FIRST_MAX {
            known.clear();
        }
        known.insert(destination);
    }

    /// Monotonic time.
    pub fn now(&self) -> Instant {
        self.clock.now()
    }

    /// Wall-clock time, for certificates.
    pub fn wall(&self) -> SystemTime {
        self.clock.wall()
    }
}

/// Starts a worker's thread.
pub fn start(
    index: usize,
    shared: Arc<Shared>,
    commands: mpsc::Receiver<WorkerCommand>,
) -> io::Result<JoinHandle<io::Result<()>>> {
    std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let local = tokio::task::LocalSet::new();
        local.block_on(&runtime, run(shared, commands));
        // Connections that outlive the drain's patience end with the runtime.
        Ok(())
    })
}

async fn run(shared: Arc<Shared>, mut commands: mpsc::Receiver<WorkerCommand>) {
    let worker = Worker::new(shared);
    let tunnels = worker.tunnels.clone();
    let maintenance = tokio::task::spawn_local(async move { tunnels.maintain().await });
    let mut serving: HashMap<NetnsCookie, watch::Sender<bool>> = HashMap::new();
    while let Some(command) = commands.recv().await {
        match command {
            WorkerCommand::Serve(listeners) => {
                let stop = serving.entry(listeners.pod.cookie()).or_insert_with(|| watch::Sender::new(false));
                if *stop.borrow() {
                    // The pod was retired and came back: the old acceptors end, new ones get a signal of their own.
                    *stop = watch::Sender::new(false);
                }
                capture::serve(&worker, listeners, stop.subscribe());
            }
            WorkerCommand::Retire(cookie) => {
                if let Some(stop) = serving.remove(&cookie) {
                    stop.send_replace(true);
                }
            }
            WorkerCommand::Drain => break,
        }
    }
    for stop in serving.values() {
        stop.send_replace(true);
    }
    worker.tunnels.drain();
    // Every connection holds a drain guard; the composition root bounds this wait.
    worker.shared.drain.closing().await;
    maintenance.abort();
}
