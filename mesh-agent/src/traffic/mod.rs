//! The state behind traffic policy: what is in flight to whom, whose breaker is open, whose bucket is empty.
//!
//! One [`Traffic`] for the whole process, shared by all workers; counts are exact across them. State belongs to a
//! [`BackendKey`] and outlives revisions; it goes when [`Traffic::retain`] is told that the backend is gone. Decisions
//! are in `balance`, `breaker` and `limit`, pure and with time as an argument; here are the locks and the guards.
//!
//! A request's way: [`Traffic::admit`] (max requests) → [`Admission::pick`] (balancer, breakers of the endpoints) →
//! [`Admission::connection`] (max connections, max pending) → [`Picked::report`]. Each guard gives back on drop what it
//! counted; a pick that is dropped without a report counts as cancelled, neither success nor failure.
//!
//! The limits (`max_*`) count over all endpoints of a backend; failures are counted for each endpoint, so that one bad
//! endpoint does not close the service. A connection counts while it carries a request or a flow; one that idles in a
//! pool does not.

pub mod balance;
pub mod breaker;
pub mod limit;

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use foldhash::fast::RandomState;
use mesh_api::{
    backend::{Backend, BackendKey},
    request::Request,
    resilience::{BreakerSettings, LimitSettings, LimitSource, TrafficSettings},
    rule::RuleId,
    workload::Endpoint,
};
use parking_lot::{Mutex, RwLock};
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

pub use self::breaker::BreakerState;
use self::{
    breaker::{Breaker, Ticket},
    limit::{Buckets, Rate},
};

/// Endpoints with state that are looked up among a backend's one by one; more are put into a set first.
const LOOKED_UP_ONE_BY_ONE_MAX: usize = 8;
/// The most backends with state; further ones are refused until some are gone.
pub const BACKENDS_MAX: usize = 64 * 1024;
/// The most limits with buckets; further ones are refused until some are gone.
pub const LIMITS_MAX: usize = 4 * 1024;
/// Requests that may wait for a connection unless the policy says otherwise.
pub const PENDING_MAX_DEFAULT: u32 = 1024;
/// The most sources of a backend whose endpoint is remembered (session affinity): more than a node has pods. Further
/// ones are bound by their hash alone.
pub const BOUND_SOURCES_MAX: usize = 1024;
/// Retries at once that the budget always allows, so that it works for a backend with little traffic.
const RETRIES_MIN: u32 = 3;

/// Why a request was not sent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Rejection {
    /// The backend has no endpoint (of that family).
    #[error("no endpoint")]
    NoEndpoints,
    /// Every endpoint was tried.
    #[error("every endpoint was tried")]
    AllTried,
    /// The breakers of all endpoints are open.
    #[error("circuit breaker open")]
    BreakerOpen,
    /// `maxRequests` are in flight.
    #[error("too many requests in flight")]
    MaxRequests,
    /// `maxConnections` are in use and `maxPendingRequests` wait.
    #[error("too many requests wait for a connection")]
    MaxPending,
    /// `maxConnections` are in use ([`Admission::try_connection`]).
    #[error("too many connections")]
    MaxConnections,
    /// [`BACKENDS_MAX`] is reached.
    #[error("too many backends")]
    TooManyBackends,
}

/// A limit refused a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limited {
    /// The limit.
    pub rule: RuleId,
    /// What to tell in `retry-after`: whole seconds, at least 1.
    pub retry_after: u64,
}

/// How a request to an endpoint ended, as far as breakers care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// The endpoint did its work, whatever it answered.
    Success,
    /// It could not be reached, broke off, was too slow, or failed (5xx).
    Failure,
}

/// An endpoint's breaker as `status` and metrics show it.
#[derive(Clone, Debug)]
pub struct EndpointStatus {
    /// The backend.
    pub backend: BackendKey,
    /// The endpoint.
    pub address: SocketAddr,
    /// Requests in flight.
    pub active: u32,
    /// Its breaker.
    pub breaker: BreakerState,
}

/// The traffic state of the process.
#[derive(Debug)]
pub struct Traffic {
    // Keys of these two come from the view: the hash need not be a keyed one.
    backends: RwLock<HashMap<BackendKey, Arc<BackendState>, RandomState>>,
    limits: RwLock<HashMap<RuleId, Arc<Buckets>>>,
    origin: Instant,
}

