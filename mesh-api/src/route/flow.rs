//! Routes of whole connections: TCPRoutes and TLSRoutes as a table, and which of their rules takes a connection.
//!
//! TLSRoutes are the more specific: the name that a ClientHello asks for is looked up first, by its whole text, then by
//! the longest end of it. What no TLSRoute takes goes by the TCPRoute; where there is none, it has no way. Of two routes
//! that say the same the older counts, then the one whose `namespace/name` comes first.

use std::{collections::HashMap, sync::Arc};

use super::{RouteAge, WeightedBackend, pick};
use crate::{policy::HostMatch, rule::RuleId};

/// The routes of connections to one service port.
#[derive(Clone, Debug, Default)]
pub struct FlowTable {
    /// For sources whose namespace has no routes of its own; `None`: the service itself.
    producers: Option<FlowRules>,
    /// By namespace of the source.
    consumers: HashMap<Arc<str>, FlowRules>,
}

/// The rules for one kind of source.
#[derive(Clone, Debug, Default)]
struct FlowRules {
    by_name: HashMap<String, Arc<FlowRule>>,
    /// By the end of a name that begins with its dot.
    by_suffix: HashMap<String, Arc<FlowRule>>,
    /// For every ClientHello.
    any_name: Option<Arc<FlowRule>>,
    tcp: Option<Arc<FlowRule>>,
}

/// Where connections go.
#[derive(Clone, Debug)]
pub struct FlowRule {
    /// `tcproute/<namespace>/<name>/<rule name or index>`, or `tlsroute/…`.
    pub id: RuleId,
    /// To one of these, by weight.
    pub backends: Vec<WeightedBackend>,
}

/// One route's rule, ready to enter a table.
#[derive(Clone, Debug)]
pub struct FlowEntry {
    /// The route's place among its kind.
    pub age: RouteAge,
    /// A TLSRoute's names, none: every one; `None`: a TCPRoute.
    pub names: Option<Vec<HostMatch>>,
    /// What follows.
    pub rule: FlowRule,
}

/// What a connection's first bytes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hello<'a> {
    /// A ClientHello that asks for this name.
    Name(&'a str),
    /// A ClientHello that asks for none.
    NoName,
    /// Anything else, or nothing yet.
    NotTls,
}

/// What a table says to a connection.
#[derive(Clone, Copy, Debug)]
pub enum FlowChoice<'a> {
    /// No route speaks of connections from this source: the service itself.
    Unrouted,
    /// Routes do, and none takes this one: it is refused.
    NoMatch,
    /// This rule.
    Rule(&'a Arc<FlowRule>),
}

/// Which rule takes the connection. A total function of its arguments.
pub fn select_flow<'a>(table: &'a FlowTable, source_namespace: &str, hello: Hello<'_>) -> FlowChoice<'a> {
    let Some(rules) = table.rules_for(source_namespace) else {
        return FlowChoice::Unrouted;
    };
    let by_name = match hello {
        Hello::Name(name) => rules.named(name),
        Hello::NoName => rules.any_name.as_ref(),
        Hello::NotTls => None,
    };
    match by_name.or(rules.tcp.as_ref()) {
        Some(rule) => FlowChoice::Rule(rule),
        None => FlowChoice::NoMatch,
    }
}

impl FlowTable {
    /// Builds a table from the producer's rules and, by namespace, the consumers'.
    pub fn new(producers: Vec<FlowEntry>, consumers: HashMap<Arc<str>, Vec<FlowEntry>>) -> FlowTable {
        FlowTable {
            producers: (!producers.is_empty()).then(|| FlowRules::new(producers)),
            consumers: consumers
                .into_iter()
                .map(|(ns, entries)| (ns, FlowRules::new(entries)))
                .collect(),
        }
    }

    fn rules_for(&self, source_namespace: &str) -> Option<&FlowRules> {
        self.consumers.get(source_namespace).or(self.producers.as_ref())
    }

    /// Whether some route speaks of connections from this namespace.
    pub fn has_routes_for(&self, source_namespace: &str) -> bool {
        self.rules_for(source_namespace).is_some()
    }

    /// Whether it matters which name a connection from this namespace asks for.
    pub fn asks_for_names(&self, source_namespace: &str) -> bool {
        self.rules_for(source_namespace).is_some_and(FlowRules::has_names)
    }

    /// Whether a connection from this namespace that is no TLS has a way.
    pub fn takes_any(&self, source_namespace: &str) -> bool {
        self.rules_for(source_namespace).is_none_or(|rules| rules.tcp.is_some())
    }
}

impl FlowRules {
    fn new(mut entries: Vec<FlowEntry>) -> FlowRules {
        // Stable: the rules of one route stay in order, and only the first of each is ever used.
        entries.sort_by(|a, b| a.age.cmp(&b.age));
        let mut rules = FlowRules::default();
        for entry in entries {
            let rule = Arc::new(entry.rule);
            match entry.names {
                None => {
                    rules.tcp.get_or_insert(rule);
                }
                Some(names) if names.is_empty() => {
                    rules.any_name.get_or_insert(rule);
                }
                Some(names) => {
                    for name in names {
                        let (list, name) = match name {
                            HostMatch::Exact(name) => (&mut rules.by_name, name),
                            HostMatch::Suffix(suffix) => (&mut rules.by_suffix, suffix),
                        };
                        list.entry(name).or_insert_with(|| rule.clone());
                    }
                }
            }
        }
        rules
    }

    fn has_names(&self) -> bool {
        !self.by_name.is_empty() || !self.by_suffix.is_empty() || self.any_name.is_some()
    }

    fn named(&self, name: &str) -> Option<&Arc<FlowRule>> {
        let name = name.to_ascii_lowercase();
        let ends = name.match_indices('.').filter(|(at, _)| *at > 0);
        self.by_name
            .get(&name)
            .or_else(|| {
                ends.filter_map(|(at, _)| name.get(at..))
                    .find_map(|end| self.by_suffix.get(end))
            })
            .or(self.any_name.as_ref())
    }
}

impl FlowRule {
    /// The backend for this random number, each chosen in exactly `weight` of the sum's residues. `None`, if all
    /// weights are 0: the connection is refused.
    pub fn pick(&self, random: u32) -> Option<&WeightedBackend> {
        pick(&self.backends, random)
    }
}
