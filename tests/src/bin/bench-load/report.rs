//! What a run saw, as one JSON object. Latencies are in nanoseconds inside and in microseconds outside.

use std::{collections::BTreeMap, time::Duration};

/// What was counted.
#[derive(Default)]
pub struct Seen {
    /// From sending, or from when it was due, to the answer's last byte; only after the warm-up.
    pub latencies: Vec<u32>,
    /// Answers within the measured time.
    pub answered: u64,
    /// Answers from the first to the last, the warm-up's too: what the CPU time around the run is divided by.
    pub answered_all: u64,
    /// Requests that were due while their connection waited.
    pub queued: u64,
    /// Body bytes within the measured time.
    pub bytes: u64,
    /// The same from the first to the last.
    pub bytes_all: u64,
    /// Connections opened.
    pub connects: u64,
    /// What went wrong, counted.
    pub errors: BTreeMap<String, u64>,
}

impl Seen {
    /// Counts an error.
    pub fn error(&mut self, what: impl ToString) {
        *self.errors.entry(what.to_string()).or_default() += 1;
    }

    /// Prints it all.
    pub fn print(mut self, measured: Duration) {
        self.latencies.sort_unstable();
        let micros = |share: f64| f64::from(percentile(&self.latencies, share)) / 1000.0;
        let seconds = measured.as_secs_f64();
        let result = serde_json::json!({
            "seconds": seconds,
            "answered": self.answered,
            "answered_all": self.answered_all,
            "queued": self.queued,
            "connects": self.connects,
            "errors": self.errors,
            "per_second": self.answered as f64 / seconds,
            "bytes_all": self.bytes_all,
            "bytes_per_second": self.bytes as f64 / seconds,
            "p50_us": micros(0.50),
            "p90_us": micros(0.90),
            "p99_us": micros(0.99),
            "p999_us": micros(0.999),
            "max_us": micros(1.0),
        });
        println!("{result}");
    }
}

/// The smallest value that is at least as large as this share of the sorted values; 0 of none.
fn percentile(sorted: &[u32], share: f64) -> u32 {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles() {
        let values: Vec<u32> = (1..=200).collect();
        for (share, value) in [(0.0, 1), (0.5, 100), (0.99, 198), (0.999, 200), (1.0, 200)] {
            assert_eq!(percentile(&values, share), value, "{share}");
        }
        assert_eq!(percentile(&[], 0.5), 0);
        assert_eq!(percentile(&[7], 0.99), 7);
    }
}
