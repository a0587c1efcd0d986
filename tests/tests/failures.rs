//! What fails, what goes on and what fails closed: the rows of `docs/failures.md`, with real programs as witnesses.

mod shop_lab;

use std::{
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use mesh_tests::{Lab, Packets, Place, until};
use shop_lab::*;

/// What is searched for on the wire.
const MARKER: &str = "failure-marker";
/// How long a restarted agent may take until its pods are served again.
const RECOVERY: Duration = Duration::from_secs(10);

/// Keeps the visitor out of the cart.
const NO_VISITOR: &str = "\
apiVersion: nodemesh.io/v1alpha1
kind: AccessPolicy
metadata: {name: no-visitor, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart}]
  action: Deny
  rules: [{from: [{identities: ['spiffe://cluster.local/ns/shop/sa/visitor']}]}]
";

/// A service whose answer to `GET FILE` waits until the file exists.
const PATIENT: &str = r#"
apiVersion: v1
kind: ServiceAccount
metadata: {name: patient, namespace: shop}
---
apiVersion: v1
kind: Pod
metadata: {name: patient, namespace: shop, labels: {app: patient}}
spec:
  nodeName: node-2
  serviceAccountName: patient
  containers:
  - name: patient
    command:
    - python3
    - -uc
    - |
      import http.server, os, time
      class Handler(http.server.BaseHTTPRequestHandler):
          protocol_version = "HTTP/1.1"
          def do_GET(self):
              print("asked for", self.path)
              while not os.path.exists(self.path):
                  time.sleep(0.01)
              self.send_response(200)
              self.send_header("content-length", "8")
              self.end_headers()
              self.wfile.write(b"patient\n")
      http.server.ThreadingHTTPServer(("", 8080), Handler).serve_forever()
    ports: [{name: http, containerPort: 8080}]
    readinessProbe: {tcpSocket: {port: 8080}}
---
apiVersion: v1
kind: Service
metadata: {name: patient, namespace: shop}
spec: {selector: {app: patient}, ports: [{name: http, port: 80, targetPort: http}]}
"#;

/// What a restart of the controller must leave alone: its documents, and what agents were told and given.
fn standing(lab: &Lab) -> Result<(String, u64, Vec<f64>)> {
    let documents = lab.ctl(&["policy", "get", "-A", "-o", "yaml"])?.ok()?;
    let mut counts = Vec::new();
    for node in ["node-1", "node-2"] {
        for event in [
            "view-applied",
            "view-refused",
            "credential-issued",
            "node-certificate-issued",
            "pod-captured",
        ] {
            counts.push(events(lab, node, event)?);
        }
    }
    Ok((documents, revision(lab)?, counts))
}

#[test]
fn a_dead_controller_stops_changes_and_nothing_else() -> Result<()> {
    let lab = Lab::up(shop("ctldead"))?;
    apply(&lab, STRICT)?;
    let requests = Load::start(&lab, VISITOR, "connect", "http://cart/", 40)?;
    let mut flow = Flow::open(&lab, VISITOR, "bank")?;
    all_current(&lab)?;
    let before = standing(&lab)?;

    lab.kill_controller()?;
    let refused = lab.ctl_with_input(&["policy", "apply", "-f", "-"], NO_VISITOR)?;
    assert_eq!(refused.code(), 3, "{refused}");
    flow.goes_on()?;
    for url in ["http://cart/", "http://catalog/", "http://front/"] {
        assert_eq!(get(&lab, VISITOR, url)?.status, 200, "{url}");
    }
    let stranger = get(&lab, STRANGER, &format!("http://{}:8080/", lab.pod_ip("shop/cart-v1")?))?;
    assert!(
        stranger.exit != 0 && stranger.status == 0,
        "strict goes on: {stranger:?}"
    );
    for node in ["node-1", "node-2"] {
        let connected =
            || Ok((lab.metrics(node)?.sum("nodemesh_agent_controller_connected", &[]) == 0.0).then_some(()));
        until("the agent shows that it is alone", LIMIT, connected)?;
    }

    lab.start_controller()?;
    all_current(&lab)?;
    assert_eq!(
        standing(&lab)?,
        before,
        "agents resume by revision: nothing is sent or signed anew"
    );
    flow.close()?;
    requests.finish_served()?;
    apply(&lab, NO_VISITOR)?;
    assert_eq!(
        get(&lab, VISITOR, "http://cart/")?.status,
        403,
        "changes are possible again"
    );
    assert_eq!(revision(&lab)?, before.1 + 1);
    lab.down()
}

