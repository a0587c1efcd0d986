//! The composition root: the one file that knows every part of the agent.
//!
//! The control thread attaches the kernel programs, keeps the view, the credentials and the pods, and answers on the
//! admin ports. Data workers are threads of their own; it speaks to them by commands. At the end listeners close, what
//! runs may finish, and the kernel side stays pinned: pods remain guarded until the next agent comes.

use std::{
    collections::BTreeSet,
    io,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result};
use mesh_api::{
    identity::SpiffeId,
    wire::{CertificateReport, PodReport},
    workload::{ObjectName, Revision, Workload},
};
use serde_json::json;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot, watch},
};

use crate::{
    admin::{self, Admin, Check},
    capture::{self, COMMANDS_MAX},
    config::AgentConfig,
    drain::{self, Drain},
    event::{AccessLog, Event, Events, EventsConfig, Samples},
    identity::{CredentialStore, TrustBundle, issue::Issuer, keep::Keep},
    kernel::{self, Kernel, KernelConfig, memory::Memory, node_addresses},
    net::{self, SystemClock},
    path::direct::Direct,
    pods::{self, CaptureTimes, Discovery, GateConfig, Leave, Netns, PodStatus, Pods, Sandboxes, WorkerCommand},
    traffic::{Traffic, breaker::BreakerState},
    view::{AgentReport, SyncConfig, SyncHealth, ViewStore, ViewSync},
    worker::Shared,
};

/// How long a pod that could not be captured waits for another try.
const POD_RETRY: Duration = Duration::from_secs(1);
/// How often it is asked whom the kernel refused as a stranger.
const STRANGERS_LOOK: Duration = Duration::from_millis(250);
/// How often direct connections that have ended are told of: before the kernel's queue of them is full at the rate that
/// a node can connect.
const DIRECT_LOOK: Duration = Duration::from_millis(200);
/// How often the keeper is looked after.
const KEEPER_LOOK: Duration = Duration::from_secs(1);
/// How long a keeper may take to be there at the start: what it holds must not be made a second time.
const KEEPER_START: Duration = Duration::from_secs(5);
/// How often series of gone peers are looked for, and the report to the controller is refreshed.
const HOUSEKEEPING: Duration = Duration::from_secs(30);
/// How often memory is looked after: a burst's leavings go soon, and the start's when it is over.
const MEMORY_LOOK: Duration = Duration::from_secs(10);

/// Runs the agent until it is asked to end.
pub fn run(config: AgentConfig) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, serve(config))
}

