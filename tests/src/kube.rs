//! The part of Kubernetes' YAML that a kubelet needs: what to run, where, and when it counts as ready.
//!
//! Every other field and every other kind stays as the user wrote it and is handed to the controller as it is; only
//! what the control plane would add (node, addresses, conditions) is written into the documents here.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_yaml_ng::{Mapping, Value};

/// The label that enrols a namespace or a pod.
pub const MESH_LABEL: &str = "nodemesh.io/mesh";
/// The annotation that names a pod's network namespace.
pub const NETNS_ANNOTATION: &str = "nodemesh.io/netns";

/// One document of a manifest, with the fields that every kind has.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// `kind`.
    pub kind: String,
    /// `metadata.namespace`, `default` if absent.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// The whole document.
    pub value: Value,
}

/// Reads the documents of a YAML text; `source` names it in errors.
pub fn parse(source: &str, yaml: &str) -> Result<Vec<Item>> {
    let mut items = Vec::new();
    for (index, document) in serde_yaml_ng::Deserializer::from_str(yaml).enumerate() {
        let place = || format!("{source}: document {}", index + 1);
        let value = Value::deserialize(document).with_context(place)?;
        if value.is_null() {
            continue;
        }
        if value.get("kind").and_then(Value::as_str) == Some("List") {
            for value in value.get("items").and_then(Value::as_sequence).into_iter().flatten() {
                items.push(item(value.clone()).with_context(place)?);
            }
            continue;
        }
        items.push(item(value).with_context(place)?);
    }
    Ok(items)
}

fn item(value: Value) -> Result<Item> {
    #[derive(Deserialize)]
    struct Header {
        kind: String,
        metadata: Metadata,
    }
    #[derive(Deserialize)]
    struct Metadata {
        name: String,
        namespace: Option<String>,
        #[serde(default)]
        labels: BTreeMap<String, String>,
    }
    let Header { kind, metadata } = serde_yaml_ng::from_value(value.clone())?;
    Ok(Item {
        kind,
        namespace: metadata.namespace.unwrap_or_else(|| "default".into()),
        name: metadata.name,
        labels: metadata.labels,
        value,
    })
}

/// `spec` of a Pod.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct PodSpec {
    /// The node; absent: the least loaded one.
    pub node_name: Option<String>,
    /// The containers.
    pub containers: Vec<Container>,
    /// `Always`, `OnFailure` or `Never`.
    pub restart_policy: Option<String>,
    /// A name other than the pod's own.
    pub hostname: Option<String>,
}

/// A container: a command of the host's file system.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct Container {
    /// Its name.
    pub name: String,
    /// The program and its first arguments; absent: nothing runs.
    pub command: Vec<String>,
    /// More arguments.
    pub args: Vec<String>,
    /// Environment variables.
    pub env: Vec<EnvVar>,
    /// The ports that it listens on.
    pub ports: Vec<ContainerPort>,
    /// Absent: ready as soon as it runs.
    pub readiness_probe: Option<Probe>,
    /// The working directory; absent: a private directory of the pod.
    pub working_dir: Option<String>,
}

/// An environment variable: a value or a fact of the pod.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct EnvVar {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: Option<String>,
    /// Where the value comes from.
    pub value_from: Option<EnvSource>,
}

/// The source of a variable.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct EnvSource {
    /// A field of the pod.
    pub field_ref: Option<FieldRef>,
}

/// A field of the pod by its path.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct FieldRef {
    /// `metadata.name`, `status.podIP`, …
    pub field_path: String,
}

/// A port of a container.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct ContainerPort {
    /// Its name; may be absent.
    pub name: Option<String>,
    /// Its number.
    pub container_port: u16,
}

/// A port by number or by name.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(untagged)]
pub enum IntOrName {
    /// The number.
    Number(u16),
    /// The name of a container port.
    Name(String),
}

/// How the kubelet finds out whether a container is ready.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct Probe {
    /// Runs a command in the pod.
    pub exec: Option<ExecAction>,
    /// Sends a request from the node.
    pub http_get: Option<HttpGetAction>,
    /// Opens a connection from the node.
    pub tcp_socket: Option<TcpSocketAction>,
    /// How long one attempt may take.
    pub timeout_seconds: Option<u64>,
}

/// A probe by a command: exit code 0 is ready.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(default)]
pub struct ExecAction {
    /// The command.
    pub command: Vec<String>,
}

/// A probe by a request: a status from 200 to 399 is ready.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct HttpGetAction {
    /// The path.
    pub path: Option<String>,
    /// The port.
    pub port: IntOrName,
}

/// A probe by a connection: established is ready.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct TcpSocketAction {
    /// The port.
    pub port: IntOrName,
}

