//! Records as Prometheus families, with Istio's label set.
//!
//! One [`PartySet`] per distinct pair of parties holds the series of its requests and connections as bare atomics;
//! closing a record adds to them and nothing else. The exposition walks the sets when scraped. Series that did not move
//! for long are forgotten, and their number is bounded: what exceeds it counts under `other`.

use std::{
    cell::RefCell,
    collections::HashMap,
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use foldhash::fast::RandomState;
use mesh_api::workload::{Service, Workload};
use parking_lot::RwLock;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabel, EncodeLabelSet, LabelSetEncoder, NoLabelSet},
    metrics::MetricType,
};

use super::{
    Event, Outcome, Refusal,
    labels::{ConnectionSecurity, OTHER, Parties, Protocol, Reporter, ServiceLabels, UNKNOWN, WorkloadLabels},
};

/// The most series (label sets of requests plus those of connections) unless configured otherwise. A request's series
/// takes about 30 kB of exposition text.
pub const SERIES_MAX: usize = 4000;
/// The most entries of a thread's shortcut from the view's values to their interned parties.
const SHORTCUTS_MAX: usize = 4096;

/// Upper bounds of `mesh_request_duration_seconds`, in nanoseconds.
const DURATION_BOUNDS_NS: [u64; 16] = [
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
    2_500_000_000,
    5_000_000_000,
    10_000_000_000,
    30_000_000_000,
    60_000_000_000,
];
/// Upper bounds of `mesh_request_bytes` and `mesh_response_bytes`.
const BYTES_BOUNDS: [u64; 8] = [256, 1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 20, 1 << 24, 1 << 28];

/// Whose metric names the traffic families use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compat {
    /// `mesh_*`, durations in seconds.
    #[default]
    Nodemesh,
    /// `istio_*`, durations in milliseconds, with the labels that Kiali and Flagger ask for.
    Istio,
}

/// A histogram of whole numbers; `N` bounds and one more bucket above them.
struct Distribution<const N: usize> {
    buckets: [AtomicU64; N],
    above: AtomicU64,
    sum: AtomicU64,
}

impl<const N: usize> Default for Distribution<N> {
    fn default() -> Self {
        Distribution {
            buckets: std::array::from_fn(|_| AtomicU64::new(0)),
            above: AtomicU64::new(0),
            sum: AtomicU64::new(0),
        }
    }
}

impl<const N: usize> Distribution<N> {
    fn observe(&self, bounds: &[u64; N], value: u64) {
        let place = bounds.partition_point(|bound| *bound < value);
        self.buckets.get(place).unwrap_or(&self.above).fetch_add(1, Relaxed);
        self.sum.fetch_add(value, Relaxed);
    }

    fn count(&self) -> u64 {
        self.buckets.iter().map(|b| b.load(Relaxed)).sum::<u64>() + self.above.load(Relaxed)
    }

    /// Sum, count and buckets for the encoder, with values divided by `scale`.
    fn snapshot(&self, bounds: &[u64; N], scale: f64) -> (f64, u64, Vec<(f64, u64)>) {
        let mut buckets: Vec<(f64, u64)> = bounds
            .iter()
            .zip(&self.buckets)
            .map(|(bound, count)| (*bound as f64 / scale, count.load(Relaxed)))
            .collect();
        buckets.push((f64::INFINITY, self.above.load(Relaxed)));
        let count = buckets.iter().map(|(_, n)| n).sum();
        (self.sum.load(Relaxed) as f64 / scale, count, buckets)
    }
}

/// What a request's series adds to the parties' labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestVariant {
    pub protocol: Protocol,
    /// The status; 0 where the source was told none.
    pub code: u16,
    pub flags: &'static str,
    pub grpc: Option<u32>,
}

#[derive(Default)]
struct RequestSeries {
    duration: Distribution<16>,
    request_bytes: Distribution<8>,
    response_bytes: Distribution<8>,
}

/// What a connection's series adds to the parties' labels: its response flags.
#[derive(Default)]
struct TcpSeries {
    opened: AtomicU64,
    closed: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
}

