//! The bench's server and load: one thread each, on epoll, so that what is measured is the way between them and not
//! themselves.
//!
//! It differs from `lab-load` in that hundreds of connections cost no threads, and that a rate is kept whatever the
//! answers do: a request that is due while its connection still waits is counted from when it was due. It prints one
//! JSON object. It never retries and never hides an error: a run with errors has no figures.

mod http;
mod load;
mod report;
mod serve;

use std::{env, net::SocketAddr, process::ExitCode, time::Duration};

use anyhow::{Context, Result, bail};

use load::{Kind, Plan};

const USAGE: &str = "\
bench-load serve PORT...                   serves HTTP/1.1 on [::]:PORT; GET /bytes/N answers N bytes
bench-load keep ADDRESS PATH [OPTIONS]     sends requests over kept connections
bench-load connect ADDRESS PATH [OPTIONS]  sends each request over a new connection
bench-load idle ADDRESS PATH [OPTIONS]     sends one request on each connection, says so, and keeps them open until
                                           it is killed
options: --connections N (1)  --rate N per second, 0 for as fast as possible (0)  --seconds N (2)  --warm-up N (0.2)
         --requests N (no bound)";

/// More connections than this are a mistake in the call.
const CONNECTIONS_MAX: usize = 60_000;

fn main() -> ExitCode {
    more_files();
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["serve", ports @ ..] if !ports.is_empty() => serve::run(ports),
        ["keep", address, path, options @ ..] => {
            plan(Kind::Keep, address, path, options).and_then(|plan| load::run(&plan))
        }
        ["connect", address, path, options @ ..] => {
            plan(Kind::Connect, address, path, options).and_then(|plan| load::run(&plan))
        }
        ["idle", address, path, options @ ..] => {
            plan(Kind::Idle, address, path, options).and_then(|plan| load::run(&plan))
        }
        _ => Err(anyhow::anyhow!("{USAGE}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-load: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// As many open files as the system lets this process have: each connection is one.
fn more_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let all = Rlimit {
        current: maximum,
        maximum,
    };
    // Where it may not, the connection that is too many says so.
    let _ = setrlimit(Resource::Nofile, all);
}

fn plan(kind: Kind, address: &str, path: &str, options: &[&str]) -> Result<Plan> {
    let address: SocketAddr = address
        .parse()
        .with_context(|| format!("{address}: expected ADDRESS:PORT, no name"))?;
    let mut plan = Plan {
        kind,
        address,
        request: http::request(address, path, kind == Kind::Connect),
        connections: 1,
        rate: 0.0,
        seconds: Duration::from_secs(2),
        warm_up: Duration::from_millis(200),
        requests: None,
    };
    let time = |value: &str| -> Result<Duration> { Ok(Duration::try_from_secs_f64(value.parse()?)?) };
    for pair in options.chunks(2) {
        let [option, value] = pair else {
            bail!("{pair:?}: an option without a value\n{USAGE}")
        };
        match *option {
            "--connections" => plan.connections = value.parse()?,
            "--rate" => plan.rate = value.parse()?,
            "--seconds" => plan.seconds = time(value)?,
            "--warm-up" => plan.warm_up = time(value)?,
            "--requests" => plan.requests = Some(value.parse()?),
            other => bail!("{other}: no such option\n{USAGE}"),
        }
    }
    if plan.connections == 0 || plan.connections > CONNECTIONS_MAX || !plan.rate.is_finite() || plan.rate < 0.0 {
        bail!("expected 1 to {CONNECTIONS_MAX} connections and a rate of 0 or more");
    }
    Ok(plan)
}
