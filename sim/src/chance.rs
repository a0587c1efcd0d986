//! Randomness from the seed. Each user has a stream of its own, so that an operation which is left out does not change
//! the dice of the others more than it must.

use std::cell::RefCell;

/// SplitMix64: small, fast, good enough to explore with.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The stream of a seed for one use.
    pub fn new(seed: u64, stream: &str) -> Random {
        let mut random = Random(seed);
        for byte in stream.bytes() {
            random.0 = random.draw().wrapping_add(u64::from(byte));
        }
        random
    }

    /// 64 bits.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to below `bound`; 0 for an empty range.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.draw() % bound.max(1)
    }

    /// Between both, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// One time in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// One of them.
    pub fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len() as u64) as usize]
    }

    /// From 0 to below 1.
    pub fn unit(&mut self) -> f64 {
        (self.draw() >> 11) as f64 / (1u64 << 53) as f64
    }
}

thread_local! {
    static AGENT: RefCell<Random> = const { RefCell::new(Random(0)) };
}

/// Gives the thread's agents their dice.
pub fn seed_agents(seed: u64) {
    AGENT.set(Random::new(seed, "agents"));
}

/// What `rand::random` can make.
pub trait Draw {
    /// Makes one.
    fn draw(random: &mut Random) -> Self;
}

/// `rand::random` of the agent's code.
pub fn random<T: Draw>() -> T {
    AGENT.with_borrow_mut(|random| T::draw(random))
}

impl Draw for u32 {
    fn draw(random: &mut Random) -> u32 {
        (random.draw() >> 32) as u32
    }
}

impl Draw for u64 {
    fn draw(random: &mut Random) -> u64 {
        random.draw()
    }
}

impl Draw for u128 {
    fn draw(random: &mut Random) -> u128 {
        u128::from(random.draw()) << 64 | u128::from(random.draw())
    }
}

impl Draw for f64 {
    fn draw(random: &mut Random) -> f64 {
        random.unit()
    }
}
