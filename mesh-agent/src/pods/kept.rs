//! What the keeper holds for this agent's pods: taken before anything is made, put before the kernel captures.
//!
//! A keeper that is gone takes nothing away: the agent's own listeners serve on. It is looked for again and given
//! everything anew, and until then each pod says that nobody would hold its connections. What comes from the keeper is
//! looked at before it is used: it must listen on loopback in this very namespace.

use std::{
    fmt,
    net::TcpListener,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use rustix::{
    net::sockopt::{socket_acceptconn, socket_cookie},
    time::{ClockId, clock_gettime},
};
use tokio::time::Instant;

use super::{Chain, netns};
use crate::{
    keeper::{Client, ClientError, Slot, codec::Refusal, codec::Role},
    kernel::NetnsCookie,
};

/// How long to wait before a keeper that is gone is looked for again.
const RETRY: Duration = Duration::from_secs(1);

/// The agent's end of the keeper. Used by the control thread only; each question is bounded.
pub struct Kept {
    path: PathBuf,
    /// When this agent was started, in nanoseconds since the machine's start: generations are told apart by it.
    started: u64,
    client: Option<Client>,
    retry_at: Instant,
    /// Why the keeper does not hold what it should.
    problem: Option<String>,
    said_serving: bool,
}

/// The slot has sockets that another generation has put: they are to be taken.
#[derive(Debug)]
pub struct Taken;

impl Kept {
    /// The keeper at that path; not connected yet.
    pub fn new(path: PathBuf) -> Kept {
        let now = clock_gettime(ClockId::Boottime);
        let started = Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32);
        Kept {
            path,
            started: u64::try_from(started.as_nanos()).unwrap_or(u64::MAX),
            client: None,
            retry_at: Instant::now(),
            problem: None,
            said_serving: false,
        }
    }

    /// Connects if there is no connection and it is time to. True for a new one: everything must be put again.
    pub fn connect(&mut self) -> bool {
        if self.client.as_ref().is_some_and(Client::is_alive) || Instant::now() < self.retry_at {
            return false;
        }
        self.client = None;
        match Client::connect(&self.path, Role::Agent) {
            Ok(client) => {
                tracing::info!(path = %self.path.display(), "the keeper is found");
                (self.client, self.problem, self.said_serving) = (Some(client), None, false);
                true
            }
            Err(error) => {
                self.failed(&error);
                false
            }
        }
    }

    /// Has the next [`Kept::connect`] not wait for its time.
    pub fn look_now(&mut self) {
        self.retry_at = Instant::now();
    }

    /// Whether these very listeners are held for a slot.
    pub fn has(&mut self, netns: NetnsCookie, slot: Slot, listeners: &[TcpListener]) -> bool {
        let held: Vec<u64> = self
            .take(netns, slot)
            .iter()
            .filter_map(|listener| socket_cookie(listener).ok())
            .collect();
        listeners
            .iter()
            .all(|listener| socket_cookie(listener).is_ok_and(|cookie| held.contains(&cookie)))
    }

    /// Whether the keeper is there and holds what it should.
    pub fn is_well(&self) -> bool {
        self.problem.is_none() && self.client.as_ref().is_some_and(Client::is_alive)
    }

    /// Why not.
    pub fn problem(&self) -> Option<&str> {
        match (&self.problem, &self.client) {
            (Some(problem), _) => Some(problem),
            (None, None) => Some("the keeper is not connected"),
            (None, Some(_)) => None,
        }
    }

    /// The listeners that are held for a slot.
    pub fn take(&mut self, netns: NetnsCookie, slot: Slot) -> Vec<TcpListener> {
        let taken = self.ask(|client| client.take(netns.0, slot, 0)).unwrap_or_default();
        let count = taken.len();
        let good: Vec<TcpListener> = taken
            .into_iter()
            .filter_map(|socket| look(socket, netns, slot))
            .collect();
        if good.len() < count {
            tracing::error!(%netns, count, good = good.len(), "the keeper holds what is no listener of this pod's");
        }
        good
    }

    /// Has listeners held, beside `first` that are held already. A keeper that cannot is a problem of its own and no
    /// reason not to serve.
    pub fn put(
        &mut self,
        netns: NetnsCookie,
        slot: Slot,
        first: usize,
        listeners: &[TcpListener],
    ) -> Result<(), Taken> {
        let sockets: Vec<_> = listeners.iter().map(AsFd::as_fd).collect();
        match self
            .client
            .as_ref()
            .map(|client| client.put(netns.0, slot, first, &sockets))
        {
            None | Some(Ok(())) => Ok(()),
            Some(Err(ClientError::Refused(Refusal::Taken))) => Err(Taken),
            Some(Err(error)) => {
                self.failed(&error);
                Ok(())
            }
        }
    }

    /// Has the keeper let go of a pod's listeners.
    pub fn withdraw(&mut self, netns: NetnsCookie) {
        // If it does not hear it, the sweep after the next connection will find them.
        let _told = self.ask(|client| client.withdraw(netns.0));
    }

    /// Every namespace that the keeper holds listeners of.
    pub fn namespaces(&mut self) -> Vec<NetnsCookie> {
        let cookies = self.ask(Client::namespaces).unwrap_or_default();
        cookies.into_iter().map(NetnsCookie).collect()
    }

    /// Says, once for each connection, that this agent serves.
    pub fn serving(&mut self) {
        if !self.said_serving {
            let started = self.started;
            self.said_serving = self.ask(|client| client.serving(started)).is_some();
        }
    }

    /// Whether an agent that was started later serves, so that nothing need wait for this one.
    pub fn successor(&mut self) -> bool {
        let started = self.started;
        self.connect();
        self.ask(|client| client.successor(started)).unwrap_or(false)
    }

    fn ask<T>(&mut self, question: impl FnOnce(&Client) -> Result<T, ClientError>) -> Option<T> {
        match question(self.client.as_ref()?) {
            Ok(answer) => Some(answer),
            Err(error) => {
                self.failed(&error);
                None
            }
        }
    }

    fn failed(&mut self, error: &ClientError) {
        let problem = Chain(error).to_string();
        if self.problem.as_ref() != Some(&problem) {
            tracing::warn!(problem, "the keeper does not hold the pods' listeners");
        }
        self.problem = Some(problem);
        self.retry_at = Instant::now() + RETRY;
        // After a refusal the connection is still in step, but only a new one brings everything again.
        self.client = None;
    }
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kept")
            .field("path", &self.path)
            .field("problem", &self.problem)
            .finish_non_exhaustive()
    }
}

/// The socket as a listener, if it is one of that slot.
fn look(socket: OwnedFd, netns: NetnsCookie, slot: Slot) -> Option<TcpListener> {
    let listens = socket_acceptconn(&socket).unwrap_or(false);
    // A pod that shares the node's namespace has its listeners here, where the agent is.
    let expected = match netns.cgroup_id() {
        Some(_) => netns::own_cookie(),
        None => Ok(netns),
    };
    let is_here = netns::cookie_of(&socket).is_ok_and(|cookie| expected.is_ok_and(|expected| cookie == expected));
    let listener = TcpListener::from(socket);
    let address = listener.local_addr().ok()?;
    let fits = address.ip().is_loopback() && address.is_ipv6() == slot.ipv6;
    (listens && is_here && fits).then_some(listener)
}
