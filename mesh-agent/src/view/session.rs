//! The I/O around [`super::sync::step`]: does what the actions say, feeds back what happened.
//!
//! Runs on the control thread for the agent's whole life. It owns the node's certificate and the last good snapshot;
//! it is the only writer of the view. What it cannot do now it tries again later, and the agent serves meanwhile.

use std::{
    collections::VecDeque,
    future::Future,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use mesh_api::{
    document::{Resource, ResourceKey},
    identity::{IdentityError, SpiffeId, TrustDomain},
    view::{View, ViewCompiler},
    wire::{CertificateReport, PodReport, Report, TrustRoots, Update, control::ControllerMessage},
};
use parking_lot::Mutex;
use rustls::pki_types::CertificateDer;
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};

use super::{
    Published, ViewStore,
    controller::{self, ControllerClient, Link, LinkError},
    node::{self, NodeCredential},
    snapshot,
    sync::{Action, Greeting, Held, Input, State, step},
};
use crate::{
    event::{Event, Events, Samples, Source},
    identity::TrustBundle,
};

/// Messages that may wait for the stream. One update is on its way at a time; status is bounded by its rate.
const OUTGOING_MAX: usize = 16;
/// The least time between two status messages.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);
/// How often the snapshot on disk is looked at while there is no stream: another generation may write it.
const FOLLOW_INTERVAL: Duration = Duration::from_secs(1);
/// Endpoints alone are written to disk no sooner than after so many times what the last writing took: a large mesh would
/// be written by the second otherwise. Whatever else changes is written at once.
const SAVE_PAUSE: u32 = 50;
/// The wait after a writing that failed, unless something newer is to be written before.
const SAVE_RETRY: Duration = Duration::from_secs(5);
/// The wait after a renewal of the node's certificate failed.
const RENEWAL_RETRY: Duration = Duration::from_secs(10);

/// Where the controller is and how it is believed.
#[derive(Clone, Debug)]
pub struct ControllerConfig {
    /// `host:port` of its gRPC service.
    pub address: String,
    /// A PEM file with the roots that its certificate must lead to.
    pub trust_bundle: PathBuf,
    /// A file with the token that admits this node when it has no certificate yet.
    pub join_token_file: Option<PathBuf>,
    /// Time for a connection and its handshake.
    pub connect_timeout: Duration,
    /// Time for one answer.
    pub call_timeout: Duration,
    /// The longest wait between two attempts.
    pub retry_max: Duration,
}

/// What the session is built from.
#[derive(Clone, Debug)]
pub struct SyncConfig {
    /// The node's name.
    pub node: String,
    /// The trust domain.
    pub trust_domain: TrustDomain,
    /// Where the node's certificate and the snapshot live.
    pub state_dir: PathBuf,
    /// Where the controller is.
    pub controller: ControllerConfig,
    /// The ABI of the kernel programs.
    pub abi_version: u32,
}

/// Why a session cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    /// The node's name makes no identity.
    #[error("the node's name: {0}")]
    Node(#[from] IdentityError),
    /// Nobody could be believed.
    #[error("no trust bundle: {0}")]
    Bundle(String),
    /// The state directory cannot be used.
    #[error("state directory {}: {error}", path.display())]
    StateDir {
        /// Which.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
}

/// What the agent reports of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AgentReport {
    /// Its pods.
    pub pods: Vec<PodReport>,
    /// Its credentials.
    pub certificates: Vec<CertificateReport>,
}

/// How the session stands, for readiness, metrics and the admin socket.
#[derive(Debug, Default)]
pub struct SyncHealth {
    connected: AtomicBool,
    revision: AtomicU64,
    resources: AtomicUsize,
    node_expires_unix: AtomicI64,
    last_failure: Mutex<String>,
}

impl SyncHealth {
    /// Whether the stream is open.
    pub fn connected(&self) -> bool {
        self.connected.load(Relaxed)
    }
    /// The revision that is served; 0 is none.
    pub fn revision(&self) -> u64 {
        self.revision.load(Relaxed)
    }
    /// The resources of that revision.
    pub fn resources(&self) -> usize {
        self.resources.load(Relaxed)
    }
    /// When the node's certificate ends, in seconds since 1970; 0 if there is none.
    pub fn node_expires_unix(&self) -> i64 {
        self.node_expires_unix.load(Relaxed)
    }
    /// Why the stream is down, or was last.
    pub fn last_failure(&self) -> String {
        self.last_failure.lock().clone()
    }
}

