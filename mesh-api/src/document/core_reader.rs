//! Reads Kubernetes' own kinds, tolerating every field that the mesh does not look at.

use std::{net::IpAddr, time::Duration};

use super::core::{
    Check, Container, ContainerPort, EnvVar, NodeSpec, PodSpec, Probe, ServicePortSpec, ServiceSpec, SpecPort,
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
pub(super) fn pod(fields: &mut Fields) -> Option<PodSpec> {
    let enrolment = enrolment(fields);
    let annotations = pod_annotations(fields);
    let spec = fields.need("spec", "containers").and_then(|f| pod_spec(&f));
    let status = fields.read("status", pod_status);
    let (mut spec, status) = (spec?, status?);
    if let Some((addresses, ready)) = status {
        spec.addresses = addresses;
        spec.ready = ready;
    }
    (enrolment && annotations).then_some(spec)
}

fn pod_spec(field: &Field) -> Option<PodSpec> {
    let mut fields = field.fields()?;
    let service_account = fields.read("serviceAccountName", check::dns_name);
    let node = fields.read("nodeName", check::dns_name);
    let host_network = fields.read("hostNetwork", Field::boolean);
    let containers = fields
        .need("containers", "at least one container")
        .and_then(|f| containers(&f));
    let spec = PodSpec {
        service_account: service_account?.unwrap_or_else(|| "default".to_owned()),
        node: node?,
        host_network: host_network?.unwrap_or(false),
        containers: containers?,
        addresses: Vec::new(),
        ready: None,
    };
    probes_find_their_ports(field, &spec).then_some(spec)
}

fn containers(field: &Field) -> Option<Vec<Container>> {
    let items = field.items(CONTAINERS_MAX)?;
    if items.is_empty() {
        field.refuse("is empty", "at least one container");
        return None;
    }
    let containers: Vec<Option<Container>> = items.iter().map(container).collect();
    check::unique(
        &items,
        containers.iter().map(|c| c.as_ref().map(|c| c.name.as_str())),
        "name",
    );
    containers.into_iter().collect()
}

fn probes_find_their_ports(field: &Field, spec: &PodSpec) -> bool {
    let mut good = true;
    for container in &spec.containers {
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

fn container(field: &Field) -> Option<Container> {
    let mut fields = field.fields()?;
    let name = fields
        .need("name", "the container's name")
        .and_then(|f| check::dns_label(&f));
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

/// The pod's addresses and whether it is ready.
fn pod_status(field: &Field) -> Option<(Vec<IpAddr>, Option<bool>)> {
    let mut fields = field.fields()?;
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
    Some((addresses, ready))
}

/// A Service.
pub(super) fn service(fields: &mut Fields) -> Option<ServiceSpec> {
    fields.need("spec", "ports").and_then(|f| service_spec(&f))
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
    let many: Vec<IpAddr> = many?.into_iter().flatten().collect();
    Some(ServiceSpec {
        addresses: if many.is_empty() {
            one?.into_iter().collect()
        } else {
            many
        },
        headless,
        ports: ports?.unwrap_or_default(),
        selector: selector?.unwrap_or_default(),
        publish_not_ready: publish_not_ready?.unwrap_or(false),
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
    let tcp = is_tcp(&mut fields)?;
    let (name, port) = (name?.unwrap_or_default(), number?);
    let protocol = AppProtocol::declared(app_protocol?, (!name.is_empty()).then_some(name.as_str()));
    let target = target?.flatten().unwrap_or(SpecPort::Number(port));
    Some(tcp.then_some(ServicePortSpec {
        name,
        port,
        target,
        protocol,
    }))
}