/// The series of one pair of parties.
pub struct PartySet {
    parties: Parties,
    other: bool,
    requests: RwLock<Vec<(RequestVariant, Arc<RequestSeries>)>>,
    connections: RwLock<Vec<(&'static str, Arc<TcpSeries>)>>,
    /// Seconds since the epoch of the events.
    moved: AtomicU64,
    retired: AtomicBool,
}

impl PartySet {
    fn new(parties: Parties, other: bool, at: Duration) -> PartySet {
        PartySet {
            parties,
            other,
            requests: RwLock::default(),
            connections: RwLock::default(),
            moved: AtomicU64::new(at.as_secs()),
            retired: AtomicBool::new(false),
        }
    }

    /// Who took part.
    pub fn parties(&self) -> &Parties {
        &self.parties
    }

    fn touch(&self, at: Duration) {
        // Stores only when the second changed, so that the line stays shared between cores.
        if self.moved.load(Relaxed) != at.as_secs() {
            self.moved.store(at.as_secs(), Relaxed);
        }
    }

    fn series(&self) -> usize {
        self.requests.read().len() + self.connections.read().len()
    }
}

impl fmt::Debug for PartySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.parties.fmt(f)
    }
}

/// All series of the traffic families.
pub struct Table {
    id: u64,
    compat: Compat,
    series_max: usize,
    idle: Duration,
    sets: RwLock<HashMap<Parties, Arc<PartySet>, RandomState>>,
    other: [Arc<PartySet>; 2],
    series: AtomicUsize,
    overflows: AtomicU64,
    expired: AtomicU64,
}

/// Where a thread finds interned parties by the addresses of the view's values. The weak references keep an address
/// from being used for another value while it is a key here.
struct Shortcut {
    set: Weak<PartySet>,
    _pins: Pins,
}

type Pins = (Option<Weak<Workload>>, Option<Weak<Workload>>, Option<Weak<Service>>);

type ShortcutKey = (u64, Reporter, ConnectionSecurity, usize, usize, usize);

thread_local! {
    static SHORTCUTS: RefCell<HashMap<ShortcutKey, Shortcut, RandomState>> = RefCell::default();
}

impl Table {
    pub(super) fn new(compat: Compat, series_max: usize, idle: Duration) -> Table {
        static IDS: AtomicU64 = AtomicU64::new(0);
        let other = |reporter| {
            let labels = Arc::new(WorkloadLabels::constant(OTHER));
            let parties = Parties {
                reporter,
                source: labels.clone(),
                destination: labels,
                service: Some(Arc::new(ServiceLabels {
                    host: OTHER.into(),
                    name: OTHER.into(),
                    namespace: OTHER.into(),
                })),
                security: ConnectionSecurity::Unknown,
            };
            Arc::new(PartySet::new(parties, true, Duration::ZERO))
        };
        Table {
            id: IDS.fetch_add(1, Relaxed),
            compat,
            series_max,
            idle,
            sets: RwLock::default(),
            other: [other(Reporter::Source), other(Reporter::Destination)],
            series: AtomicUsize::new(0),
            overflows: AtomicU64::new(0),
            expired: AtomicU64::new(0),
        }
    }

    fn other(&self, reporter: Reporter) -> &Arc<PartySet> {
        let [source, destination] = &self.other;
        match reporter {
            Reporter::Source => source,
            Reporter::Destination => destination,
        }
    }

    pub(super) fn intern(&self, parties: Parties, at: Duration) -> Arc<PartySet> {
        if let Some(set) = self.sets.read().get(&parties) {
            return set.clone();
        }
        let mut sets = self.sets.write();
        if let Some(set) = sets.get(&parties) {
            return set.clone();
        }
        // A set holds no series yet, but it will: sets count against the same bound.
        if sets.len() >= self.series_max {
            self.overflows.fetch_add(1, Relaxed);
            return self.other(parties.reporter).clone();
        }
        let set = Arc::new(PartySet::new(parties.clone(), false, at));
        sets.insert(parties, set.clone());
        set
    }

