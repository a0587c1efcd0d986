//! The text of one access log line.
//!
//! A line has some forty fields and is written for every request, so this is code that runs hot: keys come with their
//! punctuation, numbers and addresses are written by hand, what a line says of its parties is written once per pair and
//! thread, and nothing but the line's own buffer grows. Text from peers is always checked: no control byte may reach the
//! line as it is.

use std::{
    cell::RefCell,
    sync::{Arc, LazyLock, Weak},
    time::{Duration, SystemTime},
};

use mesh_api::workload::Workload;

use super::{
    access_log::LogFormat,
    labels::{PartySet, Reporter},
    record::{Closed, Details, Text},
};
use crate::digits::{self, decimal, padded};

/// Pairs of parties whose text a thread keeps; two that meet in one place push each other out.
const PARTY_TEXTS: usize = 64;

/// A field's name as it stands in a line, with what separates it from the field before.
#[derive(Clone, Copy)]
struct Key {
    json: &'static str,
    text: &'static str,
}

macro_rules! key {
    ($name:literal) => {
        Key {
            json: concat!(",\"", $name, "\":"),
            text: concat!(" ", $name, "="),
        }
    };
}

const SOURCE_KEYS: [Key; 5] = [
    key!("nodemesh.source.workload"),
    key!("nodemesh.source.namespace"),
    key!("nodemesh.source.identity"),
    key!("nodemesh.source.version"),
    key!("nodemesh.source.pod"),
];
const DESTINATION_KEYS: [Key; 5] = [
    key!("nodemesh.destination.workload"),
    key!("nodemesh.destination.namespace"),
    key!("nodemesh.destination.identity"),
    key!("nodemesh.destination.version"),
    key!("nodemesh.destination.pod"),
];

/// Writes one line, without its end.
pub(super) fn write(line: &mut Vec<u8>, format: LogFormat, closed: &Closed, node: &str) {
    Fields { line, format }.record(closed, node);
}

struct Fields<'a> {
    line: &'a mut Vec<u8>,
    format: LogFormat,
}

