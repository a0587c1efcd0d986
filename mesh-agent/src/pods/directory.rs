//! Which pod is which: read by every worker, written by the control thread.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use arc_swap::ArcSwap;
use mesh_api::workload::ObjectName;

use super::Pod;
use crate::kernel::NetnsCookie;

/// The pods that this agent holds, by name, address and cookie. A clone shows the same pods.
#[derive(Clone, Debug, Default)]
pub struct Directory(Arc<ArcSwap<Table>>);

#[derive(Debug, Default)]
struct Table {
    by_name: BTreeMap<ObjectName, Arc<Pod>>,
    by_address: HashMap<IpAddr, Arc<Pod>>,
    by_cookie: HashMap<NetnsCookie, Arc<Pod>>,
}

impl Directory {
    /// The pod of that name.
    pub fn by_name(&self, name: &ObjectName) -> Option<Arc<Pod>> {
        self.0.load().by_name.get(name).cloned()
    }

    /// The pod that has the address.
    pub fn by_address(&self, ip: IpAddr) -> Option<Arc<Pod>> {
        self.0.load().by_address.get(&ip).cloned()
    }

    /// The pod in the network namespace.
    pub fn by_cookie(&self, cookie: NetnsCookie) -> Option<Arc<Pod>> {
        self.0.load().by_cookie.get(&cookie).cloned()
    }

    /// Every pod, by name.
    pub fn all(&self) -> Vec<Arc<Pod>> {
        self.0.load().by_name.values().cloned().collect()
    }

    pub(super) fn replace<'a>(&self, pods: impl Iterator<Item = &'a Arc<Pod>>) {
        let mut table = Table::default();
        for pod in pods {
            table.by_name.insert(pod.name().clone(), pod.clone());
            table.by_cookie.insert(pod.cookie(), pod.clone());
            // The node's addresses are nobody's own.
            for ip in pod.workload().addresses.iter().filter(|_| !pod.is_hosted()) {
                table.by_address.insert(*ip, pod.clone());
            }
        }
        self.0.store(Arc::new(table));
    }
}
