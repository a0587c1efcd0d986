//! What the cluster brings: its version, our rights, the definitions of kinds, the nodes' kernels, other meshes.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec},
        core::v1::{Namespace, Node, Pod},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api,
    api::{ListParams, PostParams},
};

use super::{Finding, some};
use crate::{
    connect::Failure,
    kubernetes::{Cluster, ROOT_NAMESPACE},
    manifests::{self, SCHEMA_ANNOTATION, Settings},
};

/// The minor versions of Kubernetes 1 that are tested.
const KUBERNETES_MINOR: std::ops::RangeInclusive<u32> = 29..=36;
/// The oldest kernel on which everything works.
const KERNEL_MIN: (u32, u32) = (6, 1);
/// The most objects of one answer.
const PAGE: u32 = 500;
const ENROLMENT: &str = "nodemesh.io/mesh";

/// `6.1` of `6.1.0-18-amd64`, `1.35` of `v1.35.4`.
fn two_numbers(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.trim_start_matches('v').split(['.', '-', '+']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

pub(super) async fn api_server(cluster: &Cluster) -> Result<Finding, Failure> {
    let version = cluster.client.apiserver_version().await?;
    Ok(judge_version(&version.git_version))
}

fn judge_version(version: &str) -> Finding {
    let check = "api-server";
    let (oldest, newest) = (KUBERNETES_MINOR.start(), KUBERNETES_MINOR.end());
    match two_numbers(version) {
        Some((1, minor)) if KUBERNETES_MINOR.contains(&minor) => Finding::ok(check, version),
        Some((1, minor)) if minor > *newest => {
            Finding::warn(check, version, format!("1.{newest} is the newest tested"))
        }
        _ => Finding::fail(check, version, format!("1.{oldest} to 1.{newest}")),
    }
}

/// What this command asks for: group, resource, subresource, verb, namespace.
const ASKED: [(&str, &str, &str, &str, &str); 8] = [
    ("", "nodes", "", "list", ""),
    ("", "namespaces", "", "list", ""),
    ("", "pods", "", "list", ""),
    ("", "pods", "portforward", "create", ROOT_NAMESPACE),
    ("apps", "daemonsets", "", "get", ROOT_NAMESPACE),
    ("coordination.k8s.io", "leases", "", "get", ROOT_NAMESPACE),
    ("apiextensions.k8s.io", "customresourcedefinitions", "", "list", ""),
    ("nodemesh.io", "accesspolicies", "", "list", ""),
];

pub(super) async fn permissions(cluster: &Cluster) -> Finding {
    let reviews: Api<SelfSubjectAccessReview> = Api::all(cluster.client.clone());
    let mut refused = Vec::new();
    for (group, resource, subresource, verb, namespace) in ASKED {
        let word = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(ResourceAttributes {
                    group: word(group),
                    resource: word(resource),
                    subresource: word(subresource),
                    verb: word(verb),
                    namespace: word(namespace),
                    ..Default::default()
                }),
                non_resource_attributes: None,
            },
            ..Default::default()
        };
        match reviews.create(&PostParams::default(), &review).await {
            Ok(answer) if answer.status.as_ref().is_some_and(|status| status.allowed) => {}
            Ok(_) => refused.push(format!(
                "{verb} {}",
                [resource, subresource].join("/").trim_end_matches('/')
            )),
            Err(error) => return Finding::unknown("permissions", &error.into()),
        }
    }
    if refused.is_empty() {
        return Finding::ok("permissions", "enough for every check");
    }
    let text = format!("you may not: {}", some(&refused));
    Finding::warn("permissions", text, "a cluster administrator's rights")
}

pub(super) async fn definitions(cluster: &Cluster) -> Finding {
    let check = "definitions";
    let api: Api<CustomResourceDefinition> = Api::all(cluster.client.clone());
    let wanted = match manifests::manifests(&Settings::new()) {
        Ok(parts) => parts.definitions,
        Err(failure) => return Finding::unknown(check, &failure),
    };
    let mut wrong = Vec::new();
    for object in &wanted {
        let hash = object
            .value
            .pointer("/metadata/annotations")
            .map(|all| all[SCHEMA_ANNOTATION].clone());
        match api.get_opt(object.name()).await {
            Err(error) => return Finding::unknown(check, &error.into()),
            Ok(None) => wrong.push(format!("{} is missing", object.name())),
            Ok(Some(found)) => {
                let has = found.metadata.annotations.unwrap_or_default().remove(SCHEMA_ANNOTATION);
                if has.as_deref() != hash.as_ref().and_then(|hash| hash.as_str()) {
                    wrong.push(format!("{} is of another version", object.name()));
                }
            }
        }
    }
    match wrong.is_empty() {
        true => Finding::ok(check, format!("{} kinds of {}", wanted.len(), manifests::VERSION)),
        false => Finding::fail(check, some(&wrong), "those of this version: mesh-ctl upgrade"),
    }
}

