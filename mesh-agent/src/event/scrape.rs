//! The agent's own families, `nodemesh_agent_*` and `process_*`: read when scraped, never pushed.
//!
//! A component that has gauges (maps, pools, breakers, certificates) implements [`Source`]; it is asked at each scrape
//! on the control thread. It must answer from memory or `/proc`, quickly, and with a bounded number of samples.

use std::{borrow::Cow, collections::BTreeMap, fmt, sync::Arc, time::SystemTime};

use parking_lot::Mutex;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, NoLabelSet},
    metrics::MetricType,
};

use super::{
    access_log::LogCounters,
    metrics::{AgentCounters, Table},
};

/// A component with gauges or counters of its own.
pub trait Source: Send {
    /// Adds its samples.
    fn collect(&self, samples: &mut Samples);
}

impl<F: Fn(&mut Samples) + Send> Source for F {
    fn collect(&self, samples: &mut Samples) {
        self(samples);
    }
}

type Labels = Vec<(&'static str, Cow<'static, str>)>;

struct Family {
    help: &'static str,
    counter: bool,
    samples: Vec<(Labels, f64)>,
}

struct Histogram {
    help: &'static str,
    sum: f64,
    buckets: Vec<(f64, u64)>,
}

/// Samples by family, in the order of the exposition.
#[derive(Default)]
pub struct Samples {
    families: BTreeMap<&'static str, Family>,
    histograms: BTreeMap<&'static str, Histogram>,
}

impl Samples {
    /// A gauge. `name` is the whole name, such as `nodemesh_agent_map_entries`.
    pub fn gauge(
        &mut self,
        name: &'static str,
        help: &'static str,
        labels: impl IntoIterator<Item = (&'static str, Cow<'static, str>)>,
        value: f64,
    ) {
        self.push(name, help, false, labels.into_iter().collect(), value);
    }

    /// A counter. `name` comes without `_total`, which the exposition adds.
    pub fn counter(
        &mut self,
        name: &'static str,
        help: &'static str,
        labels: impl IntoIterator<Item = (&'static str, Cow<'static, str>)>,
        value: u64,
    ) {
        self.push(name, help, true, labels.into_iter().collect(), value as f64);
    }

    /// A histogram without labels: the sum, and each bucket's upper bound with its own count, the last one infinite.
    pub fn histogram(&mut self, name: &'static str, help: &'static str, sum: f64, buckets: Vec<(f64, u64)>) {
        self.histograms.insert(name, Histogram { help, sum, buckets });
    }

    fn push(&mut self, name: &'static str, help: &'static str, counter: bool, labels: Labels, value: f64) {
        let family = self.families.entry(name).or_insert_with(|| Family {
            help,
            counter,
            samples: Vec::new(),
        });
        // One series twice would make the whole exposition invalid; the last one told is kept.
        match family.samples.iter_mut().find(|(known, _)| *known == labels) {
            Some((_, known)) => *known = value,
            None => family.samples.push((labels, value)),
        }
    }
}

pub(super) struct AgentCollector {
    agent: Arc<AgentCounters>,
    table: Arc<Table>,
    log: Option<Arc<LogCounters>>,
    sources: Arc<Mutex<Vec<Box<dyn Source>>>>,
    started: SystemTime,
}

impl AgentCollector {
    pub(super) fn new(
        agent: Arc<AgentCounters>,
        table: Arc<Table>,
        log: Option<Arc<LogCounters>>,
        sources: Arc<Mutex<Vec<Box<dyn Source>>>>,
    ) -> AgentCollector {
        AgentCollector {
            agent,
            table,
            log,
            sources,
            started: SystemTime::now(),
        }
    }

