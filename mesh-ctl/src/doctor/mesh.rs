//! What the mesh itself says: the controller, its lead, the agents, what they hold and capture, policies.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use k8s_openapi::api::{
    apps::v1::{DaemonSet, Deployment},
    coordination::v1::Lease,
    core::v1::Pod,
};
use kube::{Api, api::ListParams};
use mesh_api::{document::Kind, wire::operator::StatusResponse};
use serde_json::Value;

use super::{Finding, some};
use crate::{
    connect::Failure,
    install::why_not,
    kubernetes::{
        AGENT, CONTROLLER, Cluster, ROOT_NAMESPACE,
        policy::{conditions, list},
    },
    manifests::VERSION,
};

/// A Lease that was not renewed for this long has no holder; clocks may differ by some of it.
const LEASE_STALE: Duration = Duration::from_secs(30);
/// The root's end is told this long before.
const ROOT_SOON: Duration = Duration::from_secs(30 * 24 * 3600);
/// The most minor versions between an agent and the controller.
const SKEW_MAX: u64 = 1;

pub(super) async fn controller(cluster: &Cluster) -> Finding {
    let check = "controller";
    let deployments: Api<Deployment> = Api::namespaced(cluster.client.clone(), ROOT_NAMESPACE);
    let leases: Api<Lease> = Api::namespaced(cluster.client.clone(), ROOT_NAMESPACE);
    let asked = async {
        let deployment = deployments.get_opt(CONTROLLER).await?;
        let lease = leases.get_opt(CONTROLLER).await?;
        Ok::<_, Failure>((deployment, lease))
    };
    match asked.await {
        Ok((Some(deployment), lease)) => judge_controller(&deployment, lease.as_ref(), SystemTime::now()),
        Ok((None, _)) => Finding::fail(check, "there is none", "mesh-ctl install"),
        Err(failure) => Finding::unknown(check, &failure),
    }
}

fn judge_controller(deployment: &Deployment, lease: Option<&Lease>, now: SystemTime) -> Finding {
    let check = "controller";
    let wanted = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
    let status = deployment.status.clone().unwrap_or_default();
    let running = status.ready_replicas.unwrap_or(0);
    let spec = lease.and_then(|lease| lease.spec.as_ref());
    let holder = spec.and_then(|spec| spec.holder_identity.clone()).unwrap_or_default();
    let renewed = spec
        .and_then(|spec| spec.renew_time.as_ref())
        .map_or(0, |time| time.0.as_second());
    let now = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
    if holder.is_empty() || now.saturating_sub(renewed) > LEASE_STALE.as_secs() as i64 {
        return Finding::fail(check, "none leads", "a Lease nodemesh-controller that is renewed");
    }
    if running < 1 {
        return Finding::fail(check, format!("{holder} leads and is not ready"), "a ready leader");
    }
    if running < 2 {
        let text = format!("{holder} leads, nobody waits ({running} of {wanted} are ready)");
        return Finding::warn(check, text, "2 replicas");
    }
    if running < wanted {
        return Finding::warn(
            check,
            format!("{running} of {wanted} replicas are ready"),
            format!("{wanted}"),
        );
    }
    Finding::ok(check, format!("{holder} leads, {} more", running - 1))
}

pub(super) async fn agents(cluster: &Cluster) -> Finding {
    let check = "agents";
    let sets: Api<DaemonSet> = Api::namespaced(cluster.client.clone(), ROOT_NAMESPACE);
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), ROOT_NAMESPACE);
    let labels = "app.kubernetes.io/name=nodemesh,app.kubernetes.io/component=agent";
    let asked = async {
        let set = sets.get_opt(AGENT).await?;
        let pods = pods.list(&ListParams::default().labels(labels)).await?.items;
        Ok::<_, Failure>((set, pods))
    };
    let (set, pods) = match asked.await {
        Ok((Some(set), pods)) => (set, pods),
        Ok((None, _)) => return Finding::fail(check, "there are none", "mesh-ctl install"),
        Err(failure) => return Finding::unknown(check, &failure),
    };
    let status = set.status.unwrap_or_default();
    let (wanted, ready) = (status.desired_number_scheduled, status.number_ready);
    let alive = pods.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none());
    let not: Vec<String> = alive.filter_map(why_not).collect();
    if wanted == 0 {
        return Finding::fail(check, "no node is to have one", "a node that runs Linux");
    }
    if ready < wanted {
        let text = format!("{ready} of {wanted} nodes: {}", some(&not));
        return Finding::fail(check, text, "a ready agent on every node");
    }
    Finding::ok(check, format!("{ready} of {wanted} nodes"))
}

