//! Where requests go: which rule takes a request, how it is changed, shares by weight, and a policy that changes under
//! load without a failed request. Every answer names the destination that gave it and shows what reached it.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, ensure};
use mesh_tests::{
    Checks, Lab, LabConfig,
    actors::{
        self, Answer, WEB, apply, behave, delete, destinations, expect_growth, expect_record, get, requests, rpc,
        statuses, told,
    },
};
use serde_json::{Value as Json, json};

/// The lab's load generator.
const LOAD: &str = env!("CARGO_BIN_EXE_lab-load");
const LOAD_LIMIT: Duration = Duration::from_secs(60);
const SOURCE: &str = "shop/source";
/// A source in another namespace, for consumer routes.
const VISITOR: &str = "visit/visitor";

/// One destination of version 1 on each node, two of version 2 on the other one, and a service for each version.
fn documents() -> String {
    let cart = |version| [("app", "cart"), ("version", version)];
    let subset = |name: &str| {
        format!(
            "---\napiVersion: nodemesh.io/v1alpha1\nkind: ServiceSubset\nmetadata: {{name: cart-{name}, namespace: shop}}\n\
             spec: {{service: cart, labels: {{version: {name}}}}}\n"
        )
    };
    [
        actors::namespace("shop", true),
        actors::namespace("visit", true),
        actors::source(SOURCE, "node-1"),
        actors::source(VISITOR, "node-1"),
        actors::destination("shop/one-near", "node-1", &cart("v1")),
        actors::destination("shop/one-far", "node-2", &cart("v1")),
        actors::destination("shop/two-far", "node-2", &cart("v2")),
        actors::service("shop/cart", "app", "cart"),
        actors::service("shop/one", "version", "v1"),
        actors::service("shop/two", "version", "v2"),
        subset("v1"),
        subset("v2"),
    ]
    .concat()
}

/// A route of the cart's HTTP port with these rules.
fn route(rules: &str) -> String {
    route_of("cart", "shop", 80, rules)
}

