//! What sources see, and what is recorded, while the network between two nodes misbehaves: the rows of the table in
//! `docs/failures.md`, which is compared with what was seen here. `NODEMESH_GEN=1` writes it anew.
//!
//! The wire of `node-2` is led through `fixtures/netfaults/wire.py`, which loses, delays, repeats and reorders frames by
//! rules that the test changes. Nothing of the agents is replaced; only their patience is shortened where a row would
//! take minutes.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use mesh_tests::{Background, Lab, LabConfig, Place, netns, plan, until};
use serde_json::Value as Json;

/// How long anything may take that happens by itself.
const LIMIT: Duration = Duration::from_secs(60);
const SOURCE: &str = "faults/source";
const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/netfaults");
const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/failures.md");
const BEGIN: &str = "<!-- network faults: generated -->\n";
const END: &str = "<!-- network faults: end -->";
/// Ports of the destination: the same program, once declared as HTTP and once as opaque.
const HTTP: u16 = 8080;
const OPAQUE: u16 = 9090;
/// Fits into one packet of any size, and does not.
const SMALL: &str = "/bytes/10";
const LARGE: &str = "/bytes/100000";
/// What a short outage lasts.
const OUTAGE: Duration = Duration::from_secs(2);
/// The agents' patience where a lost peer is waited for, as `flowPeerPatience` and `peerPatience` say below.
const SHORT: &str = "path: {peerPatience: 4s, flowPeerPatience: 6s}\n";
/// What it may take at the most on a busy machine until a peer is given up: patience, the next look, the next dial.
const GIVEN_UP: Duration = Duration::from_secs(30);

const DOCUMENTS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: faults, labels: {nodemesh.io/mesh: enabled}}
---
apiVersion: nodemesh.io/v1alpha1
kind: MeshPolicy
metadata: {name: strict, namespace: faults}
spec: {targetRefs: [{kind: Namespace, name: faults}], mtls: {mode: strict}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: source, namespace: faults}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: far, namespace: faults}
---
apiVersion: v1
kind: Pod
metadata: {name: source, namespace: faults, labels: {app: source}}
spec:
  nodeName: node-1
  serviceAccountName: source
  containers: [{name: main, command: [sleep, infinity]}]
---
apiVersion: v1
kind: Pod
metadata: {name: far, namespace: faults, labels: {app: far}}
spec:
  nodeName: node-2
  serviceAccountName: far
  containers:
  - name: serve
    command: [PROGRAMS/bench-load, serve, "8080", "9090"]
    readinessProbe: {tcpSocket: {port: 8080}}
---
apiVersion: v1
kind: Service
metadata: {name: far, namespace: faults}
spec:
  selector: {app: far}
  ports: [{name: http, port: 8080}, {name: tcp-opaque, port: 9090}]
"#;

/// One row of the table: what a source sees of each kind of traffic.
struct Row {
    fault: &'static str,
    /// Connections that were open before.
    http_open: String,
    flow_open: String,
    /// Connections that are made meanwhile.
    http_new: String,
    flow_new: String,
    /// Outcomes other than `served` in the source's access log.
    recorded: String,
}

/// A lab whose second node has a wire that can be made bad.
struct Faulty {
    lab: Lab,
    wire: Background,
    rules: PathBuf,
    told: usize,
    /// Records of the source's node before the row.
    before: usize,
    /// Lives as long as the agents that read it.
    _config: tempfile::NamedTempFile,
}

impl Faulty {
    fn up(name: &str, config: &str, seed: &str) -> Result<Faulty> {
        let programs = mesh_tests::mesh::find_programs()?.display().to_string();
        let file = tempfile::NamedTempFile::new()?;
        fs::write(file.path(), config)?;
        let lab = Lab::up(
            LabConfig::test(name)
                .manifest(DOCUMENTS.replace("PROGRAMS", &programs))
                .agent_arg(&format!("--config={}", file.path().display())),
        )?;
        let fabric = plan::fabric_netns(lab.name());
        // The bridge gets another port, and the program passes frames between this one and the node's.
        let lines = [
            "link add wire0 type veth peer name wire1",
            "link set wire1 master br0",
            "link set wire0 up",
            "link set wire1 up",
            "link set node2 nomaster",
        ];
        netns::batch(Some(&fabric), &lines.map(String::from))?;
        let rules = lab.directory().join("rules");
        fs::write(&rules, "{}")?;
        let path = rules.display().to_string();
        let program = format!("{FIXTURES}/wire.py");
        let argv = ["python3", "-u", &program, "wire0", "node2", &path, seed];
        let wire = lab.background_in(Place::Fabric, &argv)?;
        let mut faulty = Faulty {
            lab,
            wire,
            rules,
            told: 0,
            before: 0,
            _config: file,
        };
        faulty.told()?;
        faulty.is_served()?;
        Ok(faulty)
    }

