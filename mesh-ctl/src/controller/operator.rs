//! The `Operator` service: documents in and out, status, tokens.
//!
//! Whoever may open its door (a Unix socket of mode 0600, or in a cluster a port that only a port-forward reaches) runs
//! the mesh; there is no further question who calls. Everything that
//! touches the disk runs beside the runtime. An apply is acknowledged only when it is on disk.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_api::{
    document::{Problem, parse},
    identity::SpiffeId,
    wire::operator::{
        ApplyRequest, ApplyResponse, BundleRequest, DeleteRequest, DeleteResponse, DocumentChange, DocumentKey,
        GetRequest, GetResponse, IssueJoinTokenRequest, IssueJoinTokenResponse, Operator, Problem as WireProblem,
        StatusRequest, StatusResponse, StoredDocument, TrustBundle, WaitAckedRequest, WaitAckedResponse,
    },
    workload::Revision,
};
use tonic::{Request, Response, Status};

use super::{
    agents::Agents,
    ca::{self, Authority},
    control,
    source::{Admission, Outcome, Source, SourceError, key_parts, text_key},
    tls::Tls,
    unix_seconds,
};

/// The life of a join token when the operator asks for none.
pub const TOKEN_TTL_DEFAULT: Duration = Duration::from_secs(24 * 3600);
/// The longest life that a token may be given.
pub const TOKEN_TTL_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
/// The longest wait for agents.
const WAIT_MAX: Duration = Duration::from_secs(3600);

/// What the service works with.
pub struct OperatorService {
    /// The documents.
    pub source: Arc<dyn Source>,
    /// The agents.
    pub agents: Arc<Agents>,
    /// Who may join.
    pub admission: Arc<dyn Admission>,
    /// The roots.
    pub authority: Arc<dyn Authority>,
    /// The serving certificate.
    pub tls: Arc<Tls>,
}

fn status_of(error: SourceError) -> Status {
    match error {
        SourceError::Failed(text) => {
            tracing::error!(error = %text, "an operator's request failed");
            Status::internal(text)
        }
        SourceError::NotHere(text) => Status::failed_precondition(text),
    }
}

async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SourceError> + Send + 'static,
) -> Result<T, Status> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(status_of),
        Err(error) => Err(Status::internal(format!("the request failed: {error}"))),
    }
}

fn wire_key(key: &str) -> DocumentKey {
    let (kind, namespace, name) = key_parts(key);
    DocumentKey {
        kind: kind.to_owned(),
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    }
}

fn problems(outcome: &Outcome) -> Vec<WireProblem> {
    let wrong = outcome.problems.iter().map(|problem| WireProblem::of(problem, false));
    let odd = outcome.warnings.iter().map(|problem| WireProblem::of(problem, true));
    wrong.chain(odd).collect()
}

fn changes(outcome: &Outcome) -> Vec<DocumentChange> {
    let changes = outcome.changes.iter();
    changes.map(|(key, change)| DocumentChange::of(key, *change)).collect()
}

fn unix(time: Option<SystemTime>) -> i64 {
    time.map_or(0, |time| unix_seconds(time) as i64)
}

impl OperatorService {
    fn nodes(&self) -> Vec<String> {
        let (_, documents) = self.source.documents("Node", "", "");
        documents.iter().map(|kept| key_parts(&kept.key).2.to_owned()).collect()
    }
}

#[tonic::async_trait]
impl Operator for OperatorService {
    async fn apply(&self, request: Request<ApplyRequest>) -> Result<Response<ApplyResponse>, Status> {
        let request = request.into_inner();
        let sources: Vec<_> = request.sources.into_iter().map(|s| (s.name, s.yaml)).collect();
        let source = self.source.clone();
        let outcome = on_disk(move || source.apply(&sources, request.dry_run, SystemTime::now())).await?;
        Ok(Response::new(ApplyResponse {
            revision: outcome.revision.0,
            changes: changes(&outcome),
            problems: problems(&outcome),
        }))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let request = request.into_inner();
        let (revision, found) = self.source.documents(&request.kind, &request.namespace, &request.name);
        let documents = found.into_iter().map(|kept| StoredDocument {
            key: Some(wire_key(&kept.key)),
            generation: kept.generation,
            revision: kept.revision,
            json: kept.document.to_string(),
            unreadable: kept.unreadable,
            holding_json: kept.holding.map(|document| document.to_string()).unwrap_or_default(),
        });
        Ok(Response::new(GetResponse {
            revision: revision.0,
            documents: documents.collect(),
        }))
    }

