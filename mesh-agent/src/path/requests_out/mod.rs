//! Requests at the source: route, admit, pick, find the way, and — for a pod of this node — the destination's judgement
//! in the same pass. Implements the HTTP engines' [`Handler`]; each request is decided by one view from head to end.
//!
//! * `plan`: everything before the connection, one synchronous pass.
//! * `go`: the connection to the planned endpoint, or to another one.
//! * `copies`: what mirrors get.
//!
//! Breakers and balancing count here, where the choice is made. A request to a workload's own address is not routed. A
//! dial that failed sent nothing, so another endpoint is tried; anything later is tried again only as policy says.

mod copies;
mod go;
mod plan;

use std::{cell::RefCell, net::SocketAddr, pin::pin, rc::Rc, sync::Arc};

use bytes::{Bytes, BytesMut};
use http::StatusCode;
use mesh_api::{
    authz::{Permit, still_permits},
    backend::Backend,
    identity::SpiffeId,
    request::Request,
    resilience::{RetryOn, RetrySettings},
    route::RouteRule,
    view::View,
    workload::{Endpoint, Service},
};
use tokio::net::TcpStream;

use super::{
    judge::Denial,
    names,
    outbound::{Wanted, attributes},
    replies::{self, fault_refusal},
    requests_h2::Http2Targets,
    target::{Kind, TargetStream},
    way::Way,
};
use crate::{
    event::{ConnectionSecurity, Outcome, PartySet, Protocol, Refusal, RequestRecord},
    l7::{
        self, Attempt, Attempted, End, Facts, Fault, Handler, Limits, Reply, Target, Verdict, Version,
        headers::ClientCert,
    },
    pods::Pod,
    relay::{self, How},
    traffic::{Admission, ConnectionGuard, Picked, Report, RetryGuard},
    transport::Transport,
    tunnel::pool::H2StreamGuard,
    worker::{LocalView, Worker},
};

/// Idle connections that one source's connection keeps to applications of its node and to plain addresses.
const IDLE_MAX: usize = 4;
/// Endpoints that are tried for one attempt when they cannot be reached.
const ENDPOINTS_TRIED_MAX: usize = 3;

/// The requests of one source's connection.
pub struct RequestsOut {
    worker: Rc<Worker>,
    pod: Arc<Pod>,
    source: SocketAddr,
    original_destination: SocketAddr,
    asked: Asked,
    idle: RefCell<Vec<(SocketAddr, TargetStream)>>,
    http2: Http2Targets,
    /// What the last destination of this node was told of the source.
    client_cert: RefCell<Option<(SpiffeId, ClientCert)>>,
}

/// What requests are for.
enum Asked {
    /// What the source connected to.
    For(Wanted),
    /// The backend of a mirror: they are copies of requests that this rule took.
    Copies {
        rule: Arc<RouteRule>,
        backend: Arc<Backend>,
    },
}

/// What accompanies one request.
pub struct Exchange {
    record: RequestRecord,
    /// The destination's record, where the destination is on this node.
    twin: Option<RequestRecord>,
    plan: Option<Box<Plan>>,
    refusal: Option<Refusal>,
    failed: bool,
}

/// Where a request goes, and what is held while it is there.
struct Plan {
    view: LocalView,
    backend: Option<Arc<Backend>>,
    retry: Option<RetrySettings>,
    admission: Option<Admission>,
    picked: Option<Picked>,
    connection: Option<ConnectionGuard>,
    retrying: Option<RetryGuard>,
    stream: Option<H2StreamGuard>,
    endpoint: Endpoint,
    way: Way,
    permit: Option<Permit>,
    tried: Vec<SocketAddr>,
    /// What the backend's other endpoints on this node say to the request, asked with the head at hand.
    judged: Vec<(SocketAddr, Result<Permit, Denial>)>,
}

/// Serves the requests of a captured connection.
pub async fn serve(handler: Rc<RequestsOut>, stream: TcpStream, first: BytesMut, http2: bool) {
    let drain = handler.worker.shared.drain.clone();
    let source = Transport::from_tcp(stream, first);
    let limits = Limits::default();
    let served = if http2 {
        Box::pin(l7::h2::serve(source, handler, &limits, drain.started())).await
    } else {
        l7::h1::serve(source, handler, &limits, drain.last_requests()).await
    };
    if let Err(error) = served {
        tracing::debug!(error = &error as &dyn std::error::Error, "a source's connection ended");
    }
}

