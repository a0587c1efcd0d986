//! What the pure decisions cost on a small and on a large mesh: lookups must be flat.
//!
//! The large one has 10,000 services with ten endpoints each and 5,000 policies, the size that one agent must bear.

use std::{hint::black_box, net::SocketAddr};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use mesh_api::{
    authz::{SourceAttributes, decide},
    document::{DocumentSet, parse},
    identity::{SpiffeId, TrustDomain},
    request::Request,
    route::select,
    view::{Destination, View},
    workload::{ObjectName, Revision},
};

/// Services and policies of each mesh.
const SIZES: [(usize, usize); 2] = [(10, 5), (10_000, 5_000)];
const ENDPOINTS: usize = 10;

struct Get;

impl Request for Get {
    fn method(&self) -> &str {
        "GET"
    }
    fn path(&self) -> &str {
        "/bytes/1024"
    }
    fn query(&self) -> Option<&str> {
        None
    }
    fn authority(&self) -> Option<&str> {
        Some("service-1")
    }
    fn header(&self, _name: &str) -> Option<&str> {
        None
    }
    fn each_header_value(&self, _name: &str, _tell: &mut dyn FnMut(&str)) {}
}

fn address(service: usize) -> String {
    format!("10.96.{}.{}", service / 250, service % 250 + 1)
}

fn documents(services: usize, policies: usize) -> DocumentSet {
    let mut text =
        String::from("apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {nodemesh.io/mesh: enabled}}\n");
    for service in 0..services {
        text.push_str(&format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: service-{service}, namespace: shop}}\n\
             spec: {{clusterIP: {}, selector: {{app: app-{service}}}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n",
            address(service)
        ));
        for endpoint in 0..ENDPOINTS {
            let number = service * ENDPOINTS + endpoint;
            text.push_str(&format!(
                "---\napiVersion: v1\nkind: Pod\n\
                 metadata: {{name: pod-{number}, namespace: shop, labels: {{app: app-{service}}}}}\n\
                 spec: {{serviceAccountName: app-{service}, nodeName: node-{}, containers: [{{name: main}}]}}\n\
                 status: {{podIPs: [{{ip: 10.{}.{}.{}}}], conditions: [{{type: Ready, status: 'True'}}]}}\n",
                number % 100,
                number / 62_500,
                number / 250 % 250,
                number % 250 + 1
            ));
        }
    }
    for policy in 0..policies {
        text.push_str(&format!(
            "---\napiVersion: nodemesh.io/v1alpha1\nkind: AccessPolicy\nmetadata: {{name: policy-{policy}, namespace: shop}}\n\
             spec:\n  targetRefs: [{{kind: Service, name: service-{policy}}}]\n  action: Allow\n  rules:\n\
             \x20 - from: [{{identities: ['spiffe://cluster.local/ns/shop/sa/source']}}]\n\
             \x20   to: [{{methods: [GET], paths: [{{type: PathPrefix, value: /bytes}}]}}]\n"
        ));
    }
    text.push_str(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: route, namespace: shop}\nspec:\n\
         \x20 parentRefs: [{group: '', kind: Service, name: service-1, port: 80}]\n  rules:\n\
         \x20 - matches: [{path: {type: PathPrefix, value: /bytes}}]\n    backendRefs: [{name: service-1, port: 80}]\n",
    );
    let mut set = DocumentSet::new();
    match parse("bench", &text) {
        Ok(documents) => set.extend(documents),
        Err(problems) => panic!("{}", problems[0]),
    }
    set
}

fn decisions(criterion: &mut Criterion) {
    let domain = TrustDomain::new("cluster.local").unwrap();
    let source = "spiffe://cluster.local/ns/shop/sa/source".parse::<SpiffeId>().unwrap();
    for (services, policies) in SIZES {
        let resources = documents(services, policies).resources(&domain);
        let view = View::compile(domain.clone(), Revision(1), &resources);
        let size = format!("{services} services");
        let at: SocketAddr = format!("{}:80", address(1)).parse().unwrap();
        let pod = ObjectName::new("shop", "pod-10");
        let Destination::ServicePort(port) = view.destination(at) else {
            panic!("{at} is no service")
        };
        let table = port.routes.as_ref().expect("a route");
        let policy = view.inbound(&pod, 8080);
        let attributes = SourceAttributes {
            identity: Some(&source),
            address: at.ip(),
            port: 4000,
        };
        let mut group = criterion.benchmark_group("decisions");
        group.bench_function(BenchmarkId::new("destination of an address", &size), |bencher| {
            bencher.iter(|| view.destination(black_box(at)));
        });
        group.bench_function(BenchmarkId::new("inbound policy of a pod", &size), |bencher| {
            bencher.iter(|| view.inbound(black_box(&pod), 8080));
        });
        group.bench_function(BenchmarkId::new("route of a request", &size), |bencher| {
            bencher.iter(|| select(table, "shop", black_box(&Get)));
        });
        group.bench_function(BenchmarkId::new("permit of a request", &size), |bencher| {
            bencher.iter(|| decide(&policy, &attributes, Some(black_box(&Get))));
        });
        group.finish();
        let mut group = criterion.benchmark_group("view");
        group.sample_size(10);
        group.bench_function(BenchmarkId::new("compile", &size), |bencher| {
            bencher.iter(|| View::compile(domain.clone(), Revision(1), black_box(&resources)));
        });
        group.finish();
    }
}

criterion_group!(benches, decisions);
criterion_main!(benches);
