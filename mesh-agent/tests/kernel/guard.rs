//! The guard: what becomes of pods that nobody has looked at.

use std::{net::TcpStream, os::unix::fs::MetadataExt};

use mesh_abi::Reason;
use mesh_agent::kernel::Stranger;

use crate::{
    listen_outside,
    world::{self, World, accept},
};

/// What the program in the pod finds out; each line is one attempt.
const ATTEMPTS: &str = "
import errno, socket
def attempt(what, to, kind=socket.SOCK_STREAM, protocol=0, family=socket.AF_INET):
    try:
        with socket.socket(family, kind, protocol) as s:
            s.connect(to)
        print(what, 'ok')
    except OSError as error:
        print(what, errno.errorcode[error.errno])
local = socket.socket()
local.bind(('127.0.0.1', 0))
local.listen()
attempt('tcp', OUTSIDE)
attempt('mapped', ('::ffff:' + OUTSIDE[0], OUTSIDE[1]), family=socket.AF_INET6)
attempt('loopback', local.getsockname())
attempt('udp', (OUTSIDE[0], 53), socket.SOCK_DGRAM)
attempt('mptcp', OUTSIDE, protocol=262)
";

#[test]
fn an_unknown_pod_in_a_guarded_cgroup_is_refused_until_it_is_known_or_captured() {
    let mut world = World::new();
    let pods = world::Cgroup::new(&world, "pods");
    let pod = pods.child("pod");
    let (_outside, address) = listen_outside(&world, false);
    let program = format!("OUTSIDE = ('{}', {})\n{ATTEMPTS}", address.ip(), address.port());
    let path = world.netns_path();
    let attempts = || pod.output(&path, &program);
    let has_mptcp = attempts().contains("mptcp ok");
    let verdicts = |tcp: &str, mptcp: &str| {
        let mptcp = if has_mptcp { mptcp } else { "EPROTONOSUPPORT" };
        format!("tcp {tcp}\nmapped {tcp}\nloopback ok\nudp ok\nmptcp {mptcp}\n")
    };
    assert_eq!(attempts(), verdicts("ok", "ok"), "no guard");

    world.kernel().raise_guard(&[pods.path()]).unwrap();
    let refused = verdicts("ECONNREFUSED", "EPROTONOSUPPORT");
    assert_eq!(attempts(), refused, "unknown");
    assert_eq!(world.count(Reason::OutboundUnclassified), 2);
    let stranger = Stranger {
        cookie: world.cookie(),
        cgroup_id: pod.path().metadata().unwrap().ino(),
    };
    assert_eq!(world.kernel().take_strangers().unwrap(), [stranger]);
    assert_eq!(world.kernel().take_strangers().unwrap(), [], "a stranger is told once");
    world
        .in_pod(move || TcpStream::connect(address))
        .expect("this process is in no guarded cgroup");

    world.die();
    world.attach();
    assert_eq!(attempts(), refused, "the guard outlives the agent");

    world.kernel().know(world.cookie()).unwrap();
    assert_eq!(attempts(), verdicts("ok", "ok"), "known");
    world.kernel().forget(world.cookie()).unwrap();
    assert_eq!(attempts(), refused, "forgotten");

    let before = world.count(Reason::Captured);
    let agent = world.capture(1);
    assert_eq!(attempts(), verdicts("ok", "EPROTONOSUPPORT"), "captured");
    assert_eq!(world.count(Reason::Captured), before + 2);
    accept(&agent.outbound);
    world.kernel().retire(world.cookie()).unwrap();
    assert_eq!(
        attempts(),
        refused,
        "a pod that is let go without being known is a stranger"
    );

    world.kernel().lower_guard().unwrap();
    assert_eq!(attempts(), verdicts("ok", "ok"), "no guard again");
}

#[test]
fn a_guard_of_no_cgroup_is_no_guard_and_a_cgroup_that_is_gone_is_an_error() {
    let world = World::new();
    let none: [&std::path::Path; 0] = [];
    world.kernel().raise_guard(&none).unwrap();
    let gone = world::Cgroup::new(&world, "gone").path().to_owned();
    let error = world.kernel().raise_guard(&[gone]).unwrap_err();
    assert!(error.to_string().starts_with("cgroup "), "{error}");
}
