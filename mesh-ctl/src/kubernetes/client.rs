//! A client from the kubeconfig, or from the pod that this runs in.

use std::{path::PathBuf, time::Duration};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};

use crate::connect::Failure;

/// How long the API server may take to be reached.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long it may take to answer.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// Which cluster, and which namespace in it.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct KubeArgs {
    /// The kubeconfig; else KUBECONFIG, ~/.kube/config, or the service account of the pod that this runs in.
    #[arg(long, global = true, value_name = "PATH")]
    pub kubeconfig: Option<PathBuf>,
    /// The context in the kubeconfig; else its current one.
    #[arg(long, global = true, value_name = "NAME")]
    pub context: Option<String>,
    /// The namespace; else that of the context, or "default".
    #[arg(short, long, global = true, value_name = "NS")]
    pub namespace: Option<String>,
}

/// A cluster that can be asked.
#[derive(Clone)]
pub struct Cluster {
    /// The client.
    pub client: Client,
    /// The namespace of what names none.
    pub namespace: String,
    /// Whether the user named the namespace.
    pub namespace_given: bool,
}

impl KubeArgs {
    /// Whether the arguments say that a cluster is meant.
    pub fn named(&self) -> bool {
        self.kubeconfig.is_some() || self.context.is_some()
    }

    /// Whether there is a cluster to be found without arguments.
    pub fn found() -> bool {
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let home = std::env::home_dir().is_some_and(|home| home.join(".kube/config").exists());
        set("KUBECONFIG") || home || set("KUBERNETES_SERVICE_HOST")
    }

    /// Reads the configuration and makes a client. Nothing is asked yet.
    pub async fn cluster(&self) -> Result<Cluster, Failure> {
        self.client(self.config().await?)
    }

    /// Reads the configuration.
    pub async fn config(&self) -> Result<Config, Failure> {
        let options = KubeConfigOptions {
            context: self.context.clone(),
            ..KubeConfigOptions::default()
        };
        let config = match &self.kubeconfig {
            Some(path) => {
                let read =
                    Kubeconfig::read_from(path).map_err(|e| Failure::Usage(format!("{}: {e}", path.display())))?;
                Config::from_custom_kubeconfig(read, &options).await
            }
            None if self.context.is_none() && std::env::var_os("KUBECONFIG").is_none() => {
                return Config::infer()
                    .await
                    .map_err(|e| Failure::Usage(format!("no cluster: {e}")));
            }
            None => Config::from_kubeconfig(&options).await,
        };
        config.map_err(|e| Failure::Usage(format!("kubeconfig: {e}")))
    }

    fn client(&self, mut config: Config) -> Result<Cluster, Failure> {
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        config.read_timeout = Some(READ_TIMEOUT);
        let namespace = self
            .namespace
            .clone()
            .unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).map_err(|e| Failure::Usage(format!("kubeconfig: {e}")))?;
        Ok(Cluster {
            client,
            namespace,
            namespace_given: self.namespace.is_some(),
        })
    }
}

impl From<kube::Error> for Failure {
    fn from(error: kube::Error) -> Failure {
        match error {
            kube::Error::Api(status) => {
                let message = if status.message.is_empty() {
                    status.reason.clone()
                } else {
                    status.message.clone()
                };
                match status.code {
                    408 | 504 => Failure::Timeout(message),
                    _ => Failure::refused(message),
                }
            }
            error @ (kube::Error::HyperError(_) | kube::Error::Service(_)) => {
                let cause = std::iter::successors(Some(&error as &dyn std::error::Error), |e| e.source()).last();
                let cause = cause.map(ToString::to_string).unwrap_or_default();
                Failure::Unreachable(format!("cannot reach the API server: {cause}"))
            }
            error => Failure::refused(error.to_string()),
        }
    }
}
