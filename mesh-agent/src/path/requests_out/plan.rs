//! Everything before the connection: one synchronous pass over one view.

use std::sync::Arc;

use mesh_api::{
    authz::Permit,
    backend::Backend,
    request::Request,
    route::{
        RouteAction, RouteChoice, RouteRule, WeightedBackend, cors_headers, is_preflight, preflight_headers,
        redirect_location, rewrite_path, select,
    },
    view::{InboundPolicy, View},
    workload::Endpoint,
};

use super::{Asked, Exchange, Plan, RequestsOut, copies::Copies};
use crate::{
    event::{ConnectionSecurity, Refusal, RequestRecord},
    l7::{Facts, Forward, HeaderChanges, Reply, Standard, Verdict},
    path::{
        judge::{self, Denial},
        names,
        outbound::{Wanted, attributes, presented, rejection_refusal},
        replies,
        way::{self, Way},
    },
    traffic::{Admission, Picked, Report},
};

/// Where the routes send a request.
#[derive(Clone, Copy, Default)]
struct Routed<'a> {
    rule: Option<&'a Arc<RouteRule>>,
    share: Option<&'a WeightedBackend>,
    backend: Option<&'a Arc<Backend>>,
}

/// Why the routes send a request nowhere.
enum Unrouted<'a> {
    Refused(Denial),
    /// The rule itself answers.
    Answered(&'a RouteRule, Reply),
}

/// An endpoint, and what is counted for it.
type Chosen = (Option<Admission>, Option<Picked>, Endpoint);

impl RequestsOut {
    /// Decides a request.
    pub(super) fn plan(&self, request: &dyn Request, facts: Facts) -> Verdict<Exchange> {
        let view = self.worker.view();
        let nowhere = |denial| {
            let record = self.record(&view, request, facts, None, ConnectionSecurity::Unknown);
            self.refuse(&view, request, record, None, denial)
        };
        let routed = match self.route(&view, request) {
            Ok(routed) => routed,
            Err(Unrouted::Refused(denial)) => return nowhere(denial),
            Err(Unrouted::Answered(rule, reply)) => {
                let mut record = self.record(&view, request, facts, None, ConnectionSecurity::Unknown);
                record.set_route(rule.id.clone());
                return Verdict::Reply(reply, Exchange::answered(record, None, None));
            }
        };
        let (admission, picked, endpoint) = match self.choose(&routed) {
            Ok(chosen) => chosen,
            Err(refusal) => return nowhere(Denial::of(refusal)),
        };
        let way = way::find(&self.worker, &view, &self.pod, &endpoint);
        let security = way.as_ref().map_or(ConnectionSecurity::Unknown, Way::security);
        let mut record = self.record(&view, request, facts, Some(&endpoint), security);
        if let Some(rule) = routed.rule {
            record.set_route(rule.id.clone());
        }
        let way = match way {
            Ok(way) => way,
            Err(refusal) => return self.refuse(&view, request, record, None, Denial::of(refusal)),
        };
        let permit = match self.judge(&way, request) {
            Ok(permit) => permit,
            Err(denial) => {
                if let Some(picked) = picked {
                    picked.report(Report::Success, self.worker.now());
                }
                let twin = record.beside(self.parties(Some(&endpoint), security, true));
                return self.refuse(&view, request, record, Some(twin), denial);
            }
        };
        let mut forward = self.forward(request, facts, &routed);
        if let Way::Local(pod, _) = &way {
            forward.standard.client_cert = self.client_cert(pod.identity());
        }
        if self.worker.shared.events.logs_access() {
            names::trace(&mut record, request, &forward.standard);
        }
        let settings = routed.backend.map(|backend| &*backend.traffic);
        let retry = match (routed.rule, settings) {
            (Some(rule), Some(settings)) => rule.retry(settings).cloned(),
            (None, Some(settings)) => settings.retry.clone(),
            (_, None) => None,
        };
        let plan = Plan {
            judged: self.others_judged(&view, routed.backend, &endpoint, request),
            backend: routed.backend.cloned(),
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
            view: view.clone(),
        };
        let exchange = Exchange {
            plan: Some(Box::new(plan)),
            ..Exchange::answered(record, None, None)
        };
        Verdict::Forward(forward, exchange)
    }

