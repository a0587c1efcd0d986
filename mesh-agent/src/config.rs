//! The agent's configuration: one YAML file, then flags, then every problem at once.
//!
//! Nested by component; each component is built from its own part and reads no environment and no global. Unknown keys
//! are refused, because a misspelt guard is no guard. Reading decides nothing about the running agent.

use std::{
    collections::BTreeSet,
    fmt,
    net::{Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use mesh_api::{identity::TrustDomain, policy};
use serde::de::DeserializeOwned;
use serde_yaml_ng::{Mapping, Value};

use crate::{
    event::{self, Compat, LogFormat},
    kernel::{FailMode, cgroup2_root},
    tunnel::PeerPatience,
    view::ControllerConfig,
    worker::PathConfig,
};

/// Namespaces whose pods need not wait for the API: the controller's own, which is asked for all others, and the
/// cluster's, on which the controller depends.
const TRUSTED_NAMESPACES: [&str; 2] = ["kube-system", "nodemesh-system"];

/// Where an agent keeps what outlives a restart, unless it is told.
pub const STATE_DIR: &str = "/var/lib/nodemesh/agent";
/// The most data workers.
pub const WORKERS_MAX: usize = 256;

/// Everything that the agent is told at its start.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// The node's name, as in the Pods' `nodeName`.
    pub node: String,
    /// The trust domain of all identities.
    pub trust_domain: TrustDomain,
    /// What outlives a restart: the node's certificate and the last good snapshot.
    pub state_dir: PathBuf,
    /// Data workers; each has a core's worth of connections.
    pub workers: usize,
    /// Where the controller is and how it is believed.
    pub controller: ControllerConfig,
    /// The kernel side.
    pub kernel: KernelSection,
    /// How pods are found; none in standalone mode, where they name their network namespaces.
    pub kubernetes: Option<KubernetesConfig>,
    /// The socket of the keeper that holds the pods' listeners while no agent serves.
    pub keeper: Option<PathBuf>,
    /// Where the agent itself can be asked.
    pub admin: AdminConfig,
    /// Diagnostics.
    pub log: LogConfig,
    /// One line per connection and request.
    pub access_log: AccessLogConfig,
    /// The traffic families.
    pub metrics: MetricsConfig,
    /// Bounds and times of the data path.
    pub path: PathConfig,
    /// How the agent ends.
    pub drain: DrainConfig,
}

/// The kernel side.
#[derive(Clone, Debug)]
pub struct KernelSection {
    /// The cgroup2 directory under which pods run.
    pub cgroup: PathBuf,
    /// The bpffs directory below which instances keep their pins.
    pub pin_root: PathBuf,
    /// Tells this agent's pins from those of another on the same machine.
    pub instance: String,
    /// What happens to captured pods while no agent serves.
    pub fail_mode: FailMode,
    /// Whether the kernel programs log each decision.
    pub debug: bool,
}

/// How pods are found on a node of Kubernetes.
#[derive(Clone, Debug)]
pub struct KubernetesConfig {
    /// Whether pods that nobody has classified yet are refused; else they go on unguarded.
    pub refuses_unclassified: bool,
    /// Namespaces whose pods need not wait for the API.
    pub trusted_namespaces: BTreeSet<String>,
    /// The kubelet's directory of pods' logs, which tells their names.
    pub pod_logs: PathBuf,
    /// How long after the node's start an agent that finds nothing captured ends what enrolled pods have connected to.
    pub boot_window: Duration,
}

/// Where the agent itself can be asked.
#[derive(Clone, Debug)]
pub struct AdminConfig {
    /// `/metrics`.
    pub metrics: SocketAddr,
    /// `/readyz` and `/livez`.
    pub health: SocketAddr,
    /// `/debug/*`; root only.
    pub socket: PathBuf,
}

/// Diagnostics on standard error.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// A filter as `tracing` reads it.
    pub filter: String,
    /// The lines' form.
    pub format: LogFormat,
}

