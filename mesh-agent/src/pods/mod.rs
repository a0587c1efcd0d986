//! The pods of this node: wanted ones against captured ones; enrol, change in place, retire.
//!
//! [`Pods`] belongs to the control thread. For each wanted pod it opens the network namespace, makes the listeners
//! there, has the kernel capture the pod, and hands the listeners to the workers. From the moment of capture a
//! connection waits in a listener's backlog, so nothing goes unguarded while the workers get ready; a pod counts as
//! captured when every worker has confirmed that it serves.
//!
//! What fails is kept as the pod's reason and tried again by the next [`Pods::reconcile`]. Live connections are never
//! touched, neither by a change nor by retirement.

mod directory;
mod discover;
mod gate;
mod kept;
mod latency;
mod listeners;
mod netns;
mod pod;
mod reconcile;
mod sever;

use std::{fmt, io, net::TcpListener, path::PathBuf, sync::Arc};

use mesh_api::workload::ObjectName;
use tokio::sync::oneshot;

use crate::kernel::{KernelError, NetnsCookie};

pub use directory::Directory;
pub use discover::{Discovery, PodUid, Sandbox, Sandboxes, blindness};
pub use gate::GateConfig;
pub use latency::CaptureTimes;
pub use netns::Netns;
pub use pod::Pod;
pub use reconcile::Pods;
pub use sever::{SocketName, sever, sever_sockets};

/// What the control thread tells a worker.
#[derive(Debug)]
pub enum WorkerCommand {
    /// Serve a pod's listeners.
    Serve(PodListeners),
    /// Stop accepting for a pod: serve what its listeners hold already, then close them.
    Retire(NetnsCookie),
    /// Stop accepting altogether and end when the last connection has.
    Drain(Leave),
}

/// How a draining agent leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leave {
    /// The keeper holds its listeners: what waits in them waits for another agent. Else they end with this one, and what
    /// waits in them is served first.
    pub held: bool,
    /// Another agent serves its pods already.
    pub successor: bool,
}

/// One worker's listeners in one pod's network namespace; non-blocking.
#[derive(Debug)]
pub struct PodListeners {
    /// The pod.
    pub pod: Arc<Pod>,
    /// Where captured connections arrive: IPv4, and IPv6 where the namespace has it.
    pub outbound: Vec<TcpListener>,
    /// Where steered connections arrive.
    pub inbound: Vec<TcpListener>,
    /// To be confirmed as soon as the worker accepts on all of them.
    pub serving: Serving,
}

/// A worker's word that it serves a pod; dropped unconfirmed, it means that it does not.
#[derive(Debug)]
pub struct Serving(oneshot::Sender<()>);

impl Serving {
    /// The worker accepts on every listener.
    pub fn confirm(self) {
        // The other side may have stopped waiting; the next reconciliation asks anew.
        let _nobody_waits = self.0.send(());
    }
}

/// How a pod of this node stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodStatus {
    /// Which pod.
    pub name: ObjectName,
    /// Whether it should be in the mesh.
    pub enrolled: bool,
    /// Whether its connections are captured and served.
    pub captured: bool,
    /// Why it is enrolled but not captured, or captured with a reservation.
    pub reason: Option<String>,
    /// Whether there is nothing to capture: its sandbox is still being made, or it has none of its own.
    pub is_absent: bool,
}

/// Why an enrolled pod is not captured.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// The workload names no network namespace.
    #[error("the pod names no network namespace")]
    NoNetns,
    /// The network namespace could not be opened.
    #[error("network namespace {}", .path.display())]
    Netns {
        /// Its file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The pod shares the agent's own network namespace, and with it the node's.
    #[error("the pod shares the node's network namespace")]
    HostNetwork,
    /// Another pod has the same network namespace.
    #[error("pod {0} has the same network namespace")]
    SharedNetns(ObjectName),
    /// The pod has no sandbox on this node: the runtime has not made one, or it has ended.
    #[error("no sandbox yet")]
    NoSandbox,
    /// The pod has no network namespace of its own (`hostNetwork`), and nothing else tells it from the node.
    #[error("host network")]
    NodeNetwork,
    /// The same, and its cgroup does not tell either: it is of version 1.
    #[error("host network, and its cgroup is not in the cgroup2 hierarchy")]
    NoCgroup2,
    /// The pod has the node's network and is what the node or the mesh itself is made of.
    #[error("host network, and a part of the node or of the mesh itself")]
    NodeItself,
    /// No process is in the sandbox's network namespace.
    #[error("a sandbox without a process in a network namespace")]
    NoProcess,
    /// The network plugin has not given the sandbox an address.
    #[error("a sandbox without an address")]
    BareSandbox,
    /// The workload has no address.
    #[error("the pod has no address")]
    NoAddress,
    /// A listener could not be made.
    #[error("a listener in the pod's network namespace")]
    Listen(#[source] io::Error),
    /// The kernel side refused.
    #[error("{0}")]
    Kernel(#[from] KernelError),
    /// A worker does not take commands, or did not confirm in time.
    #[error("worker {0} does not serve the pod")]
    Worker(usize),
}

impl PodStatus {
    /// Whether it is as it should be, as far as there is something to capture.
    fn is_settled(&self) -> bool {
        self.captured == self.enrolled || self.is_absent
    }
}

impl PodError {
    /// Whether there is nothing to capture, so that nothing goes unguarded.
    fn is_absence(&self) -> bool {
        matches!(
            self,
            PodError::NoSandbox
                | PodError::NoProcess
                | PodError::BareSandbox
                | PodError::NodeNetwork
                | PodError::NoCgroup2
                | PodError::NodeItself
        )
    }
}

/// An error and its causes in one line.
struct Chain<'a>(&'a dyn std::error::Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut next = self.0.source();
        while let Some(cause) = next {
            write!(f, ": {cause}")?;
            next = cause.source();
        }
        Ok(())
    }
}
