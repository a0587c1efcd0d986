//! Socket seams: where sockets come from, how they are tuned, how long a dial may take, and what time it is.
//!
//! Everything above asks a [`SocketSource`] for its sockets (a pod gives them in its own network namespace) and a
//! [`Clock`] for the time, so that tests give both. Nothing here knows of TLS, pods or policy, and nothing here waits
//! without a bound.

use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant, SystemTime},
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpSocket, TcpStream};

/// How long a TCP connection may take to be established unless the caller says otherwise.
pub const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
/// Idle time before the first keepalive probe.
pub const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
/// Time between keepalive probes.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// Unanswered probes before the kernel gives the connection up.
pub const KEEPALIVE_PROBES: u32 = 4;

/// Where time comes from. Decisions take the time as an argument; only the loops around them ask a clock.
pub trait Clock: Send + Sync {
    /// Monotonic time.
    fn now(&self) -> Instant;
    /// Wall-clock time, for certificates.
    fn wall(&self) -> SystemTime;
}

/// The machine's own clocks. Monotonic time goes through tokio so that a paused runtime holds it too.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        tokio::time::Instant::now().into_std()
    }
    fn wall(&self) -> SystemTime {
        SystemTime::now()
    }
}

/// A network namespace, told apart by its cookie; a cookie is never used twice while the kernel runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetnsId(pub u64);

/// Makes sockets in one network namespace. A pod is one.
pub trait SocketSource {
    /// An unconnected, non-blocking TCP socket in that namespace, marked as the agent's own.
    fn socket(&self, ipv6: bool) -> io::Result<TcpSocket>;
    /// The namespace.
    fn netns(&self) -> NetnsId;
}

/// The namespace that the calling thread is in.
#[derive(Clone, Copy, Debug, Default)]
pub struct OwnNetns;

impl SocketSource for OwnNetns {
    fn socket(&self, ipv6: bool) -> io::Result<TcpSocket> {
        if ipv6 { TcpSocket::new_v6() } else { TcpSocket::new_v4() }
    }
    fn netns(&self) -> NetnsId {
        NetnsId(0)
    }
}

/// Why no TCP connection came about.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The socket could not be made in the namespace.
    #[error("cannot make a socket")]
    Socket(#[source] io::Error),
    /// The kernel or the other side said no.
    #[error("cannot connect to {address}")]
    Connect {
        /// Whom we called.
        address: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// No answer in time.
    #[error("no connection to {address} within {within:?}")]
    Timeout {
        /// Whom we called.
        address: SocketAddr,
        /// The bound.
        within: Duration,
    },
}

/// Turns Nagle off and keepalive on. Failing to is no reason to drop a connection.
pub fn tune(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    keep_alive(stream, KEEPALIVE_IDLE, KEEPALIVE_INTERVAL);
}

/// Has the kernel ask a peer from which nothing came for `idle` whether it is there, every `interval`, and give the
/// connection up after [`KEEPALIVE_PROBES`] without an answer.
pub fn keep_alive(stream: &TcpStream, idle: Duration, interval: Duration) {
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(idle)
        .with_interval(interval)
        .with_retries(KEEPALIVE_PROBES);
    let _ = socket2::SockRef::from(stream).set_tcp_keepalive(&keepalive);
}

/// How many descriptors this process may have.
pub fn descriptors() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// As many descriptors as the system allows this process; returns how many that are.
pub fn raise_descriptors() -> u64 {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "the limit of descriptors stays as it is");
    }
    descriptors()
}

/// Makes the next close of this socket a reset: unsent bytes are thrown away and the other side reads `ECONNRESET`.
pub fn reset_on_close(stream: &TcpStream) {
    let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Connects from `source`'s namespace within `timeout` and tunes the stream.
pub async fn dial(
    source: &dyn SocketSource,
    address: SocketAddr,
    timeout: Duration,
) -> Result<TcpStream, ConnectError> {
    let socket = source.socket(address.is_ipv6()).map_err(ConnectError::Socket)?;
    match tokio::time::timeout(timeout, socket.connect(address)).await {
        Ok(Ok(stream)) => {
            tune(&stream);
            Ok(stream)
        }
        Ok(Err(source)) => Err(ConnectError::Connect { address, source }),
        Err(_) => Err(ConnectError::Timeout {
            address,
            within: timeout,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_refused_dial_says_so() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let error = dial(&OwnNetns, address, DIAL_TIMEOUT).await.unwrap_err();
        let ConnectError::Connect { source, .. } = error else {
            panic!("{error}")
        };
        assert_eq!(source.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn a_dialed_stream_is_tuned() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = dial(&OwnNetns, listener.local_addr().unwrap(), DIAL_TIMEOUT)
            .await
            .unwrap();
        assert!(stream.nodelay().unwrap());
        assert!(socket2::SockRef::from(&stream).keepalive().unwrap());
    }
}