/// One line per connection and request.
#[derive(Clone, Debug)]
pub struct AccessLogConfig {
    /// Whether lines are written.
    pub enabled: bool,
    /// The lines' form.
    pub format: LogFormat,
    /// The file; standard output without one.
    pub path: Option<PathBuf>,
}

/// The traffic families.
#[derive(Clone, Debug)]
pub struct MetricsConfig {
    /// Whose names.
    pub compat: Compat,
    /// The most series.
    pub series_max: usize,
    /// How long a series stays after it moved last.
    pub series_idle: Duration,
}

/// How the agent ends.
#[derive(Clone, Copy, Debug)]
pub struct DrainConfig {
    /// How long connections may end by themselves: 1 h with a keeper, else 30 s.
    pub patience: Duration,
    /// The same when a keeper holds new connections back and no other agent has taken over: the sooner this one ends,
    /// the sooner the next one serves them.
    pub alone: Duration,
    /// How long a connection between two requests is kept for a last one when another agent has taken over; more than
    /// the time after which sources close idle connections by themselves.
    pub idle: Duration,
    /// How long those that are told to end may take.
    pub grace: Duration,
}

/// One thing that is wrong with the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigProblem {
    /// Where: `controller.address`.
    pub path: String,
    /// What.
    pub message: String,
}

/// Everything that is wrong with the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError(pub Vec<ConfigProblem>);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, problem) in self.0.iter().enumerate() {
            if n > 0 {
                f.write_str("\n")?;
            }
            match problem.path.as_str() {
                "" => write!(f, "configuration: {}", problem.message)?,
                path => write!(f, "configuration: {path}: {}", problem.message)?,
            }
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

/// What the command line may say in place of the file.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ConfigFlags {
    /// The YAML file; flags win over it
    #[arg(long, short = 'c', value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The node's name
    #[arg(long, env = "NODEMESH_NODE")]
    pub node: Option<String>,
    /// The trust domain of all identities [default: cluster.local]
    #[arg(long, value_name = "DOMAIN")]
    pub trust_domain: Option<String>,
    /// What outlives a restart [default: /var/lib/nodemesh/agent]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Data workers [default: one per core]
    #[arg(long, value_name = "N")]
    pub workers: Option<u64>,
    /// The controller's gRPC address
    #[arg(long, value_name = "HOST:PORT")]
    pub controller: Option<String>,
    /// PEM file with the roots that the controller's certificate must lead to
    #[arg(long, value_name = "FILE")]
    pub trust_bundle: Option<PathBuf>,
    /// File with the join token
    #[arg(long, value_name = "FILE")]
    pub join_token_file: Option<PathBuf>,
    /// The cgroup2 directory under which pods run [default: where cgroup2 is mounted]
    #[arg(long, value_name = "DIR")]
    pub cgroup: Option<PathBuf>,
    /// The bpffs directory of all instances [default: /sys/fs/bpf/nodemesh]
    #[arg(long, value_name = "DIR")]
    pub pin_root: Option<PathBuf>,
    /// Tells this agent's pins from those of another on the same machine [default: the node's name]
    #[arg(long, value_name = "NAME")]
    pub instance: Option<String>,
    /// The socket of the keeper that holds the pods' listeners while no agent serves
    #[arg(long, value_name = "PATH")]
    pub keeper: Option<PathBuf>,
    /// What happens to captured pods' connections while no agent serves: hold (needs a keeper), refuse or pass
    /// [default: hold with a keeper, else refuse]
    #[arg(long, value_name = "MODE")]
    pub fail_mode: Option<String>,
    /// Find pods as a kubelet's, by their UIDs
    #[arg(long)]
    pub kubernetes: bool,
    /// What happens to pods that nobody has classified yet: refuse or pass [default: refuse]
    #[arg(long, value_name = "MODE")]
    pub unclassified: Option<String>,
    /// Address of /metrics [default: [::]:15020]
    #[arg(long, value_name = "ADDRESS")]
    pub metrics_address: Option<String>,
    /// Address of /readyz and /livez [default: [::]:15021]
    #[arg(long, value_name = "ADDRESS")]
    pub health_address: Option<String>,
    /// The admin socket [default: /run/nodemesh/agent.sock]
    #[arg(long, value_name = "PATH")]
    pub admin_socket: Option<PathBuf>,
    /// Diagnostics filter [default: info]
    #[arg(long, env = "NODEMESH_LOG")]
    pub log: Option<String>,
    /// Diagnostics format: text or json [default: json]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// Access log: json, text or off [default: json]
    #[arg(long, value_name = "FORMAT")]
    pub access_log: Option<String>,
    /// File of the access log [default: standard output]
    #[arg(long, value_name = "FILE")]
    pub access_log_path: Option<PathBuf>,
    /// Metric names: nodemesh or istio [default: nodemesh]
    #[arg(long, value_name = "NAMES")]
    pub metrics_compat: Option<String>,
}

