//! The other end of a keeper: what an agent asks, and what a new keeper asks the one before it.
//!
//! Blocking, with a bound on every wait: a keeper answers within microseconds, and one that does not is as good as gone.
//! After any error but a refusal the connection is out of step and must be dropped.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, socket_with,
    sockopt::{Timeout, set_socket_timeout},
};

use super::{
    PACKET_SOCKETS_MAX,
    codec::{Defect, Refusal, Request, Response, Role, Slot},
    wire,
};

/// How long a keeper may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a keeper did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is none, or it is gone.
    #[error("the keeper at {}", .path.display())]
    Io {
        /// Its socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It does not speak our protocol.
    #[error("the keeper's answer is not understood: {0}")]
    Defect(#[from] Defect),
    /// It answered something else.
    #[error("the keeper answered something that was not asked: {0}")]
    Unexpected(String),
    /// It refused.
    #[error("the keeper refused: {0}")]
    Refused(#[from] Refusal),
}

/// A connection to a keeper.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    path: PathBuf,
}

impl Client {
    /// Connects and says who asks.
    pub fn connect(path: &Path, role: Role) -> Result<Client, ClientError> {
        let failed = |source: rustix::io::Errno| ClientError::Io {
            path: path.to_owned(),
            source: source.into(),
        };
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).map_err(failed)?;
        for direction in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&socket, direction, Some(ANSWER_TIMEOUT)).map_err(failed)?;
        }
        connect(&socket, &SocketAddrUnix::new(path).map_err(failed)?).map_err(failed)?;
        let client = Client {
            socket,
            path: path.to_owned(),
        };
        match client.ask(Request::hello(role), &[])? {
            (Response::Hello { .. }, _) => Ok(client),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Whether the keeper still holds this connection.
    pub fn is_alive(&self) -> bool {
        let mut byte = [0; 1];
        // Nothing is on its way between two questions: whatever is there is an end.
        let read = recv(&self.socket, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT);
        matches!(read, Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR))
    }

    /// Every namespace that sockets are held of.
    pub fn namespaces(&self) -> Result<Vec<u64>, ClientError> {
        let mut all: Vec<u64> = Vec::new();
        loop {
            let after = all.last().copied().unwrap_or(0);
            match self.ask(Request::Namespaces { after }, &[])? {
                (Response::Namespaces(page), _) if page.is_empty() => return Ok(all),
                // Pages go up, or they would never end.
                (Response::Namespaces(page), _) if page.first().is_some_and(|first| *first > after) => {
                    all.extend(page);
                }
                (other, _) => return Err(unexpected(&other)),
            }
        }
    }

    /// The sockets of a slot from `first` on.
    pub fn take(&self, netns: u64, slot: Slot, first: usize) -> Result<Vec<OwnedFd>, ClientError> {
        let mut sockets = Vec::new();
        loop {
            let at = first + sockets.len();
            let next = index(at)?;
            match self.ask(
                Request::Take {
                    netns,
                    slot,
                    first: next,
                },
                &[],
            )? {
                (Response::Sockets { count: 0, .. }, _) => return Ok(sockets),
                (Response::Sockets { total, .. }, more) => {
                    sockets.extend(more);
                    if first + sockets.len() >= usize::from(total) {
                        return Ok(sockets);
                    }
                }
                (other, _) => return Err(unexpected(&other)),
            }
        }
    }

    /// Puts sockets into a slot that has `first` of them.
    pub fn put(&self, netns: u64, slot: Slot, first: usize, sockets: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        let mut first = first;
        for packet in sockets.chunks(PACKET_SOCKETS_MAX) {
            let request = Request::Put {
                netns,
                slot,
                first: index(first)?,
                // Bounded by the size of the chunks.
                count: u8::try_from(packet.len()).unwrap_or(0),
            };
            self.done(request, packet)?;
            first += packet.len();
        }
        Ok(())
    }

    /// Has the keeper let go of a namespace.
    pub fn withdraw(&self, netns: u64) -> Result<(), ClientError> {
        self.done(Request::Withdraw { netns }, &[])
    }

    /// Says that this agent, started then, serves as long as this connection lives.
    pub fn serving(&self, started: u64) -> Result<(), ClientError> {
        self.done(Request::Serving { started }, &[])
    }

    /// Whether an agent that was started later serves.
    pub fn successor(&self, started: u64) -> Result<bool, ClientError> {
        match self.ask(Request::Successor { started }, &[])? {
            (Response::Successor(yes), _) => Ok(yes),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Tells the keeper that another one has its place.
    pub fn supersede(&self) -> Result<(), ClientError> {
        self.done(Request::Supersede, &[])
    }

    fn done(&self, request: Request, sockets: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        match self.ask(request, sockets)? {
            (Response::Done, _) => Ok(()),
            (other, _) => Err(unexpected(&other)),
        }
    }

    #[cfg(test)]
    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    pub(super) fn ask(
        &self,
        request: Request,
        sockets: &[BorrowedFd<'_>],
    ) -> Result<(Response, Vec<OwnedFd>), ClientError> {
        let failed = |source| ClientError::Io {
            path: self.path.clone(),
            source,
        };
        wire::send(self.socket.as_fd(), &request.to_bytes(), sockets).map_err(failed)?;
        let packet = loop {
            match wire::receive(self.socket.as_fd()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                received => break received.map_err(failed)?,
            }
        };
        if packet.bytes.is_empty() {
            return Err(failed(io::ErrorKind::UnexpectedEof.into()));
        }
        match Response::parse(&packet.bytes)? {
            Response::Refused(refusal) => Err(refusal.into()),
            response if response.sockets() != packet.sockets.len() => Err(unexpected(&response)),
            response => Ok((response, packet.sockets)),
        }
    }
}

fn unexpected(response: &Response) -> ClientError {
    ClientError::Unexpected(format!("{response:?}"))
}

fn index(number: usize) -> Result<u16, ClientError> {
    u16::try_from(number).map_err(|_| ClientError::Refused(Refusal::Full))
}
