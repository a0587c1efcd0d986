//! The command line: what each command prints and exits with.

use std::{collections::BTreeSet, os::unix::fs::PermissionsExt};

use crate::world::{CLUSTER, Controller, controller_command, ctl_at, pod, service, two_nodes};

const STRICT: &str = "\
apiVersion: nodemesh.io/v1alpha1
kind: MeshPolicy
metadata: {name: strict, namespace: shop}
spec: {targetRefs: [{kind: Namespace, name: shop}], mtls: {mode: strict}}
";

const BAD_ROUTE: &str = "\
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: cart, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: cart, port: 80}]
  rules:
  - matches:
    - path: {type: PathPrefix, value: api}
    backendRefs: [{name: cart, port: 80}]
";

#[test]
fn what_is_applied_is_numbered_shown_and_deleted() {
    let controller = Controller::start();
    let out = controller.apply(&two_nodes(), &[]).good();
    assert!(out.contains("Pod shop/cart created\n"), "{out}");
    assert!(out.ends_with("revision 1\n"), "{out}");

    let again = controller.apply(&two_nodes(), &["-o", "json"]).json();
    assert_eq!(again["revision"], 1);
    let changes = again["changes"].as_array().unwrap();
    assert_eq!(changes.len(), 6);
    assert!(changes.iter().all(|change| change["change"] == "unchanged"), "{again}");

    let out = controller.apply(&service("cart", 81), &[]).good();
    assert_eq!(out, "Service shop/cart changed\nrevision 2\n");

    let table = controller.ctl(&["policy", "get", "svc-typo"]);
    assert_eq!(table.code, 2, "{table:?}");
    let table = controller.ctl(&["policy", "get", "services"]).good();
    assert_eq!(
        table,
        "KIND     NAMESPACE  NAME  GENERATION  REVISION\nService  shop       cart  2           2\n"
    );
    let json = controller
        .ctl(&["policy", "get", "service/cart", "-n", "shop", "-o", "json"])
        .json();
    assert_eq!(
        (json["revision"].as_u64(), json["items"].as_array().unwrap().len()),
        (Some(2), 1)
    );
    assert_eq!(json["items"][0]["spec"]["ports"][0]["port"], 81);
    assert_eq!(
        controller.ctl(&["policy", "get", "service/cart", "-n", "other"]).code,
        1
    );
    assert_eq!(controller.ctl(&["policy", "get", "service", "nope"]).code, 1);

    // What is printed can be applied, and is the same.
    let yaml = controller.ctl(&["policy", "get", "-A", "-o", "yaml"]).good();
    let again = controller.apply(&yaml, &["-o", "json"]).json();
    assert_eq!(again["revision"], 2, "{again}");
    assert_eq!(again["changes"].as_array().unwrap().len(), 6);

    let missing = controller.ctl(&["policy", "delete", "service/nope", "-n", "shop"]);
    assert_eq!(missing.code, 1);
    assert!(missing.err.contains("Service shop/nope is not there"), "{missing:?}");
    let dry = controller
        .ctl(&["policy", "delete", "service", "cart", "-n", "shop", "--dry-run"])
        .good();
    assert_eq!(dry, "Service shop/cart deleted (dry run)\nrevision 2 (dry run)\n");
    let out = controller
        .ctl(&["policy", "delete", "service", "cart", "-n", "shop"])
        .good();
    assert_eq!(out, "Service shop/cart deleted\nrevision 3\n");
    let out = ctl_at(
        &controller.socket(),
        &["policy", "delete", "-f", "-", "--ignore-not-found"],
        &two_nodes(),
    );
    assert!(out.err.contains("warning: Service shop/cart is not there"), "{out:?}");
    assert!(out.good().ends_with("revision 4\n"));
    assert_eq!(
        controller.ctl(&["policy", "get", "-o", "json"]).json()["items"],
        serde_json::json!([])
    );
}

