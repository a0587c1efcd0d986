//! The operator's API of the leading controller, through the API server's port-forward.
//!
//! The controller listens on its pod's loopback only: whoever may forward ports of the mesh's pods (pods/portforward in
//! nodemesh-system) may ask it, nobody else.

use hyper_util::rt::TokioIo;
use k8s_openapi::api::{coordination::v1::Lease, core::v1::Pod};
use kube::{Api, api::ListParams};
use tonic::transport::{Channel, Endpoint, Uri};

use super::{CONTROLLER, Cluster, OPERATOR_PORT, ROOT_NAMESPACE};
use crate::connect::Failure;

/// The labels of the controller's pods.
const CONTROLLER_PODS: &str = "app.kubernetes.io/name=nodemesh,app.kubernetes.io/component=controller";

fn ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True")
}

/// The pod of the controller that leads: the holder of the Lease if it is there, else one that is ready.
pub async fn leader(cluster: &Cluster) -> Result<String, Failure> {
    let leases: Api<Lease> = Api::namespaced(cluster.client.clone(), ROOT_NAMESPACE);
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), ROOT_NAMESPACE);
    let lease = leases.get_opt(CONTROLLER).await?;
    let holder = lease.and_then(|lease| lease.spec?.holder_identity).unwrap_or_default();
    let found = pods.list(&ListParams::default().labels(CONTROLLER_PODS)).await?.items;
    let name = |pod: &Pod| pod.metadata.name.clone().unwrap_or_default();
    let alive = |pod: &&Pod| pod.metadata.deletion_timestamp.is_none();
    let leads = |pod: &&Pod| !holder.is_empty() && holder.starts_with(&name(pod));
    if let Some(pod) = found.iter().find(leads) {
        return Ok(name(pod));
    }
    match found.iter().filter(alive).find(|pod| ready(pod)) {
        Some(pod) => Ok(name(pod)),
        None if found.is_empty() => Err(Failure::Unreachable(format!(
            "there is no controller in namespace {ROOT_NAMESPACE}: is the mesh installed (mesh-ctl install)?"
        ))),
        None => Err(Failure::Unreachable(format!(
            "none of the {} controllers leads: see kubectl -n {ROOT_NAMESPACE} get pods",
            found.len()
        ))),
    }
}

/// A channel to the leader.
pub async fn leader_channel(cluster: &Cluster, endpoint: Endpoint) -> Result<Channel, Failure> {
    let pod = leader(cluster).await?;
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), ROOT_NAMESPACE);
    let name = pod.clone();
    let dial = tower::service_fn(move |_: Uri| {
        let (pods, name) = (pods.clone(), name.clone());
        async move {
            let mut forwarder = pods
                .portforward(&name, &[OPERATOR_PORT])
                .await
                .map_err(std::io::Error::other)?;
            let stream = forwarder
                .take_stream(OPERATOR_PORT)
                .ok_or_else(|| std::io::Error::other("no stream"))?;
            // Its task lives as long as the stream does.
            tokio::spawn(async move { forwarder.join().await });
            Ok::<_, std::io::Error>(TokioIo::new(stream))
        }
    });
    endpoint.connect_with_connector(dial).await.map_err(|error| {
        let cause = std::iter::successors(Some(&error as &dyn std::error::Error), |e| e.source()).last();
        let cause = cause.map(ToString::to_string).unwrap_or_default();
        Failure::Unreachable(format!(
            "cannot reach the controller in pod {pod} (port-forward in namespace {ROOT_NAMESPACE}): {cause}"
        ))
    })
}
