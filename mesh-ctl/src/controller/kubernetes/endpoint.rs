//! Where agents find the leader: the EndpointSlice of the Service `nodemesh-controller`, which has no selector.
//!
//! The leader writes its own address into it and nobody else's. Readiness is thereby free to mean what Kubernetes takes
//! it for: a replica that waits is as healthy as the one that leads, a rollout ends, and a node with the leader on it can
//! be drained. A replica that is not told its address leaves the slice alone.

use std::{net::IpAddr, time::Duration};

use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};

/// The Service, and the slice.
const NAME: &str = "nodemesh-controller";
/// The Service's port.
const PORT_NAME: &str = "grpc-agents";
/// The slice is written again this often: whoever deletes it does not cut agents off for long.
const AGAIN: Duration = Duration::from_secs(10);
/// A write that failed is tried again after this.
const RETRY: Duration = Duration::from_secs(1);

/// The slice as it should be.
fn slice(namespace: &str, pod: &str, address: IpAddr, port: u16) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": NAME,
            "namespace": namespace,
            "labels": {
                "app.kubernetes.io/name": "nodemesh",
                "kubernetes.io/service-name": NAME,
                "endpointslice.kubernetes.io/managed-by": "nodemesh-controller",
            },
        },
        "addressType": if address.is_ipv4() { "IPv4" } else { "IPv6" },
        "endpoints": [{
            "addresses": [address.to_string()],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "targetRef": {"kind": "Pod", "namespace": namespace, "name": pod},
        }],
        "ports": [{"name": PORT_NAME, "port": port, "protocol": "TCP"}],
    })
}

/// Keeps the slice while this replica leads.
pub async fn keep(client: Client, namespace: String, pod: String, address: IpAddr, port: u16) {
    let api: Api<EndpointSlice> = Api::namespaced(client, &namespace);
    let wanted = Patch::Apply(slice(&namespace, &pod, address, port));
    // By force: the leader before this one wrote it under the same name, and people have no business in it.
    let params = PatchParams::apply("nodemesh-controller").force();
    loop {
        let write = api.patch(NAME, &params, &wanted);
        let pause = match tokio::time::timeout(super::watch::REQUEST_TIMEOUT, write).await {
            Ok(Ok(_)) => AGAIN,
            Ok(Err(error)) => {
                tracing::error!(%error, "agents are not led to this replica yet");
                RETRY
            }
            Err(_) => RETRY,
        };
        tokio::time::sleep(pause).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slice_is_one_that_kubernetes_reads() {
        for address in ["10.0.0.1", "fd00::1"] {
            let value = slice("nodemesh-system", "c-1", address.parse().unwrap(), 15010);
            let slice: EndpointSlice = serde_json::from_value(value).unwrap();
            assert_eq!(slice.address_type, if address.contains(':') { "IPv6" } else { "IPv4" });
            assert_eq!(slice.endpoints[0].addresses, [address]);
        }
    }
}
