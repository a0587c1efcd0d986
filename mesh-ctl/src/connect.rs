//! The way to the controller: its Unix socket, and what can go wrong on it.

use std::{path::PathBuf, time::Duration};

use hyper_util::rt::TokioIo;
use mesh_api::wire::{MESSAGE_BYTES_MAX, operator::OperatorClient};
use tokio::net::UnixStream;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint, Uri},
};

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

/// Connects to the controller's socket.
pub async fn connect(socket: PathBuf, timeout: Duration) -> Result<OperatorClient<Channel>, Failure> {
    let path = socket.clone();
    let dial = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The name is never resolved: the connector knows where to go.
    let endpoint = Endpoint::from_static("http://controller")
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(timeout);
    let channel = endpoint.connect_with_connector(dial).await.map_err(|error| {
        let cause = std::iter::successors(Some(&error as &dyn std::error::Error), |e| e.source()).last();
        let cause = cause.map(ToString::to_string).unwrap_or_default();
        Failure::Unreachable(format!(
            "cannot reach the controller at {}: {cause} (--socket or MESH_CTL_SOCKET says where it is)",
            socket.display()
        ))
    })?;
    Ok(OperatorClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX))
}
