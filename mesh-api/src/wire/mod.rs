//! The protocol between controller, agents and `mesh-ctl`: protobuf on one side, the model on the other.
//!
//! `proto/mesh.proto` explains who says what and when. The generated types stop here: agents and controller convert
//! a received message at once ([`Update`], [`Report`], [`crate::document::Resource`]) and what is wrong with it is a
//! [`WireError`]. Every conversion is total: bytes of a peer never panic.

mod convert;
mod message;
#[cfg(test)]
mod tests;

use crate::identity::IdentityError;

#[allow(missing_docs, clippy::all, rustdoc::all)]
mod generated {
    tonic::include_proto!("mesh.v1");
}

pub use message::{CertificateReport, PodReport, Report, TrustRoots, Update};

/// The service between controller and agents: client, server and the messages that the transports carry.
pub mod control {
    pub use super::generated::{
        AgentMessage, AgentStatus, BootstrapRequest, BootstrapResponse, CertificateStatus, Chain, ControllerMessage,
        PodStatus, SignRequest, SignResponse, SigningRequest, SigningResult, TrustBundle,
        control_client::ControlClient,
        control_server::{Control, ControlServer},
        signing_result::Outcome as SigningOutcome,
    };
}

/// The service on the controller's unix socket: client, server and messages.
pub mod operator {
    pub use super::generated::{
        ApplyRequest, ApplyResponse, BundleRequest, Change, DeleteRequest, DeleteResponse, DocumentChange, DocumentKey,
        GetRequest, GetResponse, IssueJoinTokenRequest, IssueJoinTokenResponse, NodeStatus, Problem, Source,
        StatusRequest, StatusResponse, StoredDocument, TrustBundle, WaitAckedRequest, WaitAckedResponse,
        operator_client::OperatorClient,
        operator_server::{Operator, OperatorServer},
    };
}

/// The largest message on either service, to be set on clients and servers: a snapshot is one message.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// The most resources in one snapshot or delta.
pub const RESOURCES_MAX: usize = 200_000;

/// What is wrong with a message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A field that must be there is not.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// An address is neither 4 nor 16 bytes long.
    #[error("an address of {0} bytes")]
    Address(usize),
    /// A port is 0 or above 65535.
    #[error("port {0} is out of range")]
    Port(u32),
    /// An enum's value is not known.
    #[error("{field}: unknown value {value}")]
    UnknownValue {
        /// The field.
        field: &'static str,
        /// The value.
        value: i32,
    },
    /// An identity is not one of the mesh.
    #[error("identity of {name}: {source}")]
    Identity {
        /// Whose.
        name: String,
        /// What is wrong with it.
        source: IdentityError,
    },
    /// The trust domain is not one.
    #[error(transparent)]
    TrustDomain(IdentityError),
    /// A kind that this version does not know.
    #[error("unknown kind {0:?}")]
    Kind(String),
    /// A policy's spec is not JSON, or does not validate.
    #[error("{document}: {problem}")]
    Policy {
        /// The document.
        document: String,
        /// The first problem.
        problem: String,
    },
    /// More resources than [`RESOURCES_MAX`].
    #[error("{0} resources, at most {RESOURCES_MAX}")]
    TooMany(usize),
}
