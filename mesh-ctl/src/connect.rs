//! The way to the controller: its Unix socket, or in a cluster a port-forward to the replica that leads; and what can
//! go wrong on it.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use mesh_api::wire::{MESSAGE_BYTES_MAX, operator::OperatorClient};
use tokio::net::UnixStream;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint, Uri},
};

use crate::kubernetes::{self, KubeArgs};

/// Where the controller's socket lies unless told otherwise.
pub const SOCKET_DEFAULT: &str = "/run/nodemesh/operator.sock";
/// How long the socket may take to answer at all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a call may take; waits bring a time of their own.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a command did not do what was asked, each with an exit code of its own.
#[derive(Debug)]
pub enum Failure {
    /// The request is wrong or was refused; each text is a line.
    Refused(Vec<String>),
    /// The arguments do not go together.
    Usage(String),
    /// No controller answers.
    Unreachable(String),
    /// The time is over.
    Timeout(String),
}

impl Failure {
    /// One line.
    pub fn refused(line: impl Into<String>) -> Failure {
        Failure::Refused(vec![line.into()])
    }

    /// What `mesh-ctl` exits with.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Refused(_) => 1,
            Failure::Usage(_) => 2,
            Failure::Unreachable(_) => 3,
            Failure::Timeout(_) => 4,
        }
    }

    /// What is printed.
    pub fn lines(&self) -> Vec<&str> {
        match self {
            Failure::Refused(lines) => lines.iter().map(String::as_str).collect(),
            Failure::Usage(line) | Failure::Unreachable(line) | Failure::Timeout(line) => vec![line],
        }
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Failure {
        use std::error::Error;
        let message = status.message();
        match status.code() {
            Code::DeadlineExceeded | Code::Cancelled => {
                Failure::Timeout(format!("the controller did not answer in time: {message}"))
            }
            // Only what the transport says has a source: an answer of the controller's has none.
            code if code == Code::Unavailable || status.source().is_some() => Failure::Unreachable(format!(
                "the connection to the controller was lost ({message}): whether it did what was asked is not known"
            )),
            _ => Failure::refused(message),
        }
    }
}

/// Which mesh is meant: the one behind a socket on this machine, or the one in a cluster.
#[derive(Clone, Debug)]
pub enum World {
    /// A standalone controller's socket, and the namespace that was asked for.
    Standalone(PathBuf, Option<String>),
    /// A cluster, by the kubeconfig.
    Kubernetes(KubeArgs),
}

impl World {
    /// A socket that is named wins, then a cluster that is named, then the default socket if it is there, then a
    /// cluster that can be found.
    pub fn of(socket: Option<PathBuf>, kube: KubeArgs) -> World {
        match socket {
            Some(socket) => World::Standalone(socket, kube.namespace),
            None if kube.named() => World::Kubernetes(kube),
            None if !Path::new(SOCKET_DEFAULT).exists() && KubeArgs::found() => World::Kubernetes(kube),
            None => World::Standalone(SOCKET_DEFAULT.into(), kube.namespace),
        }
    }

    /// The namespace that was asked for.
    pub fn namespace(&self) -> Option<&str> {
        match self {
            World::Standalone(_, namespace) => namespace.as_deref(),
            World::Kubernetes(args) => args.namespace.as_deref(),
        }
    }

    /// The cluster's arguments, for what there is in a cluster only.
    pub fn cluster(&self) -> Result<&KubeArgs, Failure> {
        match self {
            World::Kubernetes(args) => Ok(args),
            World::Standalone(socket, _) => Err(Failure::Usage(format!(
                "this is for a cluster, and {} is a standalone mesh: name a cluster by --kubeconfig or --context",
                socket.display()
            ))),
        }
    }
}

/// Connects to the controller.
pub async fn connect(world: &World, timeout: Duration) -> Result<OperatorClient<Channel>, Failure> {
    // The name is never resolved: the connector knows where to go.
    let endpoint = Endpoint::from_static("http://controller")
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(timeout);
    let channel = match world {
        World::Standalone(socket, _) => socket_channel(socket, endpoint).await?,
        World::Kubernetes(args) => kubernetes::leader_channel(&args.cluster().await?, endpoint).await?,
    };
    Ok(OperatorClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX))
}

async fn socket_channel(socket: &Path, endpoint: Endpoint) -> Result<Channel, Failure> {
    let path = socket.to_owned();
    let dial = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    endpoint.connect_with_connector(dial).await.map_err(|error| {
        let cause = std::iter::successors(Some(&error as &dyn std::error::Error), |e| e.source()).last();
        let cause = cause.map(ToString::to_string).unwrap_or_default();
        Failure::Unreachable(format!(
            "cannot reach the controller at {}: {cause} (--socket or MESH_CTL_SOCKET says where it is, --kubeconfig or \
             KUBECONFIG names a cluster)",
            socket.display()
        ))
    })
}
