//! Readiness probes as a kubelet makes them: from the node's network namespace to the pod's own address.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use crate::netns;

/// How much of an answer is read.
const ANSWER_MAX: u64 = 64 * 1024;

/// Opens a connection to the address from inside the namespace.
pub fn tcp(netns: &str, address: IpAddr, port: u16, limit: Duration) -> Result<()> {
    netns::within(netns, || {
        let address = SocketAddr::new(address, port);
        TcpStream::connect_timeout(&address, limit).with_context(|| format!("connect to {address}"))?;
        Ok(())
    })
}

/// Sends a GET from inside the namespace; a status from 200 to 399 is success. Gives the body's beginning.
pub fn http(netns: &str, address: IpAddr, port: u16, path: &str, limit: Duration) -> Result<String> {
    let (status, body) = http_get(netns, SocketAddr::new(address, port), path, limit)?;
    ensure!((200..400).contains(&status), "{address}:{port}{path} answered {status}");
    Ok(body)
}

fn http_get(netns: &str, address: SocketAddr, path: &str, limit: Duration) -> Result<(u16, String)> {
    let answer = netns::within(netns, || {
        let mut stream =
            TcpStream::connect_timeout(&address, limit).with_context(|| format!("connect to {address}"))?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nhost: {address}\r\nuser-agent: kube-probe/lab\r\naccept: */*\r\nconnection: close\r\n\r\n"
        )?;
        let mut answer = Vec::new();
        stream
            .take(ANSWER_MAX)
            .read_to_end(&mut answer)
            .with_context(|| format!("read from {address}"))?;
        Ok(answer)
    })?;
    let answer = String::from_utf8_lossy(&answer);
    let Some((head, body)) = answer.split_once("\r\n\r\n") else {
        bail!("{address}: no HTTP answer: {answer:?}");
    };
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok((
        status.with_context(|| format!("{address}: no status in {head:?}"))?,
        body.to_string(),
    ))
}

/// Fetches a whole text from inside the namespace, of any length, by `curl`.
pub fn fetch(netns: &str, url: &str, limit: Duration) -> Result<String> {
    let mut command = std::process::Command::new("nsenter");
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
