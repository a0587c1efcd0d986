//! The two directions of `Sync` as model types.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{WireError, generated as pb};
use crate::{
    document::{Resource, ResourceKey},
    identity::TrustDomain,
    workload::{ObjectName, Revision},
};

/// The root certificates that are trusted now, DER.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustRoots(pub Vec<Vec<u8>>);

/// What the controller sends on `Sync`.
#[derive(Clone, Debug, PartialEq)]
pub enum Update {
    /// Everything that the node needs; replaces what it held.
    Snapshot {
        /// The revision.
        revision: Revision,
        /// What tells it from another revision of the same number; 0: unknown.
        stamp: u64,
        /// The trust domain.
        trust_domain: TrustDomain,
        /// The resources.
        resources: Vec<Resource>,
        /// The roots.
        trust_roots: TrustRoots,
    },
    /// What has changed.
    Delta {
        /// The revision that it builds on.
        from: Revision,
        /// The revision that it leads to.
        to: Revision,
        /// The stamp of that.
        stamp: u64,
        /// New and changed resources.
        upserts: Vec<Resource>,
        /// Resources that are gone.
        removed: Vec<ResourceKey>,
        /// The roots, if they have changed.
        trust_roots: Option<TrustRoots>,
    },
}

/// What an agent sends on `Sync`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// Who it is; first and once.
    Hello {
        /// The node's name; must be that of its certificate.
        node: String,
        /// The agent's version.
        agent_version: String,
        /// The revision that it holds; 0: none.
        resume: Revision,
        /// The stamp of that; 0: unknown.
        stamp: u64,
        /// The ABI version of its kernel programs.
        abi_version: u32,
    },
    /// It holds this revision now.
    Ack(Revision),
    /// It keeps what it held.
    Nack {
        /// The refused revision.
        revision: Revision,
        /// Why.
        reason: String,
    },
    /// The state of its pods and credentials.
    Status {
        /// Its pods.
        pods: Vec<PodReport>,
        /// Its credentials.
        certificates: Vec<CertificateReport>,
    },
}

/// The state of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodReport {
    /// The pod.
    pub name: ObjectName,
    /// The view says that it belongs to the mesh.
    pub enrolled: bool,
    /// The kernel hands its connections to the agent.
    pub captured: bool,
    /// Why the two differ; empty if they do not.
    pub why: String,
}

/// The state of a credential.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateReport {
    /// The identity's text.
    pub identity: String,
    /// When it expires; `None`: there is none yet.
    pub expires: Option<SystemTime>,
    /// Why the last renewal failed; empty if it did not.
    pub problem: String,
}

/// Whole seconds since 1970; 0 for `None` and for times before.
pub(super) fn to_unix(time: Option<SystemTime>) -> i64 {
    time.and_then(|t| t.duration_since(UNIX_EPOCH).ok())
        .and_then(|d| i64::try_from(d.as_secs()).ok())
        .unwrap_or(0)
}

