//! The record of one connection and of one request: opened when it appears, closed exactly once.
//!
//! A record collects what the stages learn and tells it when it closes. Dropping it open is a close too, as
//! [`Outcome::Cancelled`], so that no task can vanish uncounted. What only a log line would show is copied only when
//! lines are written. A record must never influence what happens to the traffic.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant, SystemTime},
};

use mesh_api::{
    request::Request,
    rule::RuleId,
    workload::{Revision, Workload},
};

use super::{
    Events, Outcome,
    labels::{PartySet, Protocol},
    metrics::RequestVariant,
    now,
};

/// The longest text from a message that a line shows; the rest is cut.
const TEXT_BYTES_MAX: usize = 1024;

/// What only the log line shows.
#[derive(Clone, Debug, Default)]
pub(super) struct Details {
    pub(super) connection: u64,
    pub(super) source: Option<SocketAddr>,
    pub(super) destination: Option<SocketAddr>,
    pub(super) endpoint: Option<SocketAddr>,
    pub(super) source_workload: Option<Arc<Workload>>,
    pub(super) destination_workload: Option<Arc<Workload>>,
    pub(super) head_after: Option<Duration>,
    /// All texts in one piece of memory, and where each of them lies.
    texts: String,
    places: [(u32, u32); Text::COUNT],
}

/// The texts of [`Details`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Text {
    Method,
    Path,
    Authority,
    RequestId,
    TraceId,
    Error,
}

impl Text {
    const COUNT: usize = 6;
}

/// What the texts of a usual request take together.
const TEXTS_BYTES: usize = 192;

impl Details {
    /// The text, empty if it was not told.
    pub(super) fn text(&self, which: Text) -> &str {
        let place = self.places.get(which as usize).copied().unwrap_or_default();
        self.texts.get(place.0 as usize..place.1 as usize).unwrap_or_default()
    }

    /// Keeps a text, cut to what a line shows. One that is told again takes the place of the first.
    fn set_text(&mut self, which: Text, text: &str) {
        let text = text.get(..text.floor_char_boundary(TEXT_BYTES_MAX)).unwrap_or_default();
        if self.texts.capacity() == 0 && !text.is_empty() {
            self.texts.reserve(TEXTS_BYTES);
        }
        let from = self.texts.len();
        self.texts.push_str(text);
        if let (Some(place), Ok(from), Ok(to)) = (
            self.places.get_mut(which as usize),
            u32::try_from(from),
            u32::try_from(self.texts.len()),
        ) {
            *place = (from, to);
        }
    }
}

/// What both kinds of record hold.
#[derive(Debug)]
pub(super) struct Common {
    pub(super) events: Arc<Events>,
    pub(super) parties: Arc<PartySet>,
    pub(super) protocol: Protocol,
    pub(super) opened: Instant,
    pub(super) rule: Option<RuleId>,
    pub(super) route: Option<RuleId>,
    pub(super) revision: Option<Revision>,
    pub(super) details: Option<Box<Details>>,
    closed: bool,
}

/// A closed record as the log line takes it.
pub(super) struct Closed<'a> {
    pub(super) common: &'a Common,
    pub(super) outcome: Outcome,
    pub(super) duration: Duration,
    pub(super) at: SystemTime,
    /// Bytes from the source.
    pub(super) received: u64,
    /// Bytes to the source.
    pub(super) sent: u64,
    pub(super) request: Option<ClosedRequest>,
}

pub(super) struct ClosedRequest {
    pub(super) status: u16,
    pub(super) grpc_status: Option<u32>,
    pub(super) attempts: u32,
}

/// One connection of a workload. For HTTP it carries requests, which have records of their own.
#[derive(Debug)]
pub struct ConnRecord {
    common: Common,
    sent: u64,
    received: u64,
    told: (u64, u64),
}

/// One HTTP request.
#[derive(Debug)]
pub struct RequestRecord {
    common: Common,
    status: u16,
    grpc_status: Option<u32>,
    sent: u64,
    received: u64,
    attempts: u32,
}

impl Common {
    fn open(events: Arc<Events>, parties: Arc<PartySet>, protocol: Protocol) -> Common {
        let details = events.logs_access().then(Box::<Details>::default);
        Common {
            events,
            parties,
            protocol,
            opened: now(),
            rule: None,
            route: None,
            revision: None,
            details,
            closed: false,
        }
    }

    /// The duration and the time since the epoch, or `None` if the record closed before.
    fn close(&mut self) -> Option<(Duration, Duration)> {
        if std::mem::replace(&mut self.closed, true) {
            return None;
        }
        let end = now();
        Some((
            end.saturating_duration_since(self.opened),
            end.saturating_duration_since(self.events.epoch),
        ))
    }
}

