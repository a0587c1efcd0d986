//! Which policies hold where: `targetRefs` turned into flat lists, so that compiling stays linear.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::compile::Served;
use crate::{
    policy::{PortRef, TargetRef},
    workload::{ObjectName, Service, ServicePort, Workload},
};

/// How specific a target is; more is greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    Mesh,
    Namespace,
    /// A service, or selected workloads.
    Target,
    /// One port of these.
    TargetPort,
}

/// A policy that holds for a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Applied {
    /// The policy's index in its list.
    pub policy: usize,
    /// How specific the target is that says so.
    pub level: Level,
    /// The workload's port; `None`: all of them.
    pub port: Option<u16>,
}

/// The targets of all policies of one kind, by what they name.
#[derive(Debug)]
pub(super) struct Targets {
    mesh: Vec<usize>,
    namespaces: HashMap<Arc<str>, Vec<usize>>,
    services: HashMap<ObjectName, Vec<ServiceTarget>>,
    workloads: HashMap<Arc<str>, Vec<Selector>>,
}

/// A port of a service, if only one is meant, and the policy.
type ServiceTarget = (Option<PortRef>, usize);

#[derive(Debug)]
struct Selector {
    labels: BTreeMap<String, String>,
    port: Option<PortRef>,
    policy: usize,
}

impl Targets {
    /// From each policy's `targetRefs`, in the order of the policies.
    pub fn new<'a>(policies: impl Iterator<Item = &'a [TargetRef]>) -> Targets {
        let mut targets = Targets {
            mesh: Vec::new(),
            namespaces: HashMap::new(),
            services: HashMap::new(),
            workloads: HashMap::new(),
        };
        for (policy, refs) in policies.enumerate() {
            for target in refs {
                targets.add(target, policy);
            }
        }
        targets
    }

    fn add(&mut self, target: &TargetRef, policy: usize) {
        match target {
            TargetRef::Mesh => self.mesh.push(policy),
            TargetRef::Namespace { name } => self.namespaces.entry(name.as_str().into()).or_default().push(policy),
            TargetRef::Service { namespace, name, port } => {
                let key = ObjectName::new(namespace, name);
                self.services.entry(key).or_default().push((port.clone(), policy));
            }
            TargetRef::Workloads {
                namespace,
                labels,
                port,
            } => {
                let selector = Selector {
                    labels: labels.clone(),
                    port: port.clone(),
                    policy,
                };
                self.workloads
                    .entry(namespace.as_str().into())
                    .or_default()
                    .push(selector);
            }
        }
    }

    /// The policies that hold for a workload as a destination, each once per level and port.
    pub fn of_workload(&self, workload: &Workload, served: &[Served<'_>]) -> Vec<Applied> {
        let namespace = &*workload.name.namespace;
        let mut applied = self.of_namespace(namespace);
        for one in served {
            for (port, policy) in self.services.get(&one.service.name).into_iter().flatten() {
                let level = match port {
                    None => Level::Target,
                    Some(port) if port.is(&one.port.name, one.port.port) => Level::TargetPort,
                    Some(_) => continue,
                };
                applied.push(Applied {
                    policy: *policy,
                    level,
                    port: Some(one.target),
                });
            }
        }
        for selector in self.workloads.get(namespace).into_iter().flatten() {
            let has =
                |(key, value): (&String, &String)| workload.labels.get(key.as_str()).is_some_and(|v| **v == **value);
            if !selector.labels.iter().all(has) {
                continue;
            }
            match &selector.port {
                None => applied.push(Applied {
                    policy: selector.policy,
                    level: Level::Target,
                    port: None,
                }),
                Some(port) => applied.extend(port_numbers(workload, port).map(|number| Applied {
                    policy: selector.policy,
                    level: Level::TargetPort,
                    port: Some(number),
                })),
            }
        }
        applied.sort_unstable();
        applied.dedup();
        applied
    }

    /// The policies that hold for sending to a service's port, the most specific first, each once.
    pub fn of_service_port(&self, service: &Service, port: &ServicePort) -> Vec<usize> {
        let mut applied = self.of_namespace(&service.name.namespace);
        for (wanted, policy) in self.services.get(&service.name).into_iter().flatten() {
            let level = match wanted {
                None => Level::Target,
                Some(wanted) if wanted.is(&port.name, port.port) => Level::TargetPort,
                Some(_) => continue,
            };
            applied.push(Applied {
                policy: *policy,
                level,
                port: None,
            });
        }
        // The sort is stable and policies are in order of their names, so equals stay so.
        applied.sort_by_key(|one| (std::cmp::Reverse(one.level), one.policy));
        let mut policies = Vec::with_capacity(applied.len());
        for one in applied {
            if !policies.contains(&one.policy) {
                policies.push(one.policy);
            }
        }
        policies
    }

    fn of_namespace(&self, namespace: &str) -> Vec<Applied> {
        let at = |level: Level| {
            move |&policy: &usize| Applied {
                policy,
                level,
                port: None,
            }
        };
        let in_namespace = self.namespaces.get(namespace).into_iter().flatten();
        self.mesh
            .iter()
            .map(at(Level::Mesh))
            .chain(in_namespace.map(at(Level::Namespace)))
            .collect()
    }
}

/// The numbers that a reference to a workload's own port means; a name may stand for none.
fn port_numbers(workload: &Workload, port: &PortRef) -> impl Iterator<Item = u16> {
    let by_number = match port {
        PortRef::Number(number) => Some(*number),
        PortRef::Name(_) => None,
    };
    let by_name = workload
        .ports
        .iter()
        .filter(|p| matches!(port, PortRef::Name(name) if **name == *p.name));
    by_number.into_iter().chain(by_name.map(|p| p.port))
}
