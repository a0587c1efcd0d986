//! One structured line per request and per opaque connection.
//!
//! A closing record formats its line on its own thread into one bounded buffer; a writer thread takes the whole buffer
//! at once. The path never waits for the file: when the buffer is full the line is dropped and counted. Field names are
//! OpenTelemetry's where it has one, else `nodemesh.*`; numbers stay numbers.

use std::{
    cell::RefCell,
    fmt::{self, Write as _},
    fs::{File, OpenOptions},
    io::{self, Write},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

use parking_lot::{Condvar, Mutex};

use super::{
    labels::Reporter,
    record::{Closed, Details},
};

/// The bytes of lines that may wait for the writer.
pub const BUFFER_BYTES_MAX: usize = 4 << 20;
/// How long the writer gathers lines after the first one.
const GATHER: Duration = Duration::from_millis(20);
/// How long [`AccessLog::flush`] waits for a writer that does not come through.
const FLUSH_PATIENCE: Duration = Duration::from_secs(2);

/// The form of a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One JSON object.
    #[default]
    Json,
    /// `key=value` after time, kind and outcome.
    Text,
}

/// What became of the lines.
#[derive(Debug, Default)]
pub struct LogCounters {
    taken: AtomicU64,
    dropped: AtomicU64,
}

impl LogCounters {
    /// Lines that were put into the buffer.
    pub fn taken(&self) -> u64 {
        self.taken.load(Relaxed)
    }
    /// Lines that were lost.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Relaxed)
    }
}

#[derive(Default)]
struct Waiting {
    bytes: Vec<u8>,
    lines: u64,
    /// The writer has taken everything and waits.
    idle: bool,
    stop: bool,
    hurry: bool,
}

struct Shared {
    waiting: Mutex<Waiting>,
    wake: Condvar,
    drained: Condvar,
    counters: Arc<LogCounters>,
    bytes_max: usize,
}

/// The access log and its writer thread. Dropping it writes what waits and joins the thread.
pub struct AccessLog {
    shared: Arc<Shared>,
    format: LogFormat,
    node: Arc<str>,
    writer: Option<JoinHandle<()>>,
}

impl AccessLog {
    /// Appends to a file, or writes to standard output.
    pub fn open(path: Option<&Path>, format: LogFormat, node: &str) -> io::Result<AccessLog> {
        match path {
            Some(path) => {
                let file: File = OpenOptions::new().create(true).append(true).open(path)?;
                AccessLog::to(Box::new(file), format, node, BUFFER_BYTES_MAX)
            }
            None => AccessLog::to(Box::new(io::stdout()), format, node, BUFFER_BYTES_MAX),
        }
    }

    /// Writes to anything, with a bound of its own on what may wait.
    pub fn to(
        mut out: Box<dyn Write + Send>,
        format: LogFormat,
        node: &str,
        bytes_max: usize,
    ) -> io::Result<AccessLog> {
        let shared = Arc::new(Shared {
            waiting: Mutex::default(),
            wake: Condvar::new(),
            drained: Condvar::new(),
            counters: Arc::default(),
            bytes_max,
        });
        let writer = std::thread::Builder::new().name("access-log".into()).spawn({
            let shared = shared.clone();
            move || shared.write_all(&mut *out)
        })?;
        Ok(AccessLog {
            shared,
            format,
            node: node.into(),
            writer: Some(writer),
        })
    }

    /// What became of the lines.
    pub fn counters(&self) -> Arc<LogCounters> {
        self.shared.counters.clone()
    }

    /// Returns when what was told so far is written, or after a bounded wait.
    pub fn flush(&self) {
        let mut waiting = self.shared.waiting.lock();
        waiting.hurry = true;
        self.shared.wake.notify_one();
        let deadline = Instant::now() + FLUSH_PATIENCE;
        while !(waiting.idle && waiting.bytes.is_empty()) {
            if self.shared.drained.wait_until(&mut waiting, deadline).timed_out() {
                return;
            }
        }
    }

    pub(super) fn write(&self, closed: &Closed) {
        thread_local! {
            static LINE: RefCell<String> = const { RefCell::new(String::new()) };
        }
        LINE.with_borrow_mut(|line| {
            line.clear();
            let mut fields = Fields {
                line,
                format: self.format,
                first: true,
            };
            // Writing to a String does not fail.
            let _ = fields.record(closed, &self.node);
            line.push('\n');
            self.shared.push(line.as_bytes());
        });
    }
}

