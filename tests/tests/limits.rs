//! How many and how often: rate limits, circuit breakers shown open, half open and recovered, limits on what is in
//! flight, balancing and retries. The client counts what it got, the destination what reached it and the mesh what it
//! did: the three agree to the request.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, ensure};
use mesh_tests::{
    Checks, Lab, LabConfig, Metrics,
    actors::{
        self, Answer, answers, apply, behave, delete, destinations, expect_growth, expect_record, get, hold, line,
        requests, rpc, statuses, told,
    },
    until,
};
use serde_json::{Value as Json, json};

const ALICE: &str = "quota/alice";
const BOB: &str = "quota/bob";
/// How long a state that time changes may take to change.
const CHANGE_LIMIT: Duration = Duration::from_secs(20);
/// The destinations, each with a service of its own, and their nodes; the sources are on the first one.
const NEAR_AND_FAR: [(&str, &str); 2] = [("near", "node-1"), ("far", "node-2")];

/// `near` and `far` alone, and a team of three behind one service.
fn documents() -> String {
    let team = [("app", "team")];
    [
        actors::namespace("quota", true),
        actors::source(ALICE, "node-1"),
        actors::source(BOB, "node-1"),
        actors::destination("quota/near", "node-1", &[]),
        actors::destination("quota/far", "node-2", &[]),
        actors::destination("quota/red", "node-1", &team),
        actors::destination("quota/green", "node-2", &team),
        actors::destination("quota/blue", "node-2", &team),
        actors::service("quota/near", "pod", "near"),
        actors::service("quota/far", "pod", "far"),
        actors::service("quota/team", "app", "team"),
    ]
    .concat()
}

fn limit(service: &str, limits: &str) -> String {
    format!(
        "---\napiVersion: nodemesh.io/v1alpha1\nkind: RateLimit\nmetadata: {{name: {service}, namespace: quota}}\n\
         spec: {{targetRefs: [{{kind: Service, name: {service}}}], limits: [{limits}]}}\n"
    )
}

fn traffic(service: &str, settings: &str) -> String {
    format!(
        "---\napiVersion: nodemesh.io/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: {service}, namespace: quota}}\n\
         spec: {{targetRefs: [{{kind: Service, name: {service}}}], {settings}}}\n"
    )
}

/// What one service's requests did to an agent's counters since a scrape, as its own reporter.
struct Counted<'a> {
    lab: &'a Lab,
    node: &'a str,
    reporter: &'a str,
    service: &'a str,
    before: Metrics,
}

impl<'a> Counted<'a> {
    fn new(lab: &'a Lab, node: &'a str, reporter: &'a str, service: &'a str) -> Result<Counted<'a>> {
        Ok(Counted {
            lab,
            node,
            reporter,
            service,
            before: lab.metrics(node)?,
        })
    }

    /// The counters must have grown by exactly this, status by status and flag by flag, and all together.
    fn expect(&self, grown: &[(u16, &str, usize)]) -> Result<()> {
        let base = [("reporter", self.reporter), ("destination_service_name", self.service)];
        for (status, flags, count) in grown {
            let status = status.to_string();
            let labels = [
                &base[..],
                &[("response_code", status.as_str()), ("response_flags", flags)],
            ]
            .concat();
            expect_growth(
                self.lab,
                self.node,
                &self.before,
                "mesh_requests_total",
                &labels,
                *count as f64,
            )?;
        }
        let all: usize = grown.iter().map(|(_, _, count)| count).sum();
        expect_growth(
            self.lab,
            self.node,
            &self.before,
            "mesh_requests_total",
            &base,
            all as f64,
        )
    }
}

/// Answers by status and refusal.
fn kinds(answers: &[Answer]) -> BTreeMap<(u16, &str), usize> {
    let mut counts = BTreeMap::new();
    for answer in answers {
        *counts.entry((answer.status, answer.refusal())).or_default() += 1;
    }
    counts
}

