//! From objects of the API server to what agents and operators are told.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn what_the_api_server_has_reaches_the_agents_and_nothing_else_does() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let (mut agent, _) = agent(&api, doors, "node-1", 0).await;
    let (first, resources) = snapshot_of(agent.take().await);
    let cart = crate::world::workload(&resources, "shop", "cart");
    assert!(cart.enrolled);
    assert_eq!(
        &*cart.uid,
        api.get("v1", "Pod", "shop", "cart").unwrap()["metadata"]["uid"]
            .as_str()
            .unwrap()
    );

    // Churn that means nothing to the mesh makes no revision ...
    for n in 0..5 {
        let mut cart = pod("cart", "node-1", "10.1.1.2");
        cart["metadata"]["annotations"] = json!({"example.com/seen": n.to_string()});
        cart["status"]["conditions"][0]["lastProbeTime"] = json!(format!("2026-01-01T00:00:0{n}Z"));
        api.apply(cart);
        api.apply(json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "other", "namespace": "shop"}, "data": {"n": n.to_string()},
        }));
    }
    // ... and what means something makes the next one.
    api.apply(service("other", "10.96.0.11"));
    let update = take_until(&mut agent, |update| says(update, "Service", "shop/other")).await;
    let (from, to, mut upserts, removed) = crate::world::delta_of(&update);
    // The agent's own pod may have come in between, in the same revision or one before.
    upserts.retain(|key| key != "Workload nodemesh-system/agent-node-1");
    assert_eq!((upserts, removed), (vec!["Service shop/other".to_owned()], vec![]));
    assert!(from >= first && to <= first + 2, "{from} {to}");

    api.delete("v1", "Service", "shop", "other");
    let update = agent.take().await;
    assert_eq!(crate::world::delta_of(&update).3, ["Service shop/other"]);
    replica.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_is_cut_or_expired_loses_nothing() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let (mut agent, _) = agent(&api, doors, "node-1", 0).await;
    agent.take().await;

    api.apply(service("kept", "10.96.0.20"));
    take_until(&mut agent, |update| says(update, "Service", "shop/kept")).await;
    // Cut: the watch goes on from where it was.
    api.cut();
    api.apply(service("while-cut", "10.96.0.21"));
    take_until(&mut agent, |update| says(update, "Service", "shop/while-cut")).await;
    // Expired: the list shows what is new, and what is gone.
    api.down(true);
    api.apply(service("while-down", "10.96.0.22"));
    api.delete("v1", "Service", "shop", "kept");
    api.compact();
    api.down(false);
    let mut seen = Vec::new();
    let mut gone = Vec::new();
    take_until(&mut agent, |update| {
        let (_, _, upserts, removed) = crate::world::delta_of(update);
        seen.extend(upserts);
        gone.extend(removed);
        seen.contains(&"Service shop/while-down".to_owned()) && gone.contains(&"Service shop/kept".to_owned())
    })
    .await;
    assert!(!gone.iter().any(|key| key != "Service shop/kept"), "{gone:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_published_before_every_kind_was_seen() {
    let api = FakeApi::start().await;
    shop(&api);
    api.apply(strict("shop", "strict"));
    api.forbid("meshpolicies");
    let mut replica = Replica::start(&api, "one");
    let health = replica.health();
    replica.line("a watch was interrupted");
    assert_eq!(get(health, "/livez").await.0, 200);
    let end = Instant::now() + PATIENCE;
    loop {
        let (code, text) = get(health, "/readyz").await;
        assert_eq!(code, 503);
        if text.ends_with("waiting: not seen yet: MeshPolicy\n") {
            break;
        }
        assert!(Instant::now() < end, "{text}");
    }
    // It does not even lead: another replica may be able to.
    tokio::time::timeout(
        crate::fake_api::A_WHILE,
        api.wait_for("a Lease", |api| {
            api.get(
                "coordination.k8s.io/v1",
                "Lease",
                "nodemesh-system",
                "nodemesh-controller",
            )
        }),
    )
    .await
    .expect_err("a replica leads that has not seen everything");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kind_that_is_installed_later_is_noticed() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let (mut agent, _) = agent(&api, doors, "node-1", 0).await;
    agent.take().await;
    api.apply(json!({
        "apiVersion": GATEWAY, "kind": "GRPCRoute", "metadata": {"name": "calls", "namespace": "shop"},
        "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "cart"}],
                 "rules": [{"backendRefs": [{"name": "cart", "port": 80}]}]},
    }));
    api.define("gateway.networking.k8s.io", "GRPCRoute", "v1");
    take_until(&mut agent, |update| says(update, "GRPCRoute", "shop/calls")).await;
}