impl Shared {
    fn push(&self, line: &[u8]) {
        let mut waiting = self.waiting.lock();
        if waiting.bytes.len() + line.len() > self.bytes_max {
            self.counters.dropped.fetch_add(1, Relaxed);
            return;
        }
        let first = waiting.bytes.is_empty();
        waiting.bytes.extend_from_slice(line);
        waiting.lines += 1;
        self.counters.taken.fetch_add(1, Relaxed);
        if first && waiting.idle {
            self.wake.notify_one();
        }
    }

    fn write_all(&self, out: &mut dyn Write) {
        let mut batch = Vec::new();
        let mut waiting = self.waiting.lock();
        loop {
            while waiting.bytes.is_empty() {
                waiting.idle = true;
                waiting.hurry = false;
                self.drained.notify_all();
                if waiting.stop {
                    return;
                }
                self.wake.wait(&mut waiting);
            }
            waiting.idle = false;
            if !waiting.stop && !waiting.hurry {
                // Gathers what follows the first line, unless somebody wants it now.
                let deadline = Instant::now() + GATHER;
                while !waiting.stop && !waiting.hurry {
                    if self.wake.wait_until(&mut waiting, deadline).timed_out() {
                        break;
                    }
                }
            }
            std::mem::swap(&mut batch, &mut waiting.bytes);
            let lines = std::mem::take(&mut waiting.lines);
            drop(waiting);
            if out.write_all(&batch).and_then(|()| out.flush()).is_err() {
                self.counters.dropped.fetch_add(lines, Relaxed);
            }
            batch.clear();
            waiting = self.waiting.lock();
        }
    }
}

impl Drop for AccessLog {
    fn drop(&mut self) {
        self.shared.waiting.lock().stop = true;
        self.shared.wake.notify_all();
        if let Some(writer) = self.writer.take() {
            // A writer that panicked has lost its lines; there is nobody left to tell.
            let _ = writer.join();
        }
    }
}

impl fmt::Debug for AccessLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AccessLog")
            .field("format", &self.format)
            .finish_non_exhaustive()
    }
}

/// Writes the fields of one line.
struct Fields<'a> {
    line: &'a mut String,
    format: LogFormat,
    first: bool,
}

