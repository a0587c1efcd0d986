//! The source's side: a connection that a pod's application made.
//!
//! Stages: identify (what is the destination?) → protocol (declared, or told by the first byte of either side) →
//! for requests [`requests_out`](super::requests_out), for opaque bytes: route → pick → way → dial → relay. What is refused is
//! reset, so that the application sees a failed connection and never an empty but clean one. Every connection closes
//! one record, and a second one as the destination's when the destination is a pod of this node.

use std::{net::SocketAddr, pin::pin, rc::Rc, sync::Arc};

use bytes::BytesMut;
use mesh_api::{
    authz::{Permit, SourceAttributes},
    backend::Backend,
    route::{FlowChoice, FlowTable, Hello, select_flow},
    rule::RuleId,
    view::{Destination, InboundPolicy, ServicePortView, View},
    workload::{AppProtocol, Endpoint, ObjectName, Workload},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{
    Captured, deliver, judge,
    judge::Denial,
    names,
    requests_out::{self, RequestsOut},
    sniff::{self, Sniffed},
    target::{Kind, TargetStream},
    way::{self, Way},
};
use crate::{
    event::{ConnectionSecurity, Outcome, Refusal},
    l7::detect::{ServerName, Sniff, server_name},
    net,
    relay::{self, How, RelayEnd, Side, Stop},
    traffic::{Admission, ConnectionGuard, Picked, Rejection, Report},
    tunnel::{Preface, ResetReason},
    worker::Worker,
};

/// How often a flow tries another endpoint after one could not be dialed.
const ENDPOINTS_TRIED_MAX: usize = 3;
/// What is read of a destination that speaks first before the relay begins.
const EARLY_BYTES_MAX: usize = 16 * 1024;

/// What the source asked for.
#[derive(Clone, Debug)]
pub enum Wanted {
    /// A port of a service.
    Service(Arc<ServicePortView>),
    /// A workload's own address.
    Workload(Endpoint),
    /// An address that the mesh does not know.
    Outside(SocketAddr),
}

impl Wanted {
    fn protocol(&self, view: &View, source_namespace: &str) -> AppProtocol {
        match self {
            Wanted::Service(port) => port.protocol_for(source_namespace),
            Wanted::Workload(endpoint) => view.inbound(&endpoint.workload.name, endpoint.address.port()).protocol,
            Wanted::Outside(_) => AppProtocol::Tcp,
        }
    }
}

/// What the connection turned out to speak.
enum Speaks {
    Http1,
    Http2,
    /// Opaque bytes, perhaps with a target that was dialed to see whether it speaks first, and what it said.
    Opaque(Option<(Box<Dialed>, BytesMut)>),
    /// The source closed without a word.
    Nothing,
}

/// An established way for a flow.
struct Dialed {
    stream: TargetStream,
    endpoint: Option<Endpoint>,
    /// The rule of the route that sent it there.
    route: Option<RuleId>,
    /// Held while the flow lives: the backend's counts.
    picked: Option<Picked>,
    _counted: Option<(Admission, ConnectionGuard)>,
    security: ConnectionSecurity,
    /// The destination's judgement, where the destination is on this node.
    local: Option<Local>,
}

/// The destination's side of a flow that stays on this node.
struct Local {
    name: ObjectName,
    port: u16,
    permit: Permit,
}

/// Serves a captured connection to its end.
pub async fn serve(worker: &Rc<Worker>, captured: Captured) {
    let view = worker.shared.view.load();
    let Captured {
        mut stream,
        pod,
        source,
        original_destination,
    } = captured;
    // The captured socket itself is bound to the loopback address; what counts is the address that others see.
    let source = presented(&pod, source, original_destination.is_ipv6());
    let wanted = match view.destination(original_destination) {
        Destination::ServicePort(port) => Wanted::Service(port),
        Destination::Workload(endpoint) => Wanted::Workload(endpoint),
        Destination::Outside => Wanted::Outside(original_destination),
        Destination::NoPort(service) => {
            let ends = names::Ends {
                source: Some(&pod.workload()),
                service: Some(&service),
                ..names::Ends::at_source()
            };
            let record = names::connection(worker, &view, &ends, source, original_destination);
            net::reset_on_close(&stream);
            return record.close(Outcome::Refused(Refusal::NoEndpoint));
        }
    };
    let flow = Flow {
        worker,
        view,
        pod,
        source,
        original_destination,
        wanted,
    };

    let mut first = BytesMut::new();
    let speaks = match Box::pin(flow.protocol(&mut stream, &mut first)).await {
        Ok(speaks) => speaks,
        // The source is gone before it said anything that could be recorded as more than that.
        Err(_) => Speaks::Nothing,
    };
    match speaks {
        // Each in a box of its own: a connection takes the memory of what it is, not of all that it could have become.
        Speaks::Http1 => Box::pin(flow.requests(stream, first, false)).await,
        Speaks::Http2 => Box::pin(flow.requests(stream, first, true)).await,
        Speaks::Opaque(early) => Box::pin(flow.relay(stream, first, early)).await,
        Speaks::Nothing => {
            let record = flow.record(None, ConnectionSecurity::None);
            record.close(Outcome::Served);
        }
    }
}

/// A captured connection whose destination is identified.
struct Flow<'a> {
    worker: &'a Rc<Worker>,
    view: Arc<View>,
    pod: Arc<crate::pods::Pod>,
    source: SocketAddr,
    original_destination: SocketAddr,
    wanted: Wanted,
}