#[test]
fn a_dead_agent_leaves_its_pods_refused_and_nothing_in_the_clear() -> Result<()> {
    // Permissive: any plaintext would be taken.
    let lab = Lab::up(shop("agentdead"))?;
    let capture = lab.capture("tcp")?;
    let marked = |host: &str| format!("http://{host}/?{MARKER}");
    let cart = lab.pod_ip("shop/cart-v1")?;
    assert_eq!(get(&lab, VISITOR, &marked("cart"))?.status, 200);
    let flow = Flow::open(&lab, VISITOR, "bank")?;

    lab.kill_agent("node-2")?;
    flow.expect_cut()?;
    for (pod, url) in [
        (VISITOR, marked("cart")),
        (VISITOR, marked(&format!("{cart}:8080"))),
        (STRANGER, marked(&format!("{cart}:8080"))),
        ("shop/cart-v1", marked("catalog")),
        ("shop/cart-v1", marked("stock")),
        (
            "shop/cart-v1",
            format!("http://{}:8080/?{MARKER}", lab.pod_ip("shop/stock")?),
        ),
    ] {
        let answer = get(&lab, pod, &url)?;
        assert!(answer.refused_at_once(), "{pod} to {url}: {answer:?}");
    }
    let began = Instant::now();
    let redis = lab.exec(VISITOR, &["redis-cli", "-h", "bank", "ping"])?;
    assert!(!redis.stdout.contains("PONG") && began.elapsed() < AT_ONCE, "{redis}");
    assert_eq!(
        get(&lab, VISITOR, "http://catalog/")?.status,
        200,
        "the other node goes on"
    );
    let probe = [
        "curl",
        "-sS",
        "--fail",
        "--max-time",
        "5",
        &format!("http://{cart}:8080/healthz"),
    ];
    lab.exec_in(Place::Node("node-2"), &probe)?
        .ok()
        .context("the node's own probe")?;

    lab.start_agent("node-2")?;
    let took = served_again(&lab, VISITOR, &marked("cart"))?;
    assert!(took < RECOVERY, "{took:?}");
    assert_eq!(get(&lab, "shop/cart-v1", &marked("catalog"))?.status, 200);

    // The source's agent, and then both.
    lab.kill_agent("node-1")?;
    let answer = get(&lab, VISITOR, &marked("cart"))?;
    assert!(answer.exit == 7 && answer.refused_at_once(), "{answer:?}");
    let answer = get(&lab, "shop/cart-v1", &marked("catalog"))?;
    assert!(answer.refused_at_once(), "{answer:?}");
    lab.kill_agent("node-2")?;
    assert!(get(&lab, VISITOR, &marked("cart"))?.refused_at_once());
    for node in ["node-1", "node-2"] {
        lab.start_agent(node)?;
    }
    let took = served_again(&lab, VISITOR, &marked("cart"))?;
    assert!(took < RECOVERY, "{took:?}");

    let packets = Packets::parse(capture.stop()?)?;
    assert_eq!(
        (packets.count(MARKER), packets.count("HTTP/1.1"), packets.count("PONG")),
        (0, 0, 0)
    );
    assert!(
        packets.tls13_handshakes(8080) >= 3,
        "{}",
        packets.tls13_handshakes(8080)
    );
    lab.down()
}

