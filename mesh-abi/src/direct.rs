//! Direct flows: opaque connections between two pods of one node which the kernel lets go without the agent.
//!
//! Who may is decided by the agent: it writes what each source may reach so, and to which endpoints that leads. The
//! connect programs only look it up, choose among the endpoints and keep the flow on record until it closed, so that
//! the agent can end it when policy changes and can tell of it. Every miss and every doubt leads to the agent. Pure: the
//! programs run the functions here, and so do the tests on the host.

use crate::addr::Endpoint;

/// Endpoints that one destination may lead to; one with more goes to the agent.
pub const DIRECT_ENDPOINTS_MAX: usize = 8;

/// [`DirectState::generation`]: no entry is valid.
pub const GENERATION_NONE: u64 = 0;

/// After so many nanoseconds without a sign of life the owner of the entries is taken for dead, and none is valid: new
/// connections meet the fail mode then.
pub const OWNER_SILENCE_NS: u64 = 5_000_000_000;

/// Where the owner's state lies in `DIRECT_STATE`. Only the owner writes it.
pub const STATE_OWNER: u32 = 0;
/// Where it lies what other agents took away: [`DirectState::revision`]. Only who is not the owner writes it.
pub const STATE_OTHERS: u32 = 1;
/// The places of `DIRECT_STATE`.
pub const STATES: u32 = 2;

/// What an application asks for, and from where.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DirectKey {
    /// The source's network namespace.
    pub netns: u64,
    /// The destination as the application asks for it: a service's address or a pod's.
    pub asked: Endpoint,
    /// Zero.
    pub pad: u32,
}

/// One endpoint of this node.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirectEndpoint {
    /// Its network namespace: an address may pass to another pod before the entry goes.
    pub netns: u64,
    /// Where it listens; [`Endpoint::NONE`] marks an empty place.
    pub address: Endpoint,
    /// Zero.
    pub pad: u32,
}

/// Where a source's connections to a destination may go without the agent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirectEntry {
    /// Valid as long as it is [`DirectState::generation`].
    pub generation: u64,
    /// The agent's number of this decision, for the records of its connections.
    pub decision: u64,
    /// How many of the endpoints count.
    pub count: u32,
    /// Zero.
    pub pad: u32,
    /// The endpoints; the first `count` are not empty.
    pub endpoints: [DirectEndpoint; DIRECT_ENDPOINTS_MAX],
}

/// What holds for all entries: the values of the `DIRECT_STATE` map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirectState {
    /// The generation that is valid, or [`GENERATION_NONE`].
    pub generation: u64,
    /// The agent that writes the entries: a number of its own choice.
    pub owner: u64,
    /// When the owner looked last, in nanoseconds of the monotonic clock.
    pub beat: u64,
    /// The view that the entries were last held against. Of the other agents: the newest view that one of them took,
    /// so that entries which are only known to fit an older one are not valid.
    pub revision: u64,
}

/// A direct flow, from its `connect()` until the agent has told of its end.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirectFlow {
    /// The socket's cookie.
    pub socket: u64,
    /// The source's network namespace.
    pub netns: u64,
    /// [`DirectEntry::decision`].
    pub decision: u64,
    /// When it was opened, in nanoseconds of the monotonic clock.
    pub opened: u64,
    /// When it was closed; 0 while it is open.
    pub closed: u64,
    /// The sequence numbers of the source that were acknowledged: see [`payload`].
    pub acked: u64,
    /// The sequence numbers that the source received.
    pub received: u64,
    /// The same when the source's end had been acknowledged.
    pub received_half: u64,
    /// The source's end; [`Endpoint::NONE`] before the connection is under way.
    pub source: Endpoint,
    /// What the application asked for.
    pub asked: Endpoint,
    /// The endpoint.
    pub endpoint: Endpoint,
    /// The state of the TCP connection before it closed.
    pub ended_in: u32,
}