    /// The program's next line.
    fn told(&mut self) -> Result<Json> {
        let line = until("a word of the wire", LIMIT, || {
            ensure!(self.wire.running()?, "the wire: {}", self.wire.stderr());
            Ok(self.wire.stdout().lines().nth(self.told).map(String::from))
        })?;
        self.told += 1;
        serde_json::from_str(&line).with_context(|| line)
    }

    /// Has the wire follow other rules; gives what became of the frames until now.
    fn rule(&mut self, rules: &str) -> Result<Json> {
        let next = self.rules.with_extension("next");
        fs::write(&next, rules)?;
        fs::rename(&next, &self.rules)?;
        let told = self.told()?;
        ensure!(told["rules"].to_string() == serde_json::from_str::<Json>(rules)?.to_string());
        Ok(told["before"].clone())
    }

    /// Begins a row: everything is well, and what is recorded from now on is this row's.
    fn begin(&mut self) -> Result<()> {
        self.is_served()?;
        self.settle()?;
        self.before = self.lab.access_log("node-1")?.len();
        Ok(())
    }

    /// Waits until all that was asked for is in the source's access log.
    fn settle(&self) -> Result<()> {
        until("the end of what was open", LIMIT, || {
            Ok((self.open("node-1")? == 0.0).then_some(()))
        })
    }

    fn open(&self, node: &str) -> Result<f64> {
        Ok(self.lab.metrics(node)?.sum("nodemesh_agent_records_open", &[]))
    }

    /// Asks over connections of their own until both ports answer; gives how long that took.
    fn is_served(&self) -> Result<Duration> {
        let began = Instant::now();
        for port in [HTTP, OPAQUE] {
            until(&format!("service at port {port}"), LIMIT, || {
                let seen = self.once(port)?;
                ensure!(seen == "200", "{seen}");
                Ok(Some(()))
            })?;
        }
        Ok(began.elapsed())
    }

    /// What one request over a new connection sees: a status, or how it failed.
    fn once(&self, port: u16) -> Result<String> {
        let url = format!("http://{}:{port}{SMALL}", self.lab.service_ip("faults/far")?);
        let argv = [
            "curl",
            "-sS",
            "--max-time",
            "45",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            &url,
        ];
        let output = self.lab.exec(SOURCE, &argv)?;
        Ok(match output.code() {
            0 => output.stdout,
            7 => "refused".into(),
            28 => "nothing".into(),
            52 => "end".into(),
            56 => "reset".into(),
            _ => output.stderr,
        })
    }

    fn ask(&self, port: u16, path: &str, pause: &str) -> Result<Asking> {
        let number = self.lab.state()?.counter;
        let stop = self.lab.directory().join(format!("stop-{number}"));
        let (host, port) = (self.lab.service_ip("faults/far")?.to_string(), port.to_string());
        let program = format!("{FIXTURES}/ask.py");
        let argv = [
            "python3",
            "-u",
            &program,
            &host,
            &port,
            path,
            pause,
            &stop.display().to_string(),
        ];
        let program = self.lab.exec_background(SOURCE, &argv)?;
        let asking = Asking { program, stop, from: 0 };
        asking.more(1)?;
        Ok(asking)
    }

    /// Outcomes of this row that are not `served`, as the source's agent recorded them.
    fn recorded(&self) -> Result<String> {
        self.settle()?;
        let records = self.lab.access_log("node-1")?;
        let names = records.iter().skip(self.before).filter_map(|record| {
            let name = record.get("nodemesh.refusal").unwrap_or(&record["nodemesh.outcome"]);
            name.as_str()
                .filter(|name| *name != "served")
                .map(|name| format!("`{name}`"))
        });
        Ok(words(names.collect()))
    }

    fn down(self) -> Result<()> {
        self.lab.down()
    }
}

/// Requests over one connection that go on beside the test.
struct Asking {
    program: Background,
    stop: PathBuf,
    /// Lines that were there before the fault.
    from: usize,
}

impl Asking {
    fn lines(&self) -> Vec<String> {
        self.program
            .stdout()
            .lines()
            .skip(self.from)
            .map(String::from)
            .collect()
    }

    /// From now on only what comes counts.
    fn mark(&mut self) {
        self.from += self.lines().len();
    }

