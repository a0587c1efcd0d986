//! The controller in a cluster: documents from the API server's watches, state in the API server only.
//!
//! Every replica watches and compiles; the holder of the Lease serves agents, signs, and writes status. What another
//! replica needs to go on lies in the API server: the Lease (who leads, which revision numbers are taken), the CA's
//! Secret, the trust bundle's ConfigMap. A replica that cannot renew the Lease serves nobody.

mod cluster;
mod endpoint;
mod events;
mod health;
mod join;
mod leader;
mod status;
mod status_writer;
mod trust;
mod watch;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context, bail};
use kube::Client;
use mesh_api::{
    document::{DocumentKey, Kind},
    identity::TrustDomain,
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch as channel},
};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    cluster::Cluster,
    health::Metrics,
    leader::{Numbers, Times},
    trust::Trust,
    watch::Patience,
};
use super::{
    ControllerConfig, Parts, STOP_TIMEOUT, agents::Agents, server, serving_names, source::Source, terminated, tls::Tls,
    unix_seconds,
};

/// How long a connection to the API server may take to come up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a leader that is told to stop waits for its connections before it gives the Lease up.
const TERM_END_TIMEOUT: Duration = Duration::from_secs(2);

/// What `--kubernetes` is told besides.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "In a cluster (--kubernetes)")]
pub struct ClusterConfig {
    /// The namespace of the mesh's own objects.
    #[arg(
        long,
        value_name = "NAMESPACE",
        env = "POD_NAMESPACE",
        default_value = "nodemesh-system"
    )]
    pub system_namespace: String,
    /// The pod's name, with which the replica's name in the Lease begins; the host's name unless told otherwise.
    #[arg(long, value_name = "NAME", env = "POD_NAME")]
    pub pod_name: Option<String>,
    /// The replica's address: while it leads, the Service's EndpointSlice has it, and readiness means that the replica
    /// serves or waits well. Without it only the leader is ready.
    #[arg(long, value_name = "ADDR", env = "POD_IP")]
    pub pod_ip: Option<IpAddr>,
    /// The operator's port while this replica leads. It trusts whoever reaches it: keep it on loopback, where only a
    /// port-forward does.
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:15011")]
    pub operator_listen: SocketAddr,
    /// `/livez`, `/readyz` (this replica leads and serves, or waits: see --pod-ip) and `/metrics`.
    #[arg(long, value_name = "ADDR:PORT", default_value = "[::]:15012")]
    pub health_listen: SocketAddr,
    /// Another replica takes the lead when the Lease was not renewed for this long; it is renewed three times as often.
    #[arg(long, value_name = "DURATION", default_value = "6s", value_parser = crate::duration)]
    pub lease_duration: Duration,
}

fn pod_name(config: &ClusterConfig) -> String {
    let host = || std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = config.pod_name.clone().unwrap_or_else(host);
    name.trim().to_owned()
}

/// The pod's name and something that no other process has: two of one name must never both lead.
fn identity(pod: &str) -> String {
    let own: u32 = rand::random();
    format!("{pod}_{own:08x}")
}

/// What a leader works with.
struct Leader {
    config: ControllerConfig,
    client: Client,
    trust_domain: TrustDomain,
    cluster: Arc<Cluster>,
    metrics: Arc<Metrics>,
}

