//! Requests at the destination: each is judged by the newest view, limited, and sent to the application on a connection
//! that belongs to the source's connection alone, so that the application sees who it talks to. Implements the HTTP
//! engines' [`Handler`]. What is not permitted never reaches the application.

use std::{cell::RefCell, net::SocketAddr, pin::pin, rc::Rc, sync::Arc};

use bytes::Bytes;
use http::StatusCode;
use mesh_api::{
    authz::{AccessRules, Permit, still_permits},
    request::Request,
    view::View,
};

use super::{
    deliver,
    inbound::Arrival,
    judge, names,
    outbound::stop,
    replies::{self, fault_refusal},
    requests_h2::Http2Targets,
    sniff,
    target::{Kind, TargetStream},
};
use crate::{
    event::{ConnectionSecurity, Outcome, PartySet, Protocol, Refusal, RequestRecord},
    l7::{
        self, Attempt, End, Facts, Fault, Forward, Handler, Limits, Reply, Standard, Target, UNDELIVERED_HEADER,
        Verdict, Version, detect::Sniff, headers::ClientCert,
    },
    relay::{self, How},
    transport::Transport,
    worker::Worker,
};

/// The requests of one connection that came to a pod.
pub struct RequestsIn {
    arrival: Arrival,
    security: ConnectionSecurity,
    client_cert: ClientCert,
    app: RefCell<Option<TargetStream>>,
    http2: Http2Targets,
}

/// What accompanies one request.
pub struct Exchange {
    record: RequestRecord,
    permit: Option<Permit>,
    /// The rules that gave the permit.
    access: Arc<AccessRules>,
    refusal: Option<Refusal>,
}

/// Serves the requests of a connection, HTTP/1 or HTTP/2 as its first bytes say.
pub async fn serve(handler: RequestsIn, mut source: Transport) {
    let handler = Rc::new(handler);
    let limits = Limits::default();
    let drain = handler.worker().shared.drain.clone();
    let patience = limits.idle_timeout;
    let http2 = match tokio::time::timeout(patience, sniff::peek(&mut source)).await {
        Ok(Ok(Some(Sniff::Http2))) => true,
        Ok(Ok(Some(_))) => false,
        // Nothing was asked: nothing is recorded.
        Ok(Ok(None) | Err(_)) | Err(_) => return,
    };
    let served = if http2 {
        Box::pin(l7::h2::serve(source, handler, &limits, drain.started())).await
    } else {
        l7::h1::serve(source, handler, &limits, drain.last_requests()).await
    };
    if let Err(error) = served {
        tracing::debug!(error = &error as &dyn std::error::Error, "a source's connection ended");
    }
}

impl RequestsIn {
    /// For a connection whose source is as proven as it will be.
    pub fn new(arrival: Arrival) -> RequestsIn {
        let (security, client_cert) = match &arrival.identity {
            Some(identity) => (
                ConnectionSecurity::MutualTls,
                names::client_cert(arrival.pod.identity(), identity),
            ),
            None => (ConnectionSecurity::None, ClientCert::Strip),
        };
        RequestsIn {
            arrival,
            security,
            client_cert,
            app: RefCell::default(),
            http2: Http2Targets::default(),
        }
    }

    fn worker(&self) -> &Rc<Worker> {
        &self.arrival.worker
    }

    fn parties(&self, view: &View) -> Arc<PartySet> {
        let policy = view.inbound(self.arrival.pod.name(), self.arrival.local.port());
        let destination = self.arrival.pod.workload();
        let ends = names::Ends {
            source: self.arrival.source_in(view),
            destination: Some(&destination),
            service: policy.services.first(),
            security: self.security,
            ..names::Ends::at_destination()
        };
        ends.parties(&self.worker().shared.events)
    }

