//! The rounds: every system at every work, in an order drawn anew each time.

use std::{
    collections::BTreeMap,
    fs,
    thread::available_parallelism,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::{
    Lab,
    peers::{Credentials, Pair, Peer},
    until,
};
use serde_json::Value;

use super::{
    Options,
    machine::{self, Used},
    peers,
    report::{Memory, Report, Sample, Spread, SystemInfo},
    systems::{self, HTTP_PORT, Ours, System},
    work::{FIGURES, From, IDLE, IDLE_CONNECTIONS, WORKS, Work},
};

/// How long agents that were started anew may take.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// How long proxies are left alone before their memory is read.
const SETTLE: Duration = Duration::from_secs(12);
/// How long 2,000 connections may take to open.
const IDLE_LIMIT: Duration = Duration::from_secs(60);

/// Measures everything.
pub fn run(lab: &Lab, options: &Options, ours: &[&Ours], peers: &[Peer], works: &[&str]) -> Result<Report> {
    let (mut versions, mut absent) = (BTreeMap::new(), BTreeMap::new());
    let mut pairs = Vec::new();
    let programs = peers::directory();
    let credentials = Credentials::create(&lab.directory().join("peers"))?;
    for peer in peers {
        let started = peer.version(&programs).and_then(|version| {
            let destination = if peer.is_one() { "direct/same" } else { "direct/cross" };
            let ends = ("direct/source", destination, HTTP_PORT);
            Ok((version, Pair::start(*peer, lab, &programs, &credentials, ends)?))
        });
        match started {
            Ok((version, pair)) => {
                eprintln!("bench: {} {version} is there", peer.name());
                versions.insert(peer.name().to_string(), version);
                pairs.push(pair);
            }
            Err(error) => {
                eprintln!("bench: {} is absent: {error:#}", peer.name());
                absent.insert(peer.name().to_string(), format!("{error:#}"));
            }
        }
    }
    let systems = systems::prepare(lab, ours, &pairs)?;
    let bench = Bench {
        lab,
        options,
        cpus: available_parallelism()?.get(),
        load: lab.state()?.programs.join("bench-load").display().to_string(),
    };
    let unix_seconds = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    let seed = options.seed.unwrap_or(unix_seconds);
    let mut memory = Vec::new();
    if works.contains(&IDLE) {
        for system in systems.iter().filter(|system| system.base.is_some()) {
            memory.push(bench.memory(system)?);
        }
    }
    let mut samples = Vec::new();
    let mut shuffle = Shuffle(seed);
    for round in 0..options.rounds {
        let mut rest: Vec<&Work> = WORKS.iter().filter(|work| works.contains(&work.name)).collect();
        shuffle.shuffle(&mut rest);
        for work in rest {
            let mut order: Vec<&System> = systems.iter().collect();
            shuffle.shuffle(&mut order);
            for system in order {
                samples.push(bench.sample(round, system, work)?);
            }
        }
    }
    let info = |system: &System| SystemInfo {
        name: system.name.clone(),
        title: system.title.clone(),
        base: system.base.clone(),
    };
    Ok(Report {
        unix_seconds,
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().into(),
        cpus: bench.cpus,
        seed,
        rounds: options.rounds,
        seconds: options.seconds,
        foreign_max: options.foreign,
        versions,
        absent,
        systems: systems.iter().map(info).collect(),
        memory,
        samples,
    })
}

struct Bench<'a> {
    lab: &'a Lab,
    options: &'a Options,
    cpus: usize,
    load: String,
}