async fn serve(config: AgentConfig) -> Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let events = open_events(&config)?;

    let kernel = Kernel::attach(&KernelConfig {
        cgroup: config.kernel.cgroup.clone(),
        pin_dir: config.pin_dir(),
        fail_mode: config.kernel.fail_mode,
        node_addresses: node_addresses().context("this node's addresses")?,
        home: Netns::current().context("this node's network namespace")?.cookie(),
        debug: config.kernel.debug,
    });
    let kernel = Arc::new(kernel.context("attaching the kernel programs")?);
    events.emit(Event::KernelAttached {
        reused: kernel.resumed(),
    });

    let sync = ViewSync::open(
        SyncConfig {
            node: config.node.clone(),
            trust_domain: config.trust_domain.clone(),
            state_dir: config.state_dir.clone(),
            controller: config.controller.clone(),
            abi_version: mesh_abi::ABI_VERSION,
        },
        events.clone(),
    )?;
    let (view, health) = (sync.views(), sync.health());
    let credentials = CredentialStore::new();
    let traffic = Traffic::new();

    let (senders, receivers): (Vec<_>, Vec<_>) = (0..config.workers).map(|_| mpsc::channel(COMMANDS_MAX)).unzip();
    let (pods, sandboxes) = discover(&config, &kernel, open_pods(&config, &kernel, &senders).await?)?;
    let (trigger, drain) = drain::channel();
    let shared = Arc::new(Shared {
        node: config.node.as_str().into(),
        view: view.clone(),
        kernel: kernel.clone(),
        credentials: credentials.clone(),
        traffic: traffic.clone(),
        events: events.clone(),
        pods: pods.directory(),
        drain: drain.clone(),
        config: config
            .path
            .within(net::raise_descriptors(), kernel::memory::limit(), config.workers),
    });
    let workers = receivers.into_iter().enumerate();
    let workers: io::Result<Vec<_>> = workers
        .map(|(index, commands)| capture::start(index, shared.clone(), commands))
        .collect();
    let workers = workers.context("starting the workers")?;

    let (wanted_out, wanted_in) = watch::channel(BTreeSet::new());
    let (report_out, report_in) = watch::channel(AgentReport::default());
    let (pods_out, pods_in) = watch::channel(Vec::new());
    let issuer = Issuer::new(sync.client(), credentials.clone(), Arc::new(SystemClock));
    let keep = Keep::open(config.state_dir.join("credentials")).context("the directory of credentials")?;
    let bundle = sync.bundle();
    let issuer = issuer
        .kept_in(keep, Some(bundle.borrow().clone()))
        .telling(events.clone());
    add_sources(&events, &kernel, &credentials, &traffic, pods.times());
    events.add_source(Box::new(health.clone()));

    let (stand_back, stands_back) = oneshot::channel::<()>();
    let direct = Direct::open(
        &config.node,
        kernel.clone(),
        pods.directory(),
        events.clone(),
        drain.clone(),
    );
    let direct = Rc::new(direct.context("the maps of direct connections")?);
    if view.peek().revision().0 > 0 {
        // The agent before this one may have saved a view and died before it took away what that does not permit.
        direct.narrow(&view.load());
    }
    let narrowing = direct.clone();
    let sync = sync.before_publishing(move |view| narrowing.narrow(view));
    let sync = sync.stand_back_when(async move {
        if stands_back.await.is_err() {
            std::future::pending().await
        }
    });
    let control = tokio::task::spawn_local(sync.run(report_in));
    let issuing = tokio::task::spawn_local(issuer.run(wanted_in));
    let (kept, looked) = (Arc::new(AtomicBool::new(pods.is_kept())), Arc::default());
    let admin = admin(&config, &events, &view, &health, &pods_in, &drain, (&kept, &looked));
    // With a keeper, agents change places while both run: the ports belong to the one that does not drain.
    let hands_over = config.keeper.is_some();
    let admin = admin.bind(&config.admin, hands_over).await.context("the admin ports")?;
    let started = drain.started();
    let answering = tokio::task::spawn_local(admin.run(async move {
        match hands_over {
            true => started.await,
            false => std::future::pending().await,
        }
    }));
    let upkeep = Upkeep {
        node: config.node.clone(),
        view,
        credentials,
        traffic,
        events: events.clone(),
        pods,
        direct,
        sandboxes,
        kept,
        looked,
        health,
        bundle,
        wanted: wanted_out,
        report: report_out,
        statuses: pods_out,
    };
    let (stop_upkeep, upkeep_stopped) = oneshot::channel();
    let keeping = tokio::task::spawn_local(upkeep.run(upkeep_stopped));
    if let Some(logger) = kernel.take_logger() {
        tokio::task::spawn_local(kernel::log::forward(logger));
    }
    events.emit(Event::Started {
        version: env!("CARGO_PKG_VERSION"),
    });

    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    events.emit(Event::DrainStarted);
    // It ends by itself only when it is told to.
    let _ = stop_upkeep.send(());
    let leave = keeping.await.context("the upkeep of the pods")?;
    for worker in &senders {
        // A worker that is gone has nothing to drain.
        let _ = worker.send(WorkerCommand::Drain(leave)).await;
    }
    // Without a successor nobody serves new connections, and the next agent may wait for the end of this one.
    let patience = match leave.successor || !hands_over {
        true => config.drain.patience,
        false => config.drain.patience.min(config.drain.alone),
    };
    if leave.successor {
        trigger.keep_idle(patience.min(config.drain.idle));
        // The other agent has the controller's stream; a second one would take it away.
        let _ = stand_back.send(());
    }
    let drained = trigger.finish(patience, config.drain.grace).await;
    trigger.end();
    events.emit(Event::DrainEnded { left: drained.left });
    for task in [control, issuing, answering] {
        task.abort();
    }
    let joined =
        tokio::task::spawn_blocking(move || workers.into_iter().map(|worker| worker.join()).collect::<Vec<_>>());
    for worker in joined.await? {
        match worker {
            Ok(ended) => ended.context("a worker")?,
            Err(_) => anyhow::bail!("a worker panicked"),
        }
    }
    events.emit(Event::Stopped);
    events.flush();
    Ok(())
}

