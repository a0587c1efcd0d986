//! What documents say of each other: warnings about what is named and not there.

use std::{collections::BTreeMap, net::IpAddr};

use super::{
    Document, DocumentKey, DocumentSet, Kind, Meta, Problem, ServiceSpec,
    core_reader::{ENROL_LABEL, EXCLUDE_INBOUND_ANNOTATION, EXCLUDE_OUTBOUND_ANNOTATION, ports_of_annotation},
};
use crate::policy::{BackendKind, BackendTarget, ParentRef, TargetRef};

pub(super) fn validate(set: &DocumentSet) -> Vec<Problem> {
    let mut check = Check {
        set,
        problems: Vec::new(),
        addresses: BTreeMap::new(),
    };
    for document in set.iter() {
        check.document(document);
    }
    check.problems
}

pub(super) fn validate_pods(set: &DocumentSet) -> Vec<(DocumentKey, Problem)> {
    let mut check = Check {
        set,
        problems: Vec::new(),
        addresses: BTreeMap::new(),
    };
    let mut found = Vec::new();
    for document in set.of_kind(Kind::Namespace).chain(set.of_kind(Kind::Pod)) {
        check.document(document);
        let key = document.key();
        found.extend(check.problems.drain(..).map(|problem| (key.clone(), problem)));
    }
    found
}

struct Check<'a> {
    set: &'a DocumentSet,
    problems: Vec<Problem>,
    /// Who has which address.
    addresses: BTreeMap<IpAddr, DocumentKey>,
}

