//! The lab itself: what a test or `cargo xtask lab` holds in its hands.
//!
//! [`Lab::up`] returns a cluster whose pods are captured and ready; dropping it removes every process, namespace,
//! cgroup, mount and file. All that a later process needs to do the same is recorded before it is made.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    process::Child,
    sync::Mutex,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value as Json;

use crate::{
    cgroup,
    kube::{self, Item},
    kubelet, mesh,
    metrics::Metrics,
    netns, network, plan, probe,
    process::{self, Background, EXEC_LIMIT, Output, Site},
    state::{self, Node, Pod, Process, State},
    wait,
};

/// How long pods may take to be captured and ready.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// How long a scrape may take.
const SCRAPE_LIMIT: Duration = Duration::from_secs(5);

/// The port and the payload of the packet that ends a capture.
const END_PORT: u16 = 9;
const END_MARK: &str = "nodemesh-lab-end-of-capture";

/// What a lab begins with.
#[derive(Clone, Debug)]
pub struct LabConfig {
    /// Its name: lower case letters, digits and hyphens.
    pub name: String,
    /// How many nodes (`node-1`, `node-2`, …), unless the manifests hold `Node` documents.
    pub nodes: usize,
    /// Manifests to read: files or directories of `*.yaml`.
    pub files: Vec<PathBuf>,
    /// More manifests, given as text.
    pub manifests: Vec<String>,
    /// Whether agents and a controller run.
    pub mesh: bool,
    /// More arguments of every agent.
    pub agent_args: Vec<String>,
    /// More arguments of the controller.
    pub controller_args: Vec<String>,
    /// Whether each node has a keeper, and its agents can be replaced while they run.
    pub keeper: bool,
    /// Whether nodes translate Service addresses for pods outside of the mesh, as kube-proxy does.
    pub service_rules: bool,
    /// Whether the lab lives longer than the value that made it.
    pub keep: bool,
    /// Called with each step in plain words.
    pub progress: fn(&str),
}

impl LabConfig {
    /// A meshed lab of two nodes without any pod.
    pub fn new(name: &str) -> LabConfig {
        LabConfig {
            name: name.into(),
            nodes: 2,
            files: Vec::new(),
            manifests: Vec::new(),
            mesh: true,
            agent_args: Vec::new(),
            controller_args: Vec::new(),
            keeper: false,
            service_rules: true,
            keep: false,
            progress: |_| {},
        }
    }

    /// A lab of a test: its name is this process's own, so that test runs never meet.
    pub fn test(name: &str) -> LabConfig {
        LabConfig::new(&format!("t-{name}-{}", std::process::id()))
    }

    /// Adds a manifest given as text.
    pub fn manifest(mut self, yaml: impl Into<String>) -> LabConfig {
        self.manifests.push(yaml.into());
        self
    }

    /// Adds a manifest file or a directory of them.
    pub fn file(mut self, path: impl Into<PathBuf>) -> LabConfig {
        self.files.push(path.into());
        self
    }

    /// Sets the number of nodes.
    pub fn nodes(mut self, nodes: usize) -> LabConfig {
        self.nodes = nodes;
        self
    }

    /// Leaves the mesh out: bare pods, nodes and Services.
    pub fn unmeshed(mut self) -> LabConfig {
        self.mesh = false;
        self
    }

    /// Gives each node a keeper.
    pub fn kept(mut self) -> LabConfig {
        self.keeper = true;
        self
    }

    /// Adds an argument of every agent.
    pub fn agent_arg(mut self, argument: &str) -> LabConfig {
        self.agent_args.push(argument.into());
        self
    }
}