impl AgentConfig {
    /// Reads the file that the flags name, puts the flags over it and checks the whole.
    pub fn load(flags: &ConfigFlags) -> Result<AgentConfig, ConfigError> {
        let text = match &flags.config {
            Some(path) => std::fs::read_to_string(path).map_err(|error| {
                ConfigError(vec![ConfigProblem {
                    path: String::new(),
                    message: format!("cannot read {}: {error}", path.display()),
                }])
            })?,
            None => String::new(),
        };
        AgentConfig::parse(&text, flags)
    }

    /// The same with the file's text.
    pub fn parse(text: &str, flags: &ConfigFlags) -> Result<AgentConfig, ConfigError> {
        let mut problems = Vec::new();
        let mut document = match serde_yaml_ng::from_str::<Value>(text) {
            Ok(Value::Null) => Mapping::new(),
            Ok(Value::Mapping(mapping)) => mapping,
            Ok(_) => return Err(single("expected a mapping at the top")),
            Err(error) => return Err(single(&error.to_string())),
        };
        flags.put_over(&mut document, &mut problems);
        let config = read(document, &mut problems);
        match config {
            Some(config) if problems.is_empty() => Ok(config),
            _ => Err(ConfigError(problems)),
        }
    }

    /// The directory of this instance's pins. The ABI's version is part of it: a new agent never takes maps whose
    /// layout it does not know.
    pub fn pin_dir(&self) -> PathBuf {
        pin_dir(&self.kernel.pin_root, &self.kernel.instance)
    }
}

/// The instance of a node that names none: its pins are in a directory of a bpffs, where no name has a dot.
pub fn instance_of(node: &str) -> String {
    node.replace('.', "_")
}

/// The directory of an instance's pins.
pub fn pin_dir(pin_root: &Path, instance: &str) -> PathBuf {
    pin_root.join(format!("{instance}-v{}", mesh_abi::ABI_VERSION))
}

fn single(message: &str) -> ConfigError {
    ConfigError(vec![ConfigProblem {
        path: String::new(),
        message: message.to_owned(),
    }])
}

/// A key that is missing on purpose has no default.
const NO_DEFAULT: &str = "is missing";

/// Reads one mapping key by key, gathers problems, and reports at its end the keys that nobody asked for.
struct Section<'a> {
    path: &'static str,
    keys: Mapping,
    known: Vec<&'static str>,
    problems: &'a mut Vec<ConfigProblem>,
}

