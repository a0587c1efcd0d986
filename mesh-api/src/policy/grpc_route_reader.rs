//! Reads and validates a GRPCRoute's spec, by the Gateway API's own rules and bounds.

use super::{
    BackendRef, GrpcMethodMatch, GrpcRoute, GrpcRouteMatch, GrpcRouteRule, check,
    http_route_reader::{
        BACKENDS_MAX, HOSTNAMES_MAX, MATCHES_MAX, MATCHES_OF_ROUTE_MAX, Place, RULES_MAX, filters, named, parents,
    },
};
use crate::read::{Decode, Field, deserialize_by_decoding, quoted};

/// The longest name of a service or method, as the Gateway API has it.
const NAME_BYTES_MAX: usize = 1024;

impl Decode for GrpcRoute {
    fn decode(field: &Field) -> Option<GrpcRoute> {
        let mut fields = field.fields()?;
        fields.later(&["useDefaultGateways"]);
        let parent_refs = fields
            .need("parentRefs", "at least one parent")
            .and_then(|f| parents(&f));
        let hostnames = fields.list("hostnames", HOSTNAMES_MAX, |f| f.word().map(str::to_owned));
        let rules = fields.read("rules", rules);
        fields.finish();
        Some(GrpcRoute {
            parent_refs: parent_refs?,
            hostnames: hostnames?,
            rules: rules?.unwrap_or_default(),
        })
    }
}

deserialize_by_decoding!(GrpcRoute);

fn rules(field: &Field) -> Option<Vec<GrpcRouteRule>> {
    let items = field.items(RULES_MAX)?;
    let rules: Vec<Option<GrpcRouteRule>> = items.iter().map(GrpcRouteRule::decode).collect();
    check::unique(
        &items,
        rules.iter().map(|r| r.as_ref().and_then(|r| r.name.as_deref())),
        "name",
    );
    let rules: Vec<GrpcRouteRule> = rules.into_iter().collect::<Option<_>>()?;
    let matches: usize = rules.iter().map(|rule| rule.matches.len()).sum();
    if matches > MATCHES_OF_ROUTE_MAX {
        field.refuse(
            format!("has {matches} matches in all"),
            format!("at most {MATCHES_OF_ROUTE_MAX}"),
        );
        return None;
    }
    Some(rules)
}

impl Decode for GrpcRouteRule {
    fn decode(field: &Field) -> Option<GrpcRouteRule> {
        let mut fields = field.fields()?;
        fields.later(&["sessionPersistence"]);
        let name = fields.read("name", check::rule_name);
        let matches = fields.list("matches", MATCHES_MAX, GrpcRouteMatch::decode);
        let filters = fields.read("filters", |f| filters(f, Place::GrpcRule));
        let backend_refs = fields.list("backendRefs", BACKENDS_MAX, BackendRef::decode);
        fields.finish();
        Some(GrpcRouteRule {
            name: name?,
            matches: matches?,
            filters: filters?.unwrap_or_default(),
            backend_refs: backend_refs?,
        })
    }
}

impl Decode for GrpcRouteMatch {
    fn decode(field: &Field) -> Option<GrpcRouteMatch> {
        let mut fields = field.fields()?;
        let method = fields.read("method", GrpcMethodMatch::decode);
        let headers = fields.read("headers", |f| named(f, check::header_match));
        fields.finish();
        Some(GrpcRouteMatch {
            method: method?,
            headers: headers?.unwrap_or_default(),
        })
    }
}

impl Decode for GrpcMethodMatch {
    fn decode(field: &Field) -> Option<GrpcMethodMatch> {
        let mut fields = field.fields()?;
        let exact = fields
            .read("type", |f| {
                f.choice(&[("Exact", true), ("RegularExpression", false)], &[])
            })?
            .unwrap_or(true);
        let (service, method) = (given(fields.get("service")), given(fields.get("method")));
        fields.finish();
        if service.is_none() && method.is_none() {
            field.refuse("names neither a service nor a method", "at least one of them");
            return None;
        }
        fn read<T>(field: Option<Field<'_>>, read: impl Fn(&Field<'_>) -> Option<T>) -> Option<Option<T>> {
            match field {
                None => Some(None),
                Some(field) => read(&field).map(Some),
            }
        }
        if exact {
            let service = read(service, |f| name(f, true));
            let method = read(method, |f| name(f, false));
            Some(GrpcMethodMatch::Exact {
                service: service?,
                method: method?,
            })
        } else {
            let (service, method) = (read(service, check::regex), read(method, check::regex));
            Some(GrpcMethodMatch::RegularExpression {
                service: service?,
                method: method?,
            })
        }
    }
}

/// A field that says something: Kubernetes keeps an empty text where nothing is meant.
fn given(field: Option<Field<'_>>) -> Option<Field<'_>> {
    match field {
        Some(field) if field.text() == Some("") => None,
        field => field,
    }
}

/// The name of a service, with its package, or of a method: identifiers as protocol buffers have them.
fn name(field: &Field, dotted: bool) -> Option<String> {
    let text = field.text()?;
    let identifier = |part: &str| {
        part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
            && part.bytes().next().is_some_and(|b| !b.is_ascii_digit())
    };
    let good = if dotted {
        text.split('.').all(identifier)
    } else {
        identifier(text)
    };
    if good && text.len() <= NAME_BYTES_MAX {
        return Some(text.to_owned());
    }
    let (what, expected) = if dotted {
        ("service", "a name with its package, such as shop.v1.Cart")
    } else {
        ("method", "a name such as Add")
    };
    field.refuse(format!("{} is not the name of a {what}", quoted(text)), expected);
    None
}
