//! Kubernetes' own kinds as JSON, where the text that they came from is not kept.
//!
//! What is written reads back to an equal document; what no decision looks at was never read and is not there.

use serde_json::{Map, Value, json};

use super::{
    Document,
    core::{
        Check, Container, EndpointSliceSpec, NodeSpec, PodSpec, Probe, ServicePortSpec, ServiceSpec, SliceEndpoint,
        SpecPort,
    },
};

/// Adds `spec`, `status` and what else the kind has.
pub(super) fn write(document: &Document, whole: &mut Map<String, Value>) {
    match document {
        Document::Node(object) => node(&object.spec, whole),
        Document::Pod(object) => pod(&object.spec, whole),
        Document::Service(object) => service(&object.spec, whole),
        Document::EndpointSlice(object) => endpoint_slice(&object.spec, whole),
        _ => {}
    }
}

fn put(whole: &mut Map<String, Value>, key: &str, value: Value) {
    whole.insert(key.to_owned(), value);
}

fn node(spec: &NodeSpec, whole: &mut Map<String, Value>) {
    let addresses = spec
        .addresses
        .iter()
        .map(|address| json!({"type": "InternalIP", "address": address}));
    put(whole, "status", json!({"addresses": addresses.collect::<Vec<_>>()}));
}

fn pod(spec: &PodSpec, whole: &mut Map<String, Value>) {
    let mut out = Map::new();
    put(&mut out, "serviceAccountName", json!(spec.service_account));
    if let Some(node) = &spec.node {
        put(&mut out, "nodeName", json!(node));
    }
    if spec.host_network {
        put(&mut out, "hostNetwork", json!(true));
    }
    put(&mut out, "containers", spec.containers.iter().map(container).collect());
    if !spec.sidecars.is_empty() {
        let sidecar = |one: &Container| {
            let mut value = container(one);
            value["restartPolicy"] = json!("Always");
            value
        };
        put(&mut out, "initContainers", spec.sidecars.iter().map(sidecar).collect());
    }
    put(whole, "spec", Value::Object(out));

    let mut status = Map::new();
    let addresses: Vec<Value> = spec.addresses.iter().map(|ip| json!({"ip": ip})).collect();
    if !addresses.is_empty() {
        put(&mut status, "podIPs", Value::Array(addresses));
    }
    if spec.finished {
        put(&mut status, "phase", json!("Succeeded"));
    }
    if let Some(ready) = spec.ready {
        let word = if ready { "True" } else { "False" };
        put(&mut status, "conditions", json!([{"type": "Ready", "status": word}]));
    }
    if !status.is_empty() {
        put(whole, "status", Value::Object(status));
    }
    if spec.terminating
        && let Some(metadata) = whole.get_mut("metadata").and_then(Value::as_object_mut)
    {
        // When is not kept: only that it is.
        put(metadata, "deletionTimestamp", json!("1970-01-01T00:00:00Z"));
    }
}

fn container(container: &Container) -> Value {
    let mut out = Map::new();
    put(&mut out, "name", json!(container.name));
    let ports = container.ports.iter().map(|port| match port.name.as_str() {
        "" => json!({"containerPort": port.port}),
        name => json!({"containerPort": port.port, "name": name}),
    });
    let env = container
        .env
        .iter()
        .map(|var| json!({"name": var.name, "value": var.value}));
    let lists: [(&str, Vec<Value>); 4] = [
        ("command", container.command.iter().map(|word| json!(word)).collect()),
        ("args", container.args.iter().map(|word| json!(word)).collect()),
        ("env", env.collect()),
        ("ports", ports.collect()),
    ];
    for (key, list) in lists {
        if !list.is_empty() {
            put(&mut out, key, Value::Array(list));
        }
    }
    if let Some(dir) = &container.working_dir {
        put(&mut out, "workingDir", json!(dir));
    }
    let probes = [
        ("readinessProbe", &container.readiness),
        ("livenessProbe", &container.liveness),
        ("startupProbe", &container.startup),
    ];
    for (key, probe) in probes {
        if let Some(probe) = probe {
            put(&mut out, key, probe_value(probe));
        }
    }
    Value::Object(out)
}