impl<'a> Section<'a> {
    fn top(keys: Mapping, problems: &'a mut Vec<ConfigProblem>) -> Section<'a> {
        Section {
            path: "",
            keys,
            known: Vec::new(),
            problems,
        }
    }

    fn section(&mut self, name: &'static str) -> Section<'_> {
        self.known.push(name);
        let keys = match self.keys.remove(name) {
            None | Some(Value::Null) => Mapping::new(),
            Some(Value::Mapping(keys)) => keys,
            Some(_) => {
                self.problem(name, "expected a mapping");
                Mapping::new()
            }
        };
        Section {
            path: name,
            keys,
            known: Vec::new(),
            problems: self.problems,
        }
    }

    fn problem(&mut self, key: &str, message: impl Into<String>) {
        let path = match (self.path, key) {
            ("", key) => key.to_owned(),
            (path, key) => format!("{path}.{key}"),
        };
        self.problems.push(ConfigProblem {
            path,
            message: message.into(),
        });
    }

    fn optional<T: DeserializeOwned>(&mut self, key: &'static str) -> Option<T> {
        self.known.push(key);
        match self.keys.remove(key) {
            None | Some(Value::Null) => None,
            Some(value) => match serde_yaml_ng::from_value(value) {
                Ok(value) => Some(value),
                Err(error) => {
                    self.problem(key, error.to_string());
                    None
                }
            },
        }
    }

    fn or<T: DeserializeOwned>(&mut self, key: &'static str, default: T) -> T {
        self.optional(key).unwrap_or(default)
    }

    fn required<T: DeserializeOwned>(&mut self, key: &'static str) -> Option<T> {
        let before = self.problems.len();
        let value = self.optional(key);
        if value.is_none() && self.problems.len() == before {
            self.problem(key, NO_DEFAULT);
        }
        value
    }

    /// A text that another parser reads.
    fn parsed<T>(&mut self, key: &'static str, default: T, parse: impl Fn(&str) -> Result<T, String>) -> T {
        match self.optional::<String>(key).map(|text| parse(&text)) {
            None => default,
            Some(Ok(value)) => value,
            Some(Err(message)) => {
                self.problem(key, message);
                default
            }
        }
    }

    fn duration(&mut self, key: &'static str, default: Duration) -> Duration {
        self.parsed(key, default, |text| {
            text.parse::<policy::Duration>()
                .map(policy::Duration::as_std)
                .map_err(|error| format!("{error}, expected a form such as 10s, 1m30s or 500ms"))
        })
    }

    /// A time that the kernel counts in whole seconds.
    fn seconds(&mut self, key: &'static str, default: Duration) -> Duration {
        let value = self.duration(key, default);
        if value >= Duration::from_secs(2) {
            return value;
        }
        self.problem(key, format!("{value:?} is too short, expected at least 2s"));
        default
    }

    fn bounded(&mut self, key: &'static str, default: usize, min: usize, max: usize) -> usize {
        let value = self.or(key, default);
        if (min..=max).contains(&value) {
            return value;
        }
        self.problem(key, format!("{value} is out of range, expected {min} to {max}"));
        default
    }

    fn word<T: Copy>(&mut self, key: &'static str, default: T, words: &[(&str, T)]) -> T {
        self.parsed(key, default, |text| {
            words
                .iter()
                .find(|(word, _)| *word == text)
                .map(|(_, value)| *value)
                .ok_or_else(|| {
                    let expected: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
                    format!("unknown value {text:?}, expected {}", expected.join(" or "))
                })
        })
    }

    fn end(mut self) {
        let unknown: Vec<String> = self
            .keys
            .keys()
            .map(|key| key.as_str().map_or_else(|| format!("{key:?}"), str::to_owned))
            .collect();
        let known = self.known.join(", ");
        for key in unknown {
            self.problem(&key, format!("unknown key, expected one of: {known}"));
        }
    }
}

fn read(document: Mapping, problems: &mut Vec<ConfigProblem>) -> Option<AgentConfig> {
    let mut top = Section::top(document, problems);
    let node: Option<String> = top.required("node");
    let trust_domain = {
        let text: String = top.or("trustDomain", "cluster.local".to_owned());
        match TrustDomain::new(&text) {
            Ok(domain) => Some(domain),
            Err(error) => {
                top.problem("trustDomain", error.to_string());
                None
            }
        }
    };
    if let (Some(node), Some(domain)) = (&node, &trust_domain)
        && let Err(error) = mesh_api::identity::SpiffeId::node(domain, node)
    {
        top.problem("node", error.to_string());
    }
    let state_dir = top.or("stateDir", PathBuf::from(STATE_DIR));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = top.bounded("workers", cores.min(WORKERS_MAX), 1, WORKERS_MAX);
    let controller = read_controller(top.section("controller"));
    let keeper: Option<PathBuf> = top.optional("keeper");
    let has_keeper = keeper.is_some();
    let kernel = read_kernel(top.section("kernel"), node.as_deref(), has_keeper);
    let kubernetes = read_kubernetes(top.section("kubernetes"), kernel.fail_mode);
    let admin = read_admin(top.section("admin"));

    let mut section = top.section("log");
    let formats = [("json", LogFormat::Json), ("text", LogFormat::Text)];
    let log = LogConfig {
        filter: section.parsed("filter", "info".to_owned(), |text| {
            text.parse::<tracing_subscriber::EnvFilter>()
                .map(|_| text.to_owned())
                .map_err(|error| error.to_string())
        }),
        format: section.word("format", LogFormat::Json, &formats),
    };
    section.end();
    let mut section = top.section("accessLog");
    let access_log = AccessLogConfig {
        enabled: section.or("enabled", true),
        format: section.word("format", LogFormat::Json, &formats),
        path: section.optional("path"),
    };
    section.end();
    let mut section = top.section("metrics");
    let metrics = MetricsConfig {
        compat: section.word(
            "compat",
            Compat::Nodemesh,
            &[("nodemesh", Compat::Nodemesh), ("istio", Compat::Istio)],
        ),
        series_max: section.bounded("seriesMax", event::SERIES_MAX, 16, 1_000_000),
        series_idle: section.duration("seriesIdle", event::SERIES_IDLE),
    };
    section.end();
    let path = read_path(top.section("path"));
    let mut section = top.section("drain");
    let drain = DrainConfig {
        // Beside a keeper another agent serves meanwhile, so that nothing is lost by waiting long.
        patience: section.duration("patience", Duration::from_secs(if has_keeper { 3600 } else { 30 })),
        alone: section.duration("alone", Duration::from_secs(5)),
        idle: section.duration("idle", Duration::from_secs(90)),
        grace: section.duration("grace", Duration::from_secs(5)),
    };
    section.end();
    top.end();
    Some(AgentConfig {
        node: node?,
        trust_domain: trust_domain?,
        state_dir,
        workers,
        controller: controller?,
        kernel,
        kubernetes,
        keeper,
        admin,
        log,
        access_log,
        metrics,
        path,
        drain,
    })
}

fn read_controller(mut section: Section<'_>) -> Option<ControllerConfig> {
    let address: Option<String> = section.required("address");
    if let Some(address) = &address
        && !is_host_and_port(address)
    {
        section.problem("address", format!("{address:?} is not of the form host:port"));
    }
    let trust_bundle = section.required("trustBundle");
    let join_token_file = section.optional("joinTokenFile");
    let connect_timeout = section.duration("connectTimeout", Duration::from_secs(5));
    let call_timeout = section.duration("callTimeout", Duration::from_secs(20));
    let retry_max = section.duration("retryMax", Duration::from_secs(30));
    section.end();
    Some(ControllerConfig {
        address: address?,
        trust_bundle: trust_bundle?,
        join_token_file,
        connect_timeout,
        call_timeout,
        retry_max,
    })
}

fn is_host_and_port(address: &str) -> bool {
    address
        .rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0))
}

