//! A worker's tunnels: taken for a request or a flow, given back after it.
//!
//! Belongs to one thread and is shared there by `Rc`. What to reuse, open or close is decided by [`super::slots`]; this
//! file dials, wraps and hands out. A tunnel is only reused by the identity that opened it, towards the identity that
//! answered, under the same credential, and never beyond the life of either certificate.

use std::{
    cell::RefCell,
    io::{self, IoSlice},
    pin::Pin,
    rc::{Rc, Weak},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    DialError, FlowStream, PeerPatience, Preface, TunnelKey, client,
    shared::Shared,
    slots::{Bounds, Facts, Gauge, Slots, Take},
};
use crate::{
    identity::{Alpn, Credential, CredentialEpoch, CredentialStore, PeerIdentity},
    kernel::lost,
    net::{self, Clock, SocketSource},
    tls::TlsStream,
    transport::Transport,
};

pub use super::shared::{H2Lease, H2StreamGuard};

/// Bounds and times of a worker's pool.
#[derive(Clone, Copy, Debug)]
pub struct PoolConfig {
    /// Tunnels of one key and ALPN.
    pub per_key_max: usize,
    /// Tunnels of the worker.
    pub total_max: usize,
    /// Idle tunnels of one key and ALPN.
    pub idle_per_key_max: usize,
    /// How long a tunnel may be idle here. Less than a destination waits, so that the source closes first.
    pub idle_timeout: Duration,
    /// How old a tunnel may be when it is used again; never beyond its certificates' life.
    pub age_max: Duration,
    /// HTTP/2 connections of one key.
    pub h2_connections_max: usize,
    /// Concurrent streams on one HTTP/2 connection.
    pub h2_streams_max: usize,
    /// Time for the TCP connection.
    pub dial_timeout: Duration,
    /// Time for the TLS handshake, and for HTTP/2's settings.
    pub handshake_timeout: Duration,
    /// How often idle tunnels, and silent peers, are looked after.
    pub sweep_interval: Duration,
    /// How long a peer may be silent.
    pub peer_patience: PeerPatience,
}

impl Default for PoolConfig {
    fn default() -> Self {
        PoolConfig {
            per_key_max: 1024,
            total_max: 8192,
            idle_per_key_max: 128,
            idle_timeout: Duration::from_secs(55),
            age_max: Duration::from_secs(3600),
            h2_connections_max: 8,
            h2_streams_max: 100,
            dial_timeout: net::DIAL_TIMEOUT,
            handshake_timeout: Duration::from_secs(5),
            sweep_interval: Duration::from_secs(5),
            peer_patience: PeerPatience::default(),
        }
    }
}

type LaneKey = (TunnelKey, Alpn);
type Tunnel = Box<TlsStream>;

/// A worker's tunnels.
#[derive(Clone)]
pub struct Pool {
    inner: Rc<Inner>,
}

struct Inner {
    config: PoolConfig,
    credentials: Arc<CredentialStore>,
    clock: Arc<dyn Clock>,
    slots: RefCell<Slots<LaneKey, Tunnel, CredentialEpoch>>,
    shared: RefCell<Shared>,
}

/// The count of one tunnel in the book: dropped, the tunnel is gone.
struct Slot {
    pool: Weak<Inner>,
    key: LaneKey,
    open: bool,
}

impl Slot {
    fn opened(&mut self) {
        self.open = true;
        if let Some(pool) = self.pool.upgrade() {
            pool.slots.borrow_mut().opened(&self.key);
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.upgrade() {
            let mut slots = pool.slots.borrow_mut();
            if self.open {
                slots.closed(&self.key)
            } else {
                slots.failed(&self.key)
            }
        }
    }
}

/// The way of a used tunnel back into the pool.
pub(super) struct Leased {
    slot: Slot,
    pub(super) facts: Facts<CredentialEpoch>,
}

impl Leased {
    /// Gives a tunnel back that is as good as new.
    pub(super) fn give_back(mut self, tunnel: Tunnel) {
        let Some(pool) = self.slot.pool.upgrade() else { return };
        let now = pool.clock.now();
        let surplus = pool
            .slots
            .borrow_mut()
            .give_back(&self.slot.key, tunnel, self.facts, now);
        // The book has counted it already.
        self.slot.pool = Weak::new();
        surplus.into_iter().for_each(close);
    }
}

fn close(mut tunnel: Tunnel) {
    tunnel.close_now();
}

impl Pool {
    /// An empty pool.
    pub fn new(config: PoolConfig, credentials: Arc<CredentialStore>, clock: Arc<dyn Clock>) -> Pool {
        let bounds = Bounds {
            per_key_max: config.per_key_max,
            total_max: config.total_max,
            idle_per_key_max: config.idle_per_key_max,
            idle_timeout: config.idle_timeout,
        };
        Pool {
            inner: Rc::new(Inner {
                config,
                credentials,
                clock,
                slots: RefCell::new(Slots::new(bounds)),
                shared: RefCell::default(),
            }),
        }
    }

