//! `mesh-ctl policy`: documents in and out.

use std::{
    io::Read,
    path::{Path, PathBuf},
    time::Duration,
};

use mesh_api::{
    document::{DEFAULT_NAMESPACE, DocumentKey, Kind, Problem},
    wire::operator::{
        ApplyRequest, Change, DeleteRequest, DocumentChange, DocumentKey as WireKey, NodeStatus,
        Problem as WireProblem, Source, StatusRequest, WaitAckedRequest,
    },
};
use serde::Serialize;

use crate::{
    check,
    connect::{CALL_TIMEOUT, Failure, World, connect},
    explain::{self, ExplainArgs},
    get, kubernetes,
    output::{Format, print, print_value},
    plan,
};

/// The most files that one command reads.
const SOURCES_MAX: usize = 10_000;

/// Documents in and out.
#[derive(Debug, clap::Subcommand)]
pub enum PolicyCommand {
    /// Create or change documents: all of them as one new revision, or none.
    Apply(ApplyArgs),
    /// Show documents.
    Get(get::GetArgs),
    /// Delete documents.
    Delete(DeleteArgs),
    /// Say what an apply would change, and whom it concerns.
    Plan(plan::PlanArgs),
    /// Validate documents without a controller.
    Check(check::CheckArgs),
    /// Say what would happen to a request, and by which rule.
    Explain(ExplainArgs),
}

/// Where a dry run is done; without a cluster it is always the controller's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DryRun {
    /// By the API server.
    Server,
    /// By this program, without asking anybody.
    Client,
}

/// How long to wait for agents.
#[derive(Debug, clap::Args)]
pub struct WaitArgs {
    /// Return only when every connected agent holds the new revision; fail if one refuses it.
    #[arg(long)]
    pub wait: bool,
    /// How long --wait waits.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = crate::duration)]
    pub timeout: Duration,
}

/// Arguments of `apply`.
#[derive(Debug, clap::Args)]
pub struct ApplyArgs {
    /// A file, a directory (its *.yaml, *.yml and *.json) or - for standard input; may be given again.
    #[arg(short, long = "filename", value_name = "FILE|DIR|-", required = true)]
    pub filenames: Vec<PathBuf>,
    /// Say what would change, and change nothing. In a cluster the API server is asked either way.
    #[arg(long, value_enum, value_name = "WHERE", num_args = 0..=1, require_equals = true, default_missing_value = "server")]
    pub dry_run: Option<DryRun>,
    /// Take over fields that somebody else has set (in a cluster).
    #[arg(long)]
    pub force_conflicts: bool,
    #[command(flatten)]
    pub wait: WaitArgs,
    /// How the result is printed.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Format,
}

/// Arguments of `delete`.
#[derive(Debug, clap::Args)]
pub struct DeleteArgs {
    /// KIND/NAME, or KIND.
    #[arg(
        value_name = "KIND[/NAME]",
        required_unless_present = "filenames",
        conflicts_with = "filenames"
    )]
    pub what: Option<String>,
    /// The document's name.
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
    /// Delete the documents of this file, directory or standard input; may be given again.
    #[arg(short, long = "filename", value_name = "FILE|DIR|-")]
    pub filenames: Vec<PathBuf>,
    /// Documents that are not there are no failure.
    #[arg(long)]
    pub ignore_not_found: bool,
    /// Say what would change, and change nothing. In a cluster the API server is asked either way.
    #[arg(long, value_enum, value_name = "WHERE", num_args = 0..=1, require_equals = true, default_missing_value = "server")]
    pub dry_run: Option<DryRun>,
    #[command(flatten)]
    pub wait: WaitArgs,
    /// How the result is printed.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Format,
}

/// What `apply` and `delete` print for programs.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ChangeReport {
    revision: u64,
    dry_run: bool,
    changes: Vec<ChangeLine>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

#[derive(Serialize)]
struct ChangeLine {
    kind: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    namespace: String,
    name: String,
    change: &'static str,
}

/// Runs `mesh-ctl policy`.
pub async fn run(command: PolicyCommand, world: &World) -> Result<(), Failure> {
    if let World::Kubernetes(cluster) = world {
        match &command {
            PolicyCommand::Apply(args) => return kubernetes::policy::apply(args, cluster.cluster().await?).await,
            PolicyCommand::Get(args) => return kubernetes::policy::get(args, cluster.cluster().await?).await,
            PolicyCommand::Delete(args) => return kubernetes::policy::delete(args, cluster.cluster().await?).await,
            PolicyCommand::Plan(_) | PolicyCommand::Check(_) | PolicyCommand::Explain(_) => {}
        }
    }
    match command {
        PolicyCommand::Apply(args) => apply(args, world).await,
        PolicyCommand::Get(args) => get::run(args, world).await,
        PolicyCommand::Delete(args) => delete(args, world).await,
        PolicyCommand::Plan(args) => plan::run(args, world).await,
        PolicyCommand::Check(args) => check::run(args),
        PolicyCommand::Explain(args) => explain::run(args, world).await,
    }
}