fn read_kernel(mut section: Section<'_>, node: Option<&str>, keeper: bool) -> KernelSection {
    let modes = [
        ("hold", FailMode::Hold),
        ("refuse", FailMode::Refuse),
        ("pass", FailMode::Pass),
    ];
    let default = if keeper { FailMode::Hold } else { FailMode::Refuse };
    let fail_mode = section.word("failMode", default, &modes);
    match (fail_mode, keeper) {
        (FailMode::Hold, false) => {
            section.problem(
                "failMode",
                "hold needs a keeper, but none is configured: expected refuse or pass",
            );
        }
        // Its listeners are there although no agent is, so nothing is ever refused or let through.
        (FailMode::Refuse | FailMode::Pass, true) => {
            section.problem("failMode", "a keeper holds connections: expected hold, or no keeper");
        }
        (FailMode::Hold, true) | (FailMode::Refuse | FailMode::Pass, false) => {}
    }
    let kernel = KernelSection {
        cgroup: section.or(
            "cgroup",
            cgroup2_root().unwrap_or_else(|_| PathBuf::from("/sys/fs/cgroup")),
        ),
        pin_root: section.or("pinRoot", PathBuf::from("/sys/fs/bpf/nodemesh")),
        // A node's name may have dots, and no underscore.
        instance: section.or("instance", instance_of(node.unwrap_or_default())),
        fail_mode,
        debug: section.or("debug", false),
    };
    // The kernel refuses dots in the names of a bpffs, and slashes would leave the directory.
    let good = kernel
        .instance
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
    if !good || (kernel.instance.is_empty() && node.is_some()) {
        section.problem(
            "instance",
            format!("{:?}: expected letters, digits, '-' and '_'", kernel.instance),
        );
    }
    section.end();
    kernel
}

