//! Conditions of routes and policies, and Events of pods.

use super::*;

/// A condition of an object's status, of the parent of that name for a route: status, reason, generation.
fn condition(object: &Value, parent: Option<&str>, kind: &str) -> Option<(String, String, i64)> {
    let conditions = match parent {
        None => &object["status"]["conditions"],
        Some(name) => {
            let parents = object["status"]["parents"].as_array()?;
            let ours = parents
                .iter()
                .find(|p| p["parentRef"]["name"] == name && p["controllerName"] == "nodemesh.io/mesh")?;
            &ours["conditions"]
        }
    };
    let found = conditions
        .as_array()?
        .iter()
        .find(|condition| condition["type"] == kind)?;
    let text = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
    Some((text("status"), text("reason"), found["observedGeneration"].as_i64()?))
}

fn route(backend: &str) -> Value {
    json!({
        "apiVersion": GATEWAY, "kind": "HTTPRoute", "metadata": {"name": "cart", "namespace": "shop"},
        "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "cart"}],
                 "rules": [{"backendRefs": [{"name": backend, "port": 80}]}]},
    })
}

async fn says_of(api: &FakeApi, kind: &str, name: &str, parent: Option<&str>, wanted: &[(&str, &str, &str, i64)]) {
    let version = if kind == "HTTPRoute" { GATEWAY } else { NODEMESH };
    let what = format!("{kind} {name}: {wanted:?}");
    api.wait_for(&what, |api| {
        let object = api.get(version, kind, "shop", name)?;
        let good = wanted.iter().all(|(condition_type, status, reason, generation)| {
            condition(&object, parent, condition_type)
                == Some(((*status).to_owned(), (*reason).to_owned(), *generation))
        });
        good.then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_says_what_is_so_and_when_agents_hold_it() {
    let api = FakeApi::start().await;
    shop(&api);
    api.apply(route("missing"));
    api.apply(strict("shop", "strict"));
    let theirs = json!({
        "parentRef": {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "edge"},
        "controllerName": "example.com/gateway", "conditions": [],
    });
    let mut object = route("missing");
    object["status"] = json!({ "parents": [theirs.clone()] });
    api.apply(object);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let unresolved = [
        ("Accepted", "True", "Accepted", 1),
        ("ResolvedRefs", "False", "BackendNotFound", 1),
        ("Programmed", "False", "Pending", 1),
    ];
    says_of(&api, "HTTPRoute", "cart", Some("cart"), &unresolved).await;
    let policy = [
        ("Accepted", "True", "Accepted", 1),
        ("Programmed", "False", "Pending", 1),
    ];
    says_of(&api, "MeshPolicy", "strict", None, &policy).await;

    // Somebody else writes in between: nothing of it may be lost.
    api.conflict("httproutes", 1);
    api.apply(route("cart"));
    let resolved = [
        ("ResolvedRefs", "True", "ResolvedRefs", 2),
        ("Programmed", "False", "Pending", 2),
    ];
    says_of(&api, "HTTPRoute", "cart", Some("cart"), &resolved).await;

    // Both nodes run workloads of the shop: the second ack completes it.
    let (mut first, _) = agent(&api, doors, "node-1", 0).await;
    let revision = revision_of(&first.take().await);
    let waiting = api.get(GATEWAY, "HTTPRoute", "shop", "cart").unwrap();
    assert_eq!(condition(&waiting, Some("cart"), "Programmed").unwrap().0, "False");
    let (mut second, _) = agent(&api, doors, "node-2", 0).await;
    second.take().await;
    says_of(
        &api,
        "HTTPRoute",
        "cart",
        Some("cart"),
        &[("Programmed", "True", "Programmed", 2)],
    )
    .await;
    says_of(
        &api,
        "MeshPolicy",
        "strict",
        None,
        &[("Programmed", "True", "Programmed", 1)],
    )
    .await;
    let policy = api.get(NODEMESH, "MeshPolicy", "shop", "strict").unwrap();
    let told = policy["status"]["revision"].as_u64().unwrap();
    assert!(told > 0 && told <= revision, "{told}");
    let route = api.get(GATEWAY, "HTTPRoute", "shop", "cart").unwrap();
    assert!(
        route["status"]["parents"].as_array().unwrap().contains(&theirs),
        "{route:#}"
    );

    // Revisions that change nothing of it, and another leader, are no news.
    let writes = api.requests("PATCH");
    api.apply(service("other", "10.96.0.50"));
    first.take().await;
    let mut two = Replica::start(&api, "two");
    two.line("every kind has been seen");
    replica.stop();
    let doors = two.serves();
    let (mut again, _) = agent(&api, doors, "node-1", told).await;
    again.take().await;
    tokio::time::timeout(
        crate::fake_api::A_WHILE,
        api.wait_for("a write", |api| (api.requests("PATCH") > writes).then_some(())),
    )
    .await
    .expect_err("a status was written that says nothing new");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_names_what_is_wrong() {
    let api = FakeApi::start().await;
    shop(&api);
    api.apply(strict("shop", "whatever"));
    let mut elsewhere = route("cart");
    elsewhere["spec"]["parentRefs"][0]["name"] = json!("nobody");
    api.apply(elsewhere);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let invalid = [
        ("Accepted", "False", "Invalid", 1),
        ("Programmed", "False", "Invalid", 1),
    ];
    says_of(&api, "MeshPolicy", "strict", None, &invalid).await;
    says_of(
        &api,
        "HTTPRoute",
        "cart",
        Some("nobody"),
        &[("Accepted", "False", "NoMatchingParent", 1)],
    )
    .await;

    // Mended, and refused by an agent.
    api.apply(strict("shop", "strict"));
    says_of(
        &api,
        "MeshPolicy",
        "strict",
        None,
        &[("Accepted", "True", "Accepted", 2)],
    )
    .await;
    let (mut first, _) = agent(&api, doors, "node-1", 0).await;
    let (mut second, _) = agent(&api, doors, "node-2", 0).await;
    second.take().await;
    let revision = revision_of(&first.next().await.unwrap());
    first
        .say(mesh_api::wire::Report::Nack {
            revision: mesh_api::workload::Revision(revision),
            reason: "no memory".into(),
        })
        .await;
    says_of(
        &api,
        "MeshPolicy",
        "strict",
        None,
        &[("Programmed", "False", "Refused", 2)],
    )
    .await;
    let policy = api.get(NODEMESH, "MeshPolicy", "shop", "strict").unwrap();
    assert!(
        policy.to_string().contains("node-1 refused it: no memory"),
        "{policy:#}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_cannot_be_captured_has_an_event() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let (mut agent, _) = agent(&api, doors, "node-1", 0).await;
    agent.take().await;
    let report = |name: &str, captured: bool| mesh_api::wire::PodReport {
        name: mesh_api::workload::ObjectName::new("shop", name),
        enrolled: true,
        captured,
        why: if captured {
            String::new()
        } else {
            "it has no network namespace".into()
        },
    };
    let pods = vec![report("cart", false), report("front", true)];
    agent
        .say(mesh_api::wire::Report::Status {
            pods,
            certificates: Vec::new(),
        })
        .await;
    let event = api
        .wait_for("an Event", |api| {
            api.all("events.k8s.io/v1", "Event").into_iter().next()
        })
        .await;
    assert_eq!(event["regarding"]["name"], "cart");
    assert_eq!(
        event["regarding"]["uid"],
        api.get("v1", "Pod", "shop", "cart").unwrap()["metadata"]["uid"]
    );
    assert_eq!(
        (&event["type"], &event["reason"]),
        (&json!("Warning"), &json!("NotCaptured"))
    );
    assert!(
        event["note"].as_str().unwrap().contains("it has no network namespace"),
        "{event:#}"
    );
    assert_eq!(api.all("events.k8s.io/v1", "Event").len(), 1);
}
