//! `mesh-ctl uninstall`: the mesh out of a cluster, and every trace of it from the nodes.
//!
//! The agents end first, then a DaemonSet of the agent's image sweeps each node: links, pins, sockets, state. Only when
//! every node has told that it is clean is the rest deleted. Policies are the user's data: they and their definitions
//! stay unless --crds says otherwise.

use std::time::{Duration, Instant};

use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{Namespace, Pod},
};
use kube::{
    Api,
    api::{DeleteParams, ListParams, PropagationPolicy},
};

use crate::{
    connect::{Failure, World},
    install::why_not,
    kubernetes::{
        AGENT, Cluster, ROOT_NAMESPACE,
        objects::{Manner, Object, Objects},
    },
    manifests::{self, SETTINGS_ANNOTATION, Settings},
    output::print,
};

/// How often the cluster is asked while something is awaited.
const POLL: Duration = Duration::from_millis(500);
/// How long an agent may take to end; what its connections have not finished by then is cut.
const AGENT_GRACE_SECONDS: u32 = 10;
const CLEANUP: &str = "nodemesh-cleanup";
const AGENT_PODS: &str = "app.kubernetes.io/name=nodemesh,app.kubernetes.io/component=agent";
const CLEANUP_PODS: &str = "app.kubernetes.io/name=nodemesh,app.kubernetes.io/component=cleanup";

/// Arguments of `uninstall`.
#[derive(Debug, clap::Args)]
pub struct UninstallArgs {
    /// Change nothing: say what would be deleted.
    #[arg(long)]
    dry_run: bool,
    /// Delete the definitions of the mesh's kinds too, and with them every policy in the cluster.
    #[arg(long)]
    crds: bool,
    /// Keep the namespace nodemesh-system; what is the mesh's in it is deleted.
    #[arg(long)]
    keep_namespace: bool,
    /// Go on although the sweep of a node did not succeed (its links and pins stay until it reboots).
    #[arg(long)]
    force: bool,
    /// How long each step may take.
    #[arg(long, value_name = "DURATION", default_value = "3m", value_parser = crate::duration)]
    timeout: Duration,
}

fn tell(line: &str) {
    print(&format!("{line}\n"));
}

/// Runs `mesh-ctl uninstall`.
pub async fn run(args: UninstallArgs, world: &World) -> Result<(), Failure> {
    let cluster = world.cluster()?.cluster().await?;
    let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
    let there = namespaces.get_opt(ROOT_NAMESPACE).await?.is_some();
    if !args.dry_run && there {
        sweep(&args, &cluster).await?;
    }
    let parts = manifests::manifests(&Settings::new())?;
    let mut rest: Vec<Object> = Vec::new();
    rest.extend(parts.agent);
    rest.extend(parts.controller);
    rest.extend(own_objects()?);
    rest.extend(parts.rights);
    if !args.keep_namespace {
        rest.extend(parts.namespace);
    }
    if args.crds {
        rest.extend(parts.definitions);
    }
    let mut objects = Objects::new(cluster.clone());
    for mut object in rest {
        let title = object.title();
        // With its namespace an object is gone too.
        if !there && object.namespace() == ROOT_NAMESPACE {
            continue;
        }
        match objects.delete(&mut object, args.dry_run).await? {
            Some(_) if args.dry_run => tell(&format!("{title} would be deleted")),
            Some(_) => tell(&format!("{title} deleted")),
            None => {}
        }
    }
    if args.dry_run {
        return Ok(());
    }
    let deadline = Instant::now() + args.timeout;
    while !args.keep_namespace && namespaces.get_opt(ROOT_NAMESPACE).await?.is_some() {
        pause(deadline, "namespace nodemesh-system is still being deleted").await?;
    }
    enrolled_namespaces(&namespaces).await?;
    tell("the mesh is gone");
    Ok(())
}

async fn pause(deadline: Instant, what: &str) -> Result<(), Failure> {
    if Instant::now() >= deadline {
        return Err(Failure::Timeout(what.to_owned()));
    }
    tokio::time::sleep(POLL).await;
    Ok(())
}

/// What the controller made for itself.
fn own_objects() -> Result<Vec<Object>, Failure> {
    let text = format!(
        "apiVersion: coordination.k8s.io/v1\nkind: Lease\nmetadata: {{name: nodemesh-controller, namespace: \
         {ROOT_NAMESPACE}}}\n---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: nodemesh-trust-bundle, namespace: \
         {ROOT_NAMESPACE}}}\n---\napiVersion: v1\nkind: Secret\nmetadata: {{name: nodemesh-ca, namespace: \
         {ROOT_NAMESPACE}}}\n---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: \
         nodemesh-controller, namespace: {ROOT_NAMESPACE}}}\n---\napiVersion: apps/v1\nkind: DaemonSet\nmetadata: {{name: {CLEANUP}, namespace: \
         {ROOT_NAMESPACE}}}\n"
    );
    crate::kubernetes::objects::read("the controller's own objects", &text)
}