async fn operator(doors: Doors) -> mesh_api::wire::operator::OperatorClient<Channel> {
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", doors.operator)).unwrap();
    mesh_api::wire::operator::OperatorClient::new(endpoint.connect().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_sees_everything_and_changes_nothing_here() {
    use mesh_api::wire::operator::{ApplyRequest, DeleteRequest, GetRequest, IssueJoinTokenRequest, StatusRequest};
    let api = FakeApi::start().await;
    shop(&api);
    api.apply(strict("shop", "strict"));
    let mut broken = strict("other", "very-strict");
    broken["metadata"]["name"] = json!("broken");
    api.apply(broken);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let (mut agent, _) = agent(&api, doors, "node-1", 0).await;
    agent.take().await;
    let mut client = operator(doors).await;
    let status = client.status(StatusRequest {}).await.unwrap().into_inner();
    assert_eq!(
        status
            .nodes
            .iter()
            .map(|n| (n.node.as_str(), n.connected))
            .collect::<Vec<_>>(),
        [("node-1", true), ("node-2", false)]
    );
    assert!(status.ca_expires_unix > 0 && status.serving_expires_unix > 0);
    let unreadable: Vec<_> = status
        .unreadable
        .iter()
        .map(|d| d.key.as_ref().unwrap().name.as_str())
        .collect();
    assert_eq!((unreadable, status.withheld), (vec!["broken"], false));
    let request = GetRequest {
        kind: "meshpolicy".into(),
        namespace: "shop".into(),
        name: String::new(),
    };
    let found = client.get(request).await.unwrap().into_inner().documents;
    assert_eq!(found.len(), 1);
    assert!(found[0].json.contains("\"strict\""), "{}", found[0].json);

    let apply = client.apply(ApplyRequest::default()).await.unwrap_err();
    let delete = client.delete(DeleteRequest::default()).await.unwrap_err();
    let token = client
        .issue_join_token(IssueJoinTokenRequest {
            node: "node-1".into(),
            valid_for_seconds: 0,
        })
        .await
        .unwrap_err();
    for status in [apply, delete, token] {
        assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guard_that_cannot_be_read_still_guards() {
    let api = FakeApi::start().await;
    shop(&api);
    api.apply(strict("shop", "strict"));
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let (mut agent, _) = agent(&api, doors, "node-1", 0).await;
    let snapshot = agent.take().await;
    assert!(says(&snapshot, "MeshPolicy", "shop/strict"));
    // An API server with an older schema lets it pass; the mesh keeps what it knew.
    api.apply(strict("shop", "whatever"));
    replica.line("cannot be read");
    api.apply(service("after", "10.96.0.40"));
    let update = take_until(&mut agent, |update| says(update, "Service", "shop/after")).await;
    let (_, _, _, removed) = crate::world::delta_of(&update);
    assert!(removed.is_empty(), "{removed:?}");

    // Without a version that could be read, a new leader denies rather than allows.
    replica.kill();
    let mut two = Replica::start(&api, "two");
    let doors = two.serves();
    let (mut agent, _) = self::agent(&api, doors, "node-1", 0).await;
    let (_, resources) = snapshot_of(agent.take().await);
    let modes: Vec<_> = resources
        .iter()
        .filter_map(|resource| match resource {
            Resource::Policy(document) => match &**document {
                Document::MeshPolicy(policy) => policy.spec.mtls.as_ref()?.mode,
                _ => None,
            },
            _ => None,
        })
        .collect();
    assert_eq!(modes, [MtlsMode::Strict]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_cluster_is_no_trouble() {
    const PODS: usize = 2000;
    let api = FakeApi::start().await;
    shop(&api);
    for n in 0..PODS {
        let address = format!("10.{}.{}.{}", 100 + n / 62_500, n / 250 % 250, n % 250 + 1);
        api.apply(pod(&format!("pod-{n}"), &format!("node-{}", n % 2 + 1), &address));
        if n.is_multiple_of(10) {
            api.apply(service(
                &format!("pod-{n}"),
                &format!("10.97.{}.{}", n / 2500, n / 10 % 250 + 1),
            ));
        }
    }
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let (mut agent, _) = agent(&api, doors, "node-1", 0).await;
    let (_, resources) = snapshot_of(agent.take().await);
    let workloads = resources.iter().filter(|r| matches!(r, Resource::Workload(_))).count();
    assert!(workloads >= PODS + 2, "{workloads}");
    let began = Instant::now();
    for n in 0..20 {
        api.apply(service(&format!("late-{n}"), &format!("10.98.0.{}", n + 1)));
    }
    let mut seen = std::collections::BTreeSet::new();
    let mut revisions = 0;
    while seen.len() < 20 {
        let update = agent.take().await;
        revisions += 1;
        let (_, _, upserts, _) = crate::world::delta_of(&update);
        seen.extend(upserts.into_iter().filter(|key| key.starts_with("Service shop/late-")));
    }
    println!("20 changes in {revisions} revisions, after {:?}", began.elapsed());
    assert!(revisions <= 10, "changes that come together are joined: {revisions}");
}
