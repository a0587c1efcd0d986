//! The kubelet's part of the lab: pods get a node, addresses, names and a cgroup; their containers are started,
//! supervised and probed; the documents get what a control plane would write into them.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Seek, Write},
    net::IpAddr,
    path::{Path, PathBuf},
    process::Child,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_yaml_ng::Value;

use crate::{
    hosts,
    kube::{self, Family, Item, PodSpec, Probe, ServiceSpec},
    netns, network,
    plan::{self, PODS_PER_NODE_MAX},
    probe,
    process::{self, Site},
    state::{self, Pod, Service, State},
};

/// How long one attempt of a probe may take unless the pod says otherwise; Kubernetes' default.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// Gives a pod of a manifest its node and addresses, and records it. Nothing is made yet.
pub fn admit_pod(state: &mut State, item: &Item) -> Result<Pod> {
    let spec = PodSpec::of(item)?;
    let full_name = format!("{}/{}", item.namespace, item.name);
    ensure!(
        state.pods.iter().all(|pod| pod.full_name() != full_name),
        "pod {full_name} exists already"
    );
    let load = |name: &str| state.pods.iter().filter(|pod| pod.node == name).count();
    let node = match &spec.node_name {
        Some(name) => state.node(name)?,
        None => {
            let least = state.nodes.iter().min_by_key(|node| load(&node.name));
            least.context("the lab has no node")?
        }
    };
    let taken: Vec<u8> = state
        .pods
        .iter()
        .filter(|pod| pod.node == node.name)
        .map(|pod| pod.slot)
        .collect();
    let slot = (2..=PODS_PER_NODE_MAX as u8).find(|slot| !taken.contains(slot));
    let slot = slot.with_context(|| format!("node {} is full", node.name))?;
    let pod = Pod {
        namespace: item.namespace.clone(),
        name: item.name.clone(),
        node: node.name.clone(),
        slot,
        addresses: state.plan().pod(node.number, slot).both(),
        labels: item.labels.clone(),
        enrolled: state.mesh && kube::enrolled(&item.labels, state.namespaces.get(&item.namespace)),
        ready: false,
        document: serde_yaml_ng::to_string(&item.value)?,
    };
    state.pods.push(pod.clone());
    Ok(pod)
}

/// Gives a Service its cluster addresses and records it; one that is known keeps what it has.
pub fn admit_service(state: &mut State, item: &Item) -> Result<()> {
    let spec = ServiceSpec::of(item)?;
    let known = state
        .services
        .iter()
        .position(|service| service.namespace == item.namespace && service.name == item.name);
    let mut slot = known.map_or(0, |index| state.services[index].slot);
    let mut given = spec.cluster_ips.clone();
    if given.is_empty() {
        given.extend(spec.cluster_ip.clone());
    }
    let addresses = if spec.headless() {
        Vec::new()
    } else if given.is_empty() {
        if slot == 0 {
            let taken: Vec<u16> = state.services.iter().map(|service| service.slot).collect();
            slot = (1..4000)
                .find(|slot| !taken.contains(slot))
                .context("no free Service address")?;
        }
        let dual = state.plan().service(slot);
        let of_family = |family| match family {
            Family::V4 => IpAddr::V4(dual.v4),
            Family::V6 => IpAddr::V6(dual.v6),
        };
        spec.families().into_iter().map(of_family).collect()
    } else {
        let parse = |text: &String| {
            text.parse()
                .with_context(|| format!("service {}: clusterIP {text:?}", item.name))
        };
        given.iter().map(parse).collect::<Result<_>>()?
    };
    let service = Service {
        namespace: item.namespace.clone(),
        name: item.name.clone(),
        addresses,
        slot,
        document: serde_yaml_ng::to_string(&item.value)?,
    };
    match known {
        Some(index) => state.services[index] = service,
        None => state.services.push(service),
    }
    Ok(())
}

