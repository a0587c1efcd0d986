//! Reads Kubernetes' own kinds, tolerating every field that the mesh does not look at.
//!
//! Of an object out of an API server ([`Origin::Cluster`]) only what decisions look at is read: it has been validated
//! there, there is nobody to answer a problem to, and refusing it would not make the pod go away. What is wrong with its
//! annotations or enrolment label is told by [`super::DocumentSet::validate`]; until it is mended the label and the
//! annotation count as absent.

use std::{net::IpAddr, time::Duration};

use super::{
    core::{
        Check, Container, ContainerPort, EndpointSliceSpec, EnvVar, NodeSpec, PodSpec, Probe, ServicePortSpec,
        ServiceSpec, SliceEndpoint, SlicePort, SpecPort,
    },
    parse::Origin,
};
use crate::{
    policy::check,
    read::{Field, Fields, port, quoted},
    workload::AppProtocol,
};

/// The label that enrols.
pub(super) const ENROL_LABEL: &str = "nodemesh.io/mesh";
/// The annotation with a pod's network namespace.
pub(super) const NETNS_ANNOTATION: &str = "nodemesh.io/netns";
/// The annotation with inbound ports that are left alone.
pub(super) const EXCLUDE_INBOUND_ANNOTATION: &str = "nodemesh.io/exclude-inbound-ports";
/// The annotation with outbound ports that are left alone.
pub(super) const EXCLUDE_OUTBOUND_ANNOTATION: &str = "nodemesh.io/exclude-outbound-ports";

/// The most containers of a pod, and the most items of any list in it.
const CONTAINERS_MAX: usize = 64;
const ITEMS_MAX: usize = 1024;
/// The most addresses of a pod, service or node.
const ADDRESSES_MAX: usize = 16;
/// The most ports that one annotation excludes.
pub(super) const EXCLUDED_PORTS_MAX: usize = 64;
/// The most endpoints of an EndpointSlice and addresses of each, as in Kubernetes.
const ENDPOINTS_MAX: usize = 1000;
const ENDPOINT_ADDRESSES_MAX: usize = 100;
/// How long a source is bound to an endpoint unless the service says otherwise, as in Kubernetes.
const AFFINITY_SECONDS_DEFAULT: u32 = 10_800;
/// The longest time of a probe, in seconds.
const SECONDS_MAX: u32 = 86_400;

/// Checks the enrolment label of a Namespace or Pod: a typing error must not leave a workload outside in silence.
pub(super) fn enrolment(fields: &mut Fields) -> bool {
    let Some(metadata) = fields.get("metadata").and_then(|f| f.fields_if_map()) else {
        return true;
    };
    let mut metadata = metadata;
    let Some(labels) = metadata.get("labels").and_then(|f| f.fields_if_map()) else {
        return true;
    };
    let mut labels = labels;
    labels
        .read(ENROL_LABEL, |f| f.choice(&[("enabled", ()), ("disabled", ())], &[]))
        .is_some()
}

/// Ports in the form `80,443`.
pub(super) fn ports_of_annotation(text: &str) -> Option<Vec<u16>> {
    let words = text.split(',').map(str::trim).filter(|word| !word.is_empty());
    let ports: Vec<u16> = words
        .map(|word| word.parse().ok().filter(|port| *port > 0))
        .collect::<Option<_>>()?;
    (ports.len() <= EXCLUDED_PORTS_MAX).then_some(ports)
}

fn pod_annotations(fields: &mut Fields) -> bool {
    let Some(mut metadata) = fields.get("metadata").and_then(|f| f.fields_if_map()) else {
        return true;
    };
    let Some(mut annotations) = metadata.get("annotations").and_then(|f| f.fields_if_map()) else {
        return true;
    };
    let ports = |f: &Field| {
        let good = ports_of_annotation(f.text()?);
        if good.is_none() {
            let expected = format!("at most {EXCLUDED_PORTS_MAX} ports separated by commas, such as \"80,443\"");
            f.refuse(format!("{} is no list of ports", quoted(f.text()?)), expected);
        }
        good
    };
    let inbound = annotations.read(EXCLUDE_INBOUND_ANNOTATION, ports).is_some();
    let outbound = annotations.read(EXCLUDE_OUTBOUND_ANNOTATION, ports).is_some();
    let netns = annotations.read(NETNS_ANNOTATION, |f| {
        let text = f.text()?;
        if !text.starts_with('/') || text.contains('\0') {
            f.refuse(
                format!("{} is no absolute path", quoted(text)),
                "the path of a network namespace, such as /run/netns/cart",
            );
            return None;
        }
        Some(())
    });
    inbound && outbound && netns.is_some()
}

