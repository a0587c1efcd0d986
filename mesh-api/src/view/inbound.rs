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
    policy::{AccessAction, AccessPolicy, AccessRule, MtlsMode, MtlsSettings, RateLimit, SameNode},
    resilience::LimitSettings,
    rule::RuleId,
    workload::{AppProtocol, Revision, Service, Workload},
};

/// Sets of policies that are remembered for sharing.
const SHARED_MAX: usize = 50_000;

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

    /// Whether flows to some port may do without the agent.
    pub fn is_direct(&self) -> bool {
        self.elsewhere.direct || self.ports.iter().any(|policy| policy.direct)
    }

    /// What holds at each port that is special in some way.
    pub fn ports(&self) -> impl Iterator<Item = &InboundPolicy> {
        self.ports.iter()
    }
}

/// Compiles workload after workload and shares what is equal. It holds what it needs of the policies, so that it serves
/// for revision after revision while they stay.
#[derive(Debug)]
pub(super) struct InboundCompiler {
    mesh: Vec<Option<MtlsSettings>>,
    same_node: Vec<Option<SameNode>>,
    mesh_targets: Targets,
    access: Vec<CompiledAccess>,
    access_targets: Targets,
    limits: Vec<Vec<LimitSettings>>,
    limit_targets: Targets,
    unreadable: Vec<RuleId>,
    unreadable_targets: Targets,
    shared_access: HashMap<(Vec<usize>, Option<RuleId>), Arc<AccessRules>>,
    shared_limits: HashMap<Vec<usize>, Arc<[LimitSettings]>>,
    /// By where the services lie: they live as long as the entry, so that no other can lie there.
    shared_services: HashMap<Vec<usize>, Arc<[Arc<Service>]>>,
}

/// An AccessPolicy with its rules named.
#[derive(Debug)]
struct CompiledAccess {
    action: AccessAction,
    default_deny: RuleId,
    rules: Vec<NamedRule>,
}

impl InboundCompiler {
    pub fn new(policies: &Policies<'_>) -> InboundCompiler {
        let unreadable = |policy: &Named<'_, crate::document::Unreadable>| {
            let kind = policy.spec.kind.as_str().to_ascii_lowercase();
            RuleId::new(&format!("unreadable:{kind}/{}", policy.name))
        };
        InboundCompiler {
            mesh: policies.mesh.iter().map(|p| p.spec.mtls.clone()).collect(),
            same_node: policies.mesh.iter().map(|p| p.spec.same_node).collect(),
            mesh_targets: Targets::new(policies.mesh.iter().map(|p| &*p.spec.target_refs)),
            access: policies.access.iter().map(compile_access).collect(),
            access_targets: Targets::new(policies.access.iter().map(|p| &*p.spec.target_refs)),
            limits: policies.limits.iter().map(compile_limits).collect(),
            limit_targets: Targets::new(policies.limits.iter().map(|p| &*p.spec.target_refs)),
            unreadable: policies.unreadable.iter().map(unreadable).collect(),
            unreadable_targets: Targets::new(policies.unreadable.iter().map(|p| &*p.spec.targets)),
            shared_access: HashMap::new(),
            shared_limits: HashMap::new(),
            shared_services: HashMap::new(),
        }
    }

    /// Forgets what only workloads of one revision share.
    pub fn end_revision(&mut self) {
        self.shared_services.clear();
        // Sets of policies are as many as there are kinds of workloads; what is more than that is of workloads long gone.
        if self.shared_access.len() > SHARED_MAX {
            self.shared_access.clear();
        }
        if self.shared_limits.len() > SHARED_MAX {
            self.shared_limits.clear();
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
                .filter_map(|one| self.mesh.get(one.policy)?.as_ref())
                .flat_map(|mtls| mtls.ports.keys().copied()),
        );
        let mut at = |port: Option<u16>| InboundPolicy {
            // Filled in by the view that hands it out.
            revision: Revision::default(),
            port: port.unwrap_or_default(),
            mtls: mtls_mode(&self.mesh, &mesh, port),
            access: self.access_rules(&policies_at(&access, port), &policies_at(&unreadable, port)),
            limits: self.limit_settings(&policies_at(&limits, port)),
            protocol: protocol(workload, served, port),
            services: self.services(served, port),
            direct: same_node(&self.same_node, &mesh, port) == SameNode::Direct,
        };
        InboundSet {
            ports: ports.into_iter().map(|port| at(Some(port))).collect(),
            elsewhere: at(None),
        }
    }

    fn access_rules(&mut self, policies: &[usize], unreadable: &[usize]) -> Arc<AccessRules> {
        let unreadable = unreadable
            .first()
            .and_then(|&index| self.unreadable.get(index))
            .cloned();
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
        let rules = AccessRules::new(deny, allow, default_deny).under_unreadable(unreadable);
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
        let key: Vec<usize> = services.iter().map(|service| Arc::as_ptr(service).addr()).collect();
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
fn mtls_mode(policies: &[Option<MtlsSettings>], applied: &[Applied], port: Option<u16>) -> MtlsMode {
    let strictness = |mode: &MtlsMode| match mode {
        MtlsMode::Off => 0,
        MtlsMode::Permissive => 1,
        MtlsMode::Strict => 2,
    };
    for level in [Level::TargetPort, Level::Target, Level::Namespace, Level::Mesh] {
        let here = || {
            let holds = |one: &&Applied| one.level == level && (one.port.is_none() || one.port == port);
            let policies = applied.iter().filter(holds).filter_map(|one| policies.get(one.policy));
            policies.filter_map(Option::as_ref)
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

/// What the most specific policy says that says something; of several at one level, that the agent stays.
fn same_node(policies: &[Option<SameNode>], applied: &[Applied], port: Option<u16>) -> SameNode {
    let directness = |word: &SameNode| *word == SameNode::Direct;
    for level in [Level::TargetPort, Level::Target, Level::Namespace, Level::Mesh] {
        let holds = |one: &&Applied| one.level == level && (one.port.is_none() || one.port == port);
        let words = applied
            .iter()
            .filter(holds)
            .filter_map(|one| *policies.get(one.policy)?);
        if let Some(word) = words.min_by_key(directness) {
            return word;
        }
    }
    SameNode::default()
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
