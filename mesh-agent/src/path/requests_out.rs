//! Requests at the source: route, admit, pick, find the way, and — for a pod of this node — the destination's judgement
//! in the same pass. Implements the HTTP engines' [`Handler`]; each request is decided by one view from head to end.
//!
//! Breakers and balancing count here, where the choice is made. A request to a workload's own address is not routed. A
//! dial that failed sent nothing, so another endpoint is tried; anything later is tried again only as policy says.

use std::{cell::RefCell, net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http::StatusCode;
use mesh_api::{
    authz::{Permit, still_permits},
    backend::Backend,
    request::Request,
    resilience::{RetryOn, RetrySettings},
    route::{RouteAction, RouteChoice, RouteRule, WeightedBackend, redirect_location, rewrite_path, select},
    view::{InboundPolicy, View},
    workload::{Endpoint, Service},
};
use tokio::net::TcpStream;

use super::{
    deliver, judge,
    judge::Denial,
    names,
    outbound::{Wanted, attributes, is_unreached, presented, rejection_refusal},
    replies::{self, fault_refusal},
    requests_h2::Http2Targets,
    target::{Kind, TargetStream},
    way::{self, Way},
};
use crate::{
    event::{ConnectionSecurity, Outcome, PartySet, Protocol, Refusal, RequestRecord},
    l7::{
        self, Attempt, Attempted, End, Facts, Fault, Forward, Handler, HeaderChanges, Limits, Reply, Standard, Target,
        Verdict, Version,
    },
    pods::Pod,
    relay::{self, How},
    traffic::{Admission, ConnectionGuard, Picked, Report, RetryGuard},
    transport::Transport,
    tunnel::pool::H2StreamGuard,
    worker::Worker,
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
    wanted: Wanted,
    idle: RefCell<Vec<(SocketAddr, TargetStream)>>,
    http2: Http2Targets,
    parties: names::Cache,
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
    view: Arc<View>,
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
    /// The permits of the backend's other endpoints on this node, judged with the head at hand.
    permits: Vec<(SocketAddr, Permit)>,
}

/// Serves the requests of a captured connection.
pub async fn serve(handler: RequestsOut, stream: TcpStream, first: BytesMut, http2: bool) {
    let handler = Rc::new(handler);
    let drain = handler.worker.shared.drain.clone();
    let source = Transport::from_tcp(stream, first);
    let limits = Limits::default();
    let served = if http2 {
        l7::h2::serve(source, handler, &limits, drain.started()).await
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
        RequestsOut {
            worker,
            pod,
            source,
            original_destination,
            wanted,
            idle: RefCell::default(),
            http2: Http2Targets::default(),
            parties: names::Cache::default(),
        }
    }

    fn service(&self) -> Option<&Service> {
        match &self.wanted {
            Wanted::Service(port) => Some(&port.service),
            _ => None,
        }
    }

    fn parties(&self, destination: Option<&Endpoint>, security: ConnectionSecurity, twin: bool) -> Arc<PartySet> {
        let base = if twin {
            names::Ends::at_destination()
        } else {
            names::Ends::at_source()
        };
        let key = (
            destination.map(|endpoint| endpoint.workload.name.clone()),
            security,
            base.reporter,
        );
        self.parties.get(key, || {
            let source = self.pod.workload();
            let ends = names::Ends {
                source: Some(&source),
                destination: destination.map(|endpoint| &endpoint.workload),
                service: self.service(),
                security,
                ..base
            };
            self.worker.shared.events.parties(ends.parties())
        })
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

    fn reply(
        &self,
        view: &View,
        request: &dyn Request,
        mut record: RequestRecord,
        mut twin: Option<RequestRecord>,
        denial: Denial,
    ) -> Verdict<Exchange> {
        for record in twin.iter_mut().chain([&mut record]) {
            record.set_rule(denial.rule.clone(), view.revision());
            if self.worker.shared.events.logs_access() {
                names::trace(record, request, &Standard::default());
            }
        }
        let reply = replies::refusal(denial.refusal, denial.retry_after);
        Verdict::Reply(
            reply,
            Exchange {
                record,
                twin,
                plan: None,
                refusal: Some(denial.refusal),
                failed: false,
            },
        )
    }

    /// Judges a request for a pod of this node.
    fn judge(&self, way: &Way, request: &dyn Request) -> Result<Option<Permit>, Denial> {
        match way {
            Way::Local(_, policy) => self.judge_local(policy, request).map(Some),
            Way::Tunnel(_) | Way::Plain => Ok(None),
        }
    }

    fn judge_local(&self, policy: &InboundPolicy, request: &dyn Request) -> Result<Permit, Denial> {
        let source = attributes(&self.pod, self.source);
        judge::request(policy, &source, request, &self.worker.shared.traffic, self.worker.now())
    }

    /// Everything before the connection: one synchronous pass over one view.
    fn plan(&self, request: &dyn Request, facts: Facts) -> Verdict<Exchange> {
        let view = self.worker.shared.view.load();
        let nowhere = |denial| {
            self.reply(
                &view,
                request,
                self.record(&view, request, facts, None, ConnectionSecurity::Unknown),
                None,
                denial,
            )
        };
        // The newest view counts, not that of the connection's first request.
        let port = match &self.wanted {
            Wanted::Service(port) => match view.service(&port.service.name).and_then(|s| s.port(port.port.port)) {
                Some(port) => Some(port.clone()),
                None => return nowhere(Denial::of(Refusal::NoEndpoint)),
            },
            Wanted::Workload(_) | Wanted::Outside(_) => None,
        };
        let mut rule: Option<Arc<RouteRule>> = None;
        let mut share: Option<&WeightedBackend> = None;
        let mut backend = port.as_ref().map(|port| port.backend.clone());
        if let Some(table) = port.as_ref().and_then(|port| port.routes.as_ref()) {
            match select(table, &self.pod.name().namespace, request) {
                RouteChoice::NoMatch => return nowhere(Denial::of(Refusal::NoRoute)),
                RouteChoice::Rule(found) => {
                    rule = Some(found.clone());
                    if let RouteAction::Redirect(redirect) = &found.action {
                        let location = redirect_location(redirect, request, self.original_destination.port(), "http");
                        let mut record = self.record(&view, request, facts, None, ConnectionSecurity::Unknown);
                        record.set_route(found.id.clone());
                        let reply = replies::redirect(redirect.status, location);
                        let exchange = Exchange {
                            record,
                            twin: None,
                            plan: None,
                            refusal: None,
                            failed: false,
                        };
                        return Verdict::Reply(reply, exchange);
                    }
                }
            }
        }
        if let Some(rule) = &rule {
            let denied = |refusal| Denial {
                rule: rule.id.clone(),
                ..Denial::of(refusal)
            };
            share = rule.pick(rand::random());
            match share.map(|share| &share.backend) {
                None => return nowhere(denied(Refusal::BadBackend)),
                Some(Err(bad)) => {
                    tracing::debug!(%bad, rule = %rule.id, "a share without a backend");
                    return nowhere(denied(Refusal::BadBackend));
                }
                Some(Ok(found)) => backend = Some(found.clone()),
            }
        }

        let (admission, picked, endpoint) = match (&backend, &self.wanted) {
            (Some(backend), _) => {
                let refused = |rejection| nowhere(Denial::of(rejection_refusal(rejection)));
                let admission = match self.worker.shared.traffic.admit(backend) {
                    Ok(admission) => {
                        let ipv6 = self.original_destination.is_ipv6();
                        admission.of_source(presented(&self.pod, self.source, ipv6).ip())
                    }
                    Err(rejection) => return refused(rejection),
                };
                let endpoints = backend.endpoints(self.original_destination.is_ipv6());
                match admission.pick(endpoints, &[], self.worker.now()) {
                    Ok(picked) => {
                        let endpoint = picked.endpoint.clone();
                        (Some(admission), Some(picked), endpoint)
                    }
                    Err(rejection) => return refused(rejection),
                }
            }
            (None, Wanted::Workload(endpoint)) => (None, None, endpoint.clone()),
            (None, Wanted::Service(_) | Wanted::Outside(_)) => return nowhere(Denial::of(Refusal::NoEndpoint)),
        };
        let way = way::find(&self.worker, &view, &self.pod, &endpoint);
        let security = way.as_ref().map_or(ConnectionSecurity::Unknown, Way::security);
        let mut record = self.record(&view, request, facts, Some(&endpoint), security);
        if let Some(rule) = &rule {
            record.set_route(rule.id.clone());
        }
        let way = match way {
            Ok(way) => way,
            Err(refusal) => return self.reply(&view, request, record, None, Denial::of(refusal)),
        };
        let permit = match self.judge(&way, request) {
            Ok(permit) => permit,
            Err(denial) => {
                if let Some(picked) = picked {
                    picked.report(Report::Success, self.worker.now());
                }
                let twin = record.beside(self.parties(Some(&endpoint), security, true));
                return self.reply(&view, request, record, Some(twin), denial);
            }
        };
        let mut forward = self.forward(request, rule.as_deref(), share, backend.as_deref());
        if let Way::Local(pod, _) = &way {
            forward.standard.client_cert = names::client_cert(pod.identity(), self.pod.identity());
        }
        if self.worker.shared.events.logs_access() {
            names::trace(&mut record, request, &forward.standard);
        }
        let settings = backend.as_ref().map(|backend| &backend.traffic);
        let retry = match (&rule, settings) {
            (Some(rule), Some(settings)) => rule.retry(settings).cloned(),
            (None, Some(settings)) => settings.retry.clone(),
            (_, None) => None,
        };
        let plan = Plan {
            permits: self.other_permits(&view, backend.as_deref(), endpoint.address, request),
            view,
            backend,
            retry,
            admission,
            picked,
            connection: None,
            retrying: None,
            stream: None,
            endpoint,
            way,
            permit,
            tried: Vec::new(),
        };
        let exchange = Exchange {
            record,
            twin: None,
            plan: Some(Box::new(plan)),
            refusal: None,
            failed: false,
        };
        Verdict::Forward(forward, exchange)
    }

    /// The endpoints of this node that would also let the request in. A second endpoint is chosen when the head is
    /// gone, so all are asked now; tokens are taken once, by the first.
    fn other_permits(
        &self,
        view: &View,
        backend: Option<&Backend>,
        first: SocketAddr,
        request: &dyn Request,
    ) -> Vec<(SocketAddr, Permit)> {
        let endpoints = backend
            .map(|backend| backend.endpoints(self.original_destination.is_ipv6()))
            .unwrap_or_default();
        let here = |endpoint: &&Endpoint| {
            endpoint.address != first && endpoint.workload.enrolled && endpoint.workload.node == self.worker.shared.node
        };
        let source = attributes(&self.pod, self.source);
        endpoints
            .iter()
            .filter(here)
            .filter_map(|endpoint| {
                let policy = view.inbound(&endpoint.workload.name, endpoint.address.port());
                Some((endpoint.address, judge::access(&policy, &source, request).ok()?))
            })
            .collect()
    }

    fn forward(
        &self,
        request: &dyn Request,
        rule: Option<&RouteRule>,
        share: Option<&WeightedBackend>,
        backend: Option<&Backend>,
    ) -> Forward {
        let source = presented(&self.pod, self.source, self.original_destination.is_ipv6());
        let mut forward = Forward {
            standard: Standard::at_source(request, source.ip()),
            ..Forward::default()
        };
        if let Some(rule) = rule {
            forward.request_headers = HeaderChanges::from(&rule.request_headers);
            forward.response_headers = HeaderChanges::default();
            if let Some(share) = share {
                forward
                    .request_headers
                    .extend(&HeaderChanges::from(&share.request_headers));
                forward
                    .response_headers
                    .extend(&HeaderChanges::from(&share.response_headers));
            }
            forward
                .response_headers
                .extend(&HeaderChanges::from(&rule.response_headers));
            if let Some(rewrite) = &rule.rewrite {
                forward.authority = rewrite.hostname.as_deref().map(str::to_owned);
                if rewrite.path.is_some() {
                    let path = rewrite_path(rewrite, &rule.matched_prefix, request.path());
                    forward.target = Some(match request.query() {
                        Some(query) => format!("{path}?{query}"),
                        None => path.into_owned(),
                    });
                }
            }
        }
        if let Some(backend) = backend {
            let settings = &backend.traffic;
            (forward.request_timeout, forward.attempt_timeout) = match rule {
                Some(rule) => (rule.timeout(settings), rule.try_timeout(settings)),
                None => {
                    let per_try = settings.retry.as_ref().and_then(|retry| retry.per_try_timeout);
                    (settings.timeouts.request, per_try)
                }
            };
        }
        forward
    }

    /// Goes to the planned endpoint, or to another one if it cannot be reached.
    async fn go<T>(
        &self,
        exchange: &mut Exchange,
        attempt: Attempt,
        mut dial: impl AsyncFnMut(&RequestsOut, &mut Plan, bool) -> Result<T, Refusal>,
    ) -> Result<T, Reply> {
        let Exchange {
            record,
            plan: Some(plan),
            refusal,
            twin,
            ..
        } = exchange
        else {
            return Err(replies::refusal(Refusal::Internal, None));
        };
        // What was not sent says nothing of the endpoint: a pick that is still held counts neither way.
        let mut give_up = |denial: Denial, plan: &mut Plan| {
            *refusal = Some(denial.refusal);
            plan.picked = None;
            Err(replies::refusal(denial.refusal, denial.retry_after))
        };
        if let Attempt::Retry(_) = attempt {
            if let Err(denial) = self.next_endpoint(plan, true) {
                return give_up(denial, plan);
            }
            self.name_endpoint(record, plan);
        }
        if plan.connection.is_none()
            && let Some(admission) = &plan.admission
        {
            match admission.connection().await {
                Ok(guard) => plan.connection = Some(guard),
                Err(rejection) => return give_up(Denial::of(rejection_refusal(rejection)), plan),
            }
        }
        loop {
            record.attempt();
            if let (Way::Local(..), Some(permit), None) = (&plan.way, &plan.permit, &twin) {
                let parties = self.parties(Some(&plan.endpoint), ConnectionSecurity::SameNode, true);
                let mut beside = record.beside(parties);
                beside.set_rule(permit.rule().clone(), permit.revision());
                *twin = Some(beside);
            }
            match dial(self, plan, attempt == Attempt::Fresh).await {
                Ok(target) => {
                    if let Some(connection) = &mut plan.connection {
                        connection.connected();
                    }
                    return Ok(target);
                }
                Err(failed) => {
                    if let Some(twin) = twin.take() {
                        twin.close(Outcome::Refused(failed));
                    }
                    let last = !is_unreached(failed) || plan.backend.is_none();
                    if is_unreached(failed)
                        && let Some(picked) = plan.picked.take()
                    {
                        picked.report(Report::Failure, self.worker.now());
                    }
                    let spent = plan.tried.len() + 1 >= ENDPOINTS_TRIED_MAX;
                    if last || spent || self.next_endpoint(plan, false).is_err() {
                        return give_up(Denial::of(failed), plan);
                    }
                    self.name_endpoint(record, plan);
                }
            }
        }
    }

    /// Tells the record that the request goes to another endpoint than was planned.
    fn name_endpoint(&self, record: &mut RequestRecord, plan: &Plan) {
        let security = plan.way.security();
        record.set_parties(self.parties(Some(&plan.endpoint), security, false));
        record.set_workloads(Some(&self.pod.workload()), Some(&plan.endpoint.workload));
        record.set_endpoint(plan.endpoint.address);
    }

    /// Whether a peer's word that it delivered nothing leaves another endpoint to try, without any policy.
    fn may_go_elsewhere(&self, plan: &Plan) -> bool {
        let endpoints = |backend: &Arc<Backend>| backend.endpoints(self.original_destination.is_ipv6()).len();
        let tried = plan.tried.len() + 1;
        matches!(plan.way, Way::Tunnel(_))
            && tried < ENDPOINTS_TRIED_MAX
            && plan.backend.as_ref().is_some_and(|backend| tried < endpoints(backend))
    }

    /// Picks an endpoint that was not tried, and judges the request anew if it is a pod of this node. Once all were
    /// tried, a retry may come `back` to one of them; whoever merely could not be reached is not dialed over and over.
    fn next_endpoint(&self, plan: &mut Plan, back: bool) -> Result<(), Denial> {
        let (Some(backend), Some(admission)) = (&plan.backend, &plan.admission) else {
            // A workload's own address: there is no other.
            return Ok(());
        };
        if !plan.tried.contains(&plan.endpoint.address) {
            plan.tried.push(plan.endpoint.address);
        }
        let endpoints = backend.endpoints(self.original_destination.is_ipv6());
        let tried = if back && plan.tried.len() >= endpoints.len() {
            &[][..]
        } else {
            &plan.tried
        };
        let picked = admission.pick(endpoints, tried, self.worker.now());
        let picked = picked.map_err(|rejection| Denial::of(rejection_refusal(rejection)))?;
        plan.endpoint = picked.endpoint.clone();
        plan.picked = Some(picked);
        plan.way = way::find(&self.worker, &plan.view, &self.pod, &plan.endpoint).map_err(Denial::of)?;
        if let Way::Local(..) = plan.way {
            let permit = plan
                .permits
                .iter()
                .find(|(address, _)| *address == plan.endpoint.address);
            // Without one the endpoint's own policy refused the request; the first one keeps the permit it has.
            if let Some((_, permit)) = permit {
                plan.permit = Some(permit.clone());
            } else if plan.tried.first() != Some(&plan.endpoint.address) {
                return Err(Denial::of(Refusal::AccessDeniedRequest));
            }
        }
        Ok(())
    }

    fn timeout(&self, plan: &Plan) -> Duration {
        plan.backend
            .as_ref()
            .map_or(self.worker.shared.config.dial_timeout, |b| b.traffic.timeouts.connect)
    }

    /// An idle connection to the address which is as good as new.
    fn take_idle(&self, address: SocketAddr) -> Option<TargetStream> {
        let mut idle = self.idle.borrow_mut();
        while let Some(at) = idle.iter().position(|(to, _)| *to == address) {
            let (_, stream) = idle.swap_remove(at);
            if stream.is_quiet() {
                return Some(stream);
            }
        }
        None
    }

    async fn dial(&self, plan: &mut Plan, fresh: bool) -> Result<Target<TargetStream>, Refusal> {
        let address = plan.endpoint.address;
        if let Way::Tunnel(key) = &plan.way {
            self.worker.credential(self.pod.identity()).await;
            let tunnel = self.worker.tunnels.http1(key, &*self.pod, fresh).await;
            let tunnel = tunnel.map_err(|error| way::tunnel_refusal(&error))?;
            return Ok(Target {
                reused: tunnel.is_reused(),
                wire: TargetStream::new(Kind::Tunnel(tunnel)),
            });
        }
        if fresh {
            self.idle.borrow_mut().retain(|(to, _)| *to != address);
        } else if let Some(wire) = self.take_idle(address) {
            return Ok(Target { wire, reused: true });
        }
        Ok(Target {
            wire: self.dial_direct(plan).await?,
            reused: false,
        })
    }

    /// A new connection to an application of this node, or to a plain address.
    async fn dial_direct(&self, plan: &Plan) -> Result<TargetStream, Refusal> {
        let (address, timeout) = (plan.endpoint.address, self.timeout(plan));
        match (&plan.way, &plan.permit) {
            (Way::Local(pod, _), Some(permit)) => {
                let shown = presented(&self.pod, self.source, address.is_ipv6());
                let kernel = &self.worker.shared.kernel;
                let app = deliver::connect(kernel, pod, address, shown, timeout, permit).await?;
                Ok(TargetStream::new(Kind::App(app)))
            }
            (Way::Local(..), None) => Err(Refusal::AccessDeniedRequest),
            (Way::Plain | Way::Tunnel(_), _) => {
                let stream = way::dial_plain(&self.pod, address, timeout).await?;
                Ok(TargetStream::new(Kind::Plain(stream)))
            }
        }
    }

    async fn dial_h2(&self, plan: &mut Plan, fresh: bool) -> Result<::h2::client::SendRequest<Bytes>, Refusal> {
        let address = plan.endpoint.address;
        if let Way::Tunnel(key) = &plan.way {
            self.worker.credential(self.pod.identity()).await;
            let lease = self.worker.tunnels.h2(key, &*self.pod).await;
            let lease = lease.map_err(|error| way::tunnel_refusal(&error))?;
            plan.stream = Some(lease.stream);
            return Ok(lease.send);
        }
        if fresh {
            self.http2.forget(address);
        }
        if let Some(send) = self.http2.get(address).await {
            return Ok(send);
        }
        let stream = self.dial_direct(plan).await?;
        self.http2.start(address, stream, &self.worker.shared.drain).await
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
        let Some(guard) = admission.retry() else { return false };
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
        let stop = super::outbound::stop(&self.worker, lost);
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
