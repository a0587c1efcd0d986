//! The control path at run time, through `mesh-ctl` and under load: what changes says what changed, pods enter and
//! leave the mesh and the endpoints, and nothing that runs is touched.

mod shop_lab;

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use mesh_tests::{Lab, Packets, until};
use serde_json::Value as Json;
use shop_lab::*;

/// What is searched for on the wire.
const MARKER: &str = "control-marker";

const BAD_LIMIT: &str = "\
apiVersion: nodemesh.io/v1alpha1
kind: RateLimit
metadata: {name: bad, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: cart}]
  limits:
  - {key: {source: identity}, rate: {requests: many, per: 1s}}
";

/// Another cart; its name is its version.
const MORE_CART: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: cart-v3, namespace: shop, labels: {app: cart, version: v3}}
spec:
  nodeName: node-1
  serviceAccountName: cart
  containers:
  - name: cart
    command: [LAB-LOAD, serve, "8080", cart-v3]
    ports: [{name: http, containerPort: 8080}]
    readinessProbe: {httpGet: {path: /healthz, port: http}}
"#;

/// As long as one pod is outside of the mesh, nodes translate Service addresses, as they would in any cluster.
const NEVER_MESHED: &str = "\
apiVersion: v1
kind: Pod
metadata: {name: hermit, namespace: outside, labels: {nodemesh.io/mesh: disabled}}
spec: {nodeName: node-1, containers: [{name: main, command: [sleep, infinity]}]}
";

fn now() -> Result<i64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs().try_into()?)
}

#[test]
fn operators_see_what_changed_and_where_it_stands() -> Result<()> {
    let lab = Lab::up(shop("operator"))?;
    let before = revision(&lab)?;

    let said = apply(&lab, STRICT)?;
    let next = before + 1;
    assert_eq!(
        said,
        format!("MeshPolicy shop/strict created\nrevision {next}\nheld by all 2 connected agents\n")
    );
    let again = apply(&lab, STRICT)?;
    assert!(
        again.starts_with(&format!("MeshPolicy shop/strict unchanged\nrevision {next}\n")),
        "{again}"
    );
    let stranger = get(&lab, STRANGER, &format!("http://{}:8080/", lab.pod_ip("shop/cart-v1")?))?;
    assert!(stranger.exit != 0, "in force when the command returns: {stranger:?}");

    // A document that is wrong takes the good ones with it, and says where it is wrong.
    let file = lab.directory().join("bad.yaml");
    std::fs::write(
        &file,
        [&STRICT.replace("name: strict", "name: other"), "---\n", BAD_LIMIT].concat(),
    )?;
    let path = file.display().to_string();
    let refused = lab.ctl(&["policy", "apply", "-f", &path])?;
    assert_eq!((refused.code(), refused.stdout.as_str()), (1, ""), "{refused}");
    let place = format!("{path}:12: spec.limits[0].rate.requests: ");
    let line = refused.stderr.lines().find(|line| line.contains(&place));
    assert!(line.is_some_and(|line| line.contains(", expected ")), "{refused}");
    assert_eq!(revision(&lab)?, next);

    let dry = lab.ctl_with_input(
        &["policy", "apply", "-f", "-", "--dry-run"],
        &STRICT.replace("name: strict", "name: dry"),
    )?;
    assert!(dry.ok()?.contains("created (dry run)"));
    assert_eq!(revision(&lab)?, next);
    assert_eq!(lab.ctl(&["policy", "get", "meshpolicy/dry", "-n", "shop"])?.code(), 1);
    assert_eq!(lab.ctl(&["policy", "apply"])?.code(), 2);

    all_current(&lab)?;
    for (node, pods, identities) in [
        (
            "node-1",
            vec!["shop/catalog", "shop/front", "shop/visitor"],
            vec!["catalog", "front", "visitor"],
        ),
        (
            "node-2",
            vec!["shop/bank", "shop/cart-v1", "shop/cart-v2", "shop/stock"],
            vec!["bank", "cart", "stock"],
        ),
    ] {
        let shown = agent(&lab, node)?;
        assert_eq!(shown["revision"], next, "{shown:#}");
        let list = |key: &str| shown[key].as_array().cloned().unwrap_or_default();
        let captured = list("pods")
            .into_iter()
            .filter(|pod| pod["captured"] == true && pod["enrolled"] == true);
        let name = |pod: Json| Some(format!("{}/{}", pod["namespace"].as_str()?, pod["name"].as_str()?));
        let mut captured: Vec<String> = captured.filter_map(name).collect();
        captured.sort();
        assert_eq!(captured, pods, "{shown:#}");
        let mut certified = Vec::new();
        for certificate in list("certificates") {
            assert!(certificate["expires"].as_i64() > Some(now()?), "{certificate}");
            let identity = certificate["identity"].as_str().unwrap_or_default();
            certified.push(
                identity
                    .trim_start_matches("spiffe://cluster.local/ns/shop/sa/")
                    .to_string(),
            );
        }
        certified.sort();
        assert_eq!(certified, identities, "{shown:#}");
        assert!(shown["certificateExpires"].as_i64() > Some(now()?), "{shown:#}");
    }
    let table = lab.ctl(&["status"])?.ok()?;
    for (node, count) in [("node-1", "3/3"), ("node-2", "4/4")] {
        let row = table
            .lines()
            .find(|line| line.starts_with(node))
            .context("a row of the node")?;
        assert!(
            row.contains(&format!("{next}/{next}")) && row.contains(count),
            "{table}"
        );
    }

    let said = lab
        .ctl(&["policy", "delete", "meshpolicy/strict", "-n", "shop", "--wait"])?
        .ok()?;
    assert!(
        said.starts_with(&format!("MeshPolicy shop/strict deleted\nrevision {}\n", next + 1)),
        "{said}"
    );
    let stranger = get(&lab, STRANGER, &format!("http://{}:8080/", lab.pod_ip("shop/cart-v1")?))?;
    assert_eq!(stranger.status, 200, "permissive again: {stranger:?}");
    lab.down()
}

