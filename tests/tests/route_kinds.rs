//! Routes beyond the plain HTTPRoute: calls of gRPC, whole connections, names in ClientHellos; mirrors, pauses before
//! retries, other origins, backends in other namespaces. Real programs ask, and every destination tells what reached it.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, ensure};
use mesh_tests::{
    Checks, Lab, LabConfig,
    actors::{self, Answer, LINES, RPC, apply, behave, delete, expect_growth, expect_record, requests, rpc, told},
    until,
};
use serde_json::{Value as Json, json};

const SOURCE: &str = "shop/source";
/// How long a copy may take to arrive.
const COPY_LIMIT: Duration = Duration::from_secs(10);
/// The port of a destination that speaks first.
const GREETS: u16 = 7100;

/// Destinations `one` and `two` for the shares, `copy` for mirrors, `far` in a namespace of its own; `greeter` speaks
/// first. Each has a service, and `web` is `one` and `two`.
fn documents() -> String {
    let greeter = format!(
        "---
apiVersion: v1
kind: Pod
metadata: {{name: greeter, namespace: shop, labels: {{pod: greeter}}}}
spec:
  nodeName: node-2
  containers:
  - name: main
    command:
    - /usr/bin/python3
    - -c
    - |
      import socket
      server = socket.create_server(('', {GREETS}))
      while True:
          flow, _ = server.accept()
          flow.sendall(b'greeter hello\\n')
          flow.close()
    readinessProbe: {{tcpSocket: {{port: {GREETS}}}}}
---
apiVersion: v1
kind: Service
metadata: {{name: greeter, namespace: shop}}
spec: {{selector: {{pod: greeter}}, ports: [{{port: {GREETS}}}]}}
"
    );
    [
        actors::namespace("shop", true),
        actors::namespace("away", true),
        actors::namespace("legacy", false),
        actors::source(SOURCE, "node-1"),
        actors::destination("shop/one", "node-1", &[("app", "web")]),
        actors::destination("shop/two", "node-2", &[("app", "web")]),
        actors::destination("shop/copy", "node-2", &[]),
        actors::destination("away/far", "node-2", &[]),
        actors::destination("legacy/outside", "node-2", &[]),
        actors::service("shop/web", "app", "web"),
        actors::service("shop/one", "pod", "one"),
        actors::service("shop/two", "pod", "two"),
        actors::service("shop/copy", "pod", "copy"),
        actors::service("away/far", "pod", "far"),
        greeter,
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: outside, namespace: shop}}\n\
             spec: {{ports: [{{name: http, port: 80}}, {{name: tcp-lines, port: {LINES}}}]}}\n"
        ),
    ]
    .concat()
}

