//! `mesh-ctl install` and `upgrade`: the manifests into a cluster, in order, and a wait until the mesh works.
//!
//! Server-side apply with a field manager of our own: what somebody else set in an object of ours is a conflict that is
//! told, not overwritten. Nothing is deleted here.

use std::time::{Duration, Instant};

use k8s_openapi::{
    api::{
        apps::v1::{DaemonSet, Deployment},
        core::v1::Pod,
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{Api, api::ListParams};

use crate::{
    connect::{Failure, World},
    kubernetes::{
        AGENT, CONTROLLER, Cluster, ROOT_NAMESPACE,
        objects::{Manner, Object, Objects},
    },
    manifests::{self, SETTINGS_ANNOTATION, Settings, VERSION, VERSION_ANNOTATION},
    output::print,
};

/// How often the cluster is asked while something is awaited.
const POLL: Duration = Duration::from_millis(500);
/// The longest list of pods in a report of what did not become ready.
const PODS_SHOWN_MAX: usize = 10;

/// Where a change is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DryRun {
    /// Nowhere: what would be applied is printed.
    Client,
    /// The API server checks everything and keeps nothing.
    Server,
}

/// Arguments of `install` and `upgrade`.
#[derive(Debug, clap::Args)]
pub struct CommonArgs {
    /// Change nothing: print the manifests (client), or let the API server check them (server).
    #[arg(long, value_enum, value_name = "WHERE", num_args = 0..=1, require_equals = true, default_missing_value = "client")]
    dry_run: Option<DryRun>,
    /// Where the images are: REGISTRY/agent and REGISTRY/controller.
    #[arg(long, value_name = "REGISTRY")]
    registry: Option<String>,
    /// The version of the images.
    #[arg(long, value_name = "TAG")]
    tag: Option<String>,
    /// The trust domain of all identities.
    #[arg(long, value_name = "DOMAIN")]
    trust_domain: Option<String>,
    /// What happens to connections while no agent serves on their node: hold, refuse or pass.
    #[arg(long, value_name = "MODE")]
    fail_mode: Option<String>,
    /// Replicas of the controller.
    #[arg(long, value_name = "N")]
    replicas: Option<u8>,
    /// Another setting, as NAME=VALUE; may be given again. `--set help` lists them.
    #[arg(long = "set", value_name = "NAME=VALUE")]
    set: Vec<String>,
    /// The namespace nodemesh-system is there already and is left as it is.
    #[arg(long)]
    no_namespace: bool,
    /// Monitors and alert rules too (needs the Prometheus Operator).
    #[arg(long)]
    monitoring: bool,
    /// Take over fields that somebody else has set in the mesh's objects.
    #[arg(long)]
    force_conflicts: bool,
    /// Return as soon as everything is applied.
    #[arg(long)]
    no_wait: bool,
    /// How long to wait.
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = crate::duration)]
    timeout: Duration,
}

/// Arguments of `install`.
#[derive(Debug, clap::Args)]
pub struct InstallArgs {
    #[command(flatten)]
    common: CommonArgs,
}

/// Arguments of `upgrade`. Settings of the installation are kept unless they are given anew.
#[derive(Debug, clap::Args)]
pub struct UpgradeArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// Go back to an older version too.
    #[arg(long)]
    force: bool,
}

/// What is installed already.
struct Found {
    version: String,
    settings: Settings,
}

impl CommonArgs {
    /// The settings that the arguments name, over those that hold already.
    fn settings(&self, mut settings: Settings) -> Result<Settings, Failure> {
        let flags = [
            ("image.registry", self.registry.clone()),
            ("image.tag", self.tag.clone()),
            ("trustDomain", self.trust_domain.clone()),
            ("failMode", self.fail_mode.clone()),
            ("controller.replicas", self.replicas.map(|n| n.to_string())),
        ];
        for (name, value) in flags {
            settings.extend(value.map(|value| (name.to_owned(), value)));
        }
        for pair in &self.set {
            let (name, value) = pair
                .split_once('=')
                .ok_or_else(|| Failure::Usage(format!("--set {pair}: expected NAME=VALUE")))?;
            settings.insert(name.to_owned(), value.to_owned());
        }
        manifests::check(&settings)?;
        Ok(settings)
    }
}

