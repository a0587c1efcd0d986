//! Token buckets, one for each key of a limit. Pure but for a short lock; time is an argument.
//!
//! A bucket is one number: the moment at which it would be full again (GCRA). A bucket that is full is as good as one
//! that does not exist, so those and only those are forgotten: nobody can reset a limit by flooding it with keys.
//! When all [`LIMIT_KEYS_MAX`] buckets are in use, further keys share one overflow bucket of the same rate: what
//! cannot be told apart is limited together, never let through.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use mesh_api::resilience::{LimitKey, LimitSettings};
use parking_lot::Mutex;

/// The most buckets of one limit.
pub const LIMIT_KEYS_MAX: usize = 16 * 1024;

/// How often at most a full table is searched for buckets to forget.
const SWEEP_NANOS: u64 = 1_000_000_000;

/// The rate of a limit in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// The time in which one token comes in; rounded up, so that the rate is never exceeded.
    interval: u64,
    /// How far ahead of now a bucket may be and still give a token.
    tolerance: u64,
}

/// When a bucket is full again, in nanoseconds since the origin of [`Buckets`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket(u64);

impl Rate {
    /// The rate of a limit.
    pub fn of(settings: &LimitSettings) -> Rate {
        let interval = settings.per.as_nanos().div_ceil(u128::from(settings.requests.max(1)));
        let interval = u64::try_from(interval).unwrap_or(u64::MAX).max(1);
        Rate {
            interval,
            tolerance: interval.saturating_mul(u64::from(settings.burst.max(1) - 1)),
        }
    }
}

impl Bucket {
    /// Takes a token, or says how long until there is one.
    pub fn take(&mut self, rate: Rate, now: u64) -> Result<(), Duration> {
        let full_at = self.0.max(now);
        let ahead = full_at - now;
        if ahead > rate.tolerance {
            return Err(Duration::from_nanos(ahead - rate.tolerance));
        }
        self.0 = full_at.saturating_add(rate.interval);
        Ok(())
    }

    /// Puts a token back.
    pub fn give_back(&mut self, rate: Rate) {
        self.0 = self.0.saturating_sub(rate.interval);
    }

    fn is_full(self, now: u64) -> bool {
        self.0 <= now
    }
}

/// All buckets of one limit.
#[derive(Debug)]
pub struct Buckets {
    origin: Instant,
    table: Mutex<Table>,
    keys_max: usize,
}

#[derive(Debug, Default)]
struct Table {
    buckets: HashMap<LimitKey, Bucket>,
    overflow: Bucket,
    swept_at: Option<u64>,
}

impl Buckets {
    /// Buckets without any key, all full at `origin`.
    pub fn new(origin: Instant) -> Buckets {
        Buckets {
            origin,
            table: Mutex::default(),
            keys_max: LIMIT_KEYS_MAX,
        }
    }

    /// Takes a token of `key`, or says how long until there is one.
    pub fn take(&self, key: LimitKey, rate: Rate, now: Instant) -> Result<(), Duration> {
        let now = self.nanos(now);
        self.table.lock().bucket(key, now, self.keys_max).take(rate, now)
    }

    /// Puts a token back that was taken for a request which another limit then refused.
    pub fn give_back(&self, key: &LimitKey, rate: Rate) {
        let mut table = self.table.lock();
        match table.buckets.get_mut(key) {
            Some(bucket) => bucket.give_back(rate),
            None => table.overflow.give_back(rate),
        }
    }

    /// How many keys have a bucket.
    pub fn keys(&self) -> usize {
        self.table.lock().buckets.len()
    }

    fn nanos(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.origin).as_nanos()).unwrap_or(u64::MAX)
    }
}

impl Table {
    fn bucket(&mut self, key: LimitKey, now: u64, keys_max: usize) -> &mut Bucket {
        let sweep_is_due = self.swept_at.is_none_or(|at| now.saturating_sub(at) >= SWEEP_NANOS);
        if self.buckets.len() >= keys_max && sweep_is_due && !self.buckets.contains_key(&key) {
            self.swept_at = Some(now);
            self.buckets.retain(|_, bucket| !bucket.is_full(now));
        }
        if self.buckets.len() >= keys_max && !self.buckets.contains_key(&key) {
            return &mut self.overflow;
        }
        self.buckets.entry(key).or_default()
    }
}

/// What `retry-after` says of a wait: whole seconds, rounded up, at least one.
pub fn retry_after_seconds(wait: Duration) -> u64 {
    (wait.as_secs() + u64::from(wait.subsec_nanos() > 0)).max(1)
}

#[cfg(test)]
mod tests {
    use mesh_api::{
        request::Request,
        resilience::{LimitKeyPart, LimitSource},
        rule::RuleId,
    };
    use proptest::prelude::*;

    use super::*;