#[test]
fn an_apply_is_all_or_nothing() {
    let controller = Controller::start();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.yaml"), [CLUSTER, "---\n", STRICT].concat()).unwrap();
    std::fs::write(dir.path().join("b.yml"), BAD_ROUTE).unwrap();
    std::fs::write(dir.path().join("notes.txt"), "not: [a document").unwrap();
    let path = dir.path().to_str().unwrap();

    let refused = controller.ctl(&["policy", "apply", "-f", path]);
    assert_eq!(refused.code, 1, "{refused:?}");
    assert_eq!(refused.out, "");
    let line = refused.err.lines().find(|line| line.contains("spec.rules[0]")).unwrap();
    assert!(
        line.contains("b.yml:8: spec.rules[0].matches[0].path.value: ") && line.contains(", expected "),
        "{line}"
    );
    assert_eq!(controller.ctl(&["policy", "get", "-o", "json"]).json()["revision"], 0);

    let good = BAD_ROUTE.replace("value: api", "value: /api");
    std::fs::write(dir.path().join("b.yml"), &good).unwrap();
    let dry = controller
        .ctl(&["policy", "apply", "-f", path, "--dry-run", "-o", "json"])
        .json();
    assert_eq!(
        (dry["revision"].as_u64(), dry["dryRun"].as_bool()),
        (Some(0), Some(true))
    );
    assert_eq!(controller.ctl(&["policy", "get", "-o", "json"]).json()["revision"], 0);
    let done = controller.ctl(&["policy", "apply", "-f", path]);
    assert!(
        done.err.contains("warning: "),
        "the route's service does not exist: {done:?}"
    );
    assert!(done.good().ends_with("revision 1\n"));

    let twice = controller.apply(&[STRICT, "---\n", STRICT].concat(), &[]);
    assert_eq!(twice.code, 1, "{twice:?}");
    assert!(twice.err.contains("MeshPolicy shop/strict"), "{twice:?}");
}

#[test]
fn check_needs_no_controller() {
    let dir = tempfile::tempdir().unwrap();
    let nowhere = dir.path().join("nowhere.sock");
    let good_route = BAD_ROUTE.replace("value: api", "value: /api");
    let cases: [(&str, &[&str], i32, &str); 6] = [
        (STRICT, &[], 0, ""),
        (&good_route, &[], 0, "warning: "),
        (&good_route, &["--strict"], 1, "warning: "),
        (BAD_ROUTE, &[], 1, "<stdin>:8: spec.rules[0].matches[0].path.value: "),
        ("kind: [", &[], 1, "<stdin>:2: "),
        (
            "apiVersion: v1\nkind: Nonsense\nmetadata: {name: x}\n",
            &[],
            1,
            "<stdin>:",
        ),
    ];
    for (yaml, more, code, says) in cases {
        let args = [&["policy", "check", "-f", "-"], more].concat();
        let done = ctl_at(&nowhere, &args, yaml);
        assert_eq!(done.code, code, "{yaml}\n{done:?}");
        assert!(done.err.contains(says), "{yaml}\n{done:?}");
    }
    let report = ctl_at(&nowhere, &["policy", "check", "-f", "-", "-o", "json"], BAD_ROUTE);
    let json: serde_json::Value = serde_json::from_str(&report.out).unwrap();
    assert_eq!((report.code, json["valid"].as_bool()), (1, Some(false)));
}

#[test]
fn exit_codes_are_those_of_the_help() {
    let dir = tempfile::tempdir().unwrap();
    let nowhere = dir.path().join("nowhere.sock");
    let cases: [(&[&str], i32); 9] = [
        (&["status"], 3),
        (&["policy", "get"], 3),
        (&["bundle"], 3),
        (&["policy", "apply"], 2),
        (&["no-such-command"], 2),
        (&["policy", "get", "nonsense"], 2),
        (&["policy", "apply", "-f", "/no/such/file.yaml"], 1),
        (&["version"], 0),
        (&["completions", "bash"], 0),
    ];
    for (args, code) in cases {
        let done = ctl_at(&nowhere, args, "");
        assert_eq!(done.code, code, "{args:?} {done:?}");
    }
    let help = ctl_at(&nowhere, &["--help"], "").good();
    assert!(help.contains("Exit codes:"), "{help}");
    let version = ctl_at(&nowhere, &["version", "-o", "json"], "").json();
    assert_eq!(version["client"], env!("CARGO_PKG_VERSION"));
    assert!(version["controller"].is_null());
}