    /// Which rule takes the request, and whose share it is.
    fn route<'a>(&'a self, view: &'a View, request: &dyn Request) -> Result<Routed<'a>, Unrouted<'a>> {
        let refused = |refusal| Unrouted::Refused(Denial::of(refusal));
        let port = match &self.asked {
            // The newest view counts, not that of the connection's first request.
            Asked::For(Wanted::Service(port)) => view
                .service(&port.service.name)
                .and_then(|service| service.port(port.port.port))
                .ok_or(refused(Refusal::NoEndpoint))?,
            Asked::For(Wanted::Workload(_) | Wanted::Outside(_)) => return Ok(Routed::default()),
            Asked::Copies { rule, backend } => {
                return Ok(Routed {
                    rule: Some(rule),
                    share: None,
                    backend: Some(backend),
                });
            }
        };
        let Some(table) = &port.routes else {
            return Ok(Routed {
                backend: Some(&port.backend),
                ..Routed::default()
            });
        };
        let rule = match select(table, &self.pod.name().namespace, request) {
            RouteChoice::NoMatch => return Err(refused(Refusal::NoRoute)),
            RouteChoice::Rule(rule) => rule,
        };
        if let Some(cors) = rule.cors.as_deref().filter(|_| is_preflight(request)) {
            return Err(Unrouted::Answered(
                rule,
                replies::preflight(preflight_headers(cors, request)),
            ));
        }
        if let RouteAction::Redirect(redirect) = &rule.action {
            let location = redirect_location(redirect, request, self.original_destination.port(), "http");
            return Err(Unrouted::Answered(rule, replies::redirect(redirect.status, location)));
        }
        let bad_backend = || {
            Unrouted::Refused(Denial {
                rule: rule.id.clone(),
                ..Denial::of(Refusal::BadBackend)
            })
        };
        let share = rule.pick(rand::random()).ok_or_else(bad_backend)?;
        let backend = share.backend.as_ref().map_err(|bad| {
            tracing::debug!(%bad, rule = %rule.id, "a share without a backend");
            bad_backend()
        })?;
        Ok(Routed {
            rule: Some(rule),
            share: Some(share),
            backend: Some(backend),
        })
    }

    /// Admits the request to its backend and picks an endpoint.
    fn choose(&self, routed: &Routed<'_>) -> Result<Chosen, Refusal> {
        match (routed.backend, &self.asked) {
            (Some(backend), _) => {
                let ipv6 = self.original_destination.is_ipv6();
                let admission = self.worker.shared.traffic.admit(backend).map_err(rejection_refusal)?;
                let admission = admission.of_source(presented(&self.pod, self.source, ipv6).ip());
                let endpoints = backend.endpoints(ipv6);
                let picked = admission
                    .pick(endpoints, &[], self.worker.now())
                    .map_err(rejection_refusal)?;
                let endpoint = picked.endpoint.clone();
                Ok((Some(admission), Some(picked), endpoint))
            }
            (None, Asked::For(Wanted::Workload(endpoint))) => Ok((None, None, endpoint.clone())),
            (None, _) => Err(Refusal::NoEndpoint),
        }
    }

    fn refuse(
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
        Verdict::Reply(reply, Exchange::answered(record, twin, Some(denial.refusal)))
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

    /// What the backend's other endpoints of this node say to the request. A second endpoint is chosen when the head is
    /// gone, so all are asked now; tokens are taken once, by the first.
    fn others_judged(
        &self,
        view: &View,
        backend: Option<&Arc<Backend>>,
        first: &Endpoint,
        request: &dyn Request,
    ) -> Vec<(std::net::SocketAddr, Result<Permit, Denial>)> {
        let endpoints = backend
            .map(|backend| backend.endpoints(self.original_destination.is_ipv6()))
            .unwrap_or_default();
        let here = |endpoint: &&Endpoint| {
            endpoint.address != first.address
                && endpoint.workload.is_steered()
                && endpoint.workload.node == self.worker.shared.node
        };
        let source = attributes(&self.pod, self.source);
        endpoints
            .iter()
            .filter(here)
            .map(|endpoint| {
                let policy = view.inbound(&endpoint.workload.name, endpoint.address.port());
                (endpoint.address, judge::access(&policy, &source, request))
            })
            .collect()
    }

    fn forward(&self, request: &dyn Request, facts: Facts, routed: &Routed<'_>) -> Forward {
        let source = presented(&self.pod, self.source, self.original_destination.is_ipv6());
        let mut forward = Forward {
            standard: Standard::at_source(request, source.ip()),
            ..Forward::default()
        };
        if let Some(rule) = routed.rule {
            change(&mut forward, request, rule, routed.share);
            if matches!(self.asked, Asked::For(_)) && !facts.upgrade {
                forward.copy = Copies::of(self, rule);
            }
        }
        if let Some(backend) = routed.backend {
            let settings = &backend.traffic;
            (forward.request_timeout, forward.attempt_timeout) = match routed.rule {
                Some(rule) => (rule.timeout(settings), rule.try_timeout(settings)),
                None => {
                    let per_try = settings.retry.as_ref().and_then(|retry| retry.per_try_timeout);
                    (settings.timeouts.request, per_try)
                }
            };
        }
        forward
    }
}

/// What a rule and a share of it change of a request and its response.
fn change(forward: &mut Forward, request: &dyn Request, rule: &RouteRule, share: Option<&WeightedBackend>) {
    forward.request_headers = HeaderChanges::from(&rule.request_headers);
    if let Some(share) = share {
        forward
            .request_headers
            .extend(&HeaderChanges::from(&share.request_headers));
        forward.response_headers = HeaderChanges::from(&share.response_headers);
    }
    forward
        .response_headers
        .extend(&HeaderChanges::from(&rule.response_headers));
    if let Some(cors) = &rule.cors {
        let headers = cors_headers(cors, request);
        forward.response_headers.extend(&HeaderChanges::from(&headers));
    }
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

impl Exchange {
    /// A request that is answered here.
    fn answered(record: RequestRecord, twin: Option<RequestRecord>, refusal: Option<Refusal>) -> Exchange {
        Exchange {
            record,
            twin,
            plan: None,
            refusal,
            failed: false,
        }
    }
}
