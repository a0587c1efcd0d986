//! Authorization: may this source do this at this destination?
//!
//! Stands at the destination's agent, after the source is identified and before a byte reaches the application; asked
//! once per connection and, where a rule needs to see the request, once per request. It is the only maker of a
//! [`Permit`], and delivery takes a `&Permit`, so that forwarding without a decision cannot be written.
//!
//! Deny beats allow. Once an Allow policy applies to a workload's port, what no rule allows there is denied. A doubt
//! is a denial: an opaque flow under a Deny that asks about requests is denied; a path that servers read differently is
//! allowed only if every reading is, and denied if one is (`reading`); so are the lines of a header that is sent more
//! than once.

use std::{cell::OnceCell, fmt, net::IpAddr, sync::Arc};

pub use crate::rule::RuleId;
use crate::{
    identity::SpiffeId,
    policy::{AccessRule, HeaderMatch, MtlsMode, PathMatch, SourceClause, TargetClause},
    reading::Readings,
    request::{Request, host_of},
    resilience::LimitSettings,
    workload::{AppProtocol, Revision, Service},
};

/// What holds for connections to one port of one workload. Cheap to clone.
#[derive(Clone, Debug)]
pub struct InboundPolicy {
    /// The view's revision.
    pub revision: Revision,
    /// The workload's own port.
    pub port: u16,
    /// Whether plaintext is taken.
    pub mtls: MtlsMode,
    /// Who may do what.
    pub access: Arc<AccessRules>,
    /// Every limit that applies; each may refuse.
    pub limits: Arc<[LimitSettings]>,
    /// What the port speaks.
    pub protocol: AppProtocol,
    /// The services that this port serves, ordered by name; for names in telemetry.
    pub services: Arc<[Arc<Service>]>,
    /// Whether flows from the workload's own node may do without the agent, if nothing else stands against it.
    pub direct: bool,
}

/// The access rules of one port of one workload, compiled with a view.
#[derive(Clone, Debug)]
pub struct AccessRules {
    deny: Vec<NamedRule>,
    allow: Vec<NamedRule>,
    otherwise: Otherwise,
    /// A guard that cannot be read: whatever the rules say, everything is denied.
    unreadable: Option<RuleId>,
}

/// A rule and its name.
#[derive(Clone, Debug)]
pub struct NamedRule {
    /// `accesspolicy/<namespace>/<name>/<rule name or index>`.
    pub id: RuleId,
    /// The rule.
    pub rule: Arc<AccessRule>,
}

/// What holds where no rule matches.
#[derive(Clone, Debug)]
enum Otherwise {
    Allow,
    Deny(RuleId, DenyReason),
}

/// Leave to do what was asked, and by which rule of which revision. Only this module makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permit {
    rule: RuleId,
    revision: Revision,
}

/// The refusal of what was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denied {
    /// The rule that denied: an AccessPolicy's, `default-deny:<policy>`, `unreadable:<policy>`, `mtls-strict` or
    /// `unknown-workload`.
    pub rule: RuleId,
    /// The view's revision.
    pub revision: Revision,
    /// Why.
    pub reason: DenyReason,
}

/// Why something is denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DenyReason {
    /// Mutual TLS is strict and the source has no proven identity.
    MtlsStrict,
    /// A Deny rule matches.
    DenyRule,
    /// An Allow policy applies and none of its rules matches.
    NoAllowRule,
    /// The view does not know the destination.
    UnknownWorkload,
    /// A policy that guards the destination cannot be read, and no version of it could.
    UnreadablePolicy,
}

/// What is known of the source.
#[derive(Clone, Copy, Debug)]
pub struct SourceAttributes<'a> {
    /// The identity that its tunnel (or, on the same node, its pod) proves.
    pub identity: Option<&'a SpiffeId>,
    /// Its address.
    pub address: IpAddr,
    /// Its port: for records, no rule asks for it.
    pub port: u16,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum Decision {
    /// Go on.
    Permit(Permit),
    /// Stop.
    Denied(Denied),
    /// A rule must see the request first: ask again for each. For a flow that has none, ask [`decide_flow`].
    NeedsRequest,
}

/// How far a rule matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fit {
    No,
    Yes,
    /// The source and port match; the rest needs a request.
    NeedsRequest,
}

/// Which side a doubt is decided for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Allow,
    Deny,
}

impl Permit {
    /// The rule that allowed: an AccessPolicy's, or `default-allow`.
    pub fn rule(&self) -> &RuleId {
        &self.rule
    }

    /// The revision of the view that it was decided by.
    pub fn revision(&self) -> Revision {
        self.revision
    }
}

impl AccessRules {
    /// Rules where `default_deny` names the Allow policy that turns the default around.
    pub fn new(deny: Vec<NamedRule>, allow: Vec<NamedRule>, default_deny: Option<RuleId>) -> AccessRules {
        let otherwise = match default_deny {
            Some(rule) => Otherwise::Deny(rule, DenyReason::NoAllowRule),
            None => Otherwise::Allow,
        };
        AccessRules {
            deny,
            allow,
            otherwise,
            unreadable: None,
        }
    }

