//! `cargo xtask demo`: the main job of the mesh before the user's eyes, on a lab of two nodes with a small shop.
//!
//! Each step says in plain words what it does, does it with real programs, and compares what the programs saw with what
//! the mesh says. The closing table holds figures of this very run. Nothing stays behind unless `--keep` is given.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use mesh_tests::{Lab, LabConfig, Metrics, Packets, Place, probe, until};
use serde_json::Value;

use crate::{build, setup, shell};

/// How to show it.
#[derive(Debug, Args)]
pub struct Options {
    /// Leaves the lab running and says what to try next.
    #[arg(long)]
    keep: bool,
    /// Builds without optimizations (for those who work on the demo).
    #[arg(long)]
    debug: bool,
    /// The lab's name.
    #[arg(long, default_value = "demo")]
    name: String,
}

/// Words that are sent and must not be seen between the nodes.
const SECRET: &str = "a-secret-that-nobody-may-read-on-the-wire";
/// Words that are sent in the clear, to show that the capture would see them.
const CONTROL: &str = "these-words-are-sent-in-the-clear";
/// The port of the shop's HTTP services on their pods.
const HTTP_PORT: u16 = 8080;
/// The bank's port.
const BANK_PORT: u16 = 6379;
/// How long a background load may take beyond its time.
const LOAD_LIMIT: Duration = Duration::from_secs(30);

/// Two servers of the load generator itself: one in the mesh, one outside, to compare what a request costs.
const ECHO: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: echo, namespace: shop, labels: {app: echo}}
spec:
  nodeName: node-2
  containers:
  - name: echo
    command: [sh, -c, 'exec "$NODEMESH_PROGRAMS/lab-load" serve 8080 echo']
    ports: [{name: http, containerPort: 8080}]
    readinessProbe: {tcpSocket: {port: 8080}}
---
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: shop}
spec: {selector: {app: echo}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: echo, namespace: outside, labels: {app: echo}}
spec:
  nodeName: node-2
  containers:
  - name: echo
    command: [sh, -c, 'exec "$NODEMESH_PROGRAMS/lab-load" serve 8080 echo']
    readinessProbe: {tcpSocket: {port: 8080}}
"#;