impl RequestsOut {
    /// For a connection of `pod` from `source`.
    pub fn new(
        worker: Rc<Worker>,
        pod: Arc<Pod>,
        source: SocketAddr,
        original_destination: SocketAddr,
        wanted: Wanted,
    ) -> RequestsOut {
        RequestsOut::asking(worker, pod, source, original_destination, Asked::For(wanted))
    }

    fn asking(
        worker: Rc<Worker>,
        pod: Arc<Pod>,
        source: SocketAddr,
        original_destination: SocketAddr,
        asked: Asked,
    ) -> RequestsOut {
        RequestsOut {
            worker,
            pod,
            source,
            original_destination,
            asked,
            idle: RefCell::default(),
            http2: Http2Targets::default(),
            client_cert: RefCell::default(),
        }
    }

    fn service(&self) -> Option<&Arc<Service>> {
        match &self.asked {
            Asked::For(Wanted::Service(port)) => Some(&port.service),
            Asked::For(Wanted::Workload(_) | Wanted::Outside(_)) => None,
            Asked::Copies { backend, .. } => Some(&backend.service),
        }
    }

    fn parties(&self, destination: Option<&Endpoint>, security: ConnectionSecurity, twin: bool) -> Arc<PartySet> {
        let base = if twin {
            names::Ends::at_destination()
        } else {
            names::Ends::at_source()
        };
        let source = self.pod.workload();
        let ends = names::Ends {
            source: Some(&source),
            destination: destination.map(|endpoint| &endpoint.workload),
            service: self.service(),
            security,
            ..base
        };
        ends.parties(&self.worker.shared.events)
    }

    /// What a destination of this node is told of the source; made once for the requests to one destination.
    fn client_cert(&self, destination: &SpiffeId) -> ClientCert {
        let mut known = self.client_cert.borrow_mut();
        match &*known {
            Some((to, cert)) if to == destination => cert.clone(),
            _ => {
                let cert = names::client_cert(destination, self.pod.identity());
                *known = Some((destination.clone(), cert.clone()));
                cert
            }
        }
    }

    fn record(
        &self,
        view: &View,
        request: &dyn Request,
        facts: Facts,
        endpoint: Option<&Endpoint>,
        security: ConnectionSecurity,
    ) -> RequestRecord {
        let protocol = match facts.version {
            _ if facts.grpc => Protocol::Grpc,
            Version::Http2 => Protocol::Http2,
            Version::Http10 | Version::Http11 => Protocol::Http1,
        };
        let parties = self.parties(endpoint, security, false);
        let mut record = self.worker.shared.events.request(parties, protocol);
        names::fill(&mut record, view, request, self.source, self.original_destination);
        record.set_workloads(Some(&self.pod.workload()), endpoint.map(|endpoint| &endpoint.workload));
        if let Some(endpoint) = endpoint {
            record.set_endpoint(endpoint.address);
        }
        record
    }
}

impl Handler for RequestsOut {
    type Source = Transport;
    type Target = TargetStream;
    type Exchange = Exchange;

    async fn decide(&self, request: &dyn Request, facts: Facts) -> Verdict<Exchange> {
        self.plan(request, facts)
    }

    async fn connect(&self, exchange: &mut Exchange, attempt: Attempt) -> Result<Target<TargetStream>, Reply> {
        self.go(exchange, attempt, async |this, plan, fresh| {
            this.dial(plan, fresh).await
        })
        .await
    }

    async fn connect_h2(
        &self,
        exchange: &mut Exchange,
        attempt: Attempt,
    ) -> Result<::h2::client::SendRequest<Bytes>, Reply> {
        self.go(exchange, attempt, async |this, plan, fresh| {
            this.dial_h2(plan, fresh).await
        })
        .await
    }

    fn release(&self, exchange: &mut Exchange, wire: TargetStream) {
        match wire.into_kind() {
            Some(Kind::Tunnel(tunnel)) => tunnel.release(),
            Some(kind @ (Kind::App(_) | Kind::Plain(_))) => {
                if let Some(plan) = &exchange.plan {
                    let mut idle = self.idle.borrow_mut();
                    if idle.len() >= IDLE_MAX {
                        idle.remove(0);
                    }
                    idle.push((plan.endpoint.address, TargetStream::new(kind)));
                }
            }
            Some(Kind::Flow(_)) | None => {}
        }
    }