/// The pod's document with what the control plane adds: node, addresses, namespace file, phase and readiness.
pub fn pod_document(state: &State, pod: &Pod) -> Result<Value> {
    let mut value: Value = serde_yaml_ng::from_str(&pod.document)?;
    let host = state.plan().node(state.node(&pod.node)?.number);
    let file = netns::path(&plan::pod_netns(&state.name, &pod.namespace, &pod.name));
    let addresses = |all: [IpAddr; 2]| -> Result<Value> {
        let all: Vec<BTreeMap<&str, String>> = all.map(|ip| BTreeMap::from([("ip", ip.to_string())])).into();
        Ok(serde_yaml_ng::to_value(all)?)
    };
    let ready = if pod.ready { "True" } else { "False" };
    let conditions = vec![BTreeMap::from([("type", "Ready"), ("status", ready)])];
    kube::set(&mut value, &["metadata", "namespace"], pod.namespace.as_str().into())?;
    kube::set(
        &mut value,
        &["metadata", "annotations", kube::NETNS_ANNOTATION],
        file.display().to_string().into(),
    )?;
    kube::set(&mut value, &["spec", "nodeName"], pod.node.as_str().into())?;
    kube::set(&mut value, &["status", "phase"], "Running".into())?;
    kube::set(&mut value, &["status", "hostIP"], host.v4.to_string().into())?;
    kube::set(&mut value, &["status", "hostIPs"], addresses(host.both())?)?;
    kube::set(&mut value, &["status", "podIP"], pod.addresses[0].to_string().into())?;
    kube::set(&mut value, &["status", "podIPs"], addresses(pod.addresses)?)?;
    kube::set(
        &mut value,
        &["status", "conditions"],
        serde_yaml_ng::to_value(conditions)?,
    )?;
    Ok(value)
}

/// The Service's document with its cluster addresses.
pub fn service_document(service: &Service) -> Result<Value> {
    let mut value: Value = serde_yaml_ng::from_str(&service.document)?;
    kube::set(
        &mut value,
        &["metadata", "namespace"],
        service.namespace.as_str().into(),
    )?;
    if let Some(first) = service.addresses.first() {
        let all: Vec<String> = service.addresses.iter().map(IpAddr::to_string).collect();
        kube::set(&mut value, &["spec", "clusterIP"], first.to_string().into())?;
        kube::set(&mut value, &["spec", "clusterIPs"], serde_yaml_ng::to_value(all)?)?;
    }
    Ok(value)
}

/// The Node's document: its addresses and the CIDRs of its pods.
pub fn node_document(state: &State, node: &state::Node) -> Result<Value> {
    let address = state.plan().node(node.number);
    let cidrs = state.plan().pod_cidrs(node.number);
    let mut addresses = vec![BTreeMap::from([
        ("type", "Hostname".to_string()),
        ("address", node.name.clone()),
    ])];
    for ip in address.both() {
        addresses.push(BTreeMap::from([
            ("type", "InternalIP".to_string()),
            ("address", ip.to_string()),
        ]));
    }
    let mut value = serde_yaml_ng::from_str("{apiVersion: v1, kind: Node, metadata: {}, spec: {}, status: {}}")?;
    kube::set(&mut value, &["metadata", "name"], node.name.as_str().into())?;
    kube::set(&mut value, &["spec", "podCIDR"], cidrs[0].as_str().into())?;
    kube::set(&mut value, &["spec", "podCIDRs"], serde_yaml_ng::to_value(cidrs)?)?;
    kube::set(
        &mut value,
        &["status", "addresses"],
        serde_yaml_ng::to_value(addresses)?,
    )?;
    Ok(value)
}

/// The pod's own directory, where its containers work and write their logs.
pub fn pod_directory(lab: &str, pod: &Pod) -> PathBuf {
    state::directory(lab)
        .join("pods")
        .join(format!("{}_{}", pod.namespace, pod.name))
}

