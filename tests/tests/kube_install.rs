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
    found.extend(listed(&["sh", "-c", "ls -A /run/nodemesh 2>/dev/null || true"])?);
    Ok(found)
}

#[test]
fn every_command_of_the_document_works() -> Result<()> {
    let cluster = Cluster::shared()?;
    let programs = mesh_tests::mesh::find_programs()?;
    let folder = tempfile::tempdir()?;
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

#[test]
fn blocks_are_found() {
    let text = "a\n```sh test\none\n```\n```sh\nno\n```\n```sh test\ntwo\n```\n";
    assert_eq!(blocks(text), ["one\n", "two\n"]);
}