/// The kinds of the Gateway API that the mesh reads, and whether it can do without.
const GATEWAY_KINDS: [(&str, bool); 5] = [
    ("httproutes", true),
    ("grpcroutes", true),
    ("referencegrants", true),
    ("tcproutes", false),
    ("tlsroutes", false),
];

pub(super) async fn gateway_api(cluster: &Cluster) -> Finding {
    let api: Api<CustomResourceDefinition> = Api::all(cluster.client.clone());
    let mut found = BTreeMap::new();
    for (kind, _) in GATEWAY_KINDS {
        match api.get_opt(&format!("{kind}.gateway.networking.k8s.io")).await {
            Err(error) => return Finding::unknown("gateway-api", &error.into()),
            Ok(None) => {}
            Ok(Some(definition)) => {
                let annotations = definition.metadata.annotations.unwrap_or_default();
                let word = |name: &str| annotations.get(&format!("gateway.networking.k8s.io/{name}")).cloned();
                let version = word("bundle-version").unwrap_or_else(|| "an unknown version".to_owned());
                let channel = word("channel").unwrap_or_else(|| "unknown".to_owned());
                found.insert(kind, (version, channel));
            }
        }
    }
    judge_gateway(&found)
}

fn judge_gateway(found: &BTreeMap<&str, (String, String)>) -> Finding {
    let check = "gateway-api";
    let missing = |needed: bool| -> Vec<String> {
        let kinds = GATEWAY_KINDS
            .iter()
            .filter(|(kind, need)| *need == needed && !found.contains_key(kind));
        kinds.map(|(kind, _)| (*kind).to_owned()).collect()
    };
    let Some((version, channel)) = found.get("httproutes") else {
        let expected = "kubectl apply of the Gateway API's standard channel, v1.1 or later, to use routes";
        return Finding::warn(check, "not installed: no routes", expected);
    };
    let needed = missing(true);
    if !needed.is_empty() {
        return Finding::warn(
            check,
            format!("{version} without {}", needed.join(", ")),
            "the whole standard channel",
        );
    }
    let mixed = found.values().any(|(other, _)| other != version);
    if mixed {
        return Finding::warn(check, "kinds of several versions", format!("all of {version}"));
    }
    if two_numbers(version).is_none_or(|version| version < (1, 1)) {
        return Finding::warn(check, version, "v1.1 or later");
    }
    let without = missing(false);
    let note = match without.is_empty() {
        true => String::new(),
        false => format!(", without {} (experimental)", without.join(", ")),
    };
    Finding::ok(check, format!("{version}, {channel} channel{note}"))
}

pub(super) async fn kernels(cluster: &Cluster) -> Finding {
    let api: Api<Node> = Api::all(cluster.client.clone());
    let nodes = match api.list(&ListParams::default().limit(PAGE)).await {
        Ok(nodes) => nodes.items,
        Err(error) => return Finding::unknown("kernels", &error.into()),
    };
    let linux = nodes.iter().filter_map(|node| {
        let info = node.status.as_ref()?.node_info.as_ref()?;
        let name = node.metadata.name.clone()?;
        (info.operating_system == "linux").then(|| (name, info.kernel_version.clone()))
    });
    judge_kernels(&linux.collect::<Vec<_>>())
}

fn judge_kernels(nodes: &[(String, String)]) -> Finding {
    let old: Vec<String> = nodes
        .iter()
        .filter(|(_, version)| two_numbers(version).is_none_or(|version| version < KERNEL_MIN))
        .map(|(name, version)| format!("{name} has {version}"))
        .collect();
    let (major, minor) = KERNEL_MIN;
    match old.is_empty() {
        true => Finding::ok(
            "kernels",
            format!("{} nodes, all {major}.{minor} or later", nodes.len()),
        ),
        false => Finding::fail("kernels", some(&old), format!("{major}.{minor} or later")),
    }
}

/// A pod is in the mesh when its own label says so, else when its namespace's does.
fn enrolled(pod: &Pod, namespaces: &BTreeMap<String, bool>) -> bool {
    let own = pod.metadata.labels.as_ref().and_then(|labels| labels.get(ENROLMENT));
    match own.map(String::as_str) {
        Some("enabled") => true,
        Some(_) => false,
        None => pod
            .metadata
            .namespace
            .as_ref()
            .and_then(|ns| namespaces.get(ns))
            .copied()
            .unwrap_or(false),
    }
}

