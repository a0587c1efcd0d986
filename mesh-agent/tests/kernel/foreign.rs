//! Beside programs of others on the same hooks of the same cgroup: whoever is attached first, both run for every
//! connection, and each finds what the other leaves it.
//!
//! The others are assembled here, instruction by instruction: one counts connects, sends one address elsewhere as a
//! Service's address is sent to a pod, and forbids another; one counts what sockets do, and asks for callbacks of its own.

use std::{
    ffi::c_long,
    fs::File,
    io,
    net::{Ipv4Addr, SocketAddr},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
    time::Instant,
};

use mesh_abi::Reason;
use mesh_agent::kernel::Kernel;

use crate::{
    entries, listen,
    world::{self, Agent, Cgroup, Exceptions, PATIENCE, World, accept, chain, is_idle},
};

const BPF_MAP_CREATE: c_long = 0;
const BPF_MAP_LOOKUP_ELEM: c_long = 1;
const BPF_PROG_LOAD: c_long = 5;
const BPF_PROG_ATTACH: c_long = 8;
const BPF_PROG_DETACH: c_long = 9;
const BPF_F_ALLOW_MULTI: u32 = 2;
const MAP_TYPE_ARRAY: u32 = 2;
const TYPE_SOCK_OPS: u32 = 13;
const TYPE_CGROUP_SOCK_ADDR: u32 = 18;

/// What the foreign program at connects sends elsewhere, and where to.
const SERVICE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);
const BACKEND: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// What it forbids.
const FORBIDDEN: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 11);

const SOCK_OPS: u32 = 3;
const CONNECT4: u32 = 10;
const CONNECT6: u32 = 11;

/// Counters of a foreign program: one for each operation of `sock_ops`, the first one for connects.
const COUNTERS: u32 = 32;
const TCP_CONNECT: u32 = 3;
const STATE: u32 = 10;
const RTT: u32 = 12;
/// `BPF_SOCK_OPS_RTT_CB_FLAG`: a callback that we do not ask for.
const RTT_CB_FLAG: i32 = 8;

fn bpf<T>(command: c_long, attributes: &mut T) -> io::Result<c_long> {
    // SAFETY: the attributes are integers, and addresses of what outlives the call, as the command wants them.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    match result {
        0.. => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

fn owned(result: io::Result<c_long>) -> io::Result<OwnedFd> {
    let fd = i32::try_from(result?).expect("a descriptor");
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn fd(of: &impl AsRawFd) -> u32 {
    u32::try_from(of.as_raw_fd()).expect("an open descriptor")
}

/// One instruction: its code, registers, offset and number, as the kernel lays them out.
fn op(code: u8, to: u8, from: u8, offset: i16, number: i32) -> u64 {
    let [o0, o1] = offset.to_ne_bytes();
    let [n0, n1, n2, n3] = number.to_ne_bytes();
    u64::from_ne_bytes([code, from << 4 | to, o0, o1, n0, n1, n2, n3])
}

fn load_word(to: u8, from: u8, offset: i16) -> u64 {
    op(0x61, to, from, offset, 0)
}

fn copy(to: u8, from: u8) -> u64 {
    op(0xbf, to, from, 0, 0)
}

fn call(helper: i32) -> u64 {
    op(0x85, 0, 0, 0, helper)
}

const RETURN_1: [u64; 2] = [
    // r0 = 1, exit
    u64::from_ne_bytes([0xb7, 0, 0, 0, 1, 0, 0, 0]),
    u64::from_ne_bytes([0x95, 0, 0, 0, 0, 0, 0, 0]),
];

/// Adds one to the counter whose number is in r7; the context stays in r6.
fn count(counters: &OwnedFd) -> Vec<u64> {
    vec![
        op(0x63, 10, 7, -4, 0), // *(u32 *)(r10 - 4) = r7
        op(0x18, 1, 1, 0, counters.as_raw_fd()),
        0,
        copy(2, 10),
        op(0x07, 2, 0, 0, -4),
        call(1), // bpf_map_lookup_elem
        op(0x15, 0, 0, 2, 0),
        op(0xb7, 1, 0, 0, 1),
        op(0xdb, 0, 1, 0, 0), // lock *(u64 *)(r0 + 0) += r1
    ]
}

fn load(kind: u32, attach: u32, instructions: &[u64]) -> OwnedFd {
    #[repr(C)]
    #[derive(Default)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log: [u32; 2],
        log_buffer: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        ifindex: u32,
        attach: u32,
    }
    let mut log = vec![0_u8; 64 * 1024];
    let mut attributes = Load {
        kind,
        count: u32::try_from(instructions.len()).unwrap(),
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log: [1, u32::try_from(log.len()).unwrap()],
        log_buffer: log.as_mut_ptr() as u64,
        attach,
        ..Load::default()
    };
    owned(bpf(BPF_PROG_LOAD, &mut attributes))
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&log).trim_end_matches('\0')))
}

