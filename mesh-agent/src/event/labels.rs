//! Who took part: the labels that every series and line of a connection share.
//!
//! A [`Parties`] is plain content; [`PartySet`] is its one interned instance, with the series of its requests and
//! connections behind it. Labels describe roles, never single pods or ports, so that their number stays bounded.

use std::sync::{Arc, LazyLock};

use mesh_api::{
    identity::SpiffeId,
    workload::{AppProtocol, Service, Workload},
};

pub use super::metrics::PartySet;

/// Which agent tells: the source's or the destination's. On one node, both roles tell their own record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reporter {
    /// The source's side.
    Source,
    /// The destination's side.
    Destination,
}

/// How the connection between the two sides was protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ConnectionSecurity {
    /// Mutual TLS between two agents.
    MutualTls,
    /// Both ends live on this node: no wire, both identities known by their network namespaces.
    SameNode,
    /// Plaintext.
    None,
    /// Not decided before it ended.
    Unknown,
}

/// What was spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// HTTP/1.0 or HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
    /// gRPC over HTTP/2.
    Grpc,
    /// TLS of the application's own.
    Tls,
    /// Opaque bytes.
    Tcp,
}

/// A workload in the role of source or destination.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WorkloadLabels {
    /// The owner's name.
    pub workload: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its proven identity; `None` where nothing was proven.
    pub principal: Option<SpiffeId>,
    /// `app`.
    pub app: Arc<str>,
    /// `version`.
    pub version: Arc<str>,
}

/// The service that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServiceLabels {
    /// `name.namespace.svc.cluster.local`.
    pub host: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
}

/// Everything that the records of a connection or request have in common.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Parties {
    /// Who tells.
    pub reporter: Reporter,
    /// Whence.
    pub source: Arc<WorkloadLabels>,
    /// Whither.
    pub destination: Arc<WorkloadLabels>,
    /// The service asked for; `None` for a pod's own address and for the outside.
    pub service: Option<Arc<ServiceLabels>>,
    /// How it was protected.
    pub security: ConnectionSecurity,
}

/// What stands where nothing is known, as in Istio.
pub(crate) const UNKNOWN: &str = "unknown";
/// What stands in the series that take what exceeds the bound.
pub(crate) const OTHER: &str = "other";

static UNKNOWN_LABELS: LazyLock<Arc<WorkloadLabels>> = LazyLock::new(|| Arc::new(WorkloadLabels::constant(UNKNOWN)));

impl Reporter {
    /// The label's value.
    pub const fn name(self) -> &'static str {
        match self {
            Reporter::Source => "source",
            Reporter::Destination => "destination",
        }
    }
}

impl ConnectionSecurity {
    /// The label's value.
    pub const fn name(self) -> &'static str {
        match self {
            ConnectionSecurity::MutualTls => "mutual_tls",
            ConnectionSecurity::SameNode => "same_node",
            ConnectionSecurity::None => "none",
            ConnectionSecurity::Unknown => UNKNOWN,
        }
    }
}

impl Protocol {
    /// The label `request_protocol`, in Istio's three words.
    pub const fn name(self) -> &'static str {
        match self {
            Protocol::Http1 | Protocol::Http2 => "http",
            Protocol::Grpc => "grpc",
            Protocol::Tls | Protocol::Tcp => "tcp",
        }
    }

    /// `network.protocol.name` and `network.protocol.version` of OpenTelemetry.
    pub const fn network(self) -> (&'static str, &'static str) {
        match self {
            Protocol::Http1 => ("http", "1.1"),
            Protocol::Http2 => ("http", "2"),
            Protocol::Grpc => ("grpc", "2"),
            Protocol::Tls => ("tls", ""),
            Protocol::Tcp => ("tcp", ""),
        }
    }
}

impl From<AppProtocol> for Protocol {
    fn from(declared: AppProtocol) -> Protocol {
        match declared {
            AppProtocol::Http1 => Protocol::Http1,
            AppProtocol::Http2 => Protocol::Http2,
            AppProtocol::Grpc => Protocol::Grpc,
            AppProtocol::Tls => Protocol::Tls,
            AppProtocol::Detect | AppProtocol::Tcp => Protocol::Tcp,
        }
    }
}

impl WorkloadLabels {
    /// Somebody of whom nothing is known.
    pub fn unknown() -> Arc<WorkloadLabels> {
        UNKNOWN_LABELS.clone()
    }

    /// Somebody outside the view who proved an identity.
    pub fn identity(identity: &SpiffeId) -> WorkloadLabels {
        WorkloadLabels {
            namespace: identity.namespace().unwrap_or(UNKNOWN).into(),
            principal: Some(identity.clone()),
            ..WorkloadLabels::constant(UNKNOWN)
        }
    }

    /// A workload of the view; `proven` tells whether its identity may be shown as the principal.
    pub fn of(workload: &Workload, proven: bool) -> WorkloadLabels {
        WorkloadLabels {
            workload: workload.app.clone(),
            namespace: workload.name.namespace.clone(),
            principal: proven.then(|| workload.identity.clone()),
            app: workload.app.clone(),
            version: workload.version.clone(),
        }
    }

    pub(crate) fn constant(text: &str) -> WorkloadLabels {
        let text: Arc<str> = text.into();
        WorkloadLabels {
            workload: text.clone(),
            namespace: text.clone(),
            principal: None,
            app: text.clone(),
            version: text,
        }
    }

    /// The principal, or `unknown`.
    pub fn principal(&self) -> &str {
        self.principal.as_ref().map_or(UNKNOWN, SpiffeId::as_str)
    }
}

impl ServiceLabels {
    /// A service of the view.
    pub fn of(service: &Service) -> ServiceLabels {
        ServiceLabels {
            host: service.host().into(),
            name: service.name.name.clone(),
            namespace: service.name.namespace.clone(),
        }
    }
}

impl Parties {
    /// The parties of a connection, from the view's own values. A source is proven to its own agent by its network
    /// namespace, and to the other side by its certificate.
    pub fn of(
        reporter: Reporter,
        source: Option<&Workload>,
        destination: Option<&Workload>,
        service: Option<&Service>,
        security: ConnectionSecurity,
    ) -> Parties {
        let protected = matches!(security, ConnectionSecurity::MutualTls | ConnectionSecurity::SameNode);
        let labels = |workload: Option<&Workload>, proven| match workload {
            Some(workload) => Arc::new(WorkloadLabels::of(workload, proven)),
            None => WorkloadLabels::unknown(),
        };
        Parties {
            reporter,
            source: labels(source, protected || reporter == Reporter::Source),
            destination: labels(destination, protected || reporter == Reporter::Destination),
            service: service.map(|service| Arc::new(ServiceLabels::of(service))),
            security,
        }
    }

    /// The parties of what is refused before anything is known of the other side.
    pub fn unknown(reporter: Reporter) -> Parties {
        Parties {
            reporter,
            source: WorkloadLabels::unknown(),
            destination: WorkloadLabels::unknown(),
            service: None,
            security: ConnectionSecurity::Unknown,
        }
    }
}