/// On Kubernetes pods are found by their cgroups, and guarded from their birth.
fn discover(
    config: &AgentConfig,
    kernel: &Kernel,
    pods: Pods,
) -> Result<(Pods, Option<watch::Receiver<Arc<Sandboxes>>>)> {
    let Some(kubernetes) = &config.kubernetes else {
        return Ok((pods, None));
    };
    if let Some(problem) = pods::blindness() {
        tracing::error!(
            problem,
            "pods cannot be found; those that the mesh does not know stay refused"
        );
    }
    let discovery = Discovery::open(&config.kernel.cgroup, &kubernetes.pod_logs).context("the pods' cgroups")?;
    let gate = GateConfig {
        refuses: kubernetes.refuses_unclassified,
        trusted: kubernetes.trusted_namespaces.clone(),
        roots: discovery.pod_roots(),
        severs: !kernel.resumed() && uptime().is_some_and(|uptime| uptime < kubernetes.boot_window),
    };
    let sandboxes = discovery.sandboxes();
    tokio::task::spawn_local(discovery.run());
    Ok((pods.with_gate(gate)?, Some(sandboxes)))
}

/// How long the machine has been up.
fn uptime() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/uptime").ok()?;
    let seconds: f64 = text.split_whitespace().next()?.parse().ok()?;
    Duration::try_from_secs_f64(seconds).ok()
}

/// The pods, with the keeper if there should be one.
async fn open_pods(
    config: &AgentConfig,
    kernel: &Arc<Kernel>,
    workers: &[mpsc::Sender<WorkerCommand>],
) -> Result<Pods> {
    let pods = Pods::new(kernel.clone(), workers.to_vec())?;
    let Some(keeper) = &config.keeper else {
        return Ok(pods);
    };
    let deadline = tokio::time::Instant::now() + KEEPER_START;
    while !keeper.exists() && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(pods.with_keeper(keeper.clone()))
}