impl PodSpec {
    /// Reads `spec` of a Pod document.
    pub fn of(item: &Item) -> Result<PodSpec> {
        let spec = item.value.get("spec").cloned().unwrap_or_default();
        let spec: PodSpec =
            serde_yaml_ng::from_value(spec).with_context(|| format!("pod {}/{}", item.namespace, item.name))?;
        if let Some(policy) = &spec.restart_policy {
            ensure!(
                ["Always", "OnFailure", "Never"].contains(&policy.as_str()),
                "pod {}/{}: spec.restartPolicy: {policy:?}, expected Always, OnFailure or Never",
                item.namespace,
                item.name
            );
        }
        Ok(spec)
    }

    /// The number of a probe's port.
    pub fn port(&self, port: &IntOrName) -> Result<u16> {
        match port {
            IntOrName::Number(number) => Ok(*number),
            IntOrName::Name(name) => {
                let mut ports = self.containers.iter().flat_map(|container| &container.ports);
                let found = ports.find(|port| port.name.as_deref() == Some(name));
                Ok(found
                    .with_context(|| format!("no container port is called {name:?}"))?
                    .container_port)
            }
        }
    }
}

/// `spec` of a Service.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceSpec {
    /// `None` for a headless one; absent: allocated.
    #[serde(rename = "clusterIP")]
    pub cluster_ip: Option<String>,
    /// Both families.
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Vec<String>,
    /// Which families, in which order.
    pub ip_families: Vec<String>,
    /// `SingleStack`, `PreferDualStack` or `RequireDualStack`.
    pub ip_family_policy: Option<String>,
    /// Which pods serve it.
    pub selector: BTreeMap<String, String>,
    /// Its ports.
    pub ports: Vec<ServicePort>,
}

/// A port of a Service.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct ServicePort {
    /// The port on the cluster address.
    pub port: u16,
    /// The port on the pod; absent: the same.
    pub target_port: Option<IntOrName>,
    /// `TCP` or `UDP`.
    pub protocol: Option<String>,
}

impl ServiceSpec {
    /// Reads `spec` of a Service document.
    pub fn of(item: &Item) -> Result<ServiceSpec> {
        let spec = item.value.get("spec").cloned().unwrap_or_default();
        serde_yaml_ng::from_value(spec).with_context(|| format!("service {}/{}", item.namespace, item.name))
    }

    /// Whether it has no address of its own.
    pub fn headless(&self) -> bool {
        self.cluster_ip.as_deref() == Some("None")
    }

    /// Which families it wants: (IPv4, IPv6), and whether IPv6 comes first. As on a cluster, one family unless asked.
    pub fn families(&self) -> Vec<Family> {
        let asked: Vec<Family> = self.ip_families.iter().filter_map(|name| Family::parse(name)).collect();
        let first = asked.first().copied().unwrap_or(Family::V4);
        let dual = asked.len() > 1
            || matches!(
                self.ip_family_policy.as_deref(),
                Some("PreferDualStack" | "RequireDualStack")
            );
        if dual { vec![first, first.other()] } else { vec![first] }
    }
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    fn parse(name: &str) -> Option<Family> {
        match name {
            "IPv4" => Some(Family::V4),
            "IPv6" => Some(Family::V6),
            _ => None,
        }
    }

    fn other(self) -> Family {
        match self {
            Family::V4 => Family::V6,
            Family::V6 => Family::V4,
        }
    }
}

/// Sets a field at a path of keys, making mappings on the way.
pub fn set(value: &mut Value, path: &[&str], to: Value) -> Result<()> {
    let Some((last, parents)) = path.split_last() else {
        bail!("an empty path");
    };
    let mut place = value;
    for key in parents {
        let mapping = place
            .as_mapping_mut()
            .with_context(|| format!("{key}: its parent is no mapping"))?;
        place = mapping
            .entry(Value::from(*key))
            .or_insert_with(|| Value::Mapping(Mapping::new()));
        if place.is_null() {
            *place = Value::Mapping(Mapping::new());
        }
    }
    let mapping = place
        .as_mapping_mut()
        .with_context(|| format!("{last}: its parent is no mapping"))?;
    mapping.insert(Value::from(*last), to);
    Ok(())
}

/// Joins documents to one YAML text.
pub fn to_yaml<'a>(documents: impl IntoIterator<Item = &'a Value>) -> Result<String> {
    let mut text = String::new();
    for document in documents {
        text.push_str("---\n");
        text.push_str(&serde_yaml_ng::to_string(document)?);
    }
    Ok(text)
}

/// Whether a pod is enrolled: its own label, else that of its namespace.
pub fn enrolled(pod: &BTreeMap<String, String>, namespace: Option<&BTreeMap<String, String>>) -> bool {
    let label = pod.get(MESH_LABEL).or_else(|| namespace?.get(MESH_LABEL));
    label.is_some_and(|value| value == "enabled")
}