#[test]
fn agents_restart_without_the_controller_by_what_they_kept() -> Result<()> {
    let lab = Lab::up(shop("alone"))?;
    apply(&lab, &[STRICT, "---\n", NO_VISITOR].concat())?;
    let before = standing(&lab)?;
    lab.kill_controller()?;
    for node in ["node-1", "node-2"] {
        lab.kill_agent(node)?;
    }
    for node in ["node-1", "node-2"] {
        lab.start_agent(node)?;
        assert!(
            events(&lab, node, "snapshot-loaded")? == 1.0,
            "{}",
            lab.agent_log(node)?
        );
    }
    let capture = lab.capture("tcp")?;
    served_again(&lab, "shop/front", &format!("http://cart/?{MARKER}"))?;
    assert_eq!(get(&lab, VISITOR, "http://cart/")?.status, 403, "its policies hold");
    let stranger = get(&lab, STRANGER, &format!("http://{}:8080/", lab.pod_ip("shop/cart-v1")?))?;
    assert!(stranger.exit != 0 && stranger.status == 0, "strict holds: {stranger:?}");
    let packets = Packets::parse(capture.stop()?)?;
    assert_eq!(packets.count(MARKER), 0);
    assert!(packets.tls13_handshakes(8080) >= 1);
    let served = record(&lab, "node-2", |record| {
        record["http.response.status_code"] == 200 && record["nodemesh.source.workload"] == "front"
    })?;
    assert_eq!(served["nodemesh.connection.security"], "mutual_tls", "{served:#}");
    assert_eq!(
        served["nodemesh.source.identity"],
        "spiffe://cluster.local/ns/shop/sa/front"
    );
    assert_eq!(served["nodemesh.revision"], before.1, "the last good revision");

    lab.start_controller()?;
    all_current(&lab)?;
    assert_eq!(revision(&lab)?, before.1);
    for node in ["node-1", "node-2"] {
        for event in ["view-refused", "credential-issued", "node-certificate-issued"] {
            assert_eq!(
                events(&lab, node, event)?,
                0.0,
                "{event} on {node}: what was kept is good"
            );
        }
        assert_eq!(
            events(&lab, node, "view-applied")?,
            0.0,
            "nothing is sent again to {node}"
        );
    }
    lab.down()
}

#[test]
fn everything_is_killed_and_comes_back() -> Result<()> {
    let lab = Lab::up(shop("allkilled"))?;
    apply(&lab, &[STRICT, "---\n", NO_VISITOR].concat())?;
    let before = standing(&lab)?;
    lab.kill_controller()?;
    lab.kill_agent("node-1")?;
    lab.kill_agent("node-2")?;
    assert!(get(&lab, "shop/front", "http://cart/")?.refused_at_once());
    lab.start_controller()?;
    assert_eq!(
        (standing_documents(&lab)?, revision(&lab)?),
        (before.0, before.1),
        "the store has everything"
    );
    lab.start_agent("node-1")?;
    lab.start_agent("node-2")?;
    all_current(&lab)?;
    served_again(&lab, "shop/front", "http://cart/")?;
    assert_eq!(get(&lab, VISITOR, "http://cart/")?.status, 403);
    lab.down()
}

fn standing_documents(lab: &Lab) -> Result<String> {
    lab.ctl(&["policy", "get", "-A", "-o", "yaml"])?.ok()
}

#[test]
fn with_fail_mode_pass_pods_go_on_without_protection() -> Result<()> {
    let lab = Lab::up(shop("pass").agent_arg("--fail-mode=pass"))?;
    let url = format!("http://cart/?{MARKER}");
    let capture = lab.capture("tcp")?;
    assert_eq!(get(&lab, VISITOR, &url)?.status, 200);
    assert_eq!(
        Packets::parse(capture.stop()?)?.count(MARKER),
        0,
        "while the agents live, nothing is in the clear"
    );

    lab.kill_agent("node-1")?;
    let capture = lab.capture("tcp")?;
    assert_eq!(get(&lab, VISITOR, &url)?.status, 200, "past the dead agent");
    assert!(
        Packets::parse(capture.stop()?)?.count(MARKER) > 0,
        "in the clear, as configured"
    );
    let taken = record(&lab, "node-2", |record| {
        record["nodemesh.connection.security"] == "none"
    })?;
    assert!(
        taken.get("nodemesh.source.identity").is_none(),
        "nobody proved anything: {taken:#}"
    );

    // The destination's agent lives: it still refuses plaintext under strict.
    apply(&lab, STRICT)?;
    let answer = get(&lab, VISITOR, &url)?;
    assert!(answer.exit != 0 && answer.status == 0, "{answer:?}");
    lab.kill_agent("node-2")?;
    assert_eq!(get(&lab, VISITOR, &url)?.status, 200, "nobody guards any more");

    lab.start_agent("node-1")?;
    lab.start_agent("node-2")?;
    all_current(&lab)?;
    let capture = lab.capture("tcp")?;
    served_again(&lab, VISITOR, &url)?;
    assert_eq!(Packets::parse(capture.stop()?)?.count(MARKER), 0);
    lab.down()
}