impl Flow<'_> {
    /// Tells what the connection speaks. The destination is dialed only if the source stays silent, since a protocol in
    /// which the destination speaks first cannot be told otherwise.
    async fn protocol(&self, stream: &mut TcpStream, first: &mut BytesMut) -> std::io::Result<Speaks> {
        let declared = self.wanted.protocol(&self.view, self.namespace());
        let config = &self.worker.shared.config;
        match declared {
            AppProtocol::Tcp | AppProtocol::Tls => return self.name_asked_for(stream, first, declared).await,
            AppProtocol::Http1 | AppProtocol::Http2 | AppProtocol::Grpc => {
                // A pooled connection may wait long for its first request.
                let idle = crate::l7::Limits::default().idle_timeout;
                return Ok(
                    match sniff::read_first(stream, first, idle, config.handshake_timeout).await? {
                        Sniffed::Known(Sniff::Http2) => Speaks::Http2,
                        Sniffed::Known(_) => Speaks::Http1,
                        Sniffed::Silent | Sniffed::Closed => Speaks::Nothing,
                    },
                );
            }
            AppProtocol::Detect => {}
        }
        if !self.worker.speaks_first(self.original_destination) {
            match sniff::read_first(stream, first, config.silence, config.handshake_timeout).await? {
                Sniffed::Known(known) => return Ok(speaks(known)),
                Sniffed::Closed => return Ok(Speaks::Nothing),
                Sniffed::Silent => {}
            }
        }
        let Ok(mut dialed) = self.dial(true, &[]).await else {
            // Whoever refused the flow may still take requests: only the source's own words decide now.
            return Ok(match sniff::fill(stream, first).await? {
                0 => Speaks::Nothing,
                _ => self.after_first_byte(stream, first).await?,
            });
        };
        let mut early = BytesMut::with_capacity(EARLY_BYTES_MAX);
        tokio::select! {
            biased;
            read = sniff::fill(stream, first) => match read? {
                0 => Ok(Speaks::Opaque(Some((Box::new(dialed), early)))),
                _ => Ok(match self.after_first_byte(stream, first).await? {
                    // A name that comes late may lead elsewhere.
                    Speaks::Opaque(_) if self.asks_for_names() && server_name(first) != ServerName::NotTls => {
                        Speaks::Opaque(None)
                    }
                    Speaks::Opaque(_) => Speaks::Opaque(Some((Box::new(dialed), early))),
                    http => http,
                }),
            },
            _ = dialed.stream.read_buf(&mut early) => {
                // An error is found again by the relay, which knows what to make of it.
                if !early.is_empty() {
                    self.worker.note_speaks_first(self.original_destination);
                }
                Ok(Speaks::Opaque(Some((Box::new(dialed), early))))
            }
        }
    }

    /// Reads the ClientHello of a connection whose way hangs on the name in it. Where connections of any kind have a
    /// way, a source that stays silent waits for the destination to speak first.
    async fn name_asked_for(
        &self,
        stream: &TcpStream,
        first: &mut BytesMut,
        declared: AppProtocol,
    ) -> std::io::Result<Speaks> {
        if !self.asks_for_names() {
            return Ok(Speaks::Opaque(None));
        }
        let config = &self.worker.shared.config;
        let takes_any = self.flows().is_some_and(|flows| flows.takes_any(self.namespace()));
        let silence = if takes_any && declared != AppProtocol::Tls {
            config.silence
        } else {
            config.handshake_timeout
        };
        Ok(
            match sniff::read_first(stream, first, silence, config.handshake_timeout).await? {
                Sniffed::Known(_) | Sniffed::Silent => Speaks::Opaque(None),
                Sniffed::Closed => Speaks::Nothing,
            },
        )
    }

    async fn after_first_byte(&self, stream: &TcpStream, first: &mut BytesMut) -> std::io::Result<Speaks> {
        let patience = self.worker.shared.config.handshake_timeout;
        Ok(match sniff::read_first(stream, first, patience, patience).await? {
            Sniffed::Known(known) => speaks(known),
            Sniffed::Silent | Sniffed::Closed => Speaks::Nothing,
        })
    }

    async fn requests(self, stream: TcpStream, first: BytesMut, http2: bool) {
        let handler = RequestsOut::new(
            self.worker.clone(),
            self.pod,
            self.source,
            self.original_destination,
            self.wanted,
        );
        requests_out::serve(Rc::new(handler), stream, first, http2).await;
    }

    async fn relay(self, mut stream: TcpStream, first: BytesMut, early: Option<(Box<Dialed>, BytesMut)>) {
        let (mut dialed, early) = match early {
            Some(dialed) => dialed,
            None => match Box::pin(self.dial(false, &first)).await {
                Ok(dialed) => (Box::new(dialed), BytesMut::new()),
                Err(refused) => {
                    net::reset_on_close(&stream);
                    return self.refused(&refused);
                }
            },
        };
        let mut record = self.record(dialed.endpoint.as_ref(), dialed.security);
        if let Some(route) = dialed.route.take() {
            record.set_route(route);
        }
        record.established();
        let mut twin = dialed.local.as_ref().map(|local| {
            let mut twin = self.twin(self.view.workload(&local.name));
            twin.set_rule(local.permit.rule().clone(), local.permit.revision());
            twin.established();
            twin
        });
        if !early.is_empty() && stream.write_all(&early).await.is_err() {
            relay::Duplex::reset(&mut dialed.stream);
            return record.close(Outcome::SourceReset);
        }
        if !first.is_empty() && dialed.stream.write_all(&first).await.is_err() {
            net::reset_on_close(&stream);
            return record.close(Outcome::DestinationReset);
        }
        let stop = pin!(stop(self.worker, self.permit_lost(dialed.local.take())));
        let end = relay::relay(
            stream,
            dialed.stream,
            &relay::Counters::default(),
            self.worker.shared.config.idle_timeout,
            stop,
        )
        .await;
        if let Some(picked) = dialed.picked.take() {
            picked.report(Report::Success, self.worker.now());
        }
        let (sent, received) = (end.sent + first.len() as u64, end.received + early.len() as u64);
        let outcome = outcome(&end);
        for record in twin.iter_mut().chain([&mut record]) {
            record.set_bytes(received, sent);
        }
        if let Some(twin) = twin {
            twin.close(outcome);
        }
        record.close(outcome);
    }

    fn namespace(&self) -> &str {
        &self.pod.name().namespace
    }

    /// The routes for connections to the port.
    fn flows(&self) -> Option<&FlowTable> {
        match &self.wanted {
            Wanted::Service(port) => port.flows.as_deref(),
            Wanted::Workload(_) | Wanted::Outside(_) => None,
        }
    }

    fn asks_for_names(&self) -> bool {
        self.flows().is_some_and(|flows| flows.asks_for_names(self.namespace()))
    }

    /// The backend that the port's routes send a connection to which begins so, and the rule that says it.
    fn route<'a>(&self, port: &'a ServicePortView, first: &[u8]) -> Result<(&'a Backend, Option<RuleId>), Denial> {
        let Some(flows) = &port.flows else {
            return Ok((&port.backend, None));
        };
        let name = server_name(first);
        let hello = match &name {
            ServerName::Name(name) => Hello::Name(name),
            ServerName::None => Hello::NoName,
            ServerName::NotTls => Hello::NotTls,
        };
        match select_flow(flows, self.namespace(), hello) {
            FlowChoice::Unrouted => Ok((&port.backend, None)),
            FlowChoice::NoMatch => Err(Denial::of(Refusal::NoRoute)),
            FlowChoice::Rule(rule) => match rule.pick(rand::random()).map(|share| &share.backend) {
                Some(Ok(backend)) => Ok((backend, Some(rule.id.clone()))),
                Some(Err(_)) | None => Err(Denial {
                    rule: rule.id.clone(),
                    ..Denial::of(Refusal::BadBackend)
                }),
            },
        }
    }

    /// Picks an endpoint for a connection that begins so, and goes there; another one when it cannot be reached.
    async fn dial(&self, confirm: bool, first: &[u8]) -> Result<Dialed, FlowRefused> {
        let refused = |refusal| FlowRefused {
            denial: Denial::of(refusal),
            endpoint: None,
            security: ConnectionSecurity::Unknown,
        };
        let timeout = self.worker.shared.config.dial_timeout;
        match &self.wanted {
            Wanted::Outside(address) => {
                let stream = way::dial_plain(&self.pod, *address, timeout).await.map_err(refused)?;
                Ok(Dialed::plain(Kind::Plain(stream)))
            }
            Wanted::Workload(endpoint) => self.dial_endpoint(endpoint, timeout, confirm).await,
            Wanted::Service(port) => {
                let (backend, route) = self.route(port, first).map_err(|denial| FlowRefused {
                    denial,
                    ..refused(Refusal::NoRoute)
                })?;
                let dialed = self.dial_backend(backend, confirm).await?;
                Ok(Dialed { route, ..dialed })
            }
        }
    }

    async fn dial_backend(&self, backend: &Backend, confirm: bool) -> Result<Dialed, FlowRefused> {
        let refused = |rejection| FlowRefused {
            denial: Denial::of(rejection_refusal(rejection)),
            endpoint: None,
            security: ConnectionSecurity::Unknown,
        };
        let admission = self.worker.shared.traffic.admit(backend).map_err(refused)?;
        let admission = admission.of_source(self.presented(self.original_destination.is_ipv6()).ip());
        let connection = admission.try_connection().map_err(refused)?;
        let mut tried: Vec<SocketAddr> = Vec::new();
        loop {
            let endpoints = backend.endpoints(self.original_destination.is_ipv6());
            let picked = admission.pick(endpoints, &tried, self.worker.now()).map_err(refused)?;
            match self
                .dial_endpoint(&picked.endpoint, backend.traffic.timeouts.connect, confirm)
                .await
            {
                Ok(dialed) => {
                    return Ok(Dialed {
                        picked: Some(picked),
                        _counted: Some((admission, connection)),
                        ..dialed
                    });
                }
                Err(refusal) => {
                    let reached = !is_unreached(refusal.denial.refusal);
                    tried.push(picked.endpoint.address);
                    picked.report(
                        if reached { Report::Success } else { Report::Failure },
                        self.worker.now(),
                    );
                    if reached || tried.len() >= ENDPOINTS_TRIED_MAX || tried.len() >= endpoints.len() {
                        return Err(refusal);
                    }
                }
            }
        }
    }

    async fn dial_endpoint(
        &self,
        endpoint: &Endpoint,
        timeout: std::time::Duration,
        confirm: bool,
    ) -> Result<Dialed, FlowRefused> {
        let refused = |denial| FlowRefused {
            denial,
            endpoint: Some(endpoint.clone()),
            security: ConnectionSecurity::Unknown,
        };
        let refused_here = |denial| FlowRefused {
            security: ConnectionSecurity::SameNode,
            ..refused(denial)
        };
        let way = way::find(self.worker, &self.view, &self.pod, endpoint)
            .map_err(Denial::of)
            .map_err(refused)?;
        let dialed = match way {
            Way::Plain => {
                let stream = way::dial_plain(&self.pod, endpoint.address, timeout).await;
                Dialed::plain(Kind::Plain(stream.map_err(Denial::of).map_err(refused)?))
            }
            Way::Tunnel(key) => {
                let preface = Preface {
                    confirm,
                    ..Preface::new(self.presented(endpoint.address.is_ipv6()))
                };
                self.worker.credential(self.pod.identity()).await;
                let tunnel = self.worker.tunnels.flow(&key, &*self.pod, &preface, false).await;
                let flow = tunnel.map_err(|error| refused(Denial::of(way::tunnel_refusal(&error))))?;
                Dialed {
                    security: ConnectionSecurity::MutualTls,
                    ..Dialed::plain(Kind::Flow(flow))
                }
            }
            Way::Local(pod, policy) => {
                let permit = judge::flow(&policy, &self.attributes()).map_err(refused_here)?;
                let shown = self.presented(endpoint.address.is_ipv6());
                let kernel = &self.worker.shared.kernel;
                let app = deliver::connect(kernel, &pod, endpoint.address, shown, timeout, &permit).await;
                let app = app.map_err(Denial::of).map_err(refused_here)?;
                let security = ConnectionSecurity::SameNode;
                let local = Some(Local {
                    name: pod.name().clone(),
                    port: endpoint.address.port(),
                    permit,
                });
                Dialed {
                    local,
                    security,
                    ..Dialed::plain(Kind::App(app))
                }
            }
        };
        Ok(Dialed {
            endpoint: Some(endpoint.clone()),
            ..dialed
        })
    }

    /// The source as the destination's application should see it: the pod's address, whatever the captured socket's.
    fn presented(&self, ipv6: bool) -> SocketAddr {
        presented(&self.pod, self.source, ipv6)
    }

    fn attributes(&self) -> SourceAttributes<'_> {
        attributes(&self.pod, self.source)
    }

    fn record(&self, endpoint: Option<&Endpoint>, security: ConnectionSecurity) -> crate::event::ConnRecord {
        let source = self.pod.workload();
        let ends = names::Ends {
            source: Some(&source),
            destination: endpoint.map(|endpoint| &endpoint.workload),
            service: self.service(),
            security,
            ..names::Ends::at_source()
        };
        let mut record = names::connection(self.worker, &self.view, &ends, self.source, self.original_destination);
        if let Some(endpoint) = endpoint {
            record.set_endpoint(endpoint.address);
        }
        record
    }

    /// The destination's record of what stays on this node.
    fn twin(&self, destination: Option<&Arc<Workload>>) -> crate::event::ConnRecord {
        let source = self.pod.workload();
        let ends = names::Ends {
            source: Some(&source),
            destination,
            service: self.service(),
            security: ConnectionSecurity::SameNode,
            ..names::Ends::at_destination()
        };
        names::connection(self.worker, &self.view, &ends, self.source, self.original_destination)
    }

    /// Closes the records of a flow that was refused.
    fn refused(&self, refused: &FlowRefused) {
        let endpoint = refused.endpoint.as_ref();
        let twin = match refused.security {
            ConnectionSecurity::SameNode => Some(self.twin(endpoint.map(|endpoint| &endpoint.workload))),
            _ => None,
        };
        for mut record in twin.into_iter().chain([self.record(endpoint, refused.security)]) {
            record.set_rule(refused.denial.rule.clone(), self.view.revision());
            record.close(Outcome::Refused(refused.denial.refusal));
        }
    }

    fn service(&self) -> Option<&Arc<mesh_api::workload::Service>> {
        match &self.wanted {
            Wanted::Service(port) => Some(&port.service),
            _ => None,
        }
    }

    /// Whether a newer view no longer permits the flow; never, where another agent is the judge.
    fn permit_lost(&self, local: Option<Local>) -> impl Fn(&View) -> bool + use<'_> {
        move |view| {
            local.as_ref().is_some_and(|local| {
                let policy: InboundPolicy = view.inbound(&local.name, local.port);
                judge::flow(&policy, &self.attributes()).is_err()
            })
        }
    }
}