    fn judge(&self, request: &dyn Request, facts: Facts) -> Verdict<Exchange> {
        let shared = &self.worker().shared;
        let view = self.worker().view();
        let policy = view.inbound(self.arrival.pod.name(), self.arrival.local.port());
        let protocol = match facts.version {
            _ if facts.grpc => Protocol::Grpc,
            Version::Http2 => Protocol::Http2,
            Version::Http10 | Version::Http11 => Protocol::Http1,
        };
        let mut record = shared.events.request(self.parties(&view), protocol);
        names::fill(&mut record, &view, request, self.arrival.source, self.arrival.local);
        let source = self.arrival.source_in(&view);
        record.set_workloads(source, Some(&self.arrival.pod.workload()));
        let standard = match self.security {
            // The source's agent has done its part.
            ConnectionSecurity::MutualTls => Standard::default(),
            _ => Standard::at_source(request, self.arrival.source.ip()),
        };
        if shared.events.logs_access() {
            names::trace(&mut record, request, &standard);
        }
        let attributes = self.arrival.attributes();
        match judge::request(&policy, &attributes, request, &shared.traffic, self.worker().now()) {
            Ok(permit) => {
                record.set_rule(permit.rule().clone(), permit.revision());
                let forward = Forward {
                    standard: Standard {
                        client_cert: self.client_cert.clone(),
                        ..standard
                    },
                    ..Forward::default()
                };
                Verdict::Forward(
                    forward,
                    Exchange {
                        record,
                        permit: Some(permit),
                        access: policy.access,
                        refusal: None,
                    },
                )
            }
            Err(denial) => {
                record.set_rule(denial.rule.clone(), view.revision());
                let reply = replies::refusal(denial.refusal, denial.retry_after);
                Verdict::Reply(
                    reply,
                    Exchange {
                        record,
                        permit: None,
                        access: policy.access,
                        refusal: Some(denial.refusal),
                    },
                )
            }
        }
    }

    async fn app(&self, exchange: &mut Exchange) -> Result<TargetStream, Reply> {
        let Some(permit) = &exchange.permit else {
            return Err(replies::refusal(Refusal::AccessDeniedRequest, None));
        };
        let Arrival { pod, local, source, .. } = &self.arrival;
        let shared = &self.worker().shared;
        let timeout = shared.config.dial_timeout;
        match deliver::connect(&shared.kernel, pod, *local, *source, timeout, permit).await {
            Ok(app) => Ok(TargetStream::new(Kind::App(app))),
            Err(refusal) => {
                exchange.refusal = Some(refusal);
                let reply = replies::refusal(refusal, None);
                Err(match self.security {
                    ConnectionSecurity::MutualTls => reply.with_header(UNDELIVERED_HEADER, "1"),
                    _ => reply,
                })
            }
        }
    }

    fn address(&self) -> SocketAddr {
        self.arrival.local
    }
}

impl Handler for RequestsIn {
    type Source = Transport;
    type Target = TargetStream;
    type Exchange = Exchange;

    async fn decide(&self, request: &dyn Request, facts: Facts) -> Verdict<Exchange> {
        self.judge(request, facts)
    }

    async fn connect(&self, exchange: &mut Exchange, attempt: Attempt) -> Result<Target<TargetStream>, Reply> {
        let kept = self.app.borrow_mut().take();
        if let Some(wire) = kept.filter(|app| attempt == Attempt::First && app.is_quiet()) {
            return Ok(Target { wire, reused: true });
        }
        Ok(Target {
            wire: self.app(exchange).await?,
            reused: false,
        })
    }

    async fn connect_h2(
        &self,
        exchange: &mut Exchange,
        attempt: Attempt,
    ) -> Result<::h2::client::SendRequest<Bytes>, Reply> {
        if attempt != Attempt::First {
            self.http2.forget(self.address());
        } else if let Some(send) = self.http2.get(self.address()).await {
            return Ok(send);
        }
        let stream = self.app(exchange).await?;
        self.http2
            .start(self.address(), stream, &self.worker().shared.drain)
            .await
            .map_err(|refusal| {
                exchange.refusal = Some(refusal);
                replies::refusal(refusal, None)
            })
    }

    fn release(&self, _exchange: &mut Exchange, wire: TargetStream) {
        *self.app.borrow_mut() = Some(wire);
    }

    async fn relay(&self, exchange: &mut Exchange, source: Transport, target: TargetStream) -> (u64, u64) {
        let Arrival { pod, local, .. } = &self.arrival;
        let attributes = self.arrival.attributes();
        let lost = |view: &View| {
            let now = view.inbound(pod.name(), local.port());
            !still_permits(&exchange.access, &now, &attributes)
        };
        let stop = pin!(stop(self.worker(), lost));
        let idle = self.worker().shared.config.idle_timeout;
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
        let outcome = match (exchange.refusal, end.fault) {
            (Some(refusal), _) => Outcome::Refused(refusal),
            (None, Some(fault)) => Outcome::Refused(fault_refusal(fault)),
            (None, None) => Outcome::Served,
        };
        names::close(exchange.record, &end, outcome);
    }

    fn refused(&self, fault: Fault, status: Option<StatusCode>) {
        let view = self.worker().view();
        let mut record = self
            .worker()
            .shared
            .events
            .request(self.parties(&view), Protocol::Http1);
        if let Some(status) = status {
            record.set_status(status.as_u16());
        }
        record.close(Outcome::Refused(fault_refusal(fault)));
    }
}
