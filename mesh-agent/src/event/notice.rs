//! What happens to the agent itself, as against to traffic: one closed enum, told to the log and a counter together.
//!
//! The table in docs/events.md lists them; a test holds it equal to this file.

use std::time::Duration;

use mesh_api::{identity::SpiffeId, workload::Revision};
use tracing::{error, info, warn};

/// Something worth telling that is no connection and no request.
#[derive(Clone, Debug)]
pub enum Event {
    /// A revision is served now.
    ViewApplied {
        /// Which.
        revision: Revision,
        /// The resources that it has.
        resources: usize,
    },
    /// A revision was refused; the last good one stays.
    ViewRefused {
        /// Which.
        revision: Revision,
        /// Why.
        reason: String,
    },
    /// The last good snapshot was loaded from disk.
    SnapshotLoaded {
        /// Its revision.
        revision: Revision,
    },
    /// The snapshot on disk cannot be used; the agent goes on as if there were none.
    SnapshotUnusable {
        /// Why.
        reason: String,
    },
    /// The snapshot could not be written; a restart without the controller would serve an older one.
    SnapshotUnwritten {
        /// Why.
        reason: String,
    },
    /// The controller's stream is up.
    ControllerConnected {
        /// Where.
        address: String,
    },
    /// The controller's stream is down; the view stays as it is.
    ControllerLost {
        /// Why.
        reason: String,
        /// Time to the next attempt.
        retry_in: Duration,
    },
    /// The node's own certificate was issued.
    NodeCertificateIssued {
        /// Its life from now.
        valid_for: Duration,
    },
    /// The node's own certificate could not be had; one in hand stays in use.
    NodeCertificateFailed {
        /// Why.
        reason: String,
    },
    /// A workload's credential was issued.
    CredentialIssued {
        /// Whose.
        identity: SpiffeId,
        /// Its life from now.
        valid_for: Duration,
    },
    /// A workload's credential could not be had; one in hand stays in use.
    CredentialFailed {
        /// Whose.
        identity: SpiffeId,
        /// Why.
        reason: String,
        /// Time to the next attempt.
        retry_in: Duration,
    },
    /// A pod's connections are captured from now on.
    PodCaptured {
        /// Namespace and name.
        pod: String,
    },
    /// An enrolled pod is not captured.
    PodNotCaptured {
        /// Namespace and name.
        pod: String,
        /// Why.
        reason: String,
    },
    /// A pod is no longer captured, because it left or was taken out.
    PodRetired {
        /// Namespace and name.
        pod: String,
    },
    /// The kernel programs are attached.
    KernelAttached {
        /// Whether pins of an earlier agent were taken over.
        reused: bool,
    },
    /// The agent drains.
    DrainStarted,
    /// The drain is over.
    DrainEnded {
        /// Connections that were cut.
        left: usize,
    },
    /// A bound was reached.
    BoundReached {
        /// Which.
        bound: &'static str,
        /// Its value.
        limit: usize,
    },
    /// Something of the agent failed that should not.
    Internal {
        /// Where.
        what: &'static str,
        /// How.
        reason: String,
    },
    /// The agent serves.
    Started {
        /// Its version.
        version: &'static str,
    },
    /// The agent ends.
    Stopped,
}

impl Event {
    /// All names, in the order of their indices.
    pub const NAMES: [&'static str; 21] = [
        "view-applied",
        "view-refused",
        "snapshot-loaded",
        "snapshot-unusable",
        "snapshot-unwritten",
        "controller-connected",
        "controller-lost",
        "node-certificate-issued",
        "node-certificate-failed",
        "credential-issued",
        "credential-failed",
        "pod-captured",
        "pod-not-captured",
        "pod-retired",
        "kernel-attached",
        "drain-started",
        "drain-ended",
        "bound-reached",
        "internal",
        "started",
        "stopped",
    ];

    pub(super) fn index(&self) -> usize {
        match self {
            Event::ViewApplied { .. } => 0,
            Event::ViewRefused { .. } => 1,
            Event::SnapshotLoaded { .. } => 2,
            Event::SnapshotUnusable { .. } => 3,
            Event::SnapshotUnwritten { .. } => 4,
            Event::ControllerConnected { .. } => 5,
            Event::ControllerLost { .. } => 6,
            Event::NodeCertificateIssued { .. } => 7,
            Event::NodeCertificateFailed { .. } => 8,
            Event::CredentialIssued { .. } => 9,
            Event::CredentialFailed { .. } => 10,
            Event::PodCaptured { .. } => 11,
            Event::PodNotCaptured { .. } => 12,
            Event::PodRetired { .. } => 13,
            Event::KernelAttached { .. } => 14,
            Event::DrainStarted => 15,
            Event::DrainEnded { .. } => 16,
            Event::BoundReached { .. } => 17,
            Event::Internal { .. } => 18,
            Event::Started { .. } => 19,
            Event::Stopped => 20,
        }
    }

    /// The name in the log and in the metric label `event`.
    pub fn name(&self) -> &'static str {
        Event::NAMES.get(self.index()).copied().unwrap_or("unknown")
    }

    pub(super) fn log(&self) {
        let event = self.name();
        match self {
            Event::ViewApplied { revision, resources } => {
                info!(event, revision = revision.0, resources, "view applied");
            }
            Event::ViewRefused { revision, reason } => {
                error!(
                    event,
                    revision = revision.0,
                    reason,
                    "view refused, the last good one stays"
                );
            }
            Event::SnapshotLoaded { revision } => info!(event, revision = revision.0, "snapshot loaded"),
            Event::SnapshotUnusable { reason } => error!(event, reason, "snapshot on disk is unusable"),
            Event::SnapshotUnwritten { reason } => error!(event, reason, "snapshot could not be written"),
            Event::ControllerConnected { address } => info!(event, address, "controller connected"),
            Event::ControllerLost { reason, retry_in } => {
                let retry_ms = millis(*retry_in);
                warn!(event, reason, retry_ms, "controller lost, the view stays");
            }
            Event::NodeCertificateIssued { valid_for } => {
                info!(event, valid_s = valid_for.as_secs(), "node certificate issued");
            }
            Event::NodeCertificateFailed { reason } => warn!(event, reason, "no node certificate"),
            Event::CredentialIssued { identity, valid_for } => {
                info!(event, %identity, valid_s = valid_for.as_secs(), "credential issued");
            }
            Event::CredentialFailed {
                identity,
                reason,
                retry_in,
            } => {
                let retry_ms = millis(*retry_in);
                warn!(event, %identity, reason, retry_ms, "no credential");
            }
            Event::PodCaptured { pod } => info!(event, pod, "pod captured"),
            Event::PodNotCaptured { pod, reason } => error!(event, pod, reason, "pod not captured"),
            Event::PodRetired { pod } => info!(event, pod, "pod retired"),
            Event::KernelAttached { reused } => info!(event, reused, "kernel programs attached"),
            Event::DrainStarted => info!(event, "drain started"),
            Event::DrainEnded { left } => info!(event, left, "drain ended"),
            Event::BoundReached { bound, limit } => warn!(event, bound, limit, "bound reached"),
            Event::Internal { what, reason } => error!(event, what, reason, "internal failure"),
            Event::Started { version } => info!(event, version, "agent serves"),
            Event::Stopped => info!(event, "agent ends"),
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