/// Runs `mesh-ctl install`.
pub async fn install(args: InstallArgs, world: &World) -> Result<(), Failure> {
    let common = args.common;
    if common.set.iter().any(|word| word == "help") {
        print(&manifests::describe()?);
        return Ok(());
    }
    if common.dry_run == Some(DryRun::Client) {
        return print_manifests(&common, Settings::new());
    }
    let cluster = world.cluster()?.cluster().await?;
    let found = found(&cluster).await?;
    if let Some(found) = &found
        && found.version != VERSION
    {
        return Err(Failure::refused(format!(
            "version {} is installed: mesh-ctl upgrade brings it to {VERSION}",
            found.version
        )));
    }
    // Installing once more mends what is missing and keeps what was set.
    let before = found.map(|found| found.settings);
    let settings = common.settings(before.clone().unwrap_or_default())?;
    before.map_or(Ok(()), |before| same_trust_domain(&before, &settings))?;
    apply(&common, settings, cluster).await
}

/// Runs `mesh-ctl upgrade`.
pub async fn upgrade(args: UpgradeArgs, world: &World) -> Result<(), Failure> {
    let common = args.common;
    let cluster = world.cluster()?.cluster().await?;
    let found = found(&cluster).await?.ok_or_else(|| {
        Failure::refused(format!(
            "the mesh is not installed in namespace {ROOT_NAMESPACE}: mesh-ctl install does that"
        ))
    })?;
    if older(VERSION, &found.version) && !args.force {
        return Err(Failure::refused(format!(
            "version {} is installed, this program is {VERSION}: --force goes back",
            found.version
        )));
    }
    eprintln!("from version {} to {VERSION}", found.version);
    let settings = common.settings(found.settings.clone())?;
    same_trust_domain(&found.settings, &settings)?;
    if common.dry_run == Some(DryRun::Client) {
        return print_manifests(&common, settings);
    }
    apply(&common, settings, cluster).await
}

/// Every certificate has the trust domain in it: one that changes under a running mesh cuts all of it at once.
fn same_trust_domain(before: &Settings, after: &Settings) -> Result<(), Failure> {
    let of = |settings: &Settings| {
        settings
            .get("trustDomain")
            .cloned()
            .unwrap_or_else(|| "cluster.local".to_owned())
    };
    let (old, new) = (of(before), of(after));
    if old == new {
        return Ok(());
    }
    Err(Failure::refused(format!(
        "the mesh has the trust domain {old}, and {new} was asked for: it changes only by uninstalling and installing anew"
    )))
}

fn print_manifests(common: &CommonArgs, settings: Settings) -> Result<(), Failure> {
    let settings = common.settings(settings)?;
    let objects = manifests::manifests(&settings)?.in_order(!common.no_namespace, common.monitoring);
    let mut text = String::new();
    for object in &objects {
        let yaml = mesh_api::yaml::to_string(&object.value).map_err(|e| Failure::refused(e.to_string()))?;
        text += &format!("---\n{yaml}");
    }
    print(&text);
    Ok(())
}

/// Whether one version comes before another.
fn older(one: &str, other: &str) -> bool {
    let parts = |text: &str| -> Vec<u64> {
        let core = text.split(['-', '+']).next().unwrap_or_default();
        core.split('.').map(|part| part.parse().unwrap_or(0)).collect()
    };
    parts(one) < parts(other)
}

/// What the cluster has, by the annotations of the DaemonSet.
async fn found(cluster: &Cluster) -> Result<Option<Found>, Failure> {
    let sets: Api<DaemonSet> = Api::namespaced(cluster.client.clone(), ROOT_NAMESPACE);
    let Some(set) = sets.get_opt(AGENT).await? else {
        return Ok(None);
    };
    let annotations = set.metadata.annotations.unwrap_or_default();
    let settings = annotations.get(SETTINGS_ANNOTATION).map(String::as_str).unwrap_or("{}");
    Ok(Some(Found {
        // Applied by kubectl or Helm: this program's own version is as good as any.
        version: annotations
            .get(VERSION_ANNOTATION)
            .cloned()
            .unwrap_or_else(|| VERSION.to_owned()),
        settings: serde_json::from_str(settings).map_err(|e| {
            Failure::refused(format!(
                "the annotation {SETTINGS_ANNOTATION} of DaemonSet {AGENT}: {e}"
            ))
        })?,
    }))
}