/// Why a flow has no way.
struct FlowRefused {
    denial: Denial,
    endpoint: Option<Endpoint>,
    /// [`ConnectionSecurity::SameNode`] if this agent refused it as the destination's, else not decided yet.
    security: ConnectionSecurity,
}

impl Dialed {
    fn plain(kind: Kind) -> Dialed {
        Dialed {
            stream: TargetStream::new(kind),
            endpoint: None,
            route: None,
            picked: None,
            _counted: None,
            security: ConnectionSecurity::None,
            local: None,
        }
    }
}

fn speaks(known: Sniff) -> Speaks {
    match known {
        Sniff::Http1 => Speaks::Http1,
        Sniff::Http2 => Speaks::Http2,
        Sniff::TlsOurs(_) | Sniff::TlsOther | Sniff::Opaque | Sniff::NeedMore => Speaks::Opaque(None),
    }
}

/// The source as the destination should see it: the pod's own address and the socket's port.
pub(super) fn presented(pod: &crate::pods::Pod, source: SocketAddr, ipv6: bool) -> SocketAddr {
    match pod.address(ipv6) {
        Some(ip) => SocketAddr::new(ip, source.port()),
        None => source,
    }
}

/// The source as the destination's policy sees it.
pub(super) fn attributes(pod: &crate::pods::Pod, source: SocketAddr) -> SourceAttributes<'_> {
    let address = presented(pod, source, source.is_ipv6());
    SourceAttributes {
        identity: Some(pod.identity()),
        address: address.ip(),
        port: address.port(),
    }
}