/// A Node.
pub(super) fn node(fields: &mut Fields) -> Option<NodeSpec> {
    let addresses = fields.read("status", |status| {
        let mut status = status.fields()?;
        let addresses = status.list("addresses", ITEMS_MAX, |f| {
            let mut entry = f.fields()?;
            let kind = entry
                .need("type", "InternalIP, ExternalIP, Hostname, …")
                .and_then(|f| f.text())?;
            let address = entry.need("address", "an address")?;
            if kind == "InternalIP" {
                Some(Some(address.address()?))
            } else {
                Some(None)
            }
        })?;
        Some(addresses.into_iter().flatten().collect::<Vec<IpAddr>>())
    })?;
    Some(NodeSpec {
        addresses: addresses.unwrap_or_default(),
    })
}

fn texts(fields: &mut Fields, name: &'static str) -> Option<Vec<String>> {
    fields.list(name, ITEMS_MAX, |f| f.text().map(str::to_owned))
}

/// A Pod.
pub(super) fn pod(fields: &mut Fields, origin: Origin) -> Option<PodSpec> {
    let good = origin == Origin::Cluster || (enrolment(fields) & pod_annotations(fields));
    let terminating = fields
        .get("metadata")
        .and_then(|f| f.fields_if_map())
        .is_some_and(|metadata| metadata.has("deletionTimestamp"));
    let spec = fields.need("spec", "containers").and_then(|f| pod_spec(&f, origin));
    let status = fields.read("status", pod_status);
    let (mut spec, status) = (spec?, status?.unwrap_or_default());
    spec.addresses = status.addresses;
    spec.finished = status.finished;
    // A cluster's kubelet says when a pod is ready; until it has, the pod is not.
    spec.ready = status.ready.or((origin == Origin::Cluster).then_some(false));
    spec.terminating = terminating;
    good.then_some(spec)
}

fn pod_spec(field: &Field, origin: Origin) -> Option<PodSpec> {
    let mut fields = field.fields()?;
    let service_account = fields.read("serviceAccountName", check::dns_name);
    let node = fields.read("nodeName", check::dns_name);
    let host_network = fields.read("hostNetwork", Field::boolean);
    let containers = fields
        .need("containers", "at least one container")
        .and_then(|f| containers(&f, origin));
    let sidecars = fields.read("initContainers", |f| sidecars(f, origin));
    let spec = PodSpec {
        service_account: service_account?.unwrap_or_else(|| "default".to_owned()),
        node: node?,
        host_network: host_network?.unwrap_or(false),
        containers: containers?,
        sidecars: sidecars?.unwrap_or_default(),
        ..PodSpec::default()
    };
    (origin == Origin::Cluster || probes_find_their_ports(field, &spec)).then_some(spec)
}

/// The init containers that stay.
fn sidecars(field: &Field, origin: Origin) -> Option<Vec<Container>> {
    let stays = |field: &&Field| {
        let policy = field.fields_if_map().and_then(|mut fields| fields.get("restartPolicy"));
        policy.is_some_and(|f| matches!(&f.node().tree, crate::read::Tree::Text(text) if text == "Always"))
    };
    let items = field.items(CONTAINERS_MAX)?;
    items.iter().filter(stays).map(|item| container(item, origin)).collect()
}

fn containers(field: &Field, origin: Origin) -> Option<Vec<Container>> {
    let items = field.items(CONTAINERS_MAX)?;
    if items.is_empty() {
        field.refuse("is empty", "at least one container");
        return None;
    }
    let containers: Vec<Option<Container>> = items.iter().map(|item| container(item, origin)).collect();
    check::unique(
        &items,
        containers.iter().map(|c| c.as_ref().map(|c| c.name.as_str())),
        "name",
    );
    containers.into_iter().collect()
}

