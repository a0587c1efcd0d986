//! HTTPRoutes as tables, one per service port that has routes.

use std::{collections::HashMap, sync::Arc};

use super::{
    BackendKey,
    compile::{Backends, Named, Policies},
    settings::route_retry_settings,
};
use crate::{
    policy::{
        self, BackendKind, BackendRef, BackendTarget, HttpRoute, HttpRouteFilter, HttpRouteRule, ParentRef, UrlRewrite,
    },
    route::{
        BadBackend, HeaderEdit, PathModifier, RedirectSpec, Rewrite, RouteAction, RouteAge, RouteRule, RouteTable,
        TableEntry, WeightedBackend,
    },
    rule::RuleId,
    workload::{ObjectName, Service, ServicePort},
};

/// Tables by the key of the port's own backend.
pub(super) type Tables = HashMap<BackendKey, Arc<RouteTable>>;

#[derive(Default)]
struct Entries {
    producers: Vec<TableEntry>,
    consumers: HashMap<Arc<str>, Vec<TableEntry>>,
}

/// What rules of routes may name.
struct Known<'a> {
    services: HashMap<(&'a str, &'a str), &'a Arc<Service>>,
    /// The name of each subset's service.
    subsets: HashMap<(&'a str, &'a str), &'a str>,
    backends: &'a Backends,
}

pub(super) fn compile(policies: &Policies<'_>, services: &[Arc<Service>], backends: &Backends) -> Tables {
    let by_name = services
        .iter()
        .map(|service| ((&*service.name.namespace, &*service.name.name), service));
    let subsets = policies.subsets.iter();
    let known = Known {
        services: by_name.collect(),
        subsets: subsets
            .map(|s| ((&*s.name.namespace, &*s.name.name), s.spec.service.as_str()))
            .collect(),
        backends,
    };
    let mut entries: HashMap<BackendKey, Entries> = HashMap::new();
    for route in &policies.routes {
        let compiled = compile_route(route, &known);
        for (key, is_consumer) in attached_to(route, &known) {
            let table = entries.entry(key).or_default();
            let list = if is_consumer {
                table.consumers.entry(route.name.namespace.clone()).or_default()
            } else {
                &mut table.producers
            };
            list.extend_from_slice(&compiled);
        }
    }
    let build = |(key, entries): (BackendKey, Entries)| {
        let backend = backends.get(&key)?.clone();
        let unrouted = RouteRule::to_backend(RuleId::new(&format!("service/{}", key.service)), backend);
        Some((
            key,
            Arc::new(RouteTable::new(entries.producers, entries.consumers, unrouted)),
        ))
    };
    entries.into_iter().filter_map(build).collect()
}

/// The service ports that a route is attached to, each once, and whether it is a consumer route there.
fn attached_to(route: &Named<'_, HttpRoute>, known: &Known<'_>) -> Vec<(BackendKey, bool)> {
    let mut attached: Vec<(BackendKey, bool)> = Vec::new();
    for parent in route.spec.parent_refs.iter().filter(|parent| parent.is_service()) {
        let namespace = parent.namespace.as_deref().unwrap_or(&route.name.namespace);
        let Some(service) = known.services.get(&(namespace, parent.name.as_str())) else {
            continue;
        };
        for port in service.ports.iter().filter(|port| parent_means(parent, port)) {
            let key = BackendKey {
                service: service.name.clone(),
                port: port.port,
                subset: None,
            };
            if !attached.iter().any(|(other, _)| *other == key) {
                attached.push((key, *service.name.namespace != *route.name.namespace));
            }
        }
    }
    attached
}

fn parent_means(parent: &ParentRef, port: &ServicePort) -> bool {
    parent.port.is_none_or(|number| number == port.port)
        && parent.section_name.as_deref().is_none_or(|name| *port.name == *name)
}

fn compile_route(route: &Named<'_, HttpRoute>, known: &Known<'_>) -> Vec<TableEntry> {
    let compile_rule = |(rule_index, rule): (usize, &HttpRouteRule)| TableEntry {
        age: RouteAge {
            created: route.created,
            name: route.name.clone(),
        },
        rule_index,
        matches: rule.matches.clone(),
        rule: compile_rule(&route.name, rule_index, rule, known),
    };
    route.spec.rules.iter().enumerate().map(compile_rule).collect()
}

