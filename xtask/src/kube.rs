//! `cargo xtask kube`: a real Kubernetes on this machine, and the Gateway API's conformance suite for meshes.
//!
//! Everything is built from Go modules into a cache outside of the repository, as the developer; `tests/kube/up` then
//! starts a cluster as root. The environment variable `NODEMESH_KUBE` names the cluster; clusters of different names
//! run beside each other.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand, ValueEnum};
use mesh_tests::cluster::{self, Cluster};

use crate::{
    build, conform,
    image::{self, Files, Image, Platform},
    setup, shell, test_image,
};

/// The version that the cluster's programs are built from and report; `tests/kube/kubebin/go.mod` says the same.
const KUBERNETES: &str = "1.35.4";
/// The version of the Prometheus Operator whose definitions the manifests for it are checked against.
const PROMETHEUS_OPERATOR: &str = "v0.85.0";
/// The oldest Go that builds them.
const GO_MINOR_MIN: u32 = 26;
/// The programs in the one binary.
const PROGRAMS: [&str; 8] = [
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "kubectl",
    "minidns",
];
/// Where programs, images and definitions lie: shared by all clusters of this developer.
const CACHE_VARIABLE: &str = "NODEMESH_KUBE_CACHE";

/// The cluster and what to do with it.
#[derive(Debug, Args)]
pub struct Options {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Builds Kubernetes, the test images and the conformance suite; minutes for the first time, then seconds.
    Build,
    /// Starts a cluster; returns when every node is Ready.
    Up(Up),
    /// Removes a cluster, also one whose start was killed.
    Down,
    /// Runs kubectl.
    Kubectl {
        /// kubectl's arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Runs any program in the control plane's network with KUBECONFIG set: mesh-ctl, a shell.
    Enter {
        /// The program and its arguments; a shell without.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Runs a program inside a node: ctr, nft, bpftool.
    OnNode {
        /// 1 or 2.
        node: usize,
        /// The program and its arguments; a shell without.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Puts images (tar files) onto every node.
    Load {
        /// The files.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Builds the mesh's images and the test image, puts them onto every node and installs the mesh.
    Install(Install),
    /// Runs the Gateway API's conformance suite for meshes.
    Conform(conform::Options),
}

/// How to install the mesh.
#[derive(Clone, Debug, Default, Args)]
pub struct Install {
    /// With optimizations, as it is deployed.
    #[arg(long)]
    pub release: bool,
    /// Only the images, without the mesh.
    #[arg(long)]
    pub images_only: bool,
    /// More arguments for `mesh-ctl install`.
    #[arg(last = true)]
    pub arguments: Vec<String>,
}

/// How to start a cluster.
#[derive(Clone, Debug, Args)]
pub struct Up {
    /// How many nodes.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=4))]
    pub nodes: u8,
    /// How kube-proxy writes its rules.
    #[arg(long, value_enum, default_value_t = ProxyMode::Nftables)]
    pub proxy_mode: ProxyMode,
    /// Which definitions of the Gateway API are installed.
    #[arg(long, value_enum, default_value_t = Channel::Standard)]
    pub gateway_channel: Channel,
    /// Takes the programs as they are.
    #[arg(long)]
    pub no_build: bool,
}

impl Default for Up {
    fn default() -> Up {
        Up {
            nodes: 2,
            proxy_mode: ProxyMode::Nftables,
            gateway_channel: Channel::Standard,
            no_build: false,
        }
    }
}

/// kube-proxy's modes.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ProxyMode {
    /// nftables.
    Nftables,
    /// iptables.
    Iptables,
}

/// The Gateway API's channels.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Channel {
    /// What is stable.
    Standard,
    /// Everything.
    Experimental,
    /// None at all.
    None,
}

/// The verb.
pub fn run(options: Options) -> Result<ExitCode> {
    match options.verb {
        Verb::Build => build()?,
        Verb::Up(options) => up(&cluster::name(), &options)?,
        Verb::Down => down(&cluster::name())?,
        Verb::Install(options) => install(&cluster::name(), &options)?,
        Verb::Conform(options) => return conform::run(&options),
        verb => {
            if let Some(code) = shell::again_as_root()? {
                return Ok(code);
            }
            return with_cluster(&Cluster::shared()?, verb);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn with_cluster(cluster: &Cluster, verb: Verb) -> Result<ExitCode> {
    let or_shell = |command: Vec<String>| match command.is_empty() {
        true => vec![String::from("bash")],
        false => command,
    };
    let mut command = match verb {
        Verb::Kubectl { arguments } => cluster.kubectl_command(&arguments),
        Verb::Enter { command } => {
            let words = or_shell(command);
            let mut command = cluster.command(&words[0]);
            command.args(&words[1..]);
            command
        }
        Verb::OnNode { node, command } => {
            let words = or_shell(command);
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            cluster.on_node(node, &words)?
        }
        Verb::Load { files } => {
            for file in &files {
                cluster.load_image(file)?;
                println!("{} is on every node of {}", file.display(), cluster.name());
            }
            return Ok(ExitCode::SUCCESS);
        }
        Verb::Build | Verb::Up(_) | Verb::Down | Verb::Install(_) | Verb::Conform(_) => {
            bail!("this verb needs no running cluster")
        }
    };
    Ok(shell::exit(
        command
            .status()
            .with_context(|| format!("run {}", shell::show(&command)))?,
    ))
}

/// The scripts and Go modules of the cluster.
fn sources() -> PathBuf {
    shell::root().join("tests/kube")
}

/// Where programs, images and definitions lie.
pub fn cache() -> Result<PathBuf> {
    if let Some(path) = env::var_os(CACHE_VARIABLE) {
        return Ok(path.into());
    }
    let home = env::var_os("HOME").context("HOME is not set")?;
    Ok(Path::new(&home).join(".cache/nodemesh/kube"))
}

/// A script of `tests/kube`, as root.
fn script(name: &str, cluster: &str, settings: &[(&str, &str)]) -> Result<()> {
    let mut command = shell::root_command("env")?;
    let mut pair = |name: &str, value: &std::ffi::OsStr| {
        let mut text = std::ffi::OsString::from(format!("{name}="));
        text.push(value);
        command.arg(text);
    };
    pair("PATH", &shell::root_path());
    pair(CACHE_VARIABLE, cache()?.as_os_str());
    pair(cluster::NAME_VARIABLE, cluster.as_ref());
    for (name, value) in settings {
        pair(name, value.as_ref());
    }
    command.arg(sources().join(name));
    shell::run(&mut command)
}

/// Starts the cluster.
pub fn up(name: &str, options: &Up) -> Result<()> {
    setup::check_kernel()?;
    if !options.no_build {
        build()?;
    }
    let proxy_mode = match options.proxy_mode {
        ProxyMode::Nftables => "nftables",
        ProxyMode::Iptables => "iptables",
    };
    let channel = match options.gateway_channel {
        Channel::Standard => "standard",
        Channel::Experimental => "experimental",
        Channel::None => "none",
    };
    let nodes = options.nodes.to_string();
    let settings = [
        ("NODES", nodes.as_str()),
        ("PROXY_MODE", proxy_mode),
        ("GATEWAY_CHANNEL", channel),
    ];
    script("up", name, &settings)
}

/// Removes the cluster.
pub fn down(name: &str) -> Result<()> {
    script("down", name, &[])
}

/// Builds the mesh's images, puts them onto the nodes of a running cluster and installs the mesh by its own command.
pub fn install(name: &str, options: &Install) -> Result<()> {
    let programs = build::programs(&build::Options {
        release: options.release,
    })?;
    let mut images = image::write_all(&image::Options::local(!options.release))?;
    images.push(test_image::write(&programs, &cache()?)?);
    let started = Instant::now();
    let mut load = vec![OsString::from("load")];
    load.extend(images.iter().map(|path| path.clone().into_os_string()));
    as_root(name, &load)?;
    if options.images_only {
        return Ok(());
    }
    let mut enter = vec![
        OsString::from("enter"),
        programs.join("mesh-ctl").into(),
        "install".into(),
    ];
    enter.extend(options.arguments.iter().map(OsString::from));
    as_root(name, &enter)?;
    println!("the mesh is installed after {}", shell::time(started.elapsed()));
    Ok(())
}

/// One of these verbs as root, for a cluster.
fn as_root(name: &str, words: &[OsString]) -> Result<()> {
    let mut command = shell::root_command("env")?;
    let mut path = OsString::from("PATH=");
    path.push(shell::root_path());
    command.arg(path).arg(format!("{}={name}", cluster::NAME_VARIABLE));
    command.arg(env::current_exe()?).arg("kube").args(words);
    shell::run(&mut command)
}

/// Builds what `up` starts.
pub fn build() -> Result<()> {
    setup::ensure_all()?;
    let started = Instant::now();
    check_go()?;
    let cache = cache()?;
    let (bin, images) = (cache.join("bin"), cache.join("images"));
    fs::create_dir_all(&bin).with_context(|| format!("make {}", bin.display()))?;
    fs::create_dir_all(&images)?;
    // One build at a time.
    let lock = fs::File::create(cache.join("lock"))?;
    lock.lock()?;

    let mut flags = String::from("-s -w");
    let (major, rest) = KUBERNETES.split_once('.').context("the version of Kubernetes")?;
    let minor = rest.split('.').next().unwrap_or_default();
    for package in ["k8s.io/component-base/version", "k8s.io/client-go/pkg/version"] {
        flags.push_str(&format!(
            " -X {package}.gitVersion=v{KUBERNETES} -X {package}.gitMajor={major} -X {package}.gitMinor={minor}"
        ));
    }
    go(
        "kubebin",
        &["build", "-ldflags", &flags, "-o"],
        &bin.join("kubebin"),
        ".",
    )?;
    for name in PROGRAMS {
        let link = bin.join(name);
        if fs::read_link(&link).ok().as_deref() != Some(Path::new("kubebin")) {
            let _ = fs::remove_file(&link);
            std::os::unix::fs::symlink("kubebin", &link)?;
        }
    }
    go("pause", &["build", "-ldflags", "-s -w", "-o"], &bin.join("pause"), ".")?;
    for name in ["client", "server"] {
        let package = format!("istio.io/istio/pkg/test/echo/cmd/{name}");
        let output = bin.join(format!("echo-{name}"));
        go("echoapp", &["build", "-ldflags", "-s -w", "-o"], &output, &package)?;
    }
    for name in ["conformance", "monitoring"] {
        go(name, &["test", "-c", "-o"], &bin.join(format!("{name}.test")), ".")?;
    }
    definitions(&cache)?;
    operator_definitions(&cache)?;
    pause_image(&bin, &images)?;
    echo_image(&bin, &images, &cache)?;
    println!(
        "Kubernetes {KUBERNETES} is in {} after {}",
        cache.display(),
        shell::time(started.elapsed())
    );
    Ok(())
}

fn check_go() -> Result<()> {
    let what = format!("Go 1.{GO_MINOR_MIN} or later builds the cluster; install it from https://go.dev/dl");
    let version = shell::read(Command::new("go").args(["env", "GOVERSION"])).context(what.clone())?;
    let minor = version
        .trim()
        .strip_prefix("go1.")
        .and_then(|rest| rest.split('.').next()?.parse::<u32>().ok());
    ensure!(
        minor.is_some_and(|minor| minor >= GO_MINOR_MIN),
        "{what} (this is {})",
        version.trim()
    );
    Ok(())
}

/// Runs `go` in one of the modules.
fn go(module: &str, words: &[&str], output: &Path, package: &str) -> Result<()> {
    let started = Instant::now();
    let mut command = go_command(module);
    // What is there lets Go see that nothing has changed; else it makes a new file and moves it to this name.
    command.args(words).arg(output).arg(package);
    shell::run(&mut command)?;
    println!("{} in {}", output.display(), shell::time(started.elapsed()));
    Ok(())
}

fn go_command(module: &str) -> Command {
    let mut command = Command::new("go");
    command.current_dir(sources().join(module));
    command
        .env("CGO_ENABLED", "0")
        .env("GOFLAGS", "-buildvcs=false -trimpath");
    command
}

/// The directory of a Go module that one of ours uses.
fn module_directory(module: &str, of: &str) -> Result<PathBuf> {
    let path = shell::read(go_command(of).args(["list", "-m", "-f", "{{.Dir}}", module]))?;
    Ok(path.trim().into())
}

/// The Gateway API's definitions, of the version that the conformance suite is of.
fn definitions(cache: &Path) -> Result<()> {
    let module = module_directory("sigs.k8s.io/gateway-api", "conformance")?;
    for channel in ["standard", "experimental"] {
        let target = cache.join("gateway-api").join(channel);
        fs::create_dir_all(&target)?;
        for entry in fs::read_dir(module.join("config/crd").join(channel))? {
            let source = entry?.path();
            let name = source
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default();
            if name.starts_with("gateway") {
                fs::write(target.join(&name), fs::read(&source)?)?;
            }
        }
    }
    Ok(())
}

/// The Prometheus Operator's definitions, of those of its kinds that the manifests have.
fn operator_definitions(cache: &Path) -> Result<()> {
    let module = format!("github.com/prometheus-operator/prometheus-operator@{PROMETHEUS_OPERATOR}");
    let said = shell::read(go_command("monitoring").args(["mod", "download", "-json", &module]))?;
    let said: serde_json::Value = serde_json::from_str(&said).context("what go mod download says")?;
    let directory = said["Dir"]
        .as_str()
        .with_context(|| format!("{module} was not downloaded"))?;
    let target = cache.join("prometheus-operator");
    fs::create_dir_all(&target)?;
    for kind in ["servicemonitors", "prometheusrules"] {
        let name = format!("monitoring.coreos.com_{kind}.yaml");
        let source = Path::new(directory).join("example/prometheus-operator-crd").join(&name);
        fs::write(
            target.join(&name),
            fs::read(&source).with_context(|| format!("read {}", source.display()))?,
        )?;
    }
    Ok(())
}

fn local_image(files: Files, entrypoint: &[&str], user: &str) -> Image {
    Image {
        platform: Platform::host(),
        entrypoint: entrypoint.iter().map(|word| (*word).to_string()).collect(),
        user: user.into(),
        labels: Default::default(),
        files,
        compress: false,
    }
}

fn pause_image(bin: &Path, images: &Path) -> Result<()> {
    let mut files = Files::default();
    files.program("/pause", &bin.join("pause"))?;
    let image = local_image(files, &["/pause"], "65534:65534");
    image::write(&images.join("pause.tar"), &["localhost/pause:1"], &[image])?;
    Ok(())
}

/// The suite's echo application, under the very names that the suite's manifests ask for, so that nothing is pulled.
fn echo_image(bin: &Path, images: &Path, cache: &Path) -> Result<()> {
    let suite = module_directory("sigs.k8s.io/gateway-api/conformance", "conformance")?;
    let manifests = fs::read_to_string(suite.join("mesh/manifests.yaml"))?;
    let mut names: Vec<&str> = manifests
        .lines()
        .filter_map(|line| line.trim().strip_prefix("image: "))
        .filter(|name| name.contains("echo-advanced"))
        .collect();
    names.sort_unstable();
    names.dedup();
    ensure!(!names.is_empty(), "the suite's manifests name no echo image");
    names.push("localhost/echo:1");
    let (key, certificate) = (cache.join("echo.key"), cache.join("echo.crt"));
    if !key.exists() {
        let mut command = Command::new("openssl");
        command.args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
        ]);
        command.args(["-days", "3650", "-subj", "/CN=echo", "-addext"]);
        command.arg("subjectAltName=DNS:echo,DNS:echo-v1,DNS:echo-v2");
        command.arg("-keyout").arg(&key).arg("-out").arg(&certificate);
        shell::read(&mut command)?;
    }
    let mut files = Files::default();
    files.base();
    files.program("/usr/local/bin/client", &bin.join("echo-client"))?;
    files.program("/usr/local/bin/server", &bin.join("echo-server"))?;
    files.file("/cert.crt", 0o644, certificate);
    files.file("/cert.key", 0o644, key);
    let image = local_image(files, &["/usr/local/bin/server"], "1338");
    image::write(&images.join("echo.tar"), &names, &[image])?;
    Ok(())
}
