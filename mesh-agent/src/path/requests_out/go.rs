//! The connection for a planned request: to the endpoint that was picked, or to another one if it cannot be reached.
//!
//! What was not sent says nothing of the endpoint that did not get it. A retry waits as policy says, then picks anew.
//! The source is told the truest answer: an endpoint that denies says more than those that could not be reached before.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use mesh_api::{backend::Backend, resilience::RetrySettings};

use super::{ENDPOINTS_TRIED_MAX, Exchange, Plan, RequestsOut};
use crate::{
    event::{ConnectionSecurity, Outcome, Refusal, RequestRecord},
    l7::{Attempt, Reply, Target},
    path::{
        deliver,
        judge::Denial,
        outbound::{is_unreached, presented, rejection_refusal},
        replies,
        target::{Kind, TargetStream},
        way::{self, Way},
    },
    traffic::Report,
};

/// Whether an endpoint's own policy refuses so, rather than that there is no way to it.
fn is_judgement(refusal: Refusal) -> bool {
    matches!(
        refusal,
        Refusal::AccessDeniedRequest
            | Refusal::PlaintextRefused
            | Refusal::UnknownDestination
            | Refusal::InvalidPolicy
            | Refusal::RateLimited
    )
}

/// Waits before another try: at least what the policy asks for, and up to half as long again, so that the retries of
/// many sources do not come all at once. The request's time goes on meanwhile.
async fn pause(retry: Option<&RetrySettings>) {
    if let Some(backoff) = retry.and_then(|retry| retry.backoff) {
        tokio::time::sleep(backoff.mul_f64(1.0 + rand::random::<f64>() / 2.0)).await;
    }
}

impl RequestsOut {
    /// Goes to the planned endpoint, or to another one if it cannot be reached.
    pub(super) async fn go<T>(
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
            pause(plan.retry.as_ref()).await;
            if let Err(denial) = self.next_endpoint(plan, true) {
                self.name_judge(record, twin, plan, &denial);
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
                    if last || spent {
                        return give_up(Denial::of(failed), plan);
                    }
                    match self.next_endpoint(plan, false) {
                        Ok(()) => self.name_endpoint(record, plan),
                        Err(denial) if is_judgement(denial.refusal) => {
                            self.name_judge(record, twin, plan, &denial);
                            return give_up(denial, plan);
                        }
                        // That no other endpoint is left says less than why the last one failed.
                        Err(_) => return give_up(Denial::of(failed), plan),
                    }
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

    /// Has both records tell that the planned endpoint's own policy refused the request, if that is what happened.
    fn name_judge(&self, record: &mut RequestRecord, twin: &mut Option<RequestRecord>, plan: &Plan, denial: &Denial) {
        if !is_judgement(denial.refusal) {
            return;
        }
        self.name_endpoint(record, plan);
        record.set_rule(denial.rule.clone(), plan.view.revision());
        let parties = self.parties(Some(&plan.endpoint), ConnectionSecurity::SameNode, true);
        let mut beside = record.beside(parties);
        beside.set_rule(denial.rule.clone(), plan.view.revision());
        *twin = Some(beside);
    }

    /// Whether a peer's word that it delivered nothing leaves another endpoint to try, without any policy.
    pub(super) fn may_go_elsewhere(&self, plan: &Plan) -> bool {
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
            let judged = plan
                .judged
                .iter()
                .find(|(address, _)| *address == plan.endpoint.address);
            match judged {
                Some((_, Ok(permit))) => plan.permit = Some(permit.clone()),
                Some((_, Err(denial))) => return Err(denial.clone()),
                // The first one keeps the permit that it has.
                None if plan.tried.first() == Some(&plan.endpoint.address) => {}
                None => return Err(Denial::of(Refusal::AccessDeniedRequest)),
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

    pub(super) async fn dial(&self, plan: &mut Plan, fresh: bool) -> Result<Target<TargetStream>, Refusal> {
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

    pub(super) async fn dial_h2(
        &self,
        plan: &mut Plan,
        fresh: bool,
    ) -> Result<::h2::client::SendRequest<Bytes>, Refusal> {
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
