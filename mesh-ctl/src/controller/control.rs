//! The `Control` service: what agents may ask, and who may ask it.
//!
//! Who calls is known from the connection ([`Peer`]), never from the message. Bootstrap takes a join token or the node's
//! own certificate; Sign and Sync take the certificate only. A certificate is signed for an identity that the caller's
//! node runs now by the newest revision, and for nothing else.

use std::{
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::Stream;
use mesh_api::{
    identity::SpiffeId,
    wire::{
        Report, TrustRoots,
        control::{
            AgentMessage, BootstrapRequest, BootstrapResponse, Chain, Control, ControllerMessage, SignRequest,
            SignResponse, SigningOutcome, SigningRequest, SigningResult,
        },
    },
    workload::Revision,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming};

use super::{
    agents::{Agents, Session},
    ca::{self, Authority, Issued},
    session::SyncState,
    source::{Admission, AdmissionError, Source},
    tls::Peer,
};

/// The most requests in one `Sign` call.
pub const SIGNING_REQUESTS_MAX: usize = 256;
/// How long a node's own certificate lives.
pub const NODE_TTL: Duration = ca::SVID_TTL_MAX;
/// How long an agent may take to say Hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// What the service works with.
pub struct ControlService {
    /// The documents.
    pub source: Arc<dyn Source>,
    /// The agents.
    pub agents: Arc<Agents>,
    /// Who may join.
    pub admission: Arc<dyn Admission>,
    /// Who signs.
    pub authority: Arc<dyn Authority>,
    /// The life of a workload's certificate.
    pub svid_ttl: Duration,
    /// Ends all streams.
    pub stop: CancellationToken,
    /// The streams' tasks.
    pub tasks: TaskTracker,
}

/// The roots as the wire carries them.
pub fn roots(authority: &dyn Authority) -> TrustRoots {
    TrustRoots(authority.bundle().iter().map(|root| root.to_vec()).collect())
}

fn chain(issued: Issued) -> Chain {
    Chain {
        certificates_der: issued.chain.iter().map(|certificate| certificate.to_vec()).collect(),
    }
}

/// The peer of a request, and its node when it has shown a node's certificate.
fn peer<T>(request: &Request<T>) -> Result<Peer, Status> {
    let peer = request.extensions().get::<Peer>().cloned();
    peer.ok_or_else(|| Status::internal("the connection has no peer"))
}

fn node_of(peer: &Peer) -> Result<String, Status> {
    match &peer.node {
        Some(node) => Ok(node.name.clone()),
        None => Err(Status::unauthenticated(
            "this call needs the node's certificate: bootstrap first",
        )),
    }
}

impl ControlService {
    async fn sign_one(&self, node: &str, request: &SigningRequest) -> Result<Issued, String> {
        let identity: SpiffeId = request.identity.parse().map_err(|e| format!("not an identity: {e}"))?;
        if !self.source.current().runs(node, &identity) {
            return Err(format!(
                "node {node} runs no workload of the mesh with the identity {identity}"
            ));
        }
        let request = ca::SigningRequest::new(&request.csr_der, identity, self.svid_ttl).map_err(|e| e.to_string())?;
        let issued = self.authority.sign(&request, SystemTime::now()).await;
        issued.map_err(|e| e.to_string())
    }
}

#[tonic::async_trait]
impl Control for ControlService {
    async fn bootstrap(&self, request: Request<BootstrapRequest>) -> Result<Response<BootstrapResponse>, Status> {
        let peer = peer(&request)?;
        let request = request.into_inner();
        let identity = SpiffeId::node(self.source.trust_domain(), &request.node_name)
            .map_err(|e| Status::invalid_argument(format!("node name {:?}: {e}", request.node_name)))?;
        let joins = !request.join_token.is_empty();
        if !joins {
            if node_of(&peer)? != request.node_name {
                return Err(Status::permission_denied("a node's certificate renews itself only"));
            }
        } else {
            match self.admission.admit(&request.join_token, &request.node_name).await {
                Ok(()) => {}
                Err(AdmissionError::Refused { told, why }) => {
                    tracing::warn!(node = %request.node_name, address = %peer.address, %why, "a join was refused");
                    return Err(Status::permission_denied(told));
                }
                // Not the caller's fault: it tries again.
                Err(error @ AdmissionError::Failed(_)) => {
                    tracing::error!(node = %request.node_name, ?error, "a join cannot be decided");
                    return Err(Status::unavailable(error.to_string()));
                }
            }
        }
        let signing = ca::SigningRequest::new(&request.csr_der, identity, NODE_TTL)
            .map_err(|e| Status::invalid_argument(e.to_string()))?;
        let issued = self
            .authority
            .sign(&signing, SystemTime::now())
            .await
            .map_err(|e| internal("the certificate cannot be signed", &e))?;
        if joins {
            self.agents.joined(&request.node_name);
            tracing::info!(node = %request.node_name, address = %peer.address, "a node has joined");
        }
        Ok(Response::new(BootstrapResponse {
            chain: Some(chain(issued)),
            trust_bundle: Some(roots(&*self.authority).into()),
            trust_domain: self.source.trust_domain().as_str().to_owned(),
        }))
    }

    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        let node = node_of(&peer(&request)?)?;
        let requests = request.into_inner().requests;
        if requests.len() > SIGNING_REQUESTS_MAX {
            return Err(Status::invalid_argument(format!(
                "more than {SIGNING_REQUESTS_MAX} requests"
            )));
        }
        let mut results = Vec::with_capacity(requests.len());
        for request in requests {
            let outcome = match self.sign_one(&node, &request).await {
                Ok(issued) => SigningOutcome::Chain(chain(issued)),
                Err(refusal) => {
                    tracing::warn!(%node, identity = %request.identity, %refusal, "a certificate was refused");
                    SigningOutcome::Refusal(refusal)
                }
            };
            results.push(SigningResult {
                identity: request.identity,
                outcome: Some(outcome),
            });
        }
        Ok(Response::new(SignResponse { results }))
    }

    type SyncStream = Pin<Box<dyn Stream<Item = Result<ControllerMessage, Status>> + Send>>;

    async fn sync(&self, request: Request<Streaming<AgentMessage>>) -> Result<Response<Self::SyncStream>, Status> {
        let peer = peer(&request)?;
        let node = node_of(&peer)?;
        if self.stop.is_cancelled() {
            return Err(Status::unavailable("the controller is stopping"));
        }
        // One update is on its way at a time, so one place is enough.
        let (sender, receiver) = mpsc::channel(1);
        let stream = AgentStream {
            node,
            peer,
            incoming: request.into_inner(),
            outgoing: sender,
            source: self.source.clone(),
            agents: self.agents.clone(),
            authority: self.authority.clone(),
            stop: self.stop.clone(),
        };
        self.tasks.spawn(stream.run());
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

fn internal(what: &str, error: &dyn std::error::Error) -> Status {
    tracing::error!(%error, "{what}");
    Status::internal(what)
}

/// The I/O around a [`SyncState`].
struct AgentStream {
    node: String,
    peer: Peer,
    incoming: Streaming<AgentMessage>,
    outgoing: mpsc::Sender<Result<ControllerMessage, Status>>,
    source: Arc<dyn Source>,
    agents: Arc<Agents>,
    authority: Arc<dyn Authority>,
    stop: CancellationToken,
}

impl AgentStream {
    async fn run(mut self) {
        let outgoing = self.outgoing.clone();
        let node = self.node.clone();
        match self.serve().await {
            Ok(()) => tracing::info!(%node, "an agent's stream has ended"),
            Err(status) => {
                tracing::warn!(%node, reason = status.message(), "an agent's stream was ended");
                // An agent that does not read its stream need not be told why it ended.
                let _ = outgoing.try_send(Err(status));
            }
        }
    }

    async fn hello(&mut self) -> Result<(Session, SyncState), Status> {
        let first = tokio::time::timeout(HELLO_TIMEOUT, self.incoming.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no Hello"))??;
        let report = first.map(Report::try_from).transpose();
        let Ok(Some(Report::Hello {
            node,
            agent_version,
            resume,
            stamp,
            abi_version,
        })) = report
        else {
            return Err(Status::invalid_argument("the first message must be Hello"));
        };
        if node != self.node {
            return Err(Status::permission_denied(format!(
                "Hello of node {node} with the certificate of node {}",
                self.node
            )));
        }
        // What it holds was numbered by a store that this one was restored in place of.
        let mut another = false;
        let base = match self.agents.take_joined(&node) {
            // What it holds may have been numbered by a store that is gone.
            true => None,
            false if !self.source.is_lasting() && !self.agents.has_acked(&node, resume) => None,
            false => {
                let source = self.source.clone();
                let base = tokio::task::spawn_blocking(move || source.compiled_at(resume)).await;
                let base = base.map_err(|e| internal("the revision cannot be rebuilt", &e))?;
                another = stamp != 0 && base.as_ref().is_some_and(|base| base.stamp != stamp);
                base.filter(|_| !another)
            }
        };
        tracing::info!(%node, %agent_version, held = %resume, resumes = base.is_some(), "an agent has connected");
        let held = if another {
            tracing::error!(%node, held = %resume, "an agent holds another revision of this number: was the store restored?");
            Revision(0)
        } else if resume <= self.source.summary().revision {
            resume
        } else {
            self.source.outrun(resume);
            Revision(0)
        };
        let session = self.agents.connect(
            &node,
            (agent_version, abi_version, held),
            self.peer.address.clone(),
            self.peer.node.as_ref().map(|node| node.expires),
            SystemTime::now(),
        );
        Ok((session, SyncState::new(&node, self.source.trust_domain().clone(), base)))
    }

    async fn serve(&mut self) -> Result<(), Status> {
        let (session, mut state) = self.hello().await?;
        let mut published = self.source.published();
        loop {
            let newest = published.borrow_and_update().clone();
            if let Some(newest) = newest
                && let Some(update) = state.next(&newest, &roots(&*self.authority))
            {
                // The place is free: the update before was answered, so it was taken.
                if self.outgoing.try_send(Ok(ControllerMessage::from(&update))).is_err() {
                    return Ok(());
                }
            }
            tokio::select! {
                message = self.incoming.message() => match message? {
                    None => return Ok(()),
                    // A newer agent's.
                    Some(message) if message.is_unknown() => {}
                    Some(message) => handle(&session, &mut state, message)?,
                },
                _ = published.changed() => {}
                () = session.superseded() => return Err(Status::aborted("the same node has connected again")),
                () = self.stop.cancelled() => return Err(Status::unavailable("the controller is stopping")),
                () = self.outgoing.closed() => return Ok(()),
            }
        }
    }
}

fn handle(session: &Session, state: &mut SyncState, message: AgentMessage) -> Result<(), Status> {
    let now = SystemTime::now();
    let unexpected = |e: super::session::UnexpectedAnswer| Status::failed_precondition(e.to_string());
    match Report::try_from(message).map_err(|e| Status::invalid_argument(e.to_string()))? {
        Report::Hello { .. } => return Err(Status::invalid_argument("a second Hello")),
        Report::Ack(revision) => {
            state.acked(revision).map_err(unexpected)?;
            session.acked(revision, now);
        }
        Report::Nack { revision, reason } => {
            state.nacked(revision).map_err(unexpected)?;
            tracing::warn!(%revision, %reason, "an agent refused a revision");
            session.nacked(revision, &reason, now);
        }
        Report::Status { pods, certificates } => session.reported(pods, certificates, now),
    }
    Ok(())
}