fn compile_rule(route: &ObjectName, index: usize, rule: &HttpRouteRule, known: &Known<'_>) -> RouteRule {
    let name = rule.name.clone().unwrap_or_else(|| index.to_string());
    let edits = Edits::of(&rule.filters);
    let action = match edits.redirect {
        Some(redirect) => RouteAction::Redirect(redirect),
        None => RouteAction::Forward(
            rule.backend_refs
                .iter()
                .map(|b| weighted(&route.namespace, b, known))
                .collect(),
        ),
    };
    RouteRule {
        id: RuleId::new(&format!("httproute/{route}/{name}")),
        matched_prefix: "/".into(),
        action,
        request_timeout: rule.timeouts.request.map(|t| t.as_std()),
        backend_timeout: rule.timeouts.backend_request.map(|t| t.as_std()),
        retry: rule.retry.as_ref().map(|retry| Arc::new(route_retry_settings(retry))),
        request_headers: edits.request,
        response_headers: edits.response,
        rewrite: edits.rewrite,
    }
}

fn weighted(namespace: &Arc<str>, wanted: &BackendRef, known: &Known<'_>) -> WeightedBackend {
    let edits = Edits::of(&wanted.filters);
    WeightedBackend {
        weight: wanted.weight,
        backend: find_backend(namespace, &wanted.target, known),
        request_headers: edits.request,
        response_headers: edits.response,
    }
}

fn find_backend(
    namespace: &Arc<str>,
    wanted: &BackendTarget,
    known: &Known<'_>,
) -> Result<Arc<super::Backend>, BadBackend> {
    let name = ObjectName {
        namespace: namespace.clone(),
        name: wanted.name.as_str().into(),
    };
    let (service, subset) = match wanted.kind {
        BackendKind::Service => (wanted.name.as_str(), None),
        BackendKind::ServiceSubset => match known.subsets.get(&(&**namespace, wanted.name.as_str())) {
            Some(service) => (*service, Some(name.name.clone())),
            None => return Err(BadBackend::NoSubset(name)),
        },
    };
    let Some(service) = known
        .services
        .get(&(&**namespace, service))
        .map(|service| service.name.clone())
    else {
        return Err(if subset.is_none() {
            BadBackend::NoService(name)
        } else {
            BadBackend::NoSubset(name)
        });
    };
    let key = BackendKey {
        service: service.clone(),
        port: wanted.port,
        subset,
    };
    known.backends.get(&key).cloned().ok_or(BadBackend::NoPort {
        service,
        port: wanted.port,
    })
}

/// The filters of a rule or backend, each kind at most once.
#[derive(Default)]
struct Edits {
    request: HeaderEdit,
    response: HeaderEdit,
    redirect: Option<RedirectSpec>,
    rewrite: Option<Rewrite>,
}

impl Edits {
    fn of(filters: &[HttpRouteFilter]) -> Edits {
        let mut edits = Edits::default();
        for filter in filters {
            match filter {
                HttpRouteFilter::RequestHeaderModifier(change) => edits.request = header_edit(change),
                HttpRouteFilter::ResponseHeaderModifier(change) => edits.response = header_edit(change),
                HttpRouteFilter::RequestRedirect(redirect) => edits.redirect = Some(redirect_spec(redirect)),
                HttpRouteFilter::UrlRewrite(rewrite) => edits.rewrite = Some(rewrite_spec(rewrite)),
                HttpRouteFilter::RequestMirror(_) | HttpRouteFilter::Cors(_) => {}
            }
        }
        edits
    }
}

fn header_edit(change: &policy::HeaderModifier) -> HeaderEdit {
    let pair = |header: &policy::HeaderValue| (header.name.clone(), header.value.clone());
    HeaderEdit {
        set: change.set.iter().map(pair).collect(),
        add: change.add.iter().map(pair).collect(),
        remove: change.remove.clone(),
    }
}

fn redirect_spec(redirect: &policy::RequestRedirect) -> RedirectSpec {
    RedirectSpec {
        status: redirect.status_code,
        scheme: redirect.scheme.as_deref().map(Arc::from),
        hostname: redirect.hostname.as_deref().map(Arc::from),
        port: redirect.port,
        path: redirect.path.as_ref().map(path_modifier),
        matched_prefix: "/".into(),
    }
}

fn rewrite_spec(rewrite: &UrlRewrite) -> Rewrite {
    Rewrite {
        hostname: rewrite.hostname.as_deref().map(Arc::from),
        path: rewrite.path.as_ref().map(path_modifier),
    }
}

fn path_modifier(modifier: &policy::PathModifier) -> PathModifier {
    match modifier {
        policy::PathModifier::ReplaceFullPath(path) => PathModifier::ReplaceFullPath(path.as_str().into()),
        policy::PathModifier::ReplacePrefixMatch(path) => PathModifier::ReplacePrefixMatch(path.as_str().into()),
    }
}
