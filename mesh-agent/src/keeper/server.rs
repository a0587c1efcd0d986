//! The keeper's process: one thread that answers questions until it is asked to end.
//!
//! A new keeper first takes all that an older one at the same path holds, then the path itself by renaming, then what
//! came to the old one meanwhile; then the old one ends its connections, so that agents come here and put again what
//! is missing. Whoever is not root, or another user than the keeper's own, is turned away.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    rc::Rc,
};

use anyhow::{Context, Result};
use rustix::{
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with, sockopt::socket_acceptconn,
    },
    process::{Resource, Rlimit, geteuid, getrlimit, setrlimit},
};
use tokio::{
    io::Interest,
    net::{UnixListener, UnixStream},
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use super::{
    CONNECTIONS_MAX, Client, ClientError, VERSION,
    codec::{Refusal, Request, Response, Role, Slot},
    store::Store,
    wire::{self, Packet},
};

/// The pause after an accept that failed for want of something (descriptors, memory).
const REST: std::time::Duration = std::time::Duration::from_millis(50);

/// What all connections share.
struct Shared {
    store: RefCell<Store<OwnedFd>>,
    /// The agents that serve: by connection, when they were started.
    serving: RefCell<BTreeMap<u64, u64>>,
    /// Whether a newer keeper has taken over.
    superseded: watch::Sender<bool>,
}

/// Runs a keeper at that path until it is asked to end. Its sockets, and with them what waits in their queues, end with it
/// unless an agent or another keeper holds them too.
pub fn run(path: &Path) -> Result<()> {
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .max_blocking_threads(1)
        .build()?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, serve(path))
}

async fn serve(path: &Path) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        result = keep(path) => result?,
    }
    tracing::info!("the keeper ends");
    Ok(())
}

/// Keeps until dropped. Must be called within a `LocalSet`.
pub(super) async fn keep(path: &Path) -> Result<()> {
    let shared = Rc::new(Shared {
        store: RefCell::default(),
        serving: RefCell::default(),
        superseded: watch::Sender::new(false),
    });
    let listener = begin(path, &mut shared.store.borrow_mut())?;
    tracing::info!(path = %path.display(), sockets = shared.store.borrow().len(), "keeping");
    accept(&shared, &listener).await?;
    Ok(())
}

/// Takes over from an older keeper, if there is one, and takes its place.
fn begin(path: &Path, store: &mut Store<OwnedFd>) -> Result<UnixListener> {
    let before = match Client::connect(path, Role::Keeper) {
        Ok(before) => Some(before),
        Err(error) => {
            tracing::info!(error = &error as &dyn std::error::Error, "no keeper before this one");
            None
        }
    };
    if let Some(before) = &before {
        follow(before, store).context("taking over from the keeper before")?;
    }
    let listener = place(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    if let Some(before) = before {
        // What was put or withdrawn while the place was taken. From here on agents come to us, and put what is missing.
        let caught_up = follow(&before, store).and_then(|()| before.supersede());
        if let Err(error) = caught_up {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the keeper before did not answer to the end"
            );
        }
    }
    Ok(listener)
}

/// Makes the store equal to what another keeper holds.
fn follow(other: &Client, store: &mut Store<OwnedFd>) -> Result<(), ClientError> {
    let held = other.namespaces()?;
    let mut after = 0;
    loop {
        let page = store.namespaces(after);
        let Some(last) = page.last() else { break };
        after = *last;
        for netns in page {
            if held.binary_search(&netns).is_err() {
                store.withdraw(netns);
            }
        }
    }
    for netns in held {
        for slot in Slot::ALL {
            let first = store.get(netns, slot, 0).1;
            store.put(netns, slot, first, other.take(netns, slot, first)?)?;
        }
    }
    Ok(())
}

/// A socket of packets that listens (tokio's type cares for the readiness only), first under another name with the right mode, then at its path.
fn place(path: &Path) -> io::Result<UnixListener> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let mut beside = PathBuf::from(path).into_os_string();
    beside.push(format!(".{}", std::process::id()));
    let beside = PathBuf::from(beside);
    let _not_there_as_a_rule = fs::remove_file(&beside);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    bind(&listener, &SocketAddrUnix::new(&beside)?)?;
    fs::set_permissions(&beside, fs::Permissions::from_mode(0o600))?;
    listen(&listener, CONNECTIONS_MAX as i32)?;
    let listener = UnixListener::from_std(listener.into())?;
    fs::rename(&beside, path)?;
    Ok(listener)
}