/// A route of a port of `web` with these rules, and perhaps more of its spec.
fn route(kind: &str, name: &str, port: u16, spec: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec:\n  parentRefs: [{{group: \"\", kind: Service, name: web, port: {port}}}]\n{spec}"
    )
}

fn http(rules: &str) -> String {
    route("HTTPRoute", "web", 80, &format!("  rules: {rules}\n"))
}

fn ask(lab: &Lab, plan: Json) -> Result<Vec<Answer>> {
    requests(plan).ask(lab, SOURCE, "web", 80)
}

fn counted(names: Vec<String>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for name in names {
        *counts.entry(name).or_default() += 1;
    }
    counts
}

/// Who answered each of so many connections to a port of `web`, or how they failed.
fn flows(lab: &Lab, verb: &str, port: u16, words: &[&str], count: usize) -> Result<BTreeMap<String, usize>> {
    let port = port.to_string();
    let mut names = Vec::new();
    for _ in 0..count {
        let said = actors::verb(lab, SOURCE, verb, &[&["web", port.as_str()], words].concat())?;
        let answer = said["answer"].as_str().unwrap_or_default();
        names.push(match answer.split_whitespace().next() {
            Some(name) => name.to_owned(),
            None => said["how"].as_str().unwrap_or_default().to_owned(),
        });
    }
    Ok(counted(names))
}

fn expect(found: &BTreeMap<String, usize>, wanted: &[(&str, usize)]) -> Result<()> {
    let wanted: BTreeMap<String, usize> = wanted
        .iter()
        .map(|(name, count)| ((*name).to_owned(), *count))
        .collect();
    ensure!(*found == wanted, "{found:?}, expected {wanted:?}");
    Ok(())
}

#[test]
fn routes_of_calls_connections_and_names() -> Result<()> {
    let lab = Lab::up(LabConfig::test("kinds").manifest(documents()))?;
    let mut checks = Checks::default();

    checks.check("the calls of one connection are spread by weight, and go by their method", || {
        let rules = format!(
            "  rules:
  - name: exact
    matches: [{{method: {{service: actors.Who, method: Exact}}}}]
    backendRefs: [{{name: two, port: {RPC}}}]
  - name: beta
    matches: [{{method: {{type: RegularExpression, service: 'actors\\..*'}}, headers: [{{name: X-Beta, value: \"yes\"}}]}}]
    backendRefs: [{{name: two, port: {RPC}}}]
  - name: broken
    matches: [{{method: {{method: Broken}}}}]
    backendRefs: [{{name: nobody, port: {RPC}}}]
  - name: shares
    matches: [{{method: {{service: actors.Who, method: Name}}}}]
    backendRefs: [{{name: one, port: {RPC}, weight: 70}}, {{name: two, port: {RPC}, weight: 30}}, {{name: nobody, port: {RPC}, weight: 0}}]
"
        );
        apply(&lab, &route("GRPCRoute", "calls", RPC, &rules))?;
        let calls = |plan: Json| rpc(&lab, SOURCE, "web", plan).map(counted);
        let shares = calls(json!({"count": 300}))?;
        let two = shares.get("two").copied().unwrap_or_default();
        ensure!(shares.values().sum::<usize>() == 300 && shares.len() == 2, "{shares:?}");
        // Five deviations around 90.
        ensure!((50..=130).contains(&two), "{shares:?}");
        expect(&calls(json!({"count": 5, "method": "Exact"}))?, &[("two", 5)])?;
        expect(&calls(json!({"count": 2, "method": "Other"}))?, &[("UNIMPLEMENTED", 2)])?;
        expect(&calls(json!({"count": 2, "method": "Broken"}))?, &[("UNAVAILABLE", 2)])?;
        let beta = json!({"count": 5, "method": "Odd", "metadata": {"x-beta": "yes"}});
            expect(&calls(beta)?, &[("two", 5)])?;
        let want = [("nodemesh.route", json!("grpcroute/shop/calls/exact"))];
        expect_record(&lab, "node-1", &want)?;
        delete(&lab, "GRPCRoute", "shop", "calls")
    });

    checks.check("connections are spread by weight, whatever the port declares", || {
        let rules = |first: &str, second: &str, port: u16| {
            format!(
                "  rules:\n  - {{name: all, backendRefs: [{{name: {first}, port: {port}}}, {{name: {second}, port: {port}}}]}}\n"
            )
        };
        apply(&lab, &route("TCPRoute", "flows", LINES, &rules("one", "two", LINES)))?;
        let found = flows(&lab, "line", LINES, &[], 40)?;
        ensure!(found.values().sum::<usize>() == 40 && found.len() == 2, "{found:?}");
        expect_record(&lab, "node-1", &[("nodemesh.route", json!("tcproute/shop/flows/all"))])?;

        apply(&lab, &route("TCPRoute", "flows", LINES, &rules("nobody", "nobody", LINES)))?;
        expect(&flows(&lab, "line", LINES, &[], 3)?, &[("ConnectionResetError", 3)])?;
        expect_record(&lab, "node-1", &[("nodemesh.refusal", json!("bad-backend"))])?;
        delete(&lab, "TCPRoute", "shop", "flows")?;

        // A port that declares HTTP: the connection goes to one place, and so do its requests.
        apply(&lab, &route("TCPRoute", "flows", 80, &rules("two", "two", 80)))?;
        let answers = requests(json!([{"path": "/a"}])).times(10).ask(&lab, SOURCE, "web", 80)?;
        ensure!(answers.iter().all(|answer| answer.from() == "two"), "{answers:?}");
        // An HTTPRoute beside it is the more specific.
        apply(&lab, &http("[{backendRefs: [{name: one, port: 80}]}]"))?;
        let answers = requests(json!([{"path": "/a"}])).times(10).ask(&lab, SOURCE, "web", 80)?;
        ensure!(answers.iter().all(|answer| answer.from() == "one"), "{answers:?}");
        delete(&lab, "HTTPRoute", "shop", "web")?;
        delete(&lab, "TCPRoute", "shop", "flows")
    });

    checks.check("a connection goes by the name that its ClientHello asks for", || {
        let names = |name: &str, hosts: &str, backend: &str| {
            route(
                "TLSRoute",
                name,
                LINES,
                &format!("  hostnames: {hosts}\n  rules: [{{backendRefs: [{{name: {backend}, port: {LINES}}}]}}]\n"),
            )
        };
        apply(&lab, &names("exact", "[a.example]", "one"))?;
        apply(&lab, &names("wild", "[\"*.example\"]", "two"))?;
        let hello = |name: &str| flows(&lab, "hello", LINES, &[name], 3);
        expect(&hello("a.example")?, &[("one", 3)])?;
        expect(&hello("A.Example")?, &[("one", 3)])?;
        expect(&hello("b.example")?, &[("two", 3)])?;
        expect(&hello("x.a.example")?, &[("two", 3)])?;
        // Neither another name nor what is no TLS has a way.
        expect(&hello("a.other")?, &[("ConnectionResetError", 3)])?;
        expect(&flows(&lab, "line", LINES, &[], 3)?, &[("ConnectionResetError", 3)])?;
        expect_record(&lab, "node-1", &[("nodemesh.refusal", json!("no-route"))])?;

        // With a TCPRoute beside them everything else goes by that one.
        let rest = format!("  rules: [{{backendRefs: [{{name: copy, port: {LINES}}}]}}]\n");
        apply(&lab, &route("TCPRoute", "rest", LINES, &rest))?;
        expect(&hello("a.example")?, &[("one", 3)])?;
        expect(&hello("a.other")?, &[("copy", 3)])?;
        expect(&flows(&lab, "line", LINES, &[], 3)?, &[("copy", 3)])?;
        for (kind, name) in [("TLSRoute", "exact"), ("TLSRoute", "wild"), ("TCPRoute", "rest")] {
            delete(&lab, kind, "shop", name)?;
        }
        Ok(())
    });

    checks.check(
        "a destination that speaks first is heard through routes of connections",
        || {
            let to_greeter = format!("  rules: [{{backendRefs: [{{name: greeter, port: {GREETS}}}]}}]\n");
            apply(&lab, &route("TCPRoute", "greet", LINES, &to_greeter))?;
            expect(&flows(&lab, "listen", LINES, &[], 2)?, &[("greeter", 2)])?;
            let named =
                format!("  hostnames: [a.example]\n  rules: [{{backendRefs: [{{name: one, port: {LINES}}}]}}]\n");
            apply(&lab, &route("TLSRoute", "named", LINES, &named))?;
            expect(&flows(&lab, "listen", LINES, &[], 2)?, &[("greeter", 2)])?;
            expect(&flows(&lab, "hello", LINES, &["a.example"], 2)?, &[("one", 2)])?;
            delete(&lab, "TLSRoute", "shop", "named")?;
            delete(&lab, "TCPRoute", "shop", "greet")
        },
    );
    checks.finish("kinds of routes");
    lab.down()
}

#[test]
fn what_a_rule_does_beside_sending_on() -> Result<()> {
    let lab = Lab::up(LabConfig::test("filters").manifest(documents()))?;
    let mut checks = Checks::default();
    let mirror = |more: &str| {
        http(&format!(
            "[{{name: mirrored, filters: [{{type: RequestMirror, requestMirror: {{backendRef: {{name: copy, port: 80}}{more}}}}}, \
             {{type: RequestHeaderModifier, requestHeaderModifier: {{set: [{{name: x-rule, value: mirrored}}]}}}}], \
             backendRefs: [{{name: one, port: 80}}]}}]"
        ))
    };
    let copies = |count: u64| {
        until("copies", COPY_LIMIT, || {
            let found = told(&lab, "shop/copy", "served")?;
            ensure!(found == count, "{found} copies came, expected {count}");
            Ok(Some(()))
        })
    };

    checks.check("a mirror gets a copy of each request, and nobody waits for it", || {
        apply(&lab, &mirror(""))?;
        behave(&lab, "shop/copy", "served=0")?;
        let before = lab.metrics("node-1")?;
        let answers = ask(
            &lab,
            json!([
                {"path": "/a?b=c", "headers": {"x-own": "1"}},
                {"path": "/p", "method": "POST", "body": "hello"},
            ]),
        )?;
        for answer in &answers {
            ensure!(answer.status == 200 && answer.from() == "one", "{answer:?}");
        }
        copies(2)?;
        let want = [
            ("nodemesh.route", json!("httproute/shop/web/mirrored")),
            ("url.path", json!("/p")),
        ];
        expect_record(&lab, "node-1", &want)?;
        let labels = [("reporter", "source"), ("destination_service_name", "copy")];
        expect_growth(&lab, "node-1", &before, "mesh_requests_total", &labels, 2.0)?;
        // The destination judges and records a copy like any request.
        expect_record(
            &lab,
            "node-2",
            &[("url.path", json!("/p")), ("http.request.method", json!("POST"))],
        )?;

        behave(&lab, "shop/copy", "served=0&hold=1")?;
        let answers = requests(json!([{"path": "/slow"}]))
            .times(5)
            .ask(&lab, SOURCE, "web", 80)?;
        behave(&lab, "shop/copy", "hold=0")?;
        ensure!(
            answers
                .iter()
                .all(|answer| answer.status == 200 && answer.seconds < 5.0),
            "{answers:?}"
        );
        copies(5)
    });

    checks.check("a share is copied; what is too long is counted", || {
        apply(&lab, &mirror(", percent: 0"))?;
        behave(&lab, "shop/copy", "served=0")?;
        let none = requests(json!([{"path": "/none"}]))
            .times(20)
            .ask(&lab, SOURCE, "web", 80)?;
        ensure!(none.len() == 20, "{none:?}");
        apply(&lab, &mirror(", fraction: {numerator: 1, denominator: 2}"))?;
        requests(json!([{"path": "/half"}]))
            .times(100)
            .ask(&lab, SOURCE, "web", 80)?;
        let half = until("copies", COPY_LIMIT, || {
            let found = told(&lab, "shop/copy", "served")?;
            Ok((found >= 20).then_some(found))
        })?;
        ensure!(half <= 80, "{half} copies of 100");

        apply(&lab, &mirror(""))?;
        let before = lab.metrics("node-1")?;
        let long = "x".repeat(100_000);
        let answers = ask(&lab, json!([{"path": "/long", "method": "POST", "body": long}]))?;
        ensure!(answers[0].status == 200, "{:?}", answers[0].status);
        let dropped = [("reason", "mirror-dropped")];
        expect_growth(&lab, "node-1", &before, "nodemesh_agent_refusals_total", &dropped, 1.0)
    });

    checks.check("a call of gRPC is copied too", || {
        let rules = format!(
            "  rules:\n  - filters: [{{type: RequestMirror, requestMirror: {{backendRef: {{name: copy, port: {RPC}}}}}}}]\n    \
             backendRefs: [{{name: one, port: {RPC}}}]\n"
        );
        apply(&lab, &route("GRPCRoute", "calls", RPC, &rules))?;
        behave(&lab, "shop/copy", "served=0")?;
        expect(&counted(rpc(&lab, SOURCE, "web", json!({"count": 4}))?), &[("one", 4)])?;
        copies(4)?;
        delete(&lab, "GRPCRoute", "shop", "calls")
    });

    checks.check("a retry waits at least for its backoff", || {
        apply(
            &lab,
            &http("[{retry: {codes: [503], attempts: 3, backoff: 300ms}, backendRefs: [{name: one, port: 80}]}]"),
        )?;
        behave(&lab, "shop/one", "fail_next=2&served=0")?;
        let answers = ask(&lab, json!([{"path": "/again"}]))?;
        ensure!(answers[0].status == 200 && answers[0].seconds >= 0.6, "{answers:?}");
        ensure!(told(&lab, "shop/one", "served")? == 3, "three tries");
        // Not a status that the rule names.
        let answers = ask(&lab, json!([{"path": "/status/500"}]))?;
        ensure!(answers[0].status == 500, "{answers:?}");
        ensure!(told(&lab, "shop/one", "served")? == 4, "one try");
        Ok(())
    });

    checks.check("other origins are told what they may do", || {
        apply(
            &lab,
            &http(
                "[{filters: [{type: CORS, cors: {allowOrigins: [\"https://*.example\"], allowMethods: [PUT], \
                 allowHeaders: [x-a], exposeHeaders: [x-served-by], maxAge: 60}}], backendRefs: [{name: one, port: 80}]}]",
            ),
        )?;
        behave(&lab, "shop/one", "served=0")?;
        let preflight = |origin: &str| {
            json!({"method": "OPTIONS", "path": "/", "headers": {"origin": origin, "access-control-request-method": "PUT"}})
        };
        let answers = ask(
            &lab,
            json!([
                preflight("https://a.example"),
                preflight("https://a.other"),
                {"path": "/", "headers": {"origin": "https://a.example"}},
                {"path": "/", "headers": {"origin": "https://a.other"}},
            ]),
        )?;
        let header = |answer: &Answer, name: &str| answer.headers.get(name).cloned().unwrap_or_default();
        let allow = "access-control-allow-origin";
        ensure!(answers[0].status == 204 && header(&answers[0], allow) == "https://a.example", "{answers:?}");
        ensure!(header(&answers[0], "access-control-allow-methods") == "PUT", "{answers:?}");
        ensure!(header(&answers[0], "access-control-max-age") == "60", "{answers:?}");
        ensure!(answers[1].status == 204 && header(&answers[1], allow).is_empty(), "{answers:?}");
        ensure!(answers[2].status == 200 && header(&answers[2], allow) == "https://a.example", "{answers:?}");
        ensure!(header(&answers[2], "access-control-expose-headers") == "x-served-by", "{answers:?}");
        ensure!(answers[3].status == 200 && header(&answers[3], allow).is_empty(), "{answers:?}");
        ensure!(told(&lab, "shop/one", "served")? == 2, "preflights are answered at the source");
        Ok(())
    });

    checks.check("a backend in another namespace needs that namespace's leave", || {
        apply(&lab, &http("[{backendRefs: [{name: far, namespace: away, port: 80}]}]"))?;
        let answers = ask(&lab, json!([{"path": "/"}]))?;
        ensure!(answers[0].status == 500 && answers[0].refusal() == "bad-backend", "{answers:?}");
        apply(
            &lab,
            "apiVersion: gateway.networking.k8s.io/v1beta1\nkind: ReferenceGrant\nmetadata: {name: shop, namespace: away}\n\
             spec: {from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop}], to: [{group: \"\", kind: Service}]}\n",
        )?;
        let answers = ask(&lab, json!([{"path": "/"}]))?;
        ensure!(answers[0].from() == "far", "{answers:?}");
        delete(&lab, "ReferenceGrant", "away", "shop")?;
        let answers = ask(&lab, json!([{"path": "/"}]))?;
        ensure!(answers[0].status == 500, "{answers:?}");
        delete(&lab, "HTTPRoute", "shop", "web").context("delete")
    });
    checks.check(
        "a service without a selector leads to addresses outside the mesh, also by routes",
        || {
            let outside = lab.pod_ip("legacy/outside")?;
            apply(
                &lab,
                &format!(
                    "apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: outside-1, namespace: shop, labels: {{kubernetes.io/service-name: outside}}}}
addressType: IPv4
ports: [{{name: http, port: 8080}}, {{name: tcp-lines, port: {LINES}}}]
endpoints: [{{addresses: [{outside}], conditions: {{ready: true}}}}]
"
                ),
            )?;
            let own = lab.service_ip("shop/outside")?.to_string();
            let answers = requests(json!([{"path": "/direct"}])).ask(&lab, SOURCE, &own, 80)?;
            ensure!(answers[0].from() == "outside", "{answers:?}");
            apply(&lab, &http("[{backendRefs: [{name: outside, port: 80}]}]"))?;
            let answers = ask(&lab, json!([{"path": "/routed"}]))?;
            ensure!(answers[0].from() == "outside", "{answers:?}");
            let want = [
                ("url.path", json!("/routed")),
                ("nodemesh.route", json!("httproute/shop/web/0")),
            ];
            expect_record(&lab, "node-1", &want)?;
            let to_outside = format!("  rules: [{{backendRefs: [{{name: outside, port: {LINES}}}]}}]\n");
            apply(&lab, &route("TCPRoute", "flows", LINES, &to_outside))?;
            expect(&flows(&lab, "line", LINES, &[], 2)?, &[("outside", 2)])?;
            delete(&lab, "TCPRoute", "shop", "flows")?;
            delete(&lab, "HTTPRoute", "shop", "web")
        },
    );
    checks.finish("filters");
    lab.down()
}