    /// A tunnel for HTTP/1.1 requests, one at a time. `fresh` asks for one that was never used.
    pub async fn http1(
        &self,
        key: &TunnelKey,
        from: &dyn SocketSource,
        fresh: bool,
    ) -> Result<PooledTransport, DialError> {
        let (tunnel, lease, reused) = self.tunnel(key, Alpn::Http, from, fresh).await?;
        Ok(PooledTransport {
            tunnel: Some(Transport::Tls(tunnel)),
            lease: Some(lease),
            reused,
        })
    }

    /// A tunnel for one flow. Nothing is sent yet: the preface leaves with the first payload or the first read, or with
    /// [`FlowStream::accepted`].
    pub async fn flow(
        &self,
        key: &TunnelKey,
        from: &dyn SocketSource,
        preface: &Preface,
        fresh: bool,
    ) -> Result<FlowStream, DialError> {
        let (tunnel, lease, reused) = self.tunnel(key, Alpn::Tcp, from, fresh).await?;
        Ok(FlowStream::source(tunnel, lease, preface, reused))
    }

    /// How many tunnels there are (HTTP/2 connections count in their lanes too).
    pub fn gauge(&self) -> Gauge {
        self.inner.slots.borrow().gauge()
    }

    /// Closes what may not be used again. Called at [`PoolConfig::sweep_interval`] by [`Pool::maintain`].
    pub fn sweep(&self) {
        let now = self.inner.clock.now();
        lost::give_up(now);
        let mut closed = Vec::new();
        let credentials = &self.inner.credentials;
        let epoch_of = |key: &TunnelKey| credentials.get(&key.source).map(|credential| credential.epoch());
        self.inner
            .slots
            .borrow_mut()
            .sweep(now, |(key, _)| epoch_of(key), |tunnel| tunnel.is_quiet(), &mut closed);
        closed.into_iter().for_each(close);
        self.inner
            .shared
            .borrow_mut()
            .sweep(now, self.inner.config.idle_timeout, epoch_of);
    }

    /// Sweeps for ever.
    pub async fn maintain(&self) {
        let mut ticks = tokio::time::interval(self.inner.config.sweep_interval);
        loop {
            ticks.tick().await;
            self.sweep();
        }
    }

    /// Closes what is idle: descriptors are needed for what is not.
    pub fn let_go(&self) {
        let closed = self.inner.slots.borrow_mut().let_go();
        closed.into_iter().for_each(close);
    }

    /// Closes what is idle, and from now on what comes back. The last requests of connections that live on still get
    /// tunnels of their own.
    pub fn drain(&self) {
        let closed = self.inner.slots.borrow_mut().drain();
        closed.into_iter().for_each(close);
        self.inner.shared.borrow_mut().drain();
    }

    pub(super) fn shared(&self) -> &RefCell<Shared> {
        &self.inner.shared
    }

    pub(super) fn config(&self) -> &PoolConfig {
        &self.inner.config
    }

    pub(super) fn clock(&self) -> &Arc<dyn Clock> {
        &self.inner.clock
    }

    pub(super) fn credential(&self, key: &TunnelKey) -> Result<Arc<Credential>, DialError> {
        self.inner
            .credentials
            .valid(&key.source, self.inner.clock.wall())
            .ok_or_else(|| DialError::NoCredential(key.source.clone()))
    }

