//! Who leads, what a leader without an API server does, and what becomes of numbers and agents.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn the_other_replica_takes_over_and_numbers_go_on() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut one = Replica::start(&api, "one");
    let first = one.serves();
    let (mut held, identity) = agent(&api, first, "node-1", 0).await;
    let held_revision = revision_of(&held.take().await);
    let mut two = Replica::start(&api, "two");
    let health = two.health();
    two.line("every kind has been seen");
    assert_eq!(
        get(health, "/readyz").await.0,
        503,
        "a replica that waits takes no agents"
    );

    one.kill();
    api.apply(service("while-nobody-led", "10.96.0.30"));
    let second = two.serves();
    assert_eq!(get(health, "/readyz").await.0, 200);
    assert!(
        second.revision > held_revision + 100,
        "{} after {held_revision}",
        second.revision
    );
    // The certificate is as good as it was, and nothing is lost.
    let client = connect_with(second.agents, roots(&api), Some(&identity)).await.unwrap();
    let mut again = Agent::open(client, "node-1", held_revision).await.unwrap();
    let update = again.take().await;
    assert!(says(&update, "Service", "shop/while-nobody-led") && matches!(update, Update::Snapshot { .. }));

    // A leader that is told to stop hands over at once, to one of the same name if need be, and not before.
    let mut three = Replica::start(&api, "three");
    three.line("every kind has been seen");
    let mut namesake = Replica::start(&api, "two");
    let namesakes = namesake.health();
    namesake.line("every kind has been seen");
    assert_eq!(get(namesakes, "/readyz").await.0, 503);
    namesake.kill();
    two.stop();
    let third = three.serves();
    assert!(third.revision > second.revision + 100);
    let lease = api
        .get(
            "coordination.k8s.io/v1",
            "Lease",
            "nodemesh-system",
            "nodemesh-controller",
        )
        .unwrap();
    assert!(lease["spec"]["holderIdentity"].as_str().unwrap().starts_with("three_"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_without_an_api_server_stops_serving_and_comes_back() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut replica = Replica::start(&api, "one");
    let health = replica.health();
    let doors = replica.serves();
    let (mut held, _) = agent(&api, doors, "node-1", 0).await;
    held.take().await;

    api.down(true);
    replica.line("the lead is lost");
    let ended = async {
        loop {
            // An update that was on its way is not answered: nobody may be there to take it.
            if let Err(status) = held.next().await {
                return status;
            }
        }
    };
    let status = ended.await;
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert_eq!(get(health, "/readyz").await.0, 503);
    assert!(
        tokio::net::TcpStream::connect(doors.agents).await.is_err(),
        "the agents' port is still open"
    );

    api.down(false);
    let again = replica.serves();
    assert!(again.revision > doors.revision);
    assert_eq!(get(health, "/readyz").await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_say_who_leads_and_what_there_is() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut replica = Replica::start(&api, "one");
    let health = replica.health();
    let doors = replica.serves();
    let (mut agent, _) = agent(&api, doors, "node-1", 0).await;
    agent.take().await;
    let end = Instant::now() + PATIENCE;
    loop {
        let (code, text) = get(health, "/metrics").await;
        assert_eq!(code, 200);
        let wanted = [
            "nodemesh_controller_is_leader 1",
            "nodemesh_controller_agents_connected 1",
            "nodemesh_controller_documents{kind=\"Node\"} 2",
        ];
        if wanted.iter().all(|line| text.lines().any(|l| l.trim() == *line)) {
            return;
        }
        assert!(Instant::now() < end, "{text}");
        tokio::time::timeout(Duration::from_millis(50), std::future::pending::<()>())
            .await
            .unwrap_err();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_are_led_to_the_leader_and_the_replica_that_waits_is_well() {
    let api = FakeApi::start().await;
    shop(&api);
    let leads_to = |api: &FakeApi| {
        let slice = api.get(
            "discovery.k8s.io/v1",
            "EndpointSlice",
            "nodemesh-system",
            "nodemesh-controller",
        )?;
        Some(
            slice["endpoints"][0]["addresses"][0]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
        )
    };
    let mut one = Replica::start_with(&api, "one", &["--pod-ip", "10.9.0.1"]);
    one.serves();
    let is = |wanted: &'static str| move |api: &FakeApi| leads_to(api).filter(|address| address == wanted);
    api.wait_for("the first leader's address", is("10.9.0.1")).await;
    let mut two = Replica::start_with(&api, "two", &["--pod-ip", "10.9.0.2"]);
    let health = two.health();
    two.line("every kind has been seen");
    let end = Instant::now() + PATIENCE;
    while get(health, "/readyz").await.0 != 200 {
        assert!(Instant::now() < end, "it does not get ready");
    }
    assert_eq!(
        leads_to(&api).as_deref(),
        Some("10.9.0.1"),
        "it waits and does not lead"
    );
    one.kill();
    two.serves();
    api.wait_for("the second leader's address", is("10.9.0.2")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_that_says_nothing_costs_the_lead_too() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let (mut held, _) = agent(&api, doors, "node-1", 0).await;
    held.take().await;
    let began = Instant::now();
    api.silent(true);
    replica.line("the lead is lost");
    // The Lease is for 2 s; another replica would begin then at the earliest.
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    api.silent(false);
    assert!(replica.serves().revision > doors.revision);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_lease_does_not_start_the_numbers_over_for_agents() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    // It got its revision from a leader whose Lease somebody has deleted.
    let (mut agent, _) = agent(&api, doors, "node-1", 70_000).await;
    let newest = take_until(&mut agent, |update| revision_of(update) > 70_000).await;
    let lease = api.get(
        "coordination.k8s.io/v1",
        "Lease",
        "nodemesh-system",
        "nodemesh-controller",
    );
    let reserved = &lease.unwrap()["metadata"]["annotations"]["nodemesh.io/revision-reserved"];
    let reserved: u64 = reserved.as_str().unwrap().parse().unwrap();
    assert!(reserved >= revision_of(&newest));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_number_that_was_not_acked_here_is_no_base_for_a_delta() {
    let api = FakeApi::start().await;
    shop(&api);
    let mut replica = Replica::start(&api, "one");
    let doors = replica.serves();
    let (mut first, identity) = agent(&api, doors, "node-1", 0).await;
    let held = revision_of(&first.take().await);
    let again = || async {
        let client = connect_with(doors.agents, roots(&api), Some(&identity)).await.unwrap();
        Agent::open(client, "node-1", held).await.unwrap()
    };
    // Acked here: it goes on from there. The first update is the first change since.
    let mut second = again().await;
    api.apply(service("later", "10.96.0.60"));
    let update = second.next().await.unwrap();
    assert!(
        matches!(update, Update::Delta { from, .. } if from.0 == held),
        "{update:?}"
    );

    // The same number, from an agent that got it elsewhere: another row of numbers may have had it.
    let token = agent_pod(&api, "agent-2", "node-2");
    let identity = join(&api, doors, "node-2", &token).await.unwrap();
    let open = || async {
        let client = connect_with(doors.agents, roots(&api), Some(&identity)).await.unwrap();
        Agent::open(client, "node-2", held).await.unwrap()
    };
    // Twice: the first connection after a join gets a snapshot anyway.
    for _ in 0..2 {
        let update = open().await.next().await.unwrap();
        assert!(matches!(update, Update::Snapshot { .. }), "{update:?}");
    }
}