/// What can be asked of the agent. Ready is an agent with a view whose enrolled pods are captured.
fn admin(
    config: &AgentConfig,
    events: &Arc<Events>,
    view: &Arc<ViewStore>,
    health: &Arc<SyncHealth>,
    pods: &watch::Receiver<Vec<PodStatus>>,
    drain: &Drain,
    (kept, looked): (&Arc<AtomicBool>, &Arc<AtomicBool>),
) -> Admin {
    let (kept, looked) = (kept.clone(), looked.clone());
    let keeper = config.keeper.as_ref().map(|path| path.display().to_string());
    let keeper = keeper.unwrap_or_else(|| "none is configured".to_owned());
    let page = admin::config_page(config);
    let (views, statuses) = (view.clone(), pods.clone());
    let (health, view, pods, drain) = (health.clone(), view.clone(), pods.clone(), drain.clone());
    Admin::new(events.clone())
        .ready_when(move || {
            let is_bare = |pod: &&PodStatus| pod.enrolled && !pod.captured && !pod.is_absent;
            let uncaptured = pods.borrow().iter().filter(is_bare).count();
            let revision = view.peek().revision();
            vec![
                Check {
                    name: "view",
                    ready: revision.0 > 0,
                    detail: format!("revision {revision}"),
                },
                Check {
                    name: "pods",
                    // Before the first look nothing is known of any.
                    ready: looked.load(Ordering::Relaxed) && uncaptured == 0,
                    detail: format!("{uncaptured} not captured"),
                },
                Check {
                    name: "keeper",
                    ready: kept.load(Ordering::Relaxed),
                    detail: keeper.clone(),
                },
                Check {
                    name: "serving",
                    ready: !drain.is_draining(),
                    detail: health.last_failure(),
                },
            ]
        })
        .page("/debug/view", move || admin::view_page(&views.load()))
        .page("/debug/config", move || page.clone())
        .page("/debug/pods", move || {
            let pod = |pod: &PodStatus| {
                let name = pod.name.to_string();
                json!({"name": name, "enrolled": pod.enrolled, "captured": pod.captured, "reason": pod.reason})
            };
            statuses.borrow().iter().map(pod).collect()
        })
}

fn open_events(config: &AgentConfig) -> Result<Arc<Events>> {
    let log = &config.access_log;
    let access_log = match log.enabled {
        true => Some(AccessLog::open(log.path.as_deref(), log.format, &config.node).context("the access log")?),
        false => None,
    };
    Ok(Events::new(EventsConfig {
        compat: config.metrics.compat,
        series_max: config.metrics.series_max,
        series_idle: config.metrics.series_idle,
        access_log,
        ..EventsConfig::new(&config.node)
    }))
}

/// Keeps pods and wanted identities in step with the view, and the controller told.
struct Upkeep {
    node: String,
    view: Arc<ViewStore>,
    credentials: Arc<CredentialStore>,
    traffic: Arc<Traffic>,
    events: Arc<Events>,
    pods: Pods,
    direct: Rc<Direct>,
    /// On Kubernetes only.
    sandboxes: Option<watch::Receiver<Arc<Sandboxes>>>,
    /// Whether the keeper, if there should be one, holds what it should.
    kept: Arc<AtomicBool>,
    /// Whether the pods were looked at once.
    looked: Arc<AtomicBool>,
    health: Arc<SyncHealth>,
    bundle: watch::Receiver<Arc<TrustBundle>>,
    wanted: watch::Sender<BTreeSet<SpiffeId>>,
    report: watch::Sender<AgentReport>,
    statuses: watch::Sender<Vec<PodStatus>>,
}

impl Upkeep {
    /// Goes on until it is told to stop. Says then how listeners are to be left; its own copies of them are gone.
    async fn run(mut self, stopped: oneshot::Receiver<()>) -> Leave {
        tokio::select! {
            // The sender lives as long as the agent.
            _ = stopped => {}
            () = self.keep() => {}
        }
        self.pods.leave().await
    }

