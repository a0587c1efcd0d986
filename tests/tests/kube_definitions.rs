//! The definitions of the mesh's kinds on a real API server: it takes every document that the project shows, and what
//! is wrong is refused by it or by `mesh-ctl`, never dropped.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use mesh_tests::{
    cluster::{Cluster, Scope},
    mesh::find_programs,
    process::{self, Output},
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The YAML blocks of the policies' documentation and the demo's policies: source and text.
fn shown() -> Result<Vec<(String, String)>> {
    let mut all = Vec::new();
    for folder in ["docs/policies", "tests/fixtures/demo"] {
        let folder = root().join(folder);
        let listing = fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?;
        let mut files = listing.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        files.sort();
        for file in files {
            let text = fs::read_to_string(&file)?;
            let name = file.display().to_string();
            if name.ends_with(".yaml") {
                all.push((name, text));
                continue;
            }
            let blocks = text
                .split("```yaml\n")
                .skip(1)
                .filter_map(|rest| rest.split("```").next());
            let documents = blocks.filter(|block| block.contains("apiVersion:") && block.contains("spec:"));
            all.extend(documents.map(|block| (name.clone(), block.to_owned())));
        }
    }
    Ok(all)
}

/// Has the API server check documents as strictly as kubectl asks it to, and keep nothing.
fn server_says(cluster: &Cluster, yaml: &str) -> Result<Output> {
    let arguments = [
        "apply",
        "--dry-run=server",
        "--validate=strict",
        "--server-side",
        "--force-conflicts",
        "-f",
        "-",
    ];
    process::with_input(cluster.kubectl_command(&arguments), yaml)
}