fn probes_find_their_ports(field: &Field, spec: &PodSpec) -> bool {
    let mut good = true;
    for container in spec.running() {
        for probe in container.probes() {
            if let Some(SpecPort::Name(name)) = probe.check.port()
                && container.port_number(&SpecPort::Name(name.clone())).is_none()
            {
                let message = format!(
                    "a probe of container {} asks for port {}",
                    container.name,
                    quoted(&name)
                );
                field.refuse(message, "the name of one of its ports");
                good = false;
            }
        }
    }
    good
}

fn container(field: &Field, origin: Origin) -> Option<Container> {
    let mut fields = field.fields()?;
    let name = fields
        .need("name", "the container's name")
        .and_then(|f| check::dns_label(&f));
    if origin == Origin::Cluster {
        let ports = fields.list("ports", ITEMS_MAX, container_port);
        let mut port_asked = |name| Some(fields.read(name, probe)?.and_then(Probe::only_its_port));
        let (readiness, liveness, startup) = (
            port_asked("readinessProbe"),
            port_asked("livenessProbe"),
            port_asked("startupProbe"),
        );
        return Some(Container {
            name: name?,
            ports: ports?.into_iter().flatten().collect(),
            readiness: readiness?,
            liveness: liveness?,
            startup: startup?,
            ..Container::default()
        });
    }
    let command = texts(&mut fields, "command");
    let args = texts(&mut fields, "args");
    let working_dir = fields.read("workingDir", |f| f.text().map(str::to_owned));
    let env = fields.list("env", ITEMS_MAX, env_var);
    let ports = fields.list("ports", ITEMS_MAX, container_port);
    let readiness = fields.read("readinessProbe", probe);
    let liveness = fields.read("livenessProbe", probe);
    let startup = fields.read("startupProbe", probe);
    Some(Container {
        name: name?,
        command: command?,
        args: args?,
        working_dir: working_dir?,
        env: env?.into_iter().flatten().collect(),
        ports: ports?.into_iter().flatten().collect(),
        readiness: readiness?,
        liveness: liveness?,
        startup: startup?,
    })
}

/// `Some(None)`: the value comes from somewhere that only a cluster has.
fn env_var(field: &Field) -> Option<Option<EnvVar>> {
    let mut fields = field.fields()?;
    let name = fields.need("name", "the variable's name").and_then(|f| {
        let text = f.word()?;
        if text.contains(['=', '\0']) {
            f.refuse(
                format!("{} is not a variable's name", quoted(text)),
                "a name without '='",
            );
            return None;
        }
        Some(text)
    });
    let elsewhere = fields.has("valueFrom");
    let value = fields.read("value", Field::text);
    let (name, value) = (name?, value?);
    Some((!elsewhere).then(|| EnvVar {
        name: name.to_owned(),
        value: value.unwrap_or_default().to_owned(),
    }))
}

/// `Some(true)` for TCP.
fn is_tcp(fields: &mut Fields) -> Option<bool> {
    fields
        .read("protocol", |f| {
            f.choice(&[("TCP", true), ("UDP", false), ("SCTP", false)], &[])
        })
        .map(|tcp| tcp.unwrap_or(true))
}

fn container_port(field: &Field) -> Option<Option<ContainerPort>> {
    let mut fields = field.fields()?;
    let name = fields.read("name", check::dns_label);
    let number = fields.need("containerPort", "a port").and_then(|f| port(&f));
    let tcp = is_tcp(&mut fields)?;
    let port = ContainerPort {
        name: name?.unwrap_or_default(),
        port: number?,
    };
    Some(tcp.then_some(port))
}

fn spec_port(field: &Field) -> Option<SpecPort> {
    if matches!(field.node().tree, crate::read::Tree::Number(_)) {
        return port(field).map(SpecPort::Number);
    }
    check::dns_label(field).map(SpecPort::Name)
}

fn seconds(fields: &mut Fields, name: &'static str, least: u32, default: u32) -> Option<Duration> {
    let seconds = fields.read(name, |f| f.integer(least..=SECONDS_MAX))?;
    Some(Duration::from_secs(seconds.unwrap_or(default).into()))
}

