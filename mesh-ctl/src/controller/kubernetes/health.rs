//! Health and metrics of a replica, over plain HTTP: `/livez`, `/readyz`, `/metrics`.
//!
//! Ready means that this replica leads and serves, or that it has compiled everything and waits for the lead (where the
//! leader itself says which replica agents are led to; else only the leader is ready). Alive means that its tasks
//! answer. Nothing secret is said here, and nothing can be changed.

use std::{
    convert::Infallible,
    fmt::Write,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http_body_util::Full;
use hyper::{Request, Response, StatusCode, body::Bytes, body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_api::{
    document::{DocumentSet, Kind},
    workload::Revision,
};
use parking_lot::Mutex;
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::sync::CancellationToken;

/// Open connections.
const CONNECTIONS_MAX: usize = 64;
/// A connection lives no longer.
const CONNECTION_LIFE: Duration = Duration::from_secs(60);
/// How long a request's head may take.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByKind {
    kind: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByResult {
    result: &'static str,
}

/// What a replica counts.
pub struct Metrics {
    registry: Registry,
    /// Kinds that were not seen whole yet.
    unseen: Mutex<Vec<&'static str>>,
    leader: Gauge,
    ready: Gauge,
    waiting: AtomicBool,
    revision: Gauge,
    documents: Family<ByKind, Gauge>,
    agents: Gauge,
    agents_behind: Gauge,
    revisions: Counter,
    compile: Histogram,
    watch_errors: Family<ByKind, Counter>,
    unreadable: Gauge,
    status_writes: Family<ByResult, Counter>,
    not_captured: Gauge,
    ca_expires: Gauge,
}

impl Metrics {
    /// All at zero.
    pub fn new() -> Metrics {
        let buckets = [
            0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
        ];
        let mut registry = Registry::with_prefix("nodemesh_controller");
        let mut metrics = Metrics {
            registry: Registry::default(),
            unseen: Mutex::new(vec!["everything"]),
            leader: Gauge::default(),
            ready: Gauge::default(),
            waiting: AtomicBool::new(false),
            revision: Gauge::default(),
            documents: Family::default(),
            agents: Gauge::default(),
            agents_behind: Gauge::default(),
            revisions: Counter::default(),
            compile: Histogram::new(buckets),
            watch_errors: Family::default(),
            unreadable: Gauge::default(),
            status_writes: Family::default(),
            not_captured: Gauge::default(),
            ca_expires: Gauge::default(),
        };
        let m = &metrics;
        registry.register("is_leader", "Whether this replica leads", m.leader.clone());
        registry.register("ready", "Whether this replica leads and serves agents", m.ready.clone());
        registry.register(
            "revision",
            "The newest revision published by this replica",
            m.revision.clone(),
        );
        registry.register("documents", "Documents by kind", m.documents.clone());
        registry.register("agents_connected", "Agents with a stream", m.agents.clone());
        let help = "Connected agents that do not hold the newest revision";
        registry.register("agents_behind", help, m.agents_behind.clone());
        registry.register("revisions", "Revisions published (pushes)", m.revisions.clone());
        let help = "From the last change to the published revision";
        registry.register_with_unit("compile_duration", help, Unit::Seconds, m.compile.clone());
        registry.register("watch_errors", "Watches that were interrupted", m.watch_errors.clone());
        registry.register(
            "unreadable_documents",
            "Objects that cannot be read",
            m.unreadable.clone(),
        );
        let help = "Pods that should be captured and are not, with a reason";
        registry.register("pods_not_captured", help, m.not_captured.clone());
        registry.register("status_writes", "Writes of objects' status", m.status_writes.clone());
        let help = "When the signing certificate expires, in seconds since 1970";
        registry.register("ca_expires_timestamp_seconds", help, m.ca_expires.clone());
        metrics.registry = registry;
        metrics
    }

    /// Whether this replica leads.
    pub fn leads(&self, leads: bool) {
        self.leader.set(leads.into());
    }

    /// Whether this replica serves agents.
    pub fn serves(&self, serves: bool) {
        self.ready.set(serves.into());
    }

    /// These kinds were not seen whole yet.
    pub fn unseen(&self, kinds: impl Iterator<Item = &'static str>) {
        *self.unseen.lock() = kinds.collect();
    }

    /// Whether this replica is well while another one leads.
    pub fn waits(&self, waits: bool) {
        self.waiting.store(waits, Ordering::Relaxed);
    }

    /// A watch was interrupted.
    pub fn watch_failed(&self, kind: &str) {
        let labels = ByKind { kind: kind.to_owned() };
        self.watch_errors.get_or_create(&labels).inc();
    }

    /// What there is.
    pub fn documents(&self, set: &DocumentSet) {
        let mut counts = Kind::ALL.map(|kind| (kind, 0));
        for document in set.iter() {
            if let Some((_, count)) = counts.iter_mut().find(|(kind, _)| *kind == document.kind()) {
                *count += 1;
            }
        }
        for (kind, count) in counts {
            let labels = ByKind {
                kind: kind.as_str().to_owned(),
            };
            self.documents.get_or_create(&labels).set(count);
        }
    }

    /// How many objects cannot be read.
    pub fn unreadable(&self, count: usize) {
        self.unreadable.set(count as i64);
    }

    /// A revision was published, this long after its compilation began.
    pub fn published(&self, revision: Revision, took: Duration) {
        self.revision.set(i64::try_from(revision.0).unwrap_or(i64::MAX));
        self.revisions.inc();
        self.compile.observe(took.as_secs_f64());
    }

    /// Connected agents, and those of them that do not hold the newest revision.
    pub fn agents(&self, connected: usize, behind: usize) {
        self.agents.set(connected as i64);
        self.agents_behind.set(behind as i64);
    }

    /// So many pods should be captured and are not.
    pub fn not_captured(&self, count: usize) {
        self.not_captured.set(count as i64);
    }

    /// A status was written, or could not be.
    pub fn status_written(&self, result: &'static str) {
        self.status_writes.get_or_create(&ByResult { result }).inc();
    }

    /// When the signing certificate expires.
    pub fn ca_expires(&self, unix: u64) {
        self.ca_expires.set(unix as i64);
    }

    fn text(&self) -> String {
        let mut text = String::new();
        if encode(&mut text, &self.registry).is_err() {
            let _ = writeln!(text, "# the metrics cannot be written");
        }
        text
    }

    fn answer(&self, path: &str) -> (StatusCode, &'static str, String) {
        let plain = "text/plain; charset=utf-8";
        match path {
            "/livez" => (StatusCode::OK, plain, "ok\n".into()),
            "/readyz" if self.ready.get() == 1 => (StatusCode::OK, plain, "ok: leading\n".into()),
            "/readyz" if self.leader.get() == 1 => (
                StatusCode::SERVICE_UNAVAILABLE,
                plain,
                "leading, not serving yet\n".into(),
            ),
            "/readyz" if self.waiting.load(Ordering::Relaxed) => (StatusCode::OK, plain, "ok: waiting\n".into()),
            "/readyz" => {
                let unseen = self.unseen.lock();
                let why = match unseen.is_empty() {
                    true => "another replica leads".to_owned(),
                    false => format!("not seen yet: {}", unseen.join(", ")),
                };
                (StatusCode::SERVICE_UNAVAILABLE, plain, format!("waiting: {why}\n"))
            }
            "/metrics" => {
                let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                (StatusCode::OK, kind, self.text())
            }
            _ => (
                StatusCode::NOT_FOUND,
                plain,
                "expected /livez, /readyz or /metrics\n".into(),
            ),
        }
    }
}

/// Serves until told to stop.
pub async fn serve(listener: TcpListener, metrics: Arc<Metrics>, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            accepted = accepted => accepted,
            () = stop.cancelled() => return,
        };
        let (Ok(place), Ok((tcp, _))) = (place, accepted) else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let (metrics, stop) = (metrics.clone(), stop.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let (status, kind, text) = metrics.answer(request.uri().path());
                let mut response = Response::new(Full::new(Bytes::from(text)));
                *response.status_mut() = status;
                let kind = hyper::header::HeaderValue::from_static(kind);
                response.headers_mut().insert(hyper::header::CONTENT_TYPE, kind);
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .serve_connection(TokioIo::new(tcp), service);
            tokio::select! {
                _ = tokio::time::timeout(CONNECTION_LIFE, connection) => {}
                () = stop.cancelled() => {}
            }
            drop(place);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_that_serves_or_waits_is_ready() {
        let metrics = Metrics::new();
        let ready = || metrics.answer("/readyz").0;
        assert_eq!(ready(), StatusCode::SERVICE_UNAVAILABLE);
        metrics.leads(true);
        assert_eq!(ready(), StatusCode::SERVICE_UNAVAILABLE);
        metrics.serves(true);
        assert_eq!(ready(), StatusCode::OK);
        metrics.serves(false);
        metrics.waits(true);
        assert_eq!(ready(), StatusCode::SERVICE_UNAVAILABLE, "it leads and does not serve");
        metrics.leads(false);
        assert_eq!(ready(), StatusCode::OK, "it waits");
        assert_eq!(metrics.answer("/livez").0, StatusCode::OK);
        assert_eq!(metrics.answer("/secrets").0, StatusCode::NOT_FOUND);
    }

    #[test]
    fn what_is_counted_is_shown() {
        let metrics = Metrics::new();
        metrics.watch_failed("Pod");
        metrics.published(Revision(7), Duration::from_millis(3));
        metrics.status_written("ok");
        let text = metrics.text();
        for line in [
            "nodemesh_controller_is_leader 0",
            "nodemesh_controller_revision 7",
            "nodemesh_controller_revisions_total 1",
            "nodemesh_controller_watch_errors_total{kind=\"Pod\"} 1",
            "nodemesh_controller_compile_duration_seconds_count 1",
            "nodemesh_controller_status_writes_total{result=\"ok\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
