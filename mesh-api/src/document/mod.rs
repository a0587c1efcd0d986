//! Documents: the YAML that people write, typed, validated, and printed back.
//!
//! [`parse`] is the only door: it reads a file of one or more YAML documents and reports every problem at once, each
//! with its line, its field and what was expected. A [`DocumentSet`] holds what was accepted and turns it into the
//! [`Resource`]s that agents work with. Pods, Services and the like are Kubernetes' own kinds: their unknown fields
//! are somebody else's and are kept; in our kinds and in route specs an unknown field is a problem, since what would
//! guard must not be dropped.

mod core;
mod core_reader;
mod core_writer;
mod parse;
mod references;
mod resources;
mod set;
mod timestamp;
mod unreadable;

use std::{collections::BTreeMap, fmt, sync::Arc};

use serde_json::{Value, json};

pub(crate) use self::parse::unreadable_from_json;
pub use self::{
    core::{
        Check, Container, ContainerPort, EndpointSliceSpec, EnvVar, NodeSpec, PodSpec, Probe, ServicePortSpec,
        ServiceSpec, SliceEndpoint, SlicePort, SpecPort,
    },
    parse::{from_json, parse, policy_from_json, read_object, unreadable},
    set::{Change, DocumentSet, Resource, ResourceKey, diff},
    unreadable::Unreadable,
};
use crate::policy::{
    API_VERSION, AccessPolicy, BackendTarget, GATEWAY_GROUP, GrpcRoute, HttpRoute, MeshPolicy, ParentRef, RateLimit,
    ReferenceGrant, ServiceSubset, TargetRef, TcpRoute, TlsRoute, TrafficPolicy,
};
pub use crate::read::{
    ALIASES_MAX, DOCUMENTS_PER_SOURCE_MAX, NESTING_MAX, NODES_MAX, PROBLEMS_MAX, Problem, SOURCE_BYTES_MAX,
};

/// The namespace of a document that names none.
pub const DEFAULT_NAMESPACE: &str = "default";

/// The kinds that the mesh reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `v1` Namespace.
    Namespace,
    /// `v1` Node.
    Node,
    /// `v1` ServiceAccount.
    ServiceAccount,
    /// `v1` Pod.
    Pod,
    /// `v1` Service.
    Service,
    /// `discovery.k8s.io/v1` EndpointSlice.
    EndpointSlice,
    /// `nodemesh.io/v1alpha1` ServiceSubset.
    ServiceSubset,
    /// `gateway.networking.k8s.io` ReferenceGrant.
    ReferenceGrant,
    /// `gateway.networking.k8s.io/v1` HTTPRoute.
    HttpRoute,
    /// `gateway.networking.k8s.io/v1` GRPCRoute.
    GrpcRoute,
    /// `gateway.networking.k8s.io` TCPRoute.
    TcpRoute,
    /// `gateway.networking.k8s.io` TLSRoute.
    TlsRoute,
    /// `nodemesh.io/v1alpha1` MeshPolicy.
    MeshPolicy,
    /// `nodemesh.io/v1alpha1` TrafficPolicy.
    TrafficPolicy,
    /// `nodemesh.io/v1alpha1` RateLimit.
    RateLimit,
    /// `nodemesh.io/v1alpha1` AccessPolicy.
    AccessPolicy,
}

/// What a document is called.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DocumentKey {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace; empty for Namespace and Node.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

/// What every document has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Its namespace; empty for Namespace and Node.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// `metadata.uid`, given by an API server; empty without one. Not compared by [`diff`].
    pub uid: Arc<str>,
    /// `metadata.generation`, counted by whoever stores the document; 0 if nobody does. Not compared by [`diff`].
    pub generation: u64,
    /// `metadata.creationTimestamp` in seconds since 1970, set by whoever stores the document; 0 if nobody does. Of two
    /// routes that fit equally well the older wins. Not compared by [`diff`].
    pub created_unix: u64,
}

/// A document of one kind.
#[derive(Clone, Debug, PartialEq)]
pub struct Object<T> {
    /// Name, namespace, labels and annotations.
    pub meta: Meta,
    /// What it says. Only for Kubernetes' own kinds does this include parts of `status`.
    pub spec: T,
    /// The document as it was given, for Kubernetes' own kinds out of a text.
    raw: Option<Arc<Value>>,
}

