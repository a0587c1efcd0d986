//! A pod that the agent holds: who it is, and a way to make sockets in its network namespace.

use std::{
    io,
    net::IpAddr,
    os::fd::{FromRawFd, IntoRawFd},
    sync::Arc,
};

use arc_swap::ArcSwap;
use mesh_abi::AGENT_MARK;
use mesh_api::{
    identity::SpiffeId,
    workload::{ObjectName, Workload},
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpSocket;

use super::Netns;
use crate::{
    kernel::NetnsCookie,
    net::{NetnsId, SocketSource},
};

/// A pod of this node. Lives as long as a connection of it does; keeps the network namespace open.
#[derive(Debug)]
pub struct Pod {
    name: ObjectName,
    identity: SpiffeId,
    netns: Arc<Netns>,
    cookie: NetnsCookie,
    workload: ArcSwap<Workload>,
}

impl Pod {
    /// A pod with its network namespace.
    pub fn new(workload: Arc<Workload>, netns: Arc<Netns>) -> Pod {
        Pod {
            name: workload.name.clone(),
            identity: workload.identity.clone(),
            cookie: netns.cookie(),
            netns,
            workload: ArcSwap::new(workload),
        }
    }

    /// A pod that shares the node's network namespace, with its cgroup's id.
    pub fn hosted(workload: Arc<Workload>, home: Arc<Netns>, cgroup_id: u64) -> Pod {
        Pod {
            cookie: NetnsCookie::hosted(cgroup_id),
            ..Pod::new(workload, home)
        }
    }

    /// Whether it shares the node's network namespace.
    pub fn is_hosted(&self) -> bool {
        self.cookie.cgroup_id().is_some()
    }

    /// Its name; never changes.
    pub fn name(&self) -> &ObjectName {
        &self.name
    }

    /// Its identity; never changes: a pod with another one is another pod.
    pub fn identity(&self) -> &SpiffeId {
        &self.identity
    }

    /// What is known of it now.
    pub fn workload(&self) -> Arc<Workload> {
        self.workload.load_full()
    }

    /// Its network namespace's cookie, or what stands for it: no other pod has the same.
    pub fn cookie(&self) -> NetnsCookie {
        self.cookie
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Its first address of a family.
    pub fn address(&self, ipv6: bool) -> Option<IpAddr> {
        self.workload.load().address(ipv6)
    }

    /// A non-blocking TCP socket in the pod's network namespace, marked as the agent's own, so that it is not
    /// captured. Synchronous: the calling thread is in the namespace for some microseconds.
    pub fn socket(&self, ipv6: bool) -> io::Result<TcpSocket> {
        let domain = if ipv6 { Domain::IPV6 } else { Domain::IPV4 };
        let socket = self
            .netns
            .run(|| Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP)))??;
        socket.set_mark(AGENT_MARK)?;
        // SAFETY: the descriptor is ours, open, and a TCP socket.
        Ok(unsafe { TcpSocket::from_raw_fd(socket.into_raw_fd()) })
    }

    /// Takes what is newly known; name and identity are the same.
    pub(super) fn update(&self, workload: Arc<Workload>) {
        self.workload.store(workload);
    }
}

impl SocketSource for Pod {
    fn socket(&self, ipv6: bool) -> io::Result<TcpSocket> {
        Pod::socket(self, ipv6)
    }

    fn netns(&self) -> NetnsId {
        NetnsId(self.cookie().0)
    }
}
