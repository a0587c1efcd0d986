//! Objects as an API server gives them, and what the model makes of them.

use std::net::SocketAddr;

use mesh_api::{
    document::{Document, DocumentSet, Kind, Resource, read_object},
    identity::TrustDomain,
    view::{Destination, View},
    workload::{Revision, Service, Workload},
};
use serde_json::Value;

pub fn domain() -> TrustDomain {
    TrustDomain::new("cluster.local").unwrap()
}

/// The objects of a YAML text, as JSON.
pub fn objects(yaml: &str) -> Vec<Value> {
    use serde::Deserialize;
    let documents = serde_yaml_ng::Deserializer::from_str(yaml);
    let values = documents.map(|document| Value::deserialize(document).expect("YAML"));
    values.filter(|value| !value.is_null()).collect()
}

pub fn kind_of(object: &Value) -> Kind {
    let kind = object["kind"].as_str().expect("a kind");
    Kind::find(kind).unwrap_or_else(|| panic!("kind {kind}"))
}

/// One object, read.
pub fn read(object: &Value) -> Document {
    read_object(kind_of(object), object, None).unwrap_or_else(|problems| panic!("{problems:?}"))
}

/// A set of everything in the text.
pub fn set(yaml: &str) -> DocumentSet {
    objects(yaml).iter().map(read).collect()
}

pub fn resources(set: &DocumentSet) -> Vec<Resource> {
    set.resources(&domain())
}

pub fn workloads(set: &DocumentSet) -> Vec<Workload> {
    let workload = |resource| match resource {
        Resource::Workload(workload) => Some(Workload::clone(&workload)),
        _ => None,
    };
    resources(set).into_iter().filter_map(workload).collect()
}

pub fn services(set: &DocumentSet) -> Vec<Service> {
    let service = |resource| match resource {
        Resource::Service(service) => Some(Service::clone(&service)),
        _ => None,
    };
    resources(set).into_iter().filter_map(service).collect()
}

/// The view as a node sees it, after a trip over the wire.
pub fn view_on(node: &str, set: &DocumentSet) -> View {
    let over_the_wire = |resource: &Resource| {
        let sent = mesh_api::wire::Update::Delta {
            from: Revision(1),
            to: Revision(2),
            stamp: 3,
            upserts: vec![resource.clone()],
            removed: Vec::new(),
            trust_roots: None,
        };
        let message = mesh_api::wire::control::ControllerMessage::from(&sent);
        match mesh_api::wire::Update::try_from(message).expect("a message") {
            mesh_api::wire::Update::Delta { mut upserts, .. } => upserts.remove(0),
            other => panic!("{other:?}"),
        }
    };
    let resources: Vec<Resource> = resources(set).iter().map(over_the_wire).collect();
    View::compile_on(node, domain(), Revision(7), &resources)
}

/// The endpoints behind an address, as `name address`, or what else it is.
pub fn behind(view: &View, address: &str) -> Vec<String> {
    let address: SocketAddr = address.parse().unwrap();
    match view.destination(address) {
        Destination::ServicePort(port) => port
            .backend
            .endpoints(address.is_ipv6())
            .iter()
            .map(|endpoint| format!("{} {}", endpoint.workload.name.name, endpoint.address))
            .collect(),
        Destination::Workload(endpoint) => vec![format!("workload {}", endpoint.workload.name.name)],
        Destination::NoPort(_) => vec!["no port".to_owned()],
        Destination::Outside => vec!["outside".to_owned()],
    }
}
