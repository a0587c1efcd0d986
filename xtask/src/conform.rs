//! `cargo xtask kube conform`: the Gateway API's conformance suite for meshes against the running cluster, as upstream
//! built it, with every extended feature claimed; the report is written by it and kept by `--report`.

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, ensure};
use clap::Args;
use mesh_tests::cluster::Cluster;

use crate::shell;

/// The features of the mesh profiles' tests beyond the core, and those whose tests need one from outside the profiles.
const FEATURES: [&str; 18] = [
    "Mesh",
    "HTTPRoute",
    "GRPCRoute",
    "MeshClusterIPMatching",
    "MeshConsumerRoute",
    "MeshHTTPRouteRewritePath",
    "MeshHTTPRouteSchemeRedirect",
    "MeshHTTPRouteRedirectPort",
    "MeshHTTPRouteRedirectPath",
    "MeshHTTPRouteBackendRequestHeaderModification",
    "MeshHTTPRouteQueryParamMatching",
    "MeshHTTPRouteNamedRouteRule",
    "HTTPRouteResponseHeaderModification",
    "HTTPRouteParentRefPort",
    "HTTPRoute303RedirectStatusCode",
    "HTTPRoute307RedirectStatusCode",
    "HTTPRoute308RedirectStatusCode",
    "ReferenceGrant",
];
/// How to run the suite.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Keeps the report as docs/conformance/<version of the mesh>.yaml.
    #[arg(long)]
    pub report: bool,
    /// How often, one run after the other; all must be green.
    #[arg(long, default_value_t = 1)]
    pub runs: u32,
    /// Without enrolling the suite's namespaces: what the suite says of a cluster without a mesh.
    #[arg(long)]
    pub unmeshed: bool,
    /// More of the suite's own flags: `-run-test=MeshBasic`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub flags: Vec<String>,
}

/// The verb.
pub fn run(options: &Options) -> Result<ExitCode> {
    if let Some(code) = shell::again_as_root()? {
        return Ok(code);
    }
    let cluster = Cluster::shared()?;
    for number in 1..=options.runs {
        if options.runs > 1 {
            println!("### run {number} of {}", options.runs);
        }
        let good = suite(&cluster, options)?;
        if !good {
            return Ok(ExitCode::FAILURE);
        }
    }
    if options.report {
        keep_report(&cluster)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn report_file(cluster: &Cluster) -> PathBuf {
    cluster.kubeconfig().with_file_name("conformance-report.yaml")
}

/// Runs the suite once.
fn suite(cluster: &Cluster, options: &Options) -> Result<bool> {
    let report = report_file(cluster);
    let _ = fs::remove_file(&report);
    let bin = cluster.kubeconfig().with_file_name("bin");
    let mut command = cluster.command(bin.join("conformance.test"));
    command.args(["-test.run", "^TestConformance$", "-test.v", "-test.timeout", "40m"]);
    command.args(["-conformance-profiles=MESH-HTTP,MESH-GRPC", "-gateway-class="]);
    command.arg(format!("-supported-features={}", FEATURES.join(",")));
    if !options.unmeshed {
        command.arg("-namespace-labels=nodemesh.io/mesh=enabled");
    }
    command.args(["-organization=nodemesh", "-project=nodemesh"]);
    command.args([
        "-url=https://github.com/nodemesh/nodemesh",
        "-contact=https://github.com/nodemesh/nodemesh/issues",
    ]);
    command.arg(format!("-version=v{}", env!("CARGO_PKG_VERSION")));
    command.arg(format!("-report-output={}", report.display()));
    command.args(&options.flags);
    let status = command.current_dir("/").status().context("run the conformance suite")?;
    Ok(status.success())
}

/// Puts the newest report into the tree.
fn keep_report(cluster: &Cluster) -> Result<()> {
    let report = fs::read_to_string(report_file(cluster)).context("the suite wrote no report")?;
    ensure!(
        report.contains("result: success"),
        "the report is not one of success:\n{report}"
    );
    ensure!(
        !report.contains("result: failure"),
        "the report has failures:\n{report}"
    );
    let directory = shell::root().join("docs/conformance");
    fs::create_dir_all(&directory)?;
    let file = directory.join(format!("v{}.yaml", env!("CARGO_PKG_VERSION")));
    fs::write(&file, report)?;
    println!("{}", file.display());
    Ok(())
}