/// The setters that both kinds of record share.
macro_rules! shared_setters {
    () => {
        /// Who took part, once more of it is known.
        pub fn set_parties(&mut self, parties: Arc<PartySet>) {
            self.common.parties = parties;
        }

        /// Who took part, as known so far.
        pub fn parties(&self) -> &Arc<PartySet> {
            &self.common.parties
        }

        /// What is spoken, once known.
        pub fn set_protocol(&mut self, protocol: Protocol) {
            self.common.protocol = protocol;
        }

        /// The access rule that decided, and the revision that it stood in.
        pub fn set_rule(&mut self, rule: RuleId, revision: Revision) {
            self.common.rule = Some(rule);
            self.common.revision = Some(revision);
        }

        /// The revision of the view that decided.
        pub fn set_revision(&mut self, revision: Revision) {
            self.common.revision = Some(revision);
        }

        /// The source's address and the address that it asked for.
        pub fn set_addresses(&mut self, source: SocketAddr, destination: SocketAddr) {
            if let Some(details) = &mut self.common.details {
                details.source = Some(source);
                details.destination = Some(destination);
            }
        }

        /// The rule of the route that took it.
        pub fn set_route(&mut self, route: RuleId) {
            self.common.route = Some(route);
        }

        /// Where it was sent.
        pub fn set_endpoint(&mut self, endpoint: SocketAddr) {
            if let Some(details) = &mut self.common.details {
                details.endpoint = Some(endpoint);
            }
        }

        /// The pods themselves; series carry only their roles.
        pub fn set_workloads(&mut self, source: Option<&Arc<Workload>>, destination: Option<&Arc<Workload>>) {
            if let Some(details) = &mut self.common.details {
                details.source_workload = source.cloned();
                details.destination_workload = destination.cloned();
            }
        }

        /// What the system or the peer said about a failure.
        pub fn set_error(&mut self, error: &dyn std::fmt::Display) {
            if let Some(details) = &mut self.common.details {
                details.set_text(Text::Error, &error.to_string());
            }
        }

        /// When it was opened.
        pub fn opened(&self) -> Instant {
            self.common.opened
        }
    };
}

impl ConnRecord {
    pub(super) fn open(events: Arc<Events>, parties: Arc<PartySet>, protocol: Protocol) -> ConnRecord {
        events.agent.connections_open.fetch_add(1, Relaxed);
        let mut common = Common::open(events, parties, protocol);
        if let Some(details) = &mut common.details {
            details.connection = common.events.connection_id();
        }
        ConnRecord {
            common,
            sent: 0,
            received: 0,
            told: (0, 0),
        }
    }

    shared_setters!();

    /// How long the connection had lasted when it was opened here, for one that is told of afterwards.
    pub fn set_lasted(&mut self, lasted: Duration) {
        if let Some(opened) = self.common.opened.checked_sub(lasted) {
            self.common.opened = opened;
        }
    }

    /// The number of this connection in lines, for its requests; 0 when no lines are written.
    pub fn id(&self) -> u64 {
        self.common.details.as_ref().map_or(0, |d| d.connection)
    }

    /// The bytes so far, both counted from the opening: to the source, from the source. Moves the counters, so that a
    /// long transfer is seen before its end.
    pub fn set_bytes(&mut self, sent: u64, received: u64) {
        self.sent = sent;
        self.received = received;
    }

    /// Tells the bytes so far to the counters. For long connections, every few seconds.
    pub fn progress(&mut self) {
        if self.counts_as_tcp() {
            let (sent, received) = self.untold();
            let events = &self.common.events;
            events
                .table
                .connection_moved(&self.common.parties, sent, received, events.since_epoch());
            self.told = (self.sent, self.received);
        }
    }

    /// Marks the connection as open in the metrics. Called once its parties are final and it is known to be opaque.
    /// Connections that carry HTTP are counted by their requests alone, as in Istio.
    pub fn established(&mut self) {
        if self.counts_as_tcp() {
            let events = &self.common.events;
            events
                .table
                .connection_opened(&self.common.parties, events.since_epoch());
        }
    }

    /// Closes the record.
    pub fn close(mut self, outcome: Outcome) {
        self.finish(outcome);
    }

    fn counts_as_tcp(&self) -> bool {
        matches!(self.common.protocol, Protocol::Tcp | Protocol::Tls)
    }

    fn untold(&self) -> (u64, u64) {
        (
            self.sent.saturating_sub(self.told.0),
            self.received.saturating_sub(self.told.1),
        )
    }

