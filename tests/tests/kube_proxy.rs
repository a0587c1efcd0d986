//! Beside kube-proxy, whichever way it writes its rules, and in both families of addresses: Services of the mesh lead to
//! their pods on both nodes by mutual TLS, and what is no part of the mesh goes on by kube-proxy's rules.
//!
//! The rest of the tests runs beside kube-proxy by nftables; this program changes its mode and puts it back.

use std::{collections::BTreeSet, net::IpAddr, process::Stdio};

use anyhow::{Context, Result, ensure};
use mesh_tests::cluster::{Cluster, Scope};

/// Two databases of the mesh, which are strict, two others, one of each on each node, and who asks.
fn application() -> String {
    let pod = |name: &str, labels: &str, node: usize, command: &str| {
        format!(
            r#"
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{{labels}}}}}
spec:
  nodeSelector: {{kubernetes.io/hostname: node{node}}}
  hostname: {name}
  subdomain: db
  terminationGracePeriodSeconds: 0
  containers:
  - {{name: main, image: "localhost/nodemesh/test:dev", command: {command}}}
"#
        )
    };
    let mut text = String::from(SERVICES);
    for node in [1, 2] {
        for (name, labels) in [
            (format!("db-{node}"), "app: db"),
            (format!("bare-{node}"), "app: bare, nodemesh.io/mesh: disabled"),
        ] {
            text += &pod(&name, labels, node, &format!("[lab-load, serve, '8080', {name}]"));
        }
        text += &pod(&format!("source-{node}"), "app: source", node, "[sleep, infinity]");
    }
    text + &pod("stranger", "nodemesh.io/mesh: disabled", 1, "[sleep, infinity]")
}