/// One document.
#[derive(Clone, Debug)]
pub enum Document {
    /// A Namespace; its labels may enrol.
    Namespace(Object<()>),
    /// A Node.
    Node(Object<NodeSpec>),
    /// A ServiceAccount.
    ServiceAccount(Object<()>),
    /// A Pod.
    Pod(Object<PodSpec>),
    /// A Service.
    Service(Object<ServiceSpec>),
    /// An EndpointSlice.
    EndpointSlice(Object<EndpointSliceSpec>),
    /// A ReferenceGrant.
    ReferenceGrant(Object<ReferenceGrant>),
    /// An HTTPRoute.
    HttpRoute(Object<HttpRoute>),
    /// A GRPCRoute.
    GrpcRoute(Object<GrpcRoute>),
    /// A TCPRoute.
    TcpRoute(Object<TcpRoute>),
    /// A TLSRoute.
    TlsRoute(Object<TlsRoute>),
    /// A MeshPolicy.
    MeshPolicy(Object<MeshPolicy>),
    /// A TrafficPolicy.
    TrafficPolicy(Object<TrafficPolicy>),
    /// A RateLimit.
    RateLimit(Object<RateLimit>),
    /// An AccessPolicy.
    AccessPolicy(Object<AccessPolicy>),
    /// A ServiceSubset.
    ServiceSubset(Object<ServiceSubset>),
    /// A policy, route or subset that is there and cannot be read. Its kind is that which it would be.
    Unreadable(Object<Unreadable>),
}

impl Kind {
    /// Every kind, in the order in which they are best applied.
    pub const ALL: [Kind; 16] = [
        Kind::Namespace,
        Kind::Node,
        Kind::ServiceAccount,
        Kind::Pod,
        Kind::Service,
        Kind::EndpointSlice,
        Kind::ServiceSubset,
        Kind::ReferenceGrant,
        Kind::HttpRoute,
        Kind::GrpcRoute,
        Kind::TcpRoute,
        Kind::TlsRoute,
        Kind::MeshPolicy,
        Kind::TrafficPolicy,
        Kind::RateLimit,
        Kind::AccessPolicy,
    ];

