//! Matches of GRPCRoutes, and which of them takes a call.
//!
//! A call's path is `/<service>/<method>` (gRPC over HTTP/2). The precedence is the Gateway API's: the longer service,
//! the longer method, more headers; an exact name stands before a regular expression, which that specification leaves to
//! us. Rules that name their service are hashed by it; the others are tried in order.

use std::{cmp::Reverse, collections::HashMap, sync::Arc};

use super::{RouteAge, RouteRule};
use crate::{
    policy::{GrpcMethodMatch, GrpcRouteMatch, HeaderMatch},
    request::Request,
};

/// The matches of all rules for one kind of source, by precedence.
#[derive(Clone, Debug, Default)]
pub(super) struct GrpcSet {
    by_service: HashMap<String, Vec<Candidate>>,
    others: Vec<Candidate>,
}

#[derive(Clone, Debug)]
struct Candidate {
    wanted: GrpcRouteMatch,
    order: Order,
    rule: Arc<RouteRule>,
}

/// What ranks matches; less is earlier.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Order {
    service: Reverse<(bool, usize)>,
    method: Reverse<(bool, usize)>,
    headers: Reverse<usize>,
    age: RouteAge,
    rule_index: usize,
    match_index: usize,
}

impl GrpcSet {
    pub(super) fn new(entries: Vec<(RouteAge, usize, Vec<GrpcRouteMatch>, RouteRule)>) -> GrpcSet {
        let mut set = GrpcSet::default();
        for (age, rule_index, mut matches, rule) in entries {
            if matches.is_empty() {
                matches.push(GrpcRouteMatch::default());
            }
            let rule = Arc::new(rule);
            for (match_index, wanted) in matches.into_iter().enumerate() {
                let (service, method) = rank(wanted.method.as_ref());
                let order = Order {
                    service: Reverse(service),
                    method: Reverse(method),
                    headers: Reverse(wanted.headers.len()),
                    age: age.clone(),
                    rule_index,
                    match_index,
                };
                let list = match &wanted.method {
                    Some(GrpcMethodMatch::Exact {
                        service: Some(name), ..
                    }) => set.by_service.entry(name.clone()).or_default(),
                    _ => &mut set.others,
                };
                list.push(Candidate {
                    wanted,
                    order,
                    rule: rule.clone(),
                });
            }
        }
        for list in set.by_service.values_mut().chain([&mut set.others]) {
            list.sort_by(|a, b| a.order.cmp(&b.order));
        }
        set
    }

    pub(super) fn select(&self, request: &dyn Request) -> Option<&Arc<RouteRule>> {
        let call = Call::of(request.path());
        let named = call.as_ref().and_then(|call| self.by_service.get(call.service));
        named
            .into_iter()
            .flatten()
            .chain(&self.others)
            .find(|candidate| holds(&candidate.wanted, call.as_ref(), request))
            .map(|candidate| &candidate.rule)
    }
}

/// Whether exact, and how long.
fn rank(method: Option<&GrpcMethodMatch>) -> ((bool, usize), (bool, usize)) {
    match method {
        None => ((false, 0), (false, 0)),
        Some(GrpcMethodMatch::Exact { service, method }) => {
            let rank = |name: &Option<String>| name.as_ref().map_or((false, 0), |name| (true, name.len()));
            (rank(service), rank(method))
        }
        Some(GrpcMethodMatch::RegularExpression { service, method }) => {
            let rank = |pattern: &Option<crate::policy::RegexPattern>| {
                (false, pattern.as_ref().map_or(0, |pattern| pattern.as_str().len()))
            };
            (rank(service), rank(method))
        }
    }
}

/// What a path calls.
struct Call<'a> {
    service: &'a str,
    method: &'a str,
}

impl Call<'_> {
    fn of(path: &str) -> Option<Call<'_>> {
        let (service, method) = path.strip_prefix('/')?.rsplit_once('/')?;
        Some(Call { service, method })
    }
}

/// Whether the request has all of a match. The table's index and this always agree.
pub fn grpc_match_holds(wanted: &GrpcRouteMatch, request: &dyn Request) -> bool {
    holds(wanted, Call::of(request.path()).as_ref(), request)
}

fn holds(wanted: &GrpcRouteMatch, call: Option<&Call<'_>>, request: &dyn Request) -> bool {
    let called = match (&wanted.method, call) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(GrpcMethodMatch::Exact { service, method }), Some(call)) => {
            service.as_ref().is_none_or(|name| name == call.service)
                && method.as_ref().is_none_or(|name| name == call.method)
        }
        (Some(GrpcMethodMatch::RegularExpression { service, method }), Some(call)) => {
            service.as_ref().is_none_or(|pattern| pattern.matches(call.service))
                && method.as_ref().is_none_or(|pattern| pattern.matches(call.method))
        }
    };
    let has = |header: &HeaderMatch| {
        let value = request.header(&header.name);
        value.is_some_and(|value| header.value.matches(value))
    };
    called && wanted.headers.iter().all(has)
}

/// Whether the request is a call of gRPC: its content type says so.
pub fn is_grpc(request: &dyn Request) -> bool {
    let Some(value) = request.header("content-type") else {
        return false;
    };
    const TYPE: &str = "application/grpc";
    let starts = value
        .get(..TYPE.len())
        .is_some_and(|start| start.eq_ignore_ascii_case(TYPE));
    starts && matches!(value.as_bytes().get(TYPE.len()), None | Some(b'+' | b';' | b' '))
}