    pub(super) fn intern_view(
        &self,
        reporter: Reporter,
        source: Option<&Arc<Workload>>,
        destination: Option<&Arc<Workload>>,
        service: Option<&Arc<Service>>,
        security: ConnectionSecurity,
        at: Duration,
    ) -> Arc<PartySet> {
        fn address<T>(value: Option<&Arc<T>>) -> usize {
            value.map_or(0, |v| Arc::as_ptr(v) as usize)
        }
        let key = (
            self.id,
            reporter,
            security,
            address(source),
            address(destination),
            address(service),
        );
        SHORTCUTS.with_borrow_mut(|shortcuts| {
            if let Some(set) = shortcuts.get(&key).and_then(|s| s.set.upgrade())
                && !set.retired.load(Relaxed)
            {
                return set;
            }
            let parties = Parties::of(
                reporter,
                source.map(|w| &**w),
                destination.map(|w| &**w),
                service.map(|s| &**s),
                security,
            );
            let set = self.intern(parties, at);
            if shortcuts.len() >= SHORTCUTS_MAX {
                shortcuts.clear();
            }
            let shortcut = Shortcut {
                set: Arc::downgrade(&set),
                _pins: (
                    source.map(Arc::downgrade),
                    destination.map(Arc::downgrade),
                    service.map(Arc::downgrade),
                ),
            };
            shortcuts.insert(key, shortcut);
            set
        })
    }

    /// Takes one of the places for series, or says that there is none left.
    fn take_place(&self) -> bool {
        let taken = self
            .series
            .fetch_update(Relaxed, Relaxed, |n| (n < self.series_max).then_some(n + 1))
            .is_ok();
        if !taken {
            self.overflows.fetch_add(1, Relaxed);
        }
        taken
    }

    /// The set that a record of `set` counts in: itself, or its successor if it was forgotten meanwhile.
    fn living(&self, set: &Arc<PartySet>, at: Duration) -> Arc<PartySet> {
        if set.retired.load(Relaxed) {
            self.intern(set.parties.clone(), at)
        } else {
            set.clone()
        }
    }

    fn request_series(&self, set: &PartySet, variant: RequestVariant) -> Arc<RequestSeries> {
        if let Some((_, series)) = set.requests.read().iter().find(|(v, _)| *v == variant) {
            return series.clone();
        }
        let (set, variant) = if !set.other && self.take_place() {
            (set, variant)
        } else {
            let variant = RequestVariant {
                protocol: variant.protocol,
                code: u16::MAX,
                flags: OTHER,
                grpc: None,
            };
            (&**self.other(set.parties.reporter), variant)
        };
        let mut requests = set.requests.write();
        if let Some((_, series)) = requests.iter().find(|(v, _)| *v == variant) {
            if !set.other {
                self.series.fetch_sub(1, Relaxed);
            }
            return series.clone();
        }
        let series = Arc::<RequestSeries>::default();
        requests.push((variant, series.clone()));
        series
    }

    fn tcp_series(&self, set: &PartySet, flags: &'static str) -> Arc<TcpSeries> {
        if let Some((_, series)) = set.connections.read().iter().find(|(f, _)| *f == flags) {
            return series.clone();
        }
        let (set, flags) = if !set.other && self.take_place() {
            (set, flags)
        } else {
            (&**self.other(set.parties.reporter), OTHER)
        };
        let mut connections = set.connections.write();
        if let Some((_, series)) = connections.iter().find(|(f, _)| *f == flags) {
            if !set.other {
                self.series.fetch_sub(1, Relaxed);
            }
            return series.clone();
        }
        let series = Arc::<TcpSeries>::default();
        connections.push((flags, series.clone()));
        series
    }

    pub(super) fn request_closed(
        &self,
        set: &Arc<PartySet>,
        variant: RequestVariant,
        duration: Duration,
        bytes: (u64, u64),
        at: Duration,
    ) {
        let set = self.living(set, at);
        set.touch(at);
        let requests = set.requests.read();
        let found = requests.iter().find(|(v, _)| *v == variant).map(|(_, series)| series);
        let observe = |series: &RequestSeries| {
            let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
            series.duration.observe(&DURATION_BOUNDS_NS, ns);
            series.request_bytes.observe(&BYTES_BOUNDS, bytes.0);
            series.response_bytes.observe(&BYTES_BOUNDS, bytes.1);
        };
        match found {
            Some(series) => observe(series),
            None => {
                drop(requests);
                observe(&self.request_series(&set, variant));
            }
        }
    }