#[test]
fn a_stopped_agent_drains_what_runs_and_takes_nothing_new() -> Result<()> {
    let lab = Lab::up(shop("drain").manifest(PATIENT))?;
    for (round, node) in ["node-2", "node-1"].into_iter().enumerate() {
        let file = lab.directory().join(format!("answer-{round}"));
        let url = format!("http://patient{}", file.display());
        let open = lab.exec_background(VISITOR, &["curl", "-sS", "--fail", "--max-time", "60", &url])?;
        let asked = format!("asked for {}", file.display());
        until("the request at its destination", LIMIT, || {
            Ok(lab.logs("shop/patient")?.contains(&asked).then_some(()))
        })?;
        thread::scope(|scope| -> Result<()> {
            let stopping = scope.spawn(|| lab.stop_agent(node));
            let refused = until("refusal of new connections", LIMIT, || {
                let answer = get(&lab, VISITOR, "http://cart/")?;
                Ok((answer.exit != 0 || answer.status != 200).then_some(answer))
            });
            // The answer is let go in any case, so that the agent's end is awaited for no longer than needed.
            let running = !lab.agent_pids(node)?.is_empty();
            std::fs::write(&file, "")?;
            stopping.join().map_err(|_| anyhow::anyhow!("it panicked"))??;
            ensure!(running, "it did not wait for the open request");
            ensure!(
                refused?.refused_at_once(),
                "new connections are refused, not left waiting"
            );
            Ok(())
        })?;
        assert_eq!(
            open.wait(LIMIT)?.ok()?,
            "patient\n",
            "what ran when {node} was stopped came to its end"
        );
        lab.start_agent(node)?;
        served_again(&lab, VISITOR, "http://cart/")?;
    }
    lab.down()
}

#[test]
fn a_drain_ends_what_outlives_its_patience() -> Result<()> {
    let config = tempfile::NamedTempFile::new()?;
    std::fs::write(config.path(), "drain: {patience: 1s, grace: 1s}\n")?;
    let lab = Lab::up(shop("patience").agent_arg(&format!("--config={}", config.path().display())))?;
    for node in ["node-2", "node-1"] {
        let flow = Flow::open(&lab, VISITOR, "bank")?;
        lab.stop_agent(node)?;
        flow.expect_reset()
            .with_context(|| format!("when {node} was stopped"))?;
        let cut = record(&lab, node, |record| {
            record["nodemesh.outcome"] == "drained" && record["nodemesh.destination.workload"] == "bank"
        })?;
        assert!(cut["nodemesh.bytes_sent"].as_u64() > Some(0), "{cut:#}");
        lab.start_agent(node)?;
        served_again(&lab, VISITOR, "http://cart/")?;
    }
    lab.down()
}

