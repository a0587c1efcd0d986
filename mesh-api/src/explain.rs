//! Explaining: every decision that a request or flow would meet, asked of a view and told in words.
//!
//! It calls the same functions as the agents, so that it cannot disagree with them; what only traffic can know (a
//! bucket's tokens, a breaker's state, which endpoint the balancer takes) is told as what applies, not as what will
//! happen. Used by `mesh-ctl explain`.

use std::{borrow::Cow, net::SocketAddr, sync::Arc};

use serde::Serialize;

use crate::{
    authz::{self, Decision, Denied, InboundPolicy, Permit, SourceAttributes},
    backend::Backend,
    identity::SpiffeId,
    policy::MtlsMode,
    request::{Request, host_of},
    resilience::TrafficSettings,
    route::{self, FlowChoice, FlowTable, HeaderEdit, Hello, RouteAction, RouteChoice, RouteRule, WeightedBackend},
    view::{Destination, ServicePortView, View},
    workload::{AppProtocol, Endpoint, ObjectName, Workload},
};

/// A request that was written down rather than received.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlainRequest {
    /// The method.
    pub method: String,
    /// The path without the query.
    pub path: String,
    /// The query without the question mark.
    pub query: Option<String>,
    /// The authority.
    pub authority: Option<String>,
    /// Headers, names in lower case.
    pub headers: Vec<(String, String)>,
}

/// What would happen, step by step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// The view's revision.
    pub revision: u64,
    /// What it comes to.
    pub verdict: Verdict,
    /// The decisions in the order in which they are made.
    pub steps: Vec<Step>,
}

/// What it comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It reaches a workload.
    Served,
    /// It is answered on the way: a redirect.
    Answered,
    /// It is refused.
    Refused,
    /// It depends on which backend or endpoint it is sent to.
    Depends,
    /// It is none of the mesh's business.
    Untouched,
}

/// One decision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// Where on the way: `source`, `destination`, `route`, `traffic`, `transport`, `authorize`, `limit`.
    pub stage: &'static str,
    /// The rule that decided, if a rule did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// What was decided, in words.
    pub outcome: String,
}

impl PlainRequest {
    /// A request for a target such as `/path?query`.
    pub fn new(method: &str, target: &str, authority: &str) -> PlainRequest {
        let (path, query) = match target.split_once('?') {
            Some((path, query)) => (path, Some(query.to_owned())),
            None => (target, None),
        };
        PlainRequest {
            method: method.to_owned(),
            path: path.to_owned(),
            query,
            authority: Some(authority.to_owned()).filter(|text| !text.is_empty()),
            headers: Vec::new(),
        }
    }

    /// The request with one more header.
    pub fn with_header(mut self, name: &str, value: &str) -> PlainRequest {
        self.headers.push((name.to_ascii_lowercase(), value.to_owned()));
        self
    }

    /// The request as it leaves a rule for a backend.
    fn rewritten(&self, rule: &RouteRule, backend: &WeightedBackend) -> PlainRequest {
        let mut request = self.clone();
        for edit in [&rule.request_headers, &backend.request_headers] {
            request.edit(edit);
        }
        if let Some(rewrite) = &rule.rewrite {
            request.path = route::rewrite_path(rewrite, &rule.matched_prefix, &self.path).into_owned();
            request.authority = rewrite.hostname.as_deref().map(str::to_owned).or(request.authority);
        }
        request
    }

    fn edit(&mut self, edit: &HeaderEdit) {
        for (name, value) in &edit.set {
            self.headers.retain(|(n, _)| n != name);
            self.headers.push((name.clone(), value.clone()));
        }
        self.headers.extend(edit.add.iter().cloned());
        self.headers.retain(|(name, _)| !edit.remove.contains(name));
    }
}

impl Request for PlainRequest {
    fn method(&self) -> &str {
        &self.method
    }

    fn path(&self) -> &str {
        &self.path
    }

    fn query(&self) -> Option<&str> {
        self.query.as_deref()
    }

    fn authority(&self) -> Option<&str> {
        self.authority.as_deref()
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, value)| value.as_str())
    }

    fn each_header_value(&self, name: &str, tell: &mut dyn FnMut(&str)) {
        self.headers
            .iter()
            .filter(|(n, _)| n == name)
            .for_each(|(_, value)| tell(value));
    }
}

