//! Reads and validates the specs of TCPRoute and TLSRoute, by the Gateway API's own rules and bounds.

use super::{
    HostMatch, L4RouteRule, TcpRoute, TlsRoute, check,
    http_route_reader::{BACKENDS_MAX, RULES_MAX, backend_ref, parents},
};
use crate::read::{Decode, Field, deserialize_by_decoding};

/// The most names of a TLSRoute, as the Gateway API has it.
const NAMES_MAX: usize = 1024;

impl Decode for TcpRoute {
    fn decode(field: &Field) -> Option<TcpRoute> {
        let mut fields = field.fields()?;
        fields.later(&["useDefaultGateways"]);
        let parent_refs = fields
            .need("parentRefs", "at least one parent")
            .and_then(|f| parents(&f));
        let rules = fields.need("rules", "at least one rule").and_then(|f| rules(&f));
        fields.finish();
        Some(TcpRoute {
            parent_refs: parent_refs?,
            rules: rules?,
        })
    }
}

deserialize_by_decoding!(TcpRoute);

impl Decode for TlsRoute {
    fn decode(field: &Field) -> Option<TlsRoute> {
        let mut fields = field.fields()?;
        fields.later(&["useDefaultGateways"]);
        let parent_refs = fields
            .need("parentRefs", "at least one parent")
            .and_then(|f| parents(&f));
        let hostnames = fields.list("hostnames", NAMES_MAX, server_name);
        let rules = fields.need("rules", "at least one rule").and_then(|f| rules(&f));
        fields.finish();
        Some(TlsRoute {
            parent_refs: parent_refs?,
            hostnames: hostnames?,
            rules: rules?,
        })
    }
}

deserialize_by_decoding!(TlsRoute);

/// A name that a ClientHello may ask for: never an address (RFC 6066 §3).
fn server_name(field: &Field) -> Option<HostMatch> {
    let host = check::host_match(field)?;
    if let HostMatch::Exact(name) = &host
        && name.parse::<std::net::IpAddr>().is_ok()
    {
        field.refuse("is an address", "a DNS name, or *. and a DNS name");
        return None;
    }
    Some(host)
}

fn rules(field: &Field) -> Option<Vec<L4RouteRule>> {
    let items = field.items(RULES_MAX)?;
    if items.is_empty() {
        field.refuse("is empty", "at least one rule");
        return None;
    }
    let rules: Vec<Option<L4RouteRule>> = items.iter().map(rule).collect();
    check::unique(
        &items,
        rules.iter().map(|r| r.as_ref().and_then(|r| r.name.as_deref())),
        "name",
    );
    rules.into_iter().collect()
}

fn rule(field: &Field) -> Option<L4RouteRule> {
    let mut fields = field.fields()?;
    let name = fields.read("name", check::rule_name);
    let backends = fields.need("backendRefs", "at least one backend").and_then(|field| {
        let backends = field.list(BACKENDS_MAX, |f| backend_ref(f, false))?;
        if backends.is_empty() {
            field.refuse("is empty", "at least one backend");
            return None;
        }
        Some(backends)
    });
    fields.finish();
    Some(L4RouteRule {
        name: name?,
        backend_refs: backends?,
    })
}
