//! The stream to an agent: snapshot, deltas, resume, refusal, and an agent that is slow.

use mesh_api::wire::{CertificateReport, PodReport, Report};
use mesh_api::workload::{ObjectName, Revision};
use tonic::Code;

use crate::world::{
    Agent, Controller, Done, bootstrap, delta_of, pod, revision_of, service, snapshot_of, two_nodes, workload,
};

fn agent_in_status(controller: &Controller, node: &str) -> serde_json::Value {
    let status = controller.ctl(&["status", "-o", "json"]).json();
    let agents = status["agents"].as_array().unwrap();
    agents
        .iter()
        .find(|agent| agent["node"] == node)
        .cloned()
        .unwrap_or_default()
}

/// Asks `status` until it says so.
fn wait_for_status(
    controller: &Controller,
    node: &str,
    good: impl Fn(&serde_json::Value) -> bool,
) -> serde_json::Value {
    let deadline = std::time::Instant::now() + crate::world::PATIENCE;
    loop {
        let agent = agent_in_status(controller, node);
        if good(&agent) {
            return agent;
        }
        assert!(std::time::Instant::now() < deadline, "{agent:#}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_then_deltas_each_answered() {
    let controller = Controller::start();
    controller.apply(&two_nodes(), &[]).good();
    let mut agent = Agent::connect(&controller, "node-1", 0).await;
    let (revision, resources) = snapshot_of(agent.take().await);
    assert_eq!((revision, resources.len()), (1, 3));
    // A newer agent may say more than this controller knows; everything goes on.
    agent.say_the_unknown().await;

    // Its own pods' namespaces and probes are told to a node, nobody else's.
    let (own, other) = (
        workload(&resources, "shop", "cart"),
        workload(&resources, "shop", "front"),
    );
    assert_eq!(own.netns.as_deref(), Some("/run/netns/cart"));
    assert_eq!(own.probe_ports, [8081]);
    assert!(own.enrolled && other.enrolled);
    assert_eq!((other.netns.as_deref(), other.probe_ports.len()), (None, 0));

    let applying = controller
        .ctl_beside(
            &["policy", "apply", "-f", "-", "--wait"],
            [service("cart", 81), pod("new", "node-1", "new", "10.1.1.3")].concat(),
        )
        .await;
    let update = agent.take().await;
    assert_eq!(
        delta_of(&update),
        (
            1,
            2,
            vec!["Workload shop/new".into(), "Service shop/cart".into()],
            vec![]
        )
    );
    let out = applying.await.unwrap().good();
    assert!(out.ends_with("revision 2\nheld by the 1 connected agent\n"), "{out}");

    let deleting = controller
        .ctl_beside(&["policy", "delete", "pod/new", "-n", "shop", "--wait"], String::new())
        .await;
    assert_eq!(
        delta_of(&agent.take().await),
        (2, 3, vec![], vec!["Workload shop/new".into()])
    );
    deleting.await.unwrap().good();

    // What another node keeps to itself makes an empty delta, which still brings the revision.
    let moved = pod("front", "node-2", "front", "10.1.2.2").replace("/run/netns/front", "/run/netns/elsewhere");
    controller.apply(&moved, &[]).good();
    assert_eq!(delta_of(&agent.take().await), (3, 4, vec![], vec![]));

    agent
        .say(Report::Status {
            pods: vec![PodReport {
                name: ObjectName::new("shop", "cart"),
                enrolled: true,
                captured: false,
                why: "its namespace is gone".into(),
            }],
            certificates: vec![CertificateReport {
                identity: "spiffe://cluster.local/ns/shop/sa/cart".into(),
                expires: Some(std::time::SystemTime::now() + std::time::Duration::from_secs(1800)),
                problem: String::new(),
            }],
        })
        .await;
    let shown = wait_for_status(&controller, "node-1", |agent| {
        agent["revision"] == 4 && agent["pods"].as_array().is_some_and(|pods| pods.len() == 1)
    });
    assert_eq!(
        (&shown["connected"], &shown["current"], &shown["abiVersion"]),
        (&true.into(), &true.into(), &7.into())
    );
    assert_eq!(shown["version"], "0.1.0-test");
    assert_eq!(shown["pods"][0]["why"], "its namespace is gone");
    let table = controller.ctl(&["status"]).good();
    assert!(
        table.contains("its namespace is gone") && table.contains("0/1"),
        "{table}"
    );
    assert!(
        table.contains("spiffe://cluster.local/ns/shop/sa/cart  node-1  in "),
        "{table}"
    );
    assert!(
        table.contains("never connected"),
        "node-2 is known by its document: {table}"
    );

    drop(agent);
    wait_for_status(&controller, "node-1", |agent| agent["connected"] == false);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_revision_shows_and_the_next_one_comes_whole() {
    let controller = Controller::start();
    controller.apply(&two_nodes(), &[]).good();
    let mut agent = Agent::connect(&controller, "node-1", 0).await;
    agent.take().await;

    let applying = controller
        .ctl_beside(&["policy", "apply", "-f", "-", "--wait"], service("cart", 81))
        .await;
    assert_eq!(revision_of(&agent.next().await.unwrap()), 2);
    let reason = "the kernel has no room for it".to_owned();
    let revision = Revision(2);
    agent.say(Report::Nack { revision, reason }).await;
    let done: Done = applying.await.unwrap();
    assert_eq!(done.code, 1, "{done:?}");
    assert!(
        done.err
            .contains("node-1 refused revision 2: the kernel has no room for it"),
        "{done:?}"
    );

    let shown = agent_in_status(&controller, "node-1");
    assert_eq!(
        (&shown["revision"], &shown["nackedRevision"]),
        (&1.into(), &2.into()),
        "{shown:#}"
    );
    assert!(
        controller
            .ctl(&["status"])
            .good()
            .contains("refused revision 2: the kernel has no room for it")
    );

    // An apply that changes nothing is no new revision, so the refused one is still what is waited for.
    assert_eq!(controller.apply(&service("cart", 81), &["--wait"]).code, 1);
    let empty = controller.apply("# nothing\n", &[]);
    assert!(empty.code == 1 && empty.err.contains("no document"), "{empty:?}");

    controller.apply(&service("cart", 82), &[]).good();
    let (revision, resources) = snapshot_of(agent.take().await);
    assert_eq!((revision, resources.len()), (3, 3));
    let shown = wait_for_status(&controller, "node-1", |agent| agent["revision"] == 3);
    assert_eq!(
        (&shown["nackedRevision"], &shown["nackReason"]),
        (&0.into(), &"".into())
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_agent_is_waited_for_and_gets_everything_joined() {
    let controller = Controller::start();
    controller.apply(&two_nodes(), &[]).good();
    let mut agent = Agent::connect(&controller, "node-1", 0).await;
    let first = agent.next().await.unwrap();
    assert_eq!(revision_of(&first), 1);

    // It says nothing while a hundred revisions come and go.
    for n in 0..100u16 {
        controller.apply(&service(&format!("s{}", n % 7), 1000 + n), &[]).good();
    }
    controller.ctl(&["policy", "delete", "service/s3", "-n", "shop"]).good();
    let late = controller.apply(&service("cart", 99), &["--wait", "--timeout", "300ms"]);
    assert_eq!(late.code, 4, "{late:?}");
    assert!(late.err.contains("revision 103 is not held by node-1"), "{late:?}");

    agent.ack(1).await;
    let (from, to, upserts, removed) = delta_of(&agent.take().await);
    assert_eq!((from, to), (1, 103));
    let wanted: Vec<String> = ["cart", "s0", "s1", "s2", "s4", "s5", "s6"]
        .iter()
        .map(|name| format!("Service shop/{name}"))
        .collect();
    assert_eq!(
        (upserts, removed),
        (wanted, vec![]),
        "what came and went in between is no news"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_resume_by_revision_across_a_restart_as_far_as_the_history_goes() {
    let controller = Controller::start();
    controller.apply(&two_nodes(), &[]).good();
    let identity = bootstrap(&controller, "node-1", &controller.token("node-1"))
        .await
        .unwrap();
    let mut agent = Agent::with(&controller, &identity, "node-1", 0).await.unwrap();
    assert_eq!(snapshot_of(agent.take().await).0, 1);
    wait_for_status(&controller, "node-1", |agent| agent["revision"] == 1);
    controller.apply(&service("one", 1), &[]).good();

    let (dir, code) = controller.stop();
    assert_eq!(code, 0, "a connected agent must not keep it from stopping");
    let controller = Controller::start_in(dir, &["--revision-history", "3"]);
    controller.apply(&service("two", 2), &[]).good();
    controller
        .ctl(&["policy", "delete", "service/one", "-n", "shop"])
        .good();

    let mut agent = Agent::with(&controller, &identity, "node-1", 1).await.unwrap();
    let news = vec!["Service shop/two".to_owned()];
    assert_eq!(delta_of(&agent.take().await), (1, 4, news.clone(), vec![]));
    drop(agent);
    let mut agent = Agent::with(&controller, &identity, "node-1", 2).await.unwrap();
    assert_eq!(
        delta_of(&agent.take().await),
        (2, 4, news, vec!["Service shop/one".into()])
    );
    drop(agent);
    // It holds the newest, and is told nothing until there is a newer one.
    let mut agent = Agent::with(&controller, &identity, "node-1", 4).await.unwrap();
    wait_for_status(&controller, "node-1", |agent| {
        agent["revision"] == 4 && agent["connected"] == true
    });
    controller.apply(&service("two", 22), &[]).good();
    assert_eq!(
        delta_of(&agent.take().await),
        (4, 5, vec!["Service shop/two".into()], vec![])
    );
    drop(agent);

    // A number of the future.
    let mut agent = Agent::with(&controller, &identity, "node-1", 99).await.unwrap();
    let (revision, resources) = snapshot_of(agent.take().await);
    assert_eq!((revision, resources.len()), (5, 4));
    drop(agent);

    // Out of the history's reach.
    controller.apply(&service("three", 3), &[]).good();
    let controller = Controller::start_in(controller.kill(), &["--revision-history", "3"]);
    let mut agent = Agent::with(&controller, &identity, "node-1", 1).await.unwrap();
    let (revision, resources) = snapshot_of(agent.take().await);
    assert_eq!((revision, resources.len()), (6, 5));
    drop(agent);

    // A node that joins anew may hold what another store numbered.
    let mut agent = Agent::connect(&controller, "node-1", 6).await;
    assert_eq!(snapshot_of(agent.take().await).0, 6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_newer_connection_of_a_node_speaks_for_it() {
    let controller = Controller::start();
    controller.apply(&two_nodes(), &[]).good();
    let identity = bootstrap(&controller, "node-1", &controller.token("node-1"))
        .await
        .unwrap();
    let mut old = Agent::with(&controller, &identity, "node-1", 0).await.unwrap();
    old.take().await;
    let mut new = Agent::with(&controller, &identity, "node-1", 1).await.unwrap();
    assert_eq!(old.next().await.err().map(|s| s.code()), Some(Code::Aborted));
    drop(old);
    controller.apply(&service("cart", 81), &[]).good();
    assert_eq!(revision_of(&new.take().await), 2);
    wait_for_status(&controller, "node-1", |agent| {
        agent["revision"] == 2 && agent["connected"] == true
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_breaks_the_protocol_is_cut_off() {
    let controller = Controller::start();
    controller.apply(&two_nodes(), &[]).good();
    let identity = bootstrap(&controller, "node-1", &controller.token("node-1"))
        .await
        .unwrap();
    let hello = Report::Hello {
        stamp: 0,
        node: "node-1".into(),
        agent_version: String::new(),
        resume: Revision(0),
        abi_version: 0,
    };
    for wrong in [Report::Ack(Revision(7)), hello] {
        let mut agent = Agent::with(&controller, &identity, "node-1", 0).await.unwrap();
        agent.next().await.unwrap();
        agent.say(wrong.clone()).await;
        assert!(agent.next().await.is_err(), "{wrong:?}");
    }
    let shown = agent_in_status(&controller, "node-1");
    assert_eq!(
        shown["revision"], 0,
        "a revision that was never taken is not held: {shown:#}"
    );
}