impl Source for Arc<SyncHealth> {
    fn collect(&self, samples: &mut Samples) {
        let connected = f64::from(u8::from(self.connected()));
        samples.gauge(
            "nodemesh_agent_controller_connected",
            "Whether the controller's stream is open",
            [],
            connected,
        );
        samples.gauge(
            "nodemesh_agent_view_revision",
            "The revision that is served",
            [],
            self.revision() as f64,
        );
        samples.gauge(
            "nodemesh_agent_view_resources",
            "Resources of the revision that is served",
            [],
            self.resources() as f64,
        );
        samples.gauge(
            "nodemesh_agent_node_certificate_expiry_timestamp_seconds",
            "When the node's own certificate ends; 0 without one",
            [],
            self.node_expires_unix() as f64,
        );
    }
}

/// The session with the controller.
pub struct ViewSync {
    config: SyncConfig,
    link: Arc<Link>,
    events: Arc<Events>,
    views: Arc<ViewStore>,
    health: Arc<SyncHealth>,
    state: State,
    /// Who judges the controller: the roots of the file and those of the newest revision.
    verifying: Arc<TrustBundle>,
    /// Who judges workloads: the roots of the newest revision; those of the file until there is one.
    workload_bundle: watch::Sender<Arc<TrustBundle>>,
    credential: Option<NodeCredential>,
    client: ControllerClient,
    stand_back: Pin<Box<dyn Future<Output = ()>>>,
    compiler: ViewCompiler,
    /// What is on disk, as far as this process wrote it; what is to be written, and when that is due.
    saved: Option<Arc<Held>>,
    unsaved: Option<Arc<Held>>,
    save_due: Instant,
    /// Whether what is unsaved could not be written: then only time makes it due.
    save_failed: bool,
    before: Box<dyn Fn(&View)>,
    /// When the snapshot on disk was written that was looked at last.
    seen: Option<SystemTime>,
}

/// One open stream.
struct Open {
    outgoing: mpsc::Sender<mesh_api::wire::control::AgentMessage>,
    incoming: Streaming<ControllerMessage>,
}

impl ViewSync {
    /// Loads what the state directory has: from then on the store shows the last good view, if there is one.
    pub fn open(config: SyncConfig, events: Arc<Events>) -> Result<ViewSync, SyncError> {
        std::fs::create_dir_all(&config.state_dir).map_err(|error| SyncError::StateDir {
            path: config.state_dir.clone(),
            error,
        })?;
        let seen = written(&config.state_dir);
        let held = match snapshot::load(&config.state_dir, &config.trust_domain) {
            Ok(held) => held,
            Err(error) => {
                let reason = format!("{}: {error}", snapshot::path(&config.state_dir).display());
                events.emit(Event::SnapshotUnusable { reason });
                None
            }
        };
        let roots = held.as_ref().map(|held| held.roots.0.as_slice()).unwrap_or_default();
        let verifying =
            node::bundle(&config.controller.trust_bundle, roots, &config.trust_domain).map_err(SyncError::Bundle)?;
        let link = Arc::new(Link {
            address: config.controller.address.clone(),
            node: SpiffeId::node(&config.trust_domain, &config.node)?,
            controller: SpiffeId::controller(&config.trust_domain),
            connect_timeout: config.controller.connect_timeout,
            call_timeout: config.controller.call_timeout,
        });
        let workloads = held
            .as_ref()
            .and_then(|held| bundle_of(&held.roots, &config.trust_domain).ok())
            .unwrap_or_else(|| verifying.clone());
        let workload_bundle = watch::Sender::new(workloads);
        let credential = match NodeCredential::load(&config.state_dir, &link.node, &verifying, SystemTime::now()) {
            Ok(credential) => credential,
            Err(error) => {
                let reason = format!("the one on disk is of no use: {error}");
                events.emit(Event::NodeCertificateFailed { reason });
                None
            }
        };
        let greeting = Greeting {
            node: config.node.clone(),
            trust_domain: config.trust_domain.clone(),
            version: env!("CARGO_PKG_VERSION"),
            abi_version: config.abi_version,
        };
        let client = ControllerClient {
            link: link.clone(),
            channel: Arc::default(),
            bundle: workload_bundle.subscribe(),
        };
        let mut sync = ViewSync {
            compiler: ViewCompiler::new(Some(&config.node)),
            saved: held.clone(),
            unsaved: None,
            save_due: Instant::now(),
            save_failed: false,
            views: Arc::new(Published::new(View::empty(config.trust_domain.clone()))),
            health: Arc::default(),
            state: State::new(greeting, held.clone(), config.controller.retry_max),
            config,
            link,
            events,
            verifying,
            workload_bundle,
            credential,
            client,
            stand_back: Box::pin(std::future::pending()),
            before: Box::new(|_| {}),
            seen,
        };
        sync.note_credential();
        if let Some(held) = held {
            sync.publish(&held);
            sync.events.emit(Event::SnapshotLoaded {
                revision: held.revision,
            });
        }
        Ok(sync)
    }

