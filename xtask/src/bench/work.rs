//! The works of the bench and the figures that are read from them, with the bounds that we set ourselves.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// A kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Its name on the command line.
    pub name: &'static str,
    /// The verb of bench-load, the path and the options.
    pub load: &'static [&'static str],
}

/// Idle connections whose memory is measured.
pub const IDLE_CONNECTIONS: u64 = 2000;

/// All loads. Answers are 1 KiB unless a stream is measured.
pub const WORKS: &[Work] = &[
    Work {
        name: "quiet",
        load: &["keep", "/bytes/1024", "--connections", "1", "--rate", "1000"],
    },
    Work {
        name: "steady",
        load: &["keep", "/bytes/1024", "--connections", "16", "--rate", "2000"],
    },
    Work {
        name: "full",
        load: &["keep", "/bytes/1024", "--connections", "64"],
    },
    Work {
        name: "new",
        load: &["connect", "/bytes/1024", "--connections", "16"],
    },
    Work {
        name: "bulk",
        load: &["keep", "/bytes/1073741824", "--connections", "1"],
    },
];
/// Memory is measured once, before everything else.
pub const IDLE: &str = "idle";

/// Where a figure comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum From {
    /// A field of what the load says, times a factor.
    Load(&'static str, f64),
    /// The proxies' CPU time in microseconds for each answer.
    CpuPerAnswer,
    /// The proxies' CPU time in seconds for each 10^9 bytes.
    CpuPerGigabyte,
}

/// A figure.
pub struct Figure {
    /// What it is called.
    pub name: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// The work that it is read from.
    pub work: &'static str,
    /// Where from.
    pub from: From,
    /// Whether more is better.
    pub more_is_better: bool,
}

const fn figure(
    name: &'static str,
    unit: &'static str,
    work: &'static str,
    from: From,
    more_is_better: bool,
) -> Figure {
    Figure {
        name,
        unit,
        work,
        from,
        more_is_better,
    }
}

/// All figures of the rounds, in the order of reports.
pub const FIGURES: &[Figure] = &[
    figure(
        "p50, 1 conn at 1,000/s",
        "us",
        "quiet",
        From::Load("p50_us", 1.0),
        false,
    ),
    figure(
        "p99, 1 conn at 1,000/s",
        "us",
        "quiet",
        From::Load("p99_us", 1.0),
        false,
    ),
    figure(
        "p50, 16 conns at 2,000/s",
        "us",
        "steady",
        From::Load("p50_us", 1.0),
        false,
    ),
    figure(
        "p99, 16 conns at 2,000/s",
        "us",
        "steady",
        From::Load("p99_us", 1.0),
        false,
    ),
    figure(
        "proxy CPU per request at 2,000/s",
        "us",
        "steady",
        From::CpuPerAnswer,
        false,
    ),
    figure(
        "max requests, 64 conns",
        "1/s",
        "full",
        From::Load("per_second", 1.0),
        true,
    ),
    figure("proxy CPU per request", "us", "full", From::CpuPerAnswer, false),
    figure("new connections", "1/s", "new", From::Load("per_second", 1.0), true),
    figure("proxy CPU per new connection", "us", "new", From::CpuPerAnswer, false),
    figure(
        "bulk, 1 stream",
        "MiB/s",
        "bulk",
        From::Load("bytes_per_second", 1.0 / 1048576.0),
        true,
    ),
    figure("proxy CPU per GB", "s", "bulk", From::CpuPerGigabyte, false),
];
/// The figures of memory.
pub const IDLE_RSS: &str = "idle RSS, pair";
/// See [`IDLE_RSS`].
pub const PER_CONNECTION: &str = "memory per idle connection";

/// A bound: of the value itself, or of its ratio to the direct path.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// The ratio is at most this.
    RatioAtMost(f64),
    /// The ratio is at least this.
    RatioAtLeast(f64),
    /// The value is at most this.
    AtMost(f64),
}