#[test]
fn rate_limits_count_to_the_request() -> Result<()> {
    let lab = Lab::up(LabConfig::test("rates").manifest(documents()))?;
    let mut checks = Checks::default();

    for (destination, node) in NEAR_AND_FAR {
        let pod = format!("quota/{destination}");
        let served = || told(&lab, &pod, "served");
        let ask = |from: &str, plan: Json, times: usize| requests(plan).times(times).ask(&lab, from, destination, 80);

        checks.check(format!("{destination}: each identity has a bucket of its own"), || {
            apply(
                &lab,
                &limit(
                    destination,
                    "{name: caller, key: [{source: identity}], rate: {requests: 10, per: 1h}}",
                ),
            )?;
            let counted = Counted::new(&lab, node, "destination", destination)?;
            let before = served()?;
            for from in [ALICE, BOB] {
                let found = ask(from, json!([{"path": "/"}]), 25)?;
                let codes: Vec<u16> = found.iter().map(|answer| answer.status).collect();
                ensure!(
                    codes == [[200; 10].as_slice(), &[429; 15]].concat(),
                    "{from}: {codes:?}"
                );
                for answer in &found[10..] {
                    let retry = answer
                        .headers
                        .get("retry-after")
                        .and_then(|seconds| seconds.parse::<u64>().ok());
                    // A token comes each six minutes.
                    ensure!(answer.refusal() == "rate-limited", "{answer:?}");
                    ensure!(
                        retry.is_some_and(|seconds| (300..=360).contains(&seconds)),
                        "{answer:?}"
                    );
                }
            }
            ensure!(served()? - before == 20, "what reached {destination}");
            counted.expect(&[(200, "-", 20), (429, "RL", 30)])?;
            let want = [
                ("nodemesh.reporter", json!("destination")),
                ("nodemesh.refusal", json!("rate-limited")),
                ("nodemesh.rule", json!(format!("ratelimit/quota/{destination}/caller"))),
                (
                    "nodemesh.source.identity",
                    json!("spiffe://cluster.local/ns/quota/sa/bob"),
                ),
                ("http.response.status_code", json!(429)),
            ];
            expect_record(&lab, node, &want).map(drop)
        });

        checks.check(
            format!("{destination}: gRPC is told that resources are exhausted"),
            || {
                let before = served()?;
                ensure!(
                    rpc(&lab, ALICE, destination, json!({}))? == ["RESOURCE_EXHAUSTED"],
                    "by gRPC"
                );
                ensure!(served()? == before, "a limited call reached {destination}");
                Ok(())
            },
        );

        checks.check(format!("{destination}: a flow has no requests to count"), || {
            ensure!(
                line(&lab, ALICE, destination)?["how"] == "answer",
                "a line to {destination}"
            );
            Ok(())
        });

        checks.check(format!("{destination}: by header, and all without it together"), || {
            delete(&lab, "RateLimit", "quota", destination)?;
            apply(
                &lab,
                &limit(
                    destination,
                    "{name: user, key: [{header: X-User}], rate: {requests: 3, per: 1h}, burst: 3}",
                ),
            )?;
            let counted = Counted::new(&lab, node, "destination", destination)?;
            let user = |name: &str| json!([{"path": "/", "headers": {"x-user": name}}]);
            for (from, plan, passed) in [
                (ALICE, user("a"), 3),
                (BOB, user("a"), 0),
                (BOB, user("b"), 3),
                (ALICE, json!([{"path": "/"}]), 3),
                (BOB, json!([{"path": "/"}]), 0),
            ] {
                let found = ask(from, plan.clone(), 5)?;
                let codes: Vec<u16> = found.iter().map(|answer| answer.status).collect();
                let want: Vec<u16> = (0..5).map(|turn| if turn < passed { 200 } else { 429 }).collect();
                ensure!(codes == want, "{from} {plan}: {codes:?}");
            }
            counted.expect(&[(200, "-", 9), (429, "RL", 16)])
        });

        checks.check(format!("{destination}: in shadow it refuses nothing"), || {
            delete(&lab, "RateLimit", "quota", destination)?;
            apply(
                &lab,
                &limit(destination, "{rate: {requests: 1, per: 1h}, shadow: true}"),
            )?;
            ensure!(
                statuses(&ask(ALICE, json!([{"path": "/"}]), 10)?) == [(200, 10)].into(),
                "in shadow"
            );
            Ok(())
        });

        checks.check(
            format!("{destination}: tokens come back at the rate, no faster"),
            || {
                delete(&lab, "RateLimit", "quota", destination)?;
                apply(
                    &lab,
                    &limit(
                        destination,
                        "{key: [{source: identity}], rate: {requests: 4, per: 1s}, burst: 4}",
                    ),
                )?;
                let (counted, before) = (Counted::new(&lab, node, "destination", destination)?, served()?);
                let started = std::time::Instant::now();
                let mut found = Vec::new();
                until("the end of a limited run", CHANGE_LIMIT, || {
                    found.extend(ask(ALICE, json!([{"path": "/"}]), 20)?);
                    Ok((started.elapsed() > Duration::from_secs(2)).then_some(()))
                })?;
                let elapsed = started.elapsed().as_secs_f64();
                let counts = statuses(&found);
                let (passed, limited) = (counts[&200], counts[&429]);
                ensure!(passed + limited == found.len(), "{counts:?}");
                ensure!(passed as f64 <= 4.0 + 4.0 * elapsed, "{passed} passed in {elapsed} s");
                ensure!(passed >= 8, "{passed} passed in {elapsed} s: it does not recover");
                ensure!(served()? - before == passed as u64, "what reached {destination}");
                counted.expect(&[(200, "-", passed), (429, "RL", limited)])?;
                delete(&lab, "RateLimit", "quota", destination)
            },
        );
    }
    checks.finish("rate limits");
    lab.down()
}