#[derive(Debug, Default)]
struct BackendState {
    requests: AtomicU32,
    pending: AtomicU32,
    retries: AtomicU32,
    turn: AtomicU32,
    connections: Mutex<Connections>,
    endpoints: RwLock<HashMap<SocketAddr, Arc<EndpointState>, RandomState>>,
    /// Which endpoint a source is bound to, and since when it has not asked.
    bound: Mutex<HashMap<IpAddr, (SocketAddr, Instant)>>,
}

/// The permits of `max_connections`. They follow the setting; when it shrinks, permits in use are owed until their
/// guards drop.
#[derive(Debug)]
struct Connections {
    max: u32,
    owed: u32,
    permits: Arc<Semaphore>,
}

#[derive(Debug)]
struct EndpointState {
    active: AtomicU32,
    breaker: Mutex<Breaker>,
}

/// One request counted in; its drop counts it out.
#[derive(Debug)]
pub struct Admission {
    state: Arc<BackendState>,
    key: BackendKey,
    settings: Arc<TrafficSettings>,
    /// The service's session affinity, and the source if it was told.
    affinity: Option<Duration>,
    source: Option<IpAddr>,
}

/// An endpoint, with one request counted to it.
#[derive(Debug)]
pub struct Picked {
    /// The endpoint.
    pub endpoint: Endpoint,
    state: Arc<EndpointState>,
    settings: Arc<TrafficSettings>,
    ticket: Option<Ticket>,
}

/// One connection counted; its drop counts it out.
#[derive(Debug)]
pub struct ConnectionGuard {
    state: Arc<BackendState>,
    permit: Option<OwnedSemaphorePermit>,
    pending: Option<CountGuard>,
}

