//! The agent's `net`, over sockets in memory, and `tokio::net` at once: both names lead here.
//!
//! The agent's own file is taken as it is; what differs is defined here and hides what it hides. [`network`] is the
//! network between the sockets.

#[path = "../../../mesh-agent/src/net.rs"]
mod real;

mod inspect;
pub mod network;
mod socket;

use std::time::{Duration, Instant, SystemTime};

pub use network::Network;
pub use real::*;
pub use socket::{StdListener, TcpListener, TcpSocket, TcpStream};

/// Every run begins at this time: 2030-01-01.
const WALL_AT_START: Duration = Duration::from_secs(1_893_456_000);

thread_local! {
    static STARTED: std::cell::Cell<Option<Instant>> = const { std::cell::Cell::new(None) };
}

/// The runtime's paused clock, and a wall clock that moves with it.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl SystemClock {
    /// Begins a run: the wall clock starts anew.
    pub fn start() {
        STARTED.set(Some(real_tokio::time::Instant::now().into_std()));
    }

    /// The time since the run began.
    pub fn elapsed() -> Duration {
        let started = STARTED.get();
        started.map_or(Duration::ZERO, |started| {
            real_tokio::time::Instant::now().into_std() - started
        })
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        real_tokio::time::Instant::now().into_std()
    }
    fn wall(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + WALL_AT_START + SystemClock::elapsed()
    }
}

/// Makes the next close of this socket a reset.
pub fn reset_on_close(stream: &TcpStream) {
    stream.reset_on_close();
}