fn probe(field: &Field) -> Option<Probe> {
    let mut fields = field.fields()?;
    let http = fields.read("httpGet", http_get);
    let tcp = fields.read("tcpSocket", |f| {
        let port = f
            .fields()?
            .need("port", "a port's number or name")
            .and_then(|f| spec_port(&f))?;
        Some(Check::TcpSocket { port })
    });
    let grpc = fields.read("grpc", |f| {
        let mut fields = f.fields()?;
        let number = fields.need("port", "a port").and_then(|f| port(&f));
        let service = fields.read("service", Field::text);
        Some(Check::Grpc {
            port: number?,
            service: service?.unwrap_or_default().to_owned(),
        })
    });
    let exec = fields.read("exec", |f| {
        let command = texts(&mut f.fields()?, "command")?;
        if command.is_empty() {
            f.refuse("runs nothing", "a command");
            return None;
        }
        Some(Check::Exec { command })
    });
    let initial_delay = seconds(&mut fields, "initialDelaySeconds", 0, 0);
    let period = seconds(&mut fields, "periodSeconds", 1, 10);
    let timeout = seconds(&mut fields, "timeoutSeconds", 1, 1);
    let success = fields.read("successThreshold", |f| f.integer(1..=SECONDS_MAX));
    let failure = fields.read("failureThreshold", |f| f.integer(1..=SECONDS_MAX));
    let mut checks = [http?, tcp?, grpc?, exec?].into_iter().flatten();
    let (check, more) = (checks.next(), checks.next());
    if check.is_none() || more.is_some() {
        field.refuse("has no single check", "one of httpGet, tcpSocket, grpc and exec");
        return None;
    }
    Some(Probe {
        check: check?,
        initial_delay: initial_delay?,
        period: period?,
        timeout: timeout?,
        success_threshold: success?.unwrap_or(1),
        failure_threshold: failure?.unwrap_or(3),
    })
}

fn http_get(field: &Field) -> Option<Check> {
    let mut fields = field.fields()?;
    let path = fields.read("path", |f| {
        let text = f.text()?;
        if !text.is_empty() && !text.starts_with('/') {
            f.refuse(format!("{} does not start with '/'", quoted(text)), "an absolute path");
            return None;
        }
        Some(text)
    });
    let port = fields
        .need("port", "a port's number or name")
        .and_then(|f| spec_port(&f));
    let https = fields.read("scheme", |f| f.choice(&[("HTTP", false), ("HTTPS", true)], &[]));
    let headers = fields.list("httpHeaders", ITEMS_MAX, |f| {
        let mut fields = f.fields()?;
        let name = fields
            .need("name", "a header name")
            .and_then(|f| check::header_name(&f));
        let value = fields.need("value", "a string").and_then(|f| f.text());
        Some((name?, value?.to_owned()))
    });
    Some(Check::HttpGet {
        path: path?.filter(|path| !path.is_empty()).unwrap_or("/").to_owned(),
        port: port?,
        https: https?.unwrap_or(false),
        headers: headers?,
    })
}

#[derive(Default)]
struct PodStatus {
    addresses: Vec<IpAddr>,
    ready: Option<bool>,
    finished: bool,
}

fn pod_status(field: &Field) -> Option<PodStatus> {
    let mut fields = field.fields()?;
    let phase = fields.read("phase", Field::text);
    let many = fields.list("podIPs", ADDRESSES_MAX, |f| {
        f.fields()?.need("ip", "an address").and_then(|f| f.address())
    });
    let one = fields.read("podIP", Field::address);
    let conditions = fields.list("conditions", ITEMS_MAX, |f| {
        let mut condition = f.fields()?;
        let kind = condition.need("type", "a type of condition").and_then(|f| f.text());
        let status = condition
            .need("status", "True, False or Unknown")
            .and_then(|f| f.text());
        Some((kind?, status?))
    });
    let (many, one) = (many?, one?);
    let addresses = if many.is_empty() {
        one.into_iter().collect()
    } else {
        many
    };
    let ready = conditions?
        .into_iter()
        .find(|(kind, _)| *kind == "Ready")
        .map(|(_, status)| status == "True");
    Some(PodStatus {
        addresses,
        ready,
        finished: matches!(phase?, Some("Succeeded" | "Failed")),
    })
}