    /// The name as written in documents.
    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::Namespace => "Namespace",
            Kind::Node => "Node",
            Kind::ServiceAccount => "ServiceAccount",
            Kind::Pod => "Pod",
            Kind::Service => "Service",
            Kind::EndpointSlice => "EndpointSlice",
            Kind::ServiceSubset => "ServiceSubset",
            Kind::ReferenceGrant => "ReferenceGrant",
            Kind::HttpRoute => "HTTPRoute",
            Kind::GrpcRoute => "GRPCRoute",
            Kind::TcpRoute => "TCPRoute",
            Kind::TlsRoute => "TLSRoute",
            Kind::MeshPolicy => "MeshPolicy",
            Kind::TrafficPolicy => "TrafficPolicy",
            Kind::RateLimit => "RateLimit",
            Kind::AccessPolicy => "AccessPolicy",
        }
    }

    /// The `apiVersion` as printed.
    pub const fn api_version(self) -> &'static str {
        match self {
            Kind::Namespace | Kind::Node | Kind::ServiceAccount | Kind::Pod | Kind::Service => "v1",
            Kind::EndpointSlice => "discovery.k8s.io/v1",
            Kind::HttpRoute | Kind::GrpcRoute => "gateway.networking.k8s.io/v1",
            Kind::TlsRoute => "gateway.networking.k8s.io/v1",
            Kind::TcpRoute => "gateway.networking.k8s.io/v1alpha2",
            Kind::ReferenceGrant => "gateway.networking.k8s.io/v1beta1",
            Kind::ServiceSubset | Kind::MeshPolicy | Kind::TrafficPolicy | Kind::RateLimit | Kind::AccessPolicy => {
                API_VERSION
            }
        }
    }

    /// Whether documents of this kind lie in a namespace.
    pub const fn is_namespaced(self) -> bool {
        !matches!(self, Kind::Namespace | Kind::Node)
    }

    /// Whether it is of the Gateway API's group, of which any version is read.
    pub const fn is_gateway(self) -> bool {
        matches!(
            self,
            Kind::ReferenceGrant | Kind::HttpRoute | Kind::GrpcRoute | Kind::TcpRoute | Kind::TlsRoute
        )
    }

    /// Whether it is a route: what has parents and backends.
    pub const fn is_route(self) -> bool {
        self.is_gateway() && !matches!(self, Kind::ReferenceGrant)
    }

    /// Whether it guards: what such a document forbids must stay forbidden when it cannot be read.
    pub const fn is_guard(self) -> bool {
        matches!(self, Kind::MeshPolicy | Kind::RateLimit | Kind::AccessPolicy)
    }

    /// Whether it is a policy, grant, route or subset: what agents get as [`Resource::Policy`].
    pub const fn is_policy(self) -> bool {
        match self {
            Kind::Namespace | Kind::Node | Kind::ServiceAccount | Kind::Pod | Kind::Service | Kind::EndpointSlice => {
                false
            }
            Kind::ServiceSubset
            | Kind::ReferenceGrant
            | Kind::HttpRoute
            | Kind::GrpcRoute
            | Kind::TcpRoute
            | Kind::TlsRoute
            | Kind::MeshPolicy
            | Kind::TrafficPolicy
            | Kind::RateLimit
            | Kind::AccessPolicy => true,
        }
    }

    /// The kind of that name: as written in documents, or as people type it (any case, singular or plural).
    pub fn find(word: &str) -> Option<Kind> {
        let lower = word.to_ascii_lowercase();
        Kind::ALL.into_iter().find(|kind| {
            let name = kind.as_str().to_ascii_lowercase();
            let plural = match name.strip_suffix('y') {
                Some(stem) => format!("{stem}ies"),
                None => format!("{name}s"),
            };
            lower == name || lower == plural
        })
    }

    /// The kind of that exact name and `apiVersion`; any version of the Gateway API's group is taken.
    fn of(api_version: &str, kind: &str) -> Option<Kind> {
        let found = Kind::ALL.into_iter().find(|k| k.as_str() == kind)?;
        let group = api_version.rsplit_once('/').map_or("", |(group, _)| group);
        let good = match found {
            gateway if gateway.is_gateway() => group == GATEWAY_GROUP,
            other => api_version == other.api_version(),
        };
        good.then_some(found)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl DocumentKey {
    /// The key of a document.
    pub fn new(kind: Kind, namespace: &str, name: &str) -> DocumentKey {
        let namespace = if kind.is_namespaced() { namespace } else { "" };
        DocumentKey {
            kind,
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for DocumentKey {
    /// `Service shop/cart`, `Node node-1`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            write!(f, "{} {}", self.kind, self.name)
        } else {
            write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
        }
    }
}

impl<T> Object<T> {
    /// A document made by a program.
    pub fn new(namespace: &str, name: &str, spec: T) -> Object<T> {
        let meta = Meta {
            namespace: namespace.into(),
            name: name.into(),
            ..Meta::default()
        };
        Object { meta, spec, raw: None }
    }
}

impl Document {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Document::Namespace(_) => Kind::Namespace,
            Document::Node(_) => Kind::Node,
            Document::ServiceAccount(_) => Kind::ServiceAccount,
            Document::Pod(_) => Kind::Pod,
            Document::Service(_) => Kind::Service,
            Document::EndpointSlice(_) => Kind::EndpointSlice,
            Document::ReferenceGrant(_) => Kind::ReferenceGrant,
            Document::HttpRoute(_) => Kind::HttpRoute,
            Document::GrpcRoute(_) => Kind::GrpcRoute,
            Document::TcpRoute(_) => Kind::TcpRoute,
            Document::TlsRoute(_) => Kind::TlsRoute,
            Document::MeshPolicy(_) => Kind::MeshPolicy,
            Document::TrafficPolicy(_) => Kind::TrafficPolicy,
            Document::RateLimit(_) => Kind::RateLimit,
            Document::AccessPolicy(_) => Kind::AccessPolicy,
            Document::ServiceSubset(_) => Kind::ServiceSubset,
            Document::Unreadable(object) => object.spec.kind,
        }
    }

    /// Its name, namespace, labels and annotations.
    pub fn meta(&self) -> &Meta {
        match self {
            Document::Namespace(object) | Document::ServiceAccount(object) => &object.meta,
            Document::Node(object) => &object.meta,
            Document::Pod(object) => &object.meta,
            Document::Service(object) => &object.meta,
            Document::EndpointSlice(object) => &object.meta,
            Document::ReferenceGrant(object) => &object.meta,
            Document::HttpRoute(object) => &object.meta,
            Document::GrpcRoute(object) => &object.meta,
            Document::TcpRoute(object) => &object.meta,
            Document::TlsRoute(object) => &object.meta,
            Document::MeshPolicy(object) => &object.meta,
            Document::TrafficPolicy(object) => &object.meta,
            Document::RateLimit(object) => &object.meta,
            Document::AccessPolicy(object) => &object.meta,
            Document::ServiceSubset(object) => &object.meta,
            Document::Unreadable(object) => &object.meta,
        }
    }

    /// Its name, namespace, labels and annotations, to be changed by whoever stores it.
    pub fn meta_mut(&mut self) -> &mut Meta {
        match self {
            Document::Namespace(object) | Document::ServiceAccount(object) => &mut object.meta,
            Document::Node(object) => &mut object.meta,
            Document::Pod(object) => &mut object.meta,
            Document::Service(object) => &mut object.meta,
            Document::EndpointSlice(object) => &mut object.meta,
            Document::ReferenceGrant(object) => &mut object.meta,
            Document::HttpRoute(object) => &mut object.meta,
            Document::GrpcRoute(object) => &mut object.meta,
            Document::TcpRoute(object) => &mut object.meta,
            Document::TlsRoute(object) => &mut object.meta,
            Document::MeshPolicy(object) => &mut object.meta,
            Document::TrafficPolicy(object) => &mut object.meta,
            Document::RateLimit(object) => &mut object.meta,
            Document::AccessPolicy(object) => &mut object.meta,
            Document::ServiceSubset(object) => &mut object.meta,
            Document::Unreadable(object) => &mut object.meta,
        }
    }

    /// What it is called.
    pub fn key(&self) -> DocumentKey {
        let meta = self.meta();
        DocumentKey {
            kind: self.kind(),
            namespace: meta.namespace.clone(),
            name: meta.name.clone(),
        }
    }

    /// The parents of a route; of one that cannot be read, those that can.
    pub fn parent_refs(&self) -> &[ParentRef] {
        match self {
            Document::HttpRoute(object) => &object.spec.parent_refs,
            Document::GrpcRoute(object) => &object.spec.parent_refs,
            Document::TcpRoute(object) => &object.spec.parent_refs,
            Document::TlsRoute(object) => &object.spec.parent_refs,
            Document::Unreadable(object) => &object.spec.parents,
            _ => &[],
        }
    }

    /// What the rules of a route name, each with the path of its field.
    pub fn backends(&self) -> Vec<(String, &BackendTarget)> {
        match self {
            Document::HttpRoute(object) => object.spec.backends(),
            Document::GrpcRoute(object) => object.spec.backends(),
            Document::TcpRoute(object) => object.spec.backends(),
            Document::TlsRoute(object) => object.spec.backends(),
            _ => Vec::new(),
        }
    }

    /// The targets of a policy; of one that cannot be read, where it is taken to hold.
    pub fn target_refs(&self) -> &[TargetRef] {
        match self {
            Document::MeshPolicy(object) => &object.spec.target_refs,
            Document::TrafficPolicy(object) => &object.spec.target_refs,
            Document::RateLimit(object) => &object.spec.target_refs,
            Document::AccessPolicy(object) => &object.spec.target_refs,
            Document::Unreadable(object) => &object.spec.targets,
            _ => &[],
        }
    }

    /// The normalized `spec` of a policy, route or subset: every default written out. `None` for other kinds.
    pub fn policy_spec(&self) -> Option<Value> {
        let spec = match self {
            Document::ReferenceGrant(object) => serde_json::to_value(&object.spec),
            Document::HttpRoute(object) => serde_json::to_value(&object.spec),
            Document::GrpcRoute(object) => serde_json::to_value(&object.spec),
            Document::TcpRoute(object) => serde_json::to_value(&object.spec),
            Document::TlsRoute(object) => serde_json::to_value(&object.spec),
            Document::Unreadable(object) => Ok(object.spec.spec_json()),
            Document::MeshPolicy(object) => serde_json::to_value(&object.spec),
            Document::TrafficPolicy(object) => serde_json::to_value(&object.spec),
            Document::RateLimit(object) => serde_json::to_value(&object.spec),
            Document::AccessPolicy(object) => serde_json::to_value(&object.spec),
            Document::ServiceSubset(object) => serde_json::to_value(&object.spec),
            Document::Namespace(_)
            | Document::Node(_)
            | Document::ServiceAccount(_)
            | Document::Pod(_)
            | Document::Service(_)
            | Document::EndpointSlice(_) => return None,
        };
        // Our own types, of strings, numbers, lists and maps with text keys: JSON can always say them.
        Some(spec.unwrap_or(Value::Null))
    }

    fn raw(&self) -> Option<&Value> {
        match self {
            Document::Namespace(object) | Document::ServiceAccount(object) => object.raw.as_deref(),
            Document::Node(object) => object.raw.as_deref(),
            Document::Pod(object) => object.raw.as_deref(),
            Document::Service(object) => object.raw.as_deref(),
            Document::EndpointSlice(object) => object.raw.as_deref(),
            _ => None,
        }
    }

    /// The whole document as JSON: `apiVersion`, `kind`, `metadata`, then what the kind has.
    pub fn to_json(&self) -> Value {
        let meta = self.meta();
        let mut whole = match self.raw() {
            Some(raw) => raw.clone(),
            None => json!({}),
        };
        // What the API server keeps in the metadata stays; what `Meta` has is as `Meta` has it.
        let mut metadata = match whole.get("metadata") {
            Some(Value::Object(map)) => map.clone(),
            _ => serde_json::Map::new(),
        };
        let mut put = |key: &str, value: Value, there: bool| {
            if there {
                metadata.insert(key.to_owned(), value);
            } else {
                metadata.remove(key);
            }
        };
        put("name", json!(&*meta.name), true);
        put("namespace", json!(&*meta.namespace), !meta.namespace.is_empty());
        put("labels", json!(meta.labels), !meta.labels.is_empty());
        put("annotations", json!(meta.annotations), !meta.annotations.is_empty());
        put("uid", json!(&*meta.uid), !meta.uid.is_empty());
        put("generation", json!(meta.generation), meta.generation != 0);
        put(
            "creationTimestamp",
            json!(timestamp::print(meta.created_unix)),
            meta.created_unix != 0,
        );
        whole["apiVersion"] = json!(self.kind().api_version());
        whole["kind"] = json!(self.kind().as_str());
        whole["metadata"] = Value::Object(metadata);
        if let Some(spec) = self.policy_spec() {
            whole["spec"] = spec;
        } else if self.raw().is_none()
            && let Some(whole) = whole.as_object_mut()
        {
            core_writer::write(self, whole);
        }
        whole
    }

    /// The whole document as YAML, without a leading `---`. [`parse`] reads it back to an equal document.
    pub fn to_yaml(&self) -> String {
        crate::yaml::to_string(&self.to_json()).unwrap_or_default()
    }

    /// Whether both say the same; what a store adds to the metadata is not compared.
    pub fn same_as(&self, other: &Document) -> bool {
        let mut other = other.clone();
        let (own, theirs) = (self.meta(), other.meta_mut());
        theirs.generation = own.generation;
        theirs.created_unix = own.created_unix;
        if !matches!(self, Document::Pod(_)) {
            theirs.uid = own.uid.clone();
        }
        *self == other
    }
}