#[test]
fn breakers_open_probe_and_recover() -> Result<()> {
    let lab = Lab::up(LabConfig::test("breaker").manifest(documents()))?;
    let mut checks = Checks::default();

    for (destination, _) in NEAR_AND_FAR {
        let pod = format!("quota/{destination}");
        let served = || told(&lab, &pod, "served");
        let once = || get("/").ask(&lab, ALICE, destination, 80);

        checks.check(
            format!("{destination}: failures in a row open it, a probe closes it"),
            || {
                apply(
                    &lab,
                    &traffic(destination, "circuitBreaker: {consecutiveFailures: 5, openFor: 4s}"),
                )?;
                behave(&lab, &pod, "status=500")?;
                let (counted, before) = (Counted::new(&lab, "node-1", "source", destination)?, served()?);
                let mut found = get("/").times(25).ask(&lab, ALICE, destination, 80)?;
                let open = kinds(&found);
                ensure!(open == [((500, ""), 5), ((503, "breaker-open"), 20)].into(), "{open:?}");
                ensure!(
                    served()? - before == 5,
                    "while it is open nothing reaches {destination}"
                );
                // All sources of the node share what it knows.
                found.extend(get("/").ask(&lab, BOB, destination, 80)?);
                ensure!(found.last().is_some_and(|answer| answer.status == 503), "{found:?}");

                // Half open: one request tries, fails, and it is open again.
                let probe = until("a probe", CHANGE_LIMIT, || {
                    let answer = once()?.pop().context("no answer")?;
                    found.push(answer.clone());
                    Ok((answer.refusal() != "breaker-open").then_some(answer))
                })?;
                ensure!(probe.status == 500, "{probe:?}");
                behave(&lab, &pod, "status=200")?;
                found.extend(get("/").times(10).ask(&lab, ALICE, destination, 80)?);
                ensure!(
                    kinds(&found[found.len() - 10..]) == [((503, "breaker-open"), 10)].into(),
                    "open again"
                );
                ensure!(served()? - before == 6, "one probe and no more");

                // Recovered: the next probe closes it.
                let probe = until("a probe that succeeds", CHANGE_LIMIT, || {
                    let answer = once()?.pop().context("no answer")?;
                    found.push(answer.clone());
                    Ok((answer.refusal() != "breaker-open").then_some(answer))
                })?;
                ensure!(probe.status == 200, "{probe:?}");
                found.extend(get("/").times(20).ask(&lab, ALICE, destination, 80)?);
                ensure!(kinds(&found[found.len() - 20..]) == [((200, ""), 20)].into(), "closed");
                ensure!(served()? - before == 27, "what reached {destination}");
                let refused = statuses(&found)[&503];
                counted.expect(&[(500, "-", 6), (503, "UO", refused), (200, "-", 21)])?;
                let want = [
                    ("nodemesh.refusal", json!("breaker-open")),
                    ("nodemesh.response_flags", json!("UO")),
                    ("nodemesh.reporter", json!("source")),
                    (
                        "nodemesh.destination.service",
                        json!(format!("{destination}.quota.svc.cluster.local")),
                    ),
                ];
                expect_record(&lab, "node-1", &want).map(drop)
            },
        );

        checks.check(
            format!("{destination}: a share of failures opens it, and a policy that is gone lets go"),
            || {
                let settings = "circuitBreaker: {errorRate: {percent: 50, window: 60s, minRequests: 10}, openFor: 1h}";
                apply(&lab, &traffic(destination, settings))?;
                let before = served()?;
                let mix = json!([{"path": "/status/200"}, {"path": "/status/500"}]);
                let found = requests(mix).times(10).ask(&lab, ALICE, destination, 80)?;
                let codes: Vec<u16> = found.iter().map(|answer| answer.status).collect();
                let want = [[200, 500].repeat(5), vec![503; 10]].concat();
                ensure!(codes == want, "{codes:?}");
                ensure!(
                    served()? - before == 10,
                    "while it is open nothing reaches {destination}"
                );
                delete(&lab, "TrafficPolicy", "quota", destination)?;
                ensure!(
                    statuses(&get("/").times(5).ask(&lab, ALICE, destination, 80)?) == [(200, 5)].into(),
                    "without it"
                );
                Ok(())
            },
        );

        checks.check(format!("{destination}: no more requests at once than allowed"), || {
            apply(&lab, &traffic(destination, "circuitBreaker: {maxRequests: 3}"))?;
            let (counted, before) = (Counted::new(&lab, "node-1", "source", destination)?, served()?);
            behave(&lab, &pod, "hold=1")?;
            let held = get("/").connections(3).start(&lab, ALICE, destination, 80)?;
            until("requests that wait", CHANGE_LIMIT, || {
                Ok((told(&lab, &pod, "waiting")? == 3).then_some(()))
            })?;
            let found = get("/").connections(7).ask(&lab, BOB, destination, 80)?;
            ensure!(kinds(&found) == [((503, "breaker-requests"), 7)].into(), "{found:?}");
            behave(&lab, &pod, "hold=0")?;
            let found = answers(&held.wait(CHANGE_LIMIT)?.ok()?)?;
            ensure!(statuses(&found) == [(200, 3)].into(), "{found:?}");
            ensure!(statuses(&once()?) == [(200, 1)].into(), "afterwards");
            ensure!(served()? - before == 4, "what reached {destination}");
            counted.expect(&[(200, "-", 4), (503, "UO", 7)])
        });

        checks.check(
            format!("{destination}: connections, and requests that wait for one"),
            || {
                apply(
                    &lab,
                    &traffic(
                        destination,
                        "circuitBreaker: {maxConnections: 2, maxPendingRequests: 3}",
                    ),
                )?;
                let (counted, before) = (Counted::new(&lab, "node-1", "source", destination)?, served()?);
                behave(&lab, &pod, "hold=1")?;
                let held = get("/").connections(10).start(&lab, ALICE, destination, 80)?;
                // Two are carried, three wait, and the rest is refused at once.
                until("five refusals", CHANGE_LIMIT, || {
                    let labels = [("destination_service_name", destination), ("response_code", "503")];
                    let grown = lab.metrics("node-1")?.sum("mesh_requests_total", &labels)
                        - counted.before.sum("mesh_requests_total", &labels);
                    ensure!(grown == 5.0, "{grown} were refused");
                    Ok((told(&lab, &pod, "waiting")? == 2).then_some(()))
                })?;
                behave(&lab, &pod, "hold=0")?;
                let found = answers(&held.wait(CHANGE_LIMIT)?.ok()?)?;
                ensure!(
                    kinds(&found) == [((200, ""), 5), ((503, "breaker-pending"), 5)].into(),
                    "{:?}",
                    kinds(&found)
                );
                ensure!(served()? - before == 5, "what reached {destination}");
                counted.expect(&[(200, "-", 5), (503, "UO", 5)])
            },
        );

        checks.check(format!("{destination}: flows are connections"), || {
            apply(&lab, &traffic(destination, "circuitBreaker: {maxConnections: 2}"))?;
            let flows = [hold(&lab, ALICE, destination)?, hold(&lab, BOB, destination)?];
            let said = line(&lab, ALICE, destination)?;
            ensure!(said["how"] == "ConnectionResetError", "{said}");
            let want = [
                ("event.name", json!("connection")),
                ("nodemesh.refusal", json!("breaker-connections")),
                ("nodemesh.response_flags", json!("UO")),
            ];
            expect_record(&lab, "node-1", &want)?;
            drop(flows);
            until("a flow again", CHANGE_LIMIT, || {
                Ok((line(&lab, ALICE, destination)?["how"] == "answer").then_some(()))
            })?;
            delete(&lab, "TrafficPolicy", "quota", destination)
        });
    }
    checks.finish("breakers");
    lab.down()
}