    /// Where the view is published.
    pub fn views(&self) -> Arc<ViewStore> {
        self.views.clone()
    }

    /// The signer for workloads' certificates.
    pub fn client(&self) -> ControllerClient {
        self.client.clone()
    }

    /// The bundle that workloads are judged by, as it changes.
    pub fn bundle(&self) -> watch::Receiver<Arc<TrustBundle>> {
        self.workload_bundle.subscribe()
    }

    /// How the session stands.
    pub fn health(&self) -> Arc<SyncHealth> {
        self.health.clone()
    }

    /// Once that resolves, another generation of this agent has the stream: this one makes none any more, and follows what
    /// the other one saves.
    pub fn stand_back_when(mut self, when: impl Future<Output = ()> + 'static) -> ViewSync {
        self.stand_back = Box::pin(when);
        self
    }

    /// Does that with every view before it is published, and before the controller is told that it holds.
    pub fn before_publishing(mut self, before: impl Fn(&View) + 'static) -> ViewSync {
        self.before = Box::new(before);
        self
    }

    /// Keeps the session up. Ends only when dropped.
    pub async fn run(mut self, mut reports: watch::Receiver<AgentReport>) {
        let mut inputs = VecDeque::from([Input::Due]);
        let mut open: Option<Open> = None;
        let mut due: Option<Instant> = None;
        let mut renewal = self.renewal_due(None);
        let mut status_at = Instant::now();
        let mut reporting = true;
        let mut follow = tokio::time::interval(FOLLOW_INTERVAL);
        let mut stands_back = false;
        reports.mark_changed();
        loop {
            while let Some(input) = inputs.pop_front() {
                let (state, actions) = step(self.state.clone(), input, rand::random());
                self.state = state;
                for action in actions {
                    match action {
                        Action::Connect(hello) => {
                            let connected = self.connect(hello).await;
                            // The credential may be new.
                            renewal = self.renewal_due(None);
                            match connected {
                                Ok(stream) => {
                                    open = Some(stream);
                                    self.health.connected.store(true, Relaxed);
                                    let address = self.link.address.clone();
                                    inputs.push_back(Input::Connected { address });
                                }
                                Err(error) => inputs.push_back(self.lost(error.to_string())),
                            }
                        }
                        Action::Disconnect => {
                            open = None;
                            self.health.connected.store(false, Relaxed);
                            self.client.channel.lock().take();
                        }
                        Action::Send(report) => {
                            if let Some(stream) = &open
                                && stream.outgoing.try_send(report.into()).is_err()
                            {
                                // Sixteen messages wait and none leaves: the stream is dead.
                                inputs.push_back(self.lost("the stream takes nothing more".to_owned()));
                            }
                        }
                        Action::Publish(held) => self.publish(&held),
                        Action::Trust(roots) => self.trust(&roots),
                        Action::Save(held) => {
                            self.unsaved = Some(held);
                            self.save_failed = false;
                        }
                        Action::Wait(wait) => due = Some(Instant::now() + wait),
                        Action::Tell(event) => self.events.emit(event),
                    }
                }
            }
            self.save_if_due().await;
            tokio::select! {
                () = until(Some(self.save_due)), if self.unsaved.is_some() => {}
                input = receive(&mut open, &self.config.trust_domain), if open.is_some() => {
                    inputs.push_back(match input {
                        Input::Lost { reason } => self.lost(reason),
                        input => input,
                    });
                }
                () = &mut self.stand_back, if !stands_back => {
                    stands_back = true;
                    due = None;
                    inputs.push_back(Input::StandBack);
                }
                _ = follow.tick(), if open.is_none() => {
                    inputs.extend(self.found().await.map(Input::Found));
                }
                () = until(due), if due.is_some() && !stands_back => {
                    due = None;
                    inputs.push_back(Input::Due);
                }
                changed = changed_after(&mut reports, status_at), if reporting => {
                    // Without a reporter there is nothing more to tell, but the session goes on.
                    reporting = changed;
                    status_at = Instant::now() + STATUS_INTERVAL;
                    let AgentReport { pods, certificates } = reports.borrow_and_update().clone();
                    inputs.push_back(Input::Status(Report::Status { pods, certificates }));
                }
                () = until(renewal), if renewal.is_some() && open.is_some() => {
                    renewal = match self.renew().await {
                        Ok(()) => {
                            inputs.push_back(Input::Renewed);
                            self.renewal_due(None)
                        }
                        Err(error) => {
                            let reason = error.to_string();
                            self.events.emit(Event::NodeCertificateFailed { reason });
                            self.renewal_due(Some(RENEWAL_RETRY))
                        }
                    };
                }
            }
        }
    }