/// One retry counted against the budget; its drop counts it out.
#[derive(Debug)]
pub struct RetryGuard(#[expect(dead_code, reason = "held for its drop")] CountGuard);

/// Which of a backend's counters a [`CountGuard`] holds one of.
#[derive(Clone, Copy, Debug)]
enum Counter {
    Pending,
    Retries,
}

#[derive(Debug)]
struct CountGuard {
    state: Arc<BackendState>,
    counter: Counter,
}

/// Adds one unless `max` are there: exact, whoever else counts.
fn count_in(counter: &AtomicU32, max: Option<u32>) -> bool {
    let max = max.unwrap_or(u32::MAX);
    let step = |count: u32| (count < max).then(|| count + 1);
    counter.fetch_update(Ordering::AcqRel, Ordering::Acquire, step).is_ok()
}

impl Default for Traffic {
    fn default() -> Traffic {
        Traffic {
            backends: RwLock::default(),
            limits: RwLock::default(),
            origin: Instant::now(),
        }
    }
}

impl Traffic {
    /// No state yet.
    pub fn new() -> Arc<Traffic> {
        Arc::default()
    }

    /// Counts a request in, or refuses it (`max_requests`).
    pub fn admit(&self, backend: &Backend) -> Result<Admission, Rejection> {
        let state = self.backend(&backend.key)?;
        let max = backend
            .traffic
            .breaker
            .as_ref()
            .and_then(|breaker| breaker.max_requests);
        if !count_in(&state.requests, max) {
            return Err(Rejection::MaxRequests);
        }
        Ok(Admission {
            state,
            key: backend.key.clone(),
            settings: backend.traffic.clone(),
            affinity: backend.service.session_affinity,
            source: None,
        })
    }

    /// Takes a token of each limit, or of none if one refuses. The first refusal wins; limits in shadow mode refuse
    /// nothing and are told to `shadowed`.
    pub fn limit<'a>(
        &self,
        limits: impl IntoIterator<Item = &'a LimitSettings>,
        source: LimitSource<'_>,
        request: &dyn Request,
        now: Instant,
        mut shadowed: impl FnMut(&RuleId),
    ) -> Result<(), Limited> {
        let mut taken = smallvec::SmallVec::<[_; 2]>::new();
        for settings in limits {
            let refusal = match self.buckets(&settings.id) {
                None => Some(Duration::from_secs(1)),
                Some(buckets) => {
                    let (key, rate) = (settings.key(source, request), Rate::of(settings));
                    let refusal = buckets.take(key.clone(), rate, now).err();
                    if refusal.is_none() {
                        taken.push((buckets, key, rate));
                    }
                    refusal
                }
            };
            match refusal {
                None => {}
                Some(_) if settings.shadow => shadowed(&settings.id),
                Some(wait) => {
                    for (buckets, key, rate) in taken {
                        buckets.give_back(&key, rate);
                    }
                    return Err(Limited {
                        rule: settings.id.clone(),
                        retry_after: limit::retry_after_seconds(wait),
                    });
                }
            }
        }
        Ok(())
    }

    /// Forgets what the view does not know any more. Requests under way keep their own counts until they end.
    pub fn retain<'a>(
        &self,
        backend: impl Fn(&BackendKey) -> Option<&'a Backend>,
        has_limit: impl Fn(&RuleId) -> bool,
    ) {
        // As much work as there is state, however much the view knows.
        self.backends.write().retain(|key, state| {
            let Some(backend) = backend(key) else {
                return false;
            };
            let all = || backend.endpoints_v4.iter().chain(&backend.endpoints_v6);
            let mut states = state.endpoints.write();
            if states.len() > LOOKED_UP_ONE_BY_ONE_MAX {
                let addresses: HashSet<SocketAddr> = all().map(|endpoint| endpoint.address).collect();
                states.retain(|address, _| addresses.contains(address));
            } else {
                states.retain(|address, _| all().any(|endpoint| endpoint.address == *address));
            }
            true
        });
        self.limits.write().retain(|id, _| has_limit(id));
    }

    /// All endpoints with state, for `status` and gauges.
    pub fn status(&self) -> Vec<EndpointStatus> {
        let mut all = Vec::new();
        for (backend, state) in self.backends.read().iter() {
            for (address, endpoint) in state.endpoints.read().iter() {
                all.push(EndpointStatus {
                    backend: backend.clone(),
                    address: *address,
                    active: endpoint.active.load(Ordering::Relaxed),
                    breaker: endpoint.breaker.lock().state(),
                });
            }
        }
        all
    }

    fn backend(&self, key: &BackendKey) -> Result<Arc<BackendState>, Rejection> {
        if let Some(state) = self.backends.read().get(key) {
            return Ok(state.clone());
        }
        let mut backends = self.backends.write();
        if backends.len() >= BACKENDS_MAX && !backends.contains_key(key) {
            return Err(Rejection::TooManyBackends);
        }
        Ok(backends.entry(key.clone()).or_default().clone())
    }

    fn buckets(&self, id: &RuleId) -> Option<Arc<Buckets>> {
        if let Some(buckets) = self.limits.read().get(id) {
            return Some(buckets.clone());
        }
        let mut limits = self.limits.write();
        if limits.len() >= LIMITS_MAX && !limits.contains_key(id) {
            return None;
        }
        Some(
            limits
                .entry(id.clone())
                .or_insert_with(|| Arc::new(Buckets::new(self.origin)))
                .clone(),
        )
    }
}

impl BackendState {
    fn endpoint(&self, address: SocketAddr) -> Arc<EndpointState> {
        if let Some(state) = self.endpoints.read().get(&address) {
            return state.clone();
        }
        // Bounded by the endpoints of the revisions that the process has seen since the last `retain`.
        let new = || {
            Arc::new(EndpointState {
                active: AtomicU32::new(0),
                breaker: Mutex::default(),
            })
        };
        self.endpoints.write().entry(address).or_insert_with(new).clone()
    }

