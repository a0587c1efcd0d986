//! Readiness probes as a kubelet makes them: by a program of the node, to the pod's own address. It runs in the node's
//! cgroup, where the agent's programs see it connect.

use std::{ffi::OsStr, net::IpAddr, net::SocketAddr, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};

use crate::{
    netns,
    process::{Output, Site},
};

/// Opens a connection to the address from the node.
pub fn tcp(node: &Site, address: IpAddr, port: u16, limit: Duration) -> Result<()> {
    let open = format!("exec 3<>/dev/tcp/{address}/{port}");
    let limit = format!("{:.3}", limit.as_secs_f64());
    run(node.run(&["timeout", &limit, "bash", "-c", &open]))
        .with_context(|| format!("connect to {address} port {port}"))?;
    Ok(())
}

/// Sends a GET from the node; a status from 200 to 399 is success. Gives the body.
pub fn http(node: &Site, address: IpAddr, port: u16, path: &str, limit: Duration) -> Result<String> {
    let url = format!("http://{}{path}", SocketAddr::new(address, port));
    let limit = format!("{:.3}", limit.as_secs_f64());
    let options = [
        "curl",
        "-sS",
        "--fail",
        "-A",
        "kube-probe/lab",
        "--max-time",
        &limit,
        &url,
    ];
    run(node.run(&options))
}

fn run(mut command: Command) -> Result<String> {
    let program = command.get_args().last().map(OsStr::to_owned).unwrap_or_default();
    let output: Output = command.output().with_context(|| format!("probe {program:?}"))?.into();
    output.ok()
}

/// Fetches a whole text from inside the namespace, of any length, by `curl`.
pub fn fetch(netns: &str, url: &str, limit: Duration) -> Result<String> {
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net={}", netns::path(netns).display()))
        .args(["curl", "--silent", "--show-error", "--fail", "--max-time"])
        .arg(limit.as_secs().max(1).to_string())
        .arg(url);
    let output = command.output().context("run curl")?;
    ensure!(
        output.status.success(),
        "GET {url}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    String::from_utf8(output.stdout).with_context(|| format!("GET {url}: no UTF-8"))
}
