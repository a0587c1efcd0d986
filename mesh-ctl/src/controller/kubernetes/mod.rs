//! The controller in a cluster: documents from the API server's watches, state in the API server only.
//!
//! Every replica watches and compiles; the holder of the Lease serves agents, signs, and writes status. What another
//! replica needs to go on lies in the API server: the Lease (who leads, which revision numbers are taken), the CA's
//! Secret, the trust bundle's ConfigMap.

use anyhow::bail;
use mesh_api::identity::TrustDomain;

use super::ControllerConfig;

/// What `--kubernetes` is told besides.
#[derive(Clone, Debug, clap::Args)]
pub struct ClusterConfig {
    /// The namespace of the mesh's own objects.
    #[arg(
        long,
        value_name = "NAMESPACE",
        env = "POD_NAMESPACE",
        default_value = "nodemesh-system"
    )]
    pub system_namespace: String,
}

/// Runs until SIGTERM or SIGINT.
pub async fn run(_: ControllerConfig, _: TrustDomain) -> anyhow::Result<()> {
    bail!("--kubernetes is not there yet")
}
