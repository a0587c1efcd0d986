//! A small world: a pod and an outside, each a network namespace, with the kernel programs attached.
//!
//! Everything is removed on drop, also when a test panics. Names start with `nmt-`.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use mesh_abi::{ABI_VERSION, PortSet, Reason};
use mesh_agent::{
    kernel::{FailMode, Kernel, KernelConfig, NetnsCookie, PodCapture, cgroup2_root},
    pods::Netns,
};
use socket2::{Domain, Protocol, Socket, Type};

/// How long a test waits for what must happen.
pub const PATIENCE: Duration = Duration::from_secs(10);

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A pod and an outside.
pub struct World {
    name: String,
    number: u32,
    netns: Netns,
    kernel: Option<Kernel>,
    /// How the kernel programs are attached; a test may change it before it attaches again.
    pub config: KernelConfig,
}

/// What plays the agent: its listeners in the pod.
pub struct Agent {
    /// For captured connections: every worker's, both families.
    pub outbound: Vec<TcpListener>,
    /// For steered connections.
    pub inbound: Vec<TcpListener>,
}

/// What a capture leaves out.
#[derive(Clone, Debug, Default)]
pub struct Exceptions {
    /// Excluded destination ports.
    pub outbound: Vec<u16>,
    /// Excluded local ports.
    pub inbound: Vec<u16>,
    /// Probe ports.
    pub probes: Vec<u16>,
}

/// Held while a program is spawned: until it has executed, it holds a copy of every descriptor of this process, so
/// that a listener which a test closes would live on for a moment.
static SPAWNING: Mutex<()> = Mutex::new(());

fn spawn(command: &mut Command) -> io::Result<Child> {
    let _no_close = SPAWNING.lock().unwrap_or_else(PoisonError::into_inner);
    command.spawn()
}

fn output(command: &mut Command) -> io::Result<Output> {
    spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()))?.wait_with_output()
}

/// Drops sockets for good: no program that is being spawned holds a copy.
pub fn close<T>(sockets: T) {
    let _no_spawn = SPAWNING.lock().unwrap_or_else(PoisonError::into_inner);
    drop(sockets);
}