/// A Service.
pub(super) fn service(fields: &mut Fields) -> Option<ServiceSpec> {
    let spec = fields.need("spec", "ports").and_then(|f| service_spec(&f));
    let of_balancer = fields.read("status", |f| {
        f.fields()?.read("loadBalancer", |f| {
            f.fields()?.list("ingress", ADDRESSES_MAX, |f| {
                let mut fields = f.fields()?;
                let address = fields.read("ip", Field::address)?;
                // With another mode the balancer itself is to be asked, from within the cluster, too.
                let mode = fields.read("ipMode", Field::text)?;
                Some(address.filter(|_| mode.is_none_or(|mode| mode == "VIP")))
            })
        })
    });
    let (mut spec, of_balancer) = (spec?, of_balancer?);
    let of_balancer = of_balancer.flatten().unwrap_or_default();
    spec.external_addresses.extend(of_balancer.into_iter().flatten());
    spec.external_addresses.sort_unstable();
    spec.external_addresses.dedup();
    Some(spec)
}

fn cluster_address(field: &Field) -> Option<Option<IpAddr>> {
    match field.text()? {
        "None" | "" => Some(None),
        _ => field.parse("an IPv4 or IPv6 address, or None").map(Some),
    }
}

fn service_spec(field: &Field) -> Option<ServiceSpec> {
    let mut fields = field.fields()?;
    let one = fields.get("clusterIP");
    let headless = one
        .as_ref()
        .is_some_and(|f| matches!(&f.node().tree, crate::read::Tree::Text(t) if t == "None"));
    let one = match one {
        Some(field) => cluster_address(&field),
        None => Some(None),
    };
    let many = fields.list("clusterIPs", ADDRESSES_MAX, cluster_address);
    let selector = fields.read("selector", check::labels);
    let publish_not_ready = fields.read("publishNotReadyAddresses", Field::boolean);
    let ports = fields.read("ports", service_ports);
    let external = fields.list("externalIPs", ADDRESSES_MAX, Field::address);
    let is_name = fields.read("type", |f| f.text().map(|kind| kind == "ExternalName"));
    let external_name = fields.read("externalName", |f| f.text().map(str::to_owned));
    let affinity = fields.read("sessionAffinity", |f| {
        f.choice(&[("None", false), ("ClientIP", true)], &[])
    });
    let timeout = fields.read("sessionAffinityConfig", |f| {
        let seconds = |f: &Field| f.integer(1..=SECONDS_MAX);
        f.fields()?
            .read("clientIP", |f| f.fields()?.read("timeoutSeconds", seconds))
    });
    let node_local = fields.read("internalTrafficPolicy", |f| {
        f.choice(&[("Cluster", false), ("Local", true)], &[])
    });
    let (affinity, timeout) = (affinity?.unwrap_or(false), timeout?.flatten().flatten());
    let timeout = Duration::from_secs(timeout.unwrap_or(AFFINITY_SECONDS_DEFAULT).into());
    let many: Vec<IpAddr> = many?.into_iter().flatten().collect();
    let spec = ServiceSpec {
        addresses: if many.is_empty() {
            one?.into_iter().collect()
        } else {
            many
        },
        headless,
        ports: ports?.unwrap_or_default(),
        selector: selector?.unwrap_or_default(),
        publish_not_ready: publish_not_ready?.unwrap_or(false),
        external_addresses: external?,
        external_name: None,
        session_affinity: affinity.then_some(timeout),
        node_local: node_local?.unwrap_or(false),
    };
    let (is_name, external_name) = (is_name?.unwrap_or(false), external_name?);
    if !is_name {
        return Some(spec);
    }
    // A name in DNS: what else is written has no meaning, as in Kubernetes.
    Some(ServiceSpec {
        external_name: Some(external_name.unwrap_or_default()),
        ports: spec.ports,
        ..ServiceSpec::default()
    })
}

/// An EndpointSlice.
pub(super) fn endpoint_slice(fields: &mut Fields) -> Option<EndpointSliceSpec> {
    let by_name = fields.read("addressType", |f| f.text().map(|kind| kind == "FQDN"));
    let ports = fields.list("ports", ITEMS_MAX, |f| {
        let mut fields = f.fields()?;
        let name = fields.read("name", Field::text);
        let number = fields.read("port", port);
        let tcp = is_tcp(&mut fields)?;
        let (name, number) = (name?.unwrap_or_default().to_owned(), number?);
        // No number stands for every port, which no service can name.
        Some(number.filter(|_| tcp).map(|port| SlicePort { name, port }))
    });
    let endpoints = match by_name? {
        Some(true) => Some(Vec::new()),
        _ => fields.list("endpoints", ENDPOINTS_MAX, slice_endpoint),
    };
    Some(EndpointSliceSpec {
        ports: ports?.into_iter().flatten().collect(),
        endpoints: endpoints?,
    })
}

