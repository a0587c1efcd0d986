//! Which endpoint: pure choices over what the caller shows. Nothing here knows a socket, a clock or a lock.

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