/// `None` for 0, for times before 1970 and for those that the system cannot say.
pub(super) fn from_unix(seconds: i64) -> Option<SystemTime> {
    let seconds = u64::try_from(seconds).ok().filter(|s| *s > 0)?;
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

impl From<TrustRoots> for pb::TrustBundle {
    fn from(roots: TrustRoots) -> pb::TrustBundle {
        pb::TrustBundle { roots_der: roots.0 }
    }
}

impl From<pb::TrustBundle> for TrustRoots {
    fn from(bundle: pb::TrustBundle) -> TrustRoots {
        TrustRoots(bundle.roots_der)
    }
}

impl From<&Update> for pb::ControllerMessage {
    fn from(update: &Update) -> pb::ControllerMessage {
        use pb::controller_message::Message;
        let message = match update {
            Update::Snapshot {
                revision,
                stamp,
                trust_domain,
                resources,
                trust_roots,
            } => Message::Snapshot(pb::Snapshot {
                revision: revision.0,
                stamp: *stamp,
                trust_domain: trust_domain.as_str().to_owned(),
                resources: resources.iter().map(Into::into).collect(),
                trust_bundle: Some(trust_roots.clone().into()),
            }),
            Update::Delta {
                from,
                to,
                stamp,
                upserts,
                removed,
                trust_roots,
            } => Message::Delta(pb::Delta {
                from: from.0,
                to: to.0,
                stamp: *stamp,
                upserts: upserts.iter().map(Into::into).collect(),
                removed: removed.iter().map(Into::into).collect(),
                trust_bundle: trust_roots.clone().map(Into::into),
            }),
        };
        pb::ControllerMessage { message: Some(message) }
    }
}

fn resources(received: Vec<pb::Resource>) -> Result<Vec<Resource>, WireError> {
    if received.len() > super::RESOURCES_MAX {
        return Err(WireError::TooMany(received.len()));
    }
    received.into_iter().map(Resource::try_from).collect()
}

/// What is gone. A kind that only a newer controller knows was never held: there is nothing to remove.
fn removed(received: Vec<pb::ResourceKey>) -> Result<Vec<ResourceKey>, WireError> {
    let keys = received.into_iter().map(ResourceKey::try_from);
    keys.filter(|key| !matches!(key, Err(WireError::Kind(_)))).collect()
}

impl pb::ControllerMessage {
    /// It is of a kind that only a newer controller knows, and is passed over: what an agent must obey is in snapshots
    /// and deltas.
    pub fn is_unknown(&self) -> bool {
        self.message.is_none()
    }

    /// The revision that the message would lead to; 0 if it says none. Read before the conversion, so that a message
    /// which does not convert can be nacked by its number.
    pub fn revision(&self) -> Revision {
        use pb::controller_message::Message;
        Revision(match &self.message {
            Some(Message::Snapshot(snapshot)) => snapshot.revision,
            Some(Message::Delta(delta)) => delta.to,
            None => 0,
        })
    }
}

impl TryFrom<pb::ControllerMessage> for Update {
    type Error = WireError;

    fn try_from(message: pb::ControllerMessage) -> Result<Update, WireError> {
        use pb::controller_message::Message;
        match message.message.ok_or(WireError::Missing("message"))? {
            Message::Snapshot(snapshot) => Ok(Update::Snapshot {
                revision: Revision(snapshot.revision),
                stamp: snapshot.stamp,
                trust_domain: TrustDomain::new(&snapshot.trust_domain).map_err(WireError::TrustDomain)?,
                resources: resources(snapshot.resources)?,
                trust_roots: snapshot
                    .trust_bundle
                    .ok_or(WireError::Missing("snapshot.trust_bundle"))?
                    .into(),
            }),
            Message::Delta(delta) => Ok(Update::Delta {
                from: Revision(delta.from),
                to: Revision(delta.to),
                stamp: delta.stamp,
                upserts: resources(delta.upserts)?,
                removed: removed(delta.removed)?,
                trust_roots: delta.trust_bundle.map(Into::into),
            }),
        }
    }
}

impl From<Report> for pb::AgentMessage {
    fn from(report: Report) -> pb::AgentMessage {
        use pb::agent_message::Message;
        let message = match report {
            Report::Hello {
                node,
                agent_version,
                resume,
                stamp,
                abi_version,
            } => Message::Hello(pb::Hello {
                resume_stamp: stamp,
                node,
                agent_version,
                resume_revision: resume.0,
                abi_version,
            }),
            Report::Ack(revision) => Message::Ack(pb::Ack { revision: revision.0 }),
            Report::Nack { revision, reason } => Message::Nack(pb::Nack {
                revision: revision.0,
                reason,
            }),
            Report::Status { pods, certificates } => Message::Status(pb::AgentStatus {
                pods: pods.into_iter().map(Into::into).collect(),
                certificates: certificates.into_iter().map(Into::into).collect(),
            }),
        };
        pb::AgentMessage { message: Some(message) }
    }
}

impl pb::AgentMessage {
    /// It is of a kind that only a newer agent knows, and is passed over.
    pub fn is_unknown(&self) -> bool {
        self.message.is_none()
    }
}

impl TryFrom<pb::AgentMessage> for Report {
    type Error = WireError;

    fn try_from(message: pb::AgentMessage) -> Result<Report, WireError> {
        use pb::agent_message::Message;
        Ok(match message.message.ok_or(WireError::Missing("message"))? {
            Message::Hello(hello) => Report::Hello {
                node: hello.node,
                agent_version: hello.agent_version,
                resume: Revision(hello.resume_revision),
                stamp: hello.resume_stamp,
                abi_version: hello.abi_version,
            },
            Message::Ack(ack) => Report::Ack(Revision(ack.revision)),
            Message::Nack(nack) => Report::Nack {
                revision: Revision(nack.revision),
                reason: nack.reason,
            },
            Message::Status(status) => Report::Status {
                pods: status.pods.into_iter().map(Into::into).collect(),
                certificates: status.certificates.into_iter().map(Into::into).collect(),
            },
        })
    }
}

impl From<PodReport> for pb::PodStatus {
    fn from(pod: PodReport) -> pb::PodStatus {
        pb::PodStatus {
            namespace: pod.name.namespace.to_string(),
            name: pod.name.name.to_string(),
            enrolled: pod.enrolled,
            captured: pod.captured,
            why: pod.why,
        }
    }
}

impl From<pb::PodStatus> for PodReport {
    fn from(pod: pb::PodStatus) -> PodReport {
        PodReport {
            name: ObjectName::new(&pod.namespace, &pod.name),
            enrolled: pod.enrolled,
            captured: pod.captured,
            why: pod.why,
        }
    }
}

impl From<CertificateReport> for pb::CertificateStatus {
    fn from(certificate: CertificateReport) -> pb::CertificateStatus {
        pb::CertificateStatus {
            identity: certificate.identity,
            expires_unix: to_unix(certificate.expires),
            problem: certificate.problem,
        }
    }
}

impl From<pb::CertificateStatus> for CertificateReport {
    fn from(certificate: pb::CertificateStatus) -> CertificateReport {
        CertificateReport {
            identity: certificate.identity,
            expires: from_unix(certificate.expires_unix),
            problem: certificate.problem,
        }
    }
}
