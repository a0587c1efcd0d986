//! A data worker as its connections see it: what it has of its own, and what all workers share.
//!
//! A worker owns its pool of tunnels and a bounded number of places, and shares with the others what must be one for
//! the node: the view, credentials, traffic state, events and the kernel. A connection never changes its worker, so that
//! a request costs no wake-up of another thread. Places belong to source workloads, of which none may take everything.
//! The worker's thread and its listeners are `capture`'s.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use mesh_api::{identity::SpiffeId, view::View};

use crate::{
    drain::Drain,
    event::{Event, Events},
    identity::{Credential, CredentialStore},
    kernel::{Kernel, NetnsCookie},
    net::{Clock, SystemClock},
    pods::Directory,
    traffic::Traffic,
    tunnel::{PeerPatience, Pool, PoolConfig},
    view::{Published, Reader},
};

/// Destinations remembered as speaking first; above it the memory starts anew.
const SPEAKS_FIRST_MAX: usize = 4096;
/// A source may hold so many places for each one that is free: three quarters of them all where it is alone, and always
/// three quarters of what the others left. (Dynamic thresholds, as switches share their buffers: no setting per source,
/// and no place lies idle that somebody could use.)
const PLACES_PER_FREE: usize = 3;
/// Descriptors of one connection: its own, and that of its destination.
const DESCRIPTORS_PER_PLACE: u64 = 2;
/// The share of the descriptors that is not for connections: listeners, maps, idle tunnels, the controller's stream.
const DESCRIPTORS_KEPT: u64 = 4;
/// What a connection is taken to need of the memory, sockets included, as long as nothing piles up: an allowance,
/// well above what idle connections were seen to take, not a measured worst case.
const PLACE_BYTES: u64 = 64 * 1024;
/// What the agent itself is taken to need of the memory: an allowance too.
const OWN_BYTES: u64 = 48 << 20;
/// The fewest places that a worker has, however little it was given.
const PLACES_MIN: usize = 32;
/// How long nothing is said of a bound that goes on being reached.
const BOUND_QUIET: Duration = Duration::from_secs(10);

/// Bounds and times of the path.
#[derive(Clone, Copy, Debug)]
pub struct PathConfig {
    /// Connections at once on one worker, captured and steered; further ones are refused. One source has at most three
    /// quarters of them.
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
    /// How long a peer may be silent although it owes an answer.
    pub peer_patience: PeerPatience,
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
            peer_patience: PeerPatience::default(),
        }
    }
}