    /// What another generation has saved since the snapshot was looked at last.
    async fn found(&mut self) -> Option<Arc<Held>> {
        let now = written(&self.config.state_dir);
        if now == self.seen {
            return None;
        }
        self.seen = now;
        let (state_dir, trust_domain) = (self.config.state_dir.clone(), self.config.trust_domain.clone());
        let loaded = tokio::task::spawn_blocking(move || snapshot::load(&state_dir, &trust_domain)).await;
        // One that is of no use is told of at the start; here the last good one stays.
        loaded.ok()?.ok()?
    }

    fn lost(&self, reason: String) -> Input {
        reason.clone_into(&mut self.health.last_failure.lock());
        Input::Lost { reason }
    }

    /// Joins if need be, connects, and opens the stream with the hello as its first message.
    async fn connect(&mut self, hello: Report) -> Result<Open, LinkError> {
        let now = SystemTime::now();
        if self
            .credential
            .as_ref()
            .is_none_or(|credential| credential.expires() <= now)
        {
            self.join(now).await?;
        }
        let channel = self
            .link
            .connect(self.verifying.clone(), self.credential.as_ref())
            .await?;
        let (outgoing, messages) = mpsc::channel(OUTGOING_MAX);
        // The channel is empty and has room for the hello.
        let _ = outgoing.try_send(hello.into());
        let call = controller::client(channel.clone())
            .sync(ReceiverStream::new(messages))
            .await;
        let incoming = call.map_err(|status| LinkError::Call(Box::new(status)))?.into_inner();
        *self.client.channel.lock() = Some(channel);
        Ok(Open { outgoing, incoming })
    }

    async fn join(&mut self, now: SystemTime) -> Result<(), LinkError> {
        let file = self
            .config
            .controller
            .join_token_file
            .as_ref()
            .ok_or(LinkError::NoToken)?;
        let token = std::fs::read_to_string(file).map_err(LinkError::Token)?;
        let channel = self.link.connect(self.verifying.clone(), None).await?;
        let credential = self.link.bootstrap(channel, token.trim(), &self.verifying, now).await?;
        self.take_credential(credential, now)
    }

    async fn renew(&mut self) -> Result<(), LinkError> {
        let now = SystemTime::now();
        let channel: Option<Channel> = self.client.channel.lock().clone();
        let channel = channel.ok_or_else(|| LinkError::Connect("there is no connection".to_owned()))?;
        let credential = self.link.bootstrap(channel, "", &self.verifying, now).await?;
        self.take_credential(credential, now)
    }

    fn take_credential(&mut self, credential: NodeCredential, now: SystemTime) -> Result<(), LinkError> {
        // One that cannot be kept is used all the same: the next start joins anew.
        if let Err(error) = credential.save(&self.config.state_dir) {
            let reason = format!("cannot keep it: {error}");
            self.events.emit(Event::NodeCertificateFailed { reason });
        }
        let valid_for = credential.expires().duration_since(now).unwrap_or_default();
        self.credential = Some(credential);
        self.note_credential();
        self.events.emit(Event::NodeCertificateIssued { valid_for });
        Ok(())
    }

    fn note_credential(&self) {
        let expires = self.credential.as_ref().and_then(|credential| {
            let since = credential.expires().duration_since(SystemTime::UNIX_EPOCH).ok()?;
            i64::try_from(since.as_secs()).ok()
        });
        self.health.node_expires_unix.store(expires.unwrap_or(0), Relaxed);
    }

    /// When to renew the node's certificate, not before `at_least` from now.
    fn renewal_due(&self, at_least: Option<Duration>) -> Option<Instant> {
        let credential = self.credential.as_ref()?;
        let wait = credential
            .renew_at(rand::random())
            .duration_since(SystemTime::now())
            .unwrap_or_default();
        Some(Instant::now() + wait.max(at_least.unwrap_or(Duration::from_secs(1))))
    }

    fn publish(&mut self, held: &Held) {
        let view = self
            .compiler
            .compile(&held.trust_domain, held.revision, &held.resources);
        (self.before)(&view);
        self.views.publish(Arc::new(view));
        self.health.revision.store(held.revision.0, Relaxed);
        self.health.resources.store(held.resources.len(), Relaxed);
    }