    /// The same, under a guard that cannot be read: everything is denied.
    #[must_use]
    pub fn under_unreadable(self, policy: Option<RuleId>) -> AccessRules {
        AccessRules {
            unreadable: policy,
            ..self
        }
    }

    /// For a destination that the view does not know.
    pub fn unknown_workload() -> AccessRules {
        AccessRules {
            deny: Vec::new(),
            allow: Vec::new(),
            otherwise: Otherwise::Deny(RuleId::UNKNOWN_WORKLOAD, DenyReason::UnknownWorkload),
            unreadable: None,
        }
    }

    /// Whether nothing is restricted, whoever asks.
    pub fn allows_everything(&self) -> bool {
        self.unreadable.is_none() && self.deny.is_empty() && matches!(self.otherwise, Otherwise::Allow)
    }

    /// Whether some rule asks about requests.
    pub fn needs_requests(&self) -> bool {
        let asks = |named: &NamedRule| named.rule.to.iter().any(TargetClause::needs_request);
        self.deny.iter().chain(&self.allow).any(asks)
    }

    /// Whether they decide alike.
    fn same_as(&self, other: &AccessRules) -> bool {
        let rules =
            |a: &[NamedRule], b: &[NamedRule]| a.iter().map(|named| &named.rule).eq(b.iter().map(|named| &named.rule));
        let allows = |otherwise: &Otherwise| matches!(otherwise, Otherwise::Allow);
        rules(&self.deny, &other.deny)
            && rules(&self.allow, &other.allow)
            && allows(&self.otherwise) == allows(&other.otherwise)
            && self.unreadable == other.unreadable
    }
}

impl InboundPolicy {
    fn permit(&self, rule: &RuleId) -> Decision {
        Decision::Permit(Permit {
            rule: rule.clone(),
            revision: self.revision,
        })
    }

    fn denied(&self, rule: &RuleId, reason: DenyReason) -> Decision {
        Decision::Denied(Denied {
            rule: rule.clone(),
            revision: self.revision,
            reason,
        })
    }
}

/// A request as the rules of one decision look at it: how its path may be read is found out once, if a rule asks.
struct Asked<'a> {
    request: &'a dyn Request,
    readings: OnceCell<Readings>,
}

