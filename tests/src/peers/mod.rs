//! Other proxies in the same lab, for the bench: each as a pair of sidecars between the same two pods.
//!
//! A pair listens on the source pod's loopback, speaks mutual TLS 1.3 from pod address to pod address, and delivers over
//! the destination pod's loopback. The source addresses its sidecar itself: no redirection stands in the way, which is
//! the cheapest topology that a sidecar can have. Configurations are as their manuals advise for speed; what they are is
//! written down here and nowhere else. A program that is not there is said to be absent, never left out in silence.

mod credentials;
mod envoy;
mod haproxy;
mod nginx;

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{Background, Lab, Place, process::Site, wait};

pub use credentials::Credentials;

/// How long a proxy may take to listen.
const START_LIMIT: Duration = Duration::from_secs(15);
/// Threads or processes of each proxy: as many as an agent has workers on the machine of the figures.
const WORKERS: usize = 2;
/// Starts a program with as many open files as the system lets it have: idle connections are counted in thousands.
const MORE_FILES: &str = "ulimit -n \"$(ulimit -Hn)\"; exec \"$@\"";
/// The names in the certificates, by which the two ends know each other.
const SOURCE_NAME: &str = "source.bench.internal";
const DESTINATION_NAME: &str = "destination.bench.internal";

/// A proxy that can stand beside us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// HAProxy, HTTP on both sides.
    Haproxy,
    /// HAProxy again, bytes and no TLS: what two hops cost that do nothing.
    Floor,
    /// HAProxy as one such hop between two pods of one node.
    Hop,
    /// nginx's stream module: bytes.
    Nginx,
    /// Envoy, HTTP on both sides.
    Envoy,
}

impl Peer {
    /// All of them.
    pub const ALL: &'static [Peer] = &[Peer::Haproxy, Peer::Floor, Peer::Hop, Peer::Nginx, Peer::Envoy];

    /// Its name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Peer::Haproxy => "haproxy",
            Peer::Floor => "floor",
            Peer::Hop => "hop",
            Peer::Nginx => "nginx",
            Peer::Envoy => "envoy",
        }
    }

    /// What it does here.
    pub const fn layer(self) -> &'static str {
        match self {
            Peer::Haproxy | Peer::Envoy => "L7 mTLS",
            Peer::Floor => "two HAProxy hops, L4 without TLS",
            Peer::Hop => "one HAProxy hop, L4 without TLS",
            Peer::Nginx => "L4 mTLS",
        }
    }

    /// The port of the pair's source side; the destination side has the next one.
    const fn port(self) -> u16 {
        match self {
            Peer::Haproxy => 15101,
            Peer::Nginx => 15201,
            Peer::Envoy => 15301,
            Peer::Floor => 15401,
            Peer::Hop => 15501,
        }
    }

    /// Whether its two ends are on one node, and one program is both.
    pub const fn is_one(self) -> bool {
        matches!(self, Peer::Hop)
    }

    /// Its version, or why it cannot run. `programs` is searched before the usual places.
    pub fn version(self, programs: &Path) -> Result<String> {
        let program = self.program(programs)?;
        let output = Command::new(&program)
            .arg(if self == Peer::Envoy { "--version" } else { "-v" })
            .output()
            .with_context(|| format!("run {}", program.display()))?;
        ensure!(output.status.success(), "{}: {}", program.display(), output.status);
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        if self == Peer::Nginx {
            nginx::stream_module()?;
        }
        let line = said
            .lines()
            .find(|line| !line.trim().is_empty())
            .context("it says no version")?;
        Ok(match self {
            // "HAProxy version 2.6.12-1 2023/01/01 - https://…", "nginx version: nginx/1.22.1",
            // "/…/envoy  version: <commit>/1.40.0/Clean/RELEASE/BoringSSL"
            Peer::Haproxy | Peer::Floor | Peer::Hop => line.split_whitespace().nth(2).unwrap_or(line).into(),
            Peer::Nginx => line.rsplit('/').next().unwrap_or(line).into(),
            Peer::Envoy => line.split('/').rev().nth(3).unwrap_or(line).into(),
        })
    }

    fn program(self, programs: &Path) -> Result<PathBuf> {
        let name = match self {
            Peer::Floor | Peer::Hop => "haproxy",
            other => other.name(),
        };
        let envoy = programs.join("envoy/envoy/_bin");
        let places = [
            programs,
            &envoy,
            Path::new("/usr/sbin"),
            Path::new("/usr/bin"),
            Path::new("/usr/local/bin"),
        ];
        let found = places.iter().map(|place| place.join(name)).find(|path| path.is_file());
        found.with_context(|| format!("{name} is not installed"))
    }
}

/// A pair of sidecars that runs. Dropped, both end.
#[derive(Debug)]
pub struct Pair {
    /// Whose.
    pub peer: Peer,
    /// Where the source's programs connect to.
    pub address: SocketAddr,
    /// The control groups of its two ends: CPU time and processes.
    pub cgroups: Vec<PathBuf>,
    _running: Vec<Background>,
}