/// Runs `ip`, in the network namespace of the calling thread unless told otherwise.
pub fn ip(arguments: &str) {
    let output = output(Command::new("ip").args(arguments.split_whitespace())).expect("ip (iproute2) is needed");
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

impl World {
    /// A fresh world with the programs attached and nothing enrolled.
    pub fn new() -> World {
        World::with(|_| {})
    }

    /// A fresh world, attached as `change` says.
    pub fn with(change: impl FnOnce(&mut KernelConfig)) -> World {
        // SAFETY: a system call without arguments.
        let user = unsafe { libc::geteuid() };
        assert_eq!(
            user, 0,
            "these tests load kernel programs and need root: run `cargo xtask test`"
        );
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("nmt-{}-{number}", std::process::id());
        let pod = format!("{name}-pod");
        let outside = format!("{name}-out");
        ip(&format!("netns add {pod}"));
        ip(&format!("netns add {outside}"));
        ip(&format!(
            "-n {pod} link add eth0 type veth peer name eth0 netns {outside}"
        ));
        for (netns, last) in [(&pod, 2), (&outside, 1)] {
            ip(&format!("-n {netns} link set lo up"));
            ip(&format!("-n {netns} address add 10.99.{number}.{last}/24 dev eth0"));
            ip(&format!(
                "-n {netns} address add fd99:{number}::{last}/64 dev eth0 nodad"
            ));
            ip(&format!("-n {netns} link set eth0 up"));
        }
        ip(&format!("-n {pod} route add default via 10.99.{number}.1"));
        ip(&format!("-n {pod} route add default via fd99:{number}::1"));
        let mut config = KernelConfig {
            cgroup: cgroup2_root().unwrap(),
            pin_dir: PathBuf::from(format!("/sys/fs/bpf/{name}-abi{ABI_VERSION}")),
            fail_mode: FailMode::Refuse,
            node_addresses: vec![
                format!("10.99.{number}.1").parse().unwrap(),
                format!("fd99:{number}::1").parse().unwrap(),
            ],
            home: Netns::open(Path::new(&format!("/run/netns/{outside}")))
                .unwrap()
                .cookie(),
            debug: false,
        };
        change(&mut config);
        let netns = Netns::open(Path::new(&format!("/run/netns/{pod}"))).unwrap();
        let mut world = World {
            name,
            number,
            netns,
            kernel: None,
            config,
        };
        world.attach();
        world
    }

    /// Attaches the programs: what a starting agent does.
    pub fn attach(&mut self) {
        self.kernel = Some(Kernel::attach(&self.config).unwrap_or_else(|error| panic!("{}", chain(&error))));
    }

    /// Lets go of the programs as a dying agent does: what is pinned stays.
    pub fn die(&mut self) {
        self.kernel = None;
    }

    /// The attached programs.
    pub fn kernel(&self) -> &Kernel {
        self.kernel.as_ref().unwrap()
    }

    /// The pod's network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Hands over the attached programs.
    pub fn take_kernel(&mut self) -> Arc<Kernel> {
        Arc::new(self.kernel.take().unwrap())
    }

    /// The pod's cookie.
    pub fn cookie(&self) -> NetnsCookie {
        self.netns.cookie()
    }

    /// The file of the pod's network namespace.
    pub fn netns_path(&self) -> PathBuf {
        PathBuf::from(format!("/run/netns/{}-pod", self.name))
    }

    /// The file of the network namespace outside, which is the node's.
    pub fn outside_path(&self) -> PathBuf {
        PathBuf::from(format!("/run/netns/{}-out", self.name))
    }

    /// The pod's address.
    pub fn pod_ip(&self, ipv6: bool) -> IpAddr {
        self.address(ipv6, 2)
    }

    /// The address outside.
    pub fn outside_ip(&self, ipv6: bool) -> IpAddr {
        self.address(ipv6, 1)
    }

    fn address(&self, ipv6: bool, last: u32) -> IpAddr {
        let number = self.number;
        let text = if ipv6 {
            format!("fd99:{number}::{last}")
        } else {
            format!("10.99.{number}.{last}")
        };
        text.parse().unwrap()
    }

    /// Runs `ip` in the pod.
    pub fn ip(&self, arguments: &str) {
        ip(&format!("-n {}-pod {arguments}", self.name));
    }

    /// Deletes the pod's network namespace, and waits until it is gone.
    pub fn delete_pod(&mut self) {
        let outside = Netns::open(Path::new(&format!("/run/netns/{}-out", self.name))).unwrap();
        // The descriptor that keeps it alive goes first; the veth pair dies with the namespace.
        self.netns = outside;
        ip(&format!("netns delete {}-pod", self.name));
        let deadline = Instant::now() + PATIENCE;
        let interface = format!("-n {}-out link show eth0", self.name);
        while output(Command::new("ip").args(interface.split(' ')))
            .unwrap()
            .status
            .success()
        {
            assert!(Instant::now() < deadline, "the network namespace does not go");
            std::thread::yield_now();
        }
    }

    /// Runs an application on a thread in the pod.
    pub fn in_pod<T: Send + 'static>(&self, application: impl FnOnce() -> T + Send + 'static) -> T {
        run_in(&self.netns_path(), application)
    }

    /// Runs a program on a thread outside.
    pub fn outside<T: Send + 'static>(&self, program: impl FnOnce() -> T + Send + 'static) -> T {
        run_in(&self.outside_path(), program)
    }

    /// Makes an agent's listeners and captures the pod, without exceptions.
    pub fn capture(&self, workers: usize) -> Agent {
        self.capture_except(workers, &Exceptions::default())
    }

    /// Makes an agent's listeners and captures the pod.
    pub fn capture_except(&self, workers: usize, exceptions: &Exceptions) -> Agent {
        let groups = |what: &str| {
            let mut listeners = Vec::new();
            for first in ["127.0.0.1:0", "[::1]:0"] {
                let mut address: SocketAddr = first.parse().unwrap();
                for _ in 0..workers {
                    let listener = self.in_pod(move || reuse_port_listener(address)).expect(what);
                    address = listener.local_addr().unwrap();
                    listeners.push(listener);
                }
            }
            listeners
        };
        let agent = Agent {
            outbound: groups("outbound"),
            inbound: groups("inbound"),
        };
        self.enrol(&agent, exceptions);
        agent
    }

    /// Captures the pod for the agent's listeners, or changes how.
    pub fn enrol(&self, agent: &Agent, exceptions: &Exceptions) {
        let address = |ipv6: bool| {
            agent
                .outbound
                .iter()
                .map(|l| l.local_addr().unwrap())
                .find(|a| a.is_ipv6() == ipv6)
        };
        let listener = |ipv6: bool| {
            agent
                .inbound
                .iter()
                .find(|l| l.local_addr().unwrap().is_ipv6() == ipv6)
                .map(|l| l.as_fd())
        };
        let capture = PodCapture {
            cookie: self.cookie(),
            netns: self.netns.as_fd(),
            addresses: &[self.pod_ip(false), self.pod_ip(true)],
            outbound_v4: address(false),
            outbound_v6: address(true),
            inbound_v4: listener(false),
            inbound_v6: listener(true),
            exclude_outbound: PortSet::new(&exceptions.outbound).unwrap(),
            exclude_inbound: PortSet::new(&exceptions.inbound).unwrap(),
            probes: PortSet::new(&exceptions.probes).unwrap(),
        };
        self.kernel()
            .enrol(&capture)
            .unwrap_or_else(|error| panic!("{}", chain(&error)));
    }

    /// How often the kernel gave a reason.
    pub fn count(&self, reason: Reason) -> u64 {
        let counts = self.kernel().reasons().unwrap();
        counts.iter().find(|count| count.reason == reason).unwrap().count
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.kernel = None;
        if let Err(error) = Kernel::remove(&self.config.pin_dir) {
            eprintln!("{}: {}", self.config.pin_dir.display(), chain(&error));
        }
        for end in ["pod", "out"] {
            let _gone_with_a_test_that_deleted_it =
                output(Command::new("ip").args(["netns", "delete", &format!("{}-{end}", self.name)]));
        }
    }
}

