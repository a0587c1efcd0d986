//! A real Kubernetes cluster on this machine, and what a test does with it: kubectl, programs in pods and on nodes,
//! captures of the wire.
//!
//! `cargo xtask kube up` starts clusters by the scripts in `tests/kube`; [`Cluster::open`] works with one by its name.
//! Tests named `kube_*` get the run's cluster from [`Cluster::shared`]; they need root and a running cluster, say so
//! when they have none, and never skip. What a test creates it removes: a [`Scope`] is a namespace that goes with it.

mod ask;
pub mod conformance;
pub mod load;
mod processes;
mod proxy;
mod scope;
mod wire;

use std::{
    env, fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

pub use processes::{Paused, Slowed};
pub use proxy::ProxyMode;
pub use scope::Scope;
pub use wire::WireCapture;

use crate::{
    Metrics, netns,
    process::{self, Output},
    wait,
};

/// Names the cluster to work with.
pub const NAME_VARIABLE: &str = "NODEMESH_KUBE";
/// The cluster's name if nobody names one.
pub const DEFAULT_NAME: &str = "nodemesh";
/// Where the clusters of this machine keep their state.
pub const STATE: &str = "/var/tmp/nodemesh-kube";
/// The namespace of the mesh's own parts.
pub const SYSTEM: &str = "nodemesh-system";
/// How long something may take that a loaded machine of two cores does in a few seconds.
pub const LIMIT: Duration = Duration::from_secs(120);

/// A running cluster.
#[derive(Clone, Debug)]
pub struct Cluster {
    name: String,
    state: PathBuf,
}

impl Cluster {
    /// A running cluster by its name.
    pub fn open(name: &str) -> Result<Cluster> {
        netns::require_root()?;
        let state = Path::new(STATE).join(name);
        ensure!(
            state.join("admin.conf").exists(),
            "no cluster is called {name:?}: start it with `{NAME_VARIABLE}={name} cargo xtask kube up`"
        );
        Ok(Cluster {
            name: name.to_string(),
            state,
        })
    }

    /// The cluster of this run of tests, as `NODEMESH_KUBE` names it.
    pub fn shared() -> Result<Cluster> {
        Cluster::open(&name())
    }

    /// The cluster's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that tells kubectl and mesh-ctl how to reach the API server, from inside the control plane's network.
    pub fn kubeconfig(&self) -> PathBuf {
        self.state.join("admin.conf")
    }

    /// Where the programs and definitions lie that `cargo xtask kube build` made.
    pub fn cache(&self) -> PathBuf {
        let bin = self.state.join("bin");
        // The state has a link to them.
        let bin = fs::canonicalize(&bin).unwrap_or(bin);
        bin.parent().unwrap_or(&bin).to_path_buf()
    }

    /// The network namespace of the control plane, or of node `n`.
    pub fn netns(&self, node: Option<usize>) -> String {
        match node {
            None => format!("{}-cp", self.name),
            Some(node) => format!("{}-node{node}", self.name),
        }
    }

    /// How many nodes it has.
    pub fn nodes(&self) -> Result<usize> {
        let entries = fs::read_dir(&self.state).with_context(|| format!("read {}", self.state.display()))?;
        let is_node = |entry: std::io::Result<fs::DirEntry>| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            name.strip_prefix("node")?.parse::<usize>().ok()
        };
        Ok(entries.filter_map(is_node).count())
    }

    /// A program in the control plane's network, with the kubeconfig and the cluster's programs at hand.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", netns::path(&self.netns(None)).display()));
        command.arg("--").arg(program);
        let mut path = self.state.join("bin").into_os_string();
        path.push(":");
        path.push(env::var_os("PATH").unwrap_or_else(|| process::PATH.into()));
        command.env("PATH", path).env("KUBECONFIG", self.kubeconfig());
        command
    }

    /// kubectl with these arguments.
    pub fn kubectl_command<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Command {
        let mut command = self.command(self.state.join("bin/kubectl"));
        command.args(arguments);
        command
    }

    /// Runs kubectl to its end.
    pub fn try_kubectl(&self, arguments: &[&str]) -> Result<Output> {
        run(self.kubectl_command(arguments))
    }

    /// Runs kubectl and gives what it wrote; an error with its words if it fails.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let output = self.try_kubectl(arguments)?;
        output.ok().with_context(|| format!("kubectl {}", arguments.join(" ")))
    }

    /// Runs kubectl and reads its output as JSON.
    pub fn kubectl_json(&self, arguments: &[&str]) -> Result<Value> {
        let mut words = arguments.to_vec();
        words.extend(["-o", "json"]);
        let text = self.kubectl(&words)?;
        serde_json::from_str(&text).with_context(|| format!("the output of kubectl {}", words.join(" ")))
    }

    /// Applies YAML documents, as an operator does.
    pub fn apply(&self, yaml: &str) -> Result<String> {
        self.try_apply(yaml)?.ok().with_context(|| format!("apply\n{yaml}"))
    }

    /// Applies YAML documents and gives the result, also a refusal.
    pub fn try_apply(&self, yaml: &str) -> Result<Output> {
        let arguments = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
        process::with_input(self.kubectl_command(&arguments), yaml)
    }

    /// Deletes the objects of YAML documents; those that do not exist are fine.
    pub fn delete(&self, yaml: &str) -> Result<()> {
        let arguments = ["delete", "--ignore-not-found", "--wait=false", "-f", "-"];
        process::with_input(self.kubectl_command(&arguments), yaml)?.ok()?;
        Ok(())
    }

    /// One object: `get("shop", "pod", "cart-0")`; an empty namespace for objects without one.
    pub fn get(&self, namespace: &str, kind: &str, name: &str) -> Result<Value> {
        let mut words = vec!["get", kind, name];
        if !namespace.is_empty() {
            words.extend(["-n", namespace]);
        }
        self.kubectl_json(&words)
    }

    /// The objects of a kind in a namespace that a label selector picks (empty: all).
    pub fn list(&self, namespace: &str, kind: &str, selector: &str) -> Result<Vec<Value>> {
        let mut words = vec!["get", kind, "-n", namespace];
        if !selector.is_empty() {
            words.extend(["-l", selector]);
        }
        let mut list = self.kubectl_json(&words)?;
        match list["items"].take() {
            Value::Array(items) => Ok(items),
            other => bail!("kubectl get {kind}: a list was expected, not {other}"),
        }
    }

    /// Runs a command in a container of a pod.
    pub fn exec(&self, namespace: &str, pod: &str, argv: &[&str]) -> Result<Output> {
        let mut words = vec!["exec", "-n", namespace, pod, "--"];
        words.extend(argv);
        self.try_kubectl(&words)
    }

    /// What a pod wrote (all its containers).
    pub fn logs(&self, namespace: &str, pod: &str) -> Result<String> {
        self.kubectl(&[
            "logs",
            "-n",
            namespace,
            pod,
            "--all-containers",
            "--prefix",
            "--tail=-1",
        ])
    }

    /// Waits until a Deployment, DaemonSet or StatefulSet (`deployment/web`) is rolled out.
    pub fn rolled_out(&self, namespace: &str, what: &str) -> Result<()> {
        let limit = format!("--timeout={}s", LIMIT.as_secs());
        let waited = self.kubectl(&["rollout", "status", "-n", namespace, what, &limit]);
        waited.map(|_| ()).with_context(|| self.describe(namespace))
    }

    /// Waits until an object's condition is true: `ready("shop", "pod/cart-0", "Ready")`.
    pub fn condition(&self, namespace: &str, what: &str, condition: &str) -> Result<()> {
        let limit = format!("--timeout={}s", LIMIT.as_secs());
        let condition = format!("--for=condition={condition}");
        let waited = self.kubectl(&["wait", "-n", namespace, what, &condition, &limit]);
        waited.map(|_| ()).with_context(|| self.describe(namespace))
    }

    /// The pods of a namespace and its newest events, for a message about what is missing.
    pub fn describe(&self, namespace: &str) -> String {
        let said = |words: &[&str]| {
            self.try_kubectl(words)
                .map_or_else(|e| e.to_string(), |o| o.to_string())
        };
        let pods = said(&["get", "pods", "-n", namespace, "-o", "wide"]);
        let events = said(&["events", "-n", namespace]);
        let newest: Vec<&str> = events.lines().rev().take(15).collect();
        let newest: Vec<&str> = newest.into_iter().rev().collect();
        format!("namespace {namespace}:\n{pods}\n{}", newest.join("\n"))
    }

    /// A program inside node `n`: in its namespaces and among its own processes.
    pub fn on_node(&self, node: usize, argv: &[&str]) -> Result<Command> {
        let pid = self.node_init(node)?;
        let mut command = Command::new("/bin/sh");
        let group = format!("/proc/{pid}/root/sys/fs/cgroup");
        // It belongs to the node for cgroup2 too, so that it ends with the node at the latest.
        command.args([
            "-c",
            "g=$1; p=$2; shift 2; [ -e $g/unified ] && g=$g/unified; echo 0 > $g/node/cgroup.procs || exit 125\n\
             export CONTAINERD_ADDRESS=/run/containerd/containerd.sock CONTAINERD_NAMESPACE=k8s.io\n\
             exec nsenter -t $p -m -n -p -C -u -- \"$@\"",
            "sh",
            &group,
            &pid.to_string(),
        ]);
        command.args(argv);
        Ok(command)
    }

    /// Runs a program inside node `n` to its end.
    pub fn exec_on_node(&self, node: usize, argv: &[&str]) -> Result<Output> {
        run(self.on_node(node, argv)?)
    }

    /// The process that is the first one inside node `n`.
    pub fn node_init(&self, node: usize) -> Result<u32> {
        let file = self.state.join(format!("node{node}/pid"));
        let outside = fs::read_to_string(&file).with_context(|| format!("no node {node}: {}", file.display()))?;
        let outside = outside.trim();
        let children = format!("/proc/{outside}/task/{outside}/children");
        let children = fs::read_to_string(&children).with_context(|| format!("node {node} does not run"))?;
        let first = children.split_whitespace().next().and_then(|pid| pid.parse().ok());
        first.with_context(|| format!("node {node} has no first process"))
    }

    /// Imports an image (a tar file) on every node.
    pub fn load_image(&self, tar: &Path) -> Result<()> {
        for node in 1..=self.nodes()? {
            let file = fs::File::open(tar).with_context(|| format!("open {}", tar.display()))?;
            let mut command = self.on_node(node, &["ctr", "images", "import", "-"])?;
            let output: Output = command.stdin(file).output().context("run ctr")?.into();
            output
                .ok()
                .with_context(|| format!("import {} on node {node}", tar.display()))?;
        }
        Ok(())
    }

    /// The name of the mesh's agent pod on a node (`node1`).
    pub fn agent_pod(&self, node: &str) -> Result<String> {
        let pods = self.list(SYSTEM, "pods", "app.kubernetes.io/component=agent")?;
        let running = pods.iter().find(|pod| {
            pod["spec"]["nodeName"] == node
                && pod["metadata"]["deletionTimestamp"].is_null()
                && pod["status"]["phase"] == "Running"
        });
        let name = running.and_then(|pod| pod["metadata"]["name"].as_str());
        name.map(String::from)
            .with_context(|| format!("no agent runs on {node}:\n{}", self.describe(SYSTEM)))
    }

    /// A scrape of the agent on node `n`.
    pub fn metrics(&self, node: usize) -> Result<Metrics> {
        let text = self.http_on_node(node, "http://127.0.0.1:15020/metrics")?;
        Metrics::parse(&text)
    }

    /// What a URL answers from inside node `n`'s network.
    pub fn http_on_node(&self, node: usize, url: &str) -> Result<String> {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", netns::path(&self.netns(Some(node))).display()));
        command.args(["--", "curl", "-sS", "--fail", "--max-time", "10", url]);
        run(command)?.ok()
    }

    /// The log of a part of the control plane (`apiserver`) or of a node's daemon (`node1/kubelet`).
    pub fn daemon_log(&self, name: &str) -> Result<String> {
        let file = match name.split_once('/') {
            Some((node, daemon)) => self.state.join(node).join("log").join(format!("{daemon}.log")),
            None => self.state.join("log").join(format!("{name}.log")),
        };
        let mut bytes = Vec::new();
        fs::File::open(&file)
            .and_then(|mut file| file.read_to_end(&mut bytes))
            .with_context(|| format!("read {}", file.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Waits for something of this cluster, at most for [`LIMIT`].
    pub fn until<T>(&self, what: &str, condition: impl FnMut() -> Result<Option<T>>) -> Result<T> {
        wait::until(what, LIMIT, condition)
    }
}

/// The name of the cluster to work with.
pub fn name() -> String {
    env::var(NAME_VARIABLE).unwrap_or_else(|_| DEFAULT_NAME.into())
}

fn run(mut command: Command) -> Result<Output> {
    let output = command.stdin(Stdio::null()).output();
    Ok(output.with_context(|| format!("run {command:?}"))?.into())
}
