//! The Gateway API's conformance suite for meshes on the cluster: every test, every feature, and a report that says so.

use anyhow::{Context, Result};
use mesh_tests::cluster::{
    Cluster,
    conformance::{self, Suite},
};

#[test]
fn every_mesh_test_is_green() -> Result<()> {
    let cluster = Cluster::shared()?;
    let suite = Suite {
        version: format!("v{}", env!("CARGO_PKG_VERSION")),
        enrolled: true,
        flags: Vec::new(),
    };
    let findings = conformance::run(&cluster, &suite)?;
    findings.all_green()?;

    // The report in the tree is that of this version, and claims what was found now.
    let report = findings.report.context("no report")?;
    let kept = format!(
        "{}/../docs/conformance/{}.yaml",
        env!("CARGO_MANIFEST_DIR"),
        suite.version
    );
    let kept = std::fs::read_to_string(&kept)
        .with_context(|| format!("read {kept}: `cargo xtask kube conform --report` writes it"))?;
    assert_eq!(without_date(&report), without_date(&kept));
    Ok(())
}

fn without_date(report: &str) -> Vec<&str> {
    report.lines().filter(|line| !line.starts_with("date:")).collect()
}
