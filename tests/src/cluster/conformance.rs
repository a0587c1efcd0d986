//! The Gateway API's conformance suite for meshes, as upstream built it, against a cluster: with every extended feature
//! of the mesh profiles claimed, and those from outside of them that a mesh test needs.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::Stdio,
};

use anyhow::{Context, Result, ensure};

use super::Cluster;

/// How many of the suite's tests are for meshes.
pub const TESTS: usize = 22;
/// What is claimed. Every one of the suite's mesh tests runs with it.
const FEATURES: [&str; 17] = [
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
];

/// How to run the suite.
#[derive(Clone, Debug)]
pub struct Suite {
    /// The mesh's version, for the report.
    pub version: String,
    /// Whether the suite's namespaces are enrolled.
    pub enrolled: bool,
    /// More of the suite's own flags: `-run-test=MeshBasic`.
    pub flags: Vec<String>,
}

/// What the suite found.
#[derive(Clone, Debug)]
pub struct Findings {
    /// Whether each test of the suite passed, by its name.
    pub tests: BTreeMap<String, bool>,
    /// The report's text, if one was written.
    pub report: Option<String>,
    /// Whether the suite as a whole ended well.
    pub good: bool,
}

impl Findings {
    /// An error that names what failed, unless every mesh test passed.
    pub fn all_green(&self) -> Result<()> {
        let failed: Vec<&str> = self
            .tests
            .iter()
            .filter(|(_, good)| !**good)
            .map(|(name, _)| name.as_str())
            .collect();
        ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
        ensure!(self.good, "the suite failed outside of its tests");
        ensure!(
            self.tests.len() == TESTS,
            "{} tests passed, not {TESTS}: {:?}",
            self.tests.len(),
            self.tests.keys()
        );
        let report = self.report.as_deref().context("the suite wrote no report")?;
        ensure!(
            !report.contains("result: failure"),
            "the report has a failure:\n{report}"
        );
        Ok(())
    }
}

/// Runs the suite to its end; its output passes to ours.
pub fn run(cluster: &Cluster, suite: &Suite) -> Result<Findings> {
    let report: PathBuf = cluster.kubeconfig().with_file_name("conformance-report.yaml");
    // The suite's namespaces of an earlier run may be on their way out, and pods cannot be made in them then.
    cluster.until("the end of the suite's namespaces", || {
        let list = cluster.kubectl(&["get", "namespaces", "-o", "name"])?;
        Ok((!list.contains("namespace/gateway-conformance")).then_some(()))
    })?;
    // A report of an earlier run must not be taken for this one's.
    let _ = fs::remove_file(&report);
    let mut command = cluster.command(cluster.kubeconfig().with_file_name("bin").join("conformance.test"));
    command.args(["-test.run", "^TestConformance$", "-test.v", "-test.timeout", "40m"]);
    command.args(["-conformance-profiles=MESH-HTTP,MESH-GRPC", "-gateway-class="]);
    command.arg(format!("-supported-features={}", FEATURES.join(",")));
    if suite.enrolled {
        command.arg("-namespace-labels=nodemesh.io/mesh=enabled");
    }
    let home = "https://github.com/nodemesh/nodemesh";
    command.args(["-organization=nodemesh", "-project=nodemesh"]);
    command
        .arg(format!("-url={home}"))
        .arg(format!("-contact={home}/issues"));
    command.arg(format!("-version={}", suite.version));
    command.arg(format!("-report-output={}", report.display()));
    command
        .args(&suite.flags)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut child = command.spawn().context("run the conformance suite")?;
    let output = child.stdout.take().context("the suite has no output")?;
    let mut tests = BTreeMap::new();
    for line in BufReader::new(output).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        if let Some((name, good)) = result_line(&line) {
            tests.insert(name.to_string(), good);
        }
    }
    let good = child.wait()?.success();
    Ok(Findings {
        tests,
        report: fs::read_to_string(&report).ok(),
        good,
    })
}

/// Reads `    --- PASS: TestConformance/MeshBasic (1.03s)`, not the lines of its parts.
fn result_line(line: &str) -> Option<(&str, bool)> {
    let rest = line.trim_start().strip_prefix("--- ")?;
    let (verdict, rest) = rest.split_once(": TestConformance/")?;
    let name = rest.split(' ').next()?;
    let good = match verdict {
        "PASS" => true,
        "FAIL" => false,
        // A test whose features were not claimed did not run.
        _ => return None,
    };
    (!name.contains('/')).then_some((name, good))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_results() {
        let table = [
            (
                "    --- PASS: TestConformance/MeshBasic (1.03s)",
                Some(("MeshBasic", true)),
            ),
            (
                "    --- FAIL: TestConformance/MeshPorts (30.00s)",
                Some(("MeshPorts", false)),
            ),
            ("    --- SKIP: TestConformance/GatewayBasic (0.00s)", None),
            (
                "        --- PASS: TestConformance/MeshBasic/Send_to_service (1.03s)",
                None,
            ),
            ("--- PASS: TestConformance (70.00s)", None),
            ("=== RUN   TestConformance/MeshBasic", None),
        ];
        for (line, want) in table {
            assert_eq!(result_line(line), want, "{line}");
        }
    }
}
