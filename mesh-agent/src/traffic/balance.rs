//! Which endpoint: pure choices over what the caller shows. Nothing here knows a socket, a clock or a lock.

use std::net::{IpAddr, SocketAddr};

use mesh_api::resilience::BalancerAlgorithm;

/// Chooses one of `count` endpoints.
///
/// `usable` says whether an index may be chosen (not tried before, breaker closed), `load` how many requests it has in
/// flight, `turn` counts the choices of this backend and `random` is any number. `None` if no index is usable.
/// The first look costs no scan: as long as the endpoint of the algorithm's choice is usable, only that is asked for.
pub fn choose(
    algorithm: BalancerAlgorithm,
    count: usize,
    turn: u32,
    random: u64,
    usable: impl Fn(usize) -> bool,
    load: impl Fn(usize) -> u32,
) -> Option<usize> {
    if count == 0 {
        return None;
    }
    // The first usable index at or after `start`, around the ring.
    let from = |start: usize| {
        (0..count)
            .map(|step| (start + step) % count)
            .find(|index| usable(*index))
    };
    // Each half of `random` picks one; a modulo's bias is below one in a million for any real number of endpoints.
    let (low, high) = ((random as u32) as usize, (random >> 32) as usize);
    match algorithm {
        BalancerAlgorithm::RoundRobin => from(turn as usize % count),
        BalancerAlgorithm::Random => uniform(count, low, &usable),
        BalancerAlgorithm::LeastRequest if count == 1 => from(0),
        BalancerAlgorithm::LeastRequest => {
            let first = uniform(count, low, &usable)?;
            let second = uniform(count, high, |index| index != first && usable(index));
            Some(match second {
                Some(second) if load(second) < load(first) => second,
                _ => first,
            })
        }
    }
}

/// The usable endpoint that a source is bound to: of all pairs of the source and an endpoint the one with the greatest
/// hash. Every agent and every start comes to the same, and where one endpoint goes only its own sources move.
pub fn sticky(
    source: IpAddr,
    addresses: impl Iterator<Item = SocketAddr>,
    usable: impl Fn(usize) -> bool,
) -> Option<usize> {
    let weighed = addresses.enumerate().filter(|(index, _)| usable(*index));
    let heaviest = weighed.max_by_key(|(_, address)| (weight(source, *address), *address));
    heaviest.map(|(index, _)| index)
}

/// FNV-1a over both addresses, its bits spread by the end of MurmurHash3.
fn weight(source: IpAddr, endpoint: SocketAddr) -> u64 {
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    };
    let port = endpoint.port().to_be_bytes();
    let bytes = octets(source).into_iter().chain(octets(endpoint.ip())).chain(port);
    let mut hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    for factor in [0xff51_afd7_ed55_8ccd_u64, 0xc4ce_b9fe_1a85_ec53] {
        hash = (hash ^ (hash >> 33)).wrapping_mul(factor);
    }
    hash ^ (hash >> 33)
}

/// A usable index, each with the same chance: a ring scan alone would give the one behind a gap a double share.
fn uniform(count: usize, random: usize, usable: impl Fn(usize) -> bool) -> Option<usize> {
    let index = random % count;
    if usable(index) {
        return Some(index);
    }
    let usable_count = (0..count).filter(|index| usable(*index)).count();
    (0..count)
        .filter(|index| usable(*index))
        .nth((random / count).checked_rem(usable_count)?)
}

#[cfg(test)]
mod tests {
    use rand::RngExt;

    use super::*;

    fn shares(algorithm: BalancerAlgorithm, usable: &[bool], load: &[u32], rounds: u32) -> Vec<u32> {
        let mut rng = rand::rng();
        let mut counts = vec![0; usable.len()];
        for turn in 0..rounds {
            let random = rng.random();
            if let Some(index) = choose(algorithm, usable.len(), turn, random, |i| usable[i], |i| load[i]) {
                counts[index] += 1;
            }
        }
        counts
    }

    #[test]
    fn round_robin_takes_turns_and_skips() {
        use BalancerAlgorithm::RoundRobin;
        assert_eq!(shares(RoundRobin, &[true; 3], &[0; 3], 9), [3, 3, 3]);
        assert_eq!(shares(RoundRobin, &[true, false, true], &[0; 3], 9), [3, 0, 6]);
        assert_eq!(shares(RoundRobin, &[false; 3], &[0; 3], 9), [0, 0, 0]);
        assert_eq!(shares(RoundRobin, &[], &[], 9), [0u32; 0]);
    }

    #[test]
    fn random_is_even_also_beside_gaps() {
        for usable in [vec![true; 4], vec![true, false, false, true, true, false]] {
            let counts = shares(BalancerAlgorithm::Random, &usable, &[0; 6], 30_000);
            let expected = 30_000 / usable.iter().filter(|u| **u).count() as u32;
            for (count, usable) in counts.iter().zip(&usable) {
                let bound = if *usable { expected / 10 } else { 0 };
                assert!(
                    count.abs_diff(if *usable { expected } else { 0 }) <= bound,
                    "{counts:?}"
                );
            }
        }
    }

    #[test]
    fn sources_stay_where_they_are() {
        let endpoints: Vec<SocketAddr> = (1..=5).map(|n| SocketAddr::from(([10, 1, 0, n], 80))).collect();
        let sources: Vec<IpAddr> = (0..=255).map(|n| IpAddr::from([10, 2, 0, n])).collect();
        let of = |source: IpAddr, gone: Option<usize>| {
            sticky(source, endpoints.iter().copied(), |index| Some(index) != gone).unwrap()
        };
        let mut counts = [0_u32; 5];
        for source in &sources {
            let at = of(*source, None);
            counts[at] += 1;
            for gone in 0..endpoints.len() {
                let then = of(*source, Some(gone));
                assert!(
                    if gone == at { then != at } else { then == at },
                    "{source} with {gone} gone"
                );
            }
        }
        // Evenly, as far as 256 sources can be: a fifth each, give or take half of it.
        assert!(counts.iter().all(|count| (25..=77).contains(count)), "{counts:?}");
        assert_eq!(sticky(sources[0], endpoints.iter().copied(), |_| false), None);
    }

    #[test]
    fn least_request_avoids_the_busy_one() {
        use BalancerAlgorithm::LeastRequest;
        let counts = shares(LeastRequest, &[true; 3], &[0, 50, 0], 3_000);
        // The busy one is only chosen when both looks fall on it, which they never do.
        assert_eq!(counts[1], 0, "{counts:?}");
        assert_eq!(shares(LeastRequest, &[false, true], &[0, 50], 10), [0, 10]);
        assert_eq!(shares(LeastRequest, &[true], &[7], 10), [10]);
        assert_eq!(shares(LeastRequest, &[false], &[7], 10), [0]);
    }
}
