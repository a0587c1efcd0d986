//! The destination's side: a connection that came to a pod's own address.
//!
//! Stages: identify (the pod and port that were asked for) → tell a tunnel of ours from plaintext by its first bytes →
//! verify the peer's identity against what the view says of its address → [`judge`] → [`deliver`] → relay, or for
//! requests [`requests_in`](super::requests_in). Plaintext is refused under strict mutual TLS and judged without an
//! identity otherwise. Nothing is said to a source that was not judged, but a reset.

use std::{net::SocketAddr, pin::pin, rc::Rc, sync::Arc};

use bytes::BytesMut;
use mesh_api::{
    authz::{Permit, SourceAttributes},
    identity::SpiffeId,
    policy::MtlsMode,
    view::View,
    workload::{AppProtocol, Workload},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{
    Captured, deliver, judge,
    judge::Denial,
    names,
    outbound::{outcome, stop},
    requests_in::{self, RequestsIn},
    sniff::{self, Sniffed},
    target::{Kind, TargetStream},
};
use crate::{
    event::{ConnRecord, ConnectionSecurity, Outcome, Refusal},
    identity::PeerIdentity,
    l7::detect::Sniff,
    net,
    pods::Pod,
    relay::{self, Duplex},
    tls::HandshakeError,
    transport::Transport,
    tunnel::{
        self, ResetReason,
        server::{Accepted, FlowServer, IDLE_TIMEOUT, TunnelError},
    },
    worker::Worker,
};

/// What is read of an application that speaks first before the relay begins.
const EARLY_BYTES_MAX: usize = 16 * 1024;

/// A connection to a pod's address, as every stage sees it.
#[derive(Clone)]
pub struct Arrival {
    /// The worker that serves it.
    pub worker: Rc<Worker>,
    /// The pod.
    pub pod: Arc<Pod>,
    /// The pod's address and the application's port.
    pub local: SocketAddr,
    /// Where it came from.
    pub source: SocketAddr,
    /// Who came, once it is proven.
    pub identity: Option<SpiffeId>,
}

/// Serves a steered connection to its end.
pub async fn serve(worker: &Rc<Worker>, captured: Captured) {
    let Captured {
        stream,
        pod,
        source,
        original_destination,
    } = captured;
    let arrival = Arrival {
        worker: worker.clone(),
        pod,
        local: original_destination,
        source,
        identity: None,
    };
    let view = worker.shared.view.load();
    let policy = view.inbound(arrival.pod.name(), arrival.local.port());
    let config = &worker.shared.config;

    let mut first = BytesMut::new();
    let silence = match (policy.mtls, policy.protocol) {
        // Only a tunnel can follow, so silence is a handshake that does not begin.
        (MtlsMode::Strict, _) => config.handshake_timeout,
        // The source speaks first, be it a request or a tunnel whose agent has much to do.
        (_, AppProtocol::Http1 | AppProtocol::Http2 | AppProtocol::Grpc) => crate::l7::Limits::default().idle_timeout,
        (_, AppProtocol::Tcp | AppProtocol::Tls | AppProtocol::Detect) => config.silence,
    };
    let sniffed = match sniff::read_first(&stream, &mut first, silence, config.handshake_timeout).await {
        Ok(sniffed) => sniffed,
        Err(_) => return arrival.refuse(&view, stream, &Denial::of(Refusal::SourceClosed)),
    };
    match sniffed {
        Sniffed::Known(Sniff::TlsOurs(_)) => Box::pin(arrival.tunnel(&view, stream, first)).await,
        Sniffed::Closed => arrival.record(&view, ConnectionSecurity::None).close(Outcome::Served),
        Sniffed::Known(_) | Sniffed::Silent => Box::pin(arrival.plaintext(&view, stream, first, sniffed)).await,
    }
}

impl Arrival {
    /// The source as policy sees it.
    pub fn attributes(&self) -> SourceAttributes<'_> {
        SourceAttributes {
            identity: self.identity.as_ref(),
            address: self.source.ip(),
            port: self.source.port(),
        }
    }

    /// The source, as far as the view knows it. From a node's address several may come: which one, its identity tells.
    pub fn source_in<'v>(&self, view: &'v View) -> Option<&'v Arc<Workload>> {
        match &self.identity {
            Some(identity) => view.source(self.source.ip(), identity),
            None => view.workload_by_address(self.source.ip()),
        }
    }

    /// A record of this connection, or of one flow of it.
    pub fn record(&self, view: &View, security: ConnectionSecurity) -> ConnRecord {
        let source = self.source_in(view);
        let policy = view.inbound(self.pod.name(), self.local.port());
        let destination = self.pod.workload();
        let ends = names::Ends {
            source,
            destination: Some(&destination),
            service: policy.services.first(),
            security,
            ..names::Ends::at_destination()
        };
        names::connection(&self.worker, view, &ends, self.source, self.local)
    }

    fn refuse(&self, view: &View, stream: TcpStream, denial: &Denial) {
        net::reset_on_close(&stream);
        let mut record = self.record(view, ConnectionSecurity::None);
        record.set_rule(denial.rule.clone(), view.revision());
        record.close(Outcome::Refused(denial.refusal));
    }

    /// A tunnel of a peer's: TLS, then the identity against the view, then what it carries.
    async fn tunnel(mut self, view: &View, stream: TcpStream, first: BytesMut) {
        let shared = &self.worker.shared;
        let (timeout, patience) = (shared.config.handshake_timeout, shared.config.peer_patience);
        let Some(credential) = self.worker.credential(self.pod.identity()).await else {
            return self.refuse(view, stream, &Denial::of(Refusal::NoCredential));
        };
        let accepted = tunnel::server::accept(stream, &first, &credential, self.worker.wall(), timeout, patience).await;
        drop((credential, first));
        let accepted = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, source = %self.source, "no tunnel");
                return self
                    .record(view, ConnectionSecurity::None)
                    .close(Outcome::Refused(accept_refusal(&error)));
            }
        };
        let (Accepted::Http(_, peer) | Accepted::Flow(_, peer)) = &accepted;
        if let Err(refusal) = self.verify(peer).await {
            let view = self.worker.shared.view.load();
            let claimed = match accepted {
                Accepted::Http(transport, claimed) => {
                    transport.set_linger_reset();
                    claimed
                }
                Accepted::Flow(flows, claimed) => {
                    flows.close();
                    claimed
                }
            };
            // The workload at this address proved nothing, whatever the certificate says of another one.
            let mut record = self.record(&view, ConnectionSecurity::Unknown);
            record.set_rule(Denial::of(refusal).rule, view.revision());
            record.set_error(&format_args!("the certificate is of {}", claimed.spiffe));
            return record.close(Outcome::Refused(refusal));
        }
        self.identity = Some(peer.spiffe.clone());
        match accepted {
            Accepted::Http(transport, _) => Box::pin(requests_in::serve(RequestsIn::new(self), transport)).await,
            Accepted::Flow(flows, _) => Box::pin(self.flows(flows)).await,
        }
    }

    /// The certificate must name whom the view names at the source's address. A view that does not know the address
    /// yet is given some time: the peer's may be newer.
    async fn verify(&self, peer: &PeerIdentity) -> Result<(), Refusal> {
        let ip = self.source.ip();
        let shared = &self.worker.shared;
        let known = |view: &View| view.source(ip, &peer.spiffe).is_some();
        if known(&shared.view.load()) {
            return Ok(());
        }
        match shared.view.wait_for(known, shared.config.view_patience).await {
            Ok(_) => Ok(()),
            Err(_) if !shared.view.load().has_sources_at(ip) => Err(Refusal::UnknownSource),
            Err(_) => Err(Refusal::IdentityMismatch),
        }
    }

    /// One flow after another on a tunnel.
    async fn flows(&self, mut flows: FlowServer) {
        loop {
            let next = tokio::select! {
                next = flows.next(IDLE_TIMEOUT) => next,
                // Flows that are on their way already are still served; the source sends no further one here.
                () = self.worker.shared.drain.started(), if !flows.is_retired() => {
                    flows.retire();
                    continue;
                }
            };
            let offer = match next {
                Ok(Some(offer)) => offer,
                Ok(None) => return,
                Err(error) => {
                    tracing::debug!(error = &error as &dyn std::error::Error, source = %self.source, "tunnel ended");
                    return self.worker.shared.events.refused(accept_refusal(&error));
                }
            };
            let view = self.worker.shared.view.load();
            let mut record = self.record(&view, ConnectionSecurity::MutualTls);
            // The tunnel's own address is proven; the port is the source agent's word.
            let shown = SocketAddr::new(self.source.ip(), offer.preface().source.port());
            let (permit, app) = match self.open(&view, shown).await {
                Ok(opened) => opened,
                Err(denial) => {
                    record.set_rule(denial.rule.clone(), view.revision());
                    record.close(Outcome::Refused(denial.refusal));
                    offer.refuse(reset_reason(denial.refusal));
                    return;
                }
            };
            record.set_rule(permit.rule().clone(), permit.revision());
            record.established();
            let Ok(flow) = offer.accept() else {
                return record.close(Outcome::SourceReset);
            };
            self.relay(record, flow, TargetStream::new(Kind::App(app)), (0, 0))
                .await;
        }
    }

    /// Judges a flow and connects it to the application.
    async fn open(&self, view: &View, shown: SocketAddr) -> Result<(Permit, deliver::AppStream), Denial> {
        let policy = view.inbound(self.pod.name(), self.local.port());
        let permit = judge::flow(&policy, &self.attributes())?;
        let shared = &self.worker.shared;
        let timeout = shared.config.dial_timeout;
        let app = deliver::connect(&shared.kernel, &self.pod, self.local, shown, timeout, &permit).await;
        Ok((permit, app.map_err(Denial::of)?))
    }

    /// A connection that is no tunnel of ours.
    async fn plaintext(self, view: &View, stream: TcpStream, mut first: BytesMut, sniffed: Sniffed) {
        let policy = view.inbound(self.pod.name(), self.local.port());
        if policy.mtls == MtlsMode::Strict {
            return self.refuse(view, stream, &Denial::of(Refusal::PlaintextRefused));
        }
        let http = match (policy.protocol, &sniffed) {
            (AppProtocol::Tcp | AppProtocol::Tls, _) => false,
            (AppProtocol::Detect, Sniffed::Known(known)) => matches!(known, Sniff::Http1 | Sniff::Http2),
            (AppProtocol::Detect, _) => false,
            (AppProtocol::Http1 | AppProtocol::Http2 | AppProtocol::Grpc, _) => true,
        };
        if http {
            return requests_in::serve(RequestsIn::new(self), Transport::from_tcp(stream, first)).await;
        }
        let mut record = self.record(view, ConnectionSecurity::None);
        let (permit, app) = match self.open(view, self.source).await {
            Ok(opened) => opened,
            // A silent source may yet send a request, which a rule may allow; an opaque one may not.
            Err(denial) if sniffed == Sniffed::Silent && policy.protocol == AppProtocol::Detect => {
                drop(record);
                let patience = self.worker.shared.config.handshake_timeout;
                return match sniff::read_first(&stream, &mut first, patience, patience).await {
                    Ok(Sniffed::Known(Sniff::Http1 | Sniff::Http2)) => {
                        requests_in::serve(RequestsIn::new(self), Transport::from_tcp(stream, first)).await;
                    }
                    _ => self.refuse(view, stream, &denial),
                };
            }
            Err(denial) => return self.refuse(view, stream, &denial),
        };
        record.set_rule(permit.rule().clone(), permit.revision());
        record.established();
        let mut stream = stream;
        let mut app = TargetStream::new(Kind::App(app));
        let mut early = BytesMut::new();
        if sniffed == Sniffed::Silent && policy.protocol == AppProtocol::Detect {
            early.reserve(EARLY_BYTES_MAX);
            tokio::select! {
                biased;
                read = sniff::fill(&stream, &mut first) => if matches!(read, Ok(n) if n > 0) {
                    let patience = self.worker.shared.config.handshake_timeout;
                    let known = sniff::read_first(&stream, &mut first, patience, patience).await;
                    match known {
                        Ok(Sniffed::Known(Sniff::Http1 | Sniff::Http2)) => {
                            record.close(Outcome::Cancelled);
                            return requests_in::serve(RequestsIn::new(self), Transport::from_tcp(stream, first)).await;
                        }
                        Ok(Sniffed::Known(Sniff::TlsOurs(_))) => {
                            record.close(Outcome::Cancelled);
                            return self.tunnel(view, stream, first).await;
                        }
                        _ => {}
                    }
                },
                _ = app.read_buf(&mut early) => {}
            }
        }
        let said = (first.len() as u64, early.len() as u64);
        if stream.write_all(&early).await.is_err() || app.write_all(&first).await.is_err() {
            net::reset_on_close(&stream);
            Duplex::reset(&mut app);
            return record.close(Outcome::SourceReset);
        }
        self.relay(record, stream, app, said).await;
    }

    async fn relay(&self, mut record: ConnRecord, source: impl Duplex, app: TargetStream, said: (u64, u64)) {
        let permit_lost = |view: &View| {
            let policy = view.inbound(self.pod.name(), self.local.port());
            judge::flow(&policy, &self.attributes()).is_err()
        };
        let idle = self.worker.shared.config.idle_timeout;
        let counters = relay::Counters::default();
        let stop = pin!(stop(&self.worker, permit_lost));
        let end = relay::relay(source, app, &counters, idle, stop).await;
        record.set_bytes(said.1 + end.received, said.0 + end.sent);
        record.close(outcome(&end));
    }
}

/// What a tunnel that did not come about is called.
fn accept_refusal(error: &TunnelError) -> Refusal {
    match error {
        TunnelError::Handshake(HandshakeError::Timeout(_)) => Refusal::SourceHandshakeTimeout,
        TunnelError::Handshake(_) | TunnelError::Peer(_) | TunnelError::Alpn => Refusal::SourceHandshakeFailed,
        TunnelError::Io(_) | TunnelError::Preface(_) => Refusal::SourceTunnelProtocol,
    }
}

/// What the source's agent is told of a refused flow.
fn reset_reason(refusal: Refusal) -> ResetReason {
    match refusal {
        Refusal::DialTimeout => ResetReason::Timeout,
        Refusal::DialRefused | Refusal::DialUnreachable | Refusal::DialSocket => ResetReason::Unreachable,
        Refusal::Capacity => ResetReason::Overload,
        Refusal::Draining => ResetReason::Draining,
        _ => ResetReason::Denied,
    }
}
