//! HTTP/2 connections, shared by the requests of one key.
//!
//! A request takes a place on the least loaded connection that still takes streams; only one connection of a key is
//! opened at a time, and whoever needs it meanwhile waits for that one and shares its outcome. A connection that is
//! going away, too old, or of an older credential gets no new stream and ends after its last one.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
    sync::Arc,
    task::{Context, Waker},
    time::{Duration, Instant},
};

use bytes::Bytes;
use foldhash::fast::RandomState;
use h2::client::SendRequest;
use tokio::sync::Notify;

use super::{
    DialError, TunnelKey,
    pool::{Leased, Pool},
    slots::Facts,
};
use crate::{
    identity::{Alpn, CredentialEpoch},
    net::{Clock, SocketSource},
    tls::HandshakeError,
    transport::Transport,
};

/// Flow control of a stream in a tunnel: a megabyte keeps a 10 Gbit/s link with 0.8 ms busy.
const STREAM_WINDOW: u32 = 1 << 20;
/// Flow control of all streams of a connection together.
const CONNECTION_WINDOW: u32 = 4 << 20;
/// The largest header list taken from a peer.
const HEADER_LIST_BYTES_MAX: u32 = 128 * 1024;

/// A place for one stream on a shared HTTP/2 connection.
pub struct H2Lease {
    /// To send the request with.
    pub send: SendRequest<Bytes>,
    /// To be kept as long as the stream lives.
    pub stream: H2StreamGuard,
}

/// Counts one stream of a connection; dropped, its place is free.
pub struct H2StreamGuard {
    load: Rc<Load>,
}

impl Drop for H2StreamGuard {
    fn drop(&mut self) {
        let left = self.load.streams.get().saturating_sub(1);
        self.load.streams.set(left);
        if left == 0 {
            self.load.idle_since.set(self.load.clock.now());
        }
    }
}

/// What a connection's users and its driver know of it.
struct Load {
    streams: Cell<usize>,
    alive: Cell<bool>,
    idle_since: Cell<Instant>,
    clock: Arc<dyn Clock>,
}

struct Connection {
    send: SendRequest<Bytes>,
    facts: Facts<CredentialEpoch>,
    load: Rc<Load>,
}

impl Connection {
    /// Takes new streams.
    fn is_open(&self, epoch: CredentialEpoch, now: Instant) -> bool {
        self.load.alive.get() && self.facts.epoch == epoch && now < self.facts.retire_at && !self.is_going_away()
    }

    /// The peer sent GOAWAY, or the connection failed.
    fn is_going_away(&self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        // A clone, because the readiness of a handle is its own; none of the clones ever waits.
        matches!(self.send.clone().poll_ready(&mut cx), std::task::Poll::Ready(Err(_)))
    }

    fn has_streams(&self) -> bool {
        self.load.alive.get() && self.load.streams.get() > 0
    }

    fn lease(&self) -> H2Lease {
        self.load.streams.set(self.load.streams.get() + 1);
        let load = self.load.clone();
        H2Lease {
            send: self.send.clone(),
            stream: H2StreamGuard { load },
        }
    }
}

/// A connection being opened, and how that ended.
#[derive(Default)]
struct Opening {
    over: Notify,
    failure: RefCell<Option<DialError>>,
}

#[derive(Default)]
struct Lane {
    connections: Vec<Connection>,
    opening: Option<Rc<Opening>>,
}

/// A worker's HTTP/2 connections.
#[derive(Default)]
pub(super) struct Shared {
    lanes: HashMap<TunnelKey, Lane, RandomState>,
}

enum Take {
    Lease(H2Lease),
    Wait(Rc<Opening>),
    Dial(Rc<Opening>),
    Full,
}

impl Shared {
    fn take(
        &mut self,
        key: &TunnelKey,
        epoch: CredentialEpoch,
        now: Instant,
        streams_max: usize,
        connections_max: usize,
    ) -> Take {
        if !self.lanes.contains_key(key) {
            self.lanes.insert(key.clone(), Lane::default());
        }
        let Some(lane) = self.lanes.get_mut(key) else {
            return Take::Full;
        };
        lane.connections
            .retain(|connection| connection.has_streams() || connection.is_open(epoch, now));
        let open = lane
            .connections
            .iter()
            .filter(|connection| connection.is_open(epoch, now));
        let (count, best) = open.fold((0, None::<&Connection>), |(count, best), connection| {
            let streams = connection.load.streams.get();
            let better = best.is_none_or(|best| streams < best.load.streams.get());
            (count + 1, if better { Some(connection) } else { best })
        });
        match (best, &lane.opening) {
            (Some(best), _) if best.load.streams.get() < streams_max => Take::Lease(best.lease()),
            (_, Some(opening)) => Take::Wait(opening.clone()),
            (_, None) if count >= connections_max => Take::Full,
            (_, None) => Take::Dial(lane.opening.insert(Rc::default()).clone()),
        }
    }