/// Applies everything and waits.
async fn apply(common: &CommonArgs, settings: Settings, cluster: Cluster) -> Result<(), Failure> {
    let dry_run = common.dry_run == Some(DryRun::Server);
    let manner = Manner {
        dry_run,
        force: common.force_conflicts,
    };
    let deadline = Instant::now() + common.timeout;
    let parts = manifests::manifests(&settings)?;
    let definitions: Vec<String> = parts
        .definitions
        .iter()
        .map(|object| object.name().to_owned())
        .collect();
    let mut objects = Objects::new(cluster.clone());
    for mut object in parts.in_order(!common.no_namespace, common.monitoring) {
        let title = object.title();
        let change = match apply_one(&mut objects, &mut object, manner, deadline).await {
            // What a dry run did not make is missing for what comes next.
            Err(Failure::Refused(lines)) if dry_run && lines.iter().any(|line| line.contains("not found")) => {
                print(&format!("{title} would be created\n"));
                continue;
            }
            other => other?,
        };
        let note = if dry_run { " (dry run)" } else { "" };
        print(&format!("{title} {}{note}\n", change.as_str()));
    }
    if dry_run {
        return Ok(());
    }
    established(&cluster, &definitions, deadline).await?;
    if common.no_wait {
        return Ok(());
    }
    ready(&cluster, deadline).await?;
    print(&format!("the mesh is ready, version {VERSION}\n"));
    Ok(())
}

/// Applies one object; an API server that is still digesting the namespace or a definition is asked again.
async fn apply_one(
    objects: &mut Objects,
    object: &mut Object,
    manner: Manner,
    deadline: Instant,
) -> Result<crate::kubernetes::objects::Change, Failure> {
    loop {
        match objects.apply(object, manner).await {
            Ok((change, _)) => return Ok(change),
            Err(Failure::Refused(lines))
                if Instant::now() < deadline && lines.iter().any(|line| line.contains("being terminated")) =>
            {
                tokio::time::sleep(POLL).await;
            }
            Err(failure) => return Err(failure),
        }
    }
}

/// Waits until the API server serves our kinds.
async fn established(cluster: &Cluster, names: &[String], deadline: Instant) -> Result<(), Failure> {
    let definitions: Api<CustomResourceDefinition> = Api::all(cluster.client.clone());
    for name in names {
        loop {
            let found = definitions.get(name).await?;
            let conditions = found.status.and_then(|status| status.conditions).unwrap_or_default();
            let is = |what: &str| conditions.iter().find(|c| c.type_ == what);
            if is("Established").is_some_and(|c| c.status == "True") {
                break;
            }
            if let Some(wrong) = is("NonStructuralSchema").or(is("NamesAccepted").filter(|c| c.status == "False")) {
                let message = wrong.message.clone().unwrap_or_default();
                return Err(Failure::refused(format!("CustomResourceDefinition {name}: {message}")));
            }
            pause(deadline, || {
                format!("CustomResourceDefinition {name} is not established")
            })
            .await?;
        }
    }
    Ok(())
}

async fn pause(deadline: Instant, what: impl FnOnce() -> String) -> Result<(), Failure> {
    if Instant::now() >= deadline {
        return Err(Failure::Timeout(what()));
    }
    tokio::time::sleep(POLL).await;
    Ok(())
}

/// How far a workload has come.
#[derive(Debug, PartialEq, Eq)]
struct Progress {
    done: bool,
    text: String,
}

fn controller_progress(deployment: &Deployment) -> Progress {
    let wanted = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
    let status = deployment.status.clone().unwrap_or_default();
    let seen = status.observed_generation >= deployment.metadata.generation;
    let (updated, ready) = (status.updated_replicas.unwrap_or(0), status.ready_replicas.unwrap_or(0));
    let old = status.replicas.unwrap_or(0) - updated;
    Progress {
        done: seen && updated >= wanted && old == 0 && ready >= wanted,
        text: format!("controllers: {updated} of {wanted} updated, {ready} ready"),
    }
}

fn agent_progress(set: &DaemonSet) -> Progress {
    let status = set.status.clone().unwrap_or_default();
    let seen = status.observed_generation >= set.metadata.generation;
    let wanted = status.desired_number_scheduled;
    let updated = status.updated_number_scheduled.unwrap_or(0);
    let available = status.number_available.unwrap_or(0);
    Progress {
        done: seen && wanted > 0 && updated >= wanted && available >= wanted,
        text: format!("agents: {updated} of {wanted} updated, {available} ready"),
    }
}