fn slice_endpoint(field: &Field) -> Option<SliceEndpoint> {
    let mut fields = field.fields()?;
    let addresses = fields.list("addresses", ENDPOINT_ADDRESSES_MAX, Field::address);
    let node = fields.read("nodeName", Field::text);
    let conditions = fields.read("conditions", |f| {
        let mut fields = f.fields()?;
        let ready = fields.read("ready", Field::boolean)?.unwrap_or(true);
        let serving = fields.read("serving", Field::boolean)?.unwrap_or(ready);
        let terminating = fields.read("terminating", Field::boolean)?.unwrap_or(false);
        Some((ready, serving, terminating))
    });
    let pod = fields.read("targetRef", |f| {
        let mut fields = f.fields()?;
        let kind = fields.read("kind", Field::text)?;
        let name = fields.read("name", Field::text)?.unwrap_or_default();
        let uid = fields.read("uid", Field::text)?.unwrap_or_default();
        Some((kind == Some("Pod")).then(|| (name.to_owned(), uid.to_owned())))
    });
    let hints = fields.read("hints", |f| {
        let mut fields = f.fields()?;
        let name = |f: &Field| f.fields()?.read("name", Field::text).flatten().map(str::to_owned);
        let zones = fields.list("forZones", ITEMS_MAX, name);
        let nodes = fields.list("forNodes", ITEMS_MAX, name);
        Some((zones?, nodes?))
    });
    let (ready, serving, terminating) = conditions?.unwrap_or((true, true, false));
    let (for_zones, for_nodes) = hints?.unwrap_or_default();
    Some(SliceEndpoint {
        addresses: addresses?,
        pod: pod?.flatten(),
        node: node?.unwrap_or_default().to_owned(),
        ready,
        serving,
        terminating,
        for_zones,
        for_nodes,
    })
}

fn service_ports(field: &Field) -> Option<Vec<ServicePortSpec>> {
    let items = field.items(ITEMS_MAX)?;
    let read: Vec<Option<Option<ServicePortSpec>>> = items.iter().map(service_port).collect();
    let names: Vec<Option<String>> = read
        .iter()
        .map(|port| {
            port.as_ref()?
                .as_ref()
                .map(|p| p.name.clone())
                .filter(|name| !name.is_empty())
        })
        .collect();
    check::unique(&items, names.iter().map(Option::as_deref), "name");
    let numbers: Vec<Option<String>> = read
        .iter()
        .map(|port| port.as_ref()?.as_ref().map(|p| p.port.to_string()))
        .collect();
    check::unique(&items, numbers.iter().map(Option::as_deref), "port");
    if items.len() > 1 {
        for (item, port) in items.iter().zip(&read) {
            if matches!(port, Some(Some(port)) if port.name.is_empty()) {
                item.refuse("has no name", "a name, since the service has several ports");
            }
        }
    }
    let ports: Option<Vec<Option<ServicePortSpec>>> = read.into_iter().collect();
    Some(ports?.into_iter().flatten().collect())
}

fn service_port(field: &Field) -> Option<Option<ServicePortSpec>> {
    let mut fields = field.fields()?;
    let name = fields.read("name", check::dns_label);
    let number = fields.need("port", "a port").and_then(|f| port(&f));
    let target = fields.read("targetPort", |f| match &f.node().tree {
        // An empty target and 0 mean the port itself, as in Kubernetes.
        crate::read::Tree::Number(number) if number.as_u64() == Some(0) => Some(None),
        crate::read::Tree::Text(text) if text.is_empty() => Some(None),
        _ => spec_port(f).map(Some),
    });
    let app_protocol = fields.read("appProtocol", Field::text);
    let node_port = fields.read("nodePort", |f| f.integer(0..=u16::MAX));
    let tcp = is_tcp(&mut fields)?;
    let (name, port) = (name?.unwrap_or_default(), number?);
    let protocol = AppProtocol::declared(app_protocol?, (!name.is_empty()).then_some(name.as_str()));
    let target = target?.flatten().unwrap_or(SpecPort::Number(port));
    Some(tcp.then_some(ServicePortSpec {
        name,
        port,
        target,
        protocol,
        node_port: node_port?.filter(|port| *port > 0),
    }))
}