impl Fields<'_> {
    fn key(&mut self, key: &str) {
        match (self.format, std::mem::replace(&mut self.first, false)) {
            (LogFormat::Json, true) => self.line.push('{'),
            (LogFormat::Json, false) => self.line.push(','),
            (LogFormat::Text, true) => {}
            (LogFormat::Text, false) => self.line.push(' '),
        }
        match self.format {
            LogFormat::Json => {
                self.line.push('"');
                self.line.push_str(key);
                self.line.push_str("\":");
            }
            LogFormat::Text => {
                self.line.push_str(key);
                self.line.push('=');
            }
        }
    }

    /// A text; an empty one is left out.
    fn text(&mut self, key: &str, value: &str) {
        if value.is_empty() {
            return;
        }
        self.key(key);
        let bare = self.format == LogFormat::Text && value.bytes().all(|b| b.is_ascii_graphic() && b != b'"');
        if bare {
            self.line.push_str(value);
        } else {
            quote(self.line, value);
        }
    }

    fn number(&mut self, key: &str, value: impl fmt::Display) -> fmt::Result {
        self.key(key);
        write!(self.line, "{value}")
    }

    fn record(&mut self, closed: &Closed, node: &str) -> fmt::Result {
        let common = closed.common;
        let parties = common.parties.parties();
        let default = Details::default();
        let details = common.details.as_deref().unwrap_or(&default);

        let mut time = String::with_capacity(24);
        write_time(&mut time, closed.at)?;
        self.text("timestamp", &time);
        let kind = if closed.request.is_some() {
            "request"
        } else {
            "connection"
        };
        self.text("event.name", kind);
        self.text("nodemesh.outcome", closed.outcome.name());
        self.text("nodemesh.reporter", parties.reporter.name());
        self.text("nodemesh.node", node);
        self.text("nodemesh.connection.security", parties.security.name());
        self.text("nodemesh.response_flags", closed.outcome.response_flags());
        if let Some(refusal) = closed.outcome.refusal() {
            self.text("nodemesh.refusal", refusal.name());
            self.number("nodemesh.refusal_code", refusal.code())?;
        }
        self.text("error.message", &details.error);
        self.number("nodemesh.duration_ms", closed.duration.as_micros() as f64 / 1000.0)?;

        let (name, version) = common.protocol.network();
        self.text("network.protocol.name", name);
        self.text("network.protocol.version", version);
        if let Some(request) = &closed.request {
            self.text("http.request.method", &details.method);
            self.text("url.path", &details.path);
            self.text("server.address", &details.authority);
            self.number("http.response.status_code", request.status)?;
            if let Some(status) = request.grpc_status {
                self.number("rpc.grpc.status_code", status)?;
            }
            self.number("http.request.body.size", closed.received)?;
            self.number("http.response.body.size", closed.sent)?;
            self.number("nodemesh.attempts", request.attempts)?;
            if let Some(after) = details.head_after {
                self.number("nodemesh.response_head_ms", after.as_micros() as f64 / 1000.0)?;
            }
        } else {
            self.number("nodemesh.bytes_received", closed.received)?;
            self.number("nodemesh.bytes_sent", closed.sent)?;
        }

        for (address_key, port_key, address) in [
            ("source.address", "source.port", details.source),
            ("destination.address", "destination.port", details.destination),
            ("nodemesh.endpoint.address", "nodemesh.endpoint.port", details.endpoint),
        ] {
            if let Some(address) = address {
                self.key(address_key);
                match self.format {
                    LogFormat::Json => write!(self.line, "\"{}\"", address.ip())?,
                    LogFormat::Text => write!(self.line, "{}", address.ip())?,
                }
                self.number(port_key, address.port())?;
            }
        }
        for (side, labels, pod) in [
            (Reporter::Source, &parties.source, &details.source_workload),
            (
                Reporter::Destination,
                &parties.destination,
                &details.destination_workload,
            ),
        ] {
            let keys = match side {
                Reporter::Source => SOURCE_KEYS,
                Reporter::Destination => DESTINATION_KEYS,
            };
            self.text(keys[0], &labels.workload);
            self.text(keys[1], &labels.namespace);
            self.text(keys[2], labels.principal.as_ref().map_or("", |p| p.as_str()));
            self.text(keys[3], &labels.version);
            if let Some(pod) = pod {
                self.text(keys[4], &pod.name.name);
            }
        }
        if let Some(service) = &parties.service {
            self.text("nodemesh.destination.service", &service.host);
        }
        self.text("nodemesh.rule", common.rule.as_ref().map_or("", |r| r.as_str()));
        self.text("nodemesh.route", common.route.as_ref().map_or("", |r| r.as_str()));
        if let Some(revision) = common.revision {
            self.number("nodemesh.revision", revision.0)?;
        }
        self.text("trace_id", &details.trace_id);
        self.text("http.request.header.x-request-id", &details.request_id);
        if details.connection != 0 {
            self.number("nodemesh.connection_id", details.connection)?;
        }
        if self.format == LogFormat::Json {
            self.line.push('}');
        }
        Ok(())
    }
}

const SOURCE_KEYS: [&str; 5] = [
    "nodemesh.source.workload",
    "nodemesh.source.namespace",
    "nodemesh.source.identity",
    "nodemesh.source.version",
    "nodemesh.source.pod",
];
const DESTINATION_KEYS: [&str; 5] = [
    "nodemesh.destination.workload",
    "nodemesh.destination.namespace",
    "nodemesh.destination.identity",
    "nodemesh.destination.version",
    "nodemesh.destination.pod",
];

/// A JSON string. Text from peers comes through here: no control byte may reach the line as it is.
fn quote(line: &mut String, text: &str) {
    line.push('"');
    // Nearly every text is plain ASCII and goes in one piece.
    if text
        .bytes()
        .all(|b| (b' '..=b'~').contains(&b) && b != b'"' && b != b'\\')
    {
        line.push_str(text);
        line.push('"');
        return;
    }
    for c in text.chars() {
        match c {
            '"' => line.push_str("\\\""),
            '\\' => line.push_str("\\\\"),
            '\n' => line.push_str("\\n"),
            '\r' => line.push_str("\\r"),
            '\t' => line.push_str("\\t"),
            c if c.is_control() || c == '\u{2028}' || c == '\u{2029}' => {
                let mut units = [0u16; 2];
                for unit in c.encode_utf16(&mut units) {
                    // Writing to a String does not fail.
                    let _ = write!(line, "\\u{unit:04x}");
                }
            }
            c => line.push(c),
        }
    }
    line.push('"');
}

/// RFC 3339 in UTC with milliseconds.
pub(super) fn write_time(out: &mut impl fmt::Write, time: SystemTime) -> fmt::Result {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (seconds, millis) = (since.as_secs(), since.subsec_millis());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days to a civil date, counted from 1 March of year 0 in eras of 400 years.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    write!(
        out,
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{millis:03}Z",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}
