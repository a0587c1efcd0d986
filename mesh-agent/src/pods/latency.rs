//! How long it took to capture pods, from the birth of the sandbox's cgroup to the last worker's word that it serves.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// Upper bounds of the buckets, in milliseconds.
const BOUNDS_MS: [u64; 12] = [5, 10, 25, 50, 75, 100, 250, 500, 1000, 2500, 10_000, 60_000];

/// A histogram; a clone is the same one.
#[derive(Clone, Debug, Default)]
pub struct CaptureTimes(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    buckets: [AtomicU64; BOUNDS_MS.len()],
    above: AtomicU64,
    sum_us: AtomicU64,
}

impl CaptureTimes {
    /// Notes one capture.
    pub fn note(&self, took: Duration) {
        let place = BOUNDS_MS.partition_point(|bound| Duration::from_millis(*bound) < took);
        self.0.buckets.get(place).unwrap_or(&self.0.above).fetch_add(1, Relaxed);
        let took = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.0.sum_us.fetch_add(took, Relaxed);
    }

    /// The sum in seconds, and each bucket's bound in seconds with its own count, the last one without a bound.
    pub fn snapshot(&self) -> (f64, Vec<(f64, u64)>) {
        let mut buckets: Vec<(f64, u64)> = BOUNDS_MS
            .iter()
            .zip(&self.0.buckets)
            .map(|(bound, count)| (*bound as f64 / 1e3, count.load(Relaxed)))
            .collect();
        buckets.push((f64::INFINITY, self.0.above.load(Relaxed)));
        (self.0.sum_us.load(Relaxed) as f64 / 1e6, buckets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_capture_is_in_one_bucket() {
        let times = CaptureTimes::default();
        for ms in [1, 5, 6, 100, 70_000] {
            times.note(Duration::from_millis(ms));
        }
        let (sum, buckets) = times.snapshot();
        assert!((sum - 70.112).abs() < 1e-9, "{sum}");
        let full: Vec<(f64, u64)> = buckets.into_iter().filter(|(_, count)| *count > 0).collect();
        assert_eq!(full, [(0.005, 2), (0.01, 1), (0.1, 1), (f64::INFINITY, 1)]);
    }
}
