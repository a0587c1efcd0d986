//! Enrolled pods that share the node's network namespace: told from it, and from each other, by their cgroups.
//!
//! Asked only for the node's own namespace. A process that is below none of these cgroups is left alone: the node's
//! daemons, its kubelet and the agent are nobody's pods.

use aya_ebpf::helpers::generated::bpf_get_current_ancestor_cgroup_id;
use mesh_abi::{PodEntry, guard};

use crate::maps::{HOSTED, config};

/// The entry of the current process's pod, if it is enrolled and in the node's namespace.
#[inline(always)]
pub fn entry(netns: u64) -> Option<&'static PodEntry> {
    if config()?.home != netns {
        return None;
    }
    for level in 0..guard::LEVELS_MAX {
        // SAFETY: the helper reads the current task; 0 is below its own cgroup.
        let id = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if id == 0 {
            return None;
        }
        // SAFETY: the entry is read only; an update replaces it as a whole, and it outlives the program.
        let entry = unsafe { HOSTED.get(&id) };
        if entry.is_some() {
            return entry;
        }
    }
    None
}
