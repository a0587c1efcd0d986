//! kube-proxy's mode, changed on a running cluster. It is as before when the guard goes.

use std::fs;

use anyhow::{Context, Result};

use super::Cluster;

/// A mode that holds until this value goes.
#[derive(Debug)]
pub struct ProxyMode {
    cluster: Cluster,
    before: String,
}

impl Cluster {
    /// Has kube-proxy of every node write its rules in this mode (`iptables`, `nftables`); returns when they are
    /// written, and those of the mode before are gone.
    pub fn proxy_mode(&self, mode: &str) -> Result<ProxyMode> {
        let guard = ProxyMode {
            cluster: self.clone(),
            before: current(self, 1)?,
        };
        change(self, mode)?;
        Ok(guard)
    }
}

fn current(cluster: &Cluster, node: usize) -> Result<String> {
    cluster.http_on_node(node, "http://127.0.0.1:10249/proxyMode")
}

fn change(cluster: &Cluster, mode: &str) -> Result<()> {
    for node in 1..=cluster.nodes()? {
        let file = cluster.state.join(format!("node{node}/kube-proxy.yaml"));
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let lines = text.lines().map(|line| match line.starts_with("mode: ") {
            true => format!("mode: {mode}\n"),
            false => format!("{line}\n"),
        });
        // kube-proxy ends by itself when its file changes, and the node starts it again.
        fs::write(&file, lines.collect::<String>())?;
    }
    for node in 1..=cluster.nodes()? {
        cluster.until(&format!("kube-proxy of node {node} by {mode}"), || {
            let now = current(cluster, node)?;
            cluster.http_on_node(node, "http://127.0.0.1:10256/healthz")?;
            Ok((now == mode).then_some(()))
        })?;
    }
    Ok(())
}

impl Drop for ProxyMode {
    fn drop(&mut self) {
        if let Err(error) = change(&self.cluster, &self.before) {
            eprintln!("kube-proxy stays in its mode: {error:#}");
        }
    }
}