/// Attachment of a program to a cgroup, as all did before there were links. It goes with this value.
struct Attached {
    program: OwnedFd,
    cgroup: File,
    attach: u32,
}

#[repr(C)]
struct Attachment {
    target: u32,
    program: u32,
    attach: u32,
    flags: u32,
}

impl Attached {
    fn new(program: OwnedFd, cgroup: &Path, attach: u32, flags: u32) -> io::Result<Attached> {
        let attached = Attached {
            program,
            cgroup: File::open(cgroup)?,
            attach,
        };
        bpf(BPF_PROG_ATTACH, &mut attached.attachment(flags))?;
        Ok(attached)
    }

    fn attachment(&self, flags: u32) -> Attachment {
        Attachment {
            target: fd(&self.cgroup),
            program: fd(&self.program),
            attach: self.attach,
            flags,
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // It fails only for what was never attached, or went with its cgroup.
        let _ = bpf(BPF_PROG_DETACH, &mut self.attachment(0));
    }
}

/// Somebody else's programs on a cgroup.
struct Foreign {
    counters: OwnedFd,
    _attached: Vec<Attached>,
}

impl Foreign {
    /// Attaches them.
    fn attach(cgroup: &Path) -> Foreign {
        let mut attributes: [u32; 5] = [MAP_TYPE_ARRAY, 4, 8, COUNTERS, 0];
        let counters = owned(bpf(BPF_MAP_CREATE, &mut attributes)).unwrap();

        let number = |address: Ipv4Addr| i32::from_ne_bytes(address.octets());
        let mut connects = vec![copy(6, 1), op(0xb7, 7, 0, 0, 0)];
        connects.extend(count(&counters));
        let mut leads = connects.clone();
        leads.extend([
            load_word(2, 6, 4), // user_ip4
            op(0x56, 2, 0, 2, number(FORBIDDEN)),
            op(0xb7, 0, 0, 0, 0),
            RETURN_1[1],
            op(0x56, 2, 0, 2, number(SERVICE)),
            op(0xb4, 3, 0, 0, number(BACKEND)),
            op(0x63, 6, 3, 4, 0), // user_ip4 = r3
        ]);
        leads.extend(RETURN_1);
        connects.extend(RETURN_1);

        let mut sockets = vec![copy(6, 1), load_word(7, 6, 0)];
        sockets.extend(count(&counters));
        sockets.extend([
            load_word(1, 6, 0),
            op(0x55, 1, 0, 4, TCP_CONNECT as i32),
            load_word(2, 6, 84), // bpf_sock_ops_cb_flags
            op(0x47, 2, 0, 0, RTT_CB_FLAG),
            copy(1, 6),
            call(59), // bpf_sock_ops_cb_flags_set
        ]);
        sockets.extend(RETURN_1);

        let attached = [
            (TYPE_CGROUP_SOCK_ADDR, CONNECT4, leads),
            (TYPE_CGROUP_SOCK_ADDR, CONNECT6, connects),
            (TYPE_SOCK_OPS, SOCK_OPS, sockets),
        ]
        .map(|(kind, attach, instructions)| {
            let program = load(kind, if kind == TYPE_SOCK_OPS { 0 } else { attach }, &instructions);
            Attached::new(program, cgroup, attach, BPF_F_ALLOW_MULTI).unwrap()
        });
        Foreign {
            counters,
            _attached: attached.into(),
        }
    }