impl PathConfig {
    /// The same with no more connections than so many descriptors and so much memory are good for.
    #[must_use]
    pub fn within(self, descriptors: u64, memory: Option<u64>, workers: usize) -> PathConfig {
        let workers = u64::try_from(workers.max(1)).unwrap_or(u64::MAX);
        let by_descriptors = (descriptors - descriptors / DESCRIPTORS_KEPT) / DESCRIPTORS_PER_PLACE / workers;
        let by_memory = memory.map_or(u64::MAX, |bytes| {
            bytes.saturating_sub(OWN_BYTES) / PLACE_BYTES / workers
        });
        let max = usize::try_from(by_descriptors.min(by_memory)).unwrap_or(usize::MAX);
        PathConfig {
            connections_max: self.connections_max.min(max.max(PLACES_MIN)),
            ..self
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
    places: Rc<Places>,
    bound_told: Cell<Option<Instant>>,
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

/// Whose connections share places and turns: a pod of this node by its network namespace, anybody else by address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceKey {
    /// A pod of this node.
    Pod(NetnsCookie),
    /// Who connects to a pod of this node.
    Address(IpAddr),
}

/// A source workload on one worker. Known as long as it has a connection, or somebody listens for it.
pub struct Source {
    key: SourceKey,
    places: Rc<Places>,
    open: Cell<usize>,
}

impl Drop for Source {
    fn drop(&mut self) {
        self.places.sources.borrow_mut().remove(&self.key);
    }
}

/// The places of one worker.
struct Places {
    max: usize,
    open: Cell<usize>,
    /// Bounded: each has a place, or is a pod of this node.
    sources: RefCell<HashMap<SourceKey, std::rc::Weak<Source>>>,
}

impl Places {
    fn new(max: usize) -> Rc<Places> {
        Rc::new(Places {
            max,
            open: Cell::new(0),
            sources: RefCell::default(),
        })
    }

    fn source(self: &Rc<Self>, key: SourceKey) -> Rc<Source> {
        let mut sources = self.sources.borrow_mut();
        if let Some(source) = sources.get(&key).and_then(std::rc::Weak::upgrade) {
            return source;
        }
        let source = Rc::new(Source {
            key,
            places: self.clone(),
            open: Cell::new(0),
        });
        sources.insert(key, Rc::downgrade(&source));
        source
    }

    fn take(&self, source: &Rc<Source>) -> Option<Place> {
        let free = self.max.saturating_sub(self.open.get());
        if source.open.get() >= free.saturating_mul(PLACES_PER_FREE) {
            return None;
        }
        self.open.set(self.open.get() + 1);
        source.open.set(source.open.get() + 1);
        Some(Place(source.clone()))
    }
}

/// Counts one connection of a source; dropped, its place is free.
pub struct Place(Rc<Source>);

impl Drop for Place {
    fn drop(&mut self) {
        let Source { open, places, .. } = &*self.0;
        open.set(open.get().saturating_sub(1));
        places.open.set(places.open.get().saturating_sub(1));
    }
}

impl Worker {
    /// A worker without listeners.
    pub fn new(shared: Arc<Shared>) -> Rc<Worker> {
        let clock = SystemClock;
        let (default, patience) = (PoolConfig::default(), shared.config.peer_patience);
        let pool = PoolConfig {
            dial_timeout: shared.config.dial_timeout,
            peer_patience: patience,
            sweep_interval: default.sweep_interval.min(patience.requests.min(patience.flows) / 4),
            ..default
        };
        let tunnels = Pool::new(pool, shared.credentials.clone(), Arc::new(clock));
        let mut reader = shared.view.reader();
        let current = Rc::new(reader.current().clone());
        Rc::new(Worker {
            view: RefCell::new((reader, current)),
            copies: Rc::default(),
            places: Places::new(shared.config.connections_max),
            shared,
            tunnels,
            clock,
            bound_told: Cell::new(None),
            speaks_first: RefCell::default(),
        })
    }

    /// The source of that key.
    pub fn source(&self, key: SourceKey) -> Rc<Source> {
        self.places.source(key)
    }

    /// A place for another connection of the source. `None` where it holds all that it may: waiting would not help it,
    /// since connections last for as long as they like.
    pub fn place(&self, source: &Rc<Source>) -> Option<Place> {
        let place = self.places.take(source);
        if place.is_none() {
            self.bound_reached("connections", self.places.max);
        }
        place
    }

    /// Tells of a bound, now and then.
    pub fn bound_reached(&self, bound: &'static str, limit: usize) {
        let now = self.now();
        let told = self.bound_told.get();
        if told.is_none_or(|told| now.saturating_duration_since(told) >= BOUND_QUIET) {
            self.bound_told.set(Some(now));
            self.shared.events.emit(Event::BoundReached { bound, limit });
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(number: u64) -> SourceKey {
        SourceKey::Pod(NetnsCookie(number))
    }

    #[test]
    fn no_source_takes_every_place() {
        let places = Places::new(1000);
        let mut held = Vec::new();
        let mut counts = Vec::new();
        for number in 0..6 {
            let source = places.source(pod(number));
            let before = held.len();
            while let Some(place) = places.take(&source) {
                held.push(place);
                assert!(held.len() <= 1000);
            }
            counts.push(held.len() - before);
        }
        assert_eq!(counts, [750, 188, 47, 12, 3, 0], "three quarters of what is free, each");
        held.clear();
        assert_eq!(places.open.get(), 0);
        assert!(places.sources.borrow().is_empty(), "nobody is remembered for nothing");
    }

    #[test]
    fn a_source_that_gives_up_places_makes_room_for_the_others() {
        let places = Places::new(100);
        let (greedy, modest) = (
            places.source(pod(1)),
            places.source(SourceKey::Address([10, 0, 0, 1].into())),
        );
        let mut held: Vec<_> = std::iter::from_fn(|| places.take(&greedy)).collect();
        let others: Vec<_> = std::iter::from_fn(|| places.take(&modest)).collect();
        assert_eq!((held.len(), others.len()), (75, 19));
        assert!(places.take(&greedy).is_none() && places.take(&modest).is_none());
        held.truncate(40);
        assert!(places.take(&modest).is_some());
        assert!(
            Rc::ptr_eq(&places.source(pod(1)), &greedy),
            "one source, however often it is asked for"
        );
    }

    #[test]
    fn places_follow_what_the_process_was_given() {
        let config = PathConfig::default();
        let cases = [
            ("plenty", 1 << 20, None, 2, 50_000),
            ("few descriptors", 20_000, None, 2, 3750),
            ("hardly any", 100, None, 2, PLACES_MIN),
            ("little memory", 1 << 20, Some(256 << 20), 2, 1664),
            ("less than the agent's own", 1 << 20, Some(10 << 20), 1, PLACES_MIN),
        ];
        for (name, descriptors, memory, workers, expected) in cases {
            assert_eq!(
                config.within(descriptors, memory, workers).connections_max,
                expected,
                "{name}"
            );
        }
        let asked = PathConfig {
            connections_max: 5,
            ..config
        };
        assert_eq!(
            asked.within(1 << 20, None, 2).connections_max,
            5,
            "never more than configured"
        );
    }
}
