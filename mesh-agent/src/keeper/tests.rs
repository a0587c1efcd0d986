//! Keepers in threads of their own, asked over real sockets: what waits in a listener's queue outlives whoever made it.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tokio::sync::oneshot;

use super::{
    CONNECTIONS_MAX, Client, ClientError, Direction, PACKET_SOCKETS_MAX, SLOT_MAX, Slot,
    codec::{Refusal, Request, Role},
    server,
};

const OUT: Slot = Slot::new(Direction::Outbound, false);
const IN: Slot = Slot::new(Direction::Inbound, true);
const LIMIT: Duration = Duration::from_secs(10);

struct Keeper {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    fn start(path: &Path) -> Keeper {
        let (stop, stopped) = oneshot::channel();
        let path = path.to_owned();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            let local = tokio::task::LocalSet::new();
            local.block_on(&runtime, async {
                tokio::select! {
                    result = server::keep(&path) => result.unwrap(),
                    _ = stopped => {}
                }
            });
        });
        Keeper {
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn place() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keeper.sock");
    (directory, path)
}

fn until<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "it takes too long");
        std::thread::yield_now();
    }
}

fn connect(path: &Path) -> Client {
    until(|| Client::connect(path, Role::Agent).ok())
}

fn listener() -> TcpListener {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()
}

fn fds(listeners: &[TcpListener]) -> Vec<BorrowedFd<'_>> {
    listeners.iter().map(AsFd::as_fd).collect()
}

fn addresses(sockets: Vec<OwnedFd>) -> Vec<SocketAddr> {
    let sockets = sockets.into_iter().map(TcpListener::from);
    sockets.map(|socket| socket.local_addr().unwrap()).collect()
}

fn refusal(result: Result<(), ClientError>) -> Refusal {
    match result {
        Err(ClientError::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_waits_outlives_the_agent_that_listened() {
    let (_directory, path) = place();
    let _keeper = Keeper::start(&path);
    let first = connect(&path);
    let made = [listener(), listener()];
    let expected: Vec<_> = made.iter().map(|made| made.local_addr().unwrap()).collect();
    first.put(7, OUT, 0, &fds(&made)).unwrap();
    // The agent dies with its sockets; a source connects, and says something.
    drop((made, first));
    let mut source = TcpStream::connect(expected[1]).unwrap();
    source.write_all(b"hello").unwrap();

    let second = connect(&path);
    assert_eq!(second.namespaces().unwrap(), [7]);
    let mut taken = second.take(7, OUT, 0).unwrap();
    let waiting = TcpListener::from(taken.pop().unwrap());
    assert_eq!(addresses(taken), expected[..1]);
    let (mut accepted, _) = waiting.accept().unwrap();
    let mut said = [0; 5];
    accepted.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"hello");

    // Withdrawn and let go of by the agent, the listener is gone.
    second.withdraw(7).unwrap();
    assert!(second.namespaces().unwrap().is_empty());
    drop(waiting);
    assert!(TcpStream::connect(expected[1]).is_err());
}

#[test]
fn large_groups_travel_in_packets_and_bounds_are_told() {
    let (_directory, path) = place();
    let _keeper = Keeper::start(&path);
    let client = connect(&path);
    let one = [listener()];
    let many: Vec<BorrowedFd<'_>> = std::iter::repeat_n(one[0].as_fd(), SLOT_MAX).collect();
    assert!(many.len() > 2 * PACKET_SOCKETS_MAX);
    client.put(7, IN, 0, &many).unwrap();
    assert_eq!(client.take(7, IN, 0).unwrap().len(), SLOT_MAX);
    assert_eq!(client.take(7, IN, SLOT_MAX - 1).unwrap().len(), 1);
    assert!(client.take(7, OUT, 0).unwrap().is_empty() && client.take(8, IN, 0).unwrap().is_empty());
    assert_eq!(refusal(client.put(7, IN, SLOT_MAX, &fds(&one))), Refusal::Full);
    assert_eq!(refusal(client.put(7, IN, 0, &fds(&one))), Refusal::Taken);
    let connected = TcpStream::connect(one[0].local_addr().unwrap()).unwrap();
    assert_eq!(
        refusal(client.put(8, IN, 0, &[connected.as_fd()])),
        Refusal::Descriptors,
        "only what listens is kept"
    );
    assert_eq!(refusal(client.supersede()), Refusal::Role);
    // A refusal leaves the connection as it was.
    assert_eq!(client.namespaces().unwrap(), [7]);
}

#[test]
fn a_new_keeper_takes_all_and_sends_the_agents_over() {
    let (_directory, path) = place();
    let old = Keeper::start(&path);
    let agent = connect(&path);
    let made = [listener()];
    let address = made[0].local_addr().unwrap();
    agent.put(7, OUT, 0, &fds(&made)).unwrap();
    agent.put(9, IN, 0, &fds(&made)).unwrap();
    drop(made);
    let _waiting = TcpStream::connect(address).unwrap();

    let _new = Keeper::start(&path);
    until(|| (!agent.is_alive()).then_some(()));
    assert!(agent.namespaces().is_err());
    drop(old);
    let agent = connect(&path);
    assert_eq!(agent.namespaces().unwrap(), [7, 9]);
    let taken = TcpListener::from(agent.take(7, OUT, 0).unwrap().pop().unwrap());
    taken.accept().unwrap();
}

#[test]
fn generations_know_who_came_later() {
    let (_directory, path) = place();
    let _keeper = Keeper::start(&path);
    let (old, new) = (connect(&path), connect(&path));
    old.serving(100).unwrap();
    assert!(!old.successor(100).unwrap(), "itself is no successor");
    new.serving(200).unwrap();
    assert!(old.successor(100).unwrap());
    assert!(!new.successor(200).unwrap());
    drop(new);
    until(|| (!old.successor(100).unwrap()).then_some(()));
}

#[test]
fn connections_are_bounded_and_strangers_words_are_refused() {
    let (_directory, path) = place();
    let _keeper = Keeper::start(&path);
    let mut open: Vec<Client> = (0..CONNECTIONS_MAX).map(|_| connect(&path)).collect();
    assert!(Client::connect(&path, Role::Agent).is_err());
    open.pop();
    let client = connect(&path);
    match client.ask(Request::hello(Role::Agent), &[]) {
        Err(ClientError::Refused(Refusal::Order)) => {}
        other => panic!("{other:?}"),
    }
    // What is not understood is refused, and what came beside it closed.
    let made = listener();
    let address = made.local_addr().unwrap();
    super::wire::send(client.socket(), &[99, 1, 2], &[made.as_fd()]).unwrap();
    assert!(!super::wire::receive(client.socket()).unwrap().bytes.is_empty());
    drop(made);
    until(|| TcpStream::connect(address).is_err().then_some(()));
}

#[test]
fn what_is_left_of_a_dead_keeper_is_no_hindrance() {
    let (_directory, path) = place();
    drop(Keeper::start(&path));
    std::os::unix::net::UnixListener::bind(path.with_extension("stale")).unwrap();
    std::fs::rename(path.with_extension("stale"), &path).unwrap();
    let _keeper = Keeper::start(&path);
    assert!(connect(&path).namespaces().unwrap().is_empty());
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
}
