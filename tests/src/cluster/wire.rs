//! What passes between the nodes: a capture on the bridge that joins them.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::Cluster;
use crate::{Packets, netns, wait};

/// How long tcpdump may take to start, to see a packet and to end.
const LIMIT: Duration = Duration::from_secs(20);
/// A datagram with this content marks the end of a capture.
const END_MARK: &str = "end-of-the-capture-2f6d";
const END_PORT: u16 = 9;

/// A running capture. It is ended when this value goes.
#[derive(Debug)]
pub struct WireCapture {
    cluster: Cluster,
    tcpdump: Child,
    file: PathBuf,
    said: PathBuf,
}

impl Cluster {
    /// Records what passes between the nodes; `filter` is tcpdump's language, empty for everything.
    pub fn capture(&self, filter: &str) -> Result<WireCapture> {
        let base = std::env::temp_dir().join(format!("nodemesh-{}-{}", self.name, std::process::id()));
        let (file, said) = (base.with_extension("pcap"), base.with_extension("log"));
        // A capture of an earlier test must not be taken for this one's.
        let _ = fs::remove_file(&file);
        let wanted = match filter {
            "" => String::new(),
            filter => format!("({filter}) or udp port {END_PORT}"),
        };
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", netns::path(&self.netns(None)).display()));
        command.args([
            "--",
            "tcpdump",
            "--immediate-mode",
            "-i",
            "br0",
            "-U",
            "-n",
            "-s",
            "0",
            "-Z",
            "root",
            "-w",
        ]);
        command.arg(&file).arg(&wanted);
        let tcpdump = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&said)?);
        let capture = WireCapture {
            cluster: self.clone(),
            tcpdump: tcpdump.spawn().context("run tcpdump")?,
            file,
            said,
        };
        wait::until("tcpdump's start", LIMIT, || {
            Ok(fs::read_to_string(&capture.said)?
                .contains("listening on")
                .then_some(()))
        })?;
        Ok(capture)
    }
}

impl WireCapture {
    /// Ends the capture and reads it. Everything that passed before this call is in it: a last packet is sent by node 1
    /// and awaited.
    pub fn stop(mut self) -> Result<Packets> {
        wait::until("the last packet of the capture", LIMIT, || {
            netns::within(&self.cluster.netns(Some(1)), || {
                let socket = std::net::UdpSocket::bind(("0.0.0.0", 0))?;
                Ok(socket.send_to(END_MARK.as_bytes(), ("172.30.0.1", END_PORT))?)
            })?;
            let bytes = fs::read(&self.file)?;
            let ended = bytes
                .windows(END_MARK.len())
                .any(|window| window == END_MARK.as_bytes());
            Ok(ended.then_some(()))
        })?;
        kill_process(Pid::from_child(&self.tcpdump), Signal::INT)?;
        wait::until("tcpdump's end", LIMIT, || Ok(self.tcpdump.try_wait()?))?;
        let said = fs::read_to_string(&self.said)?;
        ensure!(said.contains("packets captured"), "tcpdump did not end well: {said}");
        Packets::parse(fs::read(&self.file)?)
    }
}

impl Drop for WireCapture {
    fn drop(&mut self) {
        // All of these fail only for what has ended or gone already.
        let _ = self.tcpdump.kill();
        let _ = self.tcpdump.wait();
        let _ = fs::remove_file(&self.file);
        let _ = fs::remove_file(&self.said);
    }
}