    fn counted(&self, number: u32) -> u64 {
        #[repr(C)]
        struct Lookup {
            map: u32,
            key: u64,
            value: u64,
        }
        let mut value = 0_u64;
        let mut attributes = Lookup {
            map: fd(&self.counters),
            key: std::ptr::from_ref(&number) as u64,
            value: std::ptr::from_mut(&mut value) as u64,
        };
        bpf(BPF_MAP_LOOKUP_ELEM, &mut attributes).unwrap();
        value
    }
}

const PROBED: u16 = 9001;

/// A world whose programs are attached to a cgroup of its own, where the test's programs run.
struct Beside {
    world: World,
    agent: Agent,
    foreign: Foreign,
    cgroup: Cgroup,
}

impl Beside {
    fn new(foreign_first: bool) -> Beside {
        let mut world = World::new();
        let cgroup = Cgroup::new(&world, "beside");
        detach(&mut world);
        world.config.cgroup = cgroup.path().to_owned();
        let first = foreign_first.then(|| Foreign::attach(cgroup.path()));
        world.attach();
        let foreign = first.unwrap_or_else(|| Foreign::attach(cgroup.path()));
        let agent = capture(&world);
        Beside {
            world,
            agent,
            foreign,
            cgroup,
        }
    }

    /// Has a program of the pod connect, and gives what it says of it.
    fn connect(&self, to: impl Into<SocketAddr>) -> String {
        let to = to.into();
        let program = format!(
            "import errno, socket
try:
    s = socket.create_connection(('{}', {}), timeout=10)
    print(*s.getpeername()[:2])
except OSError as error:
    print(errno.errorcode[error.errno])",
            to.ip(),
            to.port()
        );
        let said = self.cgroup.output(&self.world.netns_path(), &program);
        said.trim().to_owned()
    }

    /// What the connection asked for that the agent accepts next.
    fn original(&self) -> Option<SocketAddr> {
        let (_, source) = accept(&self.agent.outbound);
        self.world
            .kernel()
            .take_original_destination(self.world.cookie(), source)
    }