const SERVICES: &str = r#"
apiVersion: nodemesh.io/v1alpha1
kind: MeshPolicy
metadata: {name: strict}
spec: {targetRefs: [{kind: Pod, selector: {matchLabels: {app: db}}}], mtls: {mode: strict}}
---
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {clusterIP: None, ipFamilyPolicy: RequireDualStack, selector: {app: db}, ports: [{name: http, port: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  ipFamilies: [IPv4, IPv6]
  selector: {app: db}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Service
metadata: {name: web6}
spec: {ipFamilies: [IPv6], selector: {app: db}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: bare}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  ipFamilies: [IPv4, IPv6]
  selector: {app: bare}
  ports: [{name: http, port: 80, targetPort: 8080}]
"#;

const MESHED: [&str; 2] = ["db-1", "db-2"];
const BARE: [&str; 2] = ["bare-1", "bare-2"];
const NODES: [&str; 4] = ["172.30.0.11", "172.30.0.12", "fd00:172:30::11", "fd00:172:30::12"];

/// An address as a part of a URL.
fn host(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    }
}

/// The addresses of an object, one of each family, IPv4 first.
fn addresses(scope: &Scope, kind: &str, name: &str) -> Result<[IpAddr; 2]> {
    let object = scope.get(scope.namespace(), kind, name)?;
    let texts: Vec<String> = match kind {
        "pod" => {
            let all = object["status"]["podIPs"].as_array().cloned().unwrap_or_default();
            all.iter()
                .filter_map(|each| each["ip"].as_str().map(String::from))
                .collect()
        }
        _ => {
            let all = object["spec"]["clusterIPs"].as_array().cloned().unwrap_or_default();
            all.iter().filter_map(|each| each.as_str().map(String::from)).collect()
        }
    };
    let parsed: Vec<IpAddr> = texts.iter().filter_map(|text| text.parse().ok()).collect();
    match parsed[..] {
        [four, six] if four.is_ipv4() && six.is_ipv6() => Ok([four, six]),
        _ => anyhow::bail!("{kind} {name} has the addresses {texts:?}, not one of each family"),
    }
}

fn node_port(scope: &Scope, service: &str) -> Result<u64> {
    let object = scope.get(scope.namespace(), "service", service)?;
    let port = object["spec"]["ports"][0]["nodePort"].as_u64();
    port.with_context(|| format!("{service} has no node port"))
}

/// What a URL answers to one who is outside of the cluster; empty if nothing.
fn from_outside(scope: &Scope, url: &str) -> Result<String> {
    let mut command = scope.command("curl");
    command.args(["-sS", "-g", "--max-time", "5", url]).stdin(Stdio::null());
    let output = command.output().context("run curl")?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().to_string())
}

/// Every way to the pods of the mesh, from pods of the mesh on both nodes, and nothing of it in the clear.
fn ways_within_the_mesh(scope: &Scope) -> Result<()> {
    let port = node_port(scope, "web")?;
    let mut table: Vec<(String, &[&str])> = vec![
        ("http://web/".into(), &MESHED),
        ("http://web6/".into(), &MESHED),
        ("http://db-1.db:8080/".into(), &MESHED[..1]),
        (format!("http://172.30.0.11:{port}/"), &MESHED),
        (format!("http://[fd00:172:30::12]:{port}/"), &MESHED),
    ];
    for address in addresses(scope, "service", "web")? {
        table.push((format!("http://{}/", host(address)), &MESHED));
    }
    for address in addresses(scope, "pod", "db-2")? {
        table.push((format!("http://{}:8080/", host(address)), &MESHED[1..]));
    }
    let capture = scope.capture("tcp port 8080")?;
    for source in ["source-1", "source-2"] {
        for (url, names) in &table {
            scope.until_served(source, url, names)?;
        }
    }
    let packets = capture.stop()?;
    for ipv6 in [false, true] {
        let segments = packets.of_port(8080);
        let seen = segments.filter(|segment| segment.source.is_ipv6() == ipv6 && !segment.payload.is_empty());
        let clear = |payload: &[u8]| payload.windows(8).any(|bytes| bytes == b"HTTP/1.1");
        let payloads: Vec<&[u8]> = seen.map(|segment| segment.payload.as_slice()).collect();
        ensure!(!payloads.is_empty(), "nothing passed between the nodes, IPv6: {ipv6}");
        ensure!(
            !payloads.iter().any(|payload| clear(payload)),
            "requests are in the clear between the nodes, IPv6: {ipv6}"
        );
    }
    Ok(())
}

/// What kube-proxy does for those that are no part of the mesh, and that none of them gets to the strict ones.
fn ways_beside_the_mesh(scope: &Scope) -> Result<()> {
    for address in addresses(scope, "service", "bare")? {
        let url = format!("http://{}/", host(address));
        for source in ["stranger", "source-2"] {
            scope.until_served(source, &url, &BARE)?;
        }
    }
    let (open, closed) = (node_port(scope, "bare")?, node_port(scope, "web")?);
    for node in NODES {
        let node = host(node.parse()?);
        let url = format!("http://{node}:{open}/");
        let mut found = BTreeSet::new();
        scope.until(&format!("answers of both pods at {url}"), || {
            found.insert(from_outside(scope, &url)?);
            let wanted = BARE.map(String::from).into();
            Ok((found.is_superset(&wanted)).then_some(()))
        })?;
        let url = format!("http://{node}:{closed}/");
        for _ in 0..2 {
            let said = from_outside(scope, &url)?;
            ensure!(said.is_empty(), "a strict pod answers {said:?} to plaintext from {url}");
        }
    }
    for address in addresses(scope, "service", "web")? {
        let url = format!("http://{}/", host(address));
        ensure!(
            scope.ask("stranger", &url).is_err(),
            "a strict pod answers a stranger at {url}"
        );
    }
    Ok(())
}

#[test]
fn services_of_both_families_work_beside_kube_proxy_in_both_modes() -> Result<()> {
    let scope = Scope::new(&Cluster::shared()?, "kube-proxy", "nodemesh.io/mesh: enabled")?;
    scope.apply(&application())?;
    for pod in MESHED.iter().chain(&BARE).chain(&["source-1", "source-2", "stranger"]) {
        scope.condition(scope.namespace(), &format!("pod/{pod}"), "Ready")?;
    }
    let both = || ways_within_the_mesh(&scope).and_then(|()| ways_beside_the_mesh(&scope));
    both().context("kube-proxy by nftables")?;

    let mode = scope.proxy_mode("iptables")?;
    for node in 1..=scope.nodes()? {
        scope.until(&format!("rules by iptables alone on node {node}"), || {
            let rules = scope.exec_on_node(node, &["iptables-save", "-t", "nat"])?.ok()?;
            let tables = scope.exec_on_node(node, &["nft", "list", "tables"])?.ok()?;
            Ok((rules.contains("KUBE-SVC-") && !tables.contains("kube-proxy")).then_some(()))
        })?;
    }
    both().context("kube-proxy by iptables")?;
    drop(mode);
    scope.until_served("stranger", "http://bare/", &BARE)
}
