//! Requests that go on in a pod while something happens to the cluster, and what became of them.

use std::{process::Stdio, thread::JoinHandle};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::Scope;
use crate::process::Output;

/// Requests that go on in the pod `load` of a namespace until they are stopped.
#[derive(Debug)]
pub struct Load {
    what: String,
    stop: String,
    running: JoinHandle<Result<Output>>,
}

/// The pod that a load runs in.
pub const POD: &str = r#"
---
apiVersion: v1
kind: Pod
metadata: {name: load, labels: {app: load}}
spec:
  nodeSelector: {kubernetes.io/hostname: node1}
  terminationGracePeriodSeconds: 0
  containers:
  - {name: main, image: "localhost/nodemesh/test:dev", command: [sleep, infinity]}
"#;

impl Load {
    /// Ten requests a second. `kind` is lab-load's: `http` keeps its connections, `connect` makes one for each request.
    pub fn start(scope: &Scope, kind: &str, url: &str, name: &str) -> Result<Load> {
        let stop = format!("/tmp/stop-{name}-{kind}");
        let words = ["exec", "-n", scope.namespace(), "load", "--", "lab-load", kind, url];
        let options = [
            "--connections",
            "2",
            "--rate",
            "10",
            "--seconds",
            "900",
            "--timeout",
            "30",
            "--stop",
            &stop,
        ];
        let mut command = scope.kubectl_command(&[&words[..], &options[..]].concat());
        command.stdin(Stdio::null());
        let running = std::thread::spawn(move || Ok(command.output().context("run kubectl")?.into()));
        Ok(Load {
            what: format!("{name}, {kind} {url}"),
            stop,
            running,
        })
    }

    /// Stops the requests; an error, with what was counted, unless there were some and each got status 200.
    pub fn stop(self, scope: &Scope) -> Result<Value> {
        scope
            .exec("load", &["sh", "-c", &format!("echo > {}", self.stop)])?
            .ok()?;
        let output = self
            .running
            .join()
            .ok()
            .context("the thread of a load panicked")??
            .ok()?;
        let counted: Value = serde_json::from_str(&output).with_context(|| format!("what lab-load wrote: {output}"))?;
        println!("{}: {counted}", self.what);
        let asked = counted["requests"].as_u64().unwrap_or_default();
        let good = counted["statuses"]["200"].as_u64().unwrap_or_default();
        ensure!(asked > 10, "{}: hardly a request was made: {counted}", self.what);
        ensure!(
            good == asked,
            "{}: {} of {asked} requests failed: {counted}",
            self.what,
            asked - good
        );
        Ok(counted)
    }
}

/// Does something while requests go on, over kept connections and over new ones. Not one may fail.
pub fn under_load(scope: &Scope, url: &str, name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let kept = Load::start(scope, "http", url, name)?;
    let new = Load::start(scope, "connect", url, name)?;
    let worked = work();
    let counted = [kept.stop(scope), new.stop(scope)];
    worked.with_context(|| name.to_string())?;
    for counted in counted {
        counted?;
    }
    Ok(())
}