/// Replaces `$(NAME)` by the variable's value, `$$` by `$`, and leaves unknown names as they are, as Kubernetes does.
pub fn expand(text: &str, env: &[(String, String)]) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let tail = &rest[at..];
        let name = tail.strip_prefix("$(").and_then(|inner| inner.split_once(')'));
        let known = name.and_then(|(name, after)| Some((env.iter().rev().find(|(key, _)| key == name)?, after)));
        if let Some(after) = tail.strip_prefix("$$") {
            out.push('$');
            rest = after;
        } else if let Some(((_, value), after)) = known {
            out.push_str(value);
            rest = after;
        } else {
            out.push('$');
            rest = &tail[1..];
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: front, namespace: shop, labels: {app: front}}
spec:
  containers:
  - name: web
    image: ignored:1
    command: [python3, -m, http.server]
    args: ['$(PORT)']
    env: [{name: PORT, value: '8080'}, {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]
    ports: [{name: http, containerPort: 8080}]
    readinessProbe: {httpGet: {path: /, port: http}}
---
---
apiVersion: v1
kind: Service
metadata: {name: front}
spec: {selector: {app: front}, ports: [{port: 80, targetPort: http}]}
";

    #[test]
    fn reads_pods_and_services() {
        let items = parse("shop.yaml", POD).unwrap();
        assert_eq!(items.len(), 2);
        assert_eq!(
            (&*items[0].kind, &*items[0].namespace, &*items[0].name),
            ("Pod", "shop", "front")
        );
        let spec = PodSpec::of(&items[0]).unwrap();
        let probe = spec.containers[0].readiness_probe.clone().unwrap().http_get.unwrap();
        assert_eq!(spec.port(&probe.port).unwrap(), 8080);
        assert!(spec.port(&IntOrName::Name("grpc".into())).is_err());
        assert_eq!(items[1].namespace, "default");
        let service = ServiceSpec::of(&items[1]).unwrap();
        assert!(!service.headless());
        assert_eq!(service.ports[0].target_port, Some(IntOrName::Name("http".into())));
    }

    #[test]
    fn errors_name_the_document() {
        let error = parse("bad.yaml", "kind: Pod\nmetadata: {}\n").unwrap_err();
        assert!(format!("{error:#}").starts_with("bad.yaml: document 1: "), "{error:#}");
    }

    #[test]
    fn families_of_services() {
        for (yaml, want) in [
            ("{}", vec![Family::V4]),
            ("{ipFamilies: [IPv6]}", vec![Family::V6]),
            ("{ipFamilyPolicy: PreferDualStack}", vec![Family::V4, Family::V6]),
            (
                "{ipFamilyPolicy: RequireDualStack, ipFamilies: [IPv6]}",
                vec![Family::V6, Family::V4],
            ),
            ("{ipFamilies: [IPv6, IPv4]}", vec![Family::V6, Family::V4]),
        ] {
            let spec: ServiceSpec = serde_yaml_ng::from_str(yaml).unwrap();
            assert_eq!(spec.families(), want, "{yaml}");
        }
    }

    #[test]
    fn sets_and_keeps_fields() {
        let mut value: Value = serde_yaml_ng::from_str("{spec: {a: 1}, metadata: {annotations: null}}").unwrap();
        set(&mut value, &["spec", "nodeName"], "node-1".into()).unwrap();
        set(&mut value, &["metadata", "annotations", "x"], "y".into()).unwrap();
        let want: Value =
            serde_yaml_ng::from_str("{spec: {a: 1, nodeName: node-1}, metadata: {annotations: {x: y}}}").unwrap();
        assert_eq!(value, want);
    }

    #[test]
    fn enrolment_of_pod_and_namespace() {
        let labels = |value: Option<&str>| -> BTreeMap<String, String> {
            value
                .into_iter()
                .map(|value| (MESH_LABEL.into(), value.into()))
                .collect()
        };
        for (pod, namespace, want) in [
            (None, None, false),
            (Some("enabled"), None, true),
            (None, Some("enabled"), true),
            (Some("disabled"), Some("enabled"), false),
            (Some("enabled"), Some("disabled"), true),
        ] {
            assert_eq!(
                enrolled(&labels(pod), Some(&labels(namespace))),
                want,
                "{pod:?} {namespace:?}"
            );
        }
    }

    #[test]
    fn expands_variables() {
        let env = [("A".to_string(), "1".to_string()), ("B".into(), "$(A)".into())];
        for (text, want) in [
            ("$(A)-$(A)", "1-1"),
            ("$(C)", "$(C)"),
            ("$$(A)", "$(A)"),
            ("$(B)", "$(A)"),
            ("cost: 5$", "cost: 5$"),
            ("$(A", "$(A"),
        ] {
            assert_eq!(expand(text, &env), want, "{text}");
        }
    }
}