/// A place of the lab where a command can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place<'a> {
    /// A pod, by `namespace/name`.
    Pod(&'a str),
    /// A node, where its agent and its kubelet are.
    Node(&'a str),
    /// The controller's namespace.
    Controller,
    /// The bridge between the nodes.
    Fabric,
}

/// A running lab.
#[derive(Debug)]
pub struct Lab {
    name: String,
    cgroup: PathBuf,
    /// Whether dropping this value removes the lab.
    owned: bool,
    children: Mutex<Vec<Child>>,
}

impl Lab {
    /// Makes a lab and returns when every enrolled pod is captured and every readiness probe passes.
    pub fn up(config: LabConfig) -> Result<Lab> {
        netns::require_root()?;
        plan::check_name(&config.name)?;
        let mut items = Vec::new();
        for file in &config.files {
            items.extend(read_manifests(file)?);
        }
        for (number, text) in config.manifests.iter().enumerate() {
            items.extend(kube::parse(&format!("manifest {}", number + 1), text)?);
        }
        let lab = Lab::register(&config, &items)?;
        lab.build(&config, items)
            .with_context(|| format!("lab {}", config.name))?;
        Ok(lab)
    }

    /// Takes the name and an index; from here on the lab can be removed by its name alone.
    fn register(config: &LabConfig, items: &[Item]) -> Result<Lab> {
        sweep()?;
        let _lock = state::machine_lock()?;
        let directory = state::directory(&config.name);
        ensure!(
            !directory.exists(),
            "a lab called {:?} exists already; `cargo xtask lab down --name {}` removes it",
            config.name,
            config.name
        );
        let mut nodes: Vec<String> = items
            .iter()
            .filter(|item| item.kind == "Node")
            .map(|item| item.name.clone())
            .collect();
        if nodes.is_empty() {
            nodes = (1..=config.nodes).map(|number| format!("node-{number}")).collect();
        }
        ensure!(
            !nodes.is_empty() && nodes.len() <= plan::NODES_MAX,
            "{} nodes: expected 1 to {}",
            nodes.len(),
            plan::NODES_MAX
        );
        let numbered = nodes.into_iter().zip(1..);
        let state = State {
            name: config.name.clone(),
            index: state::free_index()?,
            mesh: config.mesh,
            owner: (!config.keep).then(Process::current),
            programs: mesh::find_programs()?,
            agent_args: config.agent_args.clone(),
            controller_args: config.controller_args.clone(),
            keeper: config.keeper,
            service_rules: config.service_rules,
            nodes: numbered.map(|(name, number)| Node { name, number }).collect(),
            pods: Vec::new(),
            services: Vec::new(),
            namespaces: Default::default(),
            counter: 0,
        };
        fs::create_dir_all(directory.join("logs"))?;
        state::save(&state)?;
        Ok(Lab {
            cgroup: cgroup::of_lab(&config.name)?,
            name: config.name.clone(),
            owned: true,
            children: Mutex::default(),
        })
    }

    fn build(&self, config: &LabConfig, items: Vec<Item>) -> Result<()> {
        let state = self.state()?;
        (config.progress)("making the nodes and the network between them");
        for node in &state.nodes {
            cgroup::create(&self.cgroup.join(&node.name))?;
        }
        network::fabric(&state.name, state.plan(), &state.nodes)?;
        if config.mesh {
            (config.progress)("starting the controller");
            self.start_controller()?;
            let documents = state.nodes.iter().map(|node| kubelet::node_document(&state, node));
            let documents: Vec<_> = documents.collect::<Result<_>>()?;
            mesh::apply(&state, &kube::to_yaml(&documents)?)?;
            (config.progress)("starting an agent on each node");
            let mut generations = Vec::new();
            for node in &state.nodes {
                if config.keeper {
                    self.start_keeper(&node.name)?;
                }
                generations.push((&node.name, self.spawn_agent(&node.name)?));
            }
            for (node, generation) in generations {
                mesh::wait_agent_ready(&state, &self.cgroup, node, generation)?;
            }
        }
        (config.progress)("starting the pods");
        self.apply_items(items.into_iter().filter(|item| item.kind != "Node").collect())
    }

    /// Opens a lab that another process made; dropping the value leaves it.
    pub fn open(name: &str) -> Result<Lab> {
        netns::require_root()?;
        plan::check_name(name)?;
        state::load(name)?;
        Ok(Lab {
            name: name.into(),
            cgroup: cgroup::of_lab(name)?,
            owned: false,
            children: Mutex::default(),
        })
    }

    /// Lets the lab live on after this process.
    pub fn keep(mut self) -> Result<()> {
        state::change(&self.name, |state| {
            state.owner = None;
            Ok(())
        })?;
        self.owned = false;
        Ok(())
    }

    /// Removes the lab and says what could not be removed.
    pub fn down(mut self) -> Result<()> {
        self.owned = false;
        remove(&self.name)?;
        self.reap();
        Ok(())
    }

    /// The lab's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The lab's directory: logs, sockets, the files of pods.
    pub fn directory(&self) -> PathBuf {
        state::directory(&self.name)
    }

    /// What the lab knows about itself now.
    pub fn state(&self) -> Result<State> {
        state::load(&self.name)
    }

    /// A pod by `namespace/name`.
    pub fn pod(&self, name: &str) -> Result<Pod> {
        Ok(self.state()?.pod(name)?.clone())
    }

    /// The pod's IPv4 address.
    pub fn pod_ip(&self, name: &str) -> Result<IpAddr> {
        Ok(self.pod(name)?.addresses[0])
    }

    /// The pod's IPv6 address.
    pub fn pod_ip6(&self, name: &str) -> Result<IpAddr> {
        Ok(self.pod(name)?.addresses[1])
    }

    /// The Service's first cluster address.
    pub fn service_ip(&self, name: &str) -> Result<IpAddr> {
        let state = self.state()?;
        let first = state.service(name)?.addresses.first().copied();
        first.with_context(|| format!("service {name} is headless"))
    }

    /// The cgroup of the lab.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// The network namespace of a place.
    pub fn netns(&self, place: Place<'_>) -> Result<String> {
        Ok(self.site(place)?.netns)
    }

    /// Where the commands of a place run.
    pub fn site(&self, place: Place<'_>) -> Result<Site> {
        let state = self.state()?;
        let bare = |netns: String, cgroup: PathBuf| {
            cgroup::create(&cgroup)?;
            Ok(Site {
                netns,
                cgroup,
                own_mounts: false,
                directory: self.directory(),
                env: None,
            })
        };
        match place {
            Place::Pod(name) => kubelet::pod_site(&state, &self.cgroup, state.pod(name)?),
            Place::Node(name) => kubelet::node_site(&state, &self.cgroup, &state.node(name)?.name),
            Place::Controller => bare(plan::controller_netns(&self.name), self.cgroup.join("host-controller")),
            Place::Fabric => bare(plan::fabric_netns(&self.name), self.cgroup.join("host-fabric")),
        }
    }

    /// Runs a command in a pod to its end.
    pub fn exec(&self, pod: &str, argv: &[&str]) -> Result<Output> {
        self.exec_in(Place::Pod(pod), argv)
    }

    /// Runs a command at any place to its end.
    pub fn exec_in(&self, place: Place<'_>, argv: &[&str]) -> Result<Output> {
        self.site(place)?.exec(argv, EXEC_LIMIT)
    }

    /// Runs a shell script in a pod; gives its standard output, or an error if it fails.
    pub fn shell(&self, pod: &str, script: &str) -> Result<String> {
        let output = self.exec(pod, &["bash", "-c", script])?;
        output.ok().with_context(|| format!("in pod {pod}: {script}"))
    }

    /// Starts a command in a pod that goes on beside the test.
    pub fn exec_background(&self, pod: &str, argv: &[&str]) -> Result<Background> {
        self.background_in(Place::Pod(pod), argv)
    }

    /// Starts a command at any place that goes on beside the test.
    pub fn background_in(&self, place: Place<'_>, argv: &[&str]) -> Result<Background> {
        let number = state::change(&self.name, |state| {
            state.counter += 1;
            Ok(state.counter)
        })?;
        Background::start(&self.site(place)?, argv, &self.directory().join("logs"), number)
    }

    /// Applies Kubernetes and mesh documents: pods are started, everything is told to the controller, and the call
    /// returns when all agents have it and new pods are captured and ready.
    pub fn apply(&self, yaml: &str) -> Result<()> {
        self.apply_items(kube::parse("manifest", yaml)?)
    }

    fn apply_items(&self, items: Vec<Item>) -> Result<()> {
        let (new, others) = state::change(&self.name, |state| {
            ensure!(
                items.iter().all(|item| item.kind != "Node"),
                "nodes cannot be added to a running lab"
            );
            for item in items.iter().filter(|item| item.kind == "Namespace") {
                state.namespaces.insert(item.name.clone(), item.labels.clone());
            }
            for pod in &mut state.pods {
                pod.enrolled = state.mesh && kube::enrolled(&pod.labels, state.namespaces.get(&pod.namespace));
            }
            let mut new = Vec::new();
            let mut others = Vec::new();
            for item in &items {
                match item.kind.as_str() {
                    "Service" => kubelet::admit_service(state, item)?,
                    "Pod" => new.push(kubelet::admit_pod(state, item)?),
                    _ => others.push(item.value.clone()),
                }
            }
            Ok((new, others))
        })?;
        let state = self.state()?;
        for pod in &new {
            kubelet::make_pod(&state, &self.cgroup, pod)?;
        }
        kubelet::refresh_names(&state)?;
        if state.mesh {
            let mut documents = others;
            for item in items.iter().filter(|item| item.kind == "Service") {
                let name = format!("{}/{}", item.namespace, item.name);
                documents.push(kubelet::service_document(state.service(&name)?)?);
            }
            for pod in &new {
                documents.push(kubelet::pod_document(&state, pod)?);
            }
            if !documents.is_empty() {
                mesh::apply(&state, &kube::to_yaml(&documents)?)?;
            }
            // Containers start captured: none of their connections may slip by.
            self.wait_captured(READY_LIMIT)?;
        }
        self.start_and_probe(&state, &new)
    }

    fn start_and_probe(&self, state: &State, pods: &[Pod]) -> Result<()> {
        for pod in pods {
            let children = kubelet::start_pod(state, &self.cgroup, pod)?;
            self.children.lock().map_err(|_| anyhow!("poisoned"))?.extend(children);
        }
        thread::scope(|scope| {
            let probes: Vec<_> = pods
                .iter()
                .map(|pod| {
                    scope.spawn(move || {
                        wait::until(&format!("readiness of {}", pod.full_name()), READY_LIMIT, || {
                            kubelet::probe_pod(state, &self.cgroup, pod).map(Some)
                        })
                        .with_context(|| format!("its log ends:\n{}", self.logs(&pod.full_name()).unwrap_or_default()))
                    })
                })
                .collect();
            for probe in probes {
                probe.join().map_err(|_| anyhow!("a probe panicked"))??;
            }
            Ok::<_, anyhow::Error>(())
        })?;
        let names: Vec<String> = pods.iter().map(Pod::full_name).collect();
        self.set_ready(&names.iter().map(String::as_str).collect::<Vec<_>>(), true)
    }

    /// Tells the mesh that these pods are ready, or that they are not, whatever their probes say.
    pub fn set_ready(&self, pods: &[&str], ready: bool) -> Result<()> {
        if pods.is_empty() {
            return Ok(());
        }
        state::change(&self.name, |state| {
            for pod in &mut state.pods {
                if pods.contains(&pod.full_name().as_str()) {
                    pod.ready = ready;
                }
            }
            Ok(())
        })?;
        let state = self.state()?;
        kubelet::refresh_names(&state)?;
        if state.mesh {
            let documents = pods.iter().map(|name| kubelet::pod_document(&state, state.pod(name)?));
            let documents: Vec<_> = documents.collect::<Result<_>>()?;
            mesh::apply(&state, &kube::to_yaml(&documents)?)?;
        }
        Ok(())
    }

    /// Tells the mesh that a pod is gone, then ends its processes and removes its namespace.
    pub fn delete_pod(&self, name: &str) -> Result<()> {
        let state = self.state()?;
        let pod = state.pod(name)?.clone();
        if state.mesh {
            mesh::ctl(
                &state,
                &["policy", "delete", "Pod", &pod.name, "-n", &pod.namespace, "--wait"],
            )?
            .ok()
            .with_context(|| format!("delete the pod {name}"))?;
        }
        let group = kubelet::pod_cgroup(&self.cgroup, &pod);
        cgroup::kill(&group)?;
        cgroup::remove(&group)?;
        network::remove_pod(&self.name, &pod)?;
        kubelet::remove_etc(&plan::pod_netns(&self.name, &pod.namespace, &pod.name))?;
        fs::remove_dir_all(kubelet::pod_directory(&self.name, &pod))?;
        state::change(&self.name, |state| {
            state.pods.retain(|other| other.full_name() != name);
            Ok(())
        })?;
        self.reap();
        kubelet::refresh_names(&self.state()?)
    }

    /// Runs `mesh-ctl` against this lab.
    pub fn ctl(&self, args: &[&str]) -> Result<Output> {
        mesh::ctl(&self.state()?, args)
    }

    /// Runs `mesh-ctl` with a text on its standard input.
    pub fn ctl_with_input(&self, args: &[&str], input: &str) -> Result<Output> {
        let mut command = mesh::ctl_command(&self.state()?)?;
        command.args(args);
        process::with_input(command, input)
    }

    /// Runs `mesh-ctl … -o json` and reads what it prints.
    pub fn ctl_json(&self, args: &[&str]) -> Result<Json> {
        let mut args = args.to_vec();
        args.extend(["-o", "json"]);
        let text = self
            .ctl(&args)?
            .ok()
            .with_context(|| format!("mesh-ctl {}", args.join(" ")))?;
        serde_json::from_str(&text).with_context(|| format!("mesh-ctl {}: {text}", args.join(" ")))
    }

    /// Waits until every enrolled pod is captured by its agent.
    pub fn wait_captured(&self, limit: Duration) -> Result<()> {
        let state = self.state()?;
        let enrolled: Vec<String> = state
            .pods
            .iter()
            .filter(|pod| pod.enrolled)
            .map(Pod::full_name)
            .collect();
        if enrolled.is_empty() {
            return Ok(());
        }
        wait::until("capture of every enrolled pod", limit, || {
            let status = self.ctl_json(&["status"])?;
            let captured = mesh::captured(&status);
            let missing: Vec<&str> = enrolled
                .iter()
                .map(String::as_str)
                .filter(|name| !captured.iter().any(|pod| pod == name))
                .collect();
            if missing.is_empty() {
                Ok(Some(()))
            } else {
                bail!("not captured: {}\nstatus: {status}", missing.join(", "))
            }
        })
    }

    /// What the containers of a pod wrote.
    pub fn logs(&self, pod: &str) -> Result<String> {
        let directory = kubelet::pod_directory(&self.name, &self.pod(pod)?);
        let mut files: Vec<PathBuf> = fs::read_dir(&directory)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .collect();
        files.retain(|file| file.extension().is_some_and(|extension| extension == "log"));
        files.sort();
        let mut text = String::new();
        for file in files {
            text.push_str(&String::from_utf8_lossy(&fs::read(file)?));
        }
        Ok(text)
    }

    /// The records of an agent's access log: one for each connection and request.
    pub fn access_log(&self, node: &str) -> Result<Vec<Json>> {
        let file = mesh::access_log(&self.name, node);
        let text = match fs::read_to_string(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error).with_context(|| format!("read {}", file.display())),
        };
        // The last line may be half written.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let record = |line| serde_json::from_str(line).with_context(|| format!("{}: {line}", file.display()));
        whole.lines().map(record).collect()
    }

    /// What an agent wrote to its diagnostic log.
    pub fn agent_log(&self, node: &str) -> Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(mesh::agent_log(&self.name, node))?).into_owned())
    }

    /// What the controller wrote.
    pub fn controller_log(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(mesh::controller_log(&self.name))?).into_owned())
    }

    /// Scrapes an agent's metrics from its node.
    pub fn metrics(&self, node: &str) -> Result<Metrics> {
        let url = format!("http://127.0.0.1:{}/metrics", mesh::METRICS_PORT);
        let text = probe::fetch(&self.netns(Place::Node(node))?, &url, SCRAPE_LIMIT)?;
        Metrics::parse(&text)
    }

    /// Kills every agent of a node at once (SIGKILL); its keeper lives on.
    pub fn kill_agent(&self, node: &str) -> Result<()> {
        cgroup::kill(&mesh::agent_cgroup(&self.cgroup, node))?;
        self.reap();
        Ok(())
    }

    /// Asks an agent to end (SIGTERM) and waits until it has drained.
    pub fn stop_agent(&self, node: &str) -> Result<()> {
        mesh::stop_agent(&self.cgroup, node)?;
        self.reap();
        Ok(())
    }

    /// Starts an agent of a node, beside those that run, and waits until it is ready. Its generation is returned.
    pub fn start_agent(&self, node: &str) -> Result<u64> {
        let generation = self.spawn_agent(node)?;
        mesh::wait_agent_ready(&self.state()?, &self.cgroup, node, generation)?;
        Ok(generation)
    }

    /// Starts an agent of a node, and returns before it is ready.
    pub fn spawn_agent(&self, node: &str) -> Result<u64> {
        let generation = state::change(&self.name, |state| {
            state.counter += 1;
            Ok(state.counter)
        })?;
        let child = mesh::start_agent(&self.state()?, &self.cgroup, node, generation)?;
        self.children.lock().map_err(|_| anyhow!("poisoned"))?.push(child);
        Ok(generation)
    }

    /// Starts an agent of a node that is held at each line of its log; see [`process::Steps`].
    pub fn step_agent(&self, node: &str) -> Result<(u64, process::Steps)> {
        let generation = state::change(&self.name, |state| {
            state.counter += 1;
            Ok(state.counter)
        })?;
        let mut steps = process::Steps::new()?;
        let child = mesh::step_agent(&self.state()?, &self.cgroup, node, generation, &mut steps)?;
        self.children.lock().map_err(|_| anyhow!("poisoned"))?.push(child);
        Ok((generation, steps))
    }

    /// Replaces the agent of a node as a rolling update does: a new one starts, and when it is ready the old ones are
    /// asked to end. Returns without waiting for their end.
    pub fn upgrade_agent(&self, node: &str) -> Result<u64> {
        let before = self.agent_pids(node)?;
        let generation = self.start_agent(node)?;
        mesh::terminate(&before);
        self.reap();
        Ok(generation)
    }

    /// The process ids of one generation of a node's agents.
    pub fn generation_pids(&self, node: &str, generation: u64) -> Result<Vec<u32>> {
        cgroup::processes(&mesh::generation_cgroup(&self.state()?, &self.cgroup, node, generation))
    }

    /// Kills one generation of a node's agents at once (SIGKILL).
    pub fn kill_generation(&self, node: &str, generation: u64) -> Result<()> {
        let group = mesh::generation_cgroup(&self.state()?, &self.cgroup, node, generation);
        cgroup::kill(&group)?;
        self.reap();
        Ok(())
    }

    /// Starts a keeper on a node; one that runs there is taken over, and ends by itself only when it is asked to.
    pub fn start_keeper(&self, node: &str) -> Result<()> {
        let child = mesh::start_keeper(&self.state()?, &self.cgroup, node)?;
        self.children.lock().map_err(|_| anyhow!("poisoned"))?.push(child);
        Ok(())
    }

    /// The process ids of a node's keepers.
    pub fn keeper_pids(&self, node: &str) -> Result<Vec<u32>> {
        cgroup::processes(&mesh::keeper_cgroup(&self.cgroup, node))
    }

    /// Asks processes to end (SIGTERM).
    pub fn terminate(&self, pids: &[u32]) {
        mesh::terminate(pids);
        self.reap();
    }

    /// A page of the newest agent's admin socket.
    pub fn admin(&self, node: &str, page: &str) -> Result<String> {
        let socket = mesh::admin_socket(&self.name, node).display().to_string();
        let url = format!("http://agent{page}");
        let argv = ["curl", "-sS", "--max-time", "5", "--unix-socket", &socket, &url];
        self.exec_in(Place::Node(node), &argv)?.ok()
    }

    /// The resident memory of processes, in KiB.
    pub fn memory(&self, pids: &[u32]) -> Result<u64> {
        let mut sum = 0;
        for pid in pids {
            let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
            let number = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
            sum += number.context("no VmRSS")?;
        }
        Ok(sum)
    }

    /// Kills every keeper of a node at once (SIGKILL).
    pub fn kill_keeper(&self, node: &str) -> Result<()> {
        cgroup::kill(&mesh::keeper_cgroup(&self.cgroup, node))?;
        self.reap();
        Ok(())
    }

    /// The process ids of a node's agents, of every generation.
    pub fn agent_pids(&self, node: &str) -> Result<Vec<u32>> {
        cgroup::processes(&mesh::agent_cgroup(&self.cgroup, node))
    }

    /// Kills the controller at once (SIGKILL).
    pub fn kill_controller(&self) -> Result<()> {
        cgroup::kill(&mesh::controller_cgroup(&self.cgroup))?;
        self.reap();
        Ok(())
    }

    /// Starts the controller and waits until operators can talk to it.
    pub fn start_controller(&self) -> Result<()> {
        let child = mesh::start_controller(&self.state()?, &self.cgroup)?;
        self.children.lock().map_err(|_| anyhow!("poisoned"))?.push(child);
        Ok(())
    }

    /// Records what passes between the nodes; `filter` is tcpdump's language, empty for everything.
    pub fn capture(&self, filter: &str) -> Result<Capture> {
        let number = state::change(&self.name, |state| {
            state.counter += 1;
            Ok(state.counter)
        })?;
        let file = self.directory().join("logs").join(format!("capture-{number}.pcap"));
        let path = file.display().to_string();
        let wanted = match filter {
            "" => String::new(),
            filter => format!("({filter}) or udp port {END_PORT}"),
        };
        let mut argv = vec![
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
        ];
        argv.extend(["-w", &path, &wanted]);
        let tcpdump = self.background_in(Place::Fabric, &argv)?;
        wait::until("tcpdump's start", SCRAPE_LIMIT, || {
            let said = tcpdump.stderr();
            if said.contains("listening on") {
                Ok(Some(()))
            } else {
                bail!("it says: {said}")
            }
        })?;
        let plan = self.state()?.plan();
        Ok(Capture {
            tcpdump,
            file,
            netns: plan::fabric_netns(&self.name),
            beyond: plan.controller().v4.into(),
        })
    }

    /// Takes the exit codes of children that ended, so that no zombie stays.
    fn reap(&self) {
        if let Ok(mut children) = self.children.lock() {
            children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.owned {
            if thread::panicking() {
                eprintln!("{}", self.failure_report());
            }
            if let Err(error) = remove(&self.name) {
                eprintln!("lab {}: {error:#}", self.name);
            }
        }
        self.reap();
    }
}