/// The pod's cgroup, below that of its node.
pub fn pod_cgroup(lab_cgroup: &Path, pod: &Pod) -> PathBuf {
    lab_cgroup
        .join(&pod.node)
        .join(format!("{}_{}", pod.namespace, pod.name))
}

/// Where a program of the node itself runs: beside its pods' cgroups, within what the node's agent looks at.
pub fn node_site(state: &State, lab_cgroup: &Path, node: &str) -> Result<Site> {
    let cgroup = lab_cgroup.join(node).join("host");
    crate::cgroup::create(&cgroup)?;
    Ok(Site {
        netns: plan::node_netns(&state.name, node),
        cgroup,
        own_mounts: false,
        directory: state::directory(&state.name),
        env: None,
    })
}

/// Makes everything of a pod but its processes.
pub fn make_pod(state: &State, lab_cgroup: &Path, pod: &Pod) -> Result<()> {
    let name = || format!("make the pod {}", pod.full_name());
    fs::create_dir_all(pod_directory(&state.name, pod).join("tmp")).with_context(name)?;
    crate::cgroup::create(&pod_cgroup(lab_cgroup, pod))?;
    network::pod(&state.name, state.plan(), state.node(&pod.node)?, pod).with_context(name)?;
    let etc = etc_directory(&state.name, pod);
    fs::create_dir_all(&etc).with_context(name)?;
    write_hosts(state, pod)?;
    if Path::new("/etc/resolv.conf").exists() {
        // No name server in the pod's own namespace: an unknown name fails at once.
        fs::write(
            etc.join("resolv.conf"),
            "nameserver 127.0.0.1\noptions attempts:1 timeout:1 ndots:1\n",
        )?;
    }
    Ok(())
}

/// Where `ip netns exec` looks for the pod's own files of `/etc`.
fn etc_directory(lab: &str, pod: &Pod) -> PathBuf {
    Path::new("/etc/netns").join(plan::pod_netns(lab, &pod.namespace, &pod.name))
}

