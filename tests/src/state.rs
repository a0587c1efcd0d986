//! What a lab records about itself in `/run/nodemesh-lab/<name>/state.json`, so that any later process can use it or
//! clean up after a process that was killed.
//!
//! The file is the only copy: every change locks, reads, edits and replaces it. A lab has an owner while a test runs;
//! one whose owner is gone is garbage and is swept by the next lab that starts.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::plan::{INDEX_MAX, INDEX_MIN, Plan};

/// Where all labs keep their files.
pub const ROOT: &str = "/run/nodemesh-lab";

/// Everything that a lab knows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    /// The lab's name.
    pub name: String,
    /// Its index, which gives its addresses.
    pub index: u8,
    /// Whether agents and a controller run.
    pub mesh: bool,
    /// The process that removes it; `None` for one that stays until `lab down`.
    pub owner: Option<Process>,
    /// Where mesh-agent and mesh-ctl are.
    pub programs: PathBuf,
    /// More arguments of every agent.
    pub agent_args: Vec<String>,
    /// More arguments of the controller.
    pub controller_args: Vec<String>,
    /// Whether each node has a keeper, and its agents can be replaced while they run.
    #[serde(default)]
    pub keeper: bool,
    /// Whether nodes translate Service addresses for pods outside of the mesh.
    pub service_rules: bool,
    /// The nodes; their position plus one is their number.
    pub nodes: Vec<Node>,
    /// The pods.
    pub pods: Vec<Pod>,
    /// The Services.
    pub services: Vec<Service>,
    /// Namespaces and their labels.
    pub namespaces: BTreeMap<String, BTreeMap<String, String>>,
    /// Counts what needs a fresh number.
    pub counter: u64,
}

/// A node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its number, from 1.
    pub number: u8,
}

/// A pod.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The node's name.
    pub node: String,
    /// Its number on the node.
    pub slot: u8,
    /// Its addresses, IPv4 first.
    pub addresses: [IpAddr; 2],
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Whether the mesh shall have it.
    pub enrolled: bool,
    /// Whether its probes passed.
    pub ready: bool,
    /// The document as it was given.
    pub document: String,
}

/// A Service.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Service {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its cluster addresses; empty if headless.
    pub addresses: Vec<IpAddr>,
    /// Its number in the plan; 0 if none was needed.
    pub slot: u16,
    /// The document as it was given.
    pub document: String,
}

/// A process that cannot be mistaken for a later one with the same id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// The process id.
    pub pid: u32,
    /// Its start, in clock ticks since boot.
    pub started: u64,
}

impl Process {
    /// This process.
    pub fn current() -> Process {
        let pid = std::process::id();
        Process {
            pid,
            started: started(pid).unwrap_or(0),
        }
    }

    /// Whether it still runs.
    pub fn alive(&self) -> bool {
        started(self.pid) == Some(self.started)
    }
}

fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything; the 22nd field is the 20th after it.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

impl State {
    /// The address plan.
    pub fn plan(&self) -> Plan {
        Plan { index: self.index }
    }

    /// A node by name.
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes.iter().find(|node| node.name == name).with_context(|| {
            let names: Vec<_> = self.nodes.iter().map(|node| node.name.as_str()).collect();
            format!("no node {name:?} in lab {} (there are {})", self.name, names.join(", "))
        })
    }

    /// A pod by `namespace/name`.
    pub fn pod(&self, name: &str) -> Result<&Pod> {
        self.pods.iter().find(|pod| pod.full_name() == name).with_context(|| {
            let names: Vec<_> = self.pods.iter().map(Pod::full_name).collect();
            format!("no pod {name:?} in lab {} (there are {})", self.name, names.join(", "))
        })
    }

    /// A Service by `namespace/name`.
    pub fn service(&self, name: &str) -> Result<&Service> {
        let found = self
            .services
            .iter()
            .find(|service| format!("{}/{}", service.namespace, service.name) == name);
        found.with_context(|| format!("no service {name:?} in lab {}", self.name))
    }
}

impl Pod {
    /// `namespace/name`.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// A lab's directory.
pub fn directory(name: &str) -> PathBuf {
    Path::new(ROOT).join(name)
}

/// The names of all labs on this machine.
pub fn labs() -> Vec<String> {
    let Ok(entries) = fs::read_dir(ROOT) else {
        return Vec::new();
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<_> = names.filter(|name| !name.starts_with('.')).collect();
    names.sort();
    names
}

/// Reads a lab's state.
pub fn load(name: &str) -> Result<State> {
    let file = directory(name).join("state.json");
    let text = match fs::read_to_string(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            bail!("no lab is called {name:?}; `cargo xtask lab status` lists them")
        }
        Err(error) => return Err(error).with_context(|| format!("read {}", file.display())),
    };
    serde_json::from_str(&text).with_context(|| format!("read {}", file.display()))
}

/// Writes a lab's state, whole or not at all.
pub fn save(state: &State) -> Result<()> {
    let directory = directory(&state.name);
    let (next, file) = (directory.join("state.json.next"), directory.join("state.json"));
    fs::write(&next, serde_json::to_vec_pretty(state)?).with_context(|| format!("write {}", next.display()))?;
    fs::rename(&next, &file).with_context(|| format!("write {}", file.display()))
}

/// Reads, edits and writes a lab's state while nobody else does.
pub fn change<T>(name: &str, edit: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
    let lock = File::create(directory(name).join("lock"))?;
    lock.lock()?;
    let mut state = load(name)?;
    let result = edit(&mut state)?;
    save(&state)?;
    Ok(result)
}

/// Holds the machine-wide lock while labs are made or removed.
pub fn machine_lock() -> Result<File> {
    fs::create_dir_all(ROOT).with_context(|| format!("make {ROOT}"))?;
    let file = File::create(Path::new(ROOT).join(".lock"))?;
    file.lock()?;
    Ok(file)
}

/// A free index. Call it with the machine-wide lock held; it is taken as soon as the state is saved.
pub fn free_index() -> Result<u8> {
    let taken: Vec<u8> = labs().iter().filter_map(|name| Some(load(name).ok()?.index)).collect();
    let free = (INDEX_MIN..=INDEX_MAX).find(|index| !taken.contains(index));
    free.context("no free lab index: too many labs run at once")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_alive_and_another_with_its_id_is_not_it() {
        let this = Process::current();
        assert!(this.started > 0);
        assert!(this.alive());
        let earlier = Process {
            started: this.started - 1,
            ..this
        };
        assert!(!earlier.alive());
    }
}