/// Runs until SIGTERM or SIGINT.
pub async fn run(config: ControllerConfig, mut kube: kube::Config, trust_domain: TrustDomain) -> anyhow::Result<()> {
    let stopped_by = terminated();
    tokio::pin!(stopped_by);
    let pod = pod_name(&config.cluster);
    if pod.is_empty() {
        bail!("--pod-name: expected the pod's name (POD_NAME)");
    }
    let identity = identity(&pod);
    if config.cluster.lease_duration < Duration::from_secs(1) {
        bail!("--lease-duration: expected at least 1s");
    }
    kube.connect_timeout = Some(CONNECT_TIMEOUT);
    let client = Client::try_from(kube).context("the way to the API server")?;
    let metrics = Arc::new(Metrics::new());
    let health = config.cluster.health_listen;
    let listener = TcpListener::bind(health)
        .await
        .with_context(|| format!("cannot listen on {health}"))?;
    let health = listener.local_addr()?;
    let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
    tasks.spawn(health::serve(listener, metrics.clone(), stop.clone()));

    let cluster = Arc::new(Cluster::new(trust_domain.clone(), metrics.clone()));
    let (notes, taken) = mpsc::channel(watch::NOTES_MAX);
    let (lead, mut leading) = channel::channel(None);
    watch::start(&client, &metrics, notes, &stop, &tasks);
    let owner = cluster.clone().run(taken, leading.clone());
    tasks.spawn(stop.clone().run_until_cancelled_owned(owner));
    tracing::info!(identity, %health, "the controller watches");

    let namespace = config.cluster.system_namespace.clone();
    let times = Times {
        duration: config.cluster.lease_duration,
        renew: config.cluster.lease_duration / 3,
    };
    let leave = CancellationToken::new();
    let campaign = tokio::spawn({
        let (client, leave, cluster) = (client.clone(), leave.clone(), cluster.clone());
        let (metrics, waits) = (metrics.clone(), config.cluster.pod_ip.is_some());
        async move {
            // Whoever cannot serve yet does not lead: the other replica may be ready.
            let mut synced = cluster.synced();
            tokio::select! {
                seen = synced.wait_for(|synced| *synced) => if seen.is_err() { return },
                () = leave.cancelled() => return,
            }
            metrics.waits(waits);
            leader::campaign(client, &namespace, &identity, times, lead, leave).await;
        }
    });
    let leader = Arc::new(Leader {
        config,
        client,
        trust_domain,
        cluster,
        metrics,
    });
    let mut term: Option<(CancellationToken, tokio::task::JoinHandle<()>)> = None;
    let signal = loop {
        tokio::select! {
            signal = &mut stopped_by => break signal?,
            changed = leading.changed() => {
                if changed.is_err() {
                    bail!("the election has ended");
                }
                let numbers: Option<Arc<Numbers>> = leading.borrow_and_update().clone();
                leader.metrics.leads(numbers.is_some());
                if let Some((end, task)) = term.take() {
                    leader.metrics.serves(false);
                    end.cancel();
                    // The next term binds the same ports.
                    let _ = tokio::time::timeout(TERM_END_TIMEOUT, task).await;
                }
                if numbers.is_some() {
                    let end = CancellationToken::new();
                    let task = tokio::spawn(leader.clone().term(end.clone()));
                    term = Some((end, task));
                }
            }
        }
    };
    tracing::info!(signal, "stopping");
    leader.metrics.waits(false);
    leader.metrics.serves(false);
    if let Some((end, task)) = term.take() {
        end.cancel();
        if tokio::time::timeout(TERM_END_TIMEOUT, task).await.is_err() {
            tracing::warn!("connections were cut");
        }
    }
    // Only now may another replica lead.
    leave.cancel();
    let _ = tokio::time::timeout(STOP_TIMEOUT, campaign).await;
    stop.cancel();
    tasks.close();
    let _ = tokio::time::timeout(STOP_TIMEOUT, tasks.wait()).await;
    tracing::info!("stopped");
    Ok(())
}