#[test]
fn the_api_server_takes_every_document_that_is_shown() -> Result<()> {
    let cluster = Cluster::shared()?;
    // Those of the documents: the API server checks nothing for a namespace that is not there.
    let scopes = ["shop", "web", "batch", "bank"].map(|name| Scope::new(&cluster, name, ""));
    let _scopes = scopes.into_iter().collect::<Result<Vec<_>>>()?;
    let shown = shown()?;
    ensure!(shown.len() > 10, "only {} documents were found", shown.len());
    let served = |kind: &str, version: &str| {
        let path = format!("/apis/gateway.networking.k8s.io/{version}");
        let listed = cluster.try_kubectl(&["get", "--raw", &path]);
        listed.is_ok_and(|output| output.stdout.contains(&format!("\"kind\":\"{kind}\"")))
    };
    let mut wrong = Vec::new();
    for (source, yaml) in &shown {
        // Kinds of the Gateway API are in the versions and with the fields of the cluster's channel; the mesh reads more.
        let route = yaml
            .lines()
            .find_map(|line| line.strip_prefix("apiVersion: gateway.networking.k8s.io/"));
        let kind = yaml
            .lines()
            .find_map(|line| line.strip_prefix("kind: "))
            .unwrap_or_default();
        if route.is_some_and(|version| !served(kind, version)) {
            continue;
        }
        let output = server_says(&cluster, yaml)?;
        let experimental = route.is_some() && output.stderr.contains("field not declared in schema");
        if output.code() != 0 && !experimental {
            wrong.push(format!("{source}: {output}\n{yaml}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// A kind, the spec, and whether the API server itself refuses it (else `mesh-ctl` does).
const WRONG: &[(&str, &str, bool)] = &[
    ("MeshPolicy", "{targetRefs: [], mtls: {mode: strict}}", true),
    ("MeshPolicy", "{targetRefs: [{kind: Mesh}], mtls: {}}", true),
    ("MeshPolicy", "{targetRefs: [{kind: Mesh}], mtls: {mode: stric}}", true),
    (
        "MeshPolicy",
        "{targetRefs: [{kind: Mesh}], mtls: {ports: {\"70000\": strict}}}",
        true,
    ),
    (
        "MeshPolicy",
        "{targetRefs: [{kind: Service}], mtls: {mode: strict}}",
        true,
    ),
    (
        "MeshPolicy",
        "{targetRefs: [{kind: Pod, name: x}], mtls: {mode: strict}}",
        true,
    ),
    (
        "MeshPolicy",
        "{targetRefs: [{kind: Mesh}], mtls: {mode: strict}, nonsense: 1}",
        false,
    ),
    (
        "AccessPolicy",
        "{targetRefs: [{kind: Service, name: a}], action: Deny}",
        true,
    ),
    (
        "AccessPolicy",
        "{targetRefs: [{kind: Service, name: a}], action: allow}",
        true,
    ),
    (
        "AccessPolicy",
        "{targetRefs: [{kind: Service, name: a}], action: Allow, rules: [{from: []}]}",
        true,
    ),
    (
        "AccessPolicy",
        "{targetRefs: [{kind: Service, name: a}], action: Allow, rules: [{from: [{}]}]}",
        true,
    ),
    (
        "AccessPolicy",
        "{targetRefs: [{kind: Service, name: a}], action: Allow, rules: [{form: [{namespaces: [a]}]}]}",
        false,
    ),
    (
        "AccessPolicy",
        "{targetRefs: [{kind: Service, name: a}], action: Allow, rules: [{from: [{cidrs: [10.0.0.1/8]}]}]}",
        false,
    ),
    (
        "AccessPolicy",
        "{targetRefs: [{kind: Service, name: a}], action: Allow, rules: [{to: [{paths: [{value: api}]}]}]}",
        true,
    ),
    ("AccessPolicy", "{targetRefs: [{kind: Mesh}], action: Allow}", false),
    (
        "RateLimit",
        "{targetRefs: [{kind: Service, name: a}], limits: []}",
        true,
    ),
    (
        "RateLimit",
        "{targetRefs: [{kind: Service, name: a}], limits: [{rate: {requests: 0, per: 1s}}]}",
        true,
    ),
    (
        "RateLimit",
        "{targetRefs: [{kind: Service, name: a}], limits: [{rate: {requests: 1, per: 0s}}]}",
        true,
    ),
    (
        "RateLimit",
        "{targetRefs: [{kind: Service, name: a}], limits: [{rate: {requests: 1, per: 1s}, key: [{source: identity, header: x}]}]}",
        true,
    ),
    ("TrafficPolicy", "{targetRefs: [{kind: Service, name: a}]}", true),
    (
        "TrafficPolicy",
        "{targetRefs: [{kind: Service, name: a}], timeouts: {}}",
        true,
    ),
    (
        "TrafficPolicy",
        "{targetRefs: [{kind: Service, name: a}], timeouts: {request: 1 s}}",
        true,
    ),
    (
        "TrafficPolicy",
        "{targetRefs: [{kind: Service, name: a}], retry: {attempts: 11, retryOn: [reset]}}",
        true,
    ),
    (
        "TrafficPolicy",
        "{targetRefs: [{kind: Service, name: a}], retry: {attempts: 1, retryOn: [\"200\"]}}",
        true,
    ),
    (
        "TrafficPolicy",
        "{targetRefs: [{kind: Service, name: a}], retry: {attempts: 1, on: [reset]}}",
        true,
    ),
    (
        "TrafficPolicy",
        "{targetRefs: [{kind: Pod, selector: {matchLabels: {a: b}}}], timeouts: {request: 1s}}",
        true,
    ),
    ("ServiceSubset", "{service: cart, labels: {}}", true),
    ("ServiceSubset", "{labels: {a: b}}", true),
];

#[test]
fn what_is_wrong_is_refused_by_the_api_server_or_before_it() -> Result<()> {
    let cluster = Cluster::shared()?;
    let scope = Scope::new(&cluster, "kube-wrong", "")?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("wrong.yaml");
    let mut taken = Vec::new();
    for (kind, spec, by_server) in WRONG {
        let yaml = format!(
            "apiVersion: nodemesh.io/v1alpha1\nkind: {kind}\nmetadata: {{name: wrong, namespace: {}}}\nspec: {spec}\n",
            scope.namespace()
        );
        let server = server_says(&cluster, &yaml)?.code() != 0;
        if server != *by_server {
            taken.push(format!("{kind} {spec}: the API server refuses it: {server}"));
        }
        // `on` is a boolean to kubectl alone.
        if !spec.contains(" on: ") {
            fs::write(&file, &yaml)?;
            let mut command = cluster.command(find_programs()?.join("mesh-ctl"));
            command.args(["policy", "apply", "-f"]).arg(&file);
            let output = process::with_input(command, "")?;
            if output.code() != 1 {
                taken.push(format!("{kind} {spec}: mesh-ctl: {output}"));
            }
        }
    }
    ensure!(taken.is_empty(), "{}", taken.join("\n"));
    Ok(())
}
