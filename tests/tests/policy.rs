//! Who gets in: plaintext under strict and permissive, identities with and without permission, on one node and between
//! two, open flows whose permit is lost, and certificates that are forged, expired or stolen. What the source sees, what
//! reaches the destination, the metrics and the log line must tell the same.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use mesh_tests::{
    Checks, Lab, LabConfig, Place,
    actors::{
        self, LINES, WEB, WEB_UNDECLARED, apply, behave, delete, end_of, expect_growth, expect_record, get, hold,
        hold_upgraded, line, requests, rpc, statuses, told,
    },
    mesh, until,
};
use serde_json::{Value as Json, json};

/// How long a lost permit may take to end a flow.
const CUT_LIMIT: Duration = Duration::from_secs(10);
const FRIEND: &str = "guard/friend";
const FOE: &str = "guard/foe";
/// Not in the mesh, on the node of `near`.
const STRANGER: &str = "outside/stranger";
/// The destinations, with their nodes; the sources are on the first one.
const NEAR_AND_FAR: [(&str, &str); 2] = [("near", "node-1"), ("far", "node-2")];

fn documents() -> String {
    [
        actors::namespace("guard", true),
        actors::namespace("outside", false),
        actors::source(FRIEND, "node-1"),
        actors::source(FOE, "node-1"),
        actors::source(STRANGER, "node-1"),
        actors::destination("guard/near", "node-1", &[]),
        actors::destination("guard/far", "node-2", &[]),
        actors::service("guard/near", "pod", "near"),
        actors::service("guard/far", "pod", "far"),
    ]
    .concat()
}

fn identity(pod: &str) -> String {
    let (namespace, name) = pod.split_once('/').unwrap_or_default();
    format!("spiffe://cluster.local/ns/{namespace}/sa/{name}")
}

fn mtls(name: &str, namespace: &str, target: &str, mtls: &str) -> String {
    format!(
        "apiVersion: nodemesh.io/v1alpha1\nkind: MeshPolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {{targetRefs: [{target}], mtls: {mtls}}}\n"
    )
}

fn access(name: &str, target: &str, action: &str, rules: &str) -> String {
    format!(
        "---\napiVersion: nodemesh.io/v1alpha1\nkind: AccessPolicy\nmetadata: {{name: {name}, namespace: guard}}\n\
         spec: {{targetRefs: [{target}], action: {action}, rules: {rules}}}\n"
    )
}

/// The same policy for both destinations.
fn access_both(name: &str, action: &str, rules: &str) -> String {
    let target = "{kind: Service, name: near}, {kind: Service, name: far}";
    access(name, target, action, rules)
}

/// A service of both destinations.
fn both() -> String {
    "---\napiVersion: v1\nkind: Service\nmetadata: {name: both, namespace: guard}\n\
     spec: {selector: {role: both}, ports: [{name: http, port: 80, targetPort: 8080}]}\n"
        .to_owned()
}

/// What a pod gets from a port of a destination's own address.
fn status(lab: &Lab, from: &str, destination: &str, port: u16) -> Result<u16> {
    let host = lab.pod_ip(&format!("guard/{destination}"))?.to_string();
    Ok(get("/").ask(lab, from, &host, port)?[0].status)
}