impl PartialEq for Document {
    fn eq(&self, other: &Document) -> bool {
        if self.raw().is_some() || other.raw().is_some() {
            return self.to_json() == other.to_json();
        }
        // Without the text that they came from, the values are all there is.
        match (self, other) {
            (Document::Namespace(a), Document::Namespace(b)) => a == b,
            (Document::Node(a), Document::Node(b)) => a == b,
            (Document::ServiceAccount(a), Document::ServiceAccount(b)) => a == b,
            (Document::Pod(a), Document::Pod(b)) => a == b,
            (Document::Service(a), Document::Service(b)) => a == b,
            (Document::EndpointSlice(a), Document::EndpointSlice(b)) => a == b,
            (Document::ReferenceGrant(a), Document::ReferenceGrant(b)) => a == b,
            (Document::HttpRoute(a), Document::HttpRoute(b)) => a == b,
            (Document::GrpcRoute(a), Document::GrpcRoute(b)) => a == b,
            (Document::TcpRoute(a), Document::TcpRoute(b)) => a == b,
            (Document::TlsRoute(a), Document::TlsRoute(b)) => a == b,
            (Document::MeshPolicy(a), Document::MeshPolicy(b)) => a == b,
            (Document::TrafficPolicy(a), Document::TrafficPolicy(b)) => a == b,
            (Document::RateLimit(a), Document::RateLimit(b)) => a == b,
            (Document::AccessPolicy(a), Document::AccessPolicy(b)) => a == b,
            (Document::ServiceSubset(a), Document::ServiceSubset(b)) => a == b,
            (Document::Unreadable(a), Document::Unreadable(b)) => a == b,
            _ => false,
        }
    }
}