/// Waits until the controller leads and every node has a ready agent of this version; tells each step.
async fn ready(cluster: &Cluster, deadline: Instant) -> Result<(), Failure> {
    let deployments: Api<Deployment> = Api::namespaced(cluster.client.clone(), ROOT_NAMESPACE);
    let sets: Api<DaemonSet> = Api::namespaced(cluster.client.clone(), ROOT_NAMESPACE);
    let mut told = String::new();
    loop {
        let controller = controller_progress(&deployments.get(CONTROLLER).await?);
        let agents = agent_progress(&sets.get(AGENT).await?);
        let text = format!("{}; {}", controller.text, agents.text);
        if text != told {
            eprintln!("{text}");
            told = text;
        }
        if controller.done && agents.done {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let mut lines = format!("not ready in time: {told}");
            for line in unready(cluster).await? {
                lines += &format!("\n  {line}");
            }
            return Err(Failure::Timeout(lines));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// The pods that are not ready, each with what it says.
async fn unready(cluster: &Cluster) -> Result<Vec<String>, Failure> {
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), ROOT_NAMESPACE);
    let found = pods
        .list(&ListParams::default().labels("app.kubernetes.io/name=nodemesh"))
        .await?;
    Ok(found.items.iter().filter_map(why_not).take(PODS_SHOWN_MAX).collect())
}

/// Why a pod is not ready; `None` if it is.
pub fn why_not(pod: &Pod) -> Option<String> {
    let name = pod.metadata.name.clone().unwrap_or_default();
    let status = pod.status.clone().unwrap_or_default();
    let conditions = status.conditions.unwrap_or_default();
    if conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True") {
        return None;
    }
    let mut reasons = Vec::new();
    let unscheduled = conditions
        .iter()
        .find(|c| c.type_ == "PodScheduled" && c.status != "True");
    reasons.extend(unscheduled.and_then(|c| c.message.clone()));
    for container in status.container_statuses.unwrap_or_default() {
        let state = container.state.unwrap_or_default();
        if let Some(waiting) = state.waiting {
            let message = waiting.message.map(|m| format!(": {m}")).unwrap_or_default();
            reasons.push(format!(
                "{} waits: {}{message}",
                container.name,
                waiting.reason.unwrap_or_default()
            ));
        } else if let Some(ended) = state.terminated {
            reasons.push(format!("{} ended with {}", container.name, ended.exit_code));
        } else if !container.ready {
            reasons.push(format!("{} is not ready", container.name));
        }
        let last = container.last_state.and_then(|state| state.terminated);
        if let Some(last) = last {
            reasons.push(format!("its last run ended with {}", last.exit_code));
        }
    }
    let node = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.node_name.clone())
        .unwrap_or_else(|| "no node".to_owned());
    Some(format!("{name} on {node}: {}", reasons.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn versions_are_compared_by_their_numbers() {
        assert!(older("0.9.0", "0.10.0"));
        assert!(older("0.1.0", "1"));
        assert!(!older("1.0.0", "1.0.0"));
        assert!(!older("1.2.0", "1.1.9"));
        assert!(!older("1.0.0-rc.1", "1.0.0"));
    }

    #[test]
    fn a_controller_is_done_when_all_are_ready_and_none_is_old() {
        let case = |status: serde_json::Value| {
            let value = json!({"metadata": {"generation": 2}, "spec": {"replicas": 2, "selector": {}, "template": {}}, "status": status});
            controller_progress(&serde_json::from_value(value).unwrap()).done
        };
        assert!(case(
            json!({"observedGeneration": 2, "replicas": 2, "updatedReplicas": 2, "readyReplicas": 2})
        ));
        assert!(!case(
            json!({"observedGeneration": 1, "replicas": 2, "updatedReplicas": 2, "readyReplicas": 2})
        ));
        assert!(!case(
            json!({"observedGeneration": 2, "replicas": 3, "updatedReplicas": 2, "readyReplicas": 2})
        ));
        assert!(!case(
            json!({"observedGeneration": 2, "replicas": 2, "updatedReplicas": 2})
        ));
    }

    #[test]
    fn the_trust_domain_stays() {
        let domain = |name: &str| Settings::from([("trustDomain".to_owned(), name.to_owned())]);
        assert!(same_trust_domain(&Settings::new(), &domain("cluster.local")).is_ok());
        assert!(same_trust_domain(&domain("a.org"), &domain("a.org")).is_ok());
        assert!(same_trust_domain(&domain("a.org"), &domain("b.org")).is_err());
        assert!(same_trust_domain(&Settings::new(), &domain("b.org")).is_err());
    }

    #[test]
    fn agents_are_done_when_every_node_has_a_new_one() {
        let case = |updated: i32, available: i32, wanted: i32| {
            let value = json!({"metadata": {"generation": 1}, "status": {
                "observedGeneration": 1, "desiredNumberScheduled": wanted, "currentNumberScheduled": wanted,
                "numberMisscheduled": 0, "numberReady": available, "numberAvailable": available,
                "updatedNumberScheduled": updated,
            }});
            agent_progress(&serde_json::from_value(value).unwrap()).done
        };
        assert!(case(2, 2, 2));
        assert!(!case(1, 2, 2) && !case(2, 1, 2) && !case(0, 0, 0));
    }
}