/// Removes all files below `/etc/netns` that begin with the lab's prefix.
pub fn remove_etc(prefix: &str) -> Result<()> {
    let Ok(entries) = fs::read_dir("/etc/netns") else {
        return Ok(());
    };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            fs::remove_dir_all(entry.path()).with_context(|| format!("remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

/// Writes the pod's `/etc/hosts` in place, so that running programs see it.
pub fn write_hosts(state: &State, pod: &Pod) -> Result<()> {
    let spec = PodSpec::of(&item_of(&pod.document)?)?;
    let hostname = spec.hostname.as_deref().unwrap_or(&pod.name);
    let names = service_names(state)?;
    let text = hosts::render(&pod.namespace, hostname, &pod.addresses, &names);
    let file = etc_directory(&state.name, pod).join("hosts");
    overwrite(&file, &text).with_context(|| format!("write {}", file.display()))
}

/// Writes a file in place, since it is mounted, and so that no reader finds it empty: a running program may be
/// resolving a name.
fn overwrite(file: &Path, text: &str) -> Result<()> {
    let mut open = fs::File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .read(true)
        .open(file)?;
    let mut old = String::new();
    open.read_to_string(&mut old)?;
    if old != text {
        open.rewind()?;
        open.write_all(text.as_bytes())?;
        open.set_len(text.len() as u64)?;
    }
    Ok(())
}

fn service_names(state: &State) -> Result<Vec<hosts::Name>> {
    let mut names = Vec::new();
    for service in &state.services {
        let mut name = hosts::Name {
            namespace: service.namespace.clone(),
            name: service.name.clone(),
            addresses: service.addresses.clone(),
        };
        if service.addresses.is_empty() {
            let families = ServiceSpec::of(&item_of(&service.document)?)?.families();
            for pod in selected(state, service)?.into_iter().filter(|pod| pod.ready) {
                let wanted = pod.addresses.iter().filter(|ip| families.contains(&family_of(ip)));
                let addresses: Vec<IpAddr> = wanted.copied().collect();
                name.addresses.extend(&addresses);
                names.push(hosts::Name {
                    namespace: service.namespace.clone(),
                    name: format!("{}.{}", pod.name, service.name),
                    addresses,
                });
            }
        }
        names.push(name);
    }
    Ok(names)
}

fn family_of(address: &IpAddr) -> Family {
    if address.is_ipv4() { Family::V4 } else { Family::V6 }
}

/// The pods that a Service selects.
fn selected<'a>(state: &'a State, service: &Service) -> Result<Vec<&'a Pod>> {
    let selector = ServiceSpec::of(&item_of(&service.document)?)?.selector;
    if selector.is_empty() {
        return Ok(Vec::new());
    }
    let matches = |pod: &&Pod| {
        pod.namespace == service.namespace && selector.iter().all(|(key, value)| pod.labels.get(key) == Some(value))
    };
    Ok(state.pods.iter().filter(matches).collect())
}

fn item_of(document: &str) -> Result<Item> {
    kube::parse("recorded document", document)?
        .pop()
        .context("an empty document")
}

/// Writes every pod's names and every node's Service rules anew.
pub fn refresh_names(state: &State) -> Result<()> {
    for pod in &state.pods {
        write_hosts(state, pod)?;
    }
    let needed = state.service_rules && state.pods.iter().any(|pod| !pod.enrolled);
    let rules = if needed { service_rules(state)? } else { Vec::new() };
    for node in &state.nodes {
        network::service_rules(&plan::node_netns(&state.name, &node.name), &rules)?;
    }
    Ok(())
}

fn service_rules(state: &State) -> Result<Vec<network::ServiceRule>> {
    let mut rules = Vec::new();
    for service in &state.services {
        let spec = ServiceSpec::of(&item_of(&service.document)?)?;
        let pods = selected(state, service)?;
        for port in &spec.ports {
            for address in &service.addresses {
                let mut endpoints = Vec::new();
                for pod in pods.iter().filter(|pod| pod.ready) {
                    let target = match &port.target_port {
                        Some(target) => PodSpec::of(&item_of(&pod.document)?)?.port(target)?,
                        None => port.port,
                    };
                    let same_family = pod.addresses.iter().filter(|ip| ip.is_ipv4() == address.is_ipv4());
                    endpoints.extend(same_family.map(|ip| (*ip, target)));
                }
                rules.push(network::ServiceRule {
                    address: *address,
                    port: port.port,
                    protocol: if port.protocol.as_deref() == Some("UDP") {
                        "udp"
                    } else {
                        "tcp"
                    },
                    endpoints,
                });
            }
        }
    }
    Ok(rules)
}

/// Where a program of the pod runs; with the environment of its first container.
pub fn pod_site(state: &State, lab_cgroup: &Path, pod: &Pod) -> Result<Site> {
    let spec = PodSpec::of(&item_of(&pod.document)?)?;
    site(state, lab_cgroup, pod, spec.containers.first())
}

fn site(state: &State, lab_cgroup: &Path, pod: &Pod, container: Option<&kube::Container>) -> Result<Site> {
    let directory = pod_directory(&state.name, pod);
    let mut env = vec![
        ("PATH".to_string(), process::PATH.to_string()),
        ("HOME".into(), directory.display().to_string()),
        ("TMPDIR".into(), directory.join("tmp").display().to_string()),
        ("HOSTNAME".into(), pod.name.clone()),
        ("LANG".into(), "C.UTF-8".into()),
        // Where the developer's own programs are: load generators and echo servers of the tests.
        ("NODEMESH_PROGRAMS".into(), state.programs.display().to_string()),
    ];
    for variable in container.map(|container| container.env.as_slice()).unwrap_or_default() {
        let value = match (&variable.value, &variable.value_from) {
            (None, Some(source)) => field(state, pod, source)?,
            (value, _) => kube::expand(value.as_deref().unwrap_or_default(), &env),
        };
        env.push((variable.name.clone(), value));
    }
    let working_directory = container.and_then(|container| container.working_dir.as_ref());
    Ok(Site {
        netns: plan::pod_netns(&state.name, &pod.namespace, &pod.name),
        cgroup: pod_cgroup(lab_cgroup, pod),
        own_mounts: true,
        directory: working_directory.map_or(directory, PathBuf::from),
        env: Some(env),
    })
}

fn field(state: &State, pod: &Pod, source: &kube::EnvSource) -> Result<String> {
    let path = source.field_ref.as_ref().map(|field| field.field_path.as_str());
    let host = state.plan().node(state.node(&pod.node)?.number);
    Ok(match path {
        Some("metadata.name") => pod.name.clone(),
        Some("metadata.namespace") => pod.namespace.clone(),
        Some("spec.nodeName") => pod.node.clone(),
        Some("status.podIP") => pod.addresses[0].to_string(),
        Some("status.podIPs") => pod.addresses.map(|ip| ip.to_string()).join(","),
        Some("status.hostIP") => host.v4.to_string(),
        other => anyhow::bail!(
            "pod {}: env: valueFrom {other:?}, expected a fieldRef to metadata.name, metadata.namespace, spec.nodeName, \
             status.podIP, status.podIPs or status.hostIP",
            pod.full_name()
        ),
    })
}

/// Starts the pod's containers.
pub fn start_pod(state: &State, lab_cgroup: &Path, pod: &Pod) -> Result<Vec<Child>> {
    let spec = PodSpec::of(&item_of(&pod.document)?)?;
    let restart = spec.restart_policy.as_deref().unwrap_or("Always");
    let mut children = Vec::new();
    for container in &spec.containers {
        let mut argv = container.command.clone();
        if argv.is_empty() {
            continue;
        }
        argv.extend(container.args.iter().cloned());
        let site = site(state, lab_cgroup, pod, Some(container))?;
        let env = site.env.as_deref().unwrap_or_default();
        let argv: Vec<String> = argv.iter().map(|word| kube::expand(word, env)).collect();
        let log = pod_directory(&state.name, pod).join(format!("{}.log", container.name));
        children.push(site.supervise(restart, &argv, &log)?);
    }
    Ok(children)
}

/// Whether the readiness probes of all containers pass now; an error says which one does not and why.
pub fn probe_pod(state: &State, lab_cgroup: &Path, pod: &Pod) -> Result<()> {
    let spec = PodSpec::of(&item_of(&pod.document)?)?;
    for container in &spec.containers {
        if let Some(probe) = &container.readiness_probe {
            attempt(state, lab_cgroup, pod, &spec, container, probe).with_context(|| {
                let name = &container.name;
                format!("readiness probe of container {name:?} in pod {}", pod.full_name())
            })?;
        }
    }
    Ok(())
}

fn attempt(
    state: &State,
    lab_cgroup: &Path,
    pod: &Pod,
    spec: &PodSpec,
    container: &kube::Container,
    probe: &Probe,
) -> Result<()> {
    let limit = probe.timeout_seconds.map_or(PROBE_TIMEOUT, Duration::from_secs);
    let node = node_site(state, lab_cgroup, &pod.node)?;
    let address = pod.addresses[0];
    if let Some(exec) = &probe.exec {
        site(state, lab_cgroup, pod, Some(container))?
            .exec(&exec.command, limit)?
            .ok()?;
    }
    if let Some(get) = &probe.http_get {
        let path = get.path.as_deref().unwrap_or("/");
        probe::http(&node, address, spec.port(&get.port)?, path, limit)?;
    }
    if let Some(socket) = &probe.tcp_socket {
        probe::tcp(&node, address, spec.port(&socket.port)?, limit)?;
    }
    Ok(())
}