fn route_of(name: &str, namespace: &str, port: u16, rules: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec:\n  parentRefs: [{{group: \"\", kind: Service, name: cart, namespace: shop, port: {port}}}]\n  rules:\n{rules}"
    )
}

/// A rule that only says that it was the one: a header of the answer tells its name.
fn marked(name: &str, matches: &str) -> String {
    format!(
        "  - name: {name}\n    matches: [{matches}]\n    filters: [{{type: ResponseHeaderModifier, \
         responseHeaderModifier: {{set: [{{name: x-rule, value: {name}}}]}}}}]\n    backendRefs: [{{name: two, port: 80}}]\n"
    )
}

const TO_V1: &str = "{group: nodemesh.io, kind: ServiceSubset, name: cart-v1, port: 80";
const TO_V2: &str = "{group: nodemesh.io, kind: ServiceSubset, name: cart-v2, port: 80";

fn by_weight(first: u32, second: u32) -> String {
    route(&format!(
        "  - name: all\n    backendRefs: [{TO_V1}, weight: {first}}}, {TO_V2}, weight: {second}}}]\n"
    ))
}

fn ask(lab: &Lab, plan: Json) -> Result<Vec<Answer>> {
    requests(plan).ask(lab, SOURCE, "cart", 80)
}

fn one(lab: &Lab, plan: Json) -> Result<Answer> {
    ask(lab, json!([plan]))?.pop().context("no answer")
}

/// Runs the load generator in the source's pod.
fn load(lab: &Lab, url: &str, options: &[&str]) -> Result<Json> {
    let argv = [&[LOAD, "http", url], options].concat();
    let said = lab.exec(SOURCE, &argv)?.ok()?;
    serde_json::from_str(&said).with_context(|| format!("load: {said}"))
}

fn counts(report: &Json, what: &str) -> Result<BTreeMap<String, f64>> {
    Ok(serde_json::from_value(report[what].clone())?)
}

/// Whether `count` of `all` is a plausible outcome of chance `share`: five deviations, one false alarm in a million.
fn plausible(what: &str, count: f64, all: f64, share: f64) -> Result<()> {
    let (expected, deviation) = (all * share, (all * share * (1.0 - share)).sqrt());
    ensure!(
        (count - expected).abs() <= 5.0 * deviation + 0.5,
        "{what}: {count} of {all}, expected {expected:.0} ± {:.0}",
        5.0 * deviation
    );
    Ok(())
}

#[test]
fn routes_decide_where_requests_go() -> Result<()> {
    let lab = Lab::up(LabConfig::test("routes").manifest(documents()))?;
    let mut checks = Checks::default();

    checks.check("the rule that takes a request is the one of the Gateway API", || {
        let rules = [
            marked("exact", "{path: {type: Exact, value: /a/b}}"),
            marked("long", "{path: {type: PathPrefix, value: /a/b/c}}"),
            marked("short", "{path: {type: PathPrefix, value: /a}}"),
            marked("regex", "{path: {type: RegularExpression, value: \"/r/[0-9]+\"}}"),
            marked("post", "{path: {type: PathPrefix, value: /a}, method: POST}"),
            marked(
                "header",
                "{path: {type: PathPrefix, value: /a}, headers: [{name: X-Key, value: k}]}",
            ),
            marked(
                "headers",
                "{path: {type: PathPrefix, value: /a}, headers: [{name: x-key, value: k}, \
                 {name: x-more, type: RegularExpression, value: \"m+\"}]}",
            ),
            marked(
                "query",
                "{path: {type: PathPrefix, value: /a}, queryParams: [{name: q, value: \"1\"}]}",
            ),
            marked(
                "either",
                "{headers: [{name: x-one, value: \"1\"}]}, {headers: [{name: x-two, value: \"2\"}]}",
            ),
        ];
        apply(&lab, &route(&rules.concat()))?;
        let cases = [
            ("GET", "/a/b", json!({}), "exact"),
            ("GET", "/a/b?x=1", json!({}), "exact"),
            ("GET", "/a/b/", json!({}), "short"),
            ("GET", "/a/b/c", json!({}), "long"),
            ("GET", "/a/b/c/d", json!({}), "long"),
            ("GET", "/a/b/cd", json!({}), "short"),
            ("GET", "/a", json!({}), "short"),
            ("GET", "/ab", json!({}), ""),
            ("GET", "/A", json!({}), ""),
            ("GET", "/r/17", json!({}), "regex"),
            ("GET", "/r/17x", json!({}), ""),
            ("GET", "/x/r/17", json!({}), ""),
            ("POST", "/a/z", json!({}), "post"),
            ("POST", "/a/z", json!({"x-key": "k"}), "post"),
            ("POST", "/a/b", json!({"x-key": "k"}), "exact"),
            ("GET", "/a/z", json!({"x-key": "k"}), "header"),
            ("GET", "/a/z", json!({"X-KEY": "k"}), "header"),
            ("GET", "/a/z", json!({"x-key": "K"}), "short"),
            ("GET", "/a/z", json!({"x-key": "k", "x-more": "mmm"}), "headers"),
            ("GET", "/a/z", json!({"x-key": "k", "x-more": "mn"}), "header"),
            ("GET", "/a/z?q=1", json!({}), "query"),
            ("GET", "/a/z?p=2&q=1", json!({}), "query"),
            ("GET", "/a/z?q=12", json!({}), "short"),
            ("GET", "/a/z?q=1", json!({"x-key": "k"}), "header"),
            ("GET", "/other", json!({"x-two": "2"}), "either"),
            ("GET", "/other", json!({"x-one": "2"}), ""),
        ];
        let plan = cases
            .iter()
            .map(|(method, path, headers, _)| json!({"method": method, "path": path, "headers": headers}));
        let answers = ask(&lab, plan.collect())?;
        let mut wrong = Vec::new();
        for ((method, path, headers, want), answer) in cases.iter().zip(&answers) {
            let rule = answer.headers.get("x-rule").map_or("", String::as_str);
            let status = if want.is_empty() { 404 } else { 200 };
            let place = if want.is_empty() { "" } else { "two-far" };
            if rule != *want || answer.status != status || answer.from() != place {
                wrong.push(format!(
                    "{method} {path} {headers}: {rule:?} {}, expected {want:?}",
                    answer.status
                ));
            }
        }
        ensure!(wrong.is_empty(), "{}", wrong.join("; "));
        let nowhere = answers.iter().find(|answer| answer.status == 404).context("no 404")?;
        ensure!(nowhere.refusal() == "no-route", "{nowhere:?}");
        let want = [
            ("nodemesh.refusal", json!("no-route")),
            ("nodemesh.response_flags", json!("NR")),
        ];
        expect_record(&lab, "node-1", &want)?;
        let want = [
            ("nodemesh.route", json!("httproute/shop/cart/regex")),
            ("url.path", json!("/r/17")),
        ];
        expect_record(&lab, "node-1", &want).map(drop)
    });

    checks.check(
        "a route of a service leaves alone what is sent to a pod's own address",
        || {
            let pod = lab.pod_ip("shop/one-far")?.to_string();
            let answers = get("/ab").ask(&lab, SOURCE, &pod, WEB)?;
            ensure!(
                answers[0].status == 200 && answers[0].from() == "one-far",
                "{answers:?}"
            );
            // Nor another port of the service, or another service of the same pods.
            let answers = get("/ab").ask(&lab, SOURCE, "cart", 81)?;
            ensure!(answers[0].status == 200, "{answers:?}");
            let answers = get("/ab").ask(&lab, SOURCE, "two", 80)?;
            ensure!(
                answers[0].status == 200 && answers[0].from() == "two-far",
                "{answers:?}"
            );
            Ok(())
        },
    );

    checks.check("a rule without a backend that exists answers 500", || {
        let rules = "  - {name: missing, matches: [{path: {value: /missing}}], backendRefs: [{name: nobody, port: 80}]}\n\
                     \x20 - {name: port, matches: [{path: {value: /port}}], backendRefs: [{name: two, port: 4}]}\n\
                     \x20 - {name: none, matches: [{path: {value: /none}}]}\n\
                     \x20 - {name: zero, matches: [{path: {value: /zero}}], backendRefs: [{name: two, port: 80, weight: 0}]}\n\
                     \x20 - {name: half, matches: [{path: {value: /half}}], backendRefs: [{name: two, port: 80}, {name: nobody, port: 80}]}\n";
        apply(&lab, &route(rules))?;
        let answers = ask(&lab, ["/missing", "/port", "/none", "/zero"].map(|path| json!({"path": path})).into())?;
        for answer in &answers {
            ensure!(answer.status == 500 && answer.refusal() == "bad-backend", "{answer:?}");
        }
        let halves = get("/half").times(400).ask(&lab, SOURCE, "cart", 80)?;
        let counts = statuses(&halves);
        ensure!(counts.keys().all(|status| [200, 500].contains(status)), "{counts:?}");
        plausible("answers of the half that exists", counts[&200] as f64, 400.0, 0.5)
    });

    checks.check("redirects", || {
        let redirect = |name: &str, with: &str| {
            format!(
                "  - name: {name}\n    matches: [{{path: {{type: PathPrefix, value: /{name}}}}}]\n    \
                 filters: [{{type: RequestRedirect, requestRedirect: {with}}}]\n"
            )
        };
        let rules = [
            redirect(
                "full",
                "{path: {type: ReplaceFullPath, replaceFullPath: /new}, statusCode: 301}",
            ),
            redirect("prefix", "{path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}}"),
            redirect("host", "{hostname: other.example, scheme: https}"),
            redirect("port", "{port: 8443, scheme: https, statusCode: 302}"),
        ];
        apply(&lab, &route(&rules.concat()))?;
        let cases = [
            ("/full/x", 301, "http://cart/new"),
            ("/prefix/x?y=1", 302, "http://cart/new/x?y=1"),
            ("/prefix", 302, "http://cart/new"),
            ("/host/x", 302, "https://other.example/host/x"),
            ("/port/x", 302, "https://cart:8443/port/x"),
        ];
        let before = lab.metrics("node-1")?;
        let answers = ask(&lab, cases.map(|(path, _, _)| json!({"path": path})).into())?;
        for ((path, status, location), answer) in cases.iter().zip(&answers) {
            let found = answer.headers.get("location").map_or("", String::as_str);
            ensure!(answer.status == *status && found == *location, "{path}: {answer:?}");
        }
        // Answered at the source: nobody else has a record.
        let labels = [
            ("reporter", "source"),
            ("response_code", "302"),
            ("destination_service_name", "cart"),
        ];
        expect_growth(&lab, "node-1", &before, "mesh_requests_total", &labels, 4.0)
    });

    checks.check("rewrites and header changes", || {
        let rules = "  - name: prefix
    matches: [{path: {type: PathPrefix, value: /basket}}]
    filters:
    - {type: URLRewrite, urlRewrite: {hostname: inner.example, path: {type: ReplacePrefixMatch, replacePrefixMatch: /cart}}}
    - {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-set, value: s}], add: [{name: x-add, value: a}], remove: [x-gone]}}
    - {type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: x-set, value: t}], add: [{name: x-add, value: b}], remove: [x-removed]}}
    backendRefs: [{name: two, port: 80, filters: [{type: RequestHeaderModifier, requestHeaderModifier: {add: [{name: x-share, value: two}]}}]}]
  - name: whole
    matches: [{path: {type: PathPrefix, value: /all}}]
    filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: /one}}}]
    backendRefs: [{name: one, port: 80}]