fn probe_value(probe: &Probe) -> Value {
    let mut value = json!({
        "initialDelaySeconds": probe.initial_delay.as_secs(),
        "periodSeconds": probe.period.as_secs(),
        "timeoutSeconds": probe.timeout.as_secs(),
        "successThreshold": probe.success_threshold,
        "failureThreshold": probe.failure_threshold,
    });
    match &probe.check {
        Check::TcpSocket { port } => value["tcpSocket"] = json!({"port": port_value(port)}),
        Check::Grpc { port, service } => value["grpc"] = json!({"port": port, "service": service}),
        Check::Exec { command } => value["exec"] = json!({"command": command}),
        Check::HttpGet {
            path,
            port,
            https,
            headers,
        } => {
            let headers = headers
                .iter()
                .map(|(name, value)| json!({"name": name, "value": value}));
            value["httpGet"] = json!({
                "path": path,
                "port": port_value(port),
                "scheme": if *https { "HTTPS" } else { "HTTP" },
                "httpHeaders": headers.collect::<Vec<_>>(),
            });
        }
    }
    value
}

fn port_value(port: &SpecPort) -> Value {
    match port {
        SpecPort::Number(number) => json!(number),
        SpecPort::Name(name) => json!(name),
    }
}

fn service(spec: &ServiceSpec, whole: &mut Map<String, Value>) {
    let mut out = Map::new();
    if let Some(name) = &spec.external_name {
        put(&mut out, "type", json!("ExternalName"));
        put(&mut out, "externalName", json!(name));
    }
    if spec.headless {
        put(&mut out, "clusterIP", json!("None"));
    }
    if !spec.addresses.is_empty() {
        put(&mut out, "clusterIPs", json!(spec.addresses));
    }
    if !spec.external_addresses.is_empty() {
        put(&mut out, "externalIPs", json!(spec.external_addresses));
    }
    put(&mut out, "ports", spec.ports.iter().map(service_port).collect());
    if !spec.selector.is_empty() {
        put(&mut out, "selector", json!(spec.selector));
    }
    if spec.publish_not_ready {
        put(&mut out, "publishNotReadyAddresses", json!(true));
    }
    if let Some(timeout) = spec.session_affinity {
        put(&mut out, "sessionAffinity", json!("ClientIP"));
        let client = json!({"clientIP": {"timeoutSeconds": timeout.as_secs()}});
        put(&mut out, "sessionAffinityConfig", client);
    }
    if spec.node_local {
        put(&mut out, "internalTrafficPolicy", json!("Local"));
    }
    put(whole, "spec", Value::Object(out));
}

fn service_port(port: &ServicePortSpec) -> Value {
    let mut out = Map::new();
    if !port.name.is_empty() {
        put(&mut out, "name", json!(port.name));
    }
    put(&mut out, "port", json!(port.port));
    put(&mut out, "targetPort", port_value(&port.target));
    put(&mut out, "appProtocol", json!(port.protocol.as_str()));
    if let Some(number) = port.node_port {
        put(&mut out, "nodePort", json!(number));
    }
    Value::Object(out)
}

fn endpoint_slice(spec: &EndpointSliceSpec, whole: &mut Map<String, Value>) {
    let ports = spec
        .ports
        .iter()
        .map(|port| json!({"name": port.name, "port": port.port}));
    put(whole, "ports", ports.collect());
    put(whole, "endpoints", spec.endpoints.iter().map(slice_endpoint).collect());
}

fn slice_endpoint(endpoint: &SliceEndpoint) -> Value {
    let mut out = Map::new();
    put(&mut out, "addresses", json!(endpoint.addresses));
    if let Some((name, uid)) = &endpoint.pod {
        put(&mut out, "targetRef", json!({"kind": "Pod", "name": name, "uid": uid}));
    }
    if !endpoint.node.is_empty() {
        put(&mut out, "nodeName", json!(endpoint.node));
    }
    let conditions = json!({"ready": endpoint.ready, "serving": endpoint.serving, "terminating": endpoint.terminating});
    put(&mut out, "conditions", conditions);
    let names = |names: &[String]| -> Value { names.iter().map(|name| json!({"name": name})).collect() };
    if !endpoint.for_zones.is_empty() || !endpoint.for_nodes.is_empty() {
        let hints = json!({"forZones": names(&endpoint.for_zones), "forNodes": names(&endpoint.for_nodes)});
        put(&mut out, "hints", hints);
    }
    Value::Object(out)
}
