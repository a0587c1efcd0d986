//! `mesh-ctl policy explain`: what the agents would decide, by the same functions, over the controller's documents.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use mesh_api::{
    document::{DocumentSet, Resource, parse},
    explain::{Explanation, PlainRequest, Verdict, explain},
    identity::TrustDomain,
    view::View,
    workload::{ObjectName, Revision},
};
use serde::Serialize;

use crate::{
    connect::{Failure, World},
    held::{Held, held},
    output::{Format, Table, print, print_value},
    policy::read_sources,
};

/// Arguments of `explain`.
#[derive(Debug, clap::Args)]
pub struct ExplainArgs {
    /// The pod that asks.
    #[arg(long, value_name = "NS/POD")]
    from: String,
    /// What it connects to: an address, a service (`cart`, `cart.shop`, `cart.shop.svc.cluster.local`) or a pod
    /// (`shop/cart-1`), and a port.
    #[arg(long, value_name = "HOST:PORT")]
    to: String,
    /// The request's method; without any of --method, --path and --header a TCP connection is explained.
    #[arg(long, value_name = "METHOD")]
    method: Option<String>,
    /// The request's path and query.
    #[arg(long, value_name = "PATH")]
    path: Option<String>,
    /// A header of the request, as `name: value`; may be given again.
    #[arg(long, value_name = "NAME: VALUE")]
    header: Vec<String>,
    /// The request's authority; the host of --to if absent.
    #[arg(long, value_name = "HOST")]
    host: Option<String>,
    /// Explain by these files instead of the controller's documents.
    #[arg(short, long = "filename", value_name = "FILE|DIR|-")]
    filenames: Vec<PathBuf>,
    /// How the result is printed.
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

fn name_of(text: &str) -> Result<ObjectName, Failure> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => Ok(ObjectName::new(namespace, name)),
        _ => Err(Failure::Usage(format!("{text:?}: expected NS/POD"))),
    }
}

/// The address that the source's `connect` would get for a host.
fn resolve(host: &str, namespace: &str, resources: &[Resource]) -> Option<IpAddr> {
    if let Ok(address) = host.trim_matches(['[', ']']).parse() {
        return Some(address);
    }
    if let Some((namespace, name)) = host.split_once('/') {
        return resources.iter().find_map(|resource| match resource {
            Resource::Workload(pod) if *pod.name.namespace == *namespace && *pod.name.name == *name => {
                pod.addresses.first().copied()
            }
            _ => None,
        });
    }
    let host = host.trim_end_matches('.');
    let short = host
        .strip_suffix(".svc.cluster.local")
        .or(host.strip_suffix(".svc"))
        .unwrap_or(host);
    let (name, namespace) = short.split_once('.').unwrap_or((short, namespace));
    let service = resources.iter().find_map(|resource| match resource {
        Resource::Service(service) if *service.name.namespace == *namespace && *service.name.name == *name => {
            Some(service)
        }
        _ => None,
    })?;
    // A headless service's name leads to its pods.
    let pod = || {
        resources.iter().find_map(|resource| match resource {
            Resource::Workload(pod) if service.selects(pod) => pod.addresses.first().copied(),
            _ => None,
        })
    };
    service.addresses.first().copied().or_else(pod)
}

async fn documents(args: &ExplainArgs, world: &World) -> Result<Held, Failure> {
    if args.filenames.is_empty() {
        return held(world).await;
    }
    let lines = |problems: Vec<mesh_api::document::Problem>| {
        Failure::Refused(problems.iter().map(ToString::to_string).collect())
    };
    let mut set = DocumentSet::new();
    for source in read_sources(&args.filenames)? {
        set.extend(parse(&source.name, &source.yaml).map_err(lines)?);
    }
    Ok(Held {
        set,
        trust_domain: TrustDomain::new("cluster.local").map_err(|e| Failure::refused(e.to_string()))?,
        revision: Revision(0),
        notes: Vec::new(),
    })
}

/// What `explain` prints for programs.
#[derive(Serialize)]
struct Told {
    #[serde(flatten)]
    explanation: Explanation,
    /// What people should know of documents that cannot be read.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    notes: Vec<String>,
}

/// Runs `mesh-ctl policy explain`. A refused request is a result, not a failure of the command.
pub async fn run(args: ExplainArgs, world: &World) -> Result<(), Failure> {
    let from = name_of(&args.from)?;
    let to = args
        .to
        .rsplit_once(':')
        .and_then(|(host, port)| Some((host, port.parse().ok()?)));
    let (host, port): (&str, u16) = to.ok_or_else(|| Failure::Usage(format!("{:?}: expected HOST:PORT", args.to)))?;
    let Held {
        set,
        trust_domain,
        revision,
        notes,
    } = documents(&args, world).await?;
    let resources = set.resources(&trust_domain);
    let address = resolve(host, &from.namespace, &resources)
        .ok_or_else(|| Failure::refused(format!("{host} is neither an address nor a service or pod with one")))?;
    let asks = args.method.is_some() || args.path.is_some() || !args.header.is_empty();
    let request = asks.then(|| {
        let (method, path) = (
            args.method.as_deref().unwrap_or("GET"),
            args.path.as_deref().unwrap_or("/"),
        );
        PlainRequest::new(method, path, args.host.as_deref().unwrap_or(host))
    });
    let request = args.header.iter().try_fold(request, |request, header| {
        let (name, value) = header
            .split_once(':')
            .ok_or_else(|| Failure::Usage(format!("{header:?}: expected NAME: VALUE")))?;
        Ok::<_, Failure>(request.map(|request| request.with_header(name.trim(), value.trim())))
    })?;
    // Which endpoints there are may hang on where the source runs.
    let source = resources.iter().find_map(|resource| match resource {
        Resource::Workload(workload) if workload.name == from => Some(&*workload.node),
        _ => None,
    });
    let view = View::compile_on(source.unwrap_or_default(), trust_domain, revision, &resources);
    let explanation = explain(&view, &from, SocketAddr::new(address, port), request.as_ref());
    if args.output != Format::Table {
        return print_value(&Told { explanation, notes }, args.output);
    }
    for note in &notes {
        eprintln!("warning: {note}");
    }
    let mut table = Table::new(&["STAGE", "OUTCOME", "RULE"]);
    for step in &explanation.steps {
        table.row([
            step.stage.to_owned(),
            step.outcome.clone(),
            step.rule.clone().unwrap_or_default(),
        ]);
    }
    let verdict = match explanation.verdict {
        Verdict::Served => "served",
        Verdict::Answered => "answered on the way",
        Verdict::Refused => "refused",
        Verdict::Depends => "it depends",
        Verdict::Untouched => "not the mesh's business",
    };
    print(&format!("{table}\n{verdict} (revision {})\n", explanation.revision));
    Ok(())
}