impl Check<'_> {
    fn warn(&mut self, about: &DocumentKey, path: String, message: String, expected: &str) {
        let (source, expected) = (about.to_string(), expected.to_owned());
        self.problems.push(Problem {
            source,
            line: None,
            path,
            message,
            expected,
        });
    }

    fn service(&self, namespace: &str, name: &str) -> Option<&ServiceSpec> {
        match self.set.get(&DocumentKey::new(Kind::Service, namespace, name)) {
            Some(Document::Service(object)) => Some(&object.spec),
            _ => None,
        }
    }

    fn document(&mut self, document: &Document) {
        let key = document.key();
        match document {
            Document::ServiceAccount(_)
            | Document::Node(_)
            | Document::EndpointSlice(_)
            | Document::ReferenceGrant(_) => {}
            Document::Namespace(object) => self.enrolment(&key, &object.meta),
            Document::Pod(pod) => {
                self.enrolment(&key, &pod.meta);
                self.annotations(&key, &pod.meta);
                if !pod.spec.host_network && !pod.spec.finished {
                    self.own_addresses(&key, &pod.spec.addresses, "status.podIPs");
                }
            }
            Document::Service(service) => self.own_addresses(&key, &service.spec.addresses, "spec.clusterIPs"),
            Document::HttpRoute(_) | Document::GrpcRoute(_) | Document::TcpRoute(_) | Document::TlsRoute(_) => {
                self.route(&key, document);
            }
            Document::Unreadable(object) => {
                let message = format!("cannot be read: {}", object.spec.why());
                self.warn(&key, String::new(), message, "a document that this version reads");
            }
            Document::MeshPolicy(policy) => self.targets(&key, &policy.spec.target_refs),
            Document::TrafficPolicy(policy) => self.targets(&key, &policy.spec.target_refs),
            Document::RateLimit(policy) => self.targets(&key, &policy.spec.target_refs),
            Document::AccessPolicy(policy) => self.targets(&key, &policy.spec.target_refs),
            Document::ServiceSubset(subset) => {
                self.named_service(&key, "spec.service".to_owned(), &key.namespace, &subset.spec.service);
            }
        }
    }

    /// What a text is refused for and an API server has taken.
    fn enrolment(&mut self, key: &DocumentKey, meta: &Meta) {
        if let Some(value) = meta.labels.get(ENROL_LABEL)
            && !matches!(value.as_str(), "enabled" | "disabled")
        {
            let path = format!("metadata.labels[{ENROL_LABEL:?}]");
            self.warn(
                key,
                path,
                format!("{value:?} is not known and not looked at"),
                "enabled or disabled",
            );
        }
    }

    fn annotations(&mut self, key: &DocumentKey, meta: &Meta) {
        for name in [EXCLUDE_INBOUND_ANNOTATION, EXCLUDE_OUTBOUND_ANNOTATION] {
            if let Some(text) = meta.annotations.get(name)
                && ports_of_annotation(text).is_none()
            {
                let path = format!("metadata.annotations[{name:?}]");
                let message = format!("{text:?} is no list of ports; no port is excluded");
                self.warn(key, path, message, "ports separated by commas, such as \"80,443\"");
            }
        }
    }

    fn own_addresses(&mut self, key: &DocumentKey, addresses: &[IpAddr], path: &str) {
        for address in addresses {
            if let Some(other) = self.addresses.insert(*address, key.clone())
                && other != *key
            {
                let message = format!("{address} is also the address of {other}");
                self.warn(key, path.to_owned(), message, "an address of its own");
            }
        }
    }

    /// Warns unless the service exists.
    fn named_service(&mut self, key: &DocumentKey, path: String, namespace: &str, name: &str) -> bool {
        let found = self.service(namespace, name).is_some();
        if !found {
            self.warn(
                key,
                path,
                format!("there is no Service {namespace}/{name}"),
                "an existing Service",
            );
        }
        found
    }

    fn named_port(&mut self, key: &DocumentKey, path: String, namespace: &str, name: &str, port: u16) {
        let missing = self
            .service(namespace, name)
            .is_some_and(|spec| spec.ports.iter().all(|p| p.port != port));
        if missing {
            self.warn(
                key,
                path,
                format!("Service {namespace}/{name} has no port {port}"),
                "one of its ports",
            );
        }
    }

    fn route(&mut self, key: &DocumentKey, route: &Document) {
        let parents = route.parent_refs();
        if !parents.iter().any(ParentRef::is_service) {
            let message = "no parent is a Service: the mesh does not use this route".to_owned();
            self.warn(key, "spec.parentRefs".to_owned(), message, "a parent with kind Service");
        }
        for (index, parent) in parents.iter().enumerate().filter(|(_, p)| p.is_service()) {
            let path = format!("spec.parentRefs[{index}]");
            let namespace = parent.namespace.as_deref().unwrap_or(&key.namespace);
            if !self.named_service(key, path.clone(), namespace, &parent.name) {
                continue;
            }
            if let Some(port) = parent.port {
                self.named_port(key, format!("{path}.port"), namespace, &parent.name, port);
            }
            let section = parent.section_name.as_deref();
            let unknown = section.filter(|section| {
                self.service(namespace, &parent.name)
                    .is_some_and(|s| s.ports.iter().all(|p| p.name != *section))
            });
            if let Some(section) = unknown {
                let message = format!("Service {namespace}/{} has no port {section:?}", parent.name);
                self.warn(
                    key,
                    format!("{path}.sectionName"),
                    message,
                    "the name of one of its ports",
                );
            }
        }
        for (path, backend) in route.backends() {
            self.backend(key, path, backend);
        }
    }

    fn backend(&mut self, key: &DocumentKey, path: String, backend: &BackendTarget) {
        let namespace = backend.namespace.as_deref().unwrap_or(&key.namespace);
        let service = match &backend.kind {
            BackendKind::Other { .. } => {
                let message = format!("the mesh cannot send to a {}: this share is refused", backend.kind);
                self.warn(key, format!("{path}.kind"), message, "Service or ServiceSubset");
                return;
            }
            BackendKind::Service => backend.name.clone(),
            BackendKind::ServiceSubset => {
                match self
                    .set
                    .get(&DocumentKey::new(Kind::ServiceSubset, namespace, &backend.name))
                {
                    Some(Document::ServiceSubset(subset)) => subset.spec.service.clone(),
                    _ => {
                        let message = format!("there is no ServiceSubset {namespace}/{}", backend.name);
                        self.warn(key, path, message, "an existing ServiceSubset");
                        return;
                    }
                }
            }
        };
        if self.named_service(key, path.clone(), namespace, &service) {
            self.named_port(key, format!("{path}.port"), namespace, &service, backend.port);
        }
    }

    fn targets(&mut self, key: &DocumentKey, targets: &[TargetRef]) {
        for (index, target) in targets.iter().enumerate() {
            let path = format!("spec.targetRefs[{index}]");
            match target {
                TargetRef::Mesh | TargetRef::Workloads { .. } => {}
                TargetRef::Namespace { name } => {
                    if self.set.get(&DocumentKey::new(Kind::Namespace, "", name)).is_none() {
                        self.warn(
                            key,
                            path,
                            format!("there is no Namespace {name}"),
                            "an existing Namespace",
                        );
                    }
                }
                TargetRef::Service { namespace, name, port } => {
                    if !self.named_service(key, path.clone(), namespace, name) {
                        continue;
                    }
                    let missing = port.as_ref().filter(|port| {
                        let spec = self.service(namespace, name);
                        spec.is_some_and(|spec| !spec.ports.iter().any(|p| port.is(&p.name, p.port)))
                    });
                    if let Some(port) = missing {
                        let message = format!("Service {namespace}/{name} has no port {port}");
                        self.warn(
                            key,
                            format!("{path}.sectionName"),
                            message,
                            "one of its ports, by name or number",
                        );
                    }
                }
            }
        }
    }
}
