//! One structured line per request and per opaque connection.
//!
//! A closing record formats its line on its own thread into one bounded buffer; a writer thread takes the whole buffer
//! at once. The path never waits for the file: when the buffer is full the line is dropped and counted. Field names are
//! OpenTelemetry's where it has one, else `nodemesh.*`; numbers stay numbers.

use std::{
    cell::RefCell,
    fmt,
    fs::{File, OpenOptions},
    io::{self, Write},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};

use super::{line, record::Closed};

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
            static LINE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        LINE.with_borrow_mut(|text| {
            text.clear();
            line::write(text, self.format, closed, &self.node);
            text.push(b'\n');
            self.shared.push(text);
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
        self.counters.taken.fetch_add(1, Relaxed);
        if first && waiting.idle {
            self.wake.notify_one();
        }
    }

    fn write_all(&self, out: &mut dyn Write) {
        let (mut batch, mut cut) = (Vec::new(), Vec::new());
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
            drop(waiting);
            let lost = write_lines(out, &mut cut, &batch);
            self.counters.dropped.fetch_add(lost, Relaxed);
            batch.clear();
            waiting = self.waiting.lock();
        }
    }
}

/// Writes as many of the lines as there is room for, and returns how many were lost. What is left of a line that was cut
/// is kept, and goes first the next time: a disk that was full leaves no broken line.
fn write_lines(out: &mut dyn Write, cut: &mut Vec<u8>, lines: &[u8]) -> u64 {
    let done = write_most(out, cut);
    cut.drain(..done);
    let written = if cut.is_empty() { write_most(out, lines) } else { 0 };
    let (written, mut missing) = lines.split_at(written);
    if written.last().is_some_and(|last| *last != b'\n') {
        let end = missing
            .iter()
            .position(|byte| *byte == b'\n')
            .map_or(missing.len(), |end| end + 1);
        let (rest, others) = missing.split_at(end);
        cut.extend_from_slice(rest);
        missing = others;
    }
    missing.iter().map(|byte| u64::from(*byte == b'\n')).sum()
}

/// Returns how many of the bytes were written before something went wrong.
fn write_most(out: &mut dyn Write, bytes: &[u8]) -> usize {
    let mut written = 0;
    while let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) {
        match out.write(rest) {
            Ok(0) => break,
            Ok(count) => written += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    // What it kept for itself, it lost by itself.
    let _ = out.flush();
    written.min(bytes.len())
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Room for so many bytes.
    struct Disk(Vec<u8>, usize);

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let room = self.1.saturating_sub(self.0.len()).min(bytes.len());
            if room == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.0.extend_from_slice(&bytes[..room]);
            Ok(room)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_leaves_no_broken_line() {
        for room in 0..=24 {
            let (mut disk, mut cut) = (Disk(Vec::new(), room), Vec::new());
            let mut lost = write_lines(&mut disk, &mut cut, b"one\ntwo\nthree\n");
            lost += write_lines(&mut disk, &mut cut, b"four\n");
            disk.1 = usize::MAX;
            lost += write_lines(&mut disk, &mut cut, b"five\n");
            let text = String::from_utf8(disk.0).unwrap();
            let all = ["one", "two", "three", "four", "five"];
            assert!(
                text.lines().all(|line| all.contains(&line)),
                "room for {room}: {text:?}"
            );
            assert_eq!(
                text.lines().count() + lost as usize,
                all.len(),
                "room for {room}: {text:?}"
            );
        }
    }
}
