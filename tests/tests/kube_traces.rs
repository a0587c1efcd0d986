//! The last program on the cluster, by its name: after all the others the mesh is well, and they left nothing.

use anyhow::{Result, ensure};
use mesh_tests::{
    cluster::{Cluster, SYSTEM},
    process::Output,
};

/// The namespaces that a cluster is born with.
const KUBERNETES: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];

#[test]
fn after_everything_the_doctor_finds_nothing_and_nothing_is_left() -> Result<()> {
    let cluster = Cluster::shared()?;
    // Namespaces of tests go on their own time.
    cluster.until("the end of the tests' namespaces", || {
        let list = cluster.kubectl(&["get", "namespaces", "-o", "name"])?;
        let names = list.lines().filter_map(|line| line.strip_prefix("namespace/"));
        let left: Vec<&str> = names
            .filter(|name| *name != SYSTEM && !KUBERNETES.contains(name))
            .collect();
        ensure!(left.is_empty(), "{left:?}");
        Ok(Some(()))
    })?;
    cluster.until("a clean bill of the doctor's", || {
        let mesh_ctl = mesh_tests::mesh::find_programs()?.join("mesh-ctl");
        let said: Output = cluster.command(mesh_ctl).arg("doctor").output()?.into();
        ensure!(said.code() == 0, "{said}");
        Ok(Some(()))
    })?;
    // What is captured are pods that are there: none of them is the mesh's.
    for node in 1..=cluster.nodes()? {
        cluster.until(&format!("the end of captures on node {node}"), || {
            let captured = cluster
                .metrics(node)?
                .sum("nodemesh_agent_map_entries", &[("map", "PODS")]);
            ensure!(captured == 0.0, "{captured} pods");
            Ok(Some(()))
        })?;
    }
    Ok(())
}