impl Bench<'_> {
    /// One measurement, again if others disturbed it.
    fn sample(&self, round: usize, system: &System, work: &Work) -> Result<Sample> {
        let mut best: Option<Sample> = None;
        for turn in 0..=self.options.repeats {
            let sample = self
                .once(round, system, work)
                .with_context(|| format!("{}, {}", work.name, system.title))?;
            let disturbed = if sample.disturbed { " (disturbed)" } else { "" };
            let mut said = String::new();
            for (name, value) in &sample.values {
                said.push_str(&format!("  {name} {value:.1}"));
            }
            eprintln!(
                "bench: round {} {} {:<12}{said}  foreign {:.0} %{disturbed}",
                round + 1,
                work.name,
                system.name,
                sample.foreign * 100.0
            );
            let better = best.as_ref().is_none_or(|best| sample.foreign < best.foreign);
            if better {
                best = Some(Sample {
                    turns: turn + 1,
                    ..sample
                });
            }
            if best.as_ref().is_some_and(|best| !best.disturbed) {
                break;
            }
        }
        best.context("no sample")
    }

    fn once(&self, round: usize, system: &System, work: &Work) -> Result<Sample> {
        let address = system.address.to_string();
        let seconds = self.options.seconds.to_string();
        let [verb, path, rest @ ..] = work.load else {
            bail!("the work {} says nothing", work.name)
        };
        let mut argv = vec![&self.load as &str, verb, &address, path];
        argv.extend(rest);
        argv.extend(["--seconds", &seconds]);
        let before = Used::now(&system.cgroups, self.lab.cgroup())?;
        let said = self.lab.exec(system.source, &argv)?.ok()?;
        let used = Used::now(&system.cgroups, self.lab.cgroup())?.since(&before, self.cpus);
        let said: Value = serde_json::from_str(&said).with_context(|| format!("bench-load said {said}"))?;
        let number = |field: &str| said[field].as_f64().with_context(|| format!("no {field} in {said}"));
        ensure!(said["errors"] == serde_json::json!({}), "requests failed: {said}");
        let mut values = BTreeMap::new();
        for figure in FIGURES.iter().filter(|figure| figure.work == work.name) {
            let value = match figure.from {
                From::Load(field, scale) => number(field)? * scale,
                _ if system.cgroups.is_empty() => continue,
                From::CpuPerAnswer => used.proxies * 1e6 / number("answered_all")?.max(1.0),
                From::CpuPerGigabyte => used.proxies * 1e9 / number("bytes_all")?.max(1.0),
            };
            values.insert(figure.name.to_string(), value);
        }
        Ok(Sample {
            round,
            system: system.name.clone(),
            work: work.name.into(),
            values,
            foreign: used.foreign,
            disturbed: used.foreign > self.options.foreign,
            turns: 1,
        })
    }

    /// Memory of fresh proxies: idle after a first request, and with idle connections open.
    fn memory(&self, system: &System) -> Result<Memory> {
        if system.agents {
            // What an earlier measurement left in the allocator would hide what this one needs.
            for node in self.lab.state()?.nodes {
                self.lab.stop_agent(&node.name)?;
                self.lab.start_agent(&node.name)?;
            }
            self.lab.wait_captured(READY_LIMIT)?;
        }
        let one = self.idle(system, 1)?;
        // What a start leaves behind, some give back when they come to it.
        std::thread::sleep(SETTLE);
        let idle = machine::resident(&system.cgroups)?;
        drop(one);
        let many = self.idle(system, IDLE_CONNECTIONS)?;
        std::thread::sleep(SETTLE);
        let full = machine::resident(&system.cgroups)?;
        drop(many);
        let each = full.saturating_sub(idle) as f64 / (IDLE_CONNECTIONS - 1) as f64;
        eprintln!(
            "bench: memory of {}: {:.1} MiB idle, {:.1} KiB for each idle connection",
            system.name,
            idle as f64 / 1048576.0,
            each / 1024.0
        );
        Ok(Memory {
            system: system.name.clone(),
            idle_rss_bytes: idle,
            bytes_per_connection: each,
        })
    }

    /// Opens connections that stay until the value is dropped.
    fn idle(&self, system: &System, count: u64) -> Result<mesh_tests::Background> {
        let (address, count) = (system.address.to_string(), count.to_string());
        let argv = [&self.load, "idle", &address, "/bytes/1024", "--connections", &count];
        let mut open = self.lab.exec_background(system.source, &argv)?;
        until(&format!("{count} connections of {}", system.name), IDLE_LIMIT, || {
            ensure!(open.running()?, "it ended: {}", open.stderr());
            Ok(open.stdout().contains("open").then_some(()))
        })?;
        Ok(open)
    }
}

/// A random order from a seed: xorshift64*, which is plenty for this.
struct Shuffle(u64);

impl Shuffle {
    fn next(&mut self) -> u64 {
        self.0 = self.0.max(1);
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = (self.next() >> 33) as usize % (last + 1);
            items.swap(last, other);
        }
    }
}

/// The spread of values; none of nothing.
pub fn spread(mut values: Vec<f64>) -> Option<Spread> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let median = match values.len() {
        0 => return None,
        length if length % 2 == 0 => (values[middle - 1] + values[middle]) / 2.0,
        _ => values[middle],
    };
    Some(Spread {
        median,
        min: values[0],
        max: values[values.len() - 1],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        for (values, median) in [(vec![3.0], 3.0), (vec![3.0, 1.0], 2.0), (vec![9.0, 1.0, 2.0], 2.0)] {
            let spread = spread(values.clone()).unwrap();
            assert_eq!(spread.median, median, "{values:?}");
            assert!(spread.min <= median && median <= spread.max);
        }
        assert!(spread(Vec::new()).is_none());
    }

    #[test]
    fn orders_keep_everything_and_follow_the_seed() {
        let order = |seed| {
            let mut items: Vec<u32> = (0..9).collect();
            Shuffle(seed).shuffle(&mut items);
            items
        };
        let mut sorted = order(7);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..9).collect::<Vec<_>>());
        assert_eq!(order(7), order(7));
        assert_ne!(order(7), order(8));
    }
}