fn is_document_file(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str());
    matches!(extension, Some("yaml" | "yml" | "json")) && path.is_file()
}

fn read_file(path: &Path) -> Result<Source, Failure> {
    let name = path.display().to_string();
    let yaml = std::fs::read_to_string(path).map_err(|e| Failure::refused(format!("{name}: {e}")))?;
    Ok(Source { name, yaml })
}

/// Reads what `-f` names, in the order given; a directory's files by name.
pub fn read_sources(paths: &[PathBuf]) -> Result<Vec<Source>, Failure> {
    let mut sources = Vec::new();
    for path in paths {
        if path.as_os_str() == "-" {
            let mut yaml = String::new();
            std::io::stdin()
                .read_to_string(&mut yaml)
                .map_err(|e| Failure::refused(format!("standard input: {e}")))?;
            let name = "<stdin>".to_owned();
            sources.push(Source { name, yaml });
        } else if path.is_dir() {
            let listing = std::fs::read_dir(path).map_err(|e| Failure::refused(format!("{}: {e}", path.display())))?;
            let mut files: Vec<PathBuf> = listing.filter_map(|entry| Some(entry.ok()?.path())).collect();
            files.retain(|file| is_document_file(file));
            files.sort();
            if files.is_empty() {
                return Err(Failure::refused(format!(
                    "{}: no *.yaml, *.yml or *.json in it",
                    path.display()
                )));
            }
            for file in files {
                sources.push(read_file(&file)?);
            }
        } else {
            sources.push(read_file(path)?);
        }
        if sources.len() > SOURCES_MAX {
            return Err(Failure::refused(format!("more than {SOURCES_MAX} files")));
        }
    }
    Ok(sources)
}

fn change_word(change: i32) -> &'static str {
    match Change::try_from(change) {
        Ok(Change::Created) => "created",
        Ok(Change::Changed) => "changed",
        Ok(Change::Unchanged) => "unchanged",
        Ok(Change::Removed) => "deleted",
        Ok(Change::Unspecified) | Err(_) => "unknown",
    }
}

fn change_lines(changes: Vec<DocumentChange>) -> Vec<ChangeLine> {
    let line = |change: DocumentChange| {
        let word = change_word(change.change);
        let key = change.key.unwrap_or_default();
        ChangeLine {
            kind: key.kind,
            namespace: key.namespace,
            name: key.name,
            change: word,
        }
    };
    changes.into_iter().map(line).collect()
}

/// Sorts a response's problems into failures and warnings, as lines.
pub fn split_problems(problems: Vec<WireProblem>) -> (Vec<String>, Vec<String>) {
    let (odd, wrong): (Vec<_>, Vec<_>) = problems.into_iter().partition(|problem| problem.warning);
    let lines = |all: Vec<WireProblem>| {
        let line = |problem| {
            let problem = Problem::from(problem);
            let text = problem.to_string();
            // A problem of no file has no place to name.
            text.strip_prefix(": ").map(str::to_owned).unwrap_or(text)
        };
        all.into_iter().map(line).collect()
    };
    (lines(wrong), lines(odd))
}

/// Warnings go to standard error.
pub fn warn(warnings: &[String]) {
    for warning in warnings {
        eprintln!("warning: {warning}");
    }
}

fn print_changes(report: &ChangeReport, format: Format) -> Result<(), Failure> {
    warn(&report.warnings);
    if format != Format::Table {
        return print_value(report, format);
    }
    let mut text = String::new();
    let note = if report.dry_run { " (dry run)" } else { "" };
    for line in &report.changes {
        let place = if line.namespace.is_empty() { "" } else { "/" };
        text += &format!(
            "{} {}{place}{} {}{note}\n",
            line.kind, line.namespace, line.name, line.change
        );
    }
    text += &format!("revision {}{note}\n", report.revision);
    print(&text);
    Ok(())
}

async fn apply(args: ApplyArgs, world: &World) -> Result<(), Failure> {
    let sources = read_sources(&args.filenames)?;
    let mut client = connect(world, CALL_TIMEOUT).await?;
    let request = ApplyRequest {
        sources,
        dry_run: args.dry_run.is_some(),
    };
    let response = client.apply(request).await?.into_inner();
    let (wrong, warnings) = split_problems(response.problems);
    if !wrong.is_empty() {
        warn(&warnings);
        return Err(Failure::Refused(wrong));
    }
    let report = ChangeReport {
        revision: response.revision,
        dry_run: args.dry_run.is_some(),
        changes: change_lines(response.changes),
        warnings,
    };
    print_changes(&report, args.output)?;
    wait(
        &args.wait,
        args.dry_run.is_some(),
        response.revision,
        world,
        args.output,
    )
    .await
}

