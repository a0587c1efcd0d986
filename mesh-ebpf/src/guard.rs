//! Strangers: network namespaces below a guarded cgroup that the agent has not looked at.
//!
//! Asked only for namespaces that are not enrolled, and while the guard is off it costs one array lookup. Without
//! settings (which cannot happen) nobody is a stranger.

use aya_ebpf::helpers::generated::{bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id};
use mesh_abi::guard;

use crate::maps::{GUARDED, KNOWN, STRANGERS, config};

/// Whether the namespace must be known and is not.
#[inline(always)]
pub fn is_stranger(cookie: u64) -> bool {
    let Some(config) = config() else {
        return false;
    };
    // SAFETY: the map entry is only tested for.
    guard::is_stranger(config, || unsafe { KNOWN.get(&cookie) }.is_some(), is_guarded)
}

/// Tells the agent of a stranger. If that fails, the agent finds it by its own means.
#[inline(always)]
pub fn tell(cookie: u64) {
    // SAFETY: the helper reads the current task.
    let cgroup = unsafe { bpf_get_current_cgroup_id() };
    let _the_agent_scans = STRANGERS.insert(&cookie, &cgroup, 0);
}

/// Whether the current process is below a guarded cgroup.
#[inline(always)]
pub fn is_guarded() -> bool {
    for level in 0..guard::LEVELS_MAX {
        // SAFETY: the helper reads the current task; 0 is below its own cgroup.
        let id = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if id == 0 {
            return false;
        }
        // SAFETY: the map entry is only tested for.
        if unsafe { GUARDED.get(&id) }.is_some() {
            return true;
        }
    }
    false
}