impl<'a> Asked<'a> {
    fn new(request: &'a dyn Request) -> Asked<'a> {
        Asked {
            request,
            readings: OnceCell::new(),
        }
    }

    fn paths_fit(&self, wanted: &[PathMatch], side: Side) -> bool {
        let path = self.request.path();
        let readings = || self.readings.get_or_init(|| Readings::of(path));
        wanted.is_empty()
            || match side {
                Side::Allow => readings().all_match(wanted, path),
                Side::Deny => readings().any_matches(wanted, path),
            }
    }
}

/// Decides a connection (`l7` is `None`) or a request.
pub fn decide(inbound: &InboundPolicy, source: &SourceAttributes<'_>, l7: Option<&dyn Request>) -> Decision {
    let l7 = &l7.map(Asked::new);
    let access = &*inbound.access;
    if inbound.mtls == MtlsMode::Strict && source.identity.is_none() {
        return inbound.denied(&RuleId::MTLS_STRICT, DenyReason::MtlsStrict);
    }
    if let Some(policy) = &access.unreadable {
        return inbound.denied(policy, DenyReason::UnreadablePolicy);
    }
    let fit = |named: &NamedRule, side: Side| rule_fit(&named.rule, inbound.port, source, l7.as_ref(), side);
    let mut open_question = false;
    for named in &access.deny {
        match fit(named, Side::Deny) {
            Fit::Yes => return inbound.denied(&named.id, DenyReason::DenyRule),
            Fit::NeedsRequest => open_question = true,
            Fit::No => {}
        }
    }
    let mut allowed_by = None;
    let mut may_be_allowed = false;
    for named in &access.allow {
        match fit(named, Side::Allow) {
            Fit::Yes => {
                allowed_by = Some(&named.id);
                break;
            }
            Fit::NeedsRequest => may_be_allowed = true,
            Fit::No => {}
        }
    }
    match (allowed_by, &access.otherwise) {
        (None, Otherwise::Deny(..)) if may_be_allowed => Decision::NeedsRequest,
        (None, Otherwise::Deny(rule, reason)) => inbound.denied(rule, *reason),
        _ if open_question => Decision::NeedsRequest,
        (Some(rule), _) => inbound.permit(rule),
        (None, Otherwise::Allow) => inbound.permit(&RuleId::ALLOW_BY_DEFAULT),
    }
}

/// Decides a flow of opaque bytes: it has no requests, so an Allow that asks about them cannot match, and a Deny
/// that asks about them does.
pub fn decide_flow(inbound: &InboundPolicy, source: &SourceAttributes<'_>) -> Result<Permit, Denied> {
    let access = &*inbound.access;
    match decide(inbound, source, None) {
        Decision::Permit(permit) => Ok(permit),
        Decision::Denied(denied) => Err(denied),
        Decision::NeedsRequest => {
            let open =
                |named: &&NamedRule| rule_fit(&named.rule, inbound.port, source, None, Side::Deny) == Fit::NeedsRequest;
            let (rule, reason) = match (access.deny.iter().find(open), &access.otherwise) {
                (Some(named), _) => (&named.id, DenyReason::DenyRule),
                (None, Otherwise::Deny(rule, reason)) => (rule, *reason),
                // Not reached: without a Deny in question only an Allow can be, and then the default is to deny.
                (None, Otherwise::Allow) => (&RuleId::UNKNOWN_WORKLOAD, DenyReason::DenyRule),
            };
            Err(Denied {
                rule: rule.clone(),
                revision: inbound.revision,
                reason,
            })
        }
    }
}

/// Whether what was permitted by `then` still is, of a request that cannot be shown again: it became a flow of its own
/// (an upgrade). Where the answer hangs on the request, only unchanged rules leave no doubt.
pub fn still_permits(then: &AccessRules, now: &InboundPolicy, source: &SourceAttributes<'_>) -> bool {
    match decide(now, source, None) {
        Decision::Permit(_) => true,
        Decision::Denied(_) => false,
        Decision::NeedsRequest => now.access.same_as(then),
    }
}

/// A rule matches when one of `from` (or none is given) and one of `to` (or none is given) match.
fn rule_fit(rule: &AccessRule, port: u16, source: &SourceAttributes<'_>, l7: Option<&Asked<'_>>, side: Side) -> Fit {
    if !rule.from.is_empty() && !rule.from.iter().any(|clause| source_fits(clause, source)) {
        return Fit::No;
    }
    if rule.to.is_empty() {
        return Fit::Yes;
    }
    let mut best = Fit::No;
    for clause in &rule.to {
        match target_fit(clause, port, l7, side) {
            Fit::Yes => return Fit::Yes,
            Fit::NeedsRequest => best = Fit::NeedsRequest,
            Fit::No => {}
        }
    }
    best
}

/// Every field that is not empty must have a value that matches.
fn source_fits(clause: &SourceClause, source: &SourceAttributes<'_>) -> bool {
    let identity_fits = clause.identities.is_empty()
        || source
            .identity
            .is_some_and(|id| clause.identities.iter().any(|wanted| wanted.matches(id)));
    let namespace_fits = clause.namespaces.is_empty()
        || source
            .identity
            .and_then(SpiffeId::namespace)
            .is_some_and(|ns| clause.namespaces.iter().any(|wanted| wanted == ns));
    let address = source.address.to_canonical();
    let address_fits = clause.cidrs.is_empty() || clause.cidrs.iter().any(|net| net.contains(&address));
    identity_fits && namespace_fits && address_fits
}

fn target_fit(clause: &TargetClause, port: u16, l7: Option<&Asked<'_>>, side: Side) -> Fit {
    if !clause.ports.is_empty() && !clause.ports.contains(&port) {
        return Fit::No;
    }
    if !clause.needs_request() {
        return Fit::Yes;
    }
    let Some(asked) = l7 else {
        return Fit::NeedsRequest;
    };
    let request = asked.request;
    let host = request.authority().map(host_of);
    let host_fits = clause.hosts.is_empty() || host.is_some_and(|host| clause.hosts.iter().any(|h| h.matches(host)));
    let method_fits = clause.methods.is_empty() || clause.methods.iter().any(|method| method == request.method());
    let headers_fit = clause.headers.iter().all(|header| header_fits(header, request, side));
    if host_fits && method_fits && headers_fit && asked.paths_fit(&clause.paths, side) {
        Fit::Yes
    } else {
        Fit::No
    }
}

/// The application may look at any line of a header that is sent twice: every line must be allowed, any is denied.
fn header_fits(wanted: &HeaderMatch, request: &dyn Request, side: Side) -> bool {
    let (mut lines, mut fitting) = (0usize, 0usize);
    request.each_header_value(&wanted.name, &mut |value| {
        lines += 1;
        fitting += usize::from(wanted.value.matches(value));
    });
    match side {
        Side::Allow => fitting > 0 && fitting == lines,
        Side::Deny => fitting > 0,
    }
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "denied by {} at revision {}", self.rule, self.revision)
    }
}

impl std::error::Error for Denied {}

impl DenyReason {
    /// For people.
    pub const fn as_str(self) -> &'static str {
        match self {
            DenyReason::MtlsStrict => "mutual TLS is strict and the source has no proven identity",
            DenyReason::DenyRule => "a Deny rule matches",
            DenyReason::NoAllowRule => "an Allow policy applies and none of its rules matches",
            DenyReason::UnknownWorkload => "the destination is not known",
            DenyReason::UnreadablePolicy => "a policy that guards the destination cannot be read",
        }
    }
}
