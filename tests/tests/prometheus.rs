//! A real Prometheus scrapes an agent: it takes the exposition without complaint and counts what the source counted.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result};
use mesh_tests::{Lab, LabConfig, Metrics, Place, until};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(30);
/// How many requests the source sends.
const REQUESTS: u64 = 37;

#[test]
fn prometheus_scrapes_an_agent_and_counts_every_request() -> Result<()> {
    let shop = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/shop");
    let lab = Lab::up(LabConfig::test("prom").file(shop))?;
    let config = lab.directory().join("prometheus.yaml");
    std::fs::write(
        &config,
        "global: {scrape_interval: 1s, scrape_timeout: 1s}\n\
         scrape_configs: [{job_name: agent, static_configs: [{targets: ['127.0.0.1:15020']}]}]\n",
    )?;
    let store = lab.directory().join("prometheus");
    let prometheus = lab.background_in(
        Place::Node("node-2"),
        &[
            "prometheus",
            &format!("--config.file={}", config.display()),
            &format!("--storage.tsdb.path={}", store.display()),
            "--web.listen-address=127.0.0.1:9099",
        ],
    )?;
    let query = |query: &str| -> Result<Vec<Value>> {
        let url = "http://127.0.0.1:9099/api/v1/query";
        let argv = [
            "curl",
            "-sS",
            "--fail",
            "-G",
            url,
            "--data-urlencode",
            &format!("query={query}"),
        ];
        let answer: Value = serde_json::from_str(&lab.exec_in(Place::Node("node-2"), &argv)?.ok()?)?;
        let result = answer["data"]["result"].as_array().cloned();
        result.with_context(|| format!("{query}: {answer}"))
    };
    let value = |result: &[Value]| {
        result
            .first()
            .and_then(|sample| sample["value"][1].as_str()?.parse::<f64>().ok())
    };

    until("the first good scrape", LIMIT, || {
        Ok((value(&query("up")?) == Some(1.0)).then_some(()))
    })
    .with_context(|| format!("prometheus says:\n{}", prometheus.stderr()))?;
    let requests = REQUESTS.to_string();
    let load = lab.state()?.programs.join("lab-load").display().to_string();
    lab.exec(
        "shop/visitor",
        &[
            &load,
            "http",
            "http://cart/",
            "--requests",
            &requests,
            "--seconds",
            "20",
        ],
    )?
    .ok()?;
    let served = "sum(mesh_requests_total{reporter=\"destination\",destination_app=\"cart\"})";
    until("all requests in Prometheus", LIMIT, || {
        Ok((value(&query(served)?) == Some(REQUESTS as f64)).then_some(()))
    })
    .with_context(|| format!("it has {:?}", query("mesh_requests_total")))?;
    // Nothing in the exposition was refused.
    let errors = query("prometheus_target_scrapes_sample_duplicate_timestamp_total > 0")?;
    assert_eq!(errors, Vec::<Value>::new());
    Ok(())
}

#[test]
fn the_exposition_is_openmetrics() -> Result<()> {
    let lab = Lab::up(LabConfig::test("om").nodes(1))?;
    let node = Place::Node("node-1");
    let accept = "accept: application/openmetrics-text; version=1.0.0";
    let argv = [
        "curl",
        "-sS",
        "-i",
        "--fail",
        "-H",
        accept,
        "http://127.0.0.1:15020/metrics",
    ];
    let answer = lab.exec_in(node, &argv)?.ok()?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an HTTP answer")?;
    assert!(
        head.to_ascii_lowercase()
            .contains("content-type: application/openmetrics-text"),
        "{head}"
    );
    assert!(body.ends_with("# EOF\n"), "{}", &body[body.len().saturating_sub(200)..]);
    let metrics = Metrics::parse(body)?;
    assert!(
        metrics
            .samples
            .iter()
            .any(|sample| sample.name.starts_with("nodemesh_agent_")),
        "{body}"
    );
    Ok(())
}