";
        apply(&lab, &route(rules))?;
        let sent = json!({"x-set": "old", "x-add": "old", "x-gone": "old", "x-kept": "kept"});
        let answer = one(&lab, json!({"path": "/basket/7?x=%20", "headers": sent}))?;
        ensure!(answer.status == 200, "{answer:?}");
        let header = |name: &str| answer.body["headers"][name].as_str().unwrap_or_default();
        ensure!(answer.body["path"] == "/cart/7?x=%20", "{answer:?}");
        ensure!(header("host") == "inner.example", "{answer:?}");
        ensure!(header("x-set") == "s" && header("x-kept") == "kept" && header("x-share") == "two", "{answer:?}");
        ensure!(header("x-gone").is_empty(), "{answer:?}");
        // Two lines or one with a comma; python shows the first line of several.
        ensure!(header("x-add").starts_with("old") || header("x-add") == "a", "{answer:?}");
        let back = |name: &str| answer.headers.get(name).map_or("", String::as_str);
        ensure!(back("x-set") == "t" && back("x-add") == "b" && back("x-removed").is_empty(), "{answer:?}");
        let paths = ["/basket", "/basket/", "/all/x?y=1", "/basketful"].map(|path| json!({"path": path}));
        let answers = ask(&lab, paths.into())?;
        let found: Vec<&str> = answers.iter().map(|answer| answer.body["path"].as_str().unwrap_or("-")).collect();
        ensure!(found == ["/cart", "/cart/", "/one?y=1", "-"], "{found:?}");
        Ok(())
    });

    checks.check("time limits of requests and of tries", || {
        let rules = "  - {name: request, matches: [{path: {value: /request}}], timeouts: {request: 300ms}, backendRefs: [{name: two, port: 80}]}\n\
                     \x20 - {name: try, matches: [{path: {value: /try}}], timeouts: {request: 10s, backendRequest: 300ms}, backendRefs: [{name: two, port: 80}]}\n\
                     \x20 - {name: free, matches: [{path: {value: /free}}], timeouts: {request: 0s}, backendRefs: [{name: two, port: 80}]}\n";
        apply(&lab, &route(rules))?;
        let before = lab.metrics("node-1")?;
        behave(&lab, "shop/two-far", "hold=1")?;
        let answers = ask(&lab, json!([{"path": "/request"}, {"path": "/try"}, {"path": "/request"}]))?;
        behave(&lab, "shop/two-far", "hold=0")?;
        for (answer, refusal) in answers.iter().zip(["request-timeout", "attempt-timeout", "request-timeout"]) {
            ensure!(answer.status == 504 && answer.refusal() == refusal, "{answer:?}");
            ensure!((0.3..5.0).contains(&answer.seconds), "{answer:?}");
        }
        let labels = [("reporter", "source"), ("response_code", "504"), ("response_flags", "UT")];
        expect_growth(&lab, "node-1", &before, "mesh_requests_total", &labels, 3.0)?;
        // What was given up leaves nothing behind that a next request could read.
        let answers = ask(&lab, json!([{"path": "/free/1"}, {"path": "/request/2"}, {"path": "/try/3"}]))?;
        let found: Vec<&str> = answers.iter().map(|answer| answer.body["path"].as_str().unwrap_or("-")).collect();
        ensure!(found == ["/free/1", "/request/2", "/try/3"], "{answers:?}");
        Ok(())
    });

    checks.check("gRPC is routed by its method and by headers", || {
        let rules = format!(
            "  - name: beta\n    matches: [{{path: {{type: PathPrefix, value: /actors.Who}}, headers: [{{name: x-beta, value: \"yes\"}}]}}]\n    \
             backendRefs: [{{name: two, port: {rpc}}}]\n\
             \x20 - name: method\n    matches: [{{path: {{type: Exact, value: /actors.Who/Exact}}}}]\n    backendRefs: [{{name: two, port: {rpc}}}]\n\
             \x20 - name: stable\n    matches: [{{path: {{type: PathPrefix, value: /actors.Who}}}}]\n    backendRefs: [{{name: one, port: {rpc}}}]\n",
            rpc = actors::RPC
        );
        apply(&lab, &route_of("calls", "shop", actors::RPC, &rules))?;
        let calls = |plan: Json| -> Result<BTreeMap<String, usize>> {
            let mut counts = BTreeMap::new();
            for name in rpc(&lab, SOURCE, "cart", plan)? {
                *counts.entry(name).or_default() += 1;
            }
            Ok(counts)
        };
        ensure!(
            calls(json!({"count": 20, "metadata": {"x-beta": "yes"}}))? == [("two-far".to_owned(), 20)].into(),
            "by header"
        );
        ensure!(calls(json!({"count": 20, "method": "Exact"}))? == [("two-far".to_owned(), 20)].into(), "by method");
        // One connection of the source, and yet each call is balanced.
        let found = calls(json!({"count": 40}))?;
        ensure!(found.len() == 2 && found["one-near"] + found["one-far"] == 40, "{found:?}");
        ensure!(found.values().all(|count| *count >= 4), "{found:?}");
        delete(&lab, "HTTPRoute", "shop", "calls")
    });

    checks.check("shares by weight over subsets and over services", || {
        const REQUESTS: f64 = 3000.0;
        let cases = [
            ("subsets 80 to 20", by_weight(80, 20), 0.2),
            ("subsets 0 to 1", by_weight(0, 1), 1.0),
            ("subsets 1 to 0", by_weight(1, 0), 0.0),
            (
                "services 1 to 3",
                route("  - name: all\n    backendRefs: [{name: one, port: 80}, {name: two, port: 80, weight: 3}]\n"),
                0.75,
            ),
        ];
        for (what, route, share) in cases {
            apply(&lab, &route)?;
            let report = load(
                &lab,
                "http://cart/",
                &["--requests", "3000", "--connections", "4", "--seconds", "60"],
            )?;
            ensure!(
                counts(&report, "statuses")? == [("200".to_owned(), REQUESTS)].into(),
                "{what}: {report}"
            );
            let servers = counts(&report, "servers")?;
            let of = |name: &str| servers.get(name).copied().unwrap_or_default();
            plausible(what, of("two-far"), REQUESTS, share)?;
            ensure!(
                of("one-near") + of("one-far") + of("two-far") == REQUESTS,
                "{what}: {report}"
            );
            // Within a version its endpoints share by their load: none is left out.
            ensure!(
                share == 1.0 || (of("one-near") > 0.0 && of("one-far") > 0.0),
                "{what}: {report}"
            );
        }
        Ok(())
    });

    checks.check("a consumer's route holds for its own namespace only", || {
        apply(&lab, &by_weight(1, 0))?;
        apply(
            &lab,
            "apiVersion: v1\nkind: Service\nmetadata: {name: own, namespace: visit}\nspec: {ports: [{port: 80}]}\n",
        )?;
        let rules =
            "  - name: mine\n    filters: [{type: RequestRedirect, requestRedirect: {hostname: visitors.example}}]\n";
        apply(&lab, &route_of("mine", "visit", 80, rules))?;
        let cart = lab.service_ip("shop/cart")?.to_string();
        let answers = get("/").ask(&lab, VISITOR, &cart, 80)?;
        ensure!(answers[0].status == 302, "{answers:?}");
        let answers = get("/").times(5).ask(&lab, SOURCE, "cart", 80)?;
        ensure!(statuses(&answers) == [(200, 5)].into(), "{answers:?}");
        delete(&lab, "HTTPRoute", "visit", "mine")?;
        let answers = get("/").ask(&lab, VISITOR, &cart, 80)?;
        ensure!(answers[0].status == 200, "{answers:?}");
        delete(&lab, "Service", "visit", "own")
    });
    checks.finish("routes");
    lab.down()
}

