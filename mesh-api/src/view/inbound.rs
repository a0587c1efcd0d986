//! What holds at each port of each workload: mutual TLS mode, access rules, limits, protocol.
//!
//! Replicas mostly have the same policies, so the compiled rules are shared between them: the memory is that of the
//! distinct sets, and a workload costs a few words per port that is special in some way.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use super::{
    attach::{Applied, Level, Targets},
    compile::{Named, Policies, Served},
    settings::limit_settings,
};
use crate::{
    authz::{AccessRules, InboundPolicy, NamedRule},
    document::Unreadable,
    policy::{AccessAction, AccessPolicy, AccessRule, MeshPolicy, MtlsMode, RateLimit},
    resilience::LimitSettings,
    rule::RuleId,
    workload::{AppProtocol, Revision, Service, Workload},
};

/// The policies of one workload.
#[derive(Clone, Debug)]
pub(super) struct InboundSet {
    /// Ports at which something holds that does not hold everywhere, sorted.
    ports: Box<[InboundPolicy]>,
    elsewhere: InboundPolicy,
}

impl InboundSet {
    /// What holds at a port.
    pub fn at(&self, port: u16) -> &InboundPolicy {
        let found = self.ports.binary_search_by_key(&port, |policy| policy.port).ok();
        found.and_then(|index| self.ports.get(index)).unwrap_or(&self.elsewhere)
    }
}

/// Compiles workload after workload and shares what is equal.
pub(super) struct InboundCompiler<'a> {
    revision: Revision,
    mesh: &'a [Named<'a, MeshPolicy>],
    mesh_targets: Targets<'a>,
    access: Vec<CompiledAccess>,
    access_targets: Targets<'a>,
    limits: Vec<Vec<LimitSettings>>,
    limit_targets: Targets<'a>,
    unreadable: &'a [Named<'a, Unreadable>],
    unreadable_targets: Targets<'a>,
    shared_access: HashMap<(Vec<usize>, Option<RuleId>), Arc<AccessRules>>,
    shared_limits: HashMap<Vec<usize>, Arc<[LimitSettings]>>,
    shared_services: HashMap<Vec<*const Service>, Arc<[Arc<Service>]>>,
}

/// An AccessPolicy with its rules named.
struct CompiledAccess {
    action: AccessAction,
    default_deny: RuleId,
    rules: Vec<NamedRule>,
}