    /// The endpoint that a source is bound to, else one by the source's hash. The binding lasts while the endpoint is
    /// there and the source asks at least once in `timeout`, as kube-proxy has it; while the endpoint cannot be used
    /// another serves, and the binding stays.
    fn bound(
        &self,
        source: IpAddr,
        timeout: Duration,
        endpoints: &[Endpoint],
        now: Instant,
        usable: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let mut bound = self.bound.lock();
        let fresh = |since: Instant| now.saturating_duration_since(since) < timeout;
        if let Some((address, since)) = bound.get_mut(&source)
            && fresh(*since)
            && let Some(index) = endpoints.iter().position(|endpoint| endpoint.address == *address)
        {
            *since = now;
            if usable(index) {
                return Some(index);
            }
            let addresses = endpoints.iter().map(|endpoint| endpoint.address);
            return balance::sticky(source, addresses, usable);
        }
        let addresses = endpoints.iter().map(|endpoint| endpoint.address);
        let index = balance::sticky(source, addresses, usable)?;
        if bound.len() >= BOUND_SOURCES_MAX && !bound.contains_key(&source) {
            bound.retain(|_, (_, since)| fresh(*since));
        }
        if bound.len() < BOUND_SOURCES_MAX || bound.contains_key(&source) {
            bound.insert(source, (endpoints.get(index)?.address, now));
        }
        Some(index)
    }
}

impl Admission {
    /// The backend.
    pub fn backend(&self) -> &BackendKey {
        &self.key
    }

    /// The same for a source of that address: where the service has session affinity it is bound to an endpoint.
    #[must_use]
    pub fn of_source(mut self, source: IpAddr) -> Admission {
        self.source = Some(source.to_canonical());
        self
    }

    /// The settings that the request is sent by.
    pub fn settings(&self) -> &TrafficSettings {
        &self.settings
    }

    /// Picks an endpoint among those not tried whose breaker lets a request through.
    pub fn pick(&self, endpoints: &[Endpoint], tried: &[SocketAddr], now: Instant) -> Result<Picked, Rejection> {
        if endpoints.is_empty() {
            return Err(Rejection::NoEndpoints);
        }
        let breaker = self.settings.breaker.as_ref().filter(|breaker| trips(breaker));
        let turn = self.state.turn.fetch_add(1, Ordering::Relaxed);
        let untried = |index: usize| {
            endpoints
                .get(index)
                .is_some_and(|endpoint| !tried.contains(&endpoint.address))
        };
        let state = |index: usize| {
            endpoints
                .get(index)
                .map(|endpoint| self.state.endpoint(endpoint.address))
        };
        let usable = |index: usize| {
            untried(index)
                && breaker.is_none_or(|breaker| state(index).is_some_and(|s| s.breaker.lock().allows(breaker, now)))
        };
        let affinity = self.affinity.zip(self.source);
        let load = |index: usize| state(index).map_or(u32::MAX, |state| state.active.load(Ordering::Relaxed));
        // Another worker may take the last probe between the look and the grip: then look again, at most once for each.
        for _ in 0..=endpoints.len() {
            let random = rand::random::<u64>();
            let chosen = match affinity {
                Some((timeout, source)) => self.state.bound(source, timeout, endpoints, now, usable),
                None => balance::choose(self.settings.balancer, endpoints.len(), turn, random, usable, load),
            };
            let Some(endpoint) = chosen.and_then(|index| endpoints.get(index)) else {
                break;
            };
            let state = self.state.endpoint(endpoint.address);
            let ticket = match breaker {
                None => None,
                Some(breaker) => match state.breaker.lock().acquire(breaker, now) {
                    None => continue,
                    ticket => ticket,
                },
            };
            state.active.fetch_add(1, Ordering::Relaxed);
            return Ok(Picked {
                endpoint: endpoint.clone(),
                state,
                settings: self.settings.clone(),
                ticket,
            });
        }
        let any_untried = (0..endpoints.len()).any(untried);
        Err(if any_untried {
            Rejection::BreakerOpen
        } else {
            Rejection::AllTried
        })
    }

