//! The name of the rule that decided.
//!
//! Every permit, refusal, route and limit carries one into the log, the metrics, the trace and `mesh-ctl explain`.
//! It is a name for people and tests; nothing is decided by comparing it.

use std::{fmt, sync::Arc};

/// `kind/namespace/name/rule`, or one of the mesh's own constants. Cheap to clone.
#[derive(Clone)]
pub struct RuleId(Repr);

#[derive(Clone)]
enum Repr {
    Constant(&'static str),
    Shared(Arc<str>),
}

impl RuleId {
    /// No policy applies: what is not restricted is allowed.
    pub const ALLOW_BY_DEFAULT: RuleId = RuleId::constant("default-allow");
    /// Mutual TLS is strict and the source proved no identity.
    pub const MTLS_STRICT: RuleId = RuleId::constant("mtls-strict");
    /// The view does not know the destination.
    pub const UNKNOWN_WORKLOAD: RuleId = RuleId::constant("unknown-workload");

    /// A rule of the mesh itself.
    pub const fn constant(text: &'static str) -> RuleId {
        RuleId(Repr::Constant(text))
    }

    /// A rule of a document.
    pub fn new(text: &str) -> RuleId {
        RuleId(Repr::Shared(text.into()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        match &self.0 {
            Repr::Constant(text) => text,
            Repr::Shared(text) => text,
        }
    }
}

impl PartialEq for RuleId {
    fn eq(&self, other: &RuleId) -> bool {
        self.as_str() == other.as_str()
    }
}
impl Eq for RuleId {}

impl std::hash::Hash for RuleId {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.as_str().hash(state);
    }
}

impl fmt::Display for RuleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
impl fmt::Debug for RuleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
