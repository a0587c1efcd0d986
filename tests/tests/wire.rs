//! What passes between nodes: no plaintext, TLS 1.3 on the destination's own port, between the pods' own addresses.
//!
//! A marker is sent in every place of every protocol where a body, a header or a name can carry one, and the capture of
//! the wire is searched for it. The same search must find it where the mesh is asked to leave a port alone, or it would
//! prove nothing.

mod traffic_lab;

use std::{
    collections::{BTreeMap, HashSet},
    net::{IpAddr, SocketAddr},
};

use anyhow::{Result, ensure};
use mesh_tests::{Lab, Packets};
use traffic_lab::*;

const MARKER: &str = "marker-d41c9a7e";
/// A destination outside of the mesh, on the other node.
const OUTSIDE: &str = r#"
---
apiVersion: v1
kind: Namespace
metadata: {name: outside}
---
apiVersion: v1
kind: Pod
metadata: {name: bare, namespace: outside, labels: {app: bare}}
spec:
  nodeName: node-2
  containers:
  - name: python
    command: [sh, -c, "mkdir -p www && echo bare > www/index.html && exec python3 -m http.server --bind :: -d www 9000"]
    readinessProbe: {tcpSocket: {port: 9000}}
"#;

#[test]
fn nothing_between_nodes_can_be_read() -> Result<()> {
    let lab = lab("wire", OUTSIDE)?;
    let far = lab.pod("traffic/far")?.addresses;
    let services = lab.state()?.service("traffic/far")?.addresses.clone();
    let source = lab.pod(SOURCE)?.addresses;

    let capture = lab.capture("tcp and not port 15010")?;
    for host in far.into_iter().chain(services) {
        speak(&lab, host)?;
    }
    let packets = Packets::parse(capture.stop()?)?;

    for text in [
        MARKER,
        "x-marker",
        "EHLO source",
        "220 hello",
        "HTTP/1.1",
        "PRI * HTTP/2.0",
        "spiffe://",
    ] {
        assert_eq!(packets.count(text), 0, "{text:?} can be read on the wire");
    }
    for port in [WEB, NGINX_HTTP2, GRPC_DETECTED, REDIS, GREETER, FLOWS] {
        assert!(
            packets.tls13_handshakes(port) >= 1,
            "no TLS 1.3 handshake on port {port}"
        );
    }
    // Nothing but TLS between the source and the destination, on no other port than those that were asked for.
    let asked: HashSet<u16> = [WEB, NGINX_HTTP2, GRPC_DETECTED, REDIS, GREETER, FLOWS].into();
    let mut first: BTreeMap<(SocketAddr, SocketAddr), &[u8]> = BTreeMap::new();
    for segment in packets.segments.iter().filter(|segment| !segment.payload.is_empty()) {
        let ends = [segment.source, segment.destination];
        let of_pods = |pods: [IpAddr; 2]| ends.iter().filter(|end| pods.contains(&end.ip())).count();
        assert_eq!((of_pods(source), of_pods(far)), (1, 1), "between other ends: {ends:?}");
        assert!(
            ends.iter()
                .any(|end| far.contains(&end.ip()) && asked.contains(&end.port())),
            "{ends:?}"
        );
        first
            .entry((segment.source, segment.destination))
            .or_insert(&segment.payload);
    }
    assert!(first.len() >= 2 * asked.len(), "too few connections: {first:?}");
    for (ends, payload) in first {
        assert!(
            payload.starts_with(&[0x16, 0x03]),
            "{ends:?} does not begin with a TLS handshake"
        );
    }
    lab.down()
}

#[test]
fn the_search_finds_what_is_sent_in_the_clear() -> Result<()> {
    let lab = lab("clear", OUTSIDE)?;
    let bare = lab.pod_ip("outside/bare")?;
    let capture = lab.capture("tcp and not port 15010")?;
    let url = format!("http://{bare}:9000/?{MARKER}");
    curl(&lab, &["-o", "/dev/null", "-H", &format!("x-marker: {MARKER}"), &url])?;
    let packets = Packets::parse(capture.stop()?)?;
    // In the request line and in the header.
    assert_eq!(packets.count(MARKER), 2);
    assert_eq!(packets.tls13_handshakes(9000), 0);
    lab.down()
}

/// Sends the marker in every way that there is, and sees that it arrives.
fn speak(lab: &Lab, host: IpAddr) -> Result<()> {
    let name = match host {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    };
    let echoed = curl(
        lab,
        &[
            "-H",
            &format!("x-marker: {MARKER}"),
            "-d",
            &format!("body {MARKER}"),
            &format!("http://{name}:{WEB}/echo?{MARKER}"),
        ],
    )?;
    // In the target, the header and the body.
    ensure!(
        echoed.matches(MARKER).count() >= 3,
        "the marker did not arrive: {echoed}"
    );
    let h2 = format!("http://{name}:{NGINX_HTTP2}/{MARKER}");
    curl(lab, &["--http2-prior-knowledge", "-d", MARKER, &h2])?;
    traffic(lab, "grpc", host, GRPC_DETECTED, &[])?;
    let value = format!("value {MARKER}");
    let stored = lab
        .exec(SOURCE, &["redis-cli", "-h", &host.to_string(), "SET", "key", &value])?
        .ok()?;
    ensure!(stored.trim() == "OK", "{stored}");
    let read = lab
        .exec(SOURCE, &["redis-cli", "-h", &host.to_string(), "GET", "key"])?
        .ok()?;
    ensure!(read.trim() == value, "{read}");
    traffic(lab, "greeter", host, GREETER, &[])?;
    traffic(lab, "upload", host, FLOWS, &["100000"])?;
    Ok(())
}