/// Every word of who is served: `stranger>far:8080` with the status, 0 for a connection that is reset.
fn expect_served(lab: &Lab, expected: &[(&str, &str, u16, u16)]) -> Result<()> {
    let mut wrong = Vec::new();
    for (from, destination, port, want) in expected {
        let got = status(lab, from, destination, *port)?;
        if got != *want {
            wrong.push(format!("{from} to {destination}:{port}: {got}, expected {want}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}

#[test]
fn plaintext_is_refused_under_strict_and_served_under_permissive() -> Result<()> {
    let lab = Lab::up(LabConfig::test("strict").manifest(documents()))?;
    let mut checks = Checks::default();
    let ends: [(&str, &str, u16, u16); 8] = [
        (STRANGER, "near", WEB, 200),
        (STRANGER, "far", WEB, 200),
        (STRANGER, "near", WEB_UNDECLARED, 200),
        (STRANGER, "far", WEB_UNDECLARED, 200),
        (FRIEND, "near", WEB, 200),
        (FRIEND, "far", WEB, 200),
        (FRIEND, "near", WEB_UNDECLARED, 200),
        (FRIEND, "far", WEB_UNDECLARED, 200),
    ];
    let with = |refused: &dyn Fn(&str, &str, u16) -> bool| {
        ends.map(|(from, to, port, _)| (from, to, port, if refused(from, to, port) { 0 } else { 200 }))
    };

    checks.check("without any policy plaintext is served", || {
        expect_served(&lab, &with(&|_, _, _| false))?;
        for (destination, node) in NEAR_AND_FAR {
            let host = lab.pod_ip(&format!("guard/{destination}"))?.to_string();
            let said = line(&lab, STRANGER, &host)?;
            ensure!(
                said["answer"] == format!("{destination} hello"),
                "{destination}: {said}"
            );
            let record = expect_record(
                &lab,
                node,
                &[
                    ("event.name", json!("request")),
                    ("nodemesh.source.pod", json!("stranger")),
                    ("nodemesh.destination.pod", json!(destination)),
                ],
            )?;
            ensure!(
                record["nodemesh.connection.security"] == "none" && record["nodemesh.source.identity"].is_null(),
                "a stranger has no identity: {record}"
            );
        }
        Ok(())
    });

    checks.check(
        "strict for the mesh: a pod outside of it is refused, and counted",
        || {
            let mesh = "{group: nodemesh.io, kind: Mesh}";
            apply(&lab, &mtls("mesh", "nodemesh-system", mesh, "{mode: strict}"))?;
            let before = [lab.metrics("node-1")?, lab.metrics("node-2")?];
            let served = ["guard/near", "guard/far"].map(|pod| told(&lab, pod, "served"));
            let lines = ["guard/near", "guard/far"].map(|pod| told(&lab, pod, "lines"));
            expect_served(&lab, &with(&|from, _, _| from == STRANGER))?;
            for ((destination, node), before) in NEAR_AND_FAR.iter().zip(&before) {
                let host = lab.pod_ip(&format!("guard/{destination}"))?.to_string();
                let said = line(&lab, STRANGER, &host)?;
                ensure!(said["how"] == "ConnectionResetError", "a line to {destination}: {said}");
                // Two ports with HTTP and one with lines.
                let reason = [("reason", "plaintext-refused")];
                expect_growth(&lab, node, before, "nodemesh_agent_refusals_total", &reason, 3.0)?;
                let record = [
                    ("nodemesh.refusal", json!("plaintext-refused")),
                    ("nodemesh.source.pod", json!("stranger")),
                    ("nodemesh.destination.pod", json!(destination)),
                    ("nodemesh.response_flags", json!("UAEX")),
                ];
                expect_record(&lab, node, &record)?;
            }
            for ((pod, served), lines) in ["guard/near", "guard/far"].iter().zip(served).zip(lines) {
                ensure!(
                    told(&lab, pod, "served")? == served? + 2,
                    "only the friend's requests reached {pod}"
                );
                ensure!(told(&lab, pod, "lines")? == lines?, "a refused line reached {pod}");
            }
            Ok(())
        },
    );

    checks.check(
        "under strict the kubelet of the pod's own node may probe, and nothing else",
        || {
            let far = lab.pod_ip("guard/far")?;
            let fetch = |place, port: u16| -> Result<String> {
                let url = format!("http://{far}:{port}/healthz");
                let output = lab.exec_in(
                    place,
                    &["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-m", "10", &url],
                )?;
                Ok(output.stdout)
            };
            ensure!(fetch(Place::Node("node-2"), WEB)? == "200", "its own node's probe");
            ensure!(
                fetch(Place::Node("node-2"), WEB_UNDECLARED)? == "000",
                "a port without a probe"
            );
            ensure!(fetch(Place::Node("node-1"), WEB)? == "000", "another node");
            Ok(())
        },
    );

    checks.check("permissive for the namespace wins over the mesh", || {
        apply(
            &lab,
            &mtls("space", "guard", "{kind: Namespace, name: guard}", "{mode: permissive}"),
        )?;
        expect_served(&lab, &with(&|_, _, _| false))
    });

    checks.check("strict for one workload wins over its namespace", || {
        let target = "{kind: Pod, selector: {matchLabels: {pod: far}}}";
        apply(&lab, &mtls("far", "guard", target, "{mode: strict}"))?;
        expect_served(&lab, &with(&|from, to, _| from == STRANGER && to == "far"))
    });

    checks.check("a word on a port wins over one on its workload", || {
        let target = "{kind: Pod, selector: {matchLabels: {pod: far}}}";
        let ports = format!("{{mode: strict, ports: {{\"{WEB_UNDECLARED}\": permissive}}}}");
        apply(&lab, &mtls("far", "guard", target, &ports))?;
        expect_served(
            &lab,
            &with(&|from, to, port| from == STRANGER && to == "far" && port == WEB),
        )
    });

    checks.check("strict for a port of a service", || {
        delete(&lab, "MeshPolicy", "guard", "far")?;
        let target = "{kind: Service, name: near, sectionName: http}";
        apply(&lab, &mtls("near", "guard", target, "{mode: strict}"))?;
        expect_served(
            &lab,
            &with(&|from, to, port| from == STRANGER && to == "near" && port == WEB),
        )
    });
    checks.finish("mutual TLS modes");
    lab.down()
}

#[test]
fn access_policies_decide_by_identity_port_method_and_path() -> Result<()> {
    let lab = Lab::up(LabConfig::test("access").manifest(documents()))?;
    let mut checks = Checks::default();
    let friends = "[{name: friends, from: [{identities: [\"spiffe://cluster.local/ns/guard/sa/friend\"]}]}]";

    checks.check("once an allow exists, others are denied by HTTP, gRPC and TCP", || {
        apply(&lab, &access_both("callers", "Allow", friends))?;
        for (destination, node) in NEAR_AND_FAR {
            let pod = format!("guard/{destination}");
            let before = (behave(&lab, &pod, "")?, lab.metrics(node)?);
            let answers = get("/").times(3).ask(&lab, FOE, destination, 80)?;
            ensure!(statuses(&answers) == [(403, 3)].into(), "{destination}: {answers:?}");
            ensure!(answers[0].refusal() == "access-denied-request", "{answers:?}");
            ensure!(
                rpc(&lab, FOE, destination, json!({}))? == ["PERMISSION_DENIED"],
                "{destination} by gRPC"
            );
            let said = line(&lab, FOE, destination)?;
            ensure!(said["how"] == "ConnectionResetError", "{destination}: {said}");
            ensure!(
                behave(&lab, &pod, "")? == before.0,
                "something of the foe's reached {destination}"
            );

            let labels = [
                ("reporter", "destination"),
                ("source_workload", "foe"),
                ("destination_service_name", destination),
                ("response_code", "403"),
                ("response_flags", "UAEX"),
            ];
            // The gRPC refusal is a status within a 200.
            expect_growth(&lab, node, &before.1, "mesh_requests_total", &labels, 3.0)?;
            let reason = [("reason", "access-denied-connection")];
            let refused = lab.metrics(node)?.sum("nodemesh_agent_refusals_total", &reason);
            ensure!(
                refused - before.1.sum("nodemesh_agent_refusals_total", &reason) >= 1.0,
                "no refused flow on {node}"
            );
            for event in ["request", "connection"] {
                let want = [
                    ("event.name", json!(event)),
                    ("nodemesh.source.identity", json!(identity(FOE))),
                    ("nodemesh.destination.identity", json!(identity(&pod))),
                    ("nodemesh.rule", json!("default-deny:accesspolicy/guard/callers")),
                    ("nodemesh.response_flags", json!("UAEX")),
                ];
                expect_record(&lab, node, &want)?;
            }

            let answers = get("/").ask(&lab, FRIEND, destination, 80)?;
            ensure!(
                answers[0].status == 200 && answers[0].from() == destination,
                "{answers:?}"
            );
            ensure!(
                rpc(&lab, FRIEND, destination, json!({}))? == [destination],
                "{destination} by gRPC"
            );
            let said = line(&lab, FRIEND, destination)?;
            ensure!(said["answer"] == format!("{destination} hello"), "{said}");
            let want = [
                ("event.name", json!("request")),
                ("nodemesh.reporter", json!("destination")),
                ("nodemesh.source.identity", json!(identity(FRIEND))),
                ("nodemesh.rule", json!("accesspolicy/guard/callers/friends")),
                ("http.response.status_code", json!(200)),
            ];
            expect_record(&lab, node, &want)?;
        }
        Ok(())
    });

    checks.check("the pod's own address is guarded as its service is", || {
        let none = |from: &str| if from == FOE { 403 } else { 200 };
        let ends = [FRIEND, FOE].map(|from| NEAR_AND_FAR.map(|(to, _)| (from, to, WEB, none(from))));
        expect_served(&lab, &ends.concat())
    });

    checks.check(
        "a pod outside of the mesh has no identity that could be allowed",
        || {
            expect_served(&lab, &[(STRANGER, "near", WEB, 403), (STRANGER, "far", WEB, 403)])?;
            let said = line(&lab, STRANGER, &lab.pod_ip("guard/far")?.to_string())?;
            ensure!(said["how"] == "ConnectionResetError", "{said}");
            Ok(())
        },
    );

    checks.check("deny beats allow, by every reading of a path", || {
        let admin = format!("[{{to: [{{ports: [{WEB}], paths: [{{type: PathPrefix, value: /admin}}]}}]}}]");
        apply(&lab, &access_both("no-admin", "Deny", &admin))?;
        let paths = [
            "/",
            "/administer",
            "/admin",
            "/admin/x",
            "//admin",
            "/a/../admin",
            "/%61dmin",
            "/a/%2e%2e/admin",
        ];
        let asked = requests(paths.iter().map(|path| json!({"path": path})).collect());
        for (destination, node) in NEAR_AND_FAR {
            let answers = asked.ask(&lab, FRIEND, destination, 80)?;
            let found: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
            ensure!(
                found == [200, 200, 403, 403, 403, 403, 403, 403],
                "{destination}: {found:?}"
            );
            let want = [
                ("nodemesh.rule", json!("accesspolicy/guard/no-admin/0")),
                ("nodemesh.source.identity", json!(identity(FRIEND))),
                ("nodemesh.refusal", json!("access-denied-request")),
            ];
            expect_record(&lab, node, &want)?;
            // The rule is about another port.
            ensure!(
                line(&lab, FRIEND, destination)?["how"] == "answer",
                "a line to {destination}"
            );
        }
        delete(&lab, "AccessPolicy", "guard", "no-admin")
    });

    checks.check("methods, paths and ports", || {
        let rules = format!(
            "[{{from: [{{namespaces: [guard]}}], to: [{{ports: [{WEB}], methods: [GET, HEAD], \
             paths: [{{type: Exact, value: /read}}]}}, {{ports: [{WEB}], methods: [POST], headers: [{{name: x-key, value: k}}]}}]}}]"
        );
        apply(&lab, &access_both("callers", "Allow", &rules))?;
        let asked = requests(json!([
            {"path": "/read"}, {"path": "/read", "method": "HEAD"}, {"path": "/read", "method": "PUT"},
            {"path": "/write"}, {"path": "/write", "method": "POST"},
            {"path": "/write", "method": "POST", "headers": {"x-key": "k"}},
            {"path": "/write", "method": "POST", "headers": {"x-key": "l"}},
        ]));
        for (destination, _) in NEAR_AND_FAR {
            let answers = asked.ask(&lab, FOE, destination, 80)?;
            let found: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
            ensure!(found == [200, 200, 403, 403, 403, 200, 403], "{destination}: {found:?}");
            ensure!(statuses(&get("/read").ask(&lab, FOE, destination, 81)?) == [(403, 1)].into(), "port 81");
            let said = line(&lab, FOE, destination)?;
            ensure!(said["how"] == "ConnectionResetError", "{destination}: a flow under rules about requests: {said}");
        }
        Ok(())
    });

    checks.check("addresses", || {
        let rules = format!("[{{from: [{{cidrs: [\"{}/32\"]}}]}}]", lab.pod_ip(STRANGER)?);
        apply(&lab, &access_both("callers", "Allow", &rules))?;
        let ends =
            [(STRANGER, 200), (FRIEND, 403)].map(|(from, want)| NEAR_AND_FAR.map(|(to, _)| (from, to, WEB, want)));
        expect_served(&lab, &ends.concat())
    });

    checks.check(
        "a change of policy ends the open flows whose permit is lost, and no others",
        || {
            let both = "[{from: [{identities: [\"spiffe://cluster.local/ns/guard/*\"]}]}]";
            apply(&lab, &access_both("callers", "Allow", both))?;
            let mut flows = Vec::new();
            for (destination, node) in NEAR_AND_FAR {
                for from in [FRIEND, FOE] {
                    flows.push((from, destination, node, hold(&lab, from, destination)?));
                }
            }
            apply(&lab, &access_both("callers", "Allow", friends))?;
            for (from, destination, node, flow) in flows {
                let place = format!("{from} to {destination}");
                if from == FRIEND {
                    // It goes on: more lines are answered after the change.
                    ensure!(
                        line(&lab, FRIEND, destination)?["how"] == "answer",
                        "{place}: a new flow"
                    );
                    let end = end_of(&flow.interrupt(CUT_LIMIT)?.stdout)?;
                    ensure!(end["how"] == "stopped", "{place}: {end}");
                    continue;
                }
                let end = end_of(&flow.wait(CUT_LIMIT)?.stdout)?;
                ensure!(end["how"] == "ConnectionResetError", "{place}: {end}");
                let want = [
                    ("nodemesh.refusal", json!("permit-lost")),
                    ("nodemesh.source.identity", json!(identity(FOE))),
                    ("nodemesh.destination.pod", json!(destination)),
                ];
                expect_record(&lab, node, &want)?;
            }
            Ok(())
        },
    );

    checks.check(
        "an upgraded connection ends with its permit, also where a rule looks at requests",
        || {
            let both = "[{from: [{identities: [\"spiffe://cluster.local/ns/guard/*\"]}], to: [{methods: [GET]}]}]";
            for rules in [
                friends,
                "[{from: [{identities: [\"spiffe://cluster.local/ns/guard/*\"]}], to: [{methods: [POST]}]}]",
            ] {
                apply(&lab, &access_both("callers", "Allow", both))?;
                let flows = [hold_upgraded(&lab, FOE, "near")?, hold_upgraded(&lab, FOE, "far")?];
                // A revision that changes nothing for them.
                apply(
                    &lab,
                    &access(
                        "other",
                        "{kind: Pod, selector: {matchLabels: {app: friend}}}",
                        "Allow",
                        "[]",
                    ),
                )?;
                for flow in &flows {
                    ensure!(!flow.stdout().contains("how"), "ended too early: {}", flow.stdout());
                }
                apply(&lab, &access_both("callers", "Allow", rules))?;
                for (flow, (destination, node)) in flows.into_iter().zip(NEAR_AND_FAR) {
                    let end = end_of(&flow.wait(CUT_LIMIT)?.stdout)?;
                    ensure!(end["how"] == "ConnectionResetError", "{destination}: {end}");
                    let want = [
                        ("nodemesh.refusal", json!("permit-lost")),
                        ("url.path", json!("/upgrade")),
                        ("nodemesh.reporter", json!("destination")),
                        ("nodemesh.source.identity", json!(identity(FOE))),
                        ("nodemesh.destination.pod", json!(destination)),
                    ];
                    expect_record(&lab, node, &want)?;
                }
            }
            delete(&lab, "AccessPolicy", "guard", "other")
        },
    );

    checks.check(
        "a kept connection's next request is judged by the newest policy",
        || {
            let both = "[{from: [{identities: [\"spiffe://cluster.local/ns/guard/*\"]}]}]";
            for (destination, _) in NEAR_AND_FAR {
                let pod = format!("guard/{destination}");
                apply(&lab, &access_both("callers", "Allow", both))?;
                behave(&lab, &pod, "hold=1")?;
                let asking = get("/").times(2).start(&lab, FOE, destination, 80)?;
                until("the first request", CUT_LIMIT, || {
                    Ok((told(&lab, &pod, "waiting")? == 1).then_some(()))
                })?;
                apply(&lab, &access_both("callers", "Allow", friends))?;
                behave(&lab, &pod, "hold=0")?;
                let answers = actors::answers(&asking.wait(CUT_LIMIT)?.ok()?)?;
                let found: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
                ensure!(found == [200, 403], "{destination}: {found:?}");
            }
            Ok(())
        },
    );
    checks.finish("access");
    lab.down()
}

/// A key and its chain, as PEM in one file.
struct Credential {
    file: PathBuf,
}

/// Takes the credential that a node's agent keeps for an identity.
fn steal(lab: &Lab, node: &str, identity: &str, into: &Path) -> Result<Credential> {
    let kept = lab.directory().join("agents").join(node).join("state/credentials");
    let found = until("a kept credential", CUT_LIMIT, || {
        let entries = fs::read_dir(&kept)?.collect::<std::io::Result<Vec<_>>>()?;
        let kept = entries
            .iter()
            .filter_map(|entry| serde_json::from_slice::<Json>(&fs::read(entry.path()).ok()?).ok());
        Ok(kept.into_iter().find(|kept| kept["identity"] == identity))
    })?;
    let bytes = |value: &Json| serde_json::from_value::<Vec<u8>>(value.clone());
    let der = into.join("stolen.der");
    fs::write(&der, bytes(&found["key"])?)?;
    let mut pem = openssl(&["pkey", "-inform", "DER", "-in", &text(&der)])?;
    for certificate in found["chain"].as_array().context("no chain")? {
        fs::write(&der, bytes(certificate)?)?;
        pem.push_str(&openssl(&["x509", "-inform", "DER", "-in", &text(&der)])?);
    }
    let file = into.join(format!("stolen-{node}.pem"));
    fs::write(&file, pem)?;
    Ok(Credential { file })
}

/// A credential of an authority that calls itself as the mesh's does, made by anybody.
fn forge(identity: &str, issuer: &str, into: &Path) -> Result<Credential> {
    let path = |name: &str| text(&into.join(name));
    fs::write(
        into.join("forged.ext"),
        format!(
            "subjectAltName=critical,URI:{identity}\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth,clientAuth\n"
        ),
    )?;
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
    let (ca_key, ca) = (path("ca.key"), path("ca.pem"));
    openssl(
        &[
            &["req", "-x509"],
            &key[..],
            &["-keyout", &ca_key, "-out", &ca, "-days", "2", "-subj", issuer],
        ]
        .concat(),
    )?;
    let (leaf_key, request) = (path("leaf.key"), path("leaf.csr"));
    openssl(
        &[
            &["req"],
            &key[..],
            &["-keyout", &leaf_key, "-out", &request, "-subj", "/CN=friend"],
        ]
        .concat(),
    )?;
    let leaf = openssl(&[
        "x509",
        "-req",
        "-in",
        &request,
        "-CA",
        &ca,
        "-CAkey",
        &ca_key,
        "-CAcreateserial",
        "-days",
        "1",
        "-extfile",
        &path("forged.ext"),
    ])?;
    let file = into.join("forged.pem");
    fs::write(
        &file,
        fs::read_to_string(&leaf_key)? + &leaf + &fs::read_to_string(&ca)?,
    )?;
    Ok(Credential { file })
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn openssl(arguments: &[&str]) -> Result<String> {
    let output = Command::new("openssl")
        .args(arguments)
        .output()
        .context("run openssl")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "openssl {arguments:?}: {said}");
    Ok(String::from_utf8(output.stdout)?)
}

/// Where an impostor stands.
enum From {
    /// In a pod, as its application.
    Pod(&'static str),
    /// In a pod's network namespace, but as the agent does: nothing captures it.
    AgentIn(&'static str, &'static str),
    /// On a node.
    Node(&'static str),
}

/// Does what a peer's agent does, with this credential.
fn impersonate(lab: &Lab, from: &From, host: &str, alpn: &str, credential: Option<&Credential>) -> Result<Json> {
    let file = credential.map_or_else(|| "-".to_owned(), |credential| text(&credential.file));
    let port = if alpn.contains("tcp") { LINES } else { WEB }.to_string();
    let argv = ["/usr/bin/python3", actors::PROGRAM, "tunnel", host, &port, alpn, &file];
    let mut site = match from {
        From::Pod(pod) | From::AgentIn(pod, _) => lab.site(Place::Pod(pod))?,
        From::Node(node) => lab.site(Place::Node(node))?,
    };
    if let From::AgentIn(_, node) = from {
        site.cgroup = mesh::agent_cgroup(lab.cgroup(), node);
    }
    let said = site.exec(&argv, CUT_LIMIT)?.ok()?;
    serde_json::from_str(&said).with_context(|| format!("it said {said}"))
}

#[test]
fn forged_expired_and_stolen_certificates_are_refused() -> Result<()> {
    /// The shortest life with time enough to steal a certificate and use it.
    const LIFE: &str = "--svid-ttl=12s";
    let config = LabConfig {
        controller_args: vec![LIFE.into()],
        ..LabConfig::test("certificates")
    };
    let lab = Lab::up(config.manifest(documents()))?;
    let mut checks = Checks::default();
    let files = tempfile::tempdir()?;
    let friends = "[{from: [{identities: [\"spiffe://cluster.local/ns/guard/sa/friend\"]}]}]";
    let strict = mtls("strict", "guard", "{kind: Namespace, name: guard}", "{mode: strict}");
    apply(
        &lab,
        &format!("---\n{strict}{}", access_both("callers", "Allow", friends)),
    )?;
    let (near, far) = (
        lab.pod_ip("guard/near")?.to_string(),
        lab.pod_ip("guard/far")?.to_string(),
    );
    let own = From::AgentIn(FRIEND, "node-1");
    let stolen = || steal(&lab, "node-1", &identity(FRIEND), files.path());

    // How the impostor's try ends, which reason the destination's node counts once, and that nothing was delivered.
    // The credential is taken anew for each try: it is short-lived.
    type Take<'a> = &'a dyn Fn() -> Result<Option<Credential>>;
    let refused = |from: &From, to: (&str, &str, &str), take: Take<'_>, reason: &str| -> Result<()> {
        let (pod, host, node) = to;
        for alpn in ["nodemesh-http/1", "nodemesh-tcp/1"] {
            let before = (lab.metrics(node)?, behave(&lab, pod, "")?);
            let said = impersonate(&lab, from, host, alpn, take()?.as_ref())?;
            ensure!(said["how"] != "answer", "{alpn} to {pod}: {said}");
            let refusal = [("reason", reason)];
            expect_growth(&lab, node, &before.0, "nodemesh_agent_refusals_total", &refusal, 1.0)
                .with_context(|| format!("{alpn} to {pod}: {said}"))?;
            let record = [
                ("nodemesh.refusal", json!(reason)),
                ("nodemesh.reporter", json!("destination")),
            ];
            let record = expect_record(&lab, node, &record)?;
            ensure!(
                record["nodemesh.source.identity"].is_null(),
                "nothing was proven: {record}"
            );
            ensure!(behave(&lab, pod, "")? == before.1, "{alpn}: something reached {pod}");
        }
        Ok(())
    };
    let fresh = || stolen().map(Some);
    let far_end = ("guard/far", far.as_str(), "node-2");
    let near_end = ("guard/near", near.as_str(), "node-1");

    checks.check(
        "the right certificate from the right address is a tunnel: the other checks can fail",
        || {
            let said = impersonate(&lab, &own, &far, "nodemesh-http/1", Some(&stolen()?))?;
            let answer = said["answer"].as_str().unwrap_or_default();
            ensure!(
                answer.starts_with("HTTP/1.1 200") && answer.contains("\"/tunnel\""),
                "{said}"
            );
            let want = [
                ("url.path", json!("/tunnel")),
                ("nodemesh.source.identity", json!(identity(FRIEND))),
                ("nodemesh.connection.security", json!("mutual_tls")),
            ];
            expect_record(&lab, "node-2", &want).map(drop)
        },
    );
    checks.check("a stolen certificate from a pod outside of the mesh", || {
        refused(&From::Pod(STRANGER), far_end, &fresh, "identity-mismatch")?;
        refused(&From::Pod(STRANGER), near_end, &fresh, "identity-mismatch")
    });
    checks.check("a stolen certificate from another pod's address", || {
        refused(&From::AgentIn(FOE, "node-1"), far_end, &fresh, "identity-mismatch")
    });
    checks.check("a stolen certificate from an address of no workload", || {
        refused(&From::Node("node-1"), far_end, &fresh, "unknown-source")
    });
    checks.check("a certificate of a self-made authority with the same name", || {
        let root = lab.ctl(&["bundle"])?.ok()?;
        let file = files.path().join("root.pem");
        fs::write(&file, root)?;
        let subject = openssl(&["x509", "-in", &text(&file), "-noout", "-subject", "-nameopt", "compat"])?;
        let name = subject.trim().trim_start_matches("subject=").trim();
        ensure!(name.starts_with('/'), "{subject}");
        let forged = || forge(&identity(FRIEND), name, files.path()).map(Some);
        refused(&own, far_end, &forged, "source-handshake-failed")?;
        refused(&From::Pod(STRANGER), near_end, &forged, "source-handshake-failed")
    });
    checks.check("no certificate at all", || {
        refused(&own, far_end, &|| Ok(None), "source-handshake-failed")
    });
    checks.check("an expired certificate, from the right address", || {
        let old = stolen()?;
        let certificate = text(&old.file);
        until("its expiry", Duration::from_secs(20), || {
            let check = Command::new("openssl")
                .args(["x509", "-in", &certificate, "-noout", "-checkend", "0"])
                .output()?;
            Ok((!check.status.success()).then_some(()))
        })?;
        let old = || Ok(Some(Credential { file: old.file.clone() }));
        refused(&own, far_end, &old, "source-handshake-failed")?;
        // The owner has a new one since.
        ensure!(
            statuses(&get("/").times(5).ask(&lab, FRIEND, "far", 80)?) == [(200, 5)].into(),
            "the owner"
        );
        Ok(())
    });
    checks.check(
        "a pod cannot use a certificate that it stole: its own agent carries the bytes under its own name",
        || {
            let said = impersonate(&lab, &From::Pod(FOE), &far, "nodemesh-http/1", Some(&stolen()?))?;
            ensure!(said["how"] != "answer", "{said}");
            Ok(())
        },
    );
    checks.finish("certificates");
    lab.down()
}

#[test]
fn a_denial_is_told_though_another_endpoint_could_not_be_reached() -> Result<()> {
    let labels = [("role", "both")];
    let documents = [
        actors::namespace("guard", true),
        actors::source(FOE, "node-1"),
        actors::destination("guard/near", "node-1", &labels),
        actors::destination("guard/far", "node-2", &labels),
        both(),
    ];
    let lab = Lab::up(LabConfig::test("denied").manifest(documents.concat()))?;
    let answers = get("/").times(8).ask(&lab, FOE, "both", 80)?;
    ensure!(statuses(&answers) == [(200, 8)].into(), "{answers:?}");
    apply(
        &lab,
        &access(
            "nobody",
            "{kind: Service, name: both}",
            "Deny",
            "[{to: [{ports: [8080]}]}]",
        ),
    )?;
    // What is denied by an endpoint that lives is not told otherwise by one whose agent is gone.
    lab.kill_agent("node-2")?;
    for plan in [get("/").times(12), get("/").times(12).fresh()] {
        let answers = plan.ask(&lab, FOE, "both", 80)?;
        ensure!(statuses(&answers) == [(403, 12)].into(), "{answers:?}");
        ensure!(
            answers.iter().all(|answer| answer.refusal() == "access-denied-request"),
            "{answers:?}"
        );
    }
    for reporter in ["source", "destination"] {
        let fields = [
            ("event.name", json!("request")),
            ("nodemesh.reporter", json!(reporter)),
            ("nodemesh.destination.pod", json!("near")),
            ("http.response.status_code", json!(403)),
            ("nodemesh.response_flags", json!("UAEX")),
        ];
        let record = expect_record(&lab, "node-1", &fields)?;
        let rule = record["nodemesh.rule"].as_str().unwrap_or_default();
        ensure!(rule.starts_with("accesspolicy/guard/nobody"), "{record}");
    }
    lab.down()
}