impl Lab {
    /// What a failed test shows: the ends of the logs of the mesh's programs.
    fn failure_report(&self) -> String {
        let mut text = format!("--- lab {} ---\n", self.name);
        if let Ok(entries) = fs::read_dir(self.directory().join("logs")) {
            let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
            files.retain(|file| file.extension().is_some_and(|extension| extension == "log"));
            files.sort();
            for file in files {
                text.push_str(&format!("--- {}\n{}\n", file.display(), mesh::tail(&file)));
            }
        }
        text
    }
}

/// A running capture of the fabric.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Background,
    file: PathBuf,
    netns: String,
    beyond: IpAddr,
}

impl Capture {
    /// Ends the capture and gives its bytes in pcap's format. Everything that passed before this call is in it: a last
    /// packet is sent and awaited.
    pub fn stop(self) -> Result<Vec<u8>> {
        wait::until("the last packet of the capture", SCRAPE_LIMIT, || {
            netns::within(&self.netns, || {
                let socket = std::net::UdpSocket::bind(("0.0.0.0", 0))?;
                Ok(socket.send_to(END_MARK.as_bytes(), (self.beyond, END_PORT))?)
            })?;
            let bytes = fs::read(&self.file)?;
            let ended = bytes
                .windows(END_MARK.len())
                .any(|window| window == END_MARK.as_bytes());
            Ok(ended.then_some(()))
        })?;
        let output = self.tcpdump.interrupt(SCRAPE_LIMIT)?;
        ensure!(
            output.stderr.contains("packets captured"),
            "tcpdump did not end well: {output}"
        );
        fs::read(&self.file).with_context(|| format!("read {}", self.file.display()))
    }

