//! Who gets which certificate in a cluster, and who signs.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_joins_by_its_own_pods_token_only() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let own = agent_pod(&api, "agent-1", "node-1");
    let other = agent_pod(&api, "agent-2", "node-2");
    api.token("default-account", {
        let mut review = review("agent-1", "uid");
        review["user"]["username"] = json!("system:serviceaccount:nodemesh-system:default");
        review
    });
    api.token("gone", review("agent-0", "uid-0"));
    api.token("another-uid", review("agent-1", "uid-of-before"));
    let cases = [
        ("node-1", own.as_str(), true),
        ("node-1", own.as_str(), true),
        ("node-2", own.as_str(), false),
        ("node-1", other.as_str(), false),
        ("node-1", "default-account", false),
        ("node-1", "gone", false),
        ("node-1", "another-uid", false),
        ("node-1", "unknown", false),
    ];
    for (node, token, good) in cases {
        match join(&api, doors, node, token).await {
            Ok(_) => assert!(good, "{node} {token}"),
            Err(status) => {
                assert!(!good, "{node} {token}: {status}");
                assert_eq!(status.code(), Code::PermissionDenied, "{status}");
                assert!(!status.message().contains("agent-"), "it tells too much: {status}");
            }
        }
    }
    // The pod is gone, and with it the worth of its token.
    api.delete("v1", "Pod", "nodemesh-system", "agent-1");
    assert!(join(&api, doors, "node-1", &own).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_gets_the_identities_of_its_nodes_pods_and_steals_none() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let (_agent, identity) = agent(&api, doors, "node-1", 0).await;
    let mut client = connect_with(doors.agents, roots(&api), Some(&identity)).await.unwrap();
    sign(&mut client, "spiffe://cluster.local/ns/shop/sa/cart")
        .await
        .unwrap()
        .unwrap();
    for stolen in [
        "spiffe://cluster.local/ns/shop/sa/front",
        "spiffe://cluster.local/ns/nodemesh-system/sa/nodemesh-controller",
        // It runs there, and is outside of the mesh.
        "spiffe://cluster.local/ns/nodemesh-system/sa/nodemesh-agent",
        "spiffe://cluster.local/node/node-2",
        "spiffe://cluster.local/controller",
    ] {
        assert!(
            sign(&mut client, stolen).await.unwrap().is_err(),
            "{stolen} was signed for node-1"
        );
    }
    // The pod goes, and with it the right to its identity.
    api.delete("v1", "Pod", "shop", "cart");
    let end = Instant::now() + PATIENCE;
    while sign(&mut client, "spiffe://cluster.local/ns/shop/sa/cart")
        .await
        .unwrap()
        .is_ok()
    {
        assert!(Instant::now() < end, "it is still signed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ca_is_made_once_and_its_successor_overlaps() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut one = Replica::start(&api, "one");
    one.serves();
    let secret = || api.get("v1", "Secret", "nodemesh-system", "nodemesh-ca").unwrap();
    let bundle = || {
        api.get("v1", "ConfigMap", "nodemesh-system", "nodemesh-trust-bundle")
            .unwrap()
    };
    let (made, told) = (secret(), bundle());
    assert_eq!(made["type"], "kubernetes.io/tls");
    one.stop();
    let mut two = Replica::start(&api, "two");
    let doors = two.serves();
    assert_eq!(secret(), made, "another leader must not make another CA");
    assert_eq!(bundle(), told);

    // Somebody replaces it: both roots are told at once, over the stream too.
    let (mut agent, _) = agent(&api, doors, "node-1", 0).await;
    agent.take().await;
    let other = FakeApi::start().await;
    other.apply_yaml(CLUSTER);
    let mut elsewhere = Replica::start(&other, "elsewhere");
    elsewhere.serves();
    let mut new = other.get("v1", "Secret", "nodemesh-system", "nodemesh-ca").unwrap();
    new["metadata"] = made["metadata"].clone();
    api.apply(new);
    let update = take_until(&mut agent, |update| {
        matches!(
            update,
            Update::Delta {
                trust_roots: Some(_),
                ..
            }
        )
    })
    .await;
    let Update::Delta {
        trust_roots: Some(roots),
        ..
    } = update
    else {
        unreachable!()
    };
    assert_eq!(roots.0.len(), 2);
    assert_eq!(
        bundle()["data"]["bundle.pem"]
            .as_str()
            .unwrap()
            .matches("BEGIN")
            .count(),
        2
    );
}