    pub(super) fn connection_opened(&self, set: &Arc<PartySet>, at: Duration) {
        let set = self.living(set, at);
        set.touch(at);
        self.tcp_series(&set, "-").opened.fetch_add(1, Relaxed);
    }

    pub(super) fn connection_moved(&self, set: &Arc<PartySet>, sent: u64, received: u64, at: Duration) {
        let set = self.living(set, at);
        set.touch(at);
        let series = self.tcp_series(&set, "-");
        series.sent.fetch_add(sent, Relaxed);
        series.received.fetch_add(received, Relaxed);
    }

    pub(super) fn connection_closed(
        &self,
        set: &Arc<PartySet>,
        flags: &'static str,
        sent: u64,
        received: u64,
        at: Duration,
    ) {
        let set = self.living(set, at);
        set.touch(at);
        let series = self.tcp_series(&set, flags);
        series.closed.fetch_add(1, Relaxed);
        series.sent.fetch_add(sent, Relaxed);
        series.received.fetch_add(received, Relaxed);
    }

    /// Forgets the sets that nobody holds and that did not move for long; `at` is the time since the epoch.
    pub(super) fn expire(&self, at: Duration) -> usize {
        let mut sets = self.sets.write();
        let before = sets.len();
        sets.retain(|_, set| {
            let idle = at.as_secs().saturating_sub(set.moved.load(Relaxed)) >= self.idle.as_secs();
            let stays = !idle || Arc::strong_count(set) > 1;
            if !stays {
                set.retired.store(true, Relaxed);
                self.series.fetch_sub(set.series(), Relaxed);
            }
            stays
        });
        let gone = before - sets.len();
        self.expired.fetch_add(gone as u64, Relaxed);
        gone
    }

    pub(super) fn series(&self) -> usize {
        self.series.load(Relaxed)
    }
    pub(super) fn overflows(&self) -> u64 {
        self.overflows.load(Relaxed)
    }
    pub(super) fn expired(&self) -> u64 {
        self.expired.load(Relaxed)
    }
}

/// The labels of one series as the encoder takes them.
struct SeriesLabels<'a> {
    parties: &'a Parties,
    compat: Compat,
    request: Option<RequestVariant>,
    flags: &'static str,
}

impl EncodeLabelSet for SeriesLabels<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder) -> fmt::Result {
        let Parties {
            reporter,
            source,
            destination,
            service,
            security,
        } = self.parties;
        let or_unknown = |text: &'_ str| {
            if text.is_empty() {
                UNKNOWN.to_owned()
            } else {
                text.to_owned()
            }
        };
        let (host, name, namespace) = match service {
            Some(service) => (&*service.host, &*service.name, &*service.namespace),
            None => (UNKNOWN, UNKNOWN, UNKNOWN),
        };
        let mut label = |key: &str, value: &str| {
            let value = or_unknown(value);
            (key, value.as_str()).encode(encoder.encode_label())
        };
        label("reporter", reporter.name())?;
        label("source_workload", &source.workload)?;
        label("source_workload_namespace", &source.namespace)?;
        label("source_principal", source.principal())?;
        label("source_app", &source.app)?;
        label("source_version", &source.version)?;
        label("destination_workload", &destination.workload)?;
        label("destination_workload_namespace", &destination.namespace)?;
        label("destination_principal", destination.principal())?;
        label("destination_app", &destination.app)?;
        label("destination_version", &destination.version)?;
        label("destination_service", host)?;
        label("destination_service_name", name)?;
        label("destination_service_namespace", namespace)?;
        if self.compat == Compat::Istio {
            label("source_cluster", "Kubernetes")?;
            label("source_canonical_service", &source.app)?;
            label("source_canonical_revision", &source.version)?;
            label("destination_cluster", "Kubernetes")?;
            label("destination_canonical_service", &destination.app)?;
            label("destination_canonical_revision", &destination.version)?;
        }
        label("request_protocol", self.request.map_or("tcp", |r| r.protocol.name()))?;
        if let Some(request) = self.request {
            match request.code {
                u16::MAX => label("response_code", OTHER)?,
                code => label("response_code", &code.to_string())?,
            }
            // Istio has this label on every request series, empty where there is no gRPC.
            let grpc = request.grpc.map(|g| g.to_string()).unwrap_or_default();
            ("grpc_response_status", grpc.as_str()).encode(encoder.encode_label())?;
        }
        let mut label = |key: &str, value: &str| (key, value).encode(encoder.encode_label());
        label("response_flags", self.flags)?;
        label("connection_security_policy", security.name())
    }
}