    /// The file that is being written.
    pub fn file(&self) -> &Path {
        &self.file
    }
}

/// Removes a lab by its name, whatever state it is in. One that does not exist is fine.
pub fn remove(name: &str) -> Result<()> {
    netns::require_root()?;
    plan::check_name(name)?;
    let group = cgroup::of_lab(name)?;
    let prefix = plan::prefix(name);
    let directory = state::directory(name);
    cgroup::kill(&group)?;
    cgroup::remove(&group)?;
    let _lock = state::machine_lock()?;
    mesh::unmount_below(&directory)?;
    netns::remove(&netns::list(&prefix))?;
    kubelet::remove_etc(&prefix)?;
    if directory.exists() {
        fs::remove_dir_all(&directory).with_context(|| format!("remove {}", directory.display()))?;
    }
    Ok(())
}

/// Removes a lab that was kept or whose owner is gone; one that somebody works with is an error.
pub fn replace(name: &str) -> Result<()> {
    if let Ok(state) = state::load(name)
        && let Some(owner) = state.owner
    {
        ensure!(
            !owner.alive() || owner == Process::current(),
            "the lab {name:?} belongs to process {}, which still runs",
            owner.pid
        );
    }
    remove(name)
}

/// Removes the labs whose owner is gone.
pub fn sweep() -> Result<()> {
    for name in state::labs() {
        if let Ok(state) = state::load(&name)
            && state.owner.is_some_and(|owner| !owner.alive())
        {
            remove(&name)?;
        }
    }
    Ok(())
}

/// Reads a manifest file, or every `*.yaml` and `*.yml` of a directory in the order of their names.
pub fn read_manifests(path: &Path) -> Result<Vec<Item>> {
    let mut files = Vec::new();
    if path.is_dir() {
        let entries = fs::read_dir(path).with_context(|| format!("read {}", path.display()))?;
        files.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
        files.retain(|file| matches!(file.extension().and_then(|e| e.to_str()), Some("yaml" | "yml")));
        files.sort();
    } else {
        files.push(path.to_path_buf());
    }
    let mut items = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        items.extend(kube::parse(&file.display().to_string(), &text)?);
    }
    Ok(items)
}