impl Fields<'_> {
    fn raw(&mut self, text: &str) {
        self.line.extend_from_slice(text.as_bytes());
    }

    fn key(&mut self, key: Key) {
        self.raw(match self.format {
            LogFormat::Json => key.json,
            LogFormat::Text => key.text,
        });
    }

    /// A word of ours, which needs no check; an empty one is left out.
    fn word(&mut self, key: Key, value: &'static str) {
        if value.is_empty() {
            return;
        }
        self.key(key);
        self.bare(|line| line.extend_from_slice(value.as_bytes()));
    }

    /// Something that is written without quotes in a text line.
    fn bare(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let quoted = self.format == LogFormat::Json;
        if quoted {
            self.line.push(b'"');
        }
        write(self.line);
        if quoted {
            self.line.push(b'"');
        }
    }

    /// A text; an empty one is left out.
    fn text(&mut self, key: Key, value: &str) {
        if value.is_empty() {
            return;
        }
        self.key(key);
        let bare = self.format == LogFormat::Text && value.bytes().all(|b| b.is_ascii_graphic() && b != b'"');
        if bare {
            self.raw(value);
        } else {
            quote(self.line, value);
        }
    }

    fn number(&mut self, key: Key, value: u64) {
        self.key(key);
        decimal(self.line, value);
    }

    /// A duration in milliseconds with as many of three decimals as it needs.
    fn millis(&mut self, key: Key, value: Duration) {
        self.key(key);
        let micros = u64::try_from(value.as_micros()).unwrap_or(u64::MAX);
        decimal(self.line, micros / 1000);
        let mut rest = micros % 1000;
        if rest > 0 {
            let mut width = 3;
            while rest.is_multiple_of(10) {
                rest /= 10;
                width -= 1;
            }
            self.line.push(b'.');
            padded(self.line, rest, width);
        }
    }

    fn record(&mut self, closed: &Closed, node: &str) {
        static NO_DETAILS: LazyLock<Details> = LazyLock::new(Details::default);
        let common = closed.common;
        let parties = common.parties.parties();
        let details = common.details.as_deref().unwrap_or(&NO_DETAILS);

        self.raw(match self.format {
            LogFormat::Json => "{\"timestamp\":",
            LogFormat::Text => "timestamp=",
        });
        self.bare(|line| write_time(line, closed.at));
        let kind = if closed.request.is_some() {
            "request"
        } else {
            "connection"
        };
        self.word(key!("event.name"), kind);
        self.word(key!("nodemesh.outcome"), closed.outcome.name());
        self.word(key!("nodemesh.reporter"), parties.reporter.name());
        self.text(key!("nodemesh.node"), node);
        self.word(key!("nodemesh.connection.security"), parties.security.name());
        self.word(key!("nodemesh.response_flags"), closed.outcome.response_flags());
        if let Some(refusal) = closed.outcome.refusal() {
            self.word(key!("nodemesh.refusal"), refusal.name());
            self.number(key!("nodemesh.refusal_code"), refusal.code().into());
        }
        self.text(key!("error.message"), details.text(Text::Error));
        self.millis(key!("nodemesh.duration_ms"), closed.duration);

        let (name, version) = common.protocol.network();
        self.word(key!("network.protocol.name"), name);
        self.word(key!("network.protocol.version"), version);
        if let Some(request) = &closed.request {
            self.text(key!("http.request.method"), details.text(Text::Method));
            self.text(key!("url.path"), details.text(Text::Path));
            self.text(key!("server.address"), details.text(Text::Authority));
            self.number(key!("http.response.status_code"), request.status.into());
            if let Some(status) = request.grpc_status {
                self.number(key!("rpc.grpc.status_code"), status.into());
            }
            self.number(key!("http.request.body.size"), closed.received);
            self.number(key!("http.response.body.size"), closed.sent);
            self.number(key!("nodemesh.attempts"), request.attempts.into());
            if let Some(after) = details.head_after {
                self.millis(key!("nodemesh.response_head_ms"), after);
            }
        } else {
            self.number(key!("nodemesh.bytes_received"), closed.received);
            self.number(key!("nodemesh.bytes_sent"), closed.sent);
        }

        for (address_key, port_key, address) in [
            (key!("source.address"), key!("source.port"), details.source),
            (
                key!("destination.address"),
                key!("destination.port"),
                details.destination,
            ),
            (
                key!("nodemesh.endpoint.address"),
                key!("nodemesh.endpoint.port"),
                details.endpoint,
            ),
        ] {
            if let Some(address) = address {
                self.key(address_key);
                self.bare(|line| digits::ip(line, address.ip()));
                self.number(port_key, address.port().into());
            }
        }
        self.parties(&common.parties, details);
        self.text(key!("nodemesh.rule"), common.rule.as_ref().map_or("", |r| r.as_str()));
        self.text(key!("nodemesh.route"), common.route.as_ref().map_or("", |r| r.as_str()));
        if let Some(revision) = common.revision {
            self.number(key!("nodemesh.revision"), revision.0);
        }
        self.text(key!("trace_id"), details.text(Text::TraceId));
        self.text(key!("http.request.header.x-request-id"), details.text(Text::RequestId));
        if details.connection != 0 {
            self.number(key!("nodemesh.connection_id"), details.connection);
        }
        if self.format == LogFormat::Json {
            self.line.push(b'}');
        }
    }

    /// Who took part. The same two pods say the same each time, so a thread keeps what it wrote.
    fn parties(&mut self, set: &Arc<PartySet>, details: &Details) {
        thread_local! {
            static TEXTS: RefCell<Vec<Option<PartyText>>> = const { RefCell::new(Vec::new()) };
        }
        let (source, destination) = (&details.source_workload, &details.destination_workload);
        TEXTS.with_borrow_mut(|texts| {
            if texts.is_empty() {
                texts.resize_with(PARTY_TEXTS, || None);
            }
            let place = (Arc::as_ptr(set) as usize ^ (address(destination) >> 4)) / 64 % PARTY_TEXTS;
            let Some(place) = texts.get_mut(place) else { return };
            if let Some(known) = place
                .as_ref()
                .filter(|known| known.is(self.format, set, source, destination))
            {
                return self.line.extend_from_slice(&known.text);
            }
            let from = self.line.len();
            self.write_parties(set, details);
            *place = Some(PartyText {
                format: self.format,
                set: Arc::downgrade(set),
                source: source.as_ref().map(Arc::downgrade),
                destination: destination.as_ref().map(Arc::downgrade),
                text: self.line.get(from..).unwrap_or_default().into(),
            });
        });
    }

    fn write_parties(&mut self, set: &PartySet, details: &Details) {
        let parties = set.parties();
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
            self.text(key!("nodemesh.destination.service"), &service.host);
        }
    }
}

/// What lines say of two parties. The weak pointers keep the addresses from being given to something else.
struct PartyText {
    format: LogFormat,
    set: Weak<PartySet>,
    source: Option<Weak<Workload>>,
    destination: Option<Weak<Workload>>,
    text: Box<[u8]>,
}

