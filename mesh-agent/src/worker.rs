//! A data worker as its connections see it: what it has of its own, and what all workers share.
//!
//! A worker owns its pool of tunnels and a bounded number of places, and shares with the others what must be one for
//! the node: the view, credentials, traffic state, events and the kernel. A connection never changes its worker, so that
//! a request costs no wake-up of another thread. Its thread and its listeners are `capture`'s.

use std::{
    cell::{Cell, RefCell},
    collections::HashSet,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use mesh_api::{identity::SpiffeId, view::View};

use crate::{
    drain::Drain,
    event::Events,
    identity::{Credential, CredentialStore},
    kernel::Kernel,
    net::{Clock, SystemClock},
    pods::Directory,
    traffic::Traffic,
    tunnel::{Pool, PoolConfig},
    view::{Published, Reader},
};

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
    /// How long a connection waits for what is just being brought: a view that knows the peer, a credential. A new
    /// pod's address comes from its kubelet, which tells it a second or more after the pod's first container has begun.
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
            view_patience: Duration::from_secs(5),
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
    view: RefCell<(Reader<View>, LocalView)>,
    copies: Rc<Cell<usize>>,
}

/// A view as one worker's requests hold it: shared within the worker alone, so that a request moves no count that
/// other cores move too.
pub type LocalView = Rc<Arc<View>>;

/// The most copies of requests at once that one worker sends to mirrors.
pub const COPIES_MAX: usize = 128;

/// The leave to send one copy of a request; dropped, its place is free.
pub struct CopyPlace(Rc<Cell<usize>>);

impl Drop for CopyPlace {
    fn drop(&mut self) {
        self.0.set(self.0.get().saturating_sub(1));
    }
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
    /// A worker without listeners.
    pub fn new(shared: Arc<Shared>) -> Rc<Worker> {
        let clock = SystemClock;
        let pool = PoolConfig {
            dial_timeout: shared.config.dial_timeout,
            ..PoolConfig::default()
        };
        let tunnels = Pool::new(pool, shared.credentials.clone(), Arc::new(clock));
        let mut reader = shared.view.reader();
        let current = Rc::new(reader.current().clone());
        Rc::new(Worker {
            view: RefCell::new((reader, current)),
            copies: Rc::default(),
            shared,
            tunnels,
            clock,
            open: Cell::new(0),
            free: tokio::sync::Notify::new(),
            speaks_first: RefCell::default(),
        })
    }

    /// Waits until the worker may take another connection.
    pub async fn place(self: &Rc<Self>) -> Place {
        while self.open.get() >= self.shared.config.connections_max {
            self.free.notified().await;
        }
        self.open.set(self.open.get() + 1);
        Place(self.clone())
    }

    /// The current view.
    pub fn view(&self) -> LocalView {
        let (reader, known) = &mut *self.view.borrow_mut();
        let current = reader.current();
        if !Arc::ptr_eq(current, known) {
            *known = Rc::new(current.clone());
        }
        known.clone()
    }

    /// Leave to send a copy of a request, unless [`COPIES_MAX`] are under way.
    pub fn copy_place(&self) -> Option<CopyPlace> {
        let count = self.copies.get();
        (count < COPIES_MAX).then(|| {
            self.copies.set(count + 1);
            CopyPlace(self.copies.clone())
        })
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

    /// The identity's valid credential; one that is just being issued is waited for.
    pub async fn credential(&self, identity: &SpiffeId) -> Option<Arc<Credential>> {
        if let Some(credential) = self.shared.credentials.valid(identity, self.wall()) {
            return Some(credential);
        }
        let deadline = tokio::time::Instant::now() + self.shared.config.view_patience;
        self.shared.credentials.ready(identity, deadline).await?;
        self.shared.credentials.valid(identity, self.wall())
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