fn read_kubernetes(mut section: Section<'_>, fail_mode: FailMode) -> Option<KubernetesConfig> {
    let is_enabled = section.or("enabled", false);
    // Where captured pods go on unguarded, others need not be guarded either.
    let default = fail_mode != FailMode::Pass;
    let config = KubernetesConfig {
        refuses_unclassified: section.word("unclassified", default, &[("refuse", true), ("pass", false)]),
        trusted_namespaces: section.or("trustedNamespaces", TRUSTED_NAMESPACES.map(str::to_owned).into()),
        pod_logs: section.or("podLogs", PathBuf::from("/var/log/pods")),
        boot_window: section.duration("bootWindow", Duration::from_secs(600)),
    };
    section.end();
    is_enabled.then_some(config)
}

fn read_admin(mut section: Section<'_>) -> AdminConfig {
    let parse = |text: &str| {
        text.parse::<SocketAddr>()
            .map_err(|_| format!("{text:?} is not an address, expected a form such as 0.0.0.0:15020 or [::]:15020"))
    };
    let any = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let admin = AdminConfig {
        metrics: section.parsed("metrics", any(15020), parse),
        health: section.parsed("health", any(15021), parse),
        socket: section.or("socket", PathBuf::from("/run/nodemesh/agent.sock")),
    };
    section.end();
    admin
}

fn read_path(mut section: Section<'_>) -> PathConfig {
    let default = PathConfig::default();
    let idle = section.duration("idleTimeout", default.idle_timeout.unwrap_or_default());
    let path = PathConfig {
        connections_max: section.bounded("connectionsMax", default.connections_max, 1, 1_000_000),
        silence: section.duration("silence", default.silence),
        handshake_timeout: section.duration("handshakeTimeout", default.handshake_timeout),
        dial_timeout: section.duration("dialTimeout", default.dial_timeout),
        view_patience: section.duration("viewPatience", default.view_patience),
        idle_timeout: (!idle.is_zero()).then_some(idle),
        peer_patience: PeerPatience {
            requests: section.seconds("peerPatience", default.peer_patience.requests),
            flows: section.seconds("flowPeerPatience", default.peer_patience.flows),
        },
    };
    section.end();
    path
}