/// What would happen to a request (or, without one, to a flow of opaque bytes) from a workload to an address.
pub fn explain(
    view: &View,
    source: &ObjectName,
    destination: SocketAddr,
    request: Option<&PlainRequest>,
) -> Explanation {
    let mut story = Story {
        view,
        ipv6: destination.ip().to_canonical().is_ipv6(),
        steps: Vec::new(),
        ends: Vec::new(),
    };
    match view.workload(source) {
        Some(source) => story.follow(source, destination, request),
        None => {
            story.step("source", None, format!("workload {source} is not known"));
            story.ends.push(Verdict::Refused);
        }
    }
    Explanation {
        revision: view.revision().0,
        verdict: verdict_of(&story.ends),
        steps: story.steps,
    }
}

fn verdict_of(ends: &[Verdict]) -> Verdict {
    match ends {
        [] => Verdict::Refused,
        [first, rest @ ..] if rest.iter().all(|end| end == first) => *first,
        _ => Verdict::Depends,
    }
}

/// The steps so far, and every end that was found.
struct Story<'a> {
    view: &'a View,
    ipv6: bool,
    steps: Vec<Step>,
    ends: Vec<Verdict>,
}

impl Story<'_> {
    fn step(&mut self, stage: &'static str, rule: Option<&str>, outcome: String) {
        self.steps.push(Step {
            stage,
            rule: rule.map(str::to_owned),
            outcome,
        });
    }

    fn follow(&mut self, source: &Workload, address: SocketAddr, request: Option<&PlainRequest>) {
        let enrolment = if source.enrolled { "enrolled" } else { "not enrolled" };
        let words = format!(
            "workload {} is {}, {enrolment}, on node {}",
            source.name, source.identity, source.node
        );
        self.step("source", None, words);
        if !source.enrolled {
            self.step(
                "source",
                None,
                "its connections are not captured: no route or balancing applies".to_owned(),
            );
        }
        match self.view.destination(address) {
            Destination::ServicePort(port) => self.follow_service(source, &port, request),
            Destination::Workload(endpoint) => {
                let words = format!("{address} is workload {}: no route applies", endpoint.workload.name);
                self.step("destination", None, words);
                let end = self.follow_endpoint(source, &endpoint, request);
                self.ends.push(end);
            }
            Destination::NoPort(service) => {
                let words = format!(
                    "service {} has no port {}: the connection is refused",
                    service.name,
                    address.port()
                );
                self.step("destination", None, words);
                self.ends.push(Verdict::Refused);
            }
            Destination::Outside => {
                self.step(
                    "destination",
                    None,
                    format!("{address} is outside the mesh: passed on as it is"),
                );
                self.ends.push(Verdict::Untouched);
            }
        }
    }

    fn follow_service(&mut self, source: &Workload, port: &ServicePortView, request: Option<&PlainRequest>) {
        let name = &port.service.name;
        let namespace = &*source.name.namespace;
        let protocol = port.protocol_for(namespace);
        let words = format!("service {name} port {} ({})", port.port.port, protocol.words());
        self.step("destination", None, words);
        let opaque = matches!(protocol, AppProtocol::Tcp | AppProtocol::Tls);
        let (Some(request), false) = (request, opaque) else {
            let flows = port.flows.as_deref().filter(|flows| flows.has_routes_for(namespace));
            if let Some(flows) = flows {
                return self.follow_flow(source, flows, request);
            }
            if port.routes.is_some() {
                self.step(
                    "route",
                    None,
                    "an opaque flow has no requests: routes do not apply".to_owned(),
                );
            }
            self.follow_backend(source, &port.backend, None);
            return;
        };
        let Some(table) = &port.routes else {
            self.step(
                "route",
                None,
                "the service has no routes: it is its own backend".to_owned(),
            );
            self.follow_backend(source, &port.backend, Some(request));
            return;
        };
        match route::select(table, &source.name.namespace, request) {
            RouteChoice::NoMatch => {
                self.step("route", None, "the service has routes and none matches: 404".to_owned());
                self.ends.push(Verdict::Refused);
            }
            RouteChoice::Rule(rule) => self.follow_rule(source, port, rule, request),
        }
    }

    /// A connection that carries no requests. One for a request is taken to ask for its host by name, where that matters.
    fn follow_flow(&mut self, source: &Workload, flows: &FlowTable, request: Option<&PlainRequest>) {
        let namespace = &*source.name.namespace;
        let host = request.and_then(|request| request.authority.as_deref()).map(host_of);
        let hello = match host.filter(|_| flows.asks_for_names(namespace)) {
            Some(host) => Hello::Name(host),
            None => Hello::NotTls,
        };
        let rule = match route::select_flow(flows, namespace, hello) {
            FlowChoice::Rule(rule) => rule,
            FlowChoice::NoMatch | FlowChoice::Unrouted => {
                let words = "the port has routes for connections and none takes this one: it is reset";
                self.step("route", None, words.to_owned());
                return self.ends.push(Verdict::Refused);
            }
        };
        let id = Some(rule.id.as_str());
        let total: u64 = rule.backends.iter().map(|backend| u64::from(backend.weight)).sum();
        if total == 0 {
            self.step("route", id, "the rule has no backend with a weight: reset".to_owned());
            return self.ends.push(Verdict::Refused);
        }
        for weighted in rule.backends.iter().filter(|backend| backend.weight > 0) {
            let share = format!("{} of {total}", weighted.weight);
            match &weighted.backend {
                Ok(backend) => {
                    self.step("route", id, format!("{share} connections to {}", backend.key));
                    self.follow_backend(source, backend, None);
                }
                Err(bad) => {
                    self.step("route", id, format!("{share} connections are reset: {bad}"));
                    self.ends.push(Verdict::Refused);
                }
            }
        }
    }

    fn follow_rule(
        &mut self,
        source: &Workload,
        port: &ServicePortView,
        rule: &Arc<RouteRule>,
        request: &PlainRequest,
    ) {
        let id = rule.id.as_str();
        let backends = match &rule.action {
            RouteAction::Redirect(spec) => {
                let location = route::redirect_location(spec, request, port.port.port, "http");
                self.step(
                    "route",
                    Some(id),
                    format!("answered with {} to {location}", spec.status),
                );
                self.ends.push(Verdict::Answered);
                return;
            }
            RouteAction::Forward(backends) => backends,
        };
        let total: u64 = backends.iter().map(|backend| u64::from(backend.weight)).sum();
        if total == 0 {
            self.step(
                "route",
                Some(id),
                "the rule has no backend with a weight: 500".to_owned(),
            );
            self.ends.push(Verdict::Refused);
            return;
        }
        for mirror in &rule.mirrors {
            let share = format!("{} of {} requests", mirror.numerator, mirror.denominator);
            let words = match &mirror.backend {
                Ok(backend) => format!("{share} are copied to {}", backend.key),
                Err(bad) => format!("no copies: {bad}"),
            };
            self.step("route", Some(id), words);
        }
        for weighted in backends.iter().filter(|backend| backend.weight > 0) {
            let share = format!("{} of {total}", weighted.weight);
            match &weighted.backend {
                Ok(backend) => {
                    self.step("route", Some(id), format!("{share} to {}", backend.key));
                    let rewritten = request.rewritten(rule, weighted);
                    if rewritten != *request {
                        let host = rewritten.authority.as_deref().unwrap_or_default();
                        let words = format!("sent as {} {} to {host:?}", rewritten.method, rewritten.path);
                        self.step("route", Some(id), words);
                    }
                    if let Some(timeout) = rule.timeout(&backend.traffic) {
                        self.step(
                            "route",
                            Some(id),
                            format!("at most {timeout:?} until the response ends"),
                        );
                    }
                    self.follow_backend(source, backend, Some(&rewritten));
                }
                Err(bad) => {
                    self.step("route", Some(id), format!("{share} get 500: {bad}"));
                    self.ends.push(Verdict::Refused);
                }
            }
        }
    }

    fn follow_backend(&mut self, source: &Workload, backend: &Backend, request: Option<&PlainRequest>) {
        let endpoints = backend.endpoints(self.ipv6);
        let policies: Vec<&str> = backend.traffic.sources.iter().map(|rule| rule.as_str()).collect();
        let rule = (!policies.is_empty()).then(|| policies.join(", "));
        let words = format!(
            "{}: {}, {}",
            backend.key,
            traffic_words(&backend.traffic),
            endpoint_words(endpoints)
        );
        self.step("traffic", rule.as_deref(), words);
        if endpoints.is_empty() {
            self.ends.push(Verdict::Refused);
        }
        // Replicas mostly meet the same decisions: each different story is told once.
        let mut told: Vec<Vec<Step>> = Vec::new();
        for endpoint in endpoints {
            let before = self.steps.len();
            let end = self.follow_endpoint(source, endpoint, request);
            self.ends.push(end);
            let mut story = self.steps.split_off(before);
            let plain: Vec<Step> = story.iter().map(|step| anonymous(step, endpoint)).collect();
            if !told.contains(&plain) {
                told.push(plain);
                self.steps.append(&mut story);
            }
        }
    }

    /// What the endpoint's own agent decides.
    fn follow_endpoint(&mut self, source: &Workload, endpoint: &Endpoint, request: Option<&PlainRequest>) -> Verdict {
        let destination = &endpoint.workload;
        let who = endpoint_name(endpoint);
        if !destination.is_steered() {
            self.step(
                "transport",
                None,
                format!("{who} is not enrolled: plaintext, and nothing is decided there"),
            );
            return Verdict::Served;
        }
        let inbound = self.view.inbound(&destination.name, endpoint.address.port());
        let identity = self.transport(source, endpoint, &inbound);
        let Some(address) = source.address(endpoint.address.is_ipv6()) else {
            self.step(
                "source",
                None,
                "the source has no address of the destination's family".to_owned(),
            );
            return Verdict::Refused;
        };
        let source = SourceAttributes {
            identity,
            address,
            port: 0,
        };
        let opaque = matches!(inbound.protocol, AppProtocol::Tcp | AppProtocol::Tls);
        let request = request.filter(|_| !opaque);
        match decide(&inbound, &source, request) {
            Ok(permit) => self.step("authorize", Some(permit.rule().as_str()), format!("{who} lets it in")),
            Err(denied) => {
                let words = format!("{who} refuses it: {}", denied.reason.as_str());
                self.step("authorize", Some(denied.rule.as_str()), words);
                return Verdict::Refused;
            }
        }
        for limit in inbound.limits.iter().filter(|_| request.is_some()) {
            let effect = if limit.shadow { "counts only" } else { "429 above it" };
            let words = format!(
                "{} requests per {:?}, burst {}: {effect}",
                limit.requests, limit.per, limit.burst
            );
            self.step("limit", Some(limit.id.as_str()), words);
        }
        Verdict::Served
    }

    /// How the bytes travel, and the identity that the destination can prove by it.
    fn transport<'s>(
        &mut self,
        source: &'s Workload,
        endpoint: &Endpoint,
        inbound: &InboundPolicy,
    ) -> Option<&'s SpiffeId> {
        let who = endpoint_name(endpoint);
        let mode = inbound.mtls;
        let (identity, words) = match (source.enrolled, mode) {
            (true, _) if source.node == endpoint.workload.node => (
                Some(&source.identity),
                format!("{who} is on the same node: one pass, no TLS (mode {mode})"),
            ),
            (true, MtlsMode::Strict | MtlsMode::Permissive) => {
                (Some(&source.identity), format!("mutual TLS to {who} (mode {mode})"))
            }
            (true, MtlsMode::Off) => (None, format!("plaintext to {who} (mode {mode})")),
            (false, _) => (
                None,
                format!("plaintext to {who}, since the source is not enrolled (mode {mode})"),
            ),
        };
        self.step("transport", None, words);
        identity
    }
}