    fn own(&self, samples: &mut Samples) {
        use std::sync::atomic::Ordering::Relaxed;
        let text = |text: &'static str| Cow::Borrowed(text);
        samples.gauge(
            "nodemesh_agent_build_info",
            "The agent's version and node",
            [
                ("version", text(env!("CARGO_PKG_VERSION"))),
                ("node", Cow::Owned(self.agent.node.to_string())),
            ],
            1.0,
        );
        for (kind, open) in [
            ("connection", &self.agent.connections_open),
            ("request", &self.agent.requests_open),
        ] {
            samples.gauge(
                "nodemesh_agent_records_open",
                "Connections and requests in progress",
                [("kind", text(kind))],
                open.load(Relaxed) as f64,
            );
        }
        for (kind, outcome, count) in self.agent.outcomes() {
            samples.counter(
                "nodemesh_agent_records_closed",
                "Connections and requests that ended, by how",
                [("kind", text(kind)), ("outcome", text(outcome))],
                count,
            );
        }
        for (refusal, count) in self.agent.refusals() {
            let labels = [
                ("reason", text(refusal.name())),
                ("code", Cow::Owned(refusal.code().to_string())),
                ("response_flags", text(refusal.response_flags())),
            ];
            samples.counter(
                "nodemesh_agent_refusals",
                "Connections and requests that the mesh refused, by reason",
                labels,
                count,
            );
        }
        for (event, count) in self.agent.events() {
            samples.counter(
                "nodemesh_agent_events",
                "Events of the agent itself",
                [("event", text(event))],
                count,
            );
        }
        samples.gauge(
            "nodemesh_agent_series",
            "Series of the traffic families",
            [],
            self.table.series() as f64,
        );
        samples.counter(
            "nodemesh_agent_series_overflows",
            "Times that a record found no room for a series of its own",
            [],
            self.table.overflows(),
        );
        samples.counter(
            "nodemesh_agent_series_expired",
            "Pairs of parties that were forgotten because nothing moved",
            [],
            self.table.expired(),
        );
        if let Some(log) = &self.log {
            samples.counter(
                "nodemesh_agent_access_log_lines",
                "Lines of the access log that were taken",
                [],
                log.taken(),
            );
            samples.counter(
                "nodemesh_agent_access_log_dropped",
                "Lines of the access log that were dropped because its buffer was full or its file failed",
                [],
                log.dropped(),
            );
        }
        self.process(samples);
    }

    fn process(&self, samples: &mut Samples) {
        if let Ok(since) = self.started.duration_since(SystemTime::UNIX_EPOCH) {
            samples.gauge(
                "process_start_time_seconds",
                "When the process started, in seconds since 1970",
                [],
                since.as_secs_f64(),
            );
        }
        let Some(process) = ProcessFigures::read() else {
            return;
        };
        samples.gauge(
            "process_resident_memory_bytes",
            "Resident memory",
            [],
            process.resident_bytes as f64,
        );
        samples.gauge("process_open_fds", "Open file descriptors", [], process.open_fds as f64);
        samples.push(
            "process_cpu_seconds",
            "Processor time used, user and system",
            true,
            Vec::new(),
            process.cpu_seconds,
        );
    }
}

struct ProcessFigures {
    resident_bytes: u64,
    cpu_seconds: f64,
    open_fds: usize,
}

impl ProcessFigures {
    fn read() -> Option<ProcessFigures> {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let resident_kib: u64 = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))?
            .split_whitespace()
            .next()?
            .parse()
            .ok()?;
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        // The second field is the command in parentheses and may hold spaces.
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        let user: u64 = fields.nth(11)?.parse().ok()?;
        let system: u64 = fields.next()?.parse().ok()?;
        let open_fds = std::fs::read_dir("/proc/self/fd").ok()?.count();
        Some(ProcessFigures {
            resident_bytes: resident_kib * 1024,
            // USER_HZ is 100 on every architecture that we build for.
            cpu_seconds: (user + system) as f64 / 100.0,
            open_fds,
        })
    }
}

impl fmt::Debug for AgentCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AgentCollector")
    }
}

// Sources are reached only under the mutex, one scrape at a time.
impl Collector for AgentCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let mut samples = Samples::default();
        self.own(&mut samples);
        for source in self.sources.lock().iter() {
            source.collect(&mut samples);
        }
        for (name, family) in &samples.families {
            let kind = if family.counter {
                MetricType::Counter
            } else {
                MetricType::Gauge
            };
            let mut encoder = encoder.encode_descriptor(name, family.help, None, kind)?;
            for (labels, value) in &family.samples {
                let labels: Vec<(&str, &str)> = labels.iter().map(|(key, value)| (*key, &**value)).collect();
                let mut encoder = encoder.encode_family(&labels)?;
                // Whole numbers are printed as such, so that a counter's last digit is never lost.
                let whole = value.fract() == 0.0 && value.abs() < 9e15;
                match (family.counter, whole) {
                    (true, true) => encoder.encode_counter::<NoLabelSet, _, u64>(&(*value as u64), None)?,
                    (true, false) => encoder.encode_counter::<NoLabelSet, _, f64>(value, None)?,
                    (false, true) => encoder.encode_gauge(&(*value as i64))?,
                    (false, false) => encoder.encode_gauge(value)?,
                }
            }
        }
        for (name, histogram) in &samples.histograms {
            let count = histogram.buckets.iter().map(|(_, count)| count).sum();
            encoder
                .encode_descriptor(name, histogram.help, None, MetricType::Histogram)?
                .encode_histogram::<NoLabelSet>(histogram.sum, count, &histogram.buckets, None)?;
        }
        Ok(())
    }
}