    async fn keep(&mut self) {
        let mut changes = self.view.subscribe();
        let mut housekeeping = tokio::time::interval(HOUSEKEEPING);
        let mut memory = Memory::default();
        let mut burdens = tokio::time::interval(MEMORY_LOOK);
        let mut issued = self.credentials.subscribe();
        let mut strangers = tokio::time::interval(STRANGERS_LOOK);
        let mut looks = tokio::time::interval(KEEPER_LOOK);
        let mut ends = tokio::time::interval(DIRECT_LOOK);
        let mut known: Option<(Revision, tokio::time::Instant)> = None;
        loop {
            let view = self.view.load();
            // A controller that has something newer says so as soon as it is connected: what is still the newest after a
            // while is sure.
            let now = tokio::time::Instant::now();
            known = match known {
                _ if !self.health.connected() => None,
                Some((revision, since)) if revision == view.revision() => Some((revision, since)),
                _ => Some((view.revision(), now)),
            };
            self.pods
                .set_sure(known.is_some_and(|(_, since)| now.duration_since(since) >= POD_RETRY));
            if let Some(sandboxes) = &mut self.sandboxes {
                let now = sandboxes.borrow_and_update().clone();
                self.pods.set_sandboxes(now);
            }
            if view.revision().0 == 0 {
                self.pods.await_view();
            }
            // Before there is a view nothing is known, and what an earlier agent captured stays captured.
            if view.revision().0 > 0 {
                self.direct.enforce(&view);
                let here: Vec<Arc<Workload>> = view.workloads_on(&self.node).cloned().collect();
                let wanted: BTreeSet<SpiffeId> = here
                    .iter()
                    .filter(|workload| workload.enrolled)
                    .map(|workload| workload.identity.clone())
                    .collect();
                self.wanted.send_if_modified(|now| {
                    let changed = *now != wanted;
                    *now = wanted;
                    changed
                });
                self.traffic.retain(
                    |key| view.backend(key).map(|backend| &**backend),
                    |id| view.has_limit(id),
                );
                self.pods.reconcile(&here).await;
                // A newer one may have come meanwhile, and what it took away stays so.
                self.direct.apply(&self.view.load());
                self.kept.store(self.pods.is_kept(), Ordering::Relaxed);
                self.tell();
                self.looked.store(true, Ordering::Relaxed);
            }
            let unsettled = view.revision().0 > 0 && !self.pods.is_settled();
            loop {
                tokio::select! {
                    // The sender lives in the store, so the wait cannot fail.
                    _ = changes.changed() => break,
                    () = changed(&mut self.sandboxes) => break,
                    _ = strangers.tick() => if self.pods.meet_strangers() { break },
                    _ = ends.tick() => self.direct.look(&self.view.load()),
                    _ = issued.changed() => self.tell(),
                    // Peers are judged by the newest roots, without waiting for a renewal.
                    Ok(()) = self.bundle.changed() => {
                        let bundle = self.bundle.borrow_and_update().clone();
                        self.credentials.set_bundle(&bundle, std::time::SystemTime::now());
                    }
                    () = tokio::time::sleep(POD_RETRY), if unsettled => break,
                    _ = looks.tick() => if !self.pods.is_kept() {
                        self.kept.store(false, Ordering::Relaxed);
                        break;
                    },
                    _ = burdens.tick() => memory.tidy(),
                    _ = housekeeping.tick() => {
                        self.events.expire(tokio::time::Instant::now().into_std());
                        self.direct.tidy(&self.view.load());
                        self.tell();
                    }
                }
            }
        }
    }

    fn tell(&self) {
        let statuses = self.pods.statuses();
        let pods = statuses.iter().map(|status| PodReport {
            name: status.name.clone(),
            enrolled: status.enrolled,
            captured: status.captured,
            why: status.reason.clone().unwrap_or_default(),
        });
        let wanted = self.wanted.borrow().clone();
        let certificates = wanted.iter().map(|identity| CertificateReport {
            identity: identity.to_string(),
            expires: self.credentials.get(identity).map(|credential| credential.expires()),
            problem: String::new(),
        });
        let report = AgentReport {
            pods: pods.collect(),
            certificates: certificates.collect(),
        };
        self.report.send_if_modified(|now| {
            let changed = *now != report;
            *now = report;
            changed
        });
        for event in pod_events(&self.statuses.borrow(), &statuses) {
            self.events.emit(event);
        }
        self.statuses.send_replace(statuses);
    }
}