#[test]
fn pods_enter_and_leave_the_mesh_while_their_connections_go_on() -> Result<()> {
    let lab = Lab::up(shop("enrol").manifest(NEVER_MESHED))?;
    let bank = lab.pod_ip("shop/bank")?.to_string();
    let url = format!("http://{}:8080/?{MARKER}", lab.pod_ip("shop/cart-v1")?);
    let outside = |label: &str| {
        let labels = format!("{{apiVersion: v1, kind: Namespace, metadata: {{name: outside, labels: {{{label}}}}}}}");
        lab.apply(&labels)
    };
    let in_the_clear = || -> Result<bool> {
        let capture = lab.capture("tcp")?;
        let answer = get(&lab, STRANGER, &url)?;
        ensure!(answer.status == 200, "{answer:?}");
        Ok(Packets::parse(capture.stop()?)?.count(MARKER) > 0)
    };
    let pods_shown = || -> Result<Json> {
        let shown = agent(&lab, "node-1")?;
        let pods = shown["pods"].as_array().into_iter().flatten();
        Ok(pods
            .clone()
            .find(|pod| pod["name"] == "stranger")
            .cloned()
            .unwrap_or(Json::Null))
    };

    let mut direct = Flow::open(&lab, STRANGER, &bank)?;
    assert!(in_the_clear()?);
    outside("nodemesh.io/mesh: enabled")?;
    until("the capture in the status", LIMIT, || {
        let pod = pods_shown()?;
        ensure!(pod["enrolled"] == true && pod["captured"] == true, "{pod:#}");
        Ok(Some(()))
    })?;
    direct.goes_on().context("a connection from before the enrolment")?;
    assert!(!in_the_clear()?, "new connections are captured");
    let mut meshed = Flow::open(&lab, STRANGER, &bank)?;

    outside("nodemesh.io/mesh: disabled")?;
    until("the retirement", LIMIT, || Ok(in_the_clear()?.then_some(())))?;
    until("the retirement in the status", LIMIT, || {
        Ok((pods_shown()?["captured"] != true).then_some(()))
    })?;
    meshed.goes_on().context("a connection from before the retirement")?;

    for (event, count) in [("pod-captured", 4.0), ("pod-retired", 1.0)] {
        assert_eq!(events(&lab, "node-1", event)?, count, "{event}");
    }

    // A destination enters and leaves, too.
    let requests = Load::start(&lab, VISITOR, "connect", "http://catalog/", 30)?;
    outside("nodemesh.io/mesh: enabled")?;
    lab.apply("{apiVersion: v1, kind: Namespace, metadata: {name: shop}}")?;
    until("a mesh without the shop", LIMIT, || {
        let shown = agent(&lab, "node-2")?;
        let pods = shown["pods"].as_array().cloned().unwrap_or_default();
        Ok(pods.iter().all(|pod| pod["captured"] == false).then_some(()))
    })?;
    direct.goes_on()?;
    meshed
        .goes_on()
        .context("a tunnel whose destination has left the mesh")?;
    lab.apply("{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {nodemesh.io/mesh: enabled}}}")?;
    assert!(!in_the_clear()?, "both ends are in the mesh again");
    direct.close()?;
    meshed.close()?;
    requests.finish_served()?;
    lab.down()
}

#[test]
fn pods_come_and_go_under_load_without_a_failed_request() -> Result<()> {
    let lab = Lab::up(shop("rollout"))?;
    let lab_load = lab.state()?.programs.join("lab-load").display().to_string();
    let seen = |pod: &str| -> Result<usize> {
        let name = pod.trim_start_matches("shop/");
        let records = lab.access_log("node-1")?;
        Ok(records
            .iter()
            .filter(|record| record["nodemesh.destination.pod"] == name)
            .count())
    };
    let more_requests = || {
        let wanted = lab.access_log("node-1")?.len() + 30;
        until("thirty more requests", LIMIT, || {
            Ok((lab.access_log("node-1")?.len() >= wanted).then_some(()))
        })
    };
    let kept = Load::start(&lab, VISITOR, "http", "http://cart/", 60)?;
    let short = Load::start(&lab, VISITOR, "connect", "http://cart/", 30)?;
    for pod in ["shop/cart-v1", "shop/cart-v2"] {
        until("requests at both pods", LIMIT, || Ok((seen(pod)? > 5).then_some(())))?;
    }

    lab.apply(&MORE_CART.replace("LAB-LOAD", &lab_load))?;
    until("requests at the new pod", LIMIT, || {
        Ok((seen("shop/cart-v3")? > 5).then_some(()))
    })?;

    for old in ["shop/cart-v1", "shop/cart-v2"] {
        // When this returns, all agents hold it; what is on its way is one request for each of the sources' connections.
        lab.set_ready(&[old], false)?;
        let at_return = seen(old)?;
        more_requests()?;
        let settled = seen(old)?;
        assert!(settled <= at_return + 8, "{old} got {} requests", settled - at_return);
        more_requests()?;
        assert_eq!(seen(old)?, settled, "{old} is not ready and gets no request");
        lab.delete_pod(old)?;
    }
    let kept = kept.finish_served()?;
    let short = short.finish_served()?;
    assert!(kept["servers"]["cart-v3"].as_u64() > Some(0) && short["servers"]["cart-v3"].as_u64() > Some(0));
    assert_eq!(
        kept["connects"], 4,
        "the sources' connections were kept all along: {kept:#}"
    );
    lab.down()
}