#[test]
fn only_one_controller_serves_a_directory_and_only_the_owner_may_ask_it() {
    let controller = Controller::start();
    let mode = std::fs::metadata(controller.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    for file in ["data", "data/store.redb"] {
        let mode = std::fs::metadata(controller.dir.path().join(file))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o077, 0, "{file} is open to others");
    }
    let second = controller_command(controller.dir.path(), &[]).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    let says = String::from_utf8(second.stderr).unwrap();
    assert!(says.contains("open in another process"), "{says}");
    controller.ctl(&["status"]).good();

    let (dir, code) = controller.stop();
    assert_eq!(code, 0);
    assert!(!dir.path().join("operator.sock").exists());
    let other = controller_command(dir.path(), &["--trust-domain", "other.local"])
        .output()
        .unwrap();
    assert_eq!(other.status.code(), Some(1));
    assert!(
        String::from_utf8(other.stderr)
            .unwrap()
            .contains("trust domain cluster.local")
    );
}

#[test]
fn applies_that_race_each_get_a_revision_of_their_own() {
    const RACERS: u16 = 8;
    const ROUNDS: u16 = 6;
    let controller = Controller::start();
    let socket = controller.socket();
    let mut revisions = BTreeSet::new();
    std::thread::scope(|scope| {
        let racers: Vec<_> = (0..RACERS)
            .map(|racer| {
                let socket = &socket;
                scope.spawn(move || {
                    let apply = |round: u16| {
                        // Each changes one document of its own and one that all share.
                        let shared = service("shared", 1000 + racer * ROUNDS + round);
                        let yaml = [service(&format!("own-{racer}"), 1 + round), shared].concat();
                        ctl_at(socket, &["policy", "apply", "-f", "-", "-o", "json"], &yaml).json()
                    };
                    (0..ROUNDS)
                        .map(|round| apply(round)["revision"].as_u64().unwrap())
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        for racer in racers {
            let own = racer.join().unwrap();
            assert!(own.is_sorted(), "{own:?}");
            revisions.extend(own);
        }
    });
    let all = u64::from(RACERS * ROUNDS);
    assert_eq!(revisions, (1..=all).collect(), "no revision may be lost or given twice");
    let json = controller.ctl(&["policy", "get", "-o", "json"]).json();
    assert_eq!(json["revision"], all);
    assert_eq!(json["items"].as_array().unwrap().len(), usize::from(RACERS) + 1);
    for item in json["items"].as_array().unwrap() {
        if item["metadata"]["name"] != "shared" {
            assert_eq!(item["spec"]["ports"][0]["port"], ROUNDS, "{item}");
        }
    }
}

#[test]
fn explain_says_what_the_agents_would_do() {
    let controller = Controller::start();
    let policy = "---\napiVersion: nodemesh.io/v1alpha1\nkind: AccessPolicy\nmetadata: {name: readers, namespace: shop}\n\
                  spec: {targetRefs: [{kind: Service, name: cart}], action: Allow, rules: [{from: [{identities: \
                  [\"spiffe://cluster.local/ns/shop/sa/front\"]}], to: [{methods: [GET]}]}]}\n";
    controller.apply(&[&two_nodes(), policy].concat(), &[]).good();
    for (method, verdict) in [("GET", "served"), ("DELETE", "refused")] {
        let args = [
            "policy",
            "explain",
            "--from",
            "shop/front",
            "--to",
            "shop/cart:80",
            "--method",
            method,
            "--path",
            "/items",
            "-o",
            "json",
        ];
        let json = controller.ctl(&args).json();
        assert_eq!(json["verdict"], verdict, "{json:#}");
        assert_eq!(json["revision"], 1);
    }
    let pod = controller.ctl(&["policy", "explain", "--from", "shop/front", "--to", "nowhere:80"]);
    assert_eq!(pod.code, 1, "{pod:?}");
}

#[test]
fn a_large_set_and_a_large_pipe_are_no_trouble() {
    let controller = Controller::start();
    let mut yaml = CLUSTER.to_owned();
    for n in 0..1500u32 {
        yaml += &pod(
            &format!("p{n}"),
            "node-1",
            "many",
            &format!("10.2.{}.{}", n / 250, n % 250 + 1),
        );
    }
    let json = controller.apply(&yaml, &["-o", "json"]).json();
    assert_eq!(json["changes"].as_array().unwrap().len(), 1503);
    // A reader that goes away is not an error of ours.
    let script = format!(
        "{} --socket {} policy get -o yaml | head -1; exit ${{PIPESTATUS[0]}}",
        env!("CARGO_BIN_EXE_mesh-ctl"),
        controller.socket().display()
    );
    let output = std::process::Command::new("bash")
        .args(["-c", &script])
        .output()
        .unwrap();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    let status = controller.ctl(&["status", "-o", "json"]).json();
    assert_eq!(status["controller"]["documents"], 1503);
}
