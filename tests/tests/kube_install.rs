//! docs/install-kubernetes.md, word for word on the cluster: installed, enrolled, guarded, upgraded, uninstalled without
//! a trace; then installed again for the tests that follow.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use mesh_tests::{cluster::Cluster, process};

/// The document, and what marks a block that is run.
const DOCUMENT: &str = include_str!("../../docs/install-kubernetes.md");
const BLOCK: &str = "```sh test\n";
/// The image of the test applications; it has Python too.
const IMAGE: &str = "localhost/nodemesh/test:dev";

/// The marked blocks of a document, in order.
fn blocks(text: &str) -> Vec<&str> {
    text.split(BLOCK)
        .skip(1)
        .filter_map(|rest| rest.split("```").next())
        .collect()
}

/// Runs a block as a user would, in the control plane's network, with `mesh-ctl` and `kubectl` in the path.
fn run(cluster: &Cluster, folder: &Path, programs: &Path, block: &str) -> Result<()> {
    let mut command = cluster.command("bash");
    let script = folder.join("block.sh");
    fs::write(&script, block)?;
    command.args(["-euo", "pipefail"]).arg(&script).current_dir(folder);
    let path = command
        .get_envs()
        .find(|(name, _)| *name == "PATH")
        .and_then(|(_, value)| value.map(|value| value.to_os_string()))
        .unwrap_or_default();
    let mut own = programs.as_os_str().to_os_string();
    own.push(":");
    own.push(path);
    command.env("PATH", own).env("IMAGE", IMAGE);
    let output = process::with_input(command, "")?;
    output
        .ok()
        .with_context(|| format!("this block of the document failed:\n{block}"))?;
    Ok(())
}

/// What a node still has of the mesh. That no program is attached any more is shown by the document itself: its
/// application's connections would be handed to listeners that are gone.
fn traces(cluster: &Cluster, node: usize) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let listed = |argv: &[&str]| -> Result<Vec<String>> {
        let output = cluster.exec_on_node(node, argv)?;
        Ok(output.stdout.lines().map(str::to_owned).collect())
    };
    // Neither directory needs to be there.
    found.extend(listed(&["sh", "-c", "ls -A /sys/fs/bpf/nodemesh 2>/dev/null || true"])?);
    for directory in ["/run/nodemesh", "/var/lib/nodemesh"] {
        found.extend(listed(&["sh", "-c", "ls -A $0 2>/dev/null || true", directory])?);
    }
    Ok(found)
}

#[test]
fn every_command_of_the_document_works() -> Result<()> {
    let cluster = Cluster::shared()?;
    let programs = mesh_tests::mesh::find_programs()?;
    let folder = tempfile::tempdir()?;
    // Where the document's reader is: at the root of this tree, as far as the document says.
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    std::os::unix::fs::symlink(deploy.canonicalize()?, folder.path().join("deploy"))?;
    let blocks = blocks(DOCUMENT);
    ensure!(
        blocks.len() >= 6,
        "the document has {} blocks that can be run",
        blocks.len()
    );
    // Another test may have used the document's namespace before, and another one may use it after.
    let gone = ["delete", "namespace", "shop", "--ignore-not-found", "--wait=true"];
    cluster.kubectl(&gone)?;
    for block in blocks {
        run(&cluster, folder.path(), &programs, block)?;
    }
    for node in 1..=cluster.nodes()? {
        let traces = traces(&cluster, node)?;
        ensure!(traces.is_empty(), "node {node} still has {traces:?}");
    }
    cluster.kubectl(&gone)?;
    // The other tests of this run need the mesh.
    run(&cluster, folder.path(), &programs, "mesh-ctl install\n")?;
    fs::remove_dir_all(folder.path()).ok();
    Ok(())
}

/// Something in a node's directory that the sweep cannot remove. It goes with this value.
struct Stuck<'a>(&'a Cluster, usize);

const STUCK: &str = "/run/nodemesh/stuck";

impl Stuck<'_> {
    fn on(cluster: &Cluster, node: usize) -> Result<Stuck<'_>> {
        let mount = format!("mkdir -p {STUCK} && mount -t tmpfs tmpfs {STUCK}");
        cluster.exec_on_node(node, &["sh", "-c", &mount])?.ok()?;
        Ok(Stuck(cluster, node))
    }
}

impl Drop for Stuck<'_> {
    fn drop(&mut self) {
        let remove = format!("umount {STUCK} && rmdir {STUCK}");
        let removed = self.0.exec_on_node(self.1, &["sh", "-c", &remove]);
        if let Err(error) = removed.and_then(|output| output.ok()) {
            eprintln!("{STUCK} stays on node {}: {error:#}", self.1);
        }
    }
}

const POLICY: &str = "
apiVersion: nodemesh.io/v1alpha1
kind: MeshPolicy
metadata: {name: left, namespace: default}
spec: {targetRefs: [{kind: Namespace, name: default}], mtls: {mode: permissive}}
";

#[test]
fn the_mesh_goes_by_force_where_a_node_cannot_be_swept_and_takes_its_kinds_if_told() -> Result<()> {
    let cluster = Cluster::shared()?;
    let programs = mesh_tests::mesh::find_programs()?;
    let mesh_ctl = |words: &[&str]| {
        let mut command = cluster.command(programs.join("mesh-ctl"));
        command.args(words);
        process::with_input(command, "")
    };
    cluster.apply(POLICY)?;
    let stuck = Stuck::on(&cluster, 2)?;
    let refused = mesh_ctl(&["uninstall", "--timeout", "40s"])?;
    ensure!(
        refused.code() == 1 && refused.stderr.contains("1 of 2 nodes are clean") && refused.stderr.contains("node2"),
        "{refused}"
    );
    // What was not deleted is as it was: the policy, and the controller.
    cluster.get("default", "meshpolicy", "left")?;
    cluster.get("nodemesh-system", "deployment", "nodemesh-controller")?;

    let forced = mesh_ctl(&["uninstall", "--timeout", "40s", "--force", "--crds"])?;
    ensure!(
        forced.code() == 0 && forced.stderr.contains("1 of 2 nodes are clean"),
        "{forced}"
    );
    let left = cluster.kubectl(&["get", "crds,clusterroles,clusterrolebindings,namespaces", "-o", "name"])?;
    let left: Vec<&str> = left.lines().filter(|name| name.contains("nodemesh")).collect();
    ensure!(left.is_empty(), "left in the cluster: {left:?}");
    drop(stuck);
    for node in 1..=cluster.nodes()? {
        let traces = traces(&cluster, node)?;
        ensure!(traces.is_empty(), "node {node} still has {traces:?}");
    }
    // Everything can be asked for again.
    mesh_ctl(&["install"])?.ok()?;
    mesh_ctl(&["doctor"])?.ok()?;
    Ok(())
}

#[test]
fn blocks_are_found() {
    let text = "a\n```sh test\none\n```\n```sh\nno\n```\n```sh test\ntwo\n```\n";
    assert_eq!(blocks(text), ["one\n", "two\n"]);
}
