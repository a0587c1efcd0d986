//! `kill -9` at any moment: what was acknowledged is there, and nothing is half there.

use std::{
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::world::{Controller, ctl_at, program, service};

/// Deaths in one run.
const ROUNDS: u64 = 12;

#[test]
fn every_acknowledged_revision_survives_kill_9() {
    let mut controller = Controller::start();
    let mut acknowledged = 0u64;
    let mut attempted = 0u64;
    // Any spread will do; the moments differ from run to run by themselves.
    let mut moment = u64::from(std::process::id());
    for round in 0..ROUNDS {
        moment = moment
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let life = Duration::from_millis(20 + (moment >> 33) % 150);
        let socket = controller.socket();
        let pid = controller.pid();
        let began = Instant::now();
        let killed = Arc::new(AtomicU64::new(0));
        std::thread::scope(|scope| {
            let killed = killed.clone();
            scope.spawn(move || {
                // The one place where time itself is under test.
                while began.elapsed() < life {
                    std::thread::yield_now();
                }
                killed.store(1, Ordering::SeqCst);
                let status = Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
                assert!(status.success());
            });
            loop {
                let n = attempted + 1;
                // Two documents that always say the same number: a half apply would tear them apart.
                let port = (n % 60_000) as u16 + 1;
                let yaml = [service("left", port), service("right", port)].concat();
                let done = ctl_at(&socket, &["policy", "apply", "-f", "-", "-o", "json"], &yaml);
                if done.code != 0 {
                    assert_eq!(done.code, 3, "only its death may fail an apply: {done:?}");
                    attempted = n;
                    break;
                }
                let json: serde_json::Value = serde_json::from_str(&done.out).unwrap();
                acknowledged = json["revision"].as_u64().unwrap();
                attempted = n;
            }
        });
        assert_eq!(
            killed.load(Ordering::SeqCst),
            1,
            "the controller died by itself in round {round}"
        );
        let dir = controller.kill();
        controller = Controller::start_in(dir, &[]);
        let json = controller.ctl(&["policy", "get", "-o", "json"]).json();
        let revision = json["revision"].as_u64().unwrap();
        assert!(
            revision == acknowledged || revision == acknowledged + 1,
            "round {round}: {acknowledged} was acknowledged, {revision} is there"
        );
        if revision > 0 {
            let items = json["items"].as_array().unwrap();
            let ports: Vec<_> = items
                .iter()
                .map(|item| item["spec"]["ports"][0]["port"].as_u64().unwrap())
                .collect();
            assert_eq!(
                (ports.len(), ports.first()),
                (2, ports.last()),
                "round {round}: {json:#}"
            );
            let generations: Vec<_> = items.iter().map(|item| &item["metadata"]["generation"]).collect();
            assert_eq!(generations.first(), generations.last());
        }
        acknowledged = revision;
    }
    assert!(
        acknowledged > ROUNDS,
        "too few applies to prove anything: {acknowledged}"
    );
}

#[test]
fn the_root_and_the_tokens_survive_kill_9() {
    let controller = Controller::start();
    let bundle = controller.ctl(&["bundle"]).good();
    let token = controller.token("node-1");
    let controller = Controller::start_in(controller.kill(), &[]);
    assert_eq!(controller.ctl(&["bundle"]).good(), bundle);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime
        .block_on(crate::world::bootstrap(&controller, "node-1", &token))
        .unwrap();
}

#[test]
fn a_store_that_is_no_store_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("data")).unwrap();
    let file = dir.path().join("data/store.redb");
    std::fs::write(&file, "somebody's other file").unwrap();
    let output = program()
        .args(["controller", "--standalone", "--listen", "127.0.0.1:0", "--data-dir"])
        .arg(dir.path().join("data"))
        .arg("--operator-socket")
        .arg(dir.path().join("s.sock"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "somebody's other file");
}