/// The image of a container.
fn image_of(set: &DaemonSet, container: &str) -> Option<String> {
    let pod = set.spec.as_ref()?.template.spec.as_ref()?;
    pod.containers.iter().find(|c| c.name == container)?.image.clone()
}

/// Ends the agents and sweeps the nodes.
async fn sweep(args: &UninstallArgs, cluster: &Cluster) -> Result<(), Failure> {
    let sets: Api<DaemonSet> = Api::namespaced(cluster.client.clone(), ROOT_NAMESPACE);
    let agent = sets.get_opt(AGENT).await?;
    let settings = agent.as_ref().and_then(|set| {
        let text = set.metadata.annotations.as_ref()?.get(SETTINGS_ANNOTATION)?;
        serde_json::from_str::<Settings>(text).ok()
    });
    // The sweep's image is the one that the nodes have already, whoever installed it. If an earlier sweep did not
    // succeed, only that one still tells.
    let image = match &agent {
        Some(set) => image_of(set, "agent"),
        None => sets.get_opt(CLEANUP).await?.and_then(|set| image_of(&set, "done")),
    };
    if agent.is_some() {
        end_agents(args, cluster, &sets).await?;
    }
    let mut cleanup = manifests::cleanup(&settings.unwrap_or_default(), image.as_deref())?;
    let mut objects = Objects::new(cluster.clone());
    objects
        .apply(
            &mut cleanup,
            Manner {
                dry_run: false,
                force: true,
            },
        )
        .await?;
    let swept = swept(cluster, &sets, Instant::now() + args.timeout).await;
    match swept {
        Ok(count) => tell(&format!("{count} nodes are clean")),
        Err(failure) if args.force => {
            for line in failure.lines() {
                eprintln!("warning: {line}");
            }
        }
        Err(failure) => return Err(failure),
    }
    objects.delete(&mut cleanup, false).await?;
    Ok(())
}

/// Deletes the DaemonSet and its pods. The pods are told by hand: their own time to drain is an hour.
async fn end_agents(args: &UninstallArgs, cluster: &Cluster, sets: &Api<DaemonSet>) -> Result<(), Failure> {
    let orphan = DeleteParams {
        propagation_policy: Some(PropagationPolicy::Orphan),
        ..DeleteParams::default()
    };
    sets.delete(AGENT, &orphan).await?;
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), ROOT_NAMESPACE);
    let soon = DeleteParams {
        grace_period_seconds: Some(AGENT_GRACE_SECONDS),
        ..DeleteParams::default()
    };
    let agents = ListParams::default().labels(AGENT_PODS);
    let deadline = Instant::now() + args.timeout;
    let mut told = usize::MAX;
    loop {
        let left = pods.list(&agents).await?.items;
        if left.is_empty() {
            tell("the agents have ended");
            return Ok(());
        }
        if left.len() != told {
            eprintln!("{} agents are ending", left.len());
            told = left.len();
        }
        for pod in left.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()) {
            let name = pod.metadata.name.clone().unwrap_or_default();
            match pods.delete(&name, &soon).await {
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                other => drop(other?),
            }
        }
        pause(deadline, "the agents' pods have not ended").await?;
    }
}

/// Waits until every node says that it is clean; how many there are.
async fn swept(cluster: &Cluster, sets: &Api<DaemonSet>, deadline: Instant) -> Result<i32, Failure> {
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), ROOT_NAMESPACE);
    loop {
        let set = sets.get(CLEANUP).await?;
        let status = set.status.unwrap_or_default();
        let seen = status.observed_generation >= set.metadata.generation;
        let (wanted, ready) = (status.desired_number_scheduled, status.number_ready);
        let updated = status.updated_number_scheduled.unwrap_or(0);
        if seen && ready >= wanted && updated >= wanted {
            return Ok(ready);
        }
        if Instant::now() >= deadline {
            let found = pods.list(&ListParams::default().labels(CLEANUP_PODS)).await?.items;
            let mut lines = vec![format!(
                "{ready} of {wanted} nodes are clean; --force goes on all the same"
            )];
            lines.extend(found.iter().filter_map(why_not));
            return Err(Failure::Refused(lines));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Labels on the user's namespaces are the user's: they are named, not taken away.
async fn enrolled_namespaces(namespaces: &Api<Namespace>) -> Result<(), Failure> {
    let labelled = namespaces
        .list(&ListParams::default().labels("nodemesh.io/mesh"))
        .await?;
    let names: Vec<String> = labelled
        .items
        .into_iter()
        .filter_map(|found| found.metadata.name)
        .collect();
    if !names.is_empty() {
        eprintln!("the label nodemesh.io/mesh is left on: {}", names.join(", "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_controller_made_is_named() {
        let titles: Vec<String> = own_objects().unwrap().iter().map(Object::title).collect();
        let expected = [
            "Lease nodemesh-system/nodemesh-controller",
            "ConfigMap nodemesh-system/nodemesh-trust-bundle",
            "Secret nodemesh-system/nodemesh-ca",
            "EndpointSlice nodemesh-system/nodemesh-controller",
            "DaemonSet nodemesh-system/nodemesh-cleanup",
        ];
        assert_eq!(titles, expected);
    }
}