    /// Waits for so many more answers.
    fn more(&self, count: usize) -> Result<()> {
        let wanted = self.lines().len() + count;
        until("answers", LIMIT, || {
            ensure!(
                self.lines().len() >= wanted,
                "{:?}, {}",
                self.lines(),
                self.program.stderr()
            );
            Ok(Some(()))
        })
    }

    /// What the source saw since the mark: everything but whole answers, or `served`.
    fn seen(&self) -> String {
        let failures: BTreeSet<String> = self
            .lines()
            .iter()
            .filter_map(|line| line.split(' ').next())
            .filter(|word| *word != "200")
            .map(String::from)
            .collect();
        match failures.is_empty() {
            true => "served".into(),
            false => words(failures),
        }
    }

    /// The longest that anything took since the mark.
    fn slowest(&self) -> Duration {
        let times = self
            .lines()
            .into_iter()
            .filter_map(|line| line.split(' ').nth(1)?.parse().ok());
        Duration::from_secs_f64(times.fold(0.0, f64::max))
    }

    fn end(self) -> Result<()> {
        fs::write(&self.stop, "")?;
        self.program.wait(LIMIT)?.ok().map(drop)
    }
}

fn words(all: BTreeSet<String>) -> String {
    match all.is_empty() {
        true => "–".into(),
        false => all.into_iter().collect::<Vec<_>>().join(", "),
    }
}

/// Faults that cost time and nothing else.
fn mild(faulty: &mut Faulty) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (fault, rules, effect) in [
        ("5 % of the packets are lost", r#"{"loss": 0.05}"#, "lost"),
        (
            "packets take 50 to 90 ms longer",
            r#"{"delay": 0.05, "jitter": 0.04}"#,
            "delayed",
        ),
        (
            "a quarter of the packets is overtaken",
            r#"{"reorder": 0.25}"#,
            "reordered",
        ),
        (
            "a fifth of the packets arrives twice",
            r#"{"duplicate": 0.2}"#,
            "duplicated",
        ),
    ] {
        faulty.begin()?;
        let mut asking = [HTTP, OPAQUE].map(|port| faulty.ask(port, LARGE, "0.02"));
        faulty.rule(rules)?;
        let mut seen = Vec::new();
        for asking in &mut asking {
            let asking = asking.as_mut().map_err(|error| anyhow!("{error:#}"))?;
            asking.mark();
            asking.more(10)?;
            println!("{fault}: {} us at the most", asking.slowest().as_micros());
            seen.push(asking.seen());
        }
        let new = [faulty.once(HTTP)?, faulty.once(OPAQUE)?].map(served);
        let frames = faulty.rule("{}")?;
        ensure!(frames[effect].as_u64() > Some(0), "{fault}: {frames}");
        println!("{fault}: {frames}");
        for asking in asking {
            asking?.end()?;
        }
        rows.push(row(fault, seen, new, faulty.recorded()?));
    }
    Ok(rows)
}

fn served(status: String) -> String {
    if status == "200" { "served".into() } else { status }
}

fn row(fault: &'static str, open: Vec<String>, new: [String; 2], recorded: String) -> Row {
    let [http_new, flow_new] = new;
    let mut open = open.into_iter();
    Row {
        fault,
        http_open: open.next().unwrap_or_default(),
        flow_open: open.next().unwrap_or_default(),
        http_new,
        flow_new,
        recorded,
    }
}