async fn accept(shared: &Rc<Shared>, listener: &UnixListener) -> io::Result<()> {
    let mut number = 0;
    let open = Rc::new(());
    loop {
        let connection = match listener.accept().await {
            Ok((connection, _)) => connection,
            Err(error) => {
                tracing::warn!(%error, "accepting");
                tokio::time::sleep(REST).await;
                continue;
            }
        };
        if Rc::strong_count(&open) > CONNECTIONS_MAX || !is_trusted(&connection) {
            tracing::warn!("a connection is turned away");
            continue;
        }
        number += 1;
        let (shared, number, place) = (shared.clone(), number, open.clone());
        tokio::task::spawn_local(async move {
            if let Err(error) = connected(&shared, connection, number).await {
                tracing::debug!(%error, "a connection ended");
            }
            shared.serving.borrow_mut().remove(&number);
            drop(place);
        });
    }
}

/// Only root and the keeper's own user may ask.
fn is_trusted(connection: &UnixStream) -> bool {
    let trusted = [0, geteuid().as_raw()];
    connection.peer_cred().is_ok_and(|peer| trusted.contains(&peer.uid()))
}

async fn connected(shared: &Shared, connection: UnixStream, number: u64) -> io::Result<()> {
    let mut superseded = shared.superseded.subscribe();
    let mut role = None;
    loop {
        let packet = tokio::select! {
            biased;
            packet = receive(&connection) => packet?,
            // The one who took over hears an answer first; the others come to the new keeper.
            _ = superseded.wait_for(|superseded| *superseded), if role != Some(Role::Keeper) => return Ok(()),
        };
        if packet.bytes.is_empty() {
            return Ok(());
        }
        let answer = match Request::parse(&packet.bytes) {
            Ok(request) if request.sockets() != packet.sockets.len() => Err(Refusal::Descriptors),
            Ok(request) => answer(shared, number, &mut role, request, packet.sockets),
            Err(_) => Err(Refusal::Unknown),
        };
        match answer.unwrap_or_else(|refusal| Answer::Plain(Response::Refused(refusal))) {
            Answer::Plain(response) => wire::send(&connection, &response.to_bytes(), &[])?,
            Answer::Slot { netns, slot, first } => {
                let store = shared.store.borrow();
                let (sockets, total) = store.get(netns, slot, first);
                let sockets: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
                let response = Response::Sockets {
                    // Both are bounded: by a packet, and by a slot.
                    count: u8::try_from(sockets.len()).unwrap_or(0),
                    total: u16::try_from(total).unwrap_or(u16::MAX),
                };
                wire::send(&connection, &response.to_bytes(), &sockets)?;
            }
        }
    }
}

/// An answer in words, or with the sockets of a slot.
enum Answer {
    Plain(Response),
    Slot { netns: u64, slot: Slot, first: usize },
}

fn answer(
    shared: &Shared,
    number: u64,
    role: &mut Option<Role>,
    request: Request,
    sockets: Vec<OwnedFd>,
) -> Result<Answer, Refusal> {
    let mut store = shared.store.borrow_mut();
    let plain = match request {
        Request::Hello { .. } if role.is_some() => return Err(Refusal::Order),
        Request::Hello { role: who, .. } => {
            *role = Some(who);
            Response::Hello {
                version: VERSION,
                sockets: u32::try_from(store.len()).unwrap_or(u32::MAX),
            }
        }
        _ if role.is_none() => return Err(Refusal::Order),
        _ if *shared.superseded.borrow() => return Err(Refusal::Superseded),
        Request::Namespaces { after } => Response::Namespaces(store.namespaces(after)),
        Request::Take { netns, slot, first } => {
            let first = usize::from(first);
            return Ok(Answer::Slot { netns, slot, first });
        }
        Request::Put { netns, slot, first, .. } => {
            // Anything else would be kept for nobody.
            if !sockets.iter().all(|socket| socket_acceptconn(socket).unwrap_or(false)) {
                return Err(Refusal::Descriptors);
            }
            store.put(netns, slot, usize::from(first), sockets)?;
            Response::Done
        }
        Request::Withdraw { netns } => {
            store.withdraw(netns);
            Response::Done
        }
        Request::Serving { started } => {
            shared.serving.borrow_mut().insert(number, started);
            Response::Done
        }
        Request::Successor { started } => {
            let serving = shared.serving.borrow();
            Response::Successor(serving.values().any(|other| *other > started))
        }
        Request::Supersede if *role != Some(Role::Keeper) => return Err(Refusal::Role),
        Request::Supersede => {
            tracing::info!(sockets = store.len(), "a newer keeper has taken over");
            store.clear();
            shared.superseded.send_replace(true);
            Response::Done
        }
    };
    Ok(Answer::Plain(plain))
}

/// As many descriptors as the system allows this process.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "the limit of descriptors stays as it is");
    }
}

async fn receive(connection: &UnixStream) -> io::Result<Packet> {
    loop {
        connection.readable().await?;
        match connection.try_io(Interest::READABLE, || wire::receive(connection)) {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            received => return received,
        }
    }
}
