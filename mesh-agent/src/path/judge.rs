//! The destination's judgement: may this flow or request go in, and is there a token for it? Pure but for the tokens.
//! Used by the agent of the destination's node, for what comes from tunnels, in plaintext, and from its own node; the
//! only place where `mesh-api`'s decision becomes a [`Permit`] on the path. What is in doubt is denied.

use std::time::Instant;

use mesh_api::{
    authz::{self, Decision, Denied, DenyReason, Permit, SourceAttributes},
    request::Request,
    resilience::LimitSource,
    rule::RuleId,
    view::InboundPolicy,
};

use crate::{event::Refusal, traffic::Traffic};

/// A refusal with the rule that made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    /// Why.
    pub refusal: Refusal,
    /// By which rule.
    pub rule: RuleId,
    /// When to come again, in seconds.
    pub retry_after: Option<u64>,
}

impl Denial {
    /// A refusal by the mesh itself.
    pub fn of(refusal: Refusal) -> Denial {
        Denial {
            refusal,
            rule: RuleId::constant(refusal.name()),
            retry_after: None,
        }
    }

    fn access(denied: Denied, refusal: Refusal) -> Denial {
        let refusal = match denied.reason {
            DenyReason::MtlsStrict => Refusal::PlaintextRefused,
            DenyReason::UnknownWorkload => Refusal::UnknownDestination,
            DenyReason::UnreadablePolicy => Refusal::InvalidPolicy,
            DenyReason::DenyRule | DenyReason::NoAllowRule => refusal,
        };
        Denial {
            refusal,
            rule: denied.rule,
            retry_after: None,
        }
    }
}

/// Judges a flow of opaque bytes.
pub fn flow(policy: &InboundPolicy, source: &SourceAttributes<'_>) -> Result<Permit, Denial> {
    authz::decide_flow(policy, source).map_err(|denied| Denial::access(denied, Refusal::AccessDeniedConnection))
}

/// Judges a request by who may do what, and takes no token.
pub fn access(policy: &InboundPolicy, source: &SourceAttributes<'_>, request: &dyn Request) -> Result<Permit, Denial> {
    match authz::decide(policy, source, Some(request)) {
        Decision::Permit(permit) => Ok(permit),
        Decision::Denied(denied) => Err(Denial::access(denied, Refusal::AccessDeniedRequest)),
        // A request answers every question; should one stay open, nobody may enter through it.
        Decision::NeedsRequest => Err(Denial::of(Refusal::AccessDeniedRequest)),
    }
}

/// Judges a request, then takes its tokens.
pub fn request(
    policy: &InboundPolicy,
    source: &SourceAttributes<'_>,
    request: &dyn Request,
    traffic: &Traffic,
    now: Instant,
) -> Result<Permit, Denial> {
    let permit = access(policy, source, request)?;
    if !policy.limits.is_empty() {
        let limit_source = LimitSource {
            identity: source.identity,
            address: source.address,
        };
        let shadowed = |rule: &RuleId| tracing::info!(%rule, "rate limit in shadow mode would refuse");
        traffic
            .limit(policy.limits.iter(), limit_source, request, now, shadowed)
            .map_err(|limited| Denial {
                refusal: Refusal::RateLimited,
                rule: limited.rule,
                retry_after: Some(limited.retry_after),
            })?;
    }
    Ok(permit)
}