impl<'a> InboundCompiler<'a> {
    pub fn new(revision: Revision, policies: &'a Policies<'a>) -> InboundCompiler<'a> {
        InboundCompiler {
            revision,
            mesh: &policies.mesh,
            mesh_targets: Targets::new(policies.mesh.iter().map(|p| &*p.spec.target_refs)),
            access: policies.access.iter().map(compile_access).collect(),
            access_targets: Targets::new(policies.access.iter().map(|p| &*p.spec.target_refs)),
            limits: policies.limits.iter().map(compile_limits).collect(),
            limit_targets: Targets::new(policies.limits.iter().map(|p| &*p.spec.target_refs)),
            unreadable: &policies.unreadable,
            unreadable_targets: Targets::new(policies.unreadable.iter().map(|p| &*p.spec.targets)),
            shared_access: HashMap::new(),
            shared_limits: HashMap::new(),
            shared_services: HashMap::new(),
        }
    }

    /// The policies of one workload.
    pub fn workload(&mut self, workload: &Workload, served: &[Served<'_>]) -> InboundSet {
        let mesh = self.mesh_targets.of_workload(workload, served);
        let access = self.access_targets.of_workload(workload, served);
        let limits = self.limit_targets.of_workload(workload, served);
        let unreadable = self.unreadable_targets.of_workload(workload, served);
        let mut ports: BTreeSet<u16> = served.iter().map(|one| one.target).collect();
        ports.extend(workload.ports.iter().map(|port| port.port));
        ports.extend(
            [&mesh, &access, &limits, &unreadable]
                .into_iter()
                .flatten()
                .filter_map(|one| one.port),
        );
        ports.extend(
            mesh.iter()
                .filter_map(|one| self.mesh.get(one.policy))
                .flat_map(|policy| policy.spec.mtls.iter().flat_map(|mtls| mtls.ports.keys().copied())),
        );
        let mut at = |port: Option<u16>| InboundPolicy {
            port: port.unwrap_or_default(),
            mtls: mtls_mode(self.mesh, &mesh, port),
            access: self.access_rules(&policies_at(&access, port), &policies_at(&unreadable, port)),
            limits: self.limit_settings(&policies_at(&limits, port)),
            protocol: protocol(workload, served, port),
            services: self.services(served, port),
        };
        InboundSet {
            ports: ports.into_iter().map(|port| at(Some(port))).collect(),
            elsewhere: at(None),
        }
    }

    fn access_rules(&mut self, policies: &[usize], unreadable: &[usize]) -> Arc<AccessRules> {
        let unreadable = unreadable.first().and_then(|&index| self.unreadable.get(index));
        let unreadable = unreadable.map(|policy| {
            let kind = policy.spec.kind.as_str().to_ascii_lowercase();
            RuleId::new(&format!("unreadable:{kind}/{}", policy.name))
        });
        let key = (policies.to_vec(), unreadable.clone());
        if let Some(shared) = self.shared_access.get(&key) {
            return shared.clone();
        }
        let (mut deny, mut allow, mut default_deny) = (Vec::new(), Vec::new(), None);
        for policy in policies.iter().filter_map(|&index| self.access.get(index)) {
            match policy.action {
                AccessAction::Deny => deny.extend_from_slice(&policy.rules),
                AccessAction::Allow => {
                    allow.extend_from_slice(&policy.rules);
                    default_deny.get_or_insert_with(|| policy.default_deny.clone());
                }
            }
        }
        let rules = AccessRules::new(self.revision, deny, allow, default_deny).under_unreadable(unreadable);
        let rules = Arc::new(rules);
        self.shared_access.insert(key, rules.clone());
        rules
    }

    fn limit_settings(&mut self, policies: &[usize]) -> Arc<[LimitSettings]> {
        if let Some(shared) = self.shared_limits.get(policies) {
            return shared.clone();
        }
        let limits: Arc<[LimitSettings]> = policies
            .iter()
            .filter_map(|&index| self.limits.get(index))
            .flatten()
            .cloned()
            .collect();
        self.shared_limits.insert(policies.to_vec(), limits.clone());
        limits
    }

    /// The services whose port leads to this one, each once.
    fn services(&mut self, served: &[Served<'_>], port: Option<u16>) -> Arc<[Arc<Service>]> {
        let mut services: Vec<&Arc<Service>> = served
            .iter()
            .filter(|one| Some(one.target) == port)
            .map(|one| one.service)
            .collect();
        services.dedup_by(|a, b| Arc::ptr_eq(a, b));
        let key: Vec<*const Service> = services.iter().map(|service| Arc::as_ptr(service)).collect();
        let shared = self.shared_services.entry(key);
        shared
            .or_insert_with(|| services.into_iter().cloned().collect())
            .clone()
    }
}

fn compile_access(policy: &Named<'_, AccessPolicy>) -> CompiledAccess {
    let id = format!("accesspolicy/{}", policy.name);
    let name_rule = |(index, rule): (usize, &AccessRule)| {
        let name = rule.name.clone().unwrap_or_else(|| index.to_string());
        NamedRule {
            id: RuleId::new(&format!("{id}/{name}")),
            rule: Arc::new(rule.clone()),
        }
    };
    CompiledAccess {
        action: policy.spec.action,
        default_deny: RuleId::new(&format!("default-deny:{id}")),
        rules: policy.spec.rules.iter().enumerate().map(name_rule).collect(),
    }
}

pub(super) fn compile_limits(policy: &Named<'_, RateLimit>) -> Vec<LimitSettings> {
    policy
        .spec
        .limits
        .iter()
        .enumerate()
        .map(|(index, limit)| limit_settings(&policy.name, index, limit))
        .collect()
}

/// The policies that hold at a port, each once, in order.
fn policies_at(applied: &[Applied], port: Option<u16>) -> Vec<usize> {
    let mut policies: Vec<usize> = applied
        .iter()
        .filter(|one| one.port.is_none() || one.port == port)
        .map(|one| one.policy)
        .collect();
    policies.sort_unstable();
    policies.dedup();
    policies
}

/// The mode of the most specific policy that says one. At one level a word on the port beats a word on all ports,
/// and of several equal ones the strictest holds.
fn mtls_mode(policies: &[Named<'_, MeshPolicy>], applied: &[Applied], port: Option<u16>) -> MtlsMode {
    let strictness = |mode: &MtlsMode| match mode {
        MtlsMode::Off => 0,
        MtlsMode::Permissive => 1,
        MtlsMode::Strict => 2,
    };
    for level in [Level::TargetPort, Level::Target, Level::Namespace, Level::Mesh] {
        let here = || {
            let holds = |one: &&Applied| one.level == level && (one.port.is_none() || one.port == port);
            let policies = applied.iter().filter(holds).filter_map(|one| policies.get(one.policy));
            policies.filter_map(|policy| policy.spec.mtls.as_ref())
        };
        let on_port = here()
            .filter_map(|mtls| mtls.ports.get(&port?).copied())
            .max_by_key(strictness);
        let on_all = || here().filter_map(|mtls| mtls.mode).max_by_key(strictness);
        if let Some(mode) = on_port.or_else(on_all) {
            return mode;
        }
    }
    MtlsMode::default()
}

/// What the port speaks: as a service says, else as the workload does.
fn protocol(workload: &Workload, served: &[Served<'_>], port: Option<u16>) -> AppProtocol {
    let by_service = served
        .iter()
        .filter(|one| Some(one.target) == port)
        .map(|one| one.port.protocol);
    let by_workload = workload
        .ports
        .iter()
        .filter(|one| Some(one.port) == port)
        .map(|one| one.protocol);
    by_service
        .chain(by_workload)
        .find(|protocol| *protocol != AppProtocol::Detect)
        .unwrap_or_default()
}