    fn finish(&mut self, outcome: Outcome) {
        let Some((duration, at)) = self.common.close() else {
            return;
        };
        let events = &self.common.events;
        events.agent.count_closed(false, outcome);
        if self.counts_as_tcp() {
            let (sent, received) = self.untold();
            events
                .table
                .connection_closed(&self.common.parties, outcome.response_flags(), sent, received, at);
        }
        // A connection that carried HTTP is silent unless it failed: its requests have told everything.
        let told_by_requests = !self.counts_as_tcp() && matches!(outcome, Outcome::Served | Outcome::Drained);
        if let Some(log) = &events.access_log
            && !told_by_requests
        {
            log.write(&Closed {
                common: &self.common,
                outcome,
                duration,
                at: SystemTime::now(),
                received: self.received,
                sent: self.sent,
                request: None,
            });
        }
    }
}

impl Drop for ConnRecord {
    fn drop(&mut self) {
        self.finish(Outcome::Cancelled);
    }
}

impl RequestRecord {
    pub(super) fn open(events: Arc<Events>, parties: Arc<PartySet>, protocol: Protocol) -> RequestRecord {
        events.agent.requests_open.fetch_add(1, Relaxed);
        RequestRecord {
            common: Common::open(events, parties, protocol),
            status: 0,
            grpc_status: None,
            sent: 0,
            received: 0,
            attempts: 0,
        }
    }

    /// A record of the same request by other parties, opened now: what the destination's side tells of one attempt
    /// where it is on the source's node.
    pub fn beside(&self, parties: Arc<PartySet>) -> RequestRecord {
        let mut beside = RequestRecord::open(self.common.events.clone(), parties, self.common.protocol);
        beside.common.revision = self.common.revision;
        beside.common.details = self.common.details.clone();
        beside
    }

    shared_setters!();

    /// The number of the connection that the request came on.
    pub fn set_connection(&mut self, id: u64) {
        if let Some(details) = &mut self.common.details {
            details.connection = id;
        }
    }

    /// What the line shows of the head.
    pub fn set_head(&mut self, request: &dyn Request) {
        if let Some(details) = &mut self.common.details {
            details.set_text(Text::Method, request.method());
            details.set_text(Text::Path, request.path());
            details.set_text(Text::Authority, request.authority().unwrap_or_default());
        }
    }

    /// The ids that join this line with others.
    pub fn set_trace(&mut self, request_id: &str, trace_id: &str) {
        if let Some(details) = &mut self.common.details {
            details.set_text(Text::RequestId, request_id);
            details.set_text(Text::TraceId, trace_id);
        }
    }

    /// Counts an attempt at an endpoint.
    pub fn attempt(&mut self) {
        self.attempts += 1;
    }

    /// The status that the source was sent.
    pub fn set_status(&mut self, status: u16) {
        self.status = status;
        if let Some(details) = &mut self.common.details
            && details.head_after.is_none()
        {
            details.head_after = Some(now().saturating_duration_since(self.common.opened));
        }
    }

    /// `grpc-status` of the response.
    pub fn set_grpc_status(&mut self, status: u32) {
        self.grpc_status = Some(status);
    }

    /// Body bytes: of the response sent to the source, of the request received from it.
    pub fn set_bytes(&mut self, sent: u64, received: u64) {
        self.sent = sent;
        self.received = received;
    }

    /// Closes the record.
    pub fn close(mut self, outcome: Outcome) {
        self.finish(outcome);
    }

    fn finish(&mut self, outcome: Outcome) {
        let Some((duration, at)) = self.common.close() else {
            return;
        };
        if self.status == 0
            && let Some(status) = outcome.refusal().and_then(|refusal| refusal.http_status())
        {
            self.status = status.as_u16();
        }
        let events = &self.common.events;
        events.agent.count_closed(true, outcome);
        let variant = RequestVariant {
            protocol: self.common.protocol,
            code: self.status,
            flags: outcome.response_flags(),
            grpc: self.grpc_status,
        };
        events
            .table
            .request_closed(&self.common.parties, variant, duration, (self.received, self.sent), at);
        if let Some(log) = &events.access_log {
            log.write(&Closed {
                common: &self.common,
                outcome,
                duration,
                at: SystemTime::now(),
                received: self.received,
                sent: self.sent,
                request: Some(ClosedRequest {
                    status: self.status,
                    grpc_status: self.grpc_status,
                    attempts: self.attempts,
                }),
            });
        }
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        self.finish(Outcome::Cancelled);
    }
}