#[test]
fn policies_change_under_load_without_a_failed_request() -> Result<()> {
    let lab = Lab::up(LabConfig::test("rollout").manifest(documents()))?;
    apply(&lab, &by_weight(1, 0))?;
    let stop = lab.directory().join("stop-load");
    let stop_file = stop.display().to_string();
    let options = [
        "--connections",
        "8",
        "--rate",
        "400",
        "--seconds",
        "60",
        "--stop",
        &stop_file,
    ];
    let kept = lab.exec_background(SOURCE, &[&[LOAD, "http", "http://cart/"], &options[..]].concat())?;
    let new = lab.exec_background(SOURCE, &[&[LOAD, "connect", "http://cart/"], &options[..]].concat())?;

    // What a request that begins after `apply --wait` has returned gets is what was applied.
    let asked = get("/").times(50).connections(2);
    for round in 0..4 {
        for (route, allowed) in [
            (by_weight(80, 20), &["one-near", "one-far", "two-far"][..]),
            (by_weight(0, 100), &["two-far"]),
            (by_weight(100, 0), &["one-near", "one-far"]),
        ] {
            apply(&lab, &route)?;
            let answers = asked.ask(&lab, SOURCE, "cart", 80)?;
            ensure!(
                statuses(&answers) == [(200, 100)].into(),
                "round {round}: {:?}",
                statuses(&answers)
            );
            let found = destinations(&answers);
            ensure!(
                found.keys().all(|name| allowed.contains(&name.as_str())),
                "round {round}: {found:?} after {allowed:?} was applied"
            );
        }
    }
    // A service without any route, and with one again.
    delete(&lab, "HTTPRoute", "shop", "cart")?;
    let found = destinations(&asked.ask(&lab, SOURCE, "cart", 80)?);
    ensure!(found.len() == 3, "without a route the service is balanced: {found:?}");
    apply(&lab, &by_weight(0, 1))?;
    std::fs::write(&stop, "")?;

    let mut sent = 0.0;
    for load in [kept, new] {
        let said = load.wait(LOAD_LIMIT)?.ok()?;
        let report: Json = serde_json::from_str(&said).with_context(|| format!("load: {said}"))?;
        println!("under load: {report}");
        let total = report["requests"].as_f64().context("no count")?;
        ensure!(total > 200.0, "hardly any load: {report}");
        ensure!(
            counts(&report, "statuses")? == [("200".to_owned(), total)].into(),
            "a request failed: {report}"
        );
        ensure!(counts(&report, "errors")?.is_empty(), "a request failed: {report}");
        sent += total;
    }
    // The mesh counted each of them once, as the source's; the checks above asked 13 times 100.
    let labels = [
        ("reporter", "source"),
        ("destination_service_name", "cart"),
        ("response_code", "200"),
    ];
    expect_growth(
        &lab,
        "node-1",
        &Default::default(),
        "mesh_requests_total",
        &labels,
        sent + 1300.0,
    )?;
    let reached: u64 = ["one-near", "one-far", "two-far"]
        .iter()
        .map(|pod| told(&lab, &format!("shop/{pod}"), "served"))
        .sum::<Result<u64>>()?;
    ensure!(
        reached as f64 == sent + 1300.0,
        "{reached} requests reached the destinations, {sent} and 1300 were sent"
    );
    lab.down()
}