async fn all_pods(cluster: &Cluster) -> Result<Vec<Pod>, Failure> {
    let api: Api<Pod> = Api::all(cluster.client.clone());
    let mut params = ListParams::default().limit(PAGE);
    let mut pods = Vec::new();
    loop {
        let page = api.list(&params).await?;
        pods.extend(page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(pods),
        }
    }
}

async fn all_namespaces(cluster: &Cluster) -> Result<Vec<Namespace>, Failure> {
    let api: Api<Namespace> = Api::all(cluster.client.clone());
    Ok(api.list(&ListParams::default()).await?.items)
}

fn enrolments(namespaces: &[Namespace]) -> BTreeMap<String, bool> {
    let one = |namespace: &Namespace| {
        let label = namespace
            .metadata
            .labels
            .as_ref()
            .and_then(|labels| labels.get(ENROLMENT));
        (
            namespace.metadata.name.clone().unwrap_or_default(),
            label.is_some_and(|value| value == "enabled"),
        )
    };
    namespaces.iter().map(one).collect()
}

fn pod_name(pod: &Pod) -> String {
    let meta = &pod.metadata;
    format!(
        "{}/{}",
        meta.namespace.as_deref().unwrap_or_default(),
        meta.name.as_deref().unwrap_or_default()
    )
}

pub(super) async fn host_network(cluster: &Cluster) -> Finding {
    let check = "host-network";
    let asked = async { Ok::<_, Failure>((all_namespaces(cluster).await?, all_pods(cluster).await?)) };
    let (namespaces, pods) = match asked.await {
        Ok(found) => found,
        Err(failure) => return Finding::unknown(check, &failure),
    };
    let namespaces = enrolments(&namespaces);
    let outside: Vec<String> = pods
        .iter()
        .filter(|pod| enrolled(pod, &namespaces))
        .filter(|pod| pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false))
        .map(pod_name)
        .collect();
    match outside.is_empty() {
        true => Finding::ok(check, "no enrolled pod has its node's network"),
        false => Finding::warn(
            check,
            format!(
                "in the mesh as sources only, with their nodes' network: {}",
                some(&outside)
            ),
            "pods with a network of their own, or the label nodemesh.io/mesh: disabled",
        ),
    }
}

/// What another mesh has put onto a pod or namespace, if it takes part in one.
fn foreign(
    labels: Option<&BTreeMap<String, String>>,
    annotations: Option<&BTreeMap<String, String>>,
) -> Option<&'static str> {
    let is = |map: Option<&BTreeMap<String, String>>, key: &str, values: &[&str]| {
        map.and_then(|map| map.get(key))
            .is_some_and(|value| values.contains(&value.as_str()))
    };
    let istio = is(labels, "istio-injection", &["enabled"])
        || is(labels, "istio.io/dataplane-mode", &["ambient"])
        || is(labels, "sidecar.istio.io/inject", &["true"])
        || labels.is_some_and(|labels| labels.contains_key("istio.io/rev"));
    let linkerd = is(annotations, "linkerd.io/inject", &["enabled", "ingress"]);
    match (istio, linkerd) {
        (true, _) => Some("Istio"),
        (_, true) => Some("Linkerd"),
        _ => None,
    }
}

pub(super) async fn other_meshes(cluster: &Cluster) -> Finding {
    let check = "other-meshes";
    let asked = async { Ok::<_, Failure>((all_namespaces(cluster).await?, all_pods(cluster).await?)) };
    match asked.await {
        Ok((namespaces, pods)) => judge_meshes(&namespaces, &pods),
        Err(failure) => Finding::unknown(check, &failure),
    }
}