/// The next change of the sandboxes; never, where they are not looked for.
async fn changed(sandboxes: &mut Option<watch::Receiver<Arc<Sandboxes>>>) {
    if let Some(sandboxes) = sandboxes
        && sandboxes.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

/// What has happened to the pods between two looks at them.
fn pod_events(before: &[PodStatus], now: &[PodStatus]) -> Vec<Event> {
    let find = |all: &[PodStatus], name: &ObjectName| all.iter().find(|pod| pod.name == *name).cloned();
    let mut events = Vec::new();
    for pod in now {
        let old = find(before, &pod.name);
        let was_captured = old.as_ref().is_some_and(|old| old.captured);
        let name = || pod.name.to_string();
        if pod.captured {
            events.extend((!was_captured).then(|| Event::PodCaptured { pod: name() }));
        } else if !pod.enrolled {
            events.extend(was_captured.then(|| Event::PodRetired { pod: name() }));
        } else if pod.is_absent {
            events.extend(was_captured.then(|| Event::PodRetired { pod: name() }));
        } else if old.is_none_or(|old| old.captured || !old.enrolled || old.reason != pod.reason) {
            let reason = pod.reason.clone().unwrap_or_default();
            events.push(Event::PodNotCaptured { pod: name(), reason });
        }
    }
    let gone = before
        .iter()
        .filter(|old| old.captured && find(now, &old.name).is_none());
    events.extend(gone.map(|old| Event::PodRetired {
        pod: old.name.to_string(),
    }));
    events
}

/// The gauges that belong to no traffic.
fn add_sources(
    events: &Arc<Events>,
    kernel: &Arc<Kernel>,
    credentials: &Arc<CredentialStore>,
    traffic: &Arc<Traffic>,
    times: CaptureTimes,
) {
    events.add_source(Box::new(move |samples: &mut Samples| {
        let help = "From the birth of a pod's sandbox to its capture";
        let (sum, buckets) = times.snapshot();
        samples.histogram("nodemesh_agent_capture_seconds", help, sum, buckets);
    }));
    let kernel = kernel.clone();
    events.add_source(Box::new(move |samples: &mut Samples| {
        for gauge in kernel.gauges() {
            let map = [("map", gauge.map.into())];
            samples.gauge(
                "nodemesh_agent_map_entries",
                "Entries of a kernel map",
                map.clone(),
                gauge.entries as f64,
            );
            samples.gauge(
                "nodemesh_agent_map_entries_max",
                "The bound of a kernel map",
                map,
                gauge.max as f64,
            );
        }
        for count in kernel.reasons().unwrap_or_default() {
            let reason = [("reason", count.reason.name().into())];
            samples.counter(
                "nodemesh_agent_kernel_verdicts",
                "Verdicts of the kernel programs",
                reason,
                count.count,
            );
        }
    }));
    let credentials = credentials.clone();
    events.add_source(Box::new(move |samples: &mut Samples| {
        for credential in credentials.all() {
            let expires = credential
                .expires()
                .duration_since(std::time::UNIX_EPOCH)
                .unwrap_or_default();
            let identity = [("identity", credential.identity().to_string().into())];
            let help = "When a workload's certificate expires, in seconds since 1970";
            samples.gauge(
                "nodemesh_agent_certificate_expiry_seconds",
                help,
                identity,
                expires.as_secs_f64(),
            );
        }
    }));
    let traffic = traffic.clone();
    events.add_source(Box::new(move |samples: &mut Samples| {
        for endpoint in traffic.status() {
            let labels = [
                ("backend", endpoint.backend.to_string().into()),
                ("endpoint", endpoint.address.to_string().into()),
            ];
            let state = match endpoint.breaker {
                BreakerState::Closed => 0.0,
                BreakerState::HalfOpen { .. } => 1.0,
                BreakerState::Open { .. } => 2.0,
            };
            let help = "A circuit breaker: 0 closed, 1 half open, 2 open";
            samples.gauge("nodemesh_agent_breaker_state", help, labels.clone(), state);
            let help = "Requests in flight to an endpoint";
            samples.gauge(
                "nodemesh_agent_endpoint_requests",
                help,
                labels,
                f64::from(endpoint.active),
            );
        }
    }));
}