impl PartyText {
    fn is(
        &self,
        format: LogFormat,
        set: &Arc<PartySet>,
        source: &Option<Arc<Workload>>,
        destination: &Option<Arc<Workload>>,
    ) -> bool {
        let pinned = |workload: &Option<Weak<Workload>>| workload.as_ref().map_or(0, |w| w.as_ptr() as usize);
        self.format == format
            && self.set.as_ptr() == Arc::as_ptr(set)
            && pinned(&self.source) == address(source)
            && pinned(&self.destination) == address(destination)
    }
}

fn address(workload: &Option<Arc<Workload>>) -> usize {
    workload.as_ref().map_or(0, |workload| Arc::as_ptr(workload) as usize)
}

/// Whether a JSON string may hold the bytes as they are: printable ASCII but quotes and backslashes.
fn is_plain(text: &[u8]) -> bool {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = 0x8080_8080_8080_8080;
    // A byte of the result has its high bit set if that byte of `word` is below `limit` (for bytes below 128).
    let below = |word: u64, limit: u64| word.wrapping_sub(ONES * limit) & !word & HIGH;
    let equal = |word: u64, byte: u64| below(word ^ (ONES * byte), 1);
    let (words, rest) = text.as_chunks::<8>();
    let mut odd = 0;
    for word in words {
        let word = u64::from_le_bytes(*word);
        odd |=
            word & HIGH | below(word, 0x20) | equal(word, 0x7f) | equal(word, b'"'.into()) | equal(word, b'\\'.into());
    }
    odd == 0
        && rest
            .iter()
            .all(|b| (b' '..=b'~').contains(b) && *b != b'"' && *b != b'\\')
}

/// A JSON string.
fn quote(line: &mut Vec<u8>, text: &str) {
    line.push(b'"');
    // Nearly every text is plain ASCII and goes in one piece.
    if is_plain(text.as_bytes()) {
        line.extend_from_slice(text.as_bytes());
        return line.push(b'"');
    }
    for c in text.chars() {
        match c {
            '"' => line.extend_from_slice(b"\\\""),
            '\\' => line.extend_from_slice(b"\\\\"),
            '\n' => line.extend_from_slice(b"\\n"),
            '\r' => line.extend_from_slice(b"\\r"),
            '\t' => line.extend_from_slice(b"\\t"),
            c if c.is_control() || c == '\u{2028}' || c == '\u{2029}' => {
                // All of these lie in the first plane: one unit.
                line.extend_from_slice(format!("\\u{:04x}", u32::from(c)).as_bytes());
            }
            c => line.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    line.push(b'"');
}

/// RFC 3339 in UTC with milliseconds. Lines of one second share all but the last four characters.
pub(super) fn write_time(out: &mut Vec<u8>, time: SystemTime) {
    thread_local! {
        static SECOND: RefCell<(u64, Vec<u8>)> = const { RefCell::new((u64::MAX, Vec::new())) };
    }
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SECOND.with_borrow_mut(|(second, text)| {
        if *second != since.as_secs() {
            *second = since.as_secs();
            text.clear();
            write_second(text, *second);
        }
        out.extend_from_slice(text);
    });
    out.push(b'.');
    padded(out, since.subsec_millis().into(), 3);
    out.push(b'Z');
}

fn write_second(out: &mut Vec<u8>, seconds: u64) {
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
    let text = format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}",
        second / 3600,
        second / 60 % 60,
        second % 60
    );
    out.extend_from_slice(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(write: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut line = Vec::new();
        write(&mut line);
        String::from_utf8(line).unwrap()
    }

    #[test]
    fn durations_are_written_as_the_standard_library_does() {
        for micros in [0, 1, 10, 100, 120, 999, 1000, 1500, 2_000_001, 12_345_670] {
            let mut line = Vec::new();
            let mut fields = Fields {
                line: &mut line,
                format: LogFormat::Text,
            };
            fields.millis(key!("x"), Duration::from_micros(micros));
            let expected = format!(" x={}", micros as f64 / 1000.0);
            assert_eq!(String::from_utf8(line).unwrap(), expected);
        }
    }

    #[test]
    fn every_byte_at_every_place_is_quoted_as_json_demands() {
        let odd: Vec<char> = (0..=0xff_u32)
            .filter_map(char::from_u32)
            .chain(['\u{2028}', '€', '😀'])
            .collect();
        for length in [0, 1, 7, 8, 9, 17] {
            for place in 0..=length {
                for c in &odd {
                    let text = format!("{}{c}{}", "a".repeat(place), "z".repeat(length - place));
                    let line = written(|line| quote(line, &text));
                    let read: String = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line}: {error}"));
                    assert_eq!(read, text);
                    assert!(!line.chars().any(char::is_control), "{line:?}");
                }
            }
        }
    }
}
