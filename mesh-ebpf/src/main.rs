//! The kernel programs. On the host this is an empty program.
#![cfg_attr(
    target_arch = "bpf",
    no_std,
    no_main,
    feature(core_intrinsics),
    allow(internal_features)
)]
#[cfg(not(target_arch = "bpf"))]
fn main() {}
