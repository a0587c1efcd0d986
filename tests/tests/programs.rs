//! Unmodified programs work through the mesh: every program, on the same node and across nodes, by service and by pod
//! address, over IPv4 and IPv6. The matrix is generated, and what it covered is printed.

use std::{net::IpAddr, path::Path};

use anyhow::{Context, Result, ensure};
use mesh_tests::{Lab, LabConfig};

const GRPC_CLIENT: &str = include_str!("../fixtures/clients/grpc_client.py");
const WEBSOCKET_CLIENT: &str = include_str!("../fixtures/clients/websocket_client.py");
const SOURCE: &str = "zoo/source";

/// Where the destination is and how the source names it.
#[derive(Clone, Copy, Debug)]
struct Situation {
    place: &'static str,
    by_service: bool,
    ipv6: bool,
}

impl Situation {
    fn all() -> Vec<Situation> {
        let mut all = Vec::new();
        for place in ["near", "far"] {
            for by_service in [true, false] {
                for ipv6 in [false, true] {
                    all.push(Situation {
                        place,
                        by_service,
                        ipv6,
                    });
                }
            }
        }
        all
    }

    fn address(&self, lab: &Lab) -> Result<IpAddr> {
        let name = format!("zoo/{}", self.place);
        let state = lab.state()?;
        let addresses = match self.by_service {
            true => state.service(&name)?.addresses.clone(),
            false => state.pod(&name)?.addresses.to_vec(),
        };
        addresses
            .into_iter()
            .find(|ip| ip.is_ipv6() == self.ipv6)
            .context("no address of the family")
    }
}

/// A program and how its client proves that it works; the address is given bare and as in a URL.
type Check = fn(&Lab, &str, &str) -> Result<()>;

const PROGRAMS: &[(&str, Check)] = &[
    ("curl to python3 http.server", |lab, _, url| {
        let page = curl(lab, &[&format!("http://{url}:8001/")])?;
        ensure!(page.contains("Directory listing"), "{page}");
        Ok(())
    }),
    ("curl to nginx, a file of 8 MiB", |lab, _, url| {
        let page = curl(lab, &[&format!("http://{url}:8002/")])?;
        ensure!(page.starts_with("nginx HTTP/1.1 from "), "{page}");
        let script = format!("curl -sS --fail --max-time 20 http://{url}:8002/files/random | sha256sum");
        let got = lab.shell(SOURCE, &script)?;
        // The two pods have a file each.
        let have = ["zoo/near", "zoo/far"].map(|pod| lab.shell(pod, "sha256sum < files/random"));
        let have = have.into_iter().collect::<Result<Vec<_>>>()?;
        ensure!(have.contains(&got), "{got} is not the file's digest, {have:?}");
        Ok(())
    }),
    ("curl with HTTP/2 prior knowledge to nginx", |lab, _, url| {
        let page = curl(lab, &["--http2-prior-knowledge", &format!("http://{url}:8004/")])?;
        ensure!(page.starts_with("nginx HTTP/2.0 from "), "{page}");
        Ok(())
    }),
    ("gRPC, unary, refused, streaming both ways", |lab, _, url| {
        let said = python(lab, GRPC_CLIENT, &[&format!("{url}:8003")])?;
        ensure!(said.contains("grpc ok"), "{said}");
        Ok(())
    }),
    ("WebSocket", |lab, host, _| {
        let said = python(lab, WEBSOCKET_CLIENT, &[host, "8005"])?;
        ensure!(said.contains("websocket ok"), "{said}");
        Ok(())
    }),
    ("redis", |lab, host, _| {
        let script = format!(
            "redis-cli -h {host} set key value && redis-cli -h {host} get key && head -c 2000000 /dev/zero | tr '\\0' x | redis-cli -h {host} -x set big && redis-cli -h {host} strlen big"
        );
        let said = lab.shell(SOURCE, &script)?;
        ensure!(said == "OK\nvalue\nOK\n2000000\n", "{said}");
        Ok(())
    }),
    ("SMTP, where the server speaks first", |lab, _, url| {
        let script = format!(
            "printf 'Subject: x\\r\\n\\r\\nhello\\r\\n' | curl -sS --max-time 20 smtp://{url}:2525/lab --mail-from a@lab --mail-rcpt b@lab -T - && echo sent"
        );
        ensure!(lab.shell(SOURCE, &script)?.contains("sent"), "no mail");
        Ok(())
    }),
    ("iperf3, both directions", |lab, host, _| {
        for direction in ["--connect-timeout=3000", "-R"] {
            let argv = ["iperf3", "-c", host, "-n", "64M", "-J", direction];
            let report: serde_json::Value = serde_json::from_str(&lab.exec(SOURCE, &argv)?.ok()?)?;
            let bytes = report["end"]["sum_received"]["bytes"].as_u64().unwrap_or(0);
            // The two sides end their count at different moments; iperf3 itself fails when the transfer does.
            ensure!(bytes >= 32 << 20, "{bytes} bytes: {report}");
        }
        Ok(())
    }),
];

fn curl(lab: &Lab, arguments: &[&str]) -> Result<String> {
    let mut argv = vec!["curl", "-sS", "--fail", "--max-time", "20"];
    argv.extend(arguments);
    lab.exec(SOURCE, &argv)?.ok()
}

fn python(lab: &Lab, program: &str, arguments: &[&str]) -> Result<String> {
    let mut argv = vec!["python3", "-uc", program];
    argv.extend(arguments);
    lab.exec(SOURCE, &argv)?.ok()
}

fn run_all(config: LabConfig) -> Result<()> {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/programs");
    let lab = Lab::up(config.file(fixture))?;
    let mut failures = Vec::new();
    for situation in Situation::all() {
        let address = situation.address(&lab)?;
        let (host, url) = match address {
            IpAddr::V4(ip) => (ip.to_string(), ip.to_string()),
            IpAddr::V6(ip) => (ip.to_string(), format!("[{ip}]")),
        };
        for (name, check) in PROGRAMS {
            let result = check(&lab, &host, &url);
            println!("{} {name}, {situation:?}", if result.is_ok() { "ok  " } else { "FAIL" });
            if let Err(error) = result {
                failures.push(format!("{name}, {situation:?}: {error:#}"));
            }
        }
    }
    ensure!(
        failures.is_empty(),
        "{} of the matrix failed:\n{}",
        failures.len(),
        failures.join("\n")
    );
    lab.down()
}

/// The fixture and the clients themselves: what fails here is no fault of the mesh.
#[test]
fn programs_work_without_the_mesh() -> Result<()> {
    run_all(LabConfig::test("bare").unmeshed())
}

#[test]
fn programs_work_through_the_mesh() -> Result<()> {
    run_all(LabConfig::test("zoo"))
}