/// The verb.
pub fn run(options: &Options) -> Result<ExitCode> {
    let started = Instant::now();
    if std::env::var_os("NODEMESH_PROGRAMS").is_none() {
        shell::require_sudo().context("the demo needs root: it makes network namespaces and loads eBPF programs")?;
        println!("Nodemesh demo. First: what this machine lacks, then a build.");
        setup::ensure_all()?;
        let programs = build::programs(&build::Options {
            release: !options.debug,
        })?;
        println!("ready to start after {}\n", shell::time(started.elapsed()));
        let code = crate::lab::with_programs(&programs)?;
        println!("From nothing to the end: {}", shell::time(started.elapsed()));
        return Ok(code);
    }
    if let Some(code) = shell::again_as_root()? {
        return Ok(code);
    }
    setup::check_kernel()?;
    mesh_tests::lab::replace(&options.name)?;
    let mut demo = Demo::start(&options.name)?;
    let shown = demo.show();
    demo.table();
    if let Err(error) = &shown {
        println!("\nThe demo stopped: {error:#}");
    }
    let good = shown.is_ok() && demo.facts.iter().all(|fact| fact.good);
    demo.end(options.keep, good)?;
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A line of the closing table.
struct Fact {
    claim: &'static str,
    figure: String,
    good: bool,
}

struct Demo {
    lab: Lab,
    facts: Vec<Fact>,
    step: usize,
    load: String,
}

fn fixture(name: &str) -> PathBuf {
    shell::root().join("tests/fixtures").join(name)
}

impl Demo {
    fn start(name: &str) -> Result<Demo> {
        println!(
            "1. Two nodes, a controller, and a shop of ordinary programs: python, nginx, redis. None of them knows of a mesh."
        );
        let started = Instant::now();
        let mut config = LabConfig::new(name).file(fixture("shop")).manifest(ECHO);
        config.progress = |step| println!("   … {step}");
        let lab = Lab::up(config)?;
        let state = lab.state()?;
        let enrolled = state.pods.iter().filter(|pod| pod.enrolled).count();
        let took = started.elapsed();
        for line in lab.ctl(&["status"])?.ok()?.lines() {
            println!("   {line}");
        }
        let load = state.programs.join("lab-load").display().to_string();
        let mut demo = Demo {
            lab,
            facts: Vec::new(),
            step: 1,
            load,
        };
        demo.fact(
            "pods captured without a restart, a sidecar or iptables",
            format!("{enrolled} of {} pods, up in {}", state.pods.len(), shell::time(took)),
            enrolled > 0,
        );
        Ok(demo)
    }

    fn show(&mut self) -> Result<()> {
        self.works()?;
        self.encrypted()?;
        self.strict()?;
        self.routed()?;
        self.limited()?;
        self.broken()?;
        self.permitted()?;
        self.alone()?;
        self.measured()
    }

    fn step(&mut self, words: &str) {
        self.step += 1;
        println!("\n{}. {words}", self.step);
    }

    fn fact(&mut self, claim: &'static str, figure: String, good: bool) {
        println!("   {} {claim}: {figure}", if good { "✓" } else { "✗" });
        self.facts.push(Fact { claim, figure, good });
    }

    fn apply(&self, name: &str) -> Result<()> {
        let file = fixture("demo").join(name).display().to_string();
        let said = self.lab.ctl(&["policy", "apply", "-f", &file, "--wait"])?.ok()?;
        for line in said.lines() {
            println!("   mesh-ctl: {line}");
        }
        Ok(())
    }

    fn curl(&self, pod: &str, words: &[&str]) -> Result<(i32, String)> {
        let mut argv = vec!["curl", "-sS", "--max-time", "5"];
        argv.extend(words);
        let output = self.lab.exec(pod, &argv)?;
        Ok((output.code(), output.stdout))
    }

    fn status(&self, pod: &str, words: &[&str]) -> Result<String> {
        let mut all = vec!["-o", "/dev/null", "-w", "%{http_code}"];
        all.extend(words);
        Ok(self.curl(pod, &all)?.1)
    }

    fn run_load(&self, pod: &str, words: &[&str]) -> Result<Value> {
        let mut argv = vec![self.load.as_str()];
        argv.extend(words);
        let said = self.lab.exec(pod, &argv)?.ok()?;
        serde_json::from_str(&said).with_context(|| format!("lab-load said {said}"))
    }

    /// What all agents together count.
    fn counted(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        let nodes = self.lab.state()?.nodes;
        let scrapes: Vec<Metrics> = nodes
            .iter()
            .map(|node| self.lab.metrics(&node.name))
            .collect::<Result<_>>()?;
        Ok(scrapes.iter().map(|scrape| scrape.sum(name, labels)).sum())
    }

    fn works(&mut self) -> Result<()> {
        self.step("The programs talk as before: HTTP, redis, IPv4 and IPv6, by service and by pod address.");
        let (_, page) = self.curl("shop/visitor", &["http://front/"])?;
        println!("   the front answers: {}", page.trim().replace('\n', " + "));
        let v6 = self.status("shop/visitor", &["-6", "http://cart/"])?;
        let direct = self.status(
            "shop/visitor",
            &[&format!("http://{}:{HTTP_PORT}/", self.lab.pod_ip("shop/cart-v1")?)],
        )?;
        let bank = self.lab.shell(
            "shop/visitor",
            "redis-cli -h bank set account 42 && redis-cli -h bank get account",
        )?;
        let good = page.contains("catalog") && page.contains("cart-") && v6 == "200" && direct == "200";
        self.fact(
            "unmodified programs work",
            format!(
                "front+catalog+cart, IPv6 {v6}, pod address {direct}, redis {}",
                bank.trim().replace('\n', " ")
            ),
            good && bank.contains("42"),
        );
        let (_, seen) = self.curl("shop/visitor", &["http://cart/address"])?;
        let own = self.lab.pod("shop/visitor")?.addresses.map(|ip| ip.to_string());
        self.fact(
            "the application sees the true source address",
            format!(
                "visitor is {}, nginx saw {} and its port",
                own.join(" and "),
                seen.trim()
            ),
            own.iter().any(|ip| seen.starts_with(&format!("{ip} "))),
        );
        Ok(())
    }

    fn encrypted(&mut self) -> Result<()> {
        self.step("Everything between the nodes is recorded while a secret is sent: by HTTP and by redis.");
        let capture = self.lab.capture("tcp")?;
        let control = format!("http://{}:{HTTP_PORT}/?{CONTROL}", self.lab.pod_ip("outside/echo")?);
        self.curl("outside/stranger", &[&control])?;
        for _ in 0..20 {
            self.curl("shop/visitor", &["-d", SECRET, "http://cart/"])?;
        }
        self.lab.shell(
            "shop/visitor",
            &format!("redis-cli -h bank set word {SECRET} && redis-cli -h bank get word"),
        )?;
        let packets = Packets::parse(capture.stop()?)?;
        let (secret, control) = (packets.count(SECRET), packets.count(CONTROL));
        let handshakes = packets.tls13_handshakes(HTTP_PORT) + packets.tls13_handshakes(BANK_PORT);
        let bytes = packets.payload_bytes(HTTP_PORT) + packets.payload_bytes(BANK_PORT);
        self.fact(
            "no plaintext between the nodes",
            format!(
                "{bytes} bytes recorded, the secret seen {secret} times (a word sent outside of the mesh: {control})"
            ),
            secret == 0 && control > 0,
        );
        self.fact(
            "TLS 1.3 on the original ports",
            format!("{handshakes} handshakes on {HTTP_PORT} and {BANK_PORT}"),
            handshakes > 0 && packets.tls13_handshakes(BANK_PORT) > 0,
        );
        Ok(())
    }

    fn strict(&mut self) -> Result<()> {
        self.step("A stranger without an identity: served while the mesh is permissive, refused once it is strict.");
        let target = format!("http://{}:{HTTP_PORT}/", self.lab.pod_ip("shop/cart-v1")?);
        let before = self.status("outside/stranger", &[&target])?;
        self.apply("strict.yaml")?;
        let (code, _) = self.curl("outside/stranger", &[&target])?;
        let inside = self.status("shop/visitor", &[&target])?;
        self.fact(
            "strict mTLS refuses a stranger and serves the mesh",
            format!("stranger {before} before, curl exit {code} after; visitor {inside}"),
            before == "200" && code != 0 && inside == "200",
        );
        let node = self.lab.site(Place::Node("node-2"))?;
        let address = self.lab.pod_ip("shop/cart-v1")?;
        let probed = probe::http(&node, address, HTTP_PORT, "/healthz", Duration::from_secs(2));
        self.fact(
            "the node's own probes go on under strict mTLS",
            probed
                .as_ref()
                .map_or_else(|error| format!("{error:#}"), |_| "200".into()),
            probed.is_ok(),
        );
        Ok(())
    }

    fn routed(&mut self) -> Result<()> {
        self.step("A canary: a fifth of the cart's requests go to version 2, testers always get it.");
        self.apply("canary.yaml")?;
        let result = self.run_load(
            "shop/visitor",
            &[
                "http",
                "http://cart/",
                "--requests",
                "1000",
                "--seconds",
                "30",
                "--connections",
                "4",
            ],
        )?;
        let second = result["servers"]["cart-v2"].as_f64().unwrap_or(0.0);
        let share = second / result["answered"].as_f64().unwrap_or(1.0) * 100.0;
        let testers = self.run_load(
            "shop/visitor",
            &[
                "http",
                "http://cart/",
                "--requests",
                "100",
                "--seconds",
                "30",
                "--header",
                "x-tester: yes",
            ],
        )?;
        let testers = testers["servers"]["cart-v2"].as_u64().unwrap_or(0);
        self.fact(
            "weights hold (80 to 20)",
            format!("{share:.1} % of {} requests to version 2", result["answered"]),
            (15.0..25.0).contains(&share),
        );
        self.fact(
            "a header decides exactly",
            format!("{testers} of 100 tester requests to version 2"),
            testers == 100,
        );

        println!("   now version 2 for everybody, under a constant load of 500 requests a second");
        let words = [
            self.load.as_str(),
            "http",
            "http://cart/",
            "--rate",
            "500",
            "--connections",
            "8",
            "--seconds",
            "4",
        ];
        let load = self.lab.exec_background("shop/visitor", &words)?;
        self.apply("rollout.yaml")?;
        let said = load.wait(LOAD_LIMIT)?.ok()?;
        let result: Value = serde_json::from_str(&said)?;
        let (sent, good) = (&result["requests"], &result["statuses"]["200"]);
        let after = self.run_load(
            "shop/visitor",
            &["http", "http://cart/", "--requests", "100", "--seconds", "30"],
        )?;
        self.fact(
            "policy changes under load without a failed request",
            format!(
                "{good} of {sent} answered 200; then {} of 100 to version 2",
                after["servers"]["cart-v2"]
            ),
            sent == good && after["servers"]["cart-v2"] == 100,
        );
        Ok(())
    }

    fn limited(&mut self) -> Result<()> {
        self.step(
            "A rate limit: 50 requests a second for each identity, bursts of 20. The visitor sends 200 a second.",
        );
        self.apply("limit.yaml")?;
        let labels = [
            ("destination_workload", "catalog"),
            ("reporter", "destination"),
            ("response_code", "429"),
        ];
        let before = self.counted("mesh_requests_total", &labels)?;
        let result = self.run_load(
            "shop/visitor",
            &[
                "http",
                "http://catalog/",
                "--rate",
                "200",
                "--connections",
                "8",
                "--seconds",
                "3",
            ],
        )?;
        let after = self.counted("mesh_requests_total", &labels)?;
        let count = |status: &str| result["statuses"][status].as_u64().unwrap_or(0);
        let (served, refused) = (count("200"), count("429"));
        let (_, head) = self.curl("shop/visitor", &["-o", "/dev/null", "-D", "-", "http://catalog/"])?;
        if let Some(line) = head
            .lines()
            .find(|line| line.to_ascii_lowercase().starts_with("retry-after"))
        {
            println!("   the answer says {line}");
        }
        self.fact(
            "the rate limit holds",
            format!("{served} served, {refused} answered 429 in 3 s (50 per second + 20 allow 170)"),
            (150..=185).contains(&served) && refused > 300,
        );
        self.fact(
            "metrics agree with the client's count",
            format!("client saw {refused} × 429, agents counted {}", after - before),
            (after - before - refused as f64).abs() < 0.5,
        );
        Ok(())
    }

    fn broken(&mut self) -> Result<()> {
        self.step("A circuit breaker: the stock breaks; after five failures it is left alone, and tried again two seconds later.");
        self.apply("breaker.yaml")?;
        let stock = self.lab.pod_ip("shop/stock")?;
        let node = self.lab.site(Place::Node("node-2"))?;
        let ask = |path: &str| probe::http(&node, stock, HTTP_PORT, path, Duration::from_secs(2));
        let served = || -> Result<u64> { Ok(ask("/served")?.trim().parse()?) };
        ask("/break")?;
        let before = served()?;
        let result = self.run_load(
            "shop/visitor",
            &["http", "http://stock/", "--requests", "200", "--seconds", "1"],
        )?;
        let reached = served()? - before;
        let refused = result["statuses"]["503"].as_u64().unwrap_or(0);
        ask("/mend")?;
        let mended = Instant::now();
        until("recovery of the stock", Duration::from_secs(10), || {
            Ok((self.status("shop/visitor", &["http://stock/"])? == "200").then_some(()))
        })?;
        self.fact(
            "the breaker opens",
            format!(
                "of {} requests {reached} reached the broken pod, {refused} were answered 503 at once",
                result["answered"]
            ),
            reached <= 8 && refused > 100,
        );
        self.fact(
            "and closes by itself",
            format!("served again {} after it was mended", shell::time(mended.elapsed())),
            true,
        );
        Ok(())
    }

    fn permitted(&mut self) -> Result<()> {
        self.step("Access by identity: only the front may read the cart and use the bank.");
        self.apply("access.yaml")?;
        let front = self.status("shop/front", &["http://cart/"])?;
        let write = self.status("shop/front", &["-d", "x", "http://cart/"])?;
        let visitor = self.status("shop/visitor", &["http://cart/"])?;
        let bank = self.lab.exec("shop/front", &["redis-cli", "-h", "bank", "ping"])?;
        let refused = self.lab.exec("shop/visitor", &["redis-cli", "-h", "bank", "ping"])?;
        let refused_words = format!("{}{}", refused.stdout, refused.stderr);
        self.fact(
            "permissions by identity and method",
            format!("front GET {front}, front POST {write}, visitor GET {visitor}"),
            front == "200" && write == "403" && visitor == "403",
        );
        self.fact(
            "and for protocols that are not HTTP",
            format!("front: {}, visitor: {}", bank.stdout.trim(), refused_words.trim()),
            bank.stdout.contains("PONG") && !refused.stdout.contains("PONG"),
        );
        Ok(())
    }

    fn alone(&mut self) -> Result<()> {
        self.step("The controller is killed. Traffic and guards go on as they are.");
        self.lab.kill_controller()?;
        let result = self.run_load(
            "shop/front",
            &["http", "http://cart/", "--requests", "500", "--seconds", "30"],
        )?;
        let refused = self.status("shop/visitor", &["http://cart/"])?;
        self.lab.start_controller()?;
        self.fact(
            "the mesh serves without its controller",
            format!(
                "{} of {} requests answered 200, the visitor still {refused}",
                result["statuses"]["200"], result["requests"]
            ),
            result["statuses"]["200"] == result["requests"] && refused == "403",
        );
        Ok(())
    }

    fn measured(&mut self) -> Result<()> {
        self.step(
            "What it costs: the same program over the same wire, without and with the mesh, 1000 requests a second.",
        );
        let direct = format!("http://{}:{HTTP_PORT}/", self.lab.pod_ip("outside/echo")?);
        let options = ["--rate", "1000", "--connections", "8", "--seconds", "3"];
        let ask = |pod: &str, url: &str| {
            let mut words = vec!["http", url];
            words.extend(options);
            self.run_load(pod, &words)
        };
        let bare = ask("outside/stranger", &direct)?;
        let meshed = ask("shop/visitor", "http://echo/")?;
        let milliseconds = |result: &Value, key: &str| result[key].as_f64().unwrap_or(0.0) / 1000.0;
        ensure!(
            meshed["answered"].as_u64() > Some(0),
            "no answer through the mesh: {meshed}"
        );
        let figure = format!(
            "p50 {:.2} ms direct, {:.2} ms in the mesh; p99 {:.2} and {:.2} ms",
            milliseconds(&bare, "p50_us"),
            milliseconds(&meshed, "p50_us"),
            milliseconds(&bare, "p99_us"),
            milliseconds(&meshed, "p99_us")
        );
        self.fact("latency across nodes, mTLS and L7 policy included", figure, true);
        let nodes = self.lab.state()?.nodes;
        let mut memory = Vec::new();
        for node in &nodes {
            for pid in self.lab.agent_pids(&node.name)? {
                memory.push(format!(
                    "{:.0} MiB",
                    crate::bench::resident_bytes(pid)? as f64 / 1048576.0
                ));
            }
        }
        let total = self.counted("mesh_requests_total", &[("reporter", "destination")])?;
        self.fact(
            "one agent per node, memory now",
            format!("{} after {total} requests", memory.join(" and ")),
            !memory.is_empty(),
        );
        Ok(())
    }

    fn table(&self) {
        let width = self
            .facts
            .iter()
            .map(|fact| fact.claim.chars().count())
            .max()
            .unwrap_or(0);
        println!("\nWhat was shown");
        for fact in &self.facts {
            let mark = if fact.good { "✓" } else { "✗" };
            println!("  {mark} {:<width$}  {}", fact.claim, fact.figure);
        }
    }

    fn end(self, keep: bool, good: bool) -> Result<()> {
        if !good {
            for node in self.lab.state()?.nodes {
                println!("\n--- the end of the log of the agent on {}", node.name);
                println!(
                    "{}",
                    mesh_tests::mesh::tail(&mesh_tests::mesh::agent_log(self.lab.name(), &node.name))
                );
            }
        }
        if !keep {
            self.lab.down()?;
            println!("\nThe lab is gone; nothing stays behind.");
            return Ok(());
        }
        let name = self.lab.name().to_string();
        self.lab.keep()?;
        println!(
            "\nThe lab goes on. Try:\n\
             \x20 cargo xtask lab status --name {name}\n\
             \x20 cargo xtask lab exec --name {name} shop/front -- curl -si http://cart/\n\
             \x20 cargo xtask lab exec --name {name} shop/visitor -- curl -si http://cart/\n\
             \x20 cargo xtask lab ctl --name {name} policy get\n\
             \x20 cargo xtask lab exec --name {name} --node node-1 -- curl -s http://127.0.0.1:15020/metrics\n\
             \x20 cargo xtask lab logs --name {name} node-1\n\
             \x20 cargo xtask lab down --name {name}"
        );
        Ok(())
    }
}