/// States of a TCP connection before its end (`net/tcp_states.h`).
pub mod tcp {
    /// The handshake was under way.
    pub const SYN_SENT: u32 = 2;
    /// This side has said its end, and had it acknowledged.
    pub const FIN_WAIT2: u32 = 5;
    /// There is no connection any more.
    pub const CLOSE: u32 = 7;
    /// The other side has said its end.
    pub const CLOSE_WAIT: u32 = 8;
    /// Both sides have said their end, this one second.
    pub const LAST_ACK: u32 = 9;
    /// Both sides have said their end at once.
    pub const CLOSING: u32 = 11;
}

impl DirectKey {
    /// The key of what that namespace asks for.
    #[inline(always)]
    pub const fn new(netns: u64, asked: Endpoint) -> DirectKey {
        DirectKey { netns, asked, pad: 0 }
    }
}

impl DirectEndpoint {
    /// An endpoint in that namespace.
    pub const fn new(netns: u64, address: Endpoint) -> DirectEndpoint {
        DirectEndpoint { netns, address, pad: 0 }
    }
}

impl DirectState {
    /// Whether entries of its generation are valid, by what other agents took and the time.
    #[inline(always)]
    pub const fn is_valid(&self, others: &DirectState, now: u64) -> bool {
        self.generation != GENERATION_NONE && self.revision >= others.revision && !self.is_silent(now)
    }

    /// Whether the owner gave no sign of life for too long.
    #[inline(always)]
    pub const fn is_silent(&self, now: u64) -> bool {
        now.saturating_sub(self.beat) > OWNER_SILENCE_NS
    }
}

/// Where a connection goes, by an entry of that generation: `random` chooses. `None` leads to the agent.
#[inline(always)]
pub fn choose(entry: &DirectEntry, generation: u64, random: u32) -> Option<&DirectEndpoint> {
    if entry.generation != generation {
        return None;
    }
    // The index is not compared with `count`, and `count` with nothing: the verifier wants the bound of `get`, which the
    // compiler would leave out if it could prove it.
    let index = (u64::from(random) * u64::from(entry.count)) >> 32;
    let endpoint = entry.endpoints.get(index as usize)?;
    if endpoint.address.is_none() {
        return None;
    }
    Some(endpoint)
}

/// Whether both sides ended the connection in the usual way, that is without a reset or a timeout.
pub const fn is_orderly(ended_in: u32) -> bool {
    matches!(ended_in, tcp::FIN_WAIT2 | tcp::LAST_ACK | tcp::CLOSING)
}

/// Whether the connection never came about.
pub const fn is_unanswered(ended_in: u32) -> bool {
    ended_in == tcp::SYN_SENT
}

