//! Events: what happened, told once, to the log line and the metrics together.
//!
//! The path opens a [`ConnRecord`] at capture and a [`RequestRecord`] per request, fills in what it learns, and closes
//! each exactly once; a record that is dropped open closes as [`Outcome::Cancelled`]. Everything else that is worth
//! telling is an [`Event`]. Nobody on the path touches a counter or a log macro. Closing costs a few atomic additions on
//! handles that were looked up when the parties were identified; it must never block, wait, or grow without a bound.

pub mod access_log;
pub mod labels;
mod line;
pub mod metrics;
pub mod notice;
pub mod record;
pub mod refusal;
pub mod scrape;

#[cfg(test)]
mod tests;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use mesh_api::workload::{Service, Workload};

pub use access_log::{AccessLog, LogFormat};
pub use labels::{ConnectionSecurity, Parties, PartySet, Protocol, Reporter, ServiceLabels, WorkloadLabels};
pub use metrics::{Compat, SERIES_MAX};
pub use notice::Event;
pub use record::{ConnRecord, RequestRecord};
pub use refusal::Refusal;
pub use scrape::{Samples, Source};

/// How long a series stays after the last record that moved it.
pub const SERIES_IDLE: Duration = Duration::from_secs(15 * 60);

/// How a connection or request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// To its end, whatever the destination answered.
    Served,
    /// The mesh did not carry it, or stopped carrying it, for this reason.
    Refused(Refusal),
    /// The source side reset it.
    SourceReset,
    /// The destination side reset it.
    DestinationReset,
    /// It ended because the agent drained.
    Drained,
    /// Its task was dropped before it ended.
    Cancelled,
}

impl Outcome {
    /// The word in the log line and in the metric label `outcome`.
    pub const fn name(self) -> &'static str {
        match self {
            Outcome::Served => "served",
            Outcome::Refused(_) => "refused",
            Outcome::SourceReset => "source-reset",
            Outcome::DestinationReset => "destination-reset",
            Outcome::Drained => "drained",
            Outcome::Cancelled => "cancelled",
        }
    }

    /// The response flags; `-` where nothing is to be told.
    pub const fn response_flags(self) -> &'static str {
        match self {
            Outcome::Served => "-",
            Outcome::Refused(refusal) => refusal.response_flags(),
            Outcome::SourceReset => "DC",
            Outcome::DestinationReset => "UC",
            Outcome::Drained => "LR",
            Outcome::Cancelled => "DC",
        }
    }

    /// The reason, if the mesh refused.
    pub const fn refusal(self) -> Option<Refusal> {
        match self {
            Outcome::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }

    const ALL: [Outcome; 6] = [
        Outcome::Served,
        Outcome::Refused(Refusal::Internal),
        Outcome::SourceReset,
        Outcome::DestinationReset,
        Outcome::Drained,
        Outcome::Cancelled,
    ];

    fn index(self) -> usize {
        match self {
            Outcome::Served => 0,
            Outcome::Refused(_) => 1,
            Outcome::SourceReset => 2,
            Outcome::DestinationReset => 3,
            Outcome::Drained => 4,
            Outcome::Cancelled => 5,
        }
    }
}

/// How events are told.
#[derive(Debug)]
pub struct EventsConfig {
    /// The node's name, a label of the agent's own metrics and a field of each line.
    pub node: Arc<str>,
    /// Whose metric names are used.
    pub compat: Compat,
    /// The most series of the traffic families; above it records count under `other`.
    pub series_max: usize,
    /// How long a series stays after it moved last.
    pub series_idle: Duration,
    /// Where lines of connections and requests go; `None` writes none.
    pub access_log: Option<AccessLog>,
}

impl EventsConfig {
    /// The defaults for a node, without an access log.
    pub fn new(node: &str) -> EventsConfig {
        EventsConfig {
            node: node.into(),
            compat: Compat::Nodemesh,
            series_max: SERIES_MAX,
            series_idle: SERIES_IDLE,
            access_log: None,
        }
    }
}