#[test]
fn requests_are_balanced_and_tried_again() -> Result<()> {
    let lab = Lab::up(LabConfig::test("balance").manifest(documents()))?;
    let mut checks = Checks::default();
    let team = ["red", "green", "blue"];
    let ask = |plan: actors::Plan| plan.ask(&lab, ALICE, "team", 80);

    checks.check(
        "round-robin is exact, on one connection and on many, one by one",
        || {
            apply(&lab, &traffic("team", "loadBalancer: {algorithm: round-robin}"))?;
            for plan in [get("/").times(90), get("/").times(90).fresh()] {
                let found = destinations(&ask(plan)?);
                ensure!(found == team.map(|name| (name.to_owned(), 30)).into(), "{found:?}");
            }
            Ok(())
        },
    );

    checks.check("random is even within chance", || {
        apply(&lab, &traffic("team", "loadBalancer: {algorithm: random}"))?;
        let found = destinations(&ask(get("/").times(200).connections(3))?);
        // 200 expected, with a deviation of 11.5.
        ensure!(
            found.len() == 3 && found.values().all(|count| count.abs_diff(200) <= 58),
            "{found:?}"
        );
        Ok(())
    });

    checks.check("least-request leaves a busy endpoint alone", || {
        apply(&lab, &traffic("team", "loadBalancer: {algorithm: least-request}"))?;
        behave(&lab, "quota/green", "hold=1")?;
        let before = told(&lab, "quota/green", "served")?;
        let asking = get("/").times(60).connections(2).start(&lab, ALICE, "team", 80)?;
        // One of the two connections is caught there; the other one goes on to its end.
        until("the free connection's end", CHANGE_LIMIT, || {
            let others = told(&lab, "quota/red", "served")? + told(&lab, "quota/blue", "served")?;
            Ok((told(&lab, "quota/green", "waiting")? == 1 && others >= 60).then_some(()))
        })?;
        ensure!(
            told(&lab, "quota/green", "served")? == before + 1,
            "the busy one was chosen again"
        );
        behave(&lab, "quota/green", "hold=0")?;
        let found = answers(&asking.wait(CHANGE_LIMIT)?.ok()?)?;
        ensure!(statuses(&found) == [(200, 120)].into(), "{:?}", statuses(&found));
        Ok(())
    });

    checks.check("one bad endpoint opens its own breaker, not the service's", || {
        let settings = "loadBalancer: {algorithm: round-robin}, circuitBreaker: {consecutiveFailures: 3, openFor: 1h}";
        apply(&lab, &traffic("team", settings))?;
        behave(&lab, "quota/blue", "status=500")?;
        let (counted, before) = (
            Counted::new(&lab, "node-1", "source", "team")?,
            told(&lab, "quota/blue", "served")?,
        );
        let found = kinds(&ask(get("/").times(60))?)
            .into_iter()
            .map(|((status, _), count)| (status, count))
            .collect::<Vec<_>>();
        ensure!(found == [(200, 57), (500, 3)], "{found:?}");
        ensure!(
            told(&lab, "quota/blue", "served")? == before + 3,
            "the bad one was chosen again"
        );
        behave(&lab, "quota/blue", "status=200")?;
        counted.expect(&[(200, "-", 57), (500, "-", 3)])
    });

    checks.check("what fails is tried again elsewhere, as often as policy says", || {
        let settings =
            "loadBalancer: {algorithm: round-robin}, retry: {attempts: 2, on: [\"503\"], budget: {percent: 100}}";
        apply(&lab, &traffic("team", settings))?;
        behave(&lab, "quota/red", "status=503")?;
        let before = lab.metrics("node-1")?;
        let found = ask(get("/").times(30))?;
        ensure!(statuses(&found) == [(200, 30)].into(), "{:?}", statuses(&found));
        let records = lab.access_log("node-1")?;
        let twice = |record: &&Json| record["nodemesh.reporter"] == "source" && record["nodemesh.attempts"] == 2;
        ensure!(
            records.iter().any(|record| twice(&record)),
            "no record tells of a second attempt"
        );
        // A request is counted once, however often it was tried.
        let labels = [
            ("reporter", "source"),
            ("destination_service_name", "team"),
            ("response_code", "200"),
        ];
        expect_growth(&lab, "node-1", &before, "mesh_requests_total", &labels, 30.0)?;
        behave(&lab, "quota/red", "status=200")?;

        // One endpoint only: it is tried again there, and at most so often.
        let settings = "retry: {attempts: 2, on: [5xx], budget: {percent: 100}}";
        apply(&lab, &traffic("far", settings))?;
        for (failures, status, reached) in [(2, 200, 3), (5, 503, 3)] {
            let before = told(&lab, "quota/far", "served")?;
            behave(&lab, "quota/far", &format!("fail_next={failures}"))?;
            let found = get("/").ask(&lab, ALICE, "far", 80)?;
            behave(&lab, "quota/far", "fail_next=0")?;
            ensure!(found[0].status == status, "after {failures} failures: {found:?}");
            ensure!(
                told(&lab, "quota/far", "served")? - before == reached,
                "attempts at {failures} failures"
            );
        }
        delete(&lab, "TrafficPolicy", "quota", "far")?;
        let before = told(&lab, "quota/far", "served")?;
        behave(&lab, "quota/far", "fail_next=1")?;
        let found = get("/").ask(&lab, ALICE, "far", 80)?;
        ensure!(
            found[0].status == 503 && told(&lab, "quota/far", "served")? == before + 1,
            "without a policy: {found:?}"
        );
        Ok(())
    });

    checks.check("a destination's own word that it got nothing is not believed", || {
        apply(&lab, &traffic("team", "loadBalancer: {algorithm: round-robin}"))?;
        let before = ["red", "green", "blue"].map(|name| told(&lab, &format!("quota/{name}"), "served"));
        let found = ask(get("/status/503?claim").times(9))?;
        ensure!(statuses(&found) == [(503, 9)].into(), "{:?}", statuses(&found));
        for (name, before) in ["red", "green", "blue"].iter().zip(before) {
            let grown = told(&lab, &format!("quota/{name}"), "served")? - before?;
            ensure!(grown == 3, "{name} was asked {grown} times");
        }
        Ok(())
    });

    checks.check(
        "an endpoint that is gone while the mesh calls it ready is no failed request",
        || {
            // Nothing was delivered: another endpoint is tried without any policy, whichever node it is on.
            apply(&lab, &traffic("team", "loadBalancer: {algorithm: round-robin}"))?;
            for (pod, left) in [("quota/blue", &["green", "red"][..]), ("quota/red", &["green"])] {
                actors::fall_deaf(&lab, pod)?;
                let found = ask(get("/").times(30))?;
                ensure!(
                    statuses(&found) == [(200, 30)].into(),
                    "without {pod}: {:?}",
                    kinds(&found)
                );
                let counts = destinations(&found);
                ensure!(counts.keys().eq(left), "without {pod}: {counts:?}");
                let calls = rpc(&lab, ALICE, "team", json!({"count": 6}))?;
                ensure!(
                    calls.iter().all(|name| left.contains(&name.as_str())),
                    "without {pod}: {calls:?}"
                );
            }
            // The last one gone, the refusal says so.
            actors::fall_deaf(&lab, "quota/green")?;
            let found = ask(get("/").times(3))?;
            ensure!(
                kinds(&found) == [((503, "dial-refused"), 3)].into(),
                "{:?}",
                kinds(&found)
            );
            ensure!(!found[0].headers.contains_key("x-nodemesh-undelivered"), "{found:?}");
            Ok(())
        },
    );
    checks.finish("balancing");
    lab.down()
}
