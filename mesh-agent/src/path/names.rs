//! Who took part, for the record of a connection or request. The path tells; nothing here decides.

use std::{net::SocketAddr, sync::Arc};

use mesh_api::{
    identity::SpiffeId,
    request::Request,
    view::View,
    workload::{Service, Workload},
};

use crate::{
    digits::hex,
    event::{ConnRecord, ConnectionSecurity, Events, Outcome, PartySet, Protocol, Reporter, RequestRecord},
    l7::{
        End, Standard,
        headers::{ClientCert, TraceParent},
    },
    worker::Worker,
};

/// The two ends of a connection or request, as far as they are known.
#[derive(Clone, Copy, Debug)]
pub struct Ends<'a> {
    /// Whose record it is.
    pub reporter: Reporter,
    /// Whence.
    pub source: Option<&'a Arc<Workload>>,
    /// Whither.
    pub destination: Option<&'a Arc<Workload>>,
    /// The service that was asked for.
    pub service: Option<&'a Arc<Service>>,
    /// How it was protected.
    pub security: ConnectionSecurity,
}

impl Ends<'_> {
    /// Nothing known yet, told by the source's side.
    pub fn at_source() -> Ends<'static> {
        Ends {
            reporter: Reporter::Source,
            source: None,
            destination: None,
            service: None,
            security: ConnectionSecurity::Unknown,
        }
    }

    /// Nothing known yet, told by the destination's side.
    pub fn at_destination() -> Ends<'static> {
        Ends {
            reporter: Reporter::Destination,
            ..Ends::at_source()
        }
    }

    /// The labels; the calling thread knows those of the ends that it has seen lately.
    pub fn parties(&self, events: &Events) -> Arc<PartySet> {
        events.parties_of(
            self.reporter,
            self.source,
            self.destination,
            self.service,
            self.security,
        )
    }
}

/// Opens a connection's record.
pub fn connection(
    worker: &Worker,
    view: &View,
    ends: &Ends<'_>,
    source: SocketAddr,
    destination: SocketAddr,
) -> ConnRecord {
    let events = &worker.shared.events;
    let mut record = events.connection(ends.parties(events), Protocol::Tcp);
    record.set_revision(view.revision());
    record.set_addresses(source, destination);
    record.set_workloads(ends.source, ends.destination);
    record
}

/// Fills in what a request's head tells.
pub fn fill(
    record: &mut RequestRecord,
    view: &View,
    request: &dyn Request,
    source: SocketAddr,
    destination: SocketAddr,
) {
    record.set_revision(view.revision());
    record.set_addresses(source, destination);
    record.set_head(request);
}

/// The ids that join the lines of one request at both sides: those that it goes on with.
pub fn trace(record: &mut RequestRecord, request: &dyn Request, standard: &Standard) {
    let came = request.header("traceparent").and_then(TraceParent::parse);
    let trace = standard.trace.or(came).map(|context| hex::<32>(context.trace));
    let trace = trace.as_ref().and_then(|text| std::str::from_utf8(text).ok());
    let id = match &standard.request_id {
        Some(id) => id.as_str(),
        None => request.header("x-request-id").unwrap_or_default(),
    };
    record.set_trace(id, trace.unwrap_or_default());
}

/// Envoy's `x-forwarded-client-cert`: the workload that a request is for, and the identity that its source proved.
pub fn client_cert(destination: &SpiffeId, source: &SpiffeId) -> ClientCert {
    ClientCert::Set(format!("By={destination};URI={source}").into())
}

/// Closes a request's record with what the engine counted.
pub fn close(mut record: RequestRecord, end: &End, outcome: Outcome) {
    if let Some(status) = end.status {
        record.set_status(status.as_u16());
    }
    if let Some(status) = end.grpc_status {
        record.set_grpc_status(status);
    }
    record.set_bytes(end.response_bytes, end.request_bytes);
    record.close(outcome);
}