/// Ends a relay when its permit is lost or the drain's patience is over.
pub(super) async fn stop(worker: &Worker, permit_lost: impl Fn(&View) -> bool) -> Stop {
    let lost = async {
        loop {
            let changed = worker.shared.view.changed();
            if permit_lost(&worker.shared.view.load()) {
                return;
            }
            changed.await;
        }
    };
    tokio::select! {
        () = lost => Stop::PermitLost,
        () = worker.shared.drain.closing() => Stop::Drained,
    }
}

/// What the end of a relay between a source (first) and a destination (second) is called.
pub(super) fn outcome(end: &RelayEnd) -> Outcome {
    match end.how {
        How::Closed => Outcome::Served,
        How::Reset(Side::First) => Outcome::SourceReset,
        How::Reset(Side::Second) => {
            match end
                .error
                .as_ref()
                .and_then(crate::tunnel::FlowError::of)
                .and_then(flow_refusal)
            {
                Some(refusal) => Outcome::Refused(refusal),
                None => Outcome::DestinationReset,
            }
        }
        How::PermitLost => Outcome::Refused(Refusal::PermitLost),
        How::Drained => Outcome::Drained,
        How::IdleTimeout => Outcome::Refused(Refusal::IdleTimeout),
    }
}

/// What the peer's reason to refuse a flow is called here.
fn flow_refusal(error: crate::tunnel::FlowError) -> Option<Refusal> {
    use crate::tunnel::FlowError;
    let (FlowError::Reset(reason) | FlowError::Refused(reason)) = error else {
        return None;
    };
    Some(match reason {
        ResetReason::Denied => Refusal::AccessDeniedConnection,
        ResetReason::Unreachable => Refusal::DialRefused,
        ResetReason::Timeout => Refusal::DialTimeout,
        ResetReason::Draining => Refusal::Draining,
        ResetReason::Overload => Refusal::Capacity,
        ResetReason::Protocol => Refusal::TunnelProtocol,
        ResetReason::Reset | ResetReason::Other(_) => return None,
    })
}

/// Whether the endpoint could not be reached at all, so that another one may do.
pub(super) fn is_unreached(refusal: Refusal) -> bool {
    matches!(
        refusal,
        Refusal::DialTimeout
            | Refusal::DialRefused
            | Refusal::DialUnreachable
            | Refusal::HandshakeFailed
            | Refusal::HandshakeTimeout
            | Refusal::PeerIdentityMismatch
            | Refusal::TunnelProtocol
    )
}

/// What a refusal by the traffic state is called.
pub(super) fn rejection_refusal(rejection: Rejection) -> Refusal {
    match rejection {
        Rejection::NoEndpoints | Rejection::AllTried => Refusal::NoEndpoint,
        Rejection::BreakerOpen => Refusal::BreakerOpen,
        Rejection::MaxRequests => Refusal::BreakerRequests,
        Rejection::MaxPending => Refusal::BreakerPending,
        Rejection::MaxConnections => Refusal::BreakerConnections,
        Rejection::TooManyBackends => Refusal::Capacity,
    }
}
