//! Pods as the path sees them: an identity, and sockets in a namespace, which here are the simulated network's.

use std::{io, net::IpAddr, sync::Arc};

use arc_swap::ArcSwap;
use mesh_api::{
    identity::SpiffeId,
    workload::{ObjectName, Workload},
};
use real_tokio::sync::oneshot;

use crate::{
    kernel::NetnsCookie,
    net::{NetnsId, SocketSource, StdListener, TcpSocket},
};

#[path = "../../mesh-agent/src/pods/directory.rs"]
mod directory;

pub use directory::Directory;

/// Tells a directory which pods there are.
pub fn replace<'a>(directory: &Directory, pods: impl Iterator<Item = &'a Arc<Pod>>) {
    directory.replace(pods);
}

/// What the control thread tells a worker.
#[derive(Debug)]
pub enum WorkerCommand {
    /// Serve a pod's listeners.
    Serve(PodListeners),
    /// Stop accepting for a pod.
    Retire(NetnsCookie),
    /// Stop accepting altogether.
    Drain(Leave),
}

/// How a draining agent leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leave {
    pub held: bool,
    pub successor: bool,
}

/// One worker's listeners in one pod.
#[derive(Debug)]
pub struct PodListeners {
    pub pod: Arc<Pod>,
    pub outbound: Vec<StdListener>,
    pub inbound: Vec<StdListener>,
    pub serving: Serving,
}

/// A worker's word that it serves a pod.
#[derive(Debug)]
pub struct Serving(pub oneshot::Sender<()>);

impl Serving {
    /// The worker accepts on every listener.
    pub fn confirm(self) {
        let _nobody_waits = self.0.send(());
    }
}

/// A pod of a node.
#[derive(Debug)]
pub struct Pod {
    name: ObjectName,
    identity: SpiffeId,
    cookie: NetnsCookie,
    workload: ArcSwap<Workload>,
}

impl Pod {
    /// A pod and its namespace.
    pub fn new(workload: Arc<Workload>, cookie: NetnsCookie) -> Pod {
        Pod {
            name: workload.name.clone(),
            identity: workload.identity.clone(),
            cookie,
            workload: ArcSwap::new(workload),
        }
    }

    /// Whether it shares the node's network namespace: none does here.
    pub fn is_hosted(&self) -> bool {
        false
    }

    pub fn name(&self) -> &ObjectName {
        &self.name
    }

    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    pub fn workload(&self) -> Arc<Workload> {
        self.workload.load_full()
    }

    pub fn cookie(&self) -> NetnsCookie {
        self.cookie
    }

    pub fn address(&self, ipv6: bool) -> Option<IpAddr> {
        self.workload.load().address(ipv6)
    }

    pub fn socket(&self, _ipv6: bool) -> io::Result<TcpSocket> {
        Ok(TcpSocket::in_netns(self.cookie.0))
    }

    /// Takes what is newly known.
    pub fn update(&self, workload: Arc<Workload>) {
        self.workload.store(workload);
    }
}

impl SocketSource for Pod {
    fn socket(&self, ipv6: bool) -> io::Result<TcpSocket> {
        Pod::socket(self, ipv6)
    }

    fn netns(&self) -> NetnsId {
        NetnsId(self.cookie.0)
    }
}