/// The traffic families, read from the table at each scrape.
pub(super) struct TrafficCollector(pub(super) Arc<Table>);

impl fmt::Debug for TrafficCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TrafficCollector")
    }
}

type RequestRows = Vec<(Arc<PartySet>, RequestVariant, Arc<RequestSeries>)>;
type TcpRows = Vec<(Arc<PartySet>, &'static str, Arc<TcpSeries>)>;

impl TrafficCollector {
    fn rows(&self) -> (RequestRows, TcpRows) {
        let table = &*self.0;
        let sets: Vec<Arc<PartySet>> = table.sets.read().values().chain(&table.other).cloned().collect();
        let (mut requests, mut connections) = (Vec::new(), Vec::new());
        for set in sets {
            for (variant, series) in set.requests.read().iter() {
                requests.push((set.clone(), *variant, series.clone()));
            }
            for (flags, series) in set.connections.read().iter() {
                connections.push((set.clone(), *flags, series.clone()));
            }
        }
        (requests, connections)
    }

    fn request_labels<'a>(&self, set: &'a PartySet, variant: RequestVariant) -> SeriesLabels<'a> {
        SeriesLabels {
            parties: &set.parties,
            compat: self.0.compat,
            request: Some(variant),
            flags: variant.flags,
        }
    }

    fn histogram(
        &self,
        encoder: &mut DescriptorEncoder,
        (name, help): (&str, &str),
        rows: &RequestRows,
        snapshot: impl Fn(&RequestSeries) -> (f64, u64, Vec<(f64, u64)>),
    ) -> fmt::Result {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for (set, variant, series) in rows {
            let labels = self.request_labels(set, *variant);
            let (sum, count, buckets) = snapshot(series);
            family
                .encode_family(&labels)?
                .encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        Ok(())
    }
}