/// Unmounts what a test had mounted.
pub struct Mounted(PathBuf);

impl Mounted {
    /// Whatever will be mounted there.
    pub fn at(path: &Path) -> Mounted {
        Mounted(path.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let result = output(Command::new("umount").arg(&self.0));
        if !std::thread::panicking() {
            assert!(result.unwrap().status.success(), "{} was mounted", self.0.display());
        }
    }
}

/// A cgroup below the root of the hierarchy.
pub struct Cgroup(PathBuf);

/// A program that runs in a cgroup and a network namespace.
pub struct Program(Child);

impl Cgroup {
    /// A fresh cgroup.
    pub fn new(world: &World, purpose: &str) -> Cgroup {
        let path = cgroup2_root().unwrap().join(format!("{}-{purpose}", world.name));
        fs::create_dir(&path).unwrap();
        Cgroup(path)
    }

    /// A cgroup in it.
    pub fn child(&self, name: &str) -> Cgroup {
        let path = self.0.join(name);
        fs::create_dir(&path).unwrap();
        Cgroup(path)
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    fn command(&self, netns: &Path, program: &str) -> Command {
        let enter = format!(
            "echo $$ > {}/cgroup.procs && exec nsenter --net={} python3 -c \"$1\"",
            self.0.display(),
            netns.display()
        );
        let mut command = Command::new("sh");
        command.args(["-c", &enter, "sh", program]);
        command
    }

    /// Runs a Python program in it, in a network namespace, to be talked to.
    pub fn talk(&self, netns: &Path, program: &str) -> Child {
        let mut command = self.command(netns, program);
        spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped())).unwrap()
    }