    fn again(&self, exchange: &mut Exchange, attempted: Attempted, retries: u32) -> bool {
        let now = self.worker.now();
        let Some(plan) = &mut exchange.plan else { return false };
        if let Attempted::Undelivered(_) = attempted
            && self.may_go_elsewhere(plan)
        {
            // As if it had not been reached from here.
            if let Some(picked) = plan.picked.take() {
                picked.report(Report::Failure, now);
            }
            return true;
        }
        let (Some(retry), Some(admission)) = (&plan.retry, &plan.admission) else {
            return false;
        };
        let wanted = retry.on.iter().any(|on| match attempted {
            Attempted::Status(status) => on.matches_status(status.as_u16()),
            Attempted::Undelivered(status) => *on == RetryOn::ConnectFailure || on.matches_status(status.as_u16()),
            Attempted::Failed(Fault::StreamRefused) => matches!(on, RetryOn::RefusedStream | RetryOn::Reset),
            Attempted::Failed(Fault::TargetClosed) => matches!(on, RetryOn::Reset),
            Attempted::Failed(Fault::AttemptTimeout) => matches!(on, RetryOn::Reset | RetryOn::GatewayError),
            Attempted::Failed(_) => false,
        });
        if !wanted || retries >= retry.attempts {
            return false;
        }
        let Some(guard) = admission.retry(retry.budget_percent) else {
            return false;
        };
        plan.retrying = Some(guard);
        if let Some(picked) = plan.picked.take() {
            picked.report(Report::Failure, now);
        }
        // For the destination this attempt was a request of its own, as it is on another node.
        if let Some(mut twin) = exchange.twin.take() {
            match attempted {
                Attempted::Status(status) | Attempted::Undelivered(status) => {
                    twin.set_status(status.as_u16());
                    twin.close(Outcome::Served);
                }
                Attempted::Failed(fault) => twin.close(Outcome::Refused(fault_refusal(fault))),
            }
        }
        true
    }

    fn responded(&self, exchange: &mut Exchange, status: StatusCode) {
        exchange.failed = status.is_server_error();
    }

    async fn relay(&self, exchange: &mut Exchange, source: Transport, target: TargetStream) -> (u64, u64) {
        let attributes = attributes(&self.pod, self.source);
        let plan = exchange.plan.as_deref();
        let lost = |view: &View| match plan.map(|plan| (&plan.way, &plan.endpoint)) {
            Some((Way::Local(pod, policy), endpoint)) => {
                let now = view.inbound(pod.name(), endpoint.address.port());
                !still_permits(&policy.access, &now, &attributes)
            }
            // The destination's agent judges.
            _ => false,
        };
        let stop = pin!(super::outbound::stop(&self.worker, lost));
        let idle = self.worker.shared.config.idle_timeout;
        let end = relay::relay(source, target, &relay::Counters::default(), idle, stop).await;
        if end.how == How::PermitLost {
            exchange.refusal = Some(Refusal::PermitLost);
        }
        (end.sent, end.received)
    }

    fn answer(&self, fault: Fault) -> Reply {
        replies::fault(fault)
    }

    fn finish(&self, exchange: Exchange, end: End) {
        let Exchange {
            record,
            twin,
            plan,
            refusal,
            failed,
        } = exchange;
        if let Some(picked) = plan.and_then(|plan| plan.picked) {
            let fault = matches!(
                end.fault,
                Some(
                    Fault::TargetClosed
                        | Fault::ResponseCut
                        | Fault::Response(_)
                        | Fault::RequestTimeout
                        | Fault::AttemptTimeout
                )
            );
            let report = if failed || fault {
                Report::Failure
            } else {
                Report::Success
            };
            picked.report(report, self.worker.now());
        }
        let outcome = match (refusal, end.fault) {
            (Some(refusal), _) => Outcome::Refused(refusal),
            (None, Some(fault)) => Outcome::Refused(fault_refusal(fault)),
            (None, None) => Outcome::Served,
        };
        if let Some(twin) = twin {
            names::close(twin, &end, outcome);
        }
        names::close(record, &end, outcome);
    }

    fn refused(&self, fault: Fault, status: Option<StatusCode>) {
        let parties = self.parties(None, ConnectionSecurity::Unknown, false);
        let mut record = self.worker.shared.events.request(parties, Protocol::Http1);
        if let Some(status) = status {
            record.set_status(status.as_u16());
        }
        record.close(Outcome::Refused(fault_refusal(fault)));
    }
}