    /// Waits for leave to use a connection (`max_connections`), as one of `max_pending_requests`.
    ///
    /// Where connections are unlimited, `max_pending_requests` bounds those being made: the guard counts as pending
    /// until [`ConnectionGuard::connected`].
    pub async fn connection(&self) -> Result<ConnectionGuard, Rejection> {
        let breaker = self.settings.breaker.as_ref();
        let max_pending = breaker.and_then(|breaker| breaker.max_pending_requests);
        let Some(permits) = self.permits() else {
            let pending = match max_pending {
                None => None,
                Some(max) => Some(self.count(Counter::Pending, max).ok_or(Rejection::MaxPending)?),
            };
            return Ok(ConnectionGuard {
                state: self.state.clone(),
                permit: None,
                pending,
            });
        };
        let permit = match permits.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => {
                let max = max_pending.unwrap_or(PENDING_MAX_DEFAULT);
                let pending = self.count(Counter::Pending, max).ok_or(Rejection::MaxPending)?;
                // The semaphore is never closed.
                let permit = permits
                    .acquire_owned()
                    .await
                    .map_err(|_: AcquireError| Rejection::MaxConnections)?;
                drop(pending);
                permit
            }
        };
        Ok(ConnectionGuard {
            state: self.state.clone(),
            permit: Some(permit),
            pending: None,
        })
    }

    /// Leave to use a connection now or not at all: for flows, which nobody queues.
    pub fn try_connection(&self) -> Result<ConnectionGuard, Rejection> {
        let permit = match self.permits() {
            None => None,
            Some(permits) => Some(permits.try_acquire_owned().map_err(|_| Rejection::MaxConnections)?),
        };
        Ok(ConnectionGuard {
            state: self.state.clone(),
            permit,
            pending: None,
        })
    }

    /// Leave to try again: the budget, of whichever policy asks for the retry, counts retries in flight against requests
    /// in flight.
    pub fn retry(&self, budget_percent: u32) -> Option<RetryGuard> {
        let share = u64::from(self.state.requests.load(Ordering::Relaxed)) * u64::from(budget_percent) / 100;
        let max = u32::try_from(share).unwrap_or(u32::MAX).max(RETRIES_MIN);
        self.count(Counter::Retries, max).map(RetryGuard)
    }

    fn count(&self, counter: Counter, max: u32) -> Option<CountGuard> {
        let count = match counter {
            Counter::Pending => &self.state.pending,
            Counter::Retries => &self.state.retries,
        };
        count_in(count, Some(max)).then(|| CountGuard {
            state: self.state.clone(),
            counter,
        })
    }

    fn permits(&self) -> Option<Arc<Semaphore>> {
        let max = self.settings.breaker.as_ref()?.max_connections?;
        let mut connections = self.state.connections.lock();
        connections.resize(max);
        Some(connections.permits.clone())
    }
}

/// Whether a breaker can open at all; one with limits only needs no tickets.
fn trips(breaker: &BreakerSettings) -> bool {
    breaker.consecutive_failures.is_some() || breaker.error_rate.is_some()
}

impl Default for Connections {
    fn default() -> Connections {
        Connections {
            max: 0,
            owed: 0,
            permits: Arc::new(Semaphore::new(0)),
        }
    }
}

impl Connections {
    fn resize(&mut self, max: u32) {
        if max > self.max {
            let more = max - self.max;
            let settled = more.min(self.owed);
            self.owed -= settled;
            self.permits.add_permits((more - settled) as usize);
        } else if max < self.max {
            let fewer = self.max - max;
            let forgotten = self.permits.forget_permits(fewer as usize);
            self.owed += fewer - u32::try_from(forgotten).unwrap_or(fewer);
        }
        self.max = max;
    }
}

impl ConnectionGuard {
    /// The connection is made: it is not pending any more.
    pub fn connected(&mut self) {
        self.pending = None;
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        let Some(permit) = self.permit.take() else {
            return;
        };
        let mut connections = self.state.connections.lock();
        if connections.owed > 0 {
            connections.owed -= 1;
            permit.forget();
        }
    }
}

impl Drop for CountGuard {
    fn drop(&mut self) {
        let count = match self.counter {
            Counter::Pending => &self.state.pending,
            Counter::Retries => &self.state.retries,
        };
        count.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.state.requests.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Picked {
    /// Tells how the request ended. Returns whether that opened the endpoint's breaker.
    pub fn report(mut self, report: Report, now: Instant) -> bool {
        match (self.ticket.take(), &self.settings.breaker) {
            (Some(ticket), Some(breaker)) => {
                self.state
                    .breaker
                    .lock()
                    .report(ticket, report == Report::Success, breaker, now)
            }
            _ => false,
        }
    }
}

impl Drop for Picked {
    fn drop(&mut self) {
        self.state.active.fetch_sub(1, Ordering::AcqRel);
        if let Some(ticket) = self.ticket.take() {
            self.state.breaker.lock().give_up(ticket);
        }
    }
}

#[cfg(test)]
mod tests;