impl Collector for TrafficCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let (requests, connections) = self.rows();
        let istio = self.0.compat == Compat::Istio;
        let name = |ours: &'static str, theirs: &'static str| if istio { theirs } else { ours };

        let help = "Requests that ended";
        let family_name = name("mesh_requests", "istio_requests");
        let mut family = encoder.encode_descriptor(family_name, help, None, MetricType::Counter)?;
        for (set, variant, series) in &requests {
            let labels = self.request_labels(set, *variant);
            family
                .encode_family(&labels)?
                .encode_counter::<NoLabelSet, _, u64>(&series.duration.count(), None)?;
        }
        let (duration, scale) = if istio {
            ("istio_request_duration_milliseconds", 1e6)
        } else {
            ("mesh_request_duration_seconds", 1e9)
        };
        let help = "Time from a request's head to the end of its response";
        self.histogram(&mut encoder, (duration, help), &requests, |s| {
            s.duration.snapshot(&DURATION_BOUNDS_NS, scale)
        })?;
        let names = (
            name("mesh_request_bytes", "istio_request_bytes"),
            "Size of request bodies",
        );
        self.histogram(&mut encoder, names, &requests, |s| {
            s.request_bytes.snapshot(&BYTES_BOUNDS, 1.0)
        })?;
        let names = (
            name("mesh_response_bytes", "istio_response_bytes"),
            "Size of response bodies",
        );
        self.histogram(&mut encoder, names, &requests, |s| {
            s.response_bytes.snapshot(&BYTES_BOUNDS, 1.0)
        })?;

        type Read = fn(&TcpSeries) -> &AtomicU64;
        let families: [(&str, &str, &str, Read); 4] = [
            (
                "mesh_tcp_connections_opened",
                "istio_tcp_connections_opened",
                "TCP connections that opened",
                |s| &s.opened,
            ),
            (
                "mesh_tcp_connections_closed",
                "istio_tcp_connections_closed",
                "TCP connections that closed",
                |s| &s.closed,
            ),
            (
                "mesh_tcp_sent_bytes",
                "istio_tcp_sent_bytes",
                "Bytes sent to the source of TCP connections",
                |s| &s.sent,
            ),
            (
                "mesh_tcp_received_bytes",
                "istio_tcp_received_bytes",
                "Bytes received from the source of TCP connections",
                |s| &s.received,
            ),
        ];
        for (ours, theirs, help, read) in families {
            let mut family = encoder.encode_descriptor(name(ours, theirs), help, None, MetricType::Counter)?;
            for (set, flags, series) in &connections {
                let labels = SeriesLabels {
                    parties: &set.parties,
                    compat: self.0.compat,
                    request: None,
                    flags,
                };
                family
                    .encode_family(&labels)?
                    .encode_counter::<NoLabelSet, _, u64>(&read(series).load(Relaxed), None)?;
            }
        }
        Ok(())
    }
}

/// The agent's own counts that come from records and events.
pub(super) struct AgentCounters {
    pub(super) node: Arc<str>,
    pub(super) connections_open: AtomicI64,
    pub(super) requests_open: AtomicI64,
    connections: [AtomicU64; 6],
    requests: [AtomicU64; 6],
    refusals: Vec<AtomicU64>,
    events: Vec<AtomicU64>,
}

impl AgentCounters {
    pub(super) fn new(node: Arc<str>) -> AgentCounters {
        AgentCounters {
            node,
            connections_open: AtomicI64::new(0),
            requests_open: AtomicI64::new(0),
            connections: Default::default(),
            requests: Default::default(),
            refusals: Refusal::ALL.iter().map(|_| AtomicU64::new(0)).collect(),
            events: Event::NAMES.iter().map(|_| AtomicU64::new(0)).collect(),
        }
    }

    pub(super) fn count_event(&self, event: &Event) {
        if let Some(counter) = self.events.get(event.index()) {
            counter.fetch_add(1, Relaxed);
        }
    }

    pub(super) fn count_refusal(&self, refusal: Refusal) {
        if let Some(counter) = self.refusals.get(refusal.index()) {
            counter.fetch_add(1, Relaxed);
        }
    }

    pub(super) fn count_closed(&self, request: bool, outcome: Outcome) {
        let (open, closed) = if request {
            (&self.requests_open, &self.requests)
        } else {
            (&self.connections_open, &self.connections)
        };
        open.fetch_sub(1, Relaxed);
        if let Some(counter) = closed.get(outcome.index()) {
            counter.fetch_add(1, Relaxed);
        }
        if let Outcome::Refused(refusal) = outcome {
            self.count_refusal(refusal);
        }
    }

    /// `(kind, outcome, count)` of every way that records closed.
    pub(super) fn outcomes(&self) -> impl Iterator<Item = (&'static str, &'static str, u64)> {
        [("connection", &self.connections), ("request", &self.requests)]
            .into_iter()
            .flat_map(|(kind, counts)| {
                Outcome::ALL
                    .into_iter()
                    .zip(counts)
                    .map(move |(outcome, count)| (kind, outcome.name(), count.load(Relaxed)))
            })
    }

    pub(super) fn refusals(&self) -> impl Iterator<Item = (Refusal, u64)> {
        Refusal::ALL
            .iter()
            .copied()
            .zip(self.refusals.iter().map(|count| count.load(Relaxed)))
    }

    pub(super) fn events(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Event::NAMES
            .iter()
            .copied()
            .zip(self.events.iter().map(|count| count.load(Relaxed)))
    }
}