#[test]
fn a_controller_restored_from_a_backup_takes_nothing_from_the_agents() -> Result<()> {
    let lab = Lab::up(shop("backup"))?;
    let data = lab.directory().join("controller");
    let backup = lab.directory().join("backup");
    let copy = |from: &Path, to: &Path| -> Result<()> {
        let status = Command::new("cp").args(["-aT"]).args([from, to]).status()?;
        ensure!(status.success(), "cp");
        Ok(())
    };
    lab.kill_controller()?;
    copy(&data, &backup)?;
    lab.start_controller()?;
    all_current(&lab)?;
    let old = revision(&lab)?;
    apply(&lab, STRICT)?;
    apply(&lab, NO_VISITOR)?;
    let held = revision(&lab)?;
    lab.kill_controller()?;
    std::fs::remove_dir_all(&data)?;
    copy(&backup, &data)?;
    lab.start_controller()?;
    assert_eq!(revision(&lab)?, old);

    // The agents hold what is newer, refuse what is older, and `status` says so.
    for node in ["node-1", "node-2"] {
        let shown = until("the refusal in the status", LIMIT, || {
            let shown = agent(&lab, node)?;
            ensure!(shown["nackedRevision"] == old, "{shown:#}");
            Ok(Some(shown))
        })?;
        let why = shown["nackReason"].as_str().unwrap_or_default();
        assert!(why.contains("older"), "{shown:#}");
        assert_eq!(shown["current"], false, "{shown:#}");
    }
    let table = lab.ctl(&["status"])?.ok()?;
    assert!(table.contains(&format!("refused revision {old}")), "{table}");
    assert_eq!(
        get(&lab, VISITOR, "http://cart/")?.status,
        403,
        "the last good revision is served"
    );
    assert_eq!(get(&lab, "shop/front", "http://cart/")?.status, 200);

    // New revisions bring the two together again.
    let newer = STRICT.replace("name: strict", "name: newer");
    for n in 0..3 {
        let label = format!("labels: {{round: r{n}}}, name: newer");
        let output = lab.ctl_with_input(&["policy", "apply", "-f", "-"], &newer.replace("name: newer", &label))?;
        ensure!(output.status.success(), "{output}");
        if n == 1 {
            // The restored store has come to the number that the agents hold, and means something else by it.
            assert_eq!(revision(&lab)?, held);
            lab.kill_controller()?;
            lab.start_controller()?;
            for node in ["node-1", "node-2"] {
                until("the refusal of another revision", LIMIT, || {
                    let shown = agent(&lab, node)?;
                    let why = shown["nackReason"].as_str().unwrap_or_default();
                    ensure!(
                        shown["nackedRevision"] == held && why.contains("another revision"),
                        "{shown:#}"
                    );
                    ensure!(shown["current"] == false, "{shown:#}");
                    Ok(Some(()))
                })?;
            }
            assert_eq!(get(&lab, VISITOR, "http://cart/")?.status, 403, "nothing was widened");
        }
    }
    all_current(&lab)?;
    assert_eq!(
        get(&lab, VISITOR, "http://cart/")?.status,
        200,
        "the policy is not in the restored store"
    );
    lab.down()
}

#[test]
fn an_open_flow_ends_when_its_permit_is_withdrawn() -> Result<()> {
    let lab = Lab::up(shop("permit").manifest(
        "{apiVersion: v1, kind: Pod, metadata: {name: teller, namespace: shop, labels: {app: teller}}, spec: {nodeName: \
         node-2, serviceAccountName: front, containers: [{name: main, command: [sleep, infinity]}]}}",
    ))?;
    let (far, near) = (
        Flow::open(&lab, VISITOR, "bank")?,
        Flow::open(&lab, "shop/teller", "bank")?,
    );
    let mut front = Flow::open(&lab, "shop/front", "bank")?;
    let deny = |name: &str, account: &str| {
        NO_VISITOR
            .replace("name: no-visitor", &format!("name: {name}"))
            .replace("name: cart", "name: bank")
            .replace("sa/visitor", &format!("sa/{account}"))
    };
    apply(&lab, &deny("no-visitor", "visitor"))?;
    far.expect_reset()?;
    let cut = record(&lab, "node-2", |record| record["nodemesh.refusal"] == "permit-lost")?;
    assert_eq!(
        cut["nodemesh.source.identity"], "spiffe://cluster.local/ns/shop/sa/visitor",
        "{cut:#}"
    );
    front.goes_on().context("a flow that is still permitted")?;
    apply(&lab, &deny("no-front", "front"))?;
    near.expect_reset().context("on one node")?;
    front.expect_reset()?;
    lab.down()
}

