//! `mesh-ctl doctor`: is the mesh in this cluster well, and if not, what would be right.
//!
//! Each check says one thing and never changes anything. A check that cannot be made, for want of rights or of an
//! answer, says so; it never counts as well. Judging is pure and stands apart from asking.

mod cluster;
mod mesh;

use serde::Serialize;

use crate::{
    connect::{CALL_TIMEOUT, Failure, World, connect},
    kubernetes::Cluster,
    output::{Format, Table, print, print_value},
};

/// The most names that one line shows.
const NAMES_SHOWN_MAX: usize = 5;

/// Arguments of `doctor`.
#[derive(Debug, clap::Args)]
pub struct DoctorArgs {
    /// A warning is a failure too.
    #[arg(long)]
    strict: bool,
    /// How the result is printed.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// What a check came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// It works, and may not do so for long, or not for all.
    Warn,
    /// Something does not work.
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    check: &'static str,
    level: Level,
    text: String,
    /// What would be right; empty if all is well.
    #[serde(skip_serializing_if = "String::is_empty")]
    expected: String,
}

impl Finding {
    fn ok(check: &'static str, text: impl Into<String>) -> Finding {
        Finding {
            check,
            level: Level::Ok,
            text: text.into(),
            expected: String::new(),
        }
    }

    fn warn(check: &'static str, text: impl Into<String>, expected: impl Into<String>) -> Finding {
        Finding {
            check,
            level: Level::Warn,
            text: text.into(),
            expected: expected.into(),
        }
    }

    fn fail(check: &'static str, text: impl Into<String>, expected: impl Into<String>) -> Finding {
        Finding {
            check,
            level: Level::Fail,
            text: text.into(),
            expected: expected.into(),
        }
    }

    /// A check that could not be made.
    fn unknown(check: &'static str, failure: &Failure) -> Finding {
        let why = failure.lines().join("; ");
        Finding::fail(check, format!("cannot be told: {why}"), "an answer")
    }
}

/// Some names, and how many more there are.
fn some(names: &[String]) -> String {
    let shown = names
        .iter()
        .take(NAMES_SHOWN_MAX)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    match names.len().saturating_sub(NAMES_SHOWN_MAX) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[derive(Serialize)]
struct Report<'a> {
    well: bool,
    findings: &'a [Finding],
}

async fn findings(cluster: &Cluster, world: &World) -> Result<Vec<Finding>, Failure> {
    let mut findings = Vec::new();
    // Without an API server nothing else can be asked.
    findings.push(cluster::api_server(cluster).await?);
    findings.push(cluster::permissions(cluster).await);
    findings.push(cluster::definitions(cluster).await);
    findings.push(cluster::gateway_api(cluster).await);
    findings.push(cluster::kernels(cluster).await);
    findings.push(mesh::controller(cluster).await);
    findings.push(mesh::agents(cluster).await);
    let status = async {
        let mut client = connect(world, CALL_TIMEOUT).await?;
        let request = mesh_api::wire::operator::StatusRequest {};
        Ok::<_, Failure>(client.status(request).await?.into_inner())
    };
    match status.await {
        Ok(status) => findings.extend(mesh::status(&status, std::time::SystemTime::now())),
        Err(failure) => findings.push(Finding::unknown("status", &failure)),
    }
    findings.push(cluster::host_network(cluster).await);
    findings.push(cluster::other_meshes(cluster).await);
    findings.push(mesh::policies(cluster).await);
    Ok(findings)
}

/// Runs `mesh-ctl doctor`.
pub async fn run(args: DoctorArgs, world: &World) -> Result<(), Failure> {
    let cluster = world.cluster()?.cluster().await?;
    let findings = findings(&cluster, world).await?;
    let worst = if args.strict { Level::Warn } else { Level::Fail };
    let bad = findings
        .iter()
        .filter(|finding| finding.level == Level::Fail || finding.level == worst)
        .count();
    if args.output == Format::Table {
        let mut table = Table::new(&["", "CHECK", "FOUND", "EXPECTED"]);
        for finding in &findings {
            let level = match finding.level {
                Level::Ok => "ok",
                Level::Warn => "warn",
                Level::Fail => "FAIL",
            };
            table.row([
                level.to_owned(),
                finding.check.to_owned(),
                finding.text.clone(),
                finding.expected.clone(),
            ]);
        }
        print(&table.to_string());
    } else {
        let report = Report {
            well: bad == 0,
            findings: &findings,
        };
        print_value(&report, args.output)?;
    }
    match bad {
        0 => Ok(()),
        1 => Err(Failure::refused("one check failed")),
        n => Err(Failure::refused(format!("{n} checks failed"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_are_cut_and_counted() {
        let names: Vec<String> = (0..7).map(|n| format!("n{n}")).collect();
        assert_eq!(some(&names), "n0, n1, n2, n3, n4 and 2 more");
        assert_eq!(some(&names[..2]), "n0, n1");
    }
}