fn minor(version: &str) -> Option<(u64, u64)> {
    let mut parts = version.split(['.', '-', '+']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Whether two versions may work with each other.
fn close(one: &str, other: &str) -> bool {
    match (minor(one), minor(other)) {
        (Some((a, b)), Some((c, d))) => a == c && b.abs_diff(d) <= SKEW_MAX,
        _ => false,
    }
}

/// All that the controller's status tells.
pub(super) fn status(status: &StatusResponse, now: SystemTime) -> Vec<Finding> {
    vec![
        versions(status),
        revision(status),
        capture(status),
        certificates(status, now),
        unreadable(status),
    ]
}

fn versions(status: &StatusResponse) -> Finding {
    let check = "versions";
    let controller = status.controller_version.as_str();
    let agents: BTreeSet<&str> = status
        .nodes
        .iter()
        .filter(|node| node.connected)
        .map(|node| node.agent_version.as_str())
        .collect();
    let far: Vec<String> = agents
        .iter()
        .filter(|version| !close(version, controller))
        .map(|version| format!("an agent has {version}"))
        .collect();
    let all = format!(
        "controller {controller}, agents {}",
        agents.iter().copied().collect::<Vec<_>>().join(", ")
    );
    if !far.is_empty() {
        return Finding::fail(
            check,
            format!("{all}: {}", some(&far)),
            "one minor version apart at most",
        );
    }
    if !close(VERSION, controller) {
        return Finding::warn(
            check,
            format!("{all}, mesh-ctl {VERSION}"),
            "a mesh-ctl of the controller's version",
        );
    }
    if agents.len() > 1 || agents.iter().any(|version| *version != controller) {
        return Finding::warn(check, all, "one version, once the upgrade is over");
    }
    Finding::ok(check, format!("{controller} everywhere"))
}

fn revision(status: &StatusResponse) -> Finding {
    let check = "revision";
    let newest = status.revision;
    let mut refused = Vec::new();
    let mut behind = Vec::new();
    for node in &status.nodes {
        if node.nacked_revision > node.held_revision {
            refused.push(format!(
                "{} refused {}: {}",
                node.node, node.nacked_revision, node.nack_reason
            ));
        } else if !node.connected {
            behind.push(format!("{} is not connected", node.node));
        } else if node.held_revision < newest {
            behind.push(format!("{} has {}", node.node, node.held_revision));
        }
    }
    if !refused.is_empty() {
        return Finding::fail(check, some(&refused), format!("{newest} everywhere"));
    }
    if !behind.is_empty() {
        return Finding::warn(check, some(&behind), format!("{newest} everywhere, soon"));
    }
    Finding::ok(check, format!("{newest}, held by {} agents", status.nodes.len()))
}

fn capture(status: &StatusResponse) -> Finding {
    let pods: Vec<_> = status
        .nodes
        .iter()
        .filter_map(|node| node.status.as_ref())
        .flat_map(|status| &status.pods)
        .filter(|pod| pod.enrolled)
        .collect();
    let not: Vec<String> = pods
        .iter()
        .filter(|pod| !pod.captured)
        .map(|pod| format!("{}/{}: {}", pod.namespace, pod.name, pod.why))
        .collect();
    match not.is_empty() {
        true => Finding::ok("capture", format!("{} enrolled pods, all captured", pods.len())),
        false => Finding::fail("capture", some(&not), "every enrolled pod is captured"),
    }
}

fn certificates(status: &StatusResponse, now: SystemTime) -> Finding {
    let check = "certificates";
    let now = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
    let days = |unix: i64| (unix - now) / (24 * 3600);
    let mut wrong = Vec::new();
    for (what, end) in [
        ("the root", status.ca_expires_unix),
        ("the controller's certificate", status.serving_expires_unix),
    ] {
        if end != 0 && end <= now {
            wrong.push(format!("{what} has ended"));
        }
    }
    for node in &status.nodes {
        if node.certificate_expires_unix != 0 && node.certificate_expires_unix <= now {
            wrong.push(format!("the agent's on {} has ended", node.node));
        }
        let own = node.status.iter().flat_map(|status| &status.certificates);
        let problems = own.filter(|certificate| !certificate.problem.is_empty());
        wrong.extend(
            problems.map(|certificate| format!("{} on {}: {}", certificate.identity, node.node, certificate.problem)),
        );
    }
    if !wrong.is_empty() {
        return Finding::fail(check, some(&wrong), "certificates that are renewed in time");
    }
    let end = status.ca_expires_unix;
    if end != 0 && end - now < ROOT_SOON.as_secs() as i64 {
        let text = format!("the root ends in {} days", days(end));
        return Finding::warn(check, text, "a new one in the Secret nodemesh-ca");
    }
    Finding::ok(check, format!("the root is good for {} days", days(end)))
}

fn unreadable(status: &StatusResponse) -> Finding {
    let names: Vec<String> = status
        .unreadable
        .iter()
        .map(|document| {
            let key = document.key.clone().unwrap_or_default();
            format!("{} {}/{}: {}", key.kind, key.namespace, key.name, document.unreadable)
        })
        .collect();
    match names.is_empty() {
        true => Finding::ok("documents", format!("{}, all readable", status.documents)),
        false => Finding::fail("documents", some(&names), "documents that the controller can read"),
    }
}

/// What the controller said of each policy and route.
pub(super) async fn policies(cluster: &Cluster) -> Finding {
    let mut objects = Vec::new();
    for kind in Kind::ALL.into_iter().filter(|kind| kind.is_policy()) {
        match list(cluster, kind, None).await {
            Ok(found) => objects.extend(found.unwrap_or_default().1.into_iter().map(|object| (kind, object))),
            Err(failure) => return Finding::unknown("policies", &failure),
        }
    }
    let values = objects
        .into_iter()
        .filter_map(|(kind, object)| Some((kind, serde_json::to_value(object).ok()?)));
    judge_policies(&values.collect::<Vec<_>>())
}

fn judge_policies(objects: &[(Kind, Value)]) -> Finding {
    let check = "policies";
    let mut refused = Vec::new();
    let mut open = Vec::new();
    for (kind, object) in objects {
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let name = format!("{kind} {}/{}", text("/metadata/namespace"), text("/metadata/name"));
        for condition in conditions(object).into_iter().filter(|c| c["status"] != "True") {
            let why = format!("{name}: {}", condition["message"].as_str().unwrap_or_default());
            match condition["type"].as_str() {
                Some("Accepted") => refused.push(why),
                Some("ResolvedRefs") => open.push(why),
                _ => {}
            }
        }
    }
    if !refused.is_empty() {
        return Finding::fail(check, some(&refused), "policies that are accepted");
    }
    if !open.is_empty() {
        return Finding::warn(check, some(&open), "references to what exists");
    }
    Finding::ok(check, format!("{}, none refused", objects.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;
    use mesh_api::wire::{
        control::{AgentStatus, PodStatus},
        operator::NodeStatus,
    };
    use serde_json::json;

    fn node(name: &str, held: u64) -> NodeStatus {
        NodeStatus {
            node: name.into(),
            connected: true,
            agent_version: VERSION.into(),
            held_revision: held,
            ..Default::default()
        }
    }

    fn well() -> StatusResponse {
        StatusResponse {
            controller_version: VERSION.into(),
            revision: 5,
            ca_expires_unix: 10_000_000,
            nodes: vec![node("a", 5), node("b", 5)],
            ..Default::default()
        }
    }

    #[test]
    fn each_thing_that_is_wrong_is_found_by_its_check() {
        let at = |seconds: u64| UNIX_EPOCH + Duration::from_secs(seconds);
        let worst = |response: &StatusResponse, now| -> Vec<(&'static str, Level)> {
            let all = status(response, now)
                .into_iter()
                .filter(|finding| finding.level != Level::Ok);
            all.map(|finding| (finding.check, finding.level)).collect()
        };
        assert_eq!(worst(&well(), at(1)), []);
        let mut behind = well();
        behind.nodes[1].held_revision = 4;
        assert_eq!(worst(&behind, at(1)), [("revision", Level::Warn)]);
        let mut nacked = well();
        nacked.nodes[0] = NodeStatus {
            held_revision: 4,
            nacked_revision: 5,
            nack_reason: "x".into(),
            ..node("a", 4)
        };
        assert_eq!(worst(&nacked, at(1)), [("revision", Level::Fail)]);
        let mut old = well();
        old.nodes[0].agent_version = "0.9.0".into();
        assert_eq!(worst(&old, at(1)), [("versions", Level::Fail)]);
        let mut uncaptured = well();
        let pod = PodStatus {
            namespace: "shop".into(),
            name: "cart".into(),
            enrolled: true,
            why: "host network".into(),
            ..Default::default()
        };
        uncaptured.nodes[0].status = Some(AgentStatus {
            pods: vec![pod],
            ..Default::default()
        });
        assert_eq!(worst(&uncaptured, at(1)), [("capture", Level::Fail)]);
        assert_eq!(worst(&well(), at(9_000_000)), [("certificates", Level::Warn)]);
        assert_eq!(worst(&well(), at(10_000_001)), [("certificates", Level::Fail)]);
    }

    #[test]
    fn a_controller_needs_a_fresh_lease_and_a_second_one() {
        let deployment = |replicas: i32, ready: i32| -> Deployment {
            let value = json!({
                "spec": {"replicas": 2, "selector": {}, "template": {}}, "status": {"replicas": replicas, "readyReplicas": ready},
            });
            serde_json::from_value(value).unwrap()
        };
        let lease: Lease = serde_json::from_value(
            json!({"spec": {"holderIdentity": "c-1", "renewTime": "2026-01-01T00:00:00.000000Z"}}),
        )
        .unwrap();
        let at = |seconds: u64| UNIX_EPOCH + Duration::from_secs(1_767_225_600 + seconds);
        let level = |replicas, ready, lease, now| judge_controller(&deployment(replicas, ready), lease, now).level;
        assert_eq!(level(2, 2, Some(&lease), at(1)), Level::Ok);
        assert_eq!(level(2, 2, Some(&lease), at(60)), Level::Fail);
        assert_eq!(level(2, 2, None, at(1)), Level::Fail);
        assert_eq!(level(2, 0, Some(&lease), at(1)), Level::Fail);
        assert_eq!(level(1, 1, Some(&lease), at(1)), Level::Warn);
    }

    #[test]
    fn refused_policies_and_open_references_are_found() {
        let policy = |kind: &str, status: &str| {
            let value = json!({
                "metadata": {"namespace": "shop", "name": "p"},
                "status": {"conditions": [{"type": kind, "status": status, "message": "why"}]},
            });
            (Kind::AccessPolicy, value)
        };
        assert_eq!(judge_policies(&[policy("Accepted", "True")]).level, Level::Ok);
        assert_eq!(judge_policies(&[policy("Accepted", "False")]).level, Level::Fail);
        assert_eq!(judge_policies(&[policy("ResolvedRefs", "False")]).level, Level::Warn);
        assert!(close("1.2.3", "1.3.0") && !close("1.2.0", "1.4.0") && !close("1.0.0", "2.0.0"));
    }
}