/// Waits for all agents, if asked to.
async fn wait(args: &WaitArgs, dry_run: bool, revision: u64, world: &World, output: Format) -> Result<(), Failure> {
    if !args.wait || dry_run {
        return Ok(());
    }
    // The controller ends the wait; the call's own limit only catches one that died.
    let mut client = connect(world, args.timeout + CALL_TIMEOUT).await?;
    let request = WaitAckedRequest {
        revision,
        timeout_ms: u32::try_from(args.timeout.as_millis()).unwrap_or(u32::MAX),
    };
    let response = client.wait_acked(request).await?.into_inner();
    if !response.nacked.is_empty() {
        let line = |node: &NodeStatus| {
            format!(
                "{} refused revision {}: {}",
                node.node, node.nacked_revision, node.nack_reason
            )
        };
        return Err(Failure::Refused(response.nacked.iter().map(line).collect()));
    }
    if !response.acked {
        let status = client.status(StatusRequest {}).await?.into_inner();
        if status.withheld {
            return Err(Failure::refused(
                "agents get no new revision while a stored document cannot be read: see mesh-ctl status",
            ));
        }
        return Err(Failure::Timeout(format!(
            "revision {revision} is not held by {} yet",
            response.waiting_for.join(", ")
        )));
    }
    if output == Format::Table {
        let status = client.status(StatusRequest {}).await?.into_inner();
        let connected = status.nodes.iter().filter(|node| node.connected).count();
        print(&match connected {
            0 => "no agent is connected\n".to_owned(),
            1 => "held by the 1 connected agent\n".to_owned(),
            n => format!("held by all {n} connected agents\n"),
        });
    }
    Ok(())
}

/// The short names of the definitions, and kubectl's of Kubernetes' own kinds.
fn long_name(kind: &str) -> &str {
    match kind {
        "ap" => "AccessPolicy",
        "mp" => "MeshPolicy",
        "rl" => "RateLimit",
        "ss" => "ServiceSubset",
        "tp" => "TrafficPolicy",
        "ns" => "Namespace",
        "no" => "Node",
        "po" => "Pod",
        "sa" => "ServiceAccount",
        "svc" => "Service",
        long => long,
    }
}

/// `KIND`, `KIND/NAME` or `KIND NAME`.
pub fn kind_and_name(what: Option<&str>, name: Option<&str>) -> Result<(Option<Kind>, String), Failure> {
    let Some(what) = what else {
        return Ok((None, String::new()));
    };
    let (kind, inner) = match what.split_once('/') {
        Some((kind, inner)) => (kind, Some(inner)),
        None => (what, None),
    };
    let found = Kind::find(long_name(kind)).ok_or_else(|| {
        let all: Vec<_> = Kind::ALL.iter().map(|kind| kind.as_str()).collect();
        Failure::Usage(format!("unknown kind {kind:?}, expected one of {}", all.join(", ")))
    })?;
    match (inner, name) {
        (Some(_), Some(_)) => Err(Failure::Usage("a name is given twice".into())),
        (inner, name) => Ok((Some(found), inner.or(name).unwrap_or_default().to_owned())),
    }
}

async fn delete(args: DeleteArgs, world: &World) -> Result<(), Failure> {
    let (kind, name) = kind_and_name(args.what.as_deref(), args.name.as_deref())?;
    let mut keys = Vec::new();
    if let Some(kind) = kind {
        if name.is_empty() {
            return Err(Failure::Usage(format!("which {kind}? expected {kind}/NAME")));
        }
        keys.push(WireKey::from(&DocumentKey::new(
            kind,
            world.namespace().unwrap_or(DEFAULT_NAMESPACE),
            &name,
        )));
    }
    let request = DeleteRequest {
        keys,
        sources: read_sources(&args.filenames)?,
        dry_run: args.dry_run.is_some() || !args.ignore_not_found,
    };
    let mut client = connect(world, CALL_TIMEOUT).await?;
    let mut response = client.delete(request.clone()).await?.into_inner();
    let (wrong, mut warnings) = split_problems(response.problems);
    if !wrong.is_empty() {
        return Err(Failure::Refused(wrong));
    }
    if !args.ignore_not_found {
        // Asked dry at first: a document that is not there stops the others from being deleted.
        if !warnings.is_empty() {
            return Err(Failure::Refused(warnings));
        }
        if args.dry_run.is_none() {
            let request = DeleteRequest {
                dry_run: false,
                ..request
            };
            response = client.delete(request).await?.into_inner();
            warnings = split_problems(response.problems).1;
        }
    }
    let report = ChangeReport {
        revision: response.revision,
        dry_run: args.dry_run.is_some(),
        changes: change_lines(response.changes),
        warnings,
    };
    print_changes(&report, args.output)?;
    wait(&args.wait, args.dry_run.is_some(), report.revision, world, args.output).await
}
