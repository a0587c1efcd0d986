//! A namespace of a test: made with the labels it needs, removed when the test ends, however it ends.

use std::ops::Deref;

use anyhow::Result;

use super::Cluster;
use crate::process::Output;

/// A namespace that goes when this value goes, with all that is in it.
#[derive(Debug)]
pub struct Scope {
    cluster: Cluster,
    namespace: String,
}

impl Scope {
    /// Makes a namespace; `labels` as YAML (`nodemesh.io/mesh: enabled`), empty for none. One that an earlier run left
    /// is removed first.
    pub fn new(cluster: &Cluster, namespace: &str, labels: &str) -> Result<Scope> {
        cluster.kubectl(&["delete", "namespace", namespace, "--ignore-not-found", "--wait=true"])?;
        let scope = Scope {
            cluster: cluster.clone(),
            namespace: namespace.to_string(),
        };
        scope.cluster.apply(&format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}, labels: {{{labels}}}}}\n"
        ))?;
        // A pod is refused until its namespace has the account that it runs as.
        scope.until("the namespace's service account", || {
            let account = scope.try_kubectl(&["get", "serviceaccount", "default", "-n", namespace])?;
            Ok(account.status.success().then_some(()))
        })?;
        Ok(scope)
    }

    /// The namespace's name.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Applies documents into the namespace.
    pub fn apply(&self, yaml: &str) -> Result<String> {
        let arguments = [
            "apply",
            "-n",
            &self.namespace,
            "--server-side",
            "--force-conflicts",
            "-f",
            "-",
        ];
        crate::process::with_input(self.cluster.kubectl_command(&arguments), yaml)?.ok()
    }

    /// kubectl in this namespace.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        let mut words = vec!["-n", &self.namespace];
        words.extend(arguments);
        self.cluster.kubectl(&words)
    }

    /// Runs a command in a pod of the namespace (`cart-0`, or `deployment/cart` for any of its pods).
    pub fn exec(&self, pod: &str, argv: &[&str]) -> Result<Output> {
        self.cluster.exec(&self.namespace, pod, argv)
    }

    /// Sets or removes (`nodemesh.io/mesh-`) labels of the namespace.
    pub fn label(&self, label: &str) -> Result<()> {
        self.cluster
            .kubectl(&["label", "namespace", &self.namespace, label, "--overwrite"])?;
        Ok(())
    }
}

impl Deref for Scope {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        &self.cluster
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        // The cluster goes with the run at the latest; a test's own result matters more than a failure here.
        let arguments = [
            "delete",
            "namespace",
            &self.namespace,
            "--ignore-not-found",
            "--wait=false",
        ];
        if let Err(error) = self.cluster.kubectl(&arguments) {
            eprintln!("the namespace {} stays: {error:#}", self.namespace);
        }
    }
}