fn judge_meshes(namespaces: &[Namespace], pods: &[Pod]) -> Finding {
    let check = "other-meshes";
    let ours = enrolments(namespaces);
    let mut both = Vec::new();
    let mut seen = Vec::new();
    for namespace in namespaces {
        let meta = &namespace.metadata;
        let name = meta.name.clone().unwrap_or_default();
        if let Some(mesh) = foreign(meta.labels.as_ref(), meta.annotations.as_ref()) {
            seen.push(mesh);
            if ours.get(&name).copied().unwrap_or(false) {
                both.push(format!("namespace {name} is in {mesh} too"));
            }
        }
    }
    for pod in pods {
        let containers = pod
            .spec
            .iter()
            .flat_map(|spec| spec.containers.iter().chain(spec.init_containers.iter().flatten()));
        let proxy = containers
            .map(|container| container.name.as_str())
            .find_map(|name| match name {
                "istio-proxy" => Some("Istio"),
                "linkerd-proxy" => Some("Linkerd"),
                _ => None,
            });
        if let Some(mesh) = proxy {
            seen.push(mesh);
            if enrolled(pod, &ours) {
                both.push(format!("{} has a proxy of {mesh}", pod_name(pod)));
            }
        }
    }
    seen.sort_unstable();
    seen.dedup();
    match (both.is_empty(), seen.is_empty()) {
        (true, true) => Finding::ok(check, "none"),
        (true, false) => Finding::ok(check, format!("{} elsewhere in the cluster", seen.join(" and "))),
        (false, _) => Finding::fail(check, some(&both), "one mesh for each pod"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;
    use serde_json::json;

    #[test]
    fn versions_are_judged() {
        let level = |version: &str| judge_version(version).level;
        assert_eq!(level("v1.35.4"), Level::Ok);
        assert_eq!(level("v1.30.2-eks-1"), Level::Ok);
        assert_eq!(level("v1.99.0"), Level::Warn);
        assert_eq!(level("v1.20.0"), Level::Fail);
        assert_eq!(level("?"), Level::Fail);
        let kernel = |version: &str| judge_kernels(&[("n".into(), version.into())]).level;
        assert_eq!(kernel("6.1.0-18-amd64"), Level::Ok);
        assert_eq!(kernel("6.12"), Level::Ok);
        assert_eq!(kernel("5.15.0-1"), Level::Fail);
        assert_eq!(kernel(""), Level::Fail);
    }

    #[test]
    fn the_gateway_api_is_optional_but_whole() {
        let kinds = |names: &[&'static str], version: &str| {
            let one = |name: &&'static str| (*name, (version.to_owned(), "standard".to_owned()));
            names.iter().map(one).collect::<BTreeMap<_, _>>()
        };
        let whole = ["httproutes", "grpcroutes", "referencegrants"];
        assert_eq!(judge_gateway(&kinds(&whole, "v1.4.0")).level, Level::Ok);
        assert_eq!(judge_gateway(&kinds(&whole, "v1.0.0")).level, Level::Warn);
        assert_eq!(judge_gateway(&kinds(&["httproutes"], "v1.4.0")).level, Level::Warn);
        assert_eq!(judge_gateway(&BTreeMap::new()).level, Level::Warn);
        let mut mixed = kinds(&whole, "v1.4.0");
        mixed.insert("grpcroutes", ("v1.3.0".into(), "standard".into()));
        assert_eq!(judge_gateway(&mixed).level, Level::Warn);
    }

    fn namespace(value: serde_json::Value) -> Namespace {
        serde_json::from_value(json!({"metadata": value})).unwrap()
    }

    #[test]
    fn two_meshes_on_one_pod_are_found() {
        let pod = |namespace: &str, container: &str| -> Pod {
            let value = json!({
                "metadata": {"namespace": namespace, "name": "p"}, "spec": {"containers": [{"name": container}]},
            });
            serde_json::from_value(value).unwrap()
        };
        let shop = namespace(json!({"name": "shop", "labels": {"nodemesh.io/mesh": "enabled"}}));
        let old = namespace(json!({"name": "old", "labels": {"istio-injection": "enabled"}}));
        let both = namespace(json!({
            "name": "both", "labels": {"nodemesh.io/mesh": "enabled"}, "annotations": {"linkerd.io/inject": "enabled"},
        }));
        let level = |namespaces: &[Namespace], pods: &[Pod]| judge_meshes(namespaces, pods).level;
        assert_eq!(
            level(
                &[shop.clone(), old.clone()],
                &[pod("old", "istio-proxy"), pod("shop", "app")]
            ),
            Level::Ok
        );
        assert_eq!(
            level(std::slice::from_ref(&shop), &[pod("shop", "istio-proxy")]),
            Level::Fail
        );
        assert_eq!(level(&[both], &[]), Level::Fail);
        let findings = judge_meshes(&[shop, old], &[]);
        assert_eq!(findings.text, "Istio elsewhere in the cluster");
    }

    #[test]
    fn a_pods_own_label_wins() {
        let namespaces = enrolments(&[namespace(
            json!({"name": "a", "labels": {"nodemesh.io/mesh": "enabled"}}),
        )]);
        let pod = |label: Option<&str>| -> Pod {
            let labels = label
                .map(|value| json!({"nodemesh.io/mesh": value}))
                .unwrap_or(json!({}));
            serde_json::from_value(json!({"metadata": {"namespace": "a", "labels": labels}})).unwrap()
        };
        assert!(enrolled(&pod(None), &namespaces));
        assert!(!enrolled(&pod(Some("disabled")), &namespaces));
        assert!(enrolled(&pod(Some("enabled")), &BTreeMap::new()));
    }
}
