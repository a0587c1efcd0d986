//! What the kernel side does for a node, modelled: original destinations by socket, presented peers. Belongs to the
//! node, not to an agent: it outlives every generation.

use std::{collections::BTreeMap, fmt, net::SocketAddr, sync::Arc};

use parking_lot::Mutex;

/// A network namespace's cookie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetnsCookie(pub u64);

impl fmt::Display for NetnsCookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A full map; it does not happen here.
#[derive(Debug, thiserror::Error)]
#[error("the map is full")]
pub struct KernelError;

type Flow = (NetnsCookie, SocketAddr);

/// The maps of a node.
#[derive(Debug, Default)]
pub struct Kernel {
    destinations: Mutex<BTreeMap<Flow, SocketAddr>>,
    peers: Arc<Mutex<BTreeMap<Flow, SocketAddr>>>,
}

/// Shows a source's address to a destination's application.
#[must_use]
pub struct PeerGuard {
    peers: Arc<Mutex<BTreeMap<Flow, SocketAddr>>>,
    key: Flow,
}

impl Drop for PeerGuard {
    fn drop(&mut self) {
        self.peers.lock().remove(&self.key);
    }
}

impl Kernel {
    /// Notes where a captured connection wanted to go.
    pub fn note_original_destination(&self, cookie: NetnsCookie, source: SocketAddr, destination: SocketAddr) {
        self.destinations.lock().insert((cookie, source), destination);
    }

    /// Where it wanted to go, once.
    pub fn take_original_destination(&self, cookie: NetnsCookie, source: SocketAddr) -> Option<SocketAddr> {
        self.destinations.lock().remove(&(cookie, source))
    }

    /// Shows `shown` to the application as the peer of what comes from `local`.
    pub fn present_peer(
        &self,
        cookie: NetnsCookie,
        local: SocketAddr,
        shown: SocketAddr,
    ) -> Result<PeerGuard, KernelError> {
        let key = (cookie, local);
        self.peers.lock().insert(key, shown);
        Ok(PeerGuard {
            peers: self.peers.clone(),
            key,
        })
    }

    /// Whom the application sees behind a connection.
    pub fn shown(&self, cookie: NetnsCookie, local: SocketAddr) -> Option<SocketAddr> {
        self.peers.lock().get(&(cookie, local)).copied()
    }

    /// Entries in the maps: what is left when nothing runs is a leak.
    pub fn entries(&self) -> (usize, usize) {
        (self.destinations.lock().len(), self.peers.lock().len())
    }
}

/// Peers do not vanish without a word here: what the agent asks its kernel about them has no answer.
pub mod lost {
    use std::time::{Duration, Instant};

    use crate::net::TcpStream;

    /// See the agent's.
    #[derive(Debug)]
    pub struct Watch;

    /// See the agent's.
    pub fn watch(_: &TcpStream, _: Duration) -> Watch {
        Watch
    }

    /// See the agent's.
    pub fn give_up(_: Instant) -> usize {
        0
    }
}
