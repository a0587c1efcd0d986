//! `mesh-ctl status`: which agent holds which revision, which pods are captured, and which certificates live how long.

use std::time::SystemTime;

use mesh_api::wire::operator::{NodeStatus, StatusRequest, StatusResponse};
use serde::Serialize;

use crate::{
    connect::{CALL_TIMEOUT, Failure, World, connect},
    output::{Format, Table, print, print_value, when},
};

/// Arguments of `status`.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// How the result is printed.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    controller: ControllerReport,
    agents: Vec<AgentReport>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ControllerReport {
    version: String,
    trust_domain: String,
    revision: u64,
    revision_made: i64,
    documents: u32,
    root_expires: i64,
    serving_expires: i64,
    /// Agents get nothing new while a stored document cannot be read.
    withheld: bool,
    unreadable: Vec<UnreadableReport>,
}

#[derive(Serialize)]
struct UnreadableReport {
    kind: String,
    namespace: String,
    name: String,
    why: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct AgentReport {
    node: String,
    connected: bool,
    address: String,
    version: String,
    abi_version: u32,
    /// The revision that it serves by.
    revision: u64,
    /// Whether that is the newest one.
    current: bool,
    nacked_revision: u64,
    nack_reason: String,
    last_seen: i64,
    certificate_expires: i64,
    pods: Vec<PodReport>,
    certificates: Vec<CertificateReport>,
}

#[derive(Serialize)]
struct PodReport {
    namespace: String,
    name: String,
    enrolled: bool,
    captured: bool,
    why: String,
}

#[derive(Serialize)]
struct CertificateReport {
    identity: String,
    expires: i64,
    problem: String,
}

fn agent_report(node: NodeStatus, newest: u64) -> AgentReport {
    let status = node.status.unwrap_or_default();
    AgentReport {
        current: node.held_revision == newest,
        node: node.node,
        connected: node.connected,
        address: node.address,
        version: node.agent_version,
        abi_version: node.abi_version,
        revision: node.held_revision,
        nacked_revision: node.nacked_revision,
        nack_reason: node.nack_reason,
        last_seen: node.last_seen_unix,
        certificate_expires: node.certificate_expires_unix,
        pods: status
            .pods
            .into_iter()
            .map(|pod| PodReport {
                namespace: pod.namespace,
                name: pod.name,
                enrolled: pod.enrolled,
                captured: pod.captured,
                why: pod.why,
            })
            .collect(),
        certificates: status
            .certificates
            .into_iter()
            .map(|certificate| CertificateReport {
                identity: certificate.identity,
                expires: certificate.expires_unix,
                problem: certificate.problem,
            })
            .collect(),
    }
}

fn report(response: StatusResponse) -> Report {
    let unreadable = response.unreadable.into_iter().map(|document| {
        let key = document.key.unwrap_or_default();
        UnreadableReport {
            kind: key.kind,
            namespace: key.namespace,
            name: key.name,
            why: document.unreadable,
        }
    });
    Report {
        controller: ControllerReport {
            version: response.controller_version,
            trust_domain: response.trust_domain,
            revision: response.revision,
            revision_made: response.revision_made_unix,
            documents: response.documents,
            root_expires: response.ca_expires_unix,
            serving_expires: response.serving_expires_unix,
            withheld: response.withheld,
            unreadable: unreadable.collect(),
        },
        agents: response
            .nodes
            .into_iter()
            .map(|node| agent_report(node, response.revision))
            .collect(),
    }
}

fn yes(what: bool) -> String {
    if what { "yes" } else { "no" }.to_owned()
}

fn agents_table(report: &Report, now: SystemTime) -> Table {
    let newest = report.controller.revision;
    let mut table = Table::new(&[
        "NODE",
        "AGENT",
        "CONNECTED",
        "REVISION",
        "CAPTURED",
        "CERTIFICATE",
        "LAST SEEN",
        "NOTE",
    ]);
    for agent in &report.agents {
        let enrolled = agent.pods.iter().filter(|pod| pod.enrolled).count();
        let captured = agent.pods.iter().filter(|pod| pod.enrolled && pod.captured).count();
        let note = match (agent.nacked_revision, agent.last_seen) {
            (0, 0) => "never connected".to_owned(),
            (0, _) => String::new(),
            (nacked, _) => format!("refused revision {nacked}: {}", agent.nack_reason),
        };
        table.row([
            agent.node.clone(),
            agent.version.clone(),
            yes(agent.connected),
            format!("{}/{newest}", agent.revision),
            format!("{captured}/{enrolled}"),
            when(agent.certificate_expires, now),
            when(agent.last_seen, now),
            note,
        ]);
    }
    table
}

fn text(report: &Report, now: SystemTime) -> String {
    let controller = &report.controller;
    let mut text = format!(
        "controller {} of {}: revision {} ({}), {} documents, root expires {}\n",
        controller.version,
        controller.trust_domain,
        controller.revision,
        match when(controller.revision_made, now) {
            made if made.is_empty() => "nothing applied yet".to_owned(),
            made => made,
        },
        controller.documents,
        when(controller.root_expires, now),
    );
    for document in &controller.unreadable {
        let name = format!("{} {}/{}", document.kind, document.namespace, document.name);
        text += &format!("unreadable: {name}: {}\n", document.why);
    }
    if controller.withheld {
        text += "agents get nothing new until the unreadable documents are replaced or deleted\n";
    }
    if report.agents.is_empty() {
        return text + "no agents\n";
    }
    text += &format!("\n{}", agents_table(report, now));
    let mut pods = Table::new(&["NAMESPACE", "POD", "NODE", "ENROLLED", "CAPTURED", "WHY NOT"]);
    let mut certificates = Table::new(&["IDENTITY", "NODE", "EXPIRES", "PROBLEM"]);
    for agent in &report.agents {
        for pod in &agent.pods {
            let (namespace, name, node) = (pod.namespace.clone(), pod.name.clone(), agent.node.clone());
            pods.row([
                namespace,
                name,
                node,
                yes(pod.enrolled),
                yes(pod.captured),
                pod.why.clone(),
            ]);
        }
        for certificate in &agent.certificates {
            let expires = when(certificate.expires, now);
            let (identity, problem) = (certificate.identity.clone(), certificate.problem.clone());
            certificates.row([identity, agent.node.clone(), expires, problem]);
        }
    }
    for table in [pods, certificates] {
        if !table.is_empty() {
            text += &format!("\n{table}");
        }
    }
    text
}

/// Runs `mesh-ctl status`.
pub async fn run(args: StatusArgs, world: &World) -> Result<(), Failure> {
    let mut client = connect(world, CALL_TIMEOUT).await?;
    let report = report(client.status(StatusRequest {}).await?.into_inner());
    if args.output == Format::Table {
        print(&text(&report, SystemTime::now()));
        return Ok(());
    }
    print_value(&report, args.output)
}
