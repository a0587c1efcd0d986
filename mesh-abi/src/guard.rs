//! The decision about a network namespace that is not enrolled: whether it must be known, and is not.
//!
//! Between a pod's first process and the agent's look at it, nobody can say whether the pod is to be in the mesh. In a
//! guarded cgroup such a namespace is a stranger, and a stranger's connections are refused. Pure: the connect programs
//! run this very function, and so do the tests on the host.

use crate::pod::{Config, GUARD_REFUSE};

/// Levels of the cgroup tree at which a guarded cgroup is looked for.
pub const LEVELS_MAX: i32 = 16;

/// Whether the namespace is a stranger. `is_known`: the agent has looked at it; `is_guarded`: the process is below a
/// guarded cgroup. Both are asked only as far as needed, because most connections of a node need neither.
#[inline(always)]
pub fn is_stranger(config: &Config, is_known: impl FnOnce() -> bool, is_guarded: impl FnOnce() -> bool) -> bool {
    config.guard == GUARD_REFUSE && !is_known() && is_guarded()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::GUARD_OFF;

    #[test]
    fn only_the_unknown_in_guarded_cgroups_are_strangers() {
        for (guard, is_known, is_guarded, expected) in [
            (GUARD_OFF, false, true, false),
            (GUARD_REFUSE, false, true, true),
            (GUARD_REFUSE, true, true, false),
            (GUARD_REFUSE, false, false, false),
        ] {
            let config = Config {
                guard,
                ..Config::default()
            };
            assert_eq!(is_stranger(&config, || is_known, || is_guarded), expected);
        }
    }
}