    pub(super) async fn tunnel(
        &self,
        key: &TunnelKey,
        alpn: Alpn,
        from: &dyn SocketSource,
        fresh: bool,
    ) -> Result<(Tunnel, Leased, bool), DialError> {
        let credential = self.credential(key)?;
        let lane = (key.clone(), alpn);
        let reuse = (!fresh).then(|| credential.epoch());
        let slot = loop {
            let mut closed = Vec::new();
            let now = self.inner.clock.now();
            let take = self.inner.slots.borrow_mut().take(&lane, reuse, now, &mut closed);
            closed.into_iter().for_each(close);
            match take {
                Take::Reuse(mut tunnel, facts) => {
                    let slot = Slot {
                        pool: Rc::downgrade(&self.inner),
                        key: lane.clone(),
                        open: true,
                    };
                    if tunnel.is_quiet() {
                        return Ok((tunnel, Leased { slot, facts }, true));
                    }
                    close(tunnel);
                }
                Take::Dial => {
                    break Slot {
                        pool: Rc::downgrade(&self.inner),
                        key: lane,
                        open: false,
                    };
                }
                Take::Full => return Err(DialError::PoolFull),
            }
        };
        self.dial(slot, alpn, from, &credential).await
    }

    async fn dial(
        &self,
        mut slot: Slot,
        alpn: Alpn,
        from: &dyn SocketSource,
        credential: &Arc<Credential>,
    ) -> Result<(Tunnel, Leased, bool), DialError> {
        let (config, wall) = (&self.inner.config, self.inner.clock.wall());
        let (dial, handshake) = (config.dial_timeout, config.handshake_timeout);
        let opening = client::open(credential, &slot.key.0, alpn, from, wall, dial, handshake);
        // Boxed: a handshake is rare, and its state would lie in every connection's future.
        let mut tunnel = Box::new(Box::pin(opening).await?);
        tunnel.watch(config.peer_patience.of(alpn));
        slot.opened();
        let facts = self.facts(credential, tunnel.peer());
        Ok((tunnel, Leased { slot, facts }, false))
    }

    fn facts(&self, credential: &Credential, peer: Option<&PeerIdentity>) -> Facts<CredentialEpoch> {
        let wall = self.inner.clock.wall();
        let theirs = peer
            .and_then(|peer| peer.expires.duration_since(wall).ok())
            .unwrap_or_default();
        let life = self.inner.config.age_max.min(credential.remaining(wall)).min(theirs);
        Facts {
            epoch: credential.epoch(),
            retire_at: self.inner.clock.now() + life,
        }
    }
}

/// A tunnel for HTTP/1.1, on loan. Given back with [`PooledTransport::release`]; dropped, it is closed.
pub struct PooledTransport {
    tunnel: Option<Transport>,
    lease: Option<Leased>,
    reused: bool,
}

impl PooledTransport {
    /// Whether it carried a request before: it may have been closed under us.
    pub fn is_reused(&self) -> bool {
        self.reused
    }

    /// Who is at the other end.
    pub fn peer(&self) -> Option<&PeerIdentity> {
        match &self.tunnel {
            Some(Transport::Tls(tls)) => tls.peer(),
            _ => None,
        }
    }

    /// Gives it back after a whole exchange. One that is not as good as new is closed.
    pub fn release(mut self) {
        if let (Some(Transport::Tls(mut tls)), Some(lease)) = (self.tunnel.take(), self.lease.take()) {
            if tls.is_settled() && tls.is_quiet() {
                lease.give_back(tls);
            } else {
                close(tls);
            }
        }
    }

    /// Makes the coming close a reset.
    pub fn abort(&mut self) {
        if let Some(tunnel) = &self.tunnel {
            tunnel.set_linger_reset();
        }
    }

    fn transport(&mut self) -> io::Result<Pin<&mut Transport>> {
        self.tunnel
            .as_mut()
            .map(Pin::new)
            .ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl Drop for PooledTransport {
    fn drop(&mut self) {
        if let Some(Transport::Tls(tls)) = self.tunnel.take() {
            close(tls);
        }
    }
}

impl AsyncRead for PooledTransport {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.get_mut().transport()?.poll_read(cx, buf)
    }
}

impl AsyncWrite for PooledTransport {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().transport()?.poll_write(cx, data)
    }
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().transport()?.poll_write_vectored(cx, slices)
    }
    fn is_write_vectored(&self) -> bool {
        true
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().transport()?.poll_flush(cx)
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().transport()?.poll_shutdown(cx)
    }
}