#[test]
fn certificates_are_renewed_unnoticed_and_run_out_without_a_controller() -> Result<()> {
    let mut config = shop("expiry");
    config.controller_args.push("--svid-ttl=6s".into());
    let lab = Lab::up(config)?;
    apply(&lab, STRICT)?;
    let kept = Load::start(&lab, VISITOR, "http", "http://cart/", 30)?;
    let short = Load::start(&lab, VISITOR, "connect", "http://cart/", 10)?;
    let mut flow = Flow::open(&lab, VISITOR, "bank")?;
    let issued = events(&lab, "node-2", "credential-issued")?;
    until("two renewals of each identity", LIMIT, || {
        Ok((events(&lab, "node-2", "credential-issued")? >= issued + 6.0).then_some(()))
    })?;
    kept.finish_served()?;
    short.finish_served()?;

    lab.kill_controller()?;
    for url in ["http://cart/", "http://stock/"] {
        let answer = until("the end of the certificates", LIMIT, || {
            let answer = get(&lab, VISITOR, url)?;
            Ok((answer.status != 200).then_some(answer))
        })?;
        assert!(answer.status == 503 || answer.exit != 0, "{answer:?}");
    }
    until("the end of the flows' certificates", LIMIT, || {
        let redis = lab.exec(VISITOR, &["redis-cli", "-h", "bank", "ping"])?;
        Ok((!redis.stdout.contains("PONG")).then_some(()))
    })?;
    assert_eq!(
        get(&lab, VISITOR, "http://catalog/")?.status,
        200,
        "on one node the namespaces prove who is who"
    );
    if let Err(error) = flow.goes_on() {
        let lines: Vec<_> = ["node-1", "node-2"]
            .into_iter()
            .flat_map(|node| lab.access_log(node))
            .flatten()
            .collect();
        let of_bank = lines
            .iter()
            .filter(|line| line["nodemesh.destination.workload"] == "bank");
        let of_bank: Vec<String> = of_bank.map(|line| line.to_string()).collect();
        return Err(error.context(format!(
            "a flow that was admitted by a valid certificate:\n{}",
            of_bank.join("\n")
        )));
    }

    lab.start_controller()?;
    served_again(&lab, VISITOR, "http://cart/")?;
    flow.close()?;
    lab.down()
}

#[test]
fn no_connection_comes_back_to_the_agent_for_ever() -> Result<()> {
    let lab = Lab::up(shop("loop"))?;
    let ended = |node: &str| -> Result<f64> {
        let metrics = lab.metrics(node)?;
        Ok(metrics.sum("nodemesh_agent_records_closed_total", &[]) + metrics.sum("nodemesh_agent_refusals_total", &[]))
    };
    let (own, near, far) = (
        lab.pod_ip(VISITOR)?,
        lab.pod_ip("shop/catalog")?,
        lab.pod_ip("shop/cart-v1")?,
    );
    let before = [ended("node-1")?, ended("node-2")?];
    let mut tried = 0.0;
    for host in [
        "127.0.0.1".to_string(),
        "[::1]".into(),
        own.to_string(),
        near.to_string(),
        far.to_string(),
    ] {
        for port in [15001, 15006] {
            let answer = get(&lab, VISITOR, &format!("http://{host}:{port}/"))?;
            assert!(answer.refused_at_once(), "{host}:{port}: {answer:?}");
            tried += 1.0;
        }
    }
    // An application that is not there, on this node and on the other one.
    for host in [near, far] {
        let answer = get(&lab, VISITOR, &format!("http://{host}:9/"))?;
        assert!(answer.refused_at_once(), "{host}: {answer:?}");
        tried += 1.0;
    }
    for (node, before) in ["node-1", "node-2"].into_iter().zip(before) {
        let nothing_open = || Ok((lab.metrics(node)?.sum("nodemesh_agent_records_open", &[]) == 0.0).then_some(()));
        until("nothing in progress", LIMIT, nothing_open)?;
        let more = ended(node)? - before;
        // A try may be a refusal, and a record of each side.
        assert!(more <= 4.0 * tried, "{more} records of {tried} tries on {node}");
    }
    // The same must hold where another agent refuses: one try for each request.
    lab.kill_agent("node-2")?;
    let answer = get(&lab, VISITOR, "http://stock/")?;
    assert_eq!(answer.status, 503, "{answer:?}");
    let line = record(&lab, "node-1", |line| line["server.address"] == "stock")?;
    assert_eq!(line["nodemesh.attempts"], 1, "{line:#}");
    lab.down()
}

/// The page names the test behind each of its rows; all of them must exist.
#[test]
fn every_test_that_the_page_names_exists() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("a workspace")?;
    let page = std::fs::read_to_string(root.join("docs/failures.md"))?;
    let named: Vec<&str> = page
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|word| word.contains("::"))
        .collect();
    ensure!(named.len() > 20, "the page names only {named:?}");
    for name in named {
        let (file, test) = name.rsplit_once("::").context("a file and a test")?;
        let path = root.join(file);
        let text = std::fs::read_to_string(&path).with_context(|| format!("{name}: {}", path.display()))?;
        ensure!(text.contains(&format!("fn {test}(")), "{name}: no such test");
    }
    Ok(())
}
