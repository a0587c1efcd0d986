//! The lab's own load: an HTTP/1.1 server and generators for requests, connections and bulk data.
//!
//! It needs nothing but the standard library, runs inside pods, and prints one JSON object, so that tests, the demo and
//! the bench count what a program on the network really saw. Threads block on sockets: a simple program whose cost is
//! the same on every path that is compared.

use std::{
    collections::BTreeMap,
    env,
    io::{self, BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream, ToSocketAddrs},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

const USAGE: &str = "\
lab-load serve PORT [NAME]          serves HTTP on [::]:PORT; GET /bytes/N answers N bytes, /status/N that status,
                                    POST answers its body's length, all others NAME and the request's facts
lab-load http URL [OPTIONS]         sends requests over kept connections
lab-load connect URL [OPTIONS]      sends each request over a new connection
lab-load bulk URL [OPTIONS]         reads answers as fast as they come; reports bytes per second
options: --connections N (1)  --rate N per second, 0 for as fast as possible (0)  --seconds N (5)  --requests N
         --header NAME:VALUE  --body TEXT  --timeout SECONDS (10)
A file named by --stop ends the load as soon as it exists.";
/// How long the buffers of one connection are.
const BUFFER: usize = 64 * 1024;
/// The longest head of a message.
const HEAD_MAX: u64 = 64 * 1024;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["serve", port, rest @ ..] => serve(port, rest.first().copied().unwrap_or("lab-load")),
        ["http", url, options @ ..] => load(Kind::Kept, url, options),
        ["connect", url, options @ ..] => load(Kind::New, url, options),
        ["bulk", url, options @ ..] => load(Kind::Bulk, url, options),
        _ => Err(anyhow::anyhow!("{USAGE}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-load: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(port: &str, name: &str) -> Result<()> {
    let listener = TcpListener::bind(("::", port.parse()?)).with_context(|| format!("listen on port {port}"))?;
    let name: Arc<str> = name.into();
    for stream in listener.incoming() {
        // A connection that went away before it was accepted is the other side's matter.
        let Ok(stream) = stream else { continue };
        let name = name.clone();
        thread::spawn(move || {
            // An error ends this connection; the load generator counts it.
            let _ = answer_all(stream, &name);
        });
    }
    Ok(())
}

/// The head of a request or an answer.
struct Head {
    first: String,
    fields: Vec<(String, String)>,
}

impl Head {
    /// Reads a head; `None` at the end of the stream.
    fn read(input: &mut impl BufRead) -> io::Result<Option<Head>> {
        let mut input = input.take(HEAD_MAX);
        let mut line = String::new();
        if input.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let first = line.trim_end().to_string();
        let mut fields = Vec::new();
        loop {
            line.clear();
            if input.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let text = line.trim_end();
            if text.is_empty() {
                return Ok(Some(Head { first, fields }));
            }
            let (key, value) = text.split_once(':').ok_or(io::ErrorKind::InvalidData)?;
            fields.push((key.to_ascii_lowercase(), value.trim().to_string()));
        }
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.fields
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    fn length(&self) -> io::Result<u64> {
        match self.get("content-length") {
            Some(value) => value.parse().map_err(|_| io::ErrorKind::InvalidData.into()),
            None => Ok(0),
        }
    }

    /// Reads and drops the body; gives its length.
    fn skip_body(&self, input: &mut impl BufRead) -> io::Result<u64> {
        if self.get("transfer-encoding").is_none() {
            let wanted = self.length()?;
            let got = io::copy(&mut input.take(wanted), &mut io::sink())?;
            return if got == wanted {
                Ok(got)
            } else {
                Err(io::ErrorKind::UnexpectedEof.into())
            };
        }
        let mut total = 0;
        loop {
            let mut line = String::new();
            input.take(HEAD_MAX).read_line(&mut line)?;
            let size = line.trim_end().split(';').next().unwrap_or_default();
            let size = u64::from_str_radix(size, 16).map_err(|_| io::ErrorKind::InvalidData)?;
            if size == 0 {
                // Trailers end with an empty line.
                while input.take(HEAD_MAX).read_line(&mut line)? > 2 {}
                return Ok(total);
            }
            let got = io::copy(&mut input.take(size), &mut io::sink())?;
            if got != size {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            total += size;
            line.clear();
            input.take(2).read_line(&mut line)?;
        }
    }
}

fn answer_all(stream: TcpStream, name: &str) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let peer = stream.peer_addr()?;
    let mut output = stream.try_clone()?;
    let mut input = BufReader::with_capacity(BUFFER, stream);
    let filler = vec![b'x'; BUFFER];
    while let Some(head) = Head::read(&mut input)? {
        let received = head.skip_body(&mut input)?;
        let mut words = head.first.split(' ');
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let close = head
            .get("connection")
            .is_some_and(|value| value.eq_ignore_ascii_case("close"));
        let connection = if close { "connection: close\r\n" } else { "" };
        if let Some(size) = path.strip_prefix("/bytes/").and_then(|size| size.parse::<u64>().ok()) {
            let mut answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {size}\r\n{connection}\r\n").into_bytes();
            let first = usize::try_from(size).unwrap_or(BUFFER).min(BUFFER);
            answer.extend_from_slice(&filler[..first]);
            output.write_all(&answer)?;
            let mut left = size - first as u64;
            while left > 0 {
                let part = usize::try_from(left).unwrap_or(BUFFER).min(BUFFER);
                output.write_all(&filler[..part])?;
                left -= part as u64;
            }
        } else {
            let status = path.strip_prefix("/status/").unwrap_or("200");
            let body = if method == "POST" {
                format!("{received}\n")
            } else {
                let mut body = format!("{name}\n{}\nfrom {peer}\n", head.first);
                for (key, value) in &head.fields {
                    body.push_str(&format!("{key}: {value}\n"));
                }
                body
            };
            let length = body.len();
            let body = if method == "HEAD" { "" } else { &body };
            let answer = format!(
                "HTTP/1.1 {status} Status\r\nserver: {name}\r\ncontent-type: text/plain\r\ncontent-length: {length}\r\n{connection}\r\n{body}"
            );
            output.write_all(answer.as_bytes())?;
        }
        if close {
            break;
        }
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Kept,
    New,
    Bulk,
}

#[derive(Clone)]
struct Plan {
    kind: Kind,
    address: String,
    request: Arc<[u8]>,
    connections: usize,
    rate: f64,
    requests: Option<u64>,
    end: Instant,
    timeout: Duration,
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
}

/// What one connection's thread saw.
#[derive(Default)]
struct Seen {
    latencies: Vec<u32>,
    statuses: BTreeMap<String, u64>,
    servers: BTreeMap<String, u64>,
    errors: BTreeMap<String, u64>,
    bytes: u64,
    connects: u64,
}

fn load(kind: Kind, url: &str, options: &[&str]) -> Result<()> {
    let rest = url
        .strip_prefix("http://")
        .context("expected a URL http://HOST[:PORT]/PATH")?;
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let with_port = authority
        .rsplit_once(':')
        .is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let address = if with_port {
        authority.to_string()
    } else {
        format!("{authority}:80")
    };
    let (mut connections, mut rate, mut seconds, mut timeout) = (1, 0.0, 5.0, 10.0);
    let (mut requests, mut body, mut stop_file) = (None, None, None);
    let mut fields = String::new();
    for pair in options.chunks(2) {
        let [option, value] = pair else {
            bail!("{pair:?}: an option without a value\n{USAGE}")
        };
        match *option {
            "--connections" => connections = value.parse()?,
            "--rate" => rate = value.parse()?,
            "--seconds" => seconds = value.parse()?,
            "--requests" => requests = Some(value.parse()?),
            "--timeout" => timeout = value.parse()?,
            "--header" => fields.push_str(&format!("{value}\r\n")),
            "--body" => body = Some(*value),
            "--stop" => stop_file = Some(value.to_string()),
            other => bail!("{other}: no such option\n{USAGE}"),
        }
    }
    let method = if body.is_some() { "POST" } else { "GET" };
    if let Some(body) = body {
        fields.push_str(&format!("content-length: {}\r\n", body.len()));
    }
    if kind == Kind::New {
        fields.push_str("connection: close\r\n");
    }
    let body = body.unwrap_or_default();
    let request = format!("{method} /{path} HTTP/1.1\r\nhost: {authority}\r\n{fields}\r\n{body}");
    let started = Instant::now();
    let plan = Plan {
        kind,
        address,
        request: request.into_bytes().into(),
        connections,
        rate,
        requests,
        end: started + Duration::from_secs_f64(seconds),
        timeout: Duration::from_secs_f64(timeout),
        stop: Arc::default(),
        sent: Arc::default(),
    };
    if let Some(file) = stop_file {
        let stop = plan.stop.clone();
        thread::spawn(move || {
            while !std::path::Path::new(&file).exists() {
                thread::sleep(Duration::from_millis(5));
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
    let threads: Vec<_> = (0..plan.connections)
        .map(|number| {
            let plan = plan.clone();
            thread::spawn(move || drive(&plan, number, started))
        })
        .collect();
    let mut all = Seen::default();
    for thread in threads {
        let seen = thread
            .join()
            .map_err(|_| anyhow::anyhow!("a connection's thread panicked"))?;
        all.latencies.extend(seen.latencies);
        all.bytes += seen.bytes;
        all.connects += seen.connects;
        for (into, from) in [
            (&mut all.statuses, seen.statuses),
            (&mut all.servers, seen.servers),
            (&mut all.errors, seen.errors),
        ] {
            for (key, count) in from {
                *into.entry(key).or_default() += count;
            }
        }
    }
    report(all, started.elapsed());
    Ok(())
}

/// One connection (or one chain of short ones): send, wait for the answer, keep to the rate.
fn drive(plan: &Plan, number: usize, started: Instant) -> Seen {
    let mut seen = Seen::default();
    let mut connection: Option<BufReader<TcpStream>> = None;
    let interval = if plan.rate > 0.0 {
        plan.connections as f64 / plan.rate
    } else {
        0.0
    };
    let mut done = started;
    for turn in 0_u64.. {
        let offset = interval * (turn as f64 + number as f64 / plan.connections as f64);
        let due = started + Duration::from_secs_f64(offset);
        if due.max(Instant::now()) >= plan.end || plan.stop.load(Ordering::Relaxed) {
            break;
        }
        if plan
            .requests
            .is_some_and(|limit| plan.sent.fetch_add(1, Ordering::Relaxed) >= limit)
        {
            break;
        }
        // A request that waited for a late answer counts from when it was due; a punctual one from when it is sent,
        // because a sleeping thread's own delay is not the network's.
        let late = interval > 0.0 && done > due;
        if !late {
            thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        let begin = if late { due } else { Instant::now() };
        match one(plan, &mut connection, &mut seen) {
            Ok(status) => *seen.statuses.entry(status).or_default() += 1,
            Err(error) => {
                connection = None;
                *seen.errors.entry(format!("{:?}", error.kind())).or_default() += 1;
            }
        }
        done = Instant::now();
        seen.latencies
            .push(u32::try_from((done - begin).as_micros()).unwrap_or(u32::MAX));
    }
    seen
}

fn one(plan: &Plan, connection: &mut Option<BufReader<TcpStream>>, seen: &mut Seen) -> io::Result<String> {
    let stream = match connection {
        Some(stream) => stream,
        None => {
            let address = plan
                .address
                .to_socket_addrs()?
                .next()
                .ok_or(io::ErrorKind::AddrNotAvailable)?;
            let stream = TcpStream::connect_timeout(&address, plan.timeout)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(plan.timeout))?;
            stream.set_write_timeout(Some(plan.timeout))?;
            seen.connects += 1;
            connection.insert(BufReader::with_capacity(BUFFER, stream))
        }
    };
    stream.get_mut().write_all(&plan.request)?;
    let head = Head::read(stream)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    let status = head
        .first
        .split(' ')
        .nth(1)
        .ok_or(io::ErrorKind::InvalidData)?
        .to_string();
    seen.bytes += head.skip_body(stream)?;
    if let Some(server) = head.get("x-served-by").or(head.get("server")) {
        *seen.servers.entry(server.to_string()).or_default() += 1;
    }
    let close = head
        .get("connection")
        .is_some_and(|value| value.eq_ignore_ascii_case("close"));
    if close || plan.kind == Kind::New {
        *connection = None;
    }
    Ok(status)
}

fn report(mut seen: Seen, elapsed: Duration) {
    seen.latencies.sort_unstable();
    let count = seen.latencies.len();
    let percentile = |share: f64| {
        let rank = (count as f64 * share).ceil() as usize;
        seen.latencies
            .get(rank.clamp(1, count.max(1)) - 1)
            .copied()
            .unwrap_or(0)
    };
    let seconds = elapsed.as_secs_f64();
    let answered: u64 = seen.statuses.values().sum();
    let result = serde_json::json!({
        "seconds": seconds,
        "requests": count,
        "answered": answered,
        "statuses": seen.statuses,
        "servers": seen.servers,
        "errors": seen.errors,
        "connects": seen.connects,
        "per_second": answered as f64 / seconds,
        "bytes": seen.bytes,
        "bytes_per_second": seen.bytes as f64 / seconds,
        "p50_us": percentile(0.50),
        "p90_us": percentile(0.90),
        "p99_us": percentile(0.99),
        "p999_us": percentile(0.999),
        "max_us": percentile(1.0),
    });
    println!("{result}");
}