/// The bytes that the applications exchanged: from the source, to the source. TCP counts a beginning and an end as one
/// byte each. A socket that its application has closed is gone as soon as its end is acknowledged, be the other side's
/// end there or not: it is, if something came after that.
pub const fn payload(flow: &DirectFlow) -> (u64, u64) {
    let (end_sent, end_received) = match flow.ended_in {
        tcp::SYN_SENT => return (0, 0),
        tcp::FIN_WAIT2 => (1, if flow.received == flow.received_half { 0 } else { 1 }),
        tcp::LAST_ACK | tcp::CLOSING => (1, 1),
        tcp::CLOSE_WAIT => (0, 1),
        _ => (0, 0),
    };
    (
        flow.acked.saturating_sub(1 + end_sent),
        flow.received.saturating_sub(end_received),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Addr;

    fn entry(generation: u64, count: u32, filled: u32) -> DirectEntry {
        let mut entry = DirectEntry {
            generation,
            count,
            ..DirectEntry::default()
        };
        for (index, place) in entry.endpoints.iter_mut().take(filled as usize).enumerate() {
            *place = DirectEndpoint::new(9, Endpoint::new(Addr::LOOPBACK4, 1000 + index as u16));
        }
        entry
    }

    #[test]
    fn only_an_entry_of_the_present_generation_leads_somewhere() {
        // the entry's generation, the state's, endpoints counted, endpoints there, whether it is direct
        for (entry_generation, generation, count, filled, expected) in [
            (7, 7, 1, 1, true),
            (7, 7, 8, 8, true),
            (7, 8, 1, 1, false),
            (7, 0, 1, 1, false),
            (7, 7, 0, 0, false),
            (7, 7, 1, 0, false),
        ] {
            let entry = entry(entry_generation, count, filled);
            for random in [0, 1, u32::MAX / 2, u32::MAX] {
                let found = choose(&entry, generation, random);
                assert_eq!(
                    found.is_some(),
                    expected,
                    "{entry_generation} {generation} {count} {random}"
                );
            }
        }
        let lying = entry(7, u32::MAX, 8);
        assert_eq!(
            choose(&lying, 7, u32::MAX),
            None,
            "a count beyond the places leads to the agent"
        );
    }

    #[test]
    fn entries_are_valid_as_long_as_their_owner_lives_and_holds_the_newest_view() {
        const NOW: u64 = 100 * OWNER_SILENCE_NS;
        // the generation, the owner's sign of life, its revision, the others' one, whether entries are valid
        for (generation, beat, revision, others, expected) in [
            (7, NOW, 3, 0, true),
            (7, NOW, 3, 3, true),
            (7, NOW, 3, 4, false),
            (GENERATION_NONE, NOW, 3, 3, false),
            (7, NOW - OWNER_SILENCE_NS, 3, 3, true),
            (7, NOW - OWNER_SILENCE_NS - 1, 3, 3, false),
            // A clock that seems to run backwards is no death.
            (7, NOW + 1, 3, 3, true),
            (0, 0, 0, 0, false),
        ] {
            let state = DirectState {
                generation,
                owner: 1,
                beat,
                revision,
            };
            let others = DirectState {
                revision: others,
                ..DirectState::default()
            };
            assert_eq!(state.is_valid(&others, NOW), expected, "{state:?} {others:?}");
        }
    }

    #[test]
    fn every_endpoint_is_chosen_as_often() {
        for count in 1..=DIRECT_ENDPOINTS_MAX as u32 {
            let entry = entry(1, count, count);
            let mut chosen = vec![0_u32; count as usize];
            for step in 0..count * 1000 {
                let random = (u64::from(step) * u64::from(u32::MAX) / u64::from(count * 1000)) as u32;
                let port = choose(&entry, 1, random).unwrap().address.port;
                chosen[usize::from(port) - 1000] += 1;
            }
            assert!(
                chosen.iter().all(|times| (999..=1001).contains(times)),
                "{count}: {chosen:?}"
            );
        }
    }

    #[test]
    fn the_payload_leaves_out_what_tcp_counts_of_its_own() {
        const ESTABLISHED: u32 = 1;
        const FIN_WAIT1: u32 = 4;
        // the last state, acknowledged, received, received when its end was acknowledged; each side's bytes
        for (ended_in, acked, received, half, expected) in [
            (tcp::SYN_SENT, 0, 0, 0, (0, 0)),
            // "ping" and "pong!", ended by the destination, or by both at once
            (tcp::LAST_ACK, 6, 6, 0, (4, 5)),
            (tcp::CLOSING, 6, 6, 0, (4, 5)),
            // ended by the source: closed before the destination's end came, or half closed until it came
            (tcp::FIN_WAIT2, 6, 5, 5, (4, 5)),
            (tcp::FIN_WAIT2, 6, 6, 5, (4, 5)),
            (tcp::FIN_WAIT2, 6, 6, 0, (4, 5)),
            // reset
            (ESTABLISHED, 5, 5, 0, (4, 5)),
            (FIN_WAIT1, 5, 5, 0, (4, 5)),
            (tcp::CLOSE_WAIT, 5, 6, 0, (4, 5)),
            (ESTABLISHED, 1, 0, 0, (0, 0)),
            // nothing at all is never less than nothing
            (tcp::LAST_ACK, 0, 0, 0, (0, 0)),
        ] {
            let flow = DirectFlow {
                ended_in,
                acked,
                received,
                received_half: half,
                ..DirectFlow::default()
            };
            assert_eq!(payload(&flow), expected, "{ended_in} {acked} {received} {half}");
        }
    }
}
