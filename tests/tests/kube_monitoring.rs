//! The manifests for the Prometheus Operator, before an API server that has its definitions, and the alerts in them as
//! Prometheus itself judges them: over names that the agents and the controller really tell.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context, Result, ensure};
use mesh_tests::{
    cluster::{Cluster, SYSTEM},
    mesh::find_programs,
    process,
};
use serde_json::Value;

const RULES: &str = include_str!("../../deploy/daemonset/monitoring/rules.yaml");

/// The operator's definitions. They go with this value.
struct Definitions<'a>(&'a Cluster);

impl<'a> Definitions<'a> {
    const NAMES: [&'static str; 2] = [
        "servicemonitors.monitoring.coreos.com",
        "prometheusrules.monitoring.coreos.com",
    ];

    fn installed(cluster: &'a Cluster) -> Result<Definitions<'a>> {
        let definitions = Definitions(cluster);
        let folder = cluster.cache().join("prometheus-operator");
        let files = folder.to_str().context("the path of the cache")?;
        cluster.kubectl(&["apply", "--server-side", "-f", files])?;
        // kubectl itself will not wait for a condition of an object that has no status yet.
        for name in Definitions::NAMES {
            cluster.until(&format!("{name} to be served"), || {
                let definition = cluster.get("", "crd", name)?;
                let conditions = definition["status"]["conditions"]
                    .as_array()
                    .cloned()
                    .unwrap_or_default();
                let good = |each: &Value| each["type"] == "Established" && each["status"] == "True";
                Ok(conditions.iter().any(good).then_some(()))
            })?;
        }
        Ok(definitions)
    }
}

impl Drop for Definitions<'_> {
    fn drop(&mut self) {
        let words = [&["delete", "crds", "--ignore-not-found"][..], &Definitions::NAMES].concat();
        if let Err(error) = self.0.kubectl(&words) {
            eprintln!("the operator's definitions stay: {error:#}");
        }
    }
}

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

#[test]
fn the_api_server_takes_monitors_and_rules() -> Result<()> {
    let cluster = Cluster::shared()?;
    let _definitions = Definitions::installed(&cluster)?;
    // As the component's own comment has it.
    let folder = tempfile::tempdir_in(root().join("deploy"))?;
    let kustomization = "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n\
                         resources: [../daemonset/base]\ncomponents: [../daemonset/monitoring]\n";
    fs::write(folder.path().join("kustomization.yaml"), kustomization)?;
    let folder = folder.path().to_str().context("a path")?;
    let server = [
        "apply",
        "--dry-run=server",
        "--validate=strict",
        "--server-side",
        "--force-conflicts",
        "-k",
        folder,
    ];
    let said = cluster.kubectl(&server)?;
    for object in [
        "servicemonitor.monitoring.coreos.com/nodemesh-agent",
        "servicemonitor.monitoring.coreos.com/nodemesh-controller",
        "prometheusrule.monitoring.coreos.com/nodemesh",
    ] {
        ensure!(said.contains(object), "{object} is not in\n{said}");
    }
    // By the program that brings them along, for good, and away again.
    let mesh_ctl = |words: &[&str]| {
        let mut command = cluster.command(find_programs()?.join("mesh-ctl"));
        command.args(words);
        process::with_input(command, "")?.ok()
    };
    mesh_ctl(&["install", "--monitoring", "--force-conflicts"])?;
    for kind in ["servicemonitors", "prometheusrules"] {
        let found = cluster.list(SYSTEM, kind, "app.kubernetes.io/name=nodemesh")?;
        ensure!(!found.is_empty(), "no {kind}");
    }
    Ok(())
}

/// The names of our own metrics in the rules.
fn named() -> BTreeSet<&'static str> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let expressions = RULES.lines().filter_map(|line| line.trim().strip_prefix("expr: "));
    let words = expressions.flat_map(|text| text.split(move |c| !is_part(c)));
    words.filter(|word| word.starts_with("nodemesh_")).collect()
}

#[test]
fn alerts_fire_on_what_they_are_for_and_name_what_there_is() -> Result<()> {
    let cluster = Cluster::shared()?;
    let mut command = cluster.command(cluster.cache().join("bin/monitoring.test"));
    command.arg("-test.v").current_dir("/");
    command.env("NODEMESH_RULES", root().join("deploy/daemonset/monitoring/rules.yaml"));
    let judged = process::with_input(command, "")?;
    ensure!(
        judged.code() == 0 && judged.stdout.contains("--- PASS: TestRules"),
        "{judged}"
    );

    let named = named();
    ensure!(named.len() >= 6, "the rules name {named:?}");
    let mut told = String::new();
    for node in 1..=cluster.nodes()? {
        told += &cluster.http_on_node(node, "http://127.0.0.1:15020/metrics")?;
    }
    for pod in cluster.list(SYSTEM, "pods", "app.kubernetes.io/component=controller")? {
        let address = pod["status"]["podIP"]
            .as_str()
            .context("a controller without an address")?;
        told += &cluster.http_on_node(1, &format!("http://{address}:15012/metrics"))?;
    }
    let is_told = |name: &str| {
        let lines = told.lines().filter_map(|line| line.strip_prefix(name));
        lines.into_iter().any(|rest| rest.starts_with([' ', '{']))
    };
    let unknown: Vec<&&str> = named.iter().filter(|name| !is_told(name)).collect();
    ensure!(unknown.is_empty(), "nobody tells {unknown:?}");
    Ok(())
}