    fn add(&mut self, key: &TunnelKey, connection: Connection) {
        self.lanes.entry(key.clone()).or_default().connections.push(connection);
    }

    /// The one place for opening is free again; those who wait learn how it went.
    fn opened(&mut self, key: &TunnelKey) {
        let Some(lane) = self.lanes.get_mut(key) else { return };
        if let Some(opening) = lane.opening.take() {
            opening.over.notify_waiters();
        }
        if lane.connections.is_empty() {
            self.lanes.remove(key);
        }
    }

    /// Lets go of what is idle too long or takes no new streams. A connection ends when its last handle is gone.
    pub(super) fn sweep(
        &mut self,
        now: Instant,
        idle_timeout: Duration,
        epoch_of: impl Fn(&TunnelKey) -> Option<CredentialEpoch>,
    ) {
        self.lanes.retain(|key, lane| {
            let epoch = epoch_of(key);
            lane.connections.retain(|connection| {
                let open = epoch.is_some_and(|epoch| connection.is_open(epoch, now));
                connection.has_streams() || (open && now < connection.load.idle_since.get() + idle_timeout)
            });
            !lane.connections.is_empty() || lane.opening.is_some()
        });
    }

    /// Lets go of every connection; those with streams end after the last one.
    pub(super) fn drain(&mut self) {
        self.lanes.retain(|_, lane| {
            lane.connections.clear();
            lane.opening.is_some()
        });
    }
}

/// Frees the place for opening however the opening ends, by cancellation too.
struct OpeningGuard<'a> {
    pool: &'a Pool,
    key: &'a TunnelKey,
}

impl Drop for OpeningGuard<'_> {
    fn drop(&mut self) {
        self.pool.shared().borrow_mut().opened(self.key);
    }
}

impl Pool {
    /// A place for one stream on a shared HTTP/2 connection. Must be called within a `LocalSet`.
    pub async fn h2(&self, key: &TunnelKey, from: &dyn SocketSource) -> Result<H2Lease, DialError> {
        loop {
            let epoch = self.credential(key)?.epoch();
            let config = self.config();
            let take = self.shared().borrow_mut().take(
                key,
                epoch,
                self.clock().now(),
                config.h2_streams_max,
                config.h2_connections_max,
            );
            match take {
                Take::Lease(lease) => return Ok(lease),
                Take::Full => return Err(DialError::PoolFull),
                Take::Wait(opening) => {
                    opening.over.notified().await;
                    if let Some(failure) = &*opening.failure.borrow() {
                        return Err(failure.copy());
                    }
                }
                Take::Dial(opening) => {
                    let guard = OpeningGuard { pool: self, key };
                    let opened = Box::pin(self.open_h2(key, from)).await;
                    if let Err(error) = &opened {
                        *opening.failure.borrow_mut() = Some(error.copy());
                    }
                    drop(guard);
                    return opened;
                }
            }
        }
    }

    async fn open_h2(&self, key: &TunnelKey, from: &dyn SocketSource) -> Result<H2Lease, DialError> {
        // Never one that carried HTTP/1.1: its destination has taken it for that.
        let (tunnel, lease, _) = self.tunnel(key, Alpn::Http, from, true).await?;
        let facts = lease.facts;
        let timeout = self.config().handshake_timeout;
        let mut builder = h2::client::Builder::new();
        builder
            .enable_push(false)
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(HEADER_LIST_BYTES_MAX);
        let handshake = builder.handshake::<_, Bytes>(Transport::Tls(tunnel));
        let (send, connection) = match tokio::time::timeout(timeout, handshake).await {
            Ok(done) => done.map_err(DialError::H2)?,
            Err(_) => return Err(DialError::Handshake(HandshakeError::Timeout(timeout))),
        };
        let load = Rc::new(Load {
            streams: Cell::new(0),
            alive: Cell::new(true),
            idle_since: Cell::new(self.clock().now()),
            clock: self.clock().clone(),
        });
        tokio::task::spawn_local(drive(connection, load.clone(), lease));
        let connection = Connection { send, facts, load };
        let lease = connection.lease();
        self.shared().borrow_mut().add(key, connection);
        Ok(lease)
    }
}

/// Moves a connection's frames. Ends when its last handle is gone; until then its lease keeps it counted in the pool.
async fn drive(connection: h2::client::Connection<Transport, Bytes>, load: Rc<Load>, _lease: Leased) {
    if let Err(error) = connection.await {
        tracing::debug!(error = &error as &dyn std::error::Error, "HTTP/2 tunnel ended");
    }
    load.alive.set(false);
}