fn decide(
    inbound: &InboundPolicy,
    source: &SourceAttributes<'_>,
    request: Option<&PlainRequest>,
) -> Result<Permit, Denied> {
    let Some(request) = request else {
        return authz::decide_flow(inbound, source);
    };
    match authz::decide(inbound, source, Some(request)) {
        Decision::Permit(permit) => Ok(permit),
        Decision::Denied(denied) => Err(denied),
        // Not reached: a request leaves no question open. The flow's answer is the stricter one.
        Decision::NeedsRequest => authz::decide_flow(inbound, source),
    }
}

fn endpoint_name(endpoint: &Endpoint) -> String {
    format!("{} ({})", endpoint.workload.name, endpoint.address)
}

/// The step without the endpoint's name, to compare those of replicas.
fn anonymous(step: &Step, endpoint: &Endpoint) -> Step {
    Step {
        outcome: step.outcome.replace(&endpoint_name(endpoint), ""),
        ..step.clone()
    }
}

fn endpoint_words(endpoints: &[Endpoint]) -> Cow<'static, str> {
    match endpoints {
        [] => Cow::Borrowed("no endpoint is ready: 503"),
        [one] => Cow::Owned(format!("1 endpoint: {}", one.address)),
        [first, rest @ ..] => Cow::Owned(format!("{} endpoints: {} and others", rest.len() + 1, first.address)),
    }
}

fn traffic_words(traffic: &TrafficSettings) -> String {
    let mut words = format!("{:?}", traffic.balancer).to_lowercase();
    if let Some(retry) = &traffic.retry {
        words.push_str(&format!(", up to {} retries", retry.attempts));
    }
    if traffic.breaker.is_some() {
        words.push_str(", with a circuit breaker");
    }
    words
}