    fn trust(&mut self, roots: &TrustRoots) {
        // Both were parsed before the update was judged, except for the file, which may have changed since.
        if let Ok(bundle) = bundle_of(roots, &self.config.trust_domain) {
            self.workload_bundle.send_replace(bundle);
        }
        match node::bundle(
            &self.config.controller.trust_bundle,
            &roots.0,
            &self.config.trust_domain,
        ) {
            Ok(bundle) => self.verifying = bundle,
            Err(reason) => self.events.emit(Event::Internal {
                what: "trust bundle",
                reason,
            }),
        }
    }

    async fn save_if_due(&mut self) {
        let now = Instant::now();
        let saved = self.saved.as_deref();
        let waits = self.save_failed;
        let Some(held) = self
            .unsaved
            .take_if(|held| now >= self.save_due || !waits && !saved.is_some_and(|saved| is_alike(saved, held)))
        else {
            return;
        };
        let (state_dir, writing) = (self.config.state_dir.clone(), held.clone());
        let written = tokio::task::spawn_blocking(move || snapshot::save(&state_dir, &writing)).await;
        self.save_due = Instant::now() + now.elapsed() * SAVE_PAUSE;
        let reason = match written {
            Ok(Ok(())) => {
                self.saved = Some(held);
                self.save_failed = false;
                return;
            }
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        self.events.emit(Event::SnapshotUnwritten { reason });
        self.unsaved = Some(held);
        self.save_failed = true;
        self.save_due = Instant::now() + SAVE_RETRY;
    }
}

/// Whether two revisions differ in endpoints only: an agent that starts by the older one guards the same by the same rules.
pub(super) fn is_alike(saved: &Held, held: &Held) -> bool {
    let mut alike = saved.roots == held.roots && saved.trust_domain == held.trust_domain;
    held.resources.differences(&saved.resources, |key, now| {
        alike &= match key {
            ResourceKey::Workload(_) => match (saved.resources.get(key), now) {
                (Some(Resource::Workload(was)), Some(Resource::Workload(is))) => {
                    was.enrolled == is.enrolled && was.labels == is.labels && was.identity == is.identity
                }
                _ => true,
            },
            ResourceKey::Service(_) => now.is_some() && saved.resources.contains_key(key),
            ResourceKey::Policy(_) => false,
        };
    });
    alike
}

fn bundle_of(roots: &TrustRoots, trust_domain: &TrustDomain) -> Result<Arc<TrustBundle>, String> {
    let roots = roots.0.iter().cloned().map(CertificateDer::from).collect();
    TrustBundle::new(trust_domain.clone(), roots)
        .map(Arc::new)
        .map_err(|error| error.to_string())
}

/// The next thing that the stream brings.
async fn receive(open: &mut Option<Open>, trust_domain: &TrustDomain) -> Input {
    let Some(stream) = open else {
        return std::future::pending().await;
    };
    let message = loop {
        match stream.incoming.message().await {
            // A newer controller's; an answer to what it did not ask for would cost the stream.
            Ok(Some(message)) if message.is_unknown() => {}
            Ok(Some(message)) => break message,
            Ok(None) => {
                return Input::Lost {
                    reason: "the controller ended the stream".to_owned(),
                };
            }
            Err(status) if status.code() == tonic::Code::Aborted => {
                return Input::Replaced {
                    reason: status.message().to_owned(),
                };
            }
            Err(status) => {
                return Input::Lost {
                    reason: format!("{}: {}", status.code().description(), status.message()),
                };
            }
        }
    };
    let revision = message.revision();
    let garbled = |reason: String| Input::Garbled { revision, reason };
    let update = match Update::try_from(message) {
        Ok(update) => update,
        Err(error) => return garbled(error.to_string()),
    };
    let roots = match &update {
        Update::Snapshot { trust_roots, .. } => Some(trust_roots),
        Update::Delta { trust_roots, .. } => trust_roots.as_ref(),
    };
    match roots.map(|roots| bundle_of(roots, trust_domain)) {
        Some(Err(reason)) => garbled(reason),
        _ => Input::Update(Box::new(update)),
    }
}

/// When the snapshot was written.
fn written(state_dir: &Path) -> Option<SystemTime> {
    std::fs::metadata(snapshot::path(state_dir)).ok()?.modified().ok()
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Waits for a change, but not before `at`. `false`: there will be none any more.
async fn changed_after(reports: &mut watch::Receiver<AgentReport>, at: Instant) -> bool {
    tokio::time::sleep_until(at).await;
    reports.changed().await.is_ok()
}