    fn entries(&self, map: &str) -> u64 {
        entries(&self.world.kernel().gauges(), map)
    }
}

fn detach(world: &mut World) {
    world.die();
    Kernel::remove(&world.config.pin_dir).unwrap_or_else(|error| panic!("{}", chain(&error)));
}

fn capture(world: &World) -> Agent {
    world.capture_except(
        1,
        &Exceptions {
            probes: vec![PROBED],
            ..Exceptions::default()
        },
    )
}

#[test]
fn programs_of_others_run_before_ours_and_after() {
    for foreign_first in [true, false] {
        let beside = Beside::new(foreign_first);
        let counted = |number| beside.foreign.counted(number);
        for destination in ["203.0.113.7:80", "[2001:db8::7]:443"] {
            let destination: SocketAddr = destination.parse().unwrap();
            let before = (counted(0), counted(TCP_CONNECT));
            let shown = beside.connect(destination);
            assert_eq!(shown, format!("{} {}", destination.ip(), destination.port()));
            assert_eq!(beside.original(), Some(destination), "foreign first: {foreign_first}");
            assert_eq!((counted(0), counted(TCP_CONNECT)), (before.0 + 1, before.1 + 1));
        }

        // Who is first at an address says what the other sees of it.
        beside.connect((SERVICE, 80));
        let asked = if foreign_first { BACKEND } else { SERVICE };
        assert_eq!(beside.original(), Some((asked, 80).into()));

        // The same of what the other forbids; and then nothing of it stays with us.
        let said = beside.connect((FORBIDDEN, 80));
        if foreign_first {
            assert_eq!(said, "EPERM");
            assert!(is_idle(&beside.agent.outbound));
        } else {
            assert_eq!(beside.original(), Some((FORBIDDEN, 80).into()));
        }
        assert_eq!(beside.entries("ORIG_BY_FLOW"), 0);
    }
}

#[test]
fn callbacks_that_others_ask_for_and_ours_come_both() {
    for foreign_first in [true, false] {
        let mut beside = Beside::new(foreign_first);
        // A probe passes, and is forgotten with its socket.
        let ip = beside.world.pod_ip(false);
        let application = beside.world.in_pod(move || listen(ip, PROBED));
        let probe = format!(
            "import socket
s = socket.create_connection(('{ip}', {PROBED}), timeout=10)
for _ in range(3):
    s.sendall(b'x')
    assert s.recv(1)"
        );
        let prober = beside.cgroup.run(&beside.world.outside_path(), &probe);
        let (mut accepted, _) = accept(std::slice::from_ref(&application));
        assert_eq!(beside.entries("ANNOUNCED"), 1);
        let mut byte = [0];
        for _ in 0..3 {
            io::Read::read_exact(&mut accepted, &mut byte).unwrap();
            io::Write::write_all(&mut accepted, &byte).unwrap();
        }
        prober.finish();
        world::close(accepted);
        let deadline = Instant::now() + PATIENCE;
        while beside.entries("ANNOUNCED") != 0 {
            assert!(Instant::now() < deadline, "foreign first: {foreign_first}");
            std::thread::yield_now();
        }
        assert_eq!(beside.world.count(Reason::InboundProbe), 1);
        assert!(beside.foreign.counted(RTT) > 0, "foreign first: {foreign_first}");
        assert!(beside.foreign.counted(STATE) > 0, "foreign first: {foreign_first}");

        // A refused connection leaves no entry.
        world::close(std::mem::take(&mut beside.agent.outbound));
        assert_eq!(beside.connect(([203, 0, 113, 7], 80)), "ECONNREFUSED");
        assert_eq!(beside.entries("ORIG_BY_FLOW"), 0, "foreign first: {foreign_first}");
    }
}

#[test]
fn each_goes_without_the_other() {
    for foreign_first in [true, false] {
        let mut beside = Beside::new(foreign_first);
        // An agent that takes over keeps its place among the programs.
        beside.world.die();
        beside.world.attach();
        beside.connect((SERVICE, 80));
        let asked = if foreign_first { BACKEND } else { SERVICE };
        assert_eq!(beside.original(), Some((asked, 80).into()));

        let ip = beside.world.outside_ip(false);
        let outside = beside.world.outside(move || listen(ip, 0));
        let address = outside.local_addr().unwrap();
        detach(&mut beside.world);
        let before = beside.foreign.counted(0);
        beside.connect(address);
        accept(std::slice::from_ref(&outside));
        assert_eq!(beside.foreign.counted(0), before + 1);

        beside.world.attach();
        beside.agent = capture(&beside.world);
        drop(beside.foreign);
        beside.foreign = Foreign::attach(beside.cgroup.path());
        let destination: SocketAddr = "203.0.113.7:80".parse().unwrap();
        beside.connect(destination);
        assert_eq!(beside.original(), Some(destination));
    }
}

#[test]
fn a_cgroup_that_another_has_for_itself_is_told() {
    let mut world = World::new();
    let cgroup = Cgroup::new(&world, "alone");
    detach(&mut world);
    world.config.cgroup = cgroup.path().to_owned();
    let program = load(TYPE_SOCK_OPS, 0, &RETURN_1);
    let _alone = Attached::new(program, cgroup.path(), SOCK_OPS, 0).unwrap();
    let Err(error) = Kernel::attach(&world.config) else {
        panic!("nobody else may be attached there");
    };
    let said = chain(&error);
    assert!(said.contains("link-follow_sockets"), "{said}");
}
