//! The destination's end: take the session that a ClientHello began, demand and judge the source's certificate, and
//! hand out what the tunnel carries.
//!
//! Who the source *should* be is the caller's question: it compares [`PeerIdentity`] with what its view says of the
//! source's address, before it reads a request or accepts a flow.

use std::{
    cell::RefCell,
    io,
    pin::Pin,
    rc::Rc,
    task::Poll,
    time::{Duration, SystemTime},
};

use tokio::{
    io::{AsyncRead, ReadBuf},
    net::TcpStream,
};

use super::{
    FlowStream, PeerPatience, Preface, ResetReason,
    flow::Home,
    frame::Head,
    preface::{PREFACE_BYTES, PrefaceDefect},
};
use crate::{
    identity::{Alpn, Credential, PeerError, PeerIdentity, verify},
    tls::{HandshakeError, TlsStream},
    transport::Transport,
};

/// How long a destination keeps an idle tunnel. Longer than a source does, so that the source closes first and never
/// writes into a tunnel that is just being closed.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(90);

/// How long a retired tunnel still takes flows: as long as one that was sent before the source read of it may be on its
/// way. A source looks before it uses an idle tunnel.
const RETIRE_TIMEOUT: Duration = Duration::from_secs(1);

/// What a tunnel carries.
#[derive(Debug)]
pub enum Accepted {
    /// Requests: HTTP/1.1, or HTTP/2 if it begins with its preface.
    Http(Transport, PeerIdentity),
    /// One flow after another.
    Flow(FlowServer, PeerIdentity),
}

/// Why a tunnel or a flow was not taken.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// No TLS session.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// The source's certificates prove nothing.
    #[error("the source's certificate was not accepted")]
    Peer(#[from] PeerError),
    /// A protocol that we do not speak.
    #[error("the source did not ask for a tunnel's protocol")]
    Alpn,
    /// The tunnel failed between two flows.
    #[error("the tunnel failed")]
    Io(#[source] io::Error),
    /// What stands where a preface should is none.
    #[error(transparent)]
    Preface(#[from] PrefaceDefect),
}

/// Takes a tunnel on a connection whose first bytes (`prefix`) are one of our ClientHellos. `now` judges certificates.
pub async fn accept(
    tcp: TcpStream,
    prefix: &[u8],
    credential: &Credential,
    now: SystemTime,
    timeout: Duration,
    patience: PeerPatience,
) -> Result<Accepted, TunnelError> {
    let handshake = TlsStream::accept(tcp, prefix, credential.server().clone(), timeout);
    // Boxed: a handshake is rare beside what follows on the tunnel.
    let mut tls = Box::new(Box::pin(handshake).await?);
    let alpn = tls.alpn().and_then(Alpn::from_bytes).ok_or(TunnelError::Alpn)?;
    let peer = verify::peer(tls.peer_certificates(), credential.bundle(), now)?;
    tls.set_peer(peer.clone());
    tls.watch(patience.of(alpn));
    Ok(match alpn {
        Alpn::Http => Accepted::Http(Transport::Tls(tls), peer),
        Alpn::Tcp => Accepted::Flow(
            FlowServer {
                home: Rc::new(RefCell::new(Some(tls))),
                retired: false,
            },
            peer,
        ),
    })
}

/// A tunnel of flows, between two of them.
pub struct FlowServer {
    home: Home,
    retired: bool,
}

impl FlowServer {
    /// Waits for the next flow; may be dropped while it waits. After `idle_timeout` the tunnel is retired. `None` when
    /// the source closed it, when it did not do so in time after it was retired, or when the last flow did not give the
    /// tunnel back.
    pub async fn next(&mut self, idle_timeout: Duration) -> Result<Option<FlowOffer>, TunnelError> {
        loop {
            let patience = if self.retired { RETIRE_TIMEOUT } else { idle_timeout };
            let Ok(read) = tokio::time::timeout(patience, self.read_preface()).await else {
                if self.retired {
                    self.end();
                    return Ok(None);
                }
                self.retire();
                continue;
            };
            let preface = read.map_err(TunnelError::Io)?.map(|bytes| Preface::parse(&bytes));
            let Some(mut tls) = self.home.borrow_mut().take() else {
                return Ok(None);
            };
            return match preface {
                Some(Ok(preface)) => Ok(Some(FlowOffer {
                    preface,
                    tls,
                    home: self.home.clone(),
                })),
                Some(Err(defect)) => {
                    let _ = tls.write_now(&Head::Reset(ResetReason::Protocol).to_bytes());
                    tls.close_now();
                    Err(defect.into())
                }
                None => {
                    tls.close_now();
                    Ok(None)
                }
            };
        }
    }

    /// Asks the source for no further flow on this tunnel. One that is on its way already still comes from
    /// [`FlowServer::next`], so that no flow is lost between two agents.
    pub fn retire(&mut self) {
        if let Some(tls) = self.home.borrow_mut().as_mut()
            && !self.retired
        {
            let _ = tls.write_now(&Head::Retire.to_bytes());
        }
        self.retired = true;
    }

    /// Closes the tunnel at once, as dropping it does.
    pub fn close(self) {}

    /// Whether [`FlowServer::retire`] was called, or the tunnel was idle for too long.
    pub fn is_retired(&self) -> bool {
        self.retired
    }

    fn end(&self) {
        if let Some(mut tls) = self.home.borrow_mut().take() {
            tls.close_now();
        }
    }

    /// Exactly a preface's bytes, or nothing if the tunnel ended before the first of them or is gone. The tunnel stays
    /// at home meanwhile.
    async fn read_preface(&self) -> io::Result<Option<[u8; PREFACE_BYTES]>> {
        let mut bytes = [0; PREFACE_BYTES];
        let mut buf = ReadBuf::new(&mut bytes);
        while buf.remaining() > 0 {
            let before = buf.filled().len();
            std::future::poll_fn(|cx| match self.home.borrow_mut().as_mut() {
                Some(tls) => Pin::new(&mut **tls).poll_read(cx, &mut buf),
                None => Poll::Ready(Ok(())),
            })
            .await?;
            if buf.filled().len() == before {
                return if before == 0 {
                    Ok(None)
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                };
            }
        }
        Ok(Some(bytes))
    }
}

impl Drop for FlowServer {
    fn drop(&mut self) {
        self.end();
    }
}

impl std::fmt::Debug for FlowServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FlowServer").finish_non_exhaustive()
    }
}

/// A flow that asks to be taken. Dropped, it is refused without a reason.
pub struct FlowOffer {
    preface: Preface,
    tls: Box<TlsStream>,
    home: Home,
}

impl FlowOffer {
    /// What the source says of it.
    pub fn preface(&self) -> &Preface {
        &self.preface
    }

    /// Takes the flow; the source is told if it waits for that.
    pub fn accept(self) -> io::Result<FlowStream> {
        let mut flow = FlowStream::destination(self.tls, self.home);
        if self.preface.confirm {
            flow.accept_now()?;
        }
        Ok(flow)
    }

    /// Refuses the flow with a reason; the tunnel ends with it.
    pub fn refuse(mut self, reason: ResetReason) {
        let _ = self.tls.write_now(&Head::Reset(reason).to_bytes());
        self.tls.close_now();
    }
}

impl std::fmt::Debug for FlowOffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FlowOffer")
            .field("preface", &self.preface)
            .finish_non_exhaustive()
    }
}
