//! A worker's thread and its accept loops: from a listener in a pod's network namespace to a connection whose two
//! addresses are known. The control thread speaks to a worker by [`WorkerCommand`] alone.
//!
//! Which listener accepted says whose connection it is. Outbound, the kernel's record gives the destination that the
//! application asked for; a connection without a record is reset, for nobody knows where it should go. Inbound, the
//! socket's own local address is the original one. Nothing is read here and nothing decided.

use std::{
    collections::BTreeMap, io, net::SocketAddr, os::fd::AsFd, rc::Rc, sync::Arc, thread::JoinHandle, time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    time::Instant,
};

use crate::{
    event::Refusal,
    kernel::NetnsCookie,
    net,
    path::{self, Captured},
    pods::{Pod, PodListeners, WorkerCommand},
    worker::{Shared, SourceKey, Worker},
};

/// Commands that may wait for a worker.
pub const COMMANDS_MAX: usize = 1024;

/// How long an accept loop rests when the process is out of descriptors or memory.
const REST: Duration = Duration::from_millis(50);
/// How long a listener must have been empty after its pod's retirement before it closes.
const LINGER: Duration = Duration::from_secs(1);
/// How long connections that wait in a listener's queue are still taken when the agent drains and nobody holds them. The
/// kernel goes on sending new ones, so the listener must close although it is never empty: from then on they are refused.
const LAST_CALL: Duration = Duration::from_millis(20);

/// Until when a listener accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Until {
    /// As long as its pod is served.
    Retirement,
    /// The pod is retired, nothing new is sent here: until the queue has been empty for a while.
    Empty,
    /// The agent drains: until then, whatever comes.
    Moment(Instant),
}

/// Which way a listener's connections go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Outbound,
    Inbound,
}

/// Starts a worker's thread.
pub fn start(
    index: usize,
    shared: Arc<Shared>,
    commands: mpsc::Receiver<WorkerCommand>,
) -> io::Result<JoinHandle<io::Result<()>>> {
    std::thread::Builder::new()
        .name(format!("worker-{index}"))
        .spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let local = tokio::task::LocalSet::new();
            local.block_on(&runtime, run(Worker::new(shared), commands));
            // Connections that outlive the drain's patience end with the runtime.
            Ok(())
        })
}

/// Serves what the commands say until one of them is to drain and the drain is over. Must be called within a `LocalSet`,
/// which holds the connections.
pub async fn run(worker: Rc<Worker>, mut commands: mpsc::Receiver<WorkerCommand>) {
    let tunnels = worker.tunnels.clone();
    let maintenance = tokio::task::spawn_local(async move { tunnels.maintain().await });
    let mut serving: BTreeMap<NetnsCookie, watch::Sender<Until>> = BTreeMap::new();
    let mut last_call = LAST_CALL;
    while let Some(command) = commands.recv().await {
        match command {
            WorkerCommand::Serve(listeners) => {
                let stop = serving
                    .entry(listeners.pod.cookie())
                    .or_insert_with(|| watch::Sender::new(Until::Retirement));
                if *stop.borrow() != Until::Retirement {
                    // The pod was retired and came back: the old acceptors end, new ones get a signal of their own.
                    *stop = watch::Sender::new(Until::Retirement);
                }
                serve(&worker, listeners, stop.subscribe());
            }
            WorkerCommand::Retire(cookie) => {
                if let Some(stop) = serving.remove(&cookie) {
                    stop.send_replace(Until::Empty);
                }
            }
            WorkerCommand::Drain(leave) => {
                if leave.held {
                    // What waits is somebody else's from now on.
                    last_call = Duration::ZERO;
                }
                break;
            }
        }
    }
    let last = Until::Moment(Instant::now() + last_call);
    for stop in serving.values() {
        stop.send_replace(last);
    }
    worker.tunnels.drain();
    // Connections that must close still say so, to their ends and to the records; the composition root bounds this wait.
    worker.shared.drain.over().await;
    maintenance.abort();
}

