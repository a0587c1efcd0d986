//! SPIFFE identities: `spiffe://<trust-domain>/ns/<namespace>/sa/<service-account>`.
//!
//! An identity is a name; the key and chain that prove it are a credential and live in the agent.

use std::{fmt, str::FromStr, sync::Arc};

/// The longest SPIFFE id accepted, in bytes (SPIFFE-ID §2.3).
pub const SPIFFE_ID_BYTES_MAX: usize = 2048;

/// A SPIFFE trust domain: lower-case letters, digits, `.`, `-` and `_` (SPIFFE-ID §2.1).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

/// What a SPIFFE id names in this mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdentityKind {
    /// A workload: `/ns/<namespace>/sa/<service-account>`.
    Workload,
    /// An agent: `/node/<name>`.
    Node,
    /// The controller: `/controller`.
    Controller,
    /// Nobody: what stands for an endpoint that is no workload. No text is parsed to it, so no certificate has it.
    Outside,
}

/// A checked SPIFFE id. Cheap to clone; equality is by text.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    text: Arc<str>,
}

/// Why a text is not an identity of this mesh.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The scheme is not `spiffe://`.
    #[error("expected an id that starts with spiffe://")]
    Scheme,
    /// The id exceeds [`SPIFFE_ID_BYTES_MAX`].
    #[error("longer than {SPIFFE_ID_BYTES_MAX} bytes")]
    TooLong,
    /// The trust domain is empty or has a character outside `[a-z0-9._-]`.
    #[error("trust domain {0:?}: expected lower-case letters, digits, '.', '-' and '_'")]
    TrustDomain(String),
    /// The path has none of the three known forms.
    #[error("path {0:?}: expected /ns/<namespace>/sa/<service-account>, /node/<name> or /controller")]
    Path(String),
}

impl TrustDomain {
    /// Parses a trust domain.
    pub fn new(text: &str) -> Result<TrustDomain, IdentityError> {
        let good = !text.is_empty()
            && text.len() <= 255
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b));
        if good {
            Ok(TrustDomain(text.into()))
        } else {
            Err(IdentityError::TrustDomain(text.to_owned()))
        }
    }

    /// The trust domain's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn segment_is_valid(segment: &str) -> bool {
    !segment.is_empty()
        && segment != "."
        && segment != ".."
        && segment
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

impl SpiffeId {
    /// The identity of a service account.
    pub fn workload(domain: &TrustDomain, namespace: &str, service_account: &str) -> Result<SpiffeId, IdentityError> {
        format!("spiffe://{}/ns/{namespace}/sa/{service_account}", domain.as_str()).parse()
    }

    /// The identity of a node's agent.
    pub fn node(domain: &TrustDomain, node: &str) -> Result<SpiffeId, IdentityError> {
        format!("spiffe://{}/node/{node}", domain.as_str()).parse()
    }

    /// The identity of the controller.
    pub fn controller(domain: &TrustDomain) -> SpiffeId {
        SpiffeId {
            text: format!("spiffe://{}/controller", domain.as_str()).into(),
        }
    }

    /// Stands where an identity is asked for and nobody has one. It cannot be proven: no certificate is read to it.
    pub fn outside(domain: &TrustDomain) -> SpiffeId {
        SpiffeId {
            text: format!("spiffe://{}/outside", domain.as_str()).into(),
        }
    }

    /// The whole id.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    fn parts(&self) -> (&str, &str) {
        let rest = self.text.strip_prefix("spiffe://").unwrap_or_default();
        rest.split_once('/').unwrap_or((rest, ""))
    }

    /// The trust domain's text.
    pub fn trust_domain(&self) -> &str {
        self.parts().0
    }

    /// What the id names.
    pub fn kind(&self) -> IdentityKind {
        match self.parts().1 {
            "controller" => IdentityKind::Controller,
            "outside" => IdentityKind::Outside,
            path if path.starts_with("node/") => IdentityKind::Node,
            _ => IdentityKind::Workload,
        }
    }

    /// The namespace of a workload identity.
    pub fn namespace(&self) -> Option<&str> {
        self.parts().1.strip_prefix("ns/")?.split('/').next()
    }

    /// The service account of a workload identity.
    pub fn service_account(&self) -> Option<&str> {
        self.parts().1.strip_prefix("ns/")?.split('/').nth(2)
    }

    /// The node's name in an agent's identity.
    pub fn node_name(&self) -> Option<&str> {
        self.parts().1.strip_prefix("node/")
    }
}

impl FromStr for SpiffeId {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<SpiffeId, IdentityError> {
        if text.len() > SPIFFE_ID_BYTES_MAX {
            return Err(IdentityError::TooLong);
        }
        let rest = text.strip_prefix("spiffe://").ok_or(IdentityError::Scheme)?;
        let (domain, path) = rest.split_once('/').ok_or_else(|| IdentityError::Path(String::new()))?;
        TrustDomain::new(domain)?;
        let segments: Vec<&str> = path.split('/').collect();
        let good = match segments.as_slice() {
            ["ns", namespace, "sa", account] => segment_is_valid(namespace) && segment_is_valid(account),
            ["node", name] => segment_is_valid(name),
            ["controller"] => true,
            _ => false,
        };
        if good {
            Ok(SpiffeId { text: text.into() })
        } else {
            Err(IdentityError::Path(format!("/{path}")))
        }
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_parsed_or_refused() {
        let cases = [
            ("spiffe://cluster.local/ns/shop/sa/front", true),
            ("spiffe://cluster.local/node/node-1", true),
            ("spiffe://cluster.local/controller", true),
            ("spiffe://cluster.local/outside", false),
            ("spiffe://cluster.local", false),
            ("spiffe://Cluster.local/ns/a/sa/b", false),
            ("spiffe://cluster.local/ns/a/sa/", false),
            ("spiffe://cluster.local/ns/../sa/b", false),
            ("spiffe://cluster.local/ns/a/sa/b/c", false),
            ("https://cluster.local/ns/a/sa/b", false),
            ("spiffe:///ns/a/sa/b", false),
        ];
        for (text, good) in cases {
            assert_eq!(text.parse::<SpiffeId>().is_ok(), good, "{text}");
        }
        let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/front".parse().unwrap();
        assert_eq!(
            (id.namespace(), id.service_account(), id.node_name()),
            (Some("shop"), Some("front"), None)
        );
        assert_eq!(id.kind(), IdentityKind::Workload);
    }
}