    struct User(String);
    impl Request for User {
        fn method(&self) -> &str {
            "GET"
        }
        fn path(&self) -> &str {
            "/"
        }
        fn query(&self) -> Option<&str> {
            None
        }
        fn authority(&self) -> Option<&str> {
            None
        }
        fn header(&self, name: &str) -> Option<&str> {
            (name == "x-user").then_some(&self.0)
        }
        fn each_header_value(&self, name: &str, tell: &mut dyn FnMut(&str)) {
            self.header(name).into_iter().for_each(tell);
        }
    }

    fn settings(requests: u32, per: Duration, burst: u32) -> LimitSettings {
        LimitSettings {
            id: RuleId::constant("test"),
            key: vec![LimitKeyPart::Header("x-user".into())],
            requests,
            per,
            burst,
            shadow: false,
        }
    }

    fn key(user: &str) -> LimitKey {
        let source = LimitSource {
            identity: None,
            address: [10, 0, 0, 1].into(),
        };
        settings(1, Duration::from_secs(1), 1).key(source, &User(user.to_owned()))
    }

    #[test]
    fn bursts_are_taken_and_tokens_come_back() {
        let rate = Rate::of(&settings(2, Duration::from_secs(1), 3));
        let mut bucket = Bucket::default();
        let takes = [
            (0, Ok(())),
            (0, Ok(())),
            (0, Ok(())),
            (0, Err(500)),
            (499, Err(1)),
            (500, Ok(())),
            (600, Err(400)),
            (2_500, Ok(())),
            (2_500, Ok(())),
            (2_500, Ok(())),
            (2_500, Err(500)),
        ];
        for (at, expected) in takes {
            let taken = bucket.take(rate, at * 1_000_000).map_err(|wait| wait.as_millis());
            assert_eq!(taken, expected, "at {at} ms");
        }
    }

    #[test]
    fn retry_after_is_rounded_up() {
        for (millis, seconds) in [(0, 1), (1, 1), (999, 1), (1_000, 1), (1_001, 2), (59_001, 60)] {
            assert_eq!(
                retry_after_seconds(Duration::from_millis(millis)),
                seconds,
                "{millis} ms"
            );
        }
    }

    #[test]
    fn a_flood_of_keys_resets_no_limit() {
        let start = Instant::now();
        let rate = Rate::of(&settings(1, Duration::from_secs(60), 1));
        let buckets = Buckets {
            keys_max: 4,
            ..Buckets::new(start)
        };
        for user in ["a", "b", "c", "d"] {
            assert!(buckets.take(key(user), rate, start).is_ok());
        }
        assert!(
            buckets.take(key("e"), rate, start).is_ok(),
            "the overflow bucket's only token"
        );
        for at in 0..59 {
            let now = start + Duration::from_secs(at);
            assert!(
                buckets.take(key(&format!("flood-{at}")), rate, now).is_err(),
                "shares the overflow bucket"
            );
            assert!(
                buckets.take(key("a"), rate, now).is_err(),
                "still knows who spent its token"
            );
        }
        let later = start + Duration::from_secs(60);
        assert!(buckets.take(key("f"), rate, later).is_ok(), "full buckets made room");
        assert_eq!(buckets.keys(), 1);
    }

    #[test]
    fn threads_together_take_no_more_than_the_burst() {
        let start = Instant::now();
        let rate = Rate::of(&settings(1, Duration::from_secs(3600), 100));
        let buckets = Buckets::new(start);
        let taken = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        if buckets.take(key("a"), rate, start).is_ok() {
                            taken.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert_eq!(taken.into_inner(), 100);
    }

    proptest! {
        /// Over any stretch of time no more is admitted than the burst and what came in since.
        #[test]
        fn never_more_than_burst_and_rate(
            requests in 1u32..1000, per_millis in 1u64..100_000, burst in 1u32..50,
            gaps in prop::collection::vec(0u64..2_000_000_000, 1..400),
        ) {
            let rate = Rate::of(&settings(requests, Duration::from_millis(per_millis), burst));
            let (mut bucket, mut now) = (Bucket::default(), 0u64);
            let mut admitted: Vec<u64> = Vec::new();
            for gap in gaps {
                now += gap;
                match bucket.take(rate, now) {
                    Ok(()) => admitted.push(now),
                    // The wait that is told is true: right then there is a token, just before there is none.
                    Err(wait) => {
                        let wait = wait.as_nanos() as u64;
                        prop_assert!(bucket.clone().take(rate, now + wait).is_ok());
                        prop_assert!(bucket.clone().take(rate, now + wait - 1).is_err());
                    }
                }
            }
            for (first, from) in admitted.iter().enumerate() {
                for (last, to) in admitted.iter().enumerate().skip(first) {
                    let came_in = u128::from(to - from) * u128::from(requests) / (u128::from(per_millis) * 1_000_000);
                    prop_assert!((last - first + 1) as u128 <= u128::from(burst) + came_in);
                }
            }
        }
    }
}