    /// Runs a Python program in it, in a network namespace, to its end; returns what it printed.
    pub fn output(&self, netns: &Path, program: &str) -> String {
        let output = output(&mut self.command(netns, program)).unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a Python program in it, in a network namespace.
    pub fn run(&self, netns: &Path, program: &str) -> Program {
        Program(spawn(&mut self.command(netns, program)).unwrap())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process that has ended leaves its cgroup a moment later.
        let deadline = Instant::now() + PATIENCE;
        while fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }
}

impl Program {
    /// Ends it.
    pub fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    /// Waits for its end, which must be a good one.
    pub fn finish(mut self) {
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ended_already = self.0.kill();
        let _status = self.0.wait();
    }
}

/// An error with its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

/// Runs a closure on a thread in a network namespace.
pub fn run_in<T: Send + 'static>(netns: &Path, inside: impl FnOnce() -> T + Send + 'static) -> T {
    let file = fs::File::open(netns).unwrap();
    let thread = std::thread::spawn(move || {
        // SAFETY: a system call on an open descriptor; the thread ends in the namespace.
        let result = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
        assert_eq!(result, 0, "setns: {}", io::Error::last_os_error());
        inside()
    });
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn reuse_port_listener(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_port(true)?;
    socket.bind(&address.into())?;
    socket.listen(128)?;
    Ok(socket.into())
}

fn poll(fds: &mut [libc::pollfd]) -> io::Result<()> {
    let patience = i32::try_from(PATIENCE.as_millis()).unwrap();
    // SAFETY: the slice's pointer and length.
    match unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, patience) } {
        0 => Err(io::ErrorKind::TimedOut.into()),
        n if n < 0 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Disconnects a socket, so that it may be connected again.
pub fn disconnect(socket: &Socket) -> io::Result<()> {
    let unspecified = libc::sockaddr {
        sa_family: libc::AF_UNSPEC as libc::sa_family_t,
        sa_data: [0; 14],
    };
    let size = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: a socket address and its size.
    match unsafe { libc::connect(socket.as_raw_fd(), &raw const unspecified, size) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Waits until a socket is writable.
pub fn writable(socket: &Socket) -> io::Result<()> {
    poll(&mut [libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLOUT,
        revents: 0,
    }])
}

/// Accepts the next connection on any of the listeners.
pub fn accept(listeners: &[TcpListener]) -> (TcpStream, SocketAddr) {
    let (_, stream, source) = accept_any(listeners);
    (stream, source)
}

/// Accepts the next connection on any of the listeners and says on which.
pub fn accept_any(listeners: &[TcpListener]) -> (usize, TcpStream, SocketAddr) {
    let mut fds: Vec<libc::pollfd> = listeners
        .iter()
        .map(|listener| libc::pollfd {
            fd: listener.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    poll(&mut fds).expect("a connection arrives");
    let index = fds.iter().position(|fd| fd.revents != 0).unwrap();
    let (stream, source) = listeners[index].accept().unwrap();
    (index, stream, source)
}

/// Wakes who is blocked in accepting, and refuses who comes.
pub fn stop_accepting(listener: &TcpListener) {
    // SAFETY: a system call on an open descriptor.
    let result = unsafe { libc::shutdown(listener.as_raw_fd(), libc::SHUT_RDWR) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// Whether nothing waits to be accepted.
pub fn is_idle(listeners: &[TcpListener]) -> bool {
    listeners.iter().all(|listener| {
        listener.set_nonblocking(true).unwrap();
        let is_idle = matches!(listener.accept(), Err(error) if error.kind() == io::ErrorKind::WouldBlock);
        listener.set_nonblocking(false).unwrap();
        is_idle
    })
}

/// Whether a connect was refused at once.
pub fn is_refused<T>(result: &io::Result<T>) -> bool {
    matches!(result, Err(error) if error.kind() == io::ErrorKind::ConnectionRefused)
}