/// The one place that events are told to. Process-wide, shared by all workers.
pub struct Events {
    node: Arc<str>,
    epoch: Instant,
    table: Arc<metrics::Table>,
    agent: Arc<metrics::AgentCounters>,
    registry: prometheus_client::registry::Registry,
    sources: Arc<parking_lot::Mutex<Vec<Box<dyn Source>>>>,
    access_log: Option<AccessLog>,
    next_connection: AtomicU64,
}

impl Events {
    /// Opens the place.
    pub fn new(config: EventsConfig) -> Arc<Events> {
        let epoch = now();
        let table = Arc::new(metrics::Table::new(
            config.compat,
            config.series_max,
            config.series_idle,
        ));
        let agent = Arc::new(metrics::AgentCounters::new(config.node.clone()));
        let sources = Arc::new(parking_lot::Mutex::new(Vec::new()));
        let mut registry = prometheus_client::registry::Registry::default();
        registry.register_collector(Box::new(metrics::TrafficCollector(table.clone())));
        registry.register_collector(Box::new(scrape::AgentCollector::new(
            agent.clone(),
            table.clone(),
            config.access_log.as_ref().map(AccessLog::counters),
            sources.clone(),
        )));
        Arc::new(Events {
            node: config.node,
            epoch,
            table,
            agent,
            registry,
            sources,
            access_log: config.access_log,
            next_connection: AtomicU64::new(1),
        })
    }

    /// An instance for tests and tools: no access log.
    pub fn quiet() -> Arc<Events> {
        Events::new(EventsConfig::new("node"))
    }

    /// The interned parties of a connection or request. Look it up once they are known and keep the `Arc`: the series
    /// are cached behind it.
    pub fn parties(&self, parties: Parties) -> Arc<PartySet> {
        self.table.intern(parties, self.since_epoch())
    }

    /// The same from the view's own values, by a shortcut of the calling thread: cheap enough for each request.
    pub fn parties_of(
        &self,
        reporter: Reporter,
        source: Option<&Arc<Workload>>,
        destination: Option<&Arc<Workload>>,
        service: Option<&Arc<Service>>,
        security: ConnectionSecurity,
    ) -> Arc<PartySet> {
        let at = self.since_epoch();
        self.table
            .intern_view(reporter, source, destination, service, security, at)
    }

    /// A record for a connection that was captured or steered now.
    pub fn connection(self: &Arc<Self>, parties: Arc<PartySet>, protocol: Protocol) -> ConnRecord {
        ConnRecord::open(self.clone(), parties, protocol)
    }

    /// A record for a request whose head came now.
    pub fn request(self: &Arc<Self>, parties: Arc<PartySet>, protocol: Protocol) -> RequestRecord {
        RequestRecord::open(self.clone(), parties, protocol)
    }

    /// Tells an event: its line and its count.
    pub fn emit(&self, event: Event) {
        event.log();
        self.agent.count_event(&event);
    }

    /// Counts a refusal that belongs to no record (a message that never became a request).
    pub fn refused(&self, refusal: Refusal) {
        self.agent.count_refusal(refusal);
    }

    /// Adds a component whose gauges and counters are read at each scrape.
    pub fn add_source(&self, source: Box<dyn Source>) {
        self.sources.lock().push(source);
    }

    /// The whole exposition, in OpenMetrics text.
    pub fn scrape(&self) -> Result<String, fmt::Error> {
        let mut text = String::with_capacity(64 * 1024);
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }

    /// Forgets series that did not move for long and that no record holds; returns how many pairs of parties went.
    pub fn expire(&self, now: Instant) -> usize {
        self.table.expire(now.saturating_duration_since(self.epoch))
    }

    /// Whether lines are written: the path may save itself the copying of what only a line would show.
    pub fn logs_access(&self) -> bool {
        self.access_log.is_some()
    }

    /// Waits until lines told so far are written, for a bounded time.
    pub fn flush(&self) {
        if let Some(log) = &self.access_log {
            log.flush();
        }
    }

    /// The node's name.
    pub fn node(&self) -> &str {
        &self.node
    }

    fn since_epoch(&self) -> Duration {
        now().saturating_duration_since(self.epoch)
    }

    fn connection_id(&self) -> u64 {
        self.next_connection.fetch_add(1, Ordering::Relaxed)
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events")
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

/// Monotonic time, through tokio so that a paused runtime holds it too.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
