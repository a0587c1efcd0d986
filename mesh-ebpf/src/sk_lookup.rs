//! `sk_lookup` on each enrolled pod's network namespace: inbound connections go to the agent's listener, with their
//! original local address and port.
//!
//! | situation | answer |
//! | --- | --- |
//! | loopback, self traffic and the agent's deliveries, excluded port | passes |
//! | a flow announced as direct, or as the node's own and to a probe port | passes |
//! | local address unknown to the mesh (map miss) | reset: it would be a way around the mesh |
//! | no agent listens, fail mode refuse | reset |
//! | no agent listens, fail mode pass | passes |
//!
//! UDP is not touched.

use aya_ebpf::{
    bindings::sk_action::{SK_DROP, SK_PASS},
    macros::sk_lookup,
    programs::SkLookupContext,
};
use core::ptr;
use mesh_abi::{
    Endpoint,
    announce::Tuple,
    steer::{self, Arrival, Verdict},
};

use crate::{
    context::{address, either, word},
    maps::{ANNOUNCED, LISTENERS, STEER, config, count},
};

const AF_INET: u32 = 2;
const IPPROTO_TCP: u32 = 6;

#[sk_lookup]
pub fn steer_inbound(ctx: SkLookupContext) -> u32 {
    let raw = ctx.lookup;
    // SAFETY: fields of the context.
    let (arrival, remote_port) = unsafe {
        let is_v4 = word(&raw const (*raw).family) == AF_INET;
        let local = either(
            is_v4,
            word(&raw const (*raw).local_ip4),
            address(&raw const (*raw).local_ip6),
        );
        let remote = either(
            is_v4,
            word(&raw const (*raw).remote_ip4),
            address(&raw const (*raw).remote_ip6),
        );
        let arrival = Arrival {
            local,
            local_port: word(&raw const (*raw).local_port) as u16,
            remote,
            is_tcp: word(&raw const (*raw).protocol) == IPPROTO_TCP,
        };
        // In network order, and of two bytes: a wider access is not allowed on every kernel.
        (arrival, u16::from_be(ptr::read_volatile(&raw const (*raw).remote_port)))
    };
    let Some(config) = config() else {
        return SK_DROP;
    };
    // SAFETY: the entry is read only; an update replaces it as a whole, and it outlives the program.
    let entry = unsafe { STEER.get(&arrival.local) };
    let announced = || {
        let tuple = Tuple::new(
            Endpoint::new(arrival.remote, remote_port),
            Endpoint::new(arrival.local, arrival.local_port),
        );
        // SAFETY: as above.
        unsafe { ANNOUNCED.get(&tuple) }.copied()
    };
    let verdict = match steer::decide(config, entry, &arrival, announced) {
        // Flags 0: the kernel picks among the listener's SO_REUSEPORT group, that is among the agent's workers.
        Verdict::Agent => match LISTENERS.redirect_sk_lookup(&ctx, arrival.local, 0) {
            Ok(()) => {
                count(mesh_abi::Reason::Steered);
                return SK_PASS;
            }
            Err(_) => steer::agent_absent(config),
        },
        verdict => verdict,
    };
    match verdict {
        Verdict::Untouched => SK_PASS,
        Verdict::Pass(reason) => {
            count(reason);
            SK_PASS
        }
        Verdict::Refuse(reason) => {
            count(reason);
            SK_DROP
        }
        Verdict::Agent => SK_DROP,
    }
}