/// An outage that ends before anybody's patience does.
fn short_outage(faulty: &mut Faulty) -> Result<Row> {
    const FAULT: &str = "nothing passes for 2 s";
    faulty.begin()?;
    let mut http = faulty.ask(HTTP, SMALL, "0.02")?;
    let mut flow = faulty.ask(OPAQUE, SMALL, "0.02")?;
    faulty.rule(r#"{"cut": true}"#)?;
    http.mark();
    flow.mark();
    let began = Instant::now();
    let mut new = [faulty.ask_once(HTTP)?, faulty.ask_once(OPAQUE)?];
    until("the outage's end", LIMIT, || {
        Ok((began.elapsed() >= OUTAGE).then_some(()))
    })?;
    for new in &mut new {
        ensure!(
            new.running()?,
            "it was served through a wire that was cut: {}",
            new.stdout()
        );
    }
    faulty.rule("{}")?;
    http.more(3)?;
    flow.more(3)?;
    let waited = |asking: &Asking| match asking.slowest() + Duration::from_millis(500) >= OUTAGE {
        true => format!("waits, then {}", asking.seen()),
        false => asking.seen(),
    };
    let seen = vec![waited(&http), waited(&flow)];
    println!("{FAULT}: {:?} and {:?} at the most", http.slowest(), flow.slowest());
    let mut answers = Vec::new();
    for new in new {
        let output = new.wait(LIMIT)?;
        answers.push(format!("waits, then {}", served(output.stdout)));
    }
    let answers = <[String; 2]>::try_from(answers).map_err(|_| anyhow!("two connections"))?;
    http.end()?;
    flow.end()?;
    Ok(row(FAULT, seen, answers, faulty.recorded()?))
}

impl Faulty {
    /// The same as `once`, beside the test.
    fn ask_once(&self, port: u16) -> Result<Background> {
        let url = format!("http://{}:{port}{SMALL}", self.lab.service_ip("faults/far")?);
        let argv = [
            "curl",
            "-sS",
            "--max-time",
            "45",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            &url,
        ];
        self.lab.exec_background(SOURCE, &argv)
    }
}

/// An outage that outlives the agents' patience; both sides must let go of what they held.
fn long_outage(faulty: &mut Faulty) -> Result<Row> {
    const FAULT: &str = "nothing passes, for longer than the agents' patience";
    faulty.begin()?;
    let mut http = faulty.ask(HTTP, SMALL, "0.02")?;
    let mut flow = faulty.ask(OPAQUE, SMALL, "0.02")?;
    // Nothing is on its way over this one.
    let mut idle = faulty.ask(OPAQUE, SMALL, "3600")?;
    faulty.rule(r#"{"cut": true}"#)?;
    http.mark();
    flow.mark();
    idle.mark();
    let began = Instant::now();
    let new = [faulty.once(HTTP)?, faulty.once(OPAQUE)?];
    http.more(1)?;
    flow.more(1)?;
    idle.more(1)?;
    println!(
        "{FAULT}: {:?}, {:?}, idle {:?}",
        http.lines(),
        flow.lines(),
        idle.lines()
    );
    ensure!(http.slowest() < GIVEN_UP && flow.slowest() < GIVEN_UP);
    // The destination's agent gives up as well, and its applications are told.
    until("the destination's agent to let go", GIVEN_UP * 2, || {
        let open = faulty.open("node-2")?;
        ensure!(open == 0.0, "{open} are open");
        Ok(Some(()))
    })?;
    println!(
        "{FAULT}: nothing is open at the destination after {:?}",
        began.elapsed()
    );
    ensure!(
        idle.seen() == flow.seen(),
        "an idle flow ends as a busy one: {}",
        idle.seen()
    );
    let seen = vec![http.seen(), flow.seen()];
    faulty.rule("{}")?;
    println!("{FAULT}: served {:?} after it", faulty.is_served()?);
    http.end()?;
    flow.end()?;
    idle.end()?;
    Ok(row(FAULT, seen, new, faulty.recorded()?))
}

#[test]
fn what_sources_see_of_network_faults_is_what_is_documented() -> Result<()> {
    let waiting = thread::spawn(|| -> Result<Vec<Row>> {
        let mut faulty = Faulty::up("dmild", "", "7")?;
        let mut rows = mild(&mut faulty)?;
        rows.push(short_outage(&mut faulty)?);
        faulty.down()?;
        Ok(rows)
    });
    let mut rows = Vec::new();
    let mut faulty = Faulty::up("doutage", SHORT, "8")?;
    rows.push(long_outage(&mut faulty)?);
    faulty.down()?;
    let mut all = waiting.join().map_err(|_| anyhow!("a thread panicked"))??;
    all.append(&mut rows);
    compare(&all)
}

fn compare(rows: &[Row]) -> Result<()> {
    let mut table = String::from(
        "\n| on the wire between two nodes | HTTP: open connections | opaque: open flows | HTTP: new connections | \
         opaque: new flows | recorded at the source |\n|---|---|---|---|---|---|\n",
    );
    for row in rows {
        table += &format!(
            "| {} | {} | {} | {} | {} | {} |\n",
            row.fault, row.http_open, row.flow_open, row.http_new, row.flow_new, row.recorded
        );
    }
    println!("{table}");
    let path = Path::new(DOCUMENT);
    let page = fs::read_to_string(path)?;
    let from = page.find(BEGIN).context("the table's mark in docs/failures.md")? + BEGIN.len();
    let to = page.find(END).context("the table's end in docs/failures.md")?;
    if std::env::var_os("NODEMESH_GEN").is_some() {
        fs::write(path, [&page[..from], &table, &page[to..]].concat())?;
        return Ok(());
    }
    ensure!(
        page[from..to] == table,
        "docs/failures.md says something else; if it is wrong, run this test with NODEMESH_GEN=1:\n{table}"
    );
    Ok(())
}
