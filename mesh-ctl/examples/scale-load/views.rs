//! What a view costs by itself: compiling it, one endpoint's change, and look-ups in it, in worlds of growing size.

use std::{hint::black_box, net::SocketAddr, sync::Arc, time::Instant};

use anyhow::{Context, Result};
use mesh_api::{
    document::{DocumentSet, Resource, parse},
    identity::TrustDomain,
    shared_map::SharedMap,
    view::ViewCompiler,
    workload::{ObjectName, Revision, Workload},
};
use serde_json::{Value, json};

use crate::world::{self, Size};

/// Revisions that change one endpoint.
const CHANGES: usize = 200;
/// Look-ups of each kind that are timed.
const LOOKUPS: usize = 200_000;

/// Every size from a hundredth of the wanted one upwards, by tens.
pub fn measure(size: &Size) -> Result<Value> {
    let mut worlds = Vec::new();
    for divisor in [100, 10, 1] {
        worlds.push(of(&Size {
            services: size.services / divisor,
            endpoints: size.endpoints / divisor,
            policies: size.policies / divisor,
            nodes: size.nodes,
        })?);
    }
    Ok(Value::Array(worlds))
}

fn of(size: &Size) -> Result<Value> {
    let domain = TrustDomain::new("cluster.local")?;
    let mut set = DocumentSet::new();
    for document in world::documents(size) {
        let parsed = parse("scale", &document.to_string());
        set.extend(parsed.ok().context("a document of the world is invalid")?);
    }
    let mut resources: SharedMap<_, _> = set.resources(&domain).into_iter().map(|one| (one.key(), one)).collect();
    drop(set);
    let mut compiler = ViewCompiler::new(Some(&world::node(0)));
    let started = Instant::now();
    let mut view = compiler.compile(&domain, Revision(1), &resources);
    let compile = started.elapsed();

    // One endpoint goes or comes with each revision; the view before is dropped, as an agent does.
    let pods: Vec<Arc<Workload>> = view.workloads().take(CHANGES).cloned().collect();
    let started = Instant::now();
    for (pod, revision) in pods.iter().zip(2..) {
        let changed = Workload {
            ready: !pod.ready,
            ..Workload::clone(pod)
        };
        let changed = Resource::Workload(Arc::new(changed));
        resources.insert(changed.key(), changed);
        view = compiler.compile(&domain, Revision(revision), &resources);
    }
    let change = started.elapsed() / u32::try_from(pods.len().max(1))?;

    let per_lookup = |lookup: &mut dyn FnMut(usize)| {
        let started = Instant::now();
        for n in 0..LOOKUPS {
            // Far from one another, as connections are.
            lookup(n.wrapping_mul(2_654_435_761) % size.endpoints);
        }
        started.elapsed().as_nanos() as f64 / LOOKUPS as f64
    };
    let service = per_lookup(&mut |n| {
        let address = SocketAddr::new(world::service_address(n % size.services), 80);
        black_box(view.destination(address));
    });
    let source = per_lookup(&mut |n| {
        black_box(view.workload_by_address(world::pod_address(n)));
    });
    let names: Vec<ObjectName> = view.workloads().map(|workload| workload.name.clone()).collect();
    let inbound = per_lookup(&mut |n| {
        if let Some(name) = names.get(n) {
            black_box(view.inbound(name, 8080));
        }
    });
    Ok(json!({
        "services": size.services,
        "endpoints": size.endpoints,
        "policies": size.policies,
        "compile_seconds": compile.as_secs_f64(),
        "one_endpoint_ms": change.as_secs_f64() * 1000.0,
        "destination_ns": service,
        "source_ns": source,
        "inbound_ns": inbound,
    }))
}
