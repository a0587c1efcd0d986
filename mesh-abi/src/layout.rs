//! Layout of every shared type, checked by both compilers: no hole, no surprise.

use core::mem::{align_of, offset_of, size_of};

use crate::{
    addr::{Addr, Endpoint},
    announce::{Announcement, Tuple},
    direct::{DirectEndpoint, DirectEntry, DirectFlow, DirectKey, DirectState},
    flow::{FlowKey, SocketView},
    pod::{Config, PodEntry, PortSet, SteerEntry},
};

const _: () = {
    assert!(size_of::<Addr>() == 16 && align_of::<Addr>() == 4);
    assert!(size_of::<Endpoint>() == 20 && align_of::<Endpoint>() == 4 && offset_of!(Endpoint, port) == 16);
    assert!(size_of::<FlowKey>() == 32 && align_of::<FlowKey>() == 8);
    assert!(offset_of!(FlowKey, source) == 8 && offset_of!(FlowKey, agent_port) == 28);
    assert!(size_of::<SocketView>() == 44 && align_of::<SocketView>() == 4);
    assert!(offset_of!(SocketView, local) == 20 && offset_of!(SocketView, role) == 36);
    assert!(offset_of!(SocketView, number) == 40);
    assert!(size_of::<Tuple>() == 40 && align_of::<Tuple>() == 4 && offset_of!(Tuple, destination) == 20);
    assert!(size_of::<Announcement>() == 8 && align_of::<Announcement>() == 4);
    assert!(size_of::<DirectKey>() == 32 && align_of::<DirectKey>() == 8 && offset_of!(DirectKey, pad) == 28);
    assert!(size_of::<DirectEndpoint>() == 32 && offset_of!(DirectEndpoint, pad) == 28);
    assert!(size_of::<DirectEntry>() == 280 && align_of::<DirectEntry>() == 8);
    assert!(offset_of!(DirectEntry, pad) == 20 && offset_of!(DirectEntry, endpoints) == 24);
    assert!(size_of::<DirectState>() == 32 && align_of::<DirectState>() == 8);
    assert!(size_of::<DirectFlow>() == 128 && align_of::<DirectFlow>() == 8);
    assert!(offset_of!(DirectFlow, source) == 64 && offset_of!(DirectFlow, ended_in) == 124);
    assert!(size_of::<PortSet>() == 64 && align_of::<PortSet>() == 2);
    assert!(
        size_of::<Config>() == 280
            && align_of::<Config>() == 8
            && offset_of!(Config, guard) == 12
            && offset_of!(Config, home) == 16
            && offset_of!(Config, node) == 24
    );
    assert!(size_of::<PodEntry>() == 168 && align_of::<PodEntry>() == 4);
    assert!(offset_of!(PodEntry, addresses) == 40 && offset_of!(PodEntry, exclude_outbound) == 104);
    assert!(size_of::<SteerEntry>() == 136 && align_of::<SteerEntry>() == 8);
    assert!(offset_of!(SteerEntry, probes) == 8 && offset_of!(SteerEntry, exclude_inbound) == 72);
};

/// aya may copy these types to and from maps.
#[cfg(feature = "user")]
mod user {
    use super::*;
    // SAFETY: `repr(C)`, made of integers only, without padding (asserted above): every bit pattern is a value.
    unsafe impl aya::Pod for FlowKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Endpoint {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Addr {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Config {}
    // SAFETY: as above.
    unsafe impl aya::Pod for PodEntry {}
    // SAFETY: as above.
    unsafe impl aya::Pod for SteerEntry {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Tuple {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Announcement {}
    // SAFETY: as above.
    unsafe impl aya::Pod for DirectKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for DirectEntry {}
    // SAFETY: as above.
    unsafe impl aya::Pod for DirectState {}
    // SAFETY: as above.
    unsafe impl aya::Pod for DirectFlow {}
}