/// Accepts on all of a pod's listeners until `stop` says otherwise.
fn serve(worker: &Rc<Worker>, listeners: PodListeners, stop: watch::Receiver<Until>) {
    let PodListeners {
        pod,
        outbound,
        inbound,
        serving,
    } = listeners;
    let all = outbound
        .into_iter()
        .map(|listener| (listener, Direction::Outbound))
        .chain(inbound.into_iter().map(|listener| (listener, Direction::Inbound)));
    for (listener, direction) in all {
        match TcpListener::from_std(listener) {
            Ok(listener) => {
                let (worker, pod, stop) = (worker.clone(), pod.clone(), stop.clone());
                tokio::task::spawn_local(accept(worker, pod, listener, direction, stop));
            }
            Err(error) => {
                // Unconfirmed: the pod shows as not captured, with this worker's number.
                tracing::error!(%error, pod = %pod.name(), "taking a listener");
                return;
            }
        }
    }
    serving.confirm();
}

async fn accept(
    worker: Rc<Worker>,
    pod: Arc<Pod>,
    listener: TcpListener,
    direction: Direction,
    mut stop: watch::Receiver<Until>,
) {
    let mut drains = None;
    let own = worker.source(SourceKey::Pod(pod.cookie()));
    loop {
        let accepted = tokio::select! {
            biased;
            // An error means that the sender is gone: the worker ends.
            until = async { stop.wait_for(|until| *until != Until::Retirement).await.map(|until| *until) } => {
                let last = match until {
                    Ok(Until::Moment(moment)) if moment <= Instant::now() => return,
                    Ok(Until::Moment(moment)) => {
                        // Those that wait are part of what the drain waits for.
                        drains.get_or_insert_with(|| worker.shared.drain.guard());
                        moment
                    }
                    Ok(Until::Retirement | Until::Empty) | Err(_) => Instant::now() + LINGER,
                };
                match tokio::time::timeout_at(last, listener.accept()).await {
                    Ok(accepted) => accepted,
                    Err(_) => return,
                }
            }
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, source)) => {
                let address = SocketAddr::new(source.ip().to_canonical(), source.port());
                let source = match direction {
                    Direction::Outbound => own.clone(),
                    Direction::Inbound => worker.source(SourceKey::Address(address.ip())),
                };
                let Some(place) = worker.place(&source) else {
                    refuse(&worker, stream, &pod, address, direction);
                    continue;
                };
                let (worker, pod) = (worker.clone(), pod.clone());
                let guard = worker.shared.drain.guard();
                tokio::task::spawn_local(async move {
                    match captured(&worker, stream, pod, address, direction) {
                        Ok(captured) => match direction {
                            Direction::Outbound => path::outbound::serve(&worker, captured).await,
                            Direction::Inbound => path::inbound::serve(&worker, captured).await,
                        },
                        Err(refusal) => worker.shared.events.refused(refusal),
                    }
                    drop((place, guard));
                });
            }
            Err(error) if is_exhaustion(&error) => {
                // What lies idle makes room for what is asked for.
                worker.tunnels.let_go();
                worker.bound_reached(
                    "descriptors or memory",
                    usize::try_from(net::descriptors()).unwrap_or(usize::MAX),
                );
                tracing::debug!(%error, pod = %pod.name(), "accepting");
                tokio::time::sleep(REST).await;
            }
            // The connection was gone before it was taken.
            Err(_) => {}
        }
    }
}

/// Resets a connection for which there is no place.
fn refuse(worker: &Worker, stream: TcpStream, pod: &Pod, source: SocketAddr, direction: Direction) {
    if direction == Direction::Outbound {
        // Nobody will ask for it.
        worker.shared.kernel.take_original_destination(pod.cookie(), source);
    }
    net::reset_on_close(&stream);
    worker.shared.events.refused(Refusal::Capacity);
}

fn captured(
    worker: &Worker,
    stream: TcpStream,
    pod: Arc<Pod>,
    source: SocketAddr,
    direction: Direction,
) -> Result<Captured, Refusal> {
    net::tune(&stream);
    let original = match direction {
        Direction::Outbound => worker.shared.kernel.take_original_destination(pod.cookie(), source),
        // Who connects to the agent's own listener was not steered: delivering there would come back here for ever.
        Direction::Inbound => stream
            .local_addr()
            .ok()
            .filter(|local| pod.workload().addresses.contains(&local.ip().to_canonical())),
    };
    let Some(original) = original else {
        net::reset_on_close(&stream);
        tracing::warn!(pod = %pod.name(), %source, socket = ?stream.as_fd(), "no original destination on record");
        return Err(Refusal::OriginalDestinationMissing);
    };
    let original_destination = SocketAddr::new(original.ip().to_canonical(), original.port());
    Ok(Captured {
        stream,
        pod,
        source,
        original_destination,
    })
}

/// Whether the process, not the connection, is what is wrong.
fn is_exhaustion(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)
    )
}