/// One end of a pair, as its configuration needs it.
struct End<'a> {
    /// Where it listens.
    listen: SocketAddr,
    /// Where it goes on.
    next: SocketAddr,
    /// Its certificate and key, one after the other, and each alone.
    own: &'a credentials::Files,
    /// Whom it trusts.
    ca: &'a Path,
    /// The name that the other end must prove.
    other: &'static str,
    /// Whether it is the source's.
    source: bool,
    /// Where it may write.
    directory: &'a Path,
}

impl Pair {
    /// Starts a pair between the pods `source` and `destination` (`namespace/name`), in front of the destination's `port`.
    pub fn start(
        peer: Peer,
        lab: &Lab,
        programs: &Path,
        credentials: &Credentials,
        (source, destination, port): (&str, &str, u16),
    ) -> Result<Pair> {
        let near = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
        let between = SocketAddr::new(lab.pod_ip(destination)?, peer.port() + 1);
        let mut pair = Pair {
            peer,
            address: near(peer.port()),
            cgroups: Vec::new(),
            _running: Vec::new(),
        };
        let ends = [
            (
                "destination",
                destination,
                between,
                near(port),
                &credentials.destination,
                SOURCE_NAME,
            ),
            (
                "source",
                source,
                pair.address,
                between,
                &credentials.source,
                DESTINATION_NAME,
            ),
        ];
        for (side, pod, listen, mut next, own, other) in ends {
            if peer.is_one() {
                if side == "destination" {
                    continue;
                }
                next = SocketAddr::new(lab.pod_ip(destination)?, port);
            }
            let directory = lab.directory().join(format!("peer-{}-{side}", peer.name()));
            fs::create_dir_all(&directory)?;
            let end = End {
                listen,
                next,
                own,
                ca: &credentials.ca,
                other,
                source: side == "source",
                directory: &directory,
            };
            let (file, text) = match peer {
                Peer::Haproxy => ("haproxy.cfg", haproxy::configuration(&end)),
                Peer::Floor | Peer::Hop => ("haproxy.cfg", haproxy::floor(&end)),
                Peer::Nginx => ("nginx.conf", nginx::configuration(&end)?),
                Peer::Envoy => ("envoy.yaml", envoy::configuration(&end)),
            };
            let file = directory.join(file);
            fs::write(&file, text)?;
            let mut argv = vec![
                "sh".to_string(),
                "-c".into(),
                MORE_FILES.into(),
                "sh".into(),
                peer.program(programs)?.display().to_string(),
            ];
            let file = file.display().to_string();
            argv.extend(match peer {
                Peer::Haproxy | Peer::Floor | Peer::Hop => vec!["-f".into(), file],
                Peer::Nginx => vec!["-c".into(), file],
                Peer::Envoy => envoy::arguments(file, end.source),
            });
            let site = Site {
                netns: lab.netns(Place::Pod(pod))?,
                // Outside of the node's, so that no agent has anything to do with it.
                cgroup: lab.cgroup().join(format!("peer-{}-{side}", peer.name())),
                own_mounts: false,
                directory: directory.clone(),
                env: None,
            };
            crate::cgroup::create(&site.cgroup)?;
            let number = u64::from(peer.port()) + u64::from(end.source);
            let mut running = Background::start(&site, &argv, &directory, number)?;
            wait::until(&format!("{} listening on {listen}", peer.name()), START_LIMIT, || {
                if !running.running()? {
                    bail!("it ended:\n{}{}", running.stdout(), running.stderr());
                }
                Ok(listens(&site.netns, listen)?.then_some(()))
            })
            .with_context(|| format!("it wrote:\n{}{}", running.stdout(), running.stderr()))?;
            pair.cgroups.push(site.cgroup);
            pair._running.push(running);
        }
        Ok(pair)
    }
}

/// Whether somebody listens at the address, without connecting: a connection would be work that is measured.
fn listens(netns: &str, address: SocketAddr) -> Result<bool> {
    crate::netns::within(netns, || {
        let table = fs::read_to_string("/proc/thread-self/net/tcp")?;
        Ok(is_listening(&table, address.port()))
    })
}

/// Whether a line of `/proc/net/tcp` is a listening socket (state 0A) on the port.
fn is_listening(table: &str, port: u16) -> bool {
    let port = format!(":{port:04X}");
    table.lines().skip(1).any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        matches!(fields[..], [_, local, _, "0A", ..] if local.ends_with(&port))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_sockets() {
        let table = "  sl  local_address rem_address   st\n   \
                     0: 0100007F:3AFD 00000000:0000 0A 0\n   1: 0100007F:1F90 0200007F:3AFE 01 0\n";
        for (port, listening) in [(15101, true), (8080, false), (15102, false)] {
            assert_eq!(is_listening(table, port), listening, "{port}");
        }
    }

    #[test]
    fn absent_programs_are_named() {
        let nowhere = Path::new("/nonexistent");
        for peer in Peer::ALL {
            if let Err(error) = peer.version(nowhere) {
                assert!(error.to_string().contains(peer.name()), "{error}");
            }
        }
    }
}