    async fn delete(&self, request: Request<DeleteRequest>) -> Result<Response<DeleteResponse>, Status> {
        let request = request.into_inner();
        let mut wrong: Vec<Problem> = Vec::new();
        let mut keys: Vec<String> = request
            .keys
            .iter()
            .map(|key| text_key(&key.kind, &key.namespace, &key.name))
            .collect();
        for source in &request.sources {
            match parse(&source.name, &source.yaml) {
                Ok(documents) => keys.extend(documents.iter().map(|document| {
                    let key = document.key();
                    text_key(key.kind.as_str(), &key.namespace, &key.name)
                })),
                Err(found) => wrong.extend(found),
            }
        }
        let outcome = if wrong.is_empty() {
            let source = self.source.clone();
            on_disk(move || source.delete(&keys, request.dry_run, SystemTime::now())).await?
        } else {
            Outcome {
                revision: self.source.summary().revision,
                problems: wrong,
                ..Outcome::default()
            }
        };
        Ok(Response::new(DeleteResponse {
            revision: outcome.revision.0,
            changes: changes(&outcome),
            problems: problems(&outcome),
        }))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let summary = self.source.summary();
        let (unreadable, withheld) = self.source.unreadable();
        let root = self.authority.bundle().first().and_then(ca::not_after);
        let unreadable = unreadable.into_iter().map(|document| StoredDocument {
            key: Some(wire_key(&document.key)),
            unreadable: document.why,
            ..StoredDocument::default()
        });
        Ok(Response::new(StatusResponse {
            controller_version: env!("CARGO_PKG_VERSION").to_owned(),
            trust_domain: self.source.trust_domain().as_str().to_owned(),
            revision: summary.revision.0,
            revision_made_unix: unix(Some(summary.made)),
            ca_expires_unix: unix(root),
            documents: u32::try_from(summary.documents).unwrap_or(u32::MAX),
            nodes: self.agents.list(self.nodes()),
            unreadable: unreadable.collect(),
            withheld,
            serving_expires_unix: unix(Some(self.tls.expires())),
        }))
    }

    async fn wait_acked(&self, request: Request<WaitAckedRequest>) -> Result<Response<WaitAckedResponse>, Status> {
        let request = request.into_inner();
        let revision = Revision(request.revision);
        let patience = Duration::from_millis(request.timeout_ms.into()).min(WAIT_MAX);
        let mut changes = self.agents.subscribe();
        let answered = async {
            loop {
                changes.borrow_and_update();
                if self.agents.progress(revision).waiting_for.is_empty() {
                    return;
                }
                if changes.changed().await.is_err() {
                    return;
                }
            }
        };
        // What came of it is read afresh either way.
        let _ = tokio::time::timeout(patience, answered).await;
        let progress = self.agents.progress(revision);
        Ok(Response::new(WaitAckedResponse {
            acked: progress.waiting_for.is_empty() && progress.nacked.is_empty(),
            waiting_for: progress.waiting_for,
            nacked: progress.nacked,
        }))
    }

    async fn issue_join_token(
        &self,
        request: Request<IssueJoinTokenRequest>,
    ) -> Result<Response<IssueJoinTokenResponse>, Status> {
        let request = request.into_inner();
        SpiffeId::node(self.source.trust_domain(), &request.node)
            .map_err(|e| Status::invalid_argument(format!("node name {:?}: {e}", request.node)))?;
        let ttl = match request.valid_for_seconds {
            0 => TOKEN_TTL_DEFAULT,
            seconds => Duration::from_secs(seconds.into()),
        };
        if ttl > TOKEN_TTL_MAX {
            let days = TOKEN_TTL_MAX.as_secs() / 86400;
            return Err(Status::invalid_argument(format!("a token lives {days} days at most")));
        }
        let (admission, now) = (self.admission.clone(), SystemTime::now());
        let join_token = on_disk(move || admission.issue(&request.node, ttl, now)).await?;
        Ok(Response::new(IssueJoinTokenResponse {
            join_token,
            expires_unix: unix(Some(now + ttl)),
        }))
    }

    async fn bundle(&self, _: Request<BundleRequest>) -> Result<Response<TrustBundle>, Status> {
        Ok(Response::new(control::roots(&*self.authority).into()))
    }
}
