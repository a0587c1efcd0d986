//! The tests that need a cluster: programs whose names begin with `kube_`. One cluster per run: it is started, the mesh
//! of this tree is installed, the programs run one test at a time, and everything is removed again.

use std::{env, fs, path::Path, process::Command, time::Instant};

use anyhow::{Context, Result};
use mesh_tests::cluster;

use crate::{kube, shell};

/// The run's own cluster, unless `NODEMESH_KUBE` names another: a developer's `nodemesh` stays as it is.
const NAME: &str = "nm-test";

/// A cluster with the mesh. It is removed when this value goes.
#[derive(Debug)]
pub struct Run {
    name: String,
    keep: bool,
}

impl Run {
    /// Whether a test program needs a cluster.
    pub fn needed_by(program: &str) -> bool {
        program.starts_with("kube_")
    }

    /// Starts the cluster and installs the mesh.
    pub fn start(release: bool, keep: bool) -> Result<Run> {
        let started = Instant::now();
        let name = env::var(cluster::NAME_VARIABLE).unwrap_or_else(|_| NAME.into());
        // What an earlier run left when it was killed.
        kube::down(&name)?;
        let run = Run { name, keep };
        kube::up(&run.name, &kube::Up::default())?;
        let up = Instant::now();
        let install = kube::Install {
            release,
            ..Default::default()
        };
        if let Err(error) = kube::install(&run.name, &install) {
            run.collect_logs("install");
            return Err(error);
        }
        println!(
            "cluster {} is up after {}, the mesh after {} more",
            run.name,
            shell::time(up - started),
            shell::time(up.elapsed())
        );
        Ok(run)
    }

    /// The cluster's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Copies what the mesh, the control plane and the nodes wrote to `target/kube-logs/<of>`. What is missing is
    /// missing: the failure that this explains is what counts.
    pub fn collect_logs(&self, of: &str) {
        if let Err(error) = self.try_collect_logs(of) {
            println!("not all logs could be collected: {error:#}");
        }
    }

    fn try_collect_logs(&self, of: &str) -> Result<()> {
        let target = shell::target()?.join("kube-logs").join(of);
        let _ = fs::remove_dir_all(&target);
        fs::create_dir_all(&target)?;
        let state = Path::new(cluster::STATE).join(&self.name);
        let mut copy = shell::root_command("sh")?;
        let script = "cd \"$1\" && for f in log/*.log node*/log/*.log node*/var-log/pods/*/*/*.log; do \
                      [ -e \"$f\" ] && tail -c 4000000 \"$f\" > \"$2/$(echo $f | tr / _)\"; done; \
                      chmod -R a+rX \"$2\"";
        copy.args(["-c", script, "sh"]).arg(&state).arg(&target);
        shell::run(&mut copy)?;
        for (file, words) in [
            ("pods.txt", ["get", "pods", "-A", "-o", "wide"].as_slice()),
            ("events.txt", &["events", "-A"]),
            ("routes.yaml", &["get", "httproutes,grpcroutes", "-A", "-o", "yaml"]),
        ] {
            let output = self.kubectl(words)?.output().context("run kubectl")?;
            fs::write(target.join(file), output.stdout)?;
        }
        println!("logs of the cluster are in {}", target.display());
        Ok(())
    }

    fn kubectl(&self, words: &[&str]) -> Result<Command> {
        let mut command = shell::root_command("env")?;
        command.arg(format!("{}={}", cluster::NAME_VARIABLE, self.name));
        command.arg(env::current_exe()?).args(["kube", "kubectl"]).args(words);
        Ok(command)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if self.keep {
            println!(
                "the cluster stays: {}={} cargo xtask kube ...",
                cluster::NAME_VARIABLE,
                self.name
            );
            return;
        }
        if let Err(error) = kube::down(&self.name) {
            println!("the cluster {} was not removed: {error:#}", self.name);
        }
    }
}