impl ConfigFlags {
    fn put_over(&self, document: &mut Mapping, problems: &mut Vec<ConfigProblem>) {
        fn text(path: &Option<PathBuf>) -> Option<Value> {
            path.as_ref()
                .map(|path| Value::from(path.to_string_lossy().into_owned()))
        }
        let word = |value: &Option<String>| value.clone().map(Value::from);
        let access_log = match self.access_log.as_deref() {
            None => (None, None),
            Some("off") => (Some(Value::from(false)), None),
            Some(format) => (Some(Value::from(true)), Some(Value::from(format))),
        };
        let values = [
            ("", "node", word(&self.node)),
            ("", "trustDomain", word(&self.trust_domain)),
            ("", "stateDir", text(&self.state_dir)),
            ("", "workers", self.workers.map(Value::from)),
            ("", "keeper", text(&self.keeper)),
            ("controller", "address", word(&self.controller)),
            ("controller", "trustBundle", text(&self.trust_bundle)),
            ("controller", "joinTokenFile", text(&self.join_token_file)),
            ("kernel", "cgroup", text(&self.cgroup)),
            ("kernel", "pinRoot", text(&self.pin_root)),
            ("kernel", "instance", word(&self.instance)),
            ("kernel", "failMode", word(&self.fail_mode)),
            ("kubernetes", "enabled", self.kubernetes.then_some(Value::from(true))),
            ("kubernetes", "unclassified", word(&self.unclassified)),
            ("admin", "metrics", word(&self.metrics_address)),
            ("admin", "health", word(&self.health_address)),
            ("admin", "socket", text(&self.admin_socket)),
            ("log", "filter", word(&self.log)),
            ("log", "format", word(&self.log_format)),
            ("accessLog", "enabled", access_log.0),
            ("accessLog", "format", access_log.1),
            ("accessLog", "path", text(&self.access_log_path)),
            ("metrics", "compat", word(&self.metrics_compat)),
        ];
        for (section, key, value) in values {
            let Some(value) = value else { continue };
            if section.is_empty() {
                document.insert(key.into(), value);
                continue;
            }
            let entry = document.entry(section.into()).or_insert(Value::Null);
            if entry.is_null() {
                *entry = Value::Mapping(Mapping::new());
            }
            match entry {
                Value::Mapping(keys) => {
                    keys.insert(key.into(), value);
                }
                // `read` reports it.
                _ => problems.push(ConfigProblem {
                    path: section.to_owned(),
                    message: format!("is not a mapping, so that the flag for {key} has no place"),
                }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = "
node: node-1
trustDomain: mesh.test
stateDir: /tmp/state
workers: 3
controller: {address: 'controller:15010', trustBundle: /etc/bundle.pem, joinTokenFile: /etc/token, retryMax: 1m}
kernel: {cgroup: /sys/fs/cgroup/lab, instance: lab-1, failMode: pass}
kubernetes: {enabled: true, trustedNamespaces: [a, b], podLogs: /logs}
admin: {metrics: '127.0.0.1:1', health: '[::1]:2', socket: /tmp/s}
log: {filter: 'mesh_agent=debug,info', format: text}
accessLog: {enabled: false, format: text, path: /tmp/log}
metrics: {compat: istio, seriesMax: 100, seriesIdle: 5m}
path: {idleTimeout: 1h, connectionsMax: 7, silence: 50ms, flowPeerPatience: 5m}
drain: {patience: 1s}
";

    fn flags() -> ConfigFlags {
        ConfigFlags::default()
    }

    #[test]
    fn a_whole_file_is_read() {
        let config = AgentConfig::parse(WHOLE, &flags()).unwrap();
        assert_eq!((config.node.as_str(), config.workers), ("node-1", 3));
        assert_eq!(config.controller.retry_max, Duration::from_secs(60));
        assert_eq!(config.kernel.fail_mode, FailMode::Pass);
        let kubernetes = config.kubernetes.as_ref().unwrap();
        assert!(!kubernetes.refuses_unclassified, "by the fail mode");
        assert!(kubernetes.trusted_namespaces.iter().eq(["a", "b"]));
        assert_eq!(config.metrics.compat, Compat::Istio);
        assert_eq!(config.path.idle_timeout, Some(Duration::from_secs(3600)));
        assert_eq!(
            (config.path.connections_max, config.path.silence),
            (7, Duration::from_millis(50))
        );
        let patience = config.path.peer_patience;
        assert_eq!((patience.requests.as_secs(), patience.flows.as_secs()), (20, 300));
        assert!(!config.access_log.enabled);
        assert!(config.pin_dir().starts_with("/sys/fs/bpf/nodemesh"));
        assert!(config.pin_dir().to_string_lossy().contains("lab-1-v"));
    }

    #[test]
    fn flags_win_and_are_enough_alone() {
        let flags = ConfigFlags {
            node: Some("node-2".into()),
            controller: Some("[::1]:15010".into()),
            trust_bundle: Some("/b".into()),
            access_log: Some("text".into()),
            workers: Some(1),
            ..ConfigFlags::default()
        };
        let config = AgentConfig::parse("", &flags).unwrap();
        assert_eq!(
            (config.node.as_str(), config.kernel.instance.as_str()),
            ("node-2", "node-2")
        );
        assert_eq!(config.admin.metrics.port(), 15020);
        assert!(config.kubernetes.is_none());
        let kubernetes = ConfigFlags {
            kubernetes: true,
            node: Some("ip-10-0-0-1.example.org".into()),
            ..flags.clone()
        };
        let kubernetes = AgentConfig::parse("", &kubernetes).unwrap();
        assert!(kubernetes.kubernetes.unwrap().refuses_unclassified);
        assert_eq!(kubernetes.kernel.instance, "ip-10-0-0-1_example_org");
        assert_eq!(config.trust_domain.as_str(), "cluster.local");
        let over = AgentConfig::parse(WHOLE, &flags).unwrap();
        assert_eq!((over.node.as_str(), over.kernel.instance.as_str()), ("node-2", "lab-1"));
        assert!(over.access_log.enabled);
        let off = ConfigFlags {
            access_log: Some("off".into()),
            ..flags
        };
        assert!(!AgentConfig::parse("", &off).unwrap().access_log.enabled);
    }

    #[test]
    fn every_problem_is_told_at_once() {
        let text = "
node: 'a b'
trustDomain: Upper
workers: 0
nod: x
controller: {address: nowhere, trustBundel: /b}
kernel: {failMode: shut, instance: 'a/b'}
admin: {metrics: 15020}
log: {filter: 'a=b=c', format: xml}
path: {silence: soon}
drain: 3
";
        let error = AgentConfig::parse(text, &flags()).unwrap_err();
        let paths: Vec<&str> = error.0.iter().map(|problem| problem.path.as_str()).collect();
        assert_eq!(
            paths,
            [
                "trustDomain",
                "workers",
                "controller.address",
                "controller.trustBundle",
                "controller.trustBundel",
                "kernel.failMode",
                "kernel.instance",
                "admin.metrics",
                "log.filter",
                "log.format",
                "path.silence",
                "drain",
                "nod",
            ],
            "{error}"
        );
        let text = error.to_string();
        assert!(
            text.contains("kernel.failMode: unknown value \"shut\", expected hold or refuse or pass"),
            "{text}"
        );
    }

    #[test]
    fn the_fail_mode_fits_the_keeper() {
        let cases = [
            (None, None, Ok(FailMode::Refuse)),
            (None, Some("pass"), Ok(FailMode::Pass)),
            (Some("/run/k"), None, Ok(FailMode::Hold)),
            (Some("/run/k"), Some("hold"), Ok(FailMode::Hold)),
            (None, Some("hold"), Err("hold needs a keeper")),
            (Some("/run/k"), Some("refuse"), Err("a keeper holds connections")),
            (Some("/run/k"), Some("pass"), Err("a keeper holds connections")),
        ];
        for (keeper, mode, expected) in cases {
            let flags = ConfigFlags {
                node: Some("node-2".into()),
                controller: Some("c:15010".into()),
                trust_bundle: Some("/b".into()),
                keeper: keeper.map(PathBuf::from),
                fail_mode: mode.map(str::to_owned),
                ..ConfigFlags::default()
            };
            let found = AgentConfig::parse("", &flags);
            match (found, expected) {
                (Ok(config), Ok(mode)) => assert_eq!(config.kernel.fail_mode, mode),
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{error}"),
                (found, expected) => panic!("{keeper:?} {mode:?}: {found:?}, expected {expected:?}"),
            }
        }
    }

    #[test]
    fn what_is_no_mapping_is_refused() {
        for text in ["- a", "word", "a: [", "node: n\nnode: m"] {
            assert!(AgentConfig::parse(text, &flags()).is_err(), "{text}");
        }
    }
}