impl Target {
    /// Whether a value and its ratio are within the bound; not known without a ratio where one is needed.
    pub fn met(self, value: f64, ratio: Option<f64>) -> Option<bool> {
        match self {
            Target::RatioAtMost(bound) => ratio.map(|ratio| ratio <= bound),
            Target::RatioAtLeast(bound) => ratio.map(|ratio| ratio >= bound),
            Target::AtMost(bound) => Some(value <= bound),
        }
    }
}

/// What we want to reach: for each of our systems, in the order of the names below.
const TARGETS: &[(&str, [Option<Target>; 9])] = {
    const fn least(bound: f64) -> Option<Target> {
        Some(Target::RatioAtLeast(bound))
    }
    const fn most(bound: f64) -> Option<Target> {
        Some(Target::RatioAtMost(bound))
    }
    const fn value(bound: f64) -> Option<Target> {
        Some(Target::AtMost(bound))
    }
    &[
        (
            "l7",
            [
                most(2.8),
                most(3.0),
                most(3.2),
                least(0.33),
                least(0.75),
                None,
                value(40.0),
                value(16.0),
                value(4.0),
            ],
        ),
        (
            "l4",
            [
                most(2.6),
                most(2.8),
                most(2.8),
                least(0.35),
                least(0.50),
                least(0.47),
                value(34.0),
                value(16.0),
                value(6.0),
            ],
        ),
        (
            "same-l7",
            [
                most(2.0),
                most(2.4),
                most(2.8),
                least(0.48),
                least(0.80),
                None,
                value(20.0),
                None,
                None,
            ],
        ),
        (
            "same-direct",
            [
                most(1.0),
                most(1.0),
                most(1.0),
                least(1.0),
                least(0.95),
                least(1.0),
                value(0.0),
                None,
                None,
            ],
        ),
    ]
};
/// The figures that [`TARGETS`] bound, in its order.
const BOUND: [&str; 9] = [
    "p50, 1 conn at 1,000/s",
    "p50, 16 conns at 2,000/s",
    "p99, 16 conns at 2,000/s",
    "max requests, 64 conns",
    "new connections",
    "bulk, 1 stream",
    "proxy CPU per request",
    IDLE_RSS,
    PER_CONNECTION,
];

/// The bound of a figure of a system.
pub fn target(system: &str, figure: &str) -> Option<Target> {
    let (_, targets) = TARGETS.iter().find(|(name, _)| *name == system)?;
    targets[BOUND.iter().position(|name| *name == figure)?]
}

/// The works that the command line names; all by default.
pub fn wanted(names: &[String]) -> Result<Vec<&'static str>> {
    let all: Vec<&str> = WORKS.iter().map(|work| work.name).chain([IDLE]).collect();
    for name in names {
        ensure!(
            all.contains(&name.as_str()),
            "--works {name}: expected {}",
            all.join(", ")
        );
    }
    Ok(all
        .into_iter()
        .filter(|work| names.is_empty() || names.iter().any(|name| name == work))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_has_its_work_and_every_bound_its_figure() {
        for figure in FIGURES {
            assert!(WORKS.iter().any(|work| work.name == figure.work), "{}", figure.name);
        }
        for name in BOUND {
            let known = FIGURES.iter().any(|figure| figure.name == name) || [IDLE_RSS, PER_CONNECTION].contains(&name);
            assert!(known, "{name}");
        }
        assert_eq!(target("l7", "max requests, 64 conns"), Some(Target::RatioAtLeast(0.33)));
        assert_eq!(target("l7", "bulk, 1 stream"), None);
        assert_eq!(target("haproxy", "new connections"), None);
    }

    #[test]
    fn bounds() {
        for (target, value, ratio, met) in [
            (Target::RatioAtMost(2.8), 0.0, Some(2.8), Some(true)),
            (Target::RatioAtMost(2.8), 0.0, Some(2.9), Some(false)),
            (Target::RatioAtLeast(0.5), 0.0, Some(0.4), Some(false)),
            (Target::RatioAtLeast(0.5), 0.0, None, None),
            (Target::AtMost(4.0), 3.9, None, Some(true)),
        ] {
            assert_eq!(target.met(value, ratio), met, "{target:?}");
        }
    }
}