impl Leader {
    /// Leads until `end`; what stands in the way of serving is tried again until then.
    async fn term(self: Arc<Self>, end: CancellationToken) {
        let mut patience = Patience::new();
        loop {
            let pause = match end.run_until_cancelled(self.prepare()).await {
                None => return,
                Some(Ok(ready)) => {
                    self.serve(ready, &end).await;
                    return;
                }
                Some(Err(error)) => {
                    tracing::error!(error = format!("{error:#}"), "this replica leads and cannot serve yet");
                    patience.next().unwrap_or_default()
                }
            };
            if end.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return;
            }
        }
    }

    /// Everything without which a leader must not serve.
    async fn prepare(&self) -> anyhow::Result<Ready> {
        let cluster = &self.config.cluster;
        let domain = self.trust_domain.clone();
        let trust = Trust::open(self.client.clone(), &cluster.system_namespace, domain.clone()).await?;
        let mut published = self.cluster.published();
        published.wait_for(Option::is_some).await?;
        let listen = self.config.listen;
        let agents = TcpListener::bind(listen)
            .await
            .with_context(|| format!("cannot listen on {listen}"))?;
        let operator = TcpListener::bind(cluster.operator_listen)
            .await
            .with_context(|| format!("cannot listen on {}", cluster.operator_listen))?;
        let names = serving_names(&self.config, agents.local_addr()?);
        let tls = Arc::new(Tls::new(&trust, names, domain)?);
        Ok(Ready {
            trust: Arc::new(trust),
            tls,
            agents,
            operator,
        })
    }

    async fn serve(&self, ready: Ready, end: &CancellationToken) {
        let tasks = TaskTracker::new();
        let agents = Arc::new(Agents::default());
        let parts = Parts {
            source: self.cluster.clone(),
            agents: agents.clone(),
            authority: ready.trust.clone(),
            admission: Arc::new(join::Reviews {
                client: self.client.clone(),
                namespace: self.config.cluster.system_namespace.clone(),
            }),
            tls: ready.tls.clone(),
            svid_ttl: self.config.svid_ttl,
        };
        let addresses = (ready.agents.local_addr().ok(), ready.operator.local_addr().ok());
        let agents_server = parts.serve_agents(ready.agents, end, &tasks);
        let operator_server = tokio::spawn(
            server()
                .add_service(parts.operator())
                .serve_with_incoming_shutdown(TcpListenerStream::new(ready.operator), end.clone().cancelled_owned()),
        );
        let during = |task| tasks.spawn(end.clone().run_until_cancelled_owned(task));
        during(Box::pin(ready.tls.clone().renew(ready.trust.clone())) as super::source::Waiting<'static, ()>);
        during(Box::pin(keep_trust(
            ready.trust,
            ready.tls,
            self.cluster.clone(),
            self.metrics.clone(),
        )));
        let common = || (self.cluster.clone(), agents.clone(), self.metrics.clone());
        let (cluster, known, metrics) = common();
        during(Box::pin(count_agents(known, cluster, metrics)));
        let (cluster, known, metrics) = common();
        during(Box::pin(status_writer::run(
            self.client.clone(),
            cluster,
            known,
            metrics,
        )));
        let (cluster, known, metrics) = common();
        let instance = pod_name(&self.config.cluster);
        during(Box::pin(events::run(
            self.client.clone(),
            instance,
            cluster,
            known,
            metrics,
        )));
        if let (Some(address), Some(bound)) = (self.config.cluster.pod_ip, addresses.0) {
            let namespace = self.config.cluster.system_namespace.clone();
            let pod = pod_name(&self.config.cluster);
            let keep = endpoint::keep(self.client.clone(), namespace, pod, address, bound.port());
            during(Box::pin(keep));
        }
        self.metrics.serves(true);
        let summary = self.cluster.summary();
        let (revision, documents) = (summary.revision, summary.documents);
        let (address, operator) = (shown(addresses.0), shown(addresses.1));
        tracing::info!(address, operator, %revision, documents, "the controller serves");
        end.cancelled().await;
        tasks.close();
        tasks.wait().await;
        // A server that failed while stopping has nothing left to lose.
        let _ = agents_server.await;
        let _ = operator_server.await;
    }
}

fn shown(address: Option<SocketAddr>) -> String {
    address.map(|address| address.to_string()).unwrap_or_default()
}

/// What a leader has made ready.
struct Ready {
    trust: Arc<Trust>,
    tls: Arc<Tls>,
    agents: TcpListener,
    operator: TcpListener,
}

/// Follows the CA's Secret.
async fn keep_trust(trust: Arc<Trust>, tls: Arc<Tls>, cluster: Arc<Cluster>, metrics: Arc<Metrics>) {
    loop {
        metrics.ca_expires(unix_seconds(trust.not_after()));
        tokio::time::sleep(trust::LOOK).await;
        let looked = tokio::time::timeout(watch::REQUEST_TIMEOUT, trust.look(SystemTime::now())).await;
        let changes = match looked {
            Ok(Ok(changes)) => changes,
            Ok(Err(error)) => {
                tracing::error!(error = format!("{error:#}"), "the CA cannot be looked at");
                continue;
            }
            Err(_) => continue,
        };
        if (changes.bundle || changes.signing)
            && let Err(error) = tls.reload(&*trust)
        {
            tracing::error!(%error, "the serving certificate was not made anew");
        }
        if changes.bundle {
            cluster.force();
        }
    }
}

/// Keeps the gauges of agents, and forgets those of nodes that are gone.
async fn count_agents(agents: Arc<Agents>, cluster: Arc<Cluster>, metrics: Arc<Metrics>) {
    let mut changes = agents.subscribe();
    let mut revisions = cluster.published();
    loop {
        let newest = revisions.borrow_and_update().as_ref().map(|compiled| compiled.revision);
        let (connected, behind) = agents.count(newest.unwrap_or_default());
        metrics.agents(connected, behind);
        cluster.look(|known| {
            agents.forget_gone(|node| known.set.get(&DocumentKey::new(Kind::Node, "", node)).is_some());
        });
        // Agents change often while many connect: once in a while is enough for a gauge.
        tokio::time::sleep(Duration::from_millis(200)).await;
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            changed = revisions.changed() => if changed.is_err() { return },
        }
    }
}
