//! Where the agent can be asked: `/metrics` and `/readyz`, `/livez` over TCP, `/debug/*` on a unix socket for root.
//!
//! A minimal HTTP/1 server on the control thread, so that a scrape cannot slow the data path. It knows no component:
//! the composition root gives it pages and checks. It changes nothing, and the TCP ports tell nothing that a policy
//! would hide.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fs,
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_api::view::View;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener},
    sync::Semaphore,
    task::JoinSet,
};

use crate::{
    config::{AdminConfig, AgentConfig},
    event::Events,
};

/// Connections at once, over all three listeners.
pub const CONNECTIONS_MAX: usize = 64;
/// The time that a request's head may take, and an idle connection may stay.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// The time that a whole connection may live.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(300);
/// How long a TCP port that is in use is left alone before it is tried again.
const PORT_RETRY: Duration = Duration::from_millis(100);
/// How long an agent may take to answer [`ask`].
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// The longest answer that [`ask`] takes.
const ASK_BYTES_MAX: u64 = 64 * 1024;
/// The pause after an accept that failed for want of something (descriptors, memory).
const REST: Duration = Duration::from_millis(50);

/// One condition of readiness.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// Its name.
    pub name: &'static str,
    /// Whether it holds.
    pub ready: bool,
    /// What is known of it.
    pub detail: String,
}

type Page = Box<dyn Fn() -> Value + Send + Sync>;
type Checks = Box<dyn Fn() -> Vec<Check> + Send + Sync>;

/// What is served.
pub struct Admin {
    events: Arc<Events>,
    checks: Checks,
    pages: BTreeMap<&'static str, Page>,
}

/// The server with its sockets.
pub struct Bound {
    admin: Arc<Admin>,
    metrics: Port,
    health: Port,
    socket: UnixListener,
    socket_path: PathBuf,
}

/// A TCP port: ours, or not ours yet because the agent before us still has it, or not ours any more.
struct Port {
    address: SocketAddr,
    listener: Option<TcpListener>,
    wanted: bool,
}

/// Which listener a request came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Door {
    Metrics,
    Health,
    Debug,
}

impl Admin {
    /// Metrics alone; always ready.
    pub fn new(events: Arc<Events>) -> Admin {
        Admin {
            events,
            checks: Box::new(Vec::new),
            pages: BTreeMap::new(),
        }
    }

    /// What makes the agent ready: all of these.
    pub fn ready_when(mut self, checks: impl Fn() -> Vec<Check> + Send + Sync + 'static) -> Admin {
        self.checks = Box::new(checks);
        self
    }

    /// A JSON page on the unix socket; `path` is whole, such as `/debug/pods`.
    pub fn page(mut self, path: &'static str, page: impl Fn() -> Value + Send + Sync + 'static) -> Admin {
        self.pages.insert(path, Box::new(page));
        self
    }

    /// Takes the addresses, in the calling thread's network namespace. If `patient`, TCP ports that are in use are taken
    /// later, as soon as the agent before this one lets go of them.
    pub async fn bind(self, config: &AdminConfig, patient: bool) -> io::Result<Bound> {
        Ok(Bound {
            admin: Arc::new(self),
            metrics: Port::bind(config.metrics, patient).await?,
            health: Port::bind(config.health, patient).await?,
            socket: bind_unix(&config.socket)?,
            socket_path: config.socket.clone(),
        })
    }

    fn answer(&self, door: Door, method: &Method, path: &str) -> Response<Full<Bytes>> {
        if method != Method::GET && method != Method::HEAD {
            return text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
        }
        match (door, path) {
            (Door::Metrics | Door::Debug, "/metrics") => match self.events.scrape() {
                Ok(body) => reply(StatusCode::OK, OPENMETRICS, body),
                Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
            },
            (Door::Health | Door::Debug, "/livez") => text(StatusCode::OK, "live\n"),
            (Door::Health | Door::Debug, "/readyz") => self.readiness(),
            (Door::Debug, "/" | "/debug") => {
                let pages: Vec<&str> = self.pages.keys().copied().collect();
                json_page(&json!({ "pages": pages }))
            }
            (Door::Debug, path) if self.pages.contains_key(path) => {
                self.pages.get(path).map_or_else(not_found, |page| json_page(&page()))
            }
            _ => not_found(),
        }
    }

    fn readiness(&self) -> Response<Full<Bytes>> {
        let checks = (self.checks)();
        let ready = checks.iter().all(|check| check.ready);
        let mut body = String::from(if ready { "ready\n" } else { "not ready\n" });
        for check in checks {
            let mark = if check.ready { "ok" } else { "missing" };
            body.push_str(&format!("{mark} {}: {}\n", check.name, check.detail));
        }
        let status = if ready {
            StatusCode::OK
        } else {
            StatusCode::SERVICE_UNAVAILABLE
        };
        text(status, body)
    }
}

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

fn reply(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    reply(status, "text/plain; charset=utf-8", body)
}

fn json_page(page: &Value) -> Response<Full<Bytes>> {
    reply(StatusCode::OK, "application/json", format!("{page:#}\n"))
}

fn not_found() -> Response<Full<Bytes>> {
    text(StatusCode::NOT_FOUND, "no such page\n")
}

async fn bind_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let bound = TcpListener::bind(address).await;
    let any_v6 = matches!(address, SocketAddr::V6(v6) if v6.ip().is_unspecified());
    match bound {
        // A machine without IPv6 still has all of its addresses.
        Err(error) if any_v6 && error.kind() != io::ErrorKind::AddrInUse => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    }
    .map_err(|error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}")))
}

fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let named =
        |error: io::Error| io::Error::new(error.kind(), format!("cannot listen on {}: {error}", path.display()));
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(named)?;
    }
    // Made under another name and renamed, so that nobody finds it with other rights, and a new agent takes over the
    // name from an old one that still drains.
    let beside = path.with_extension(format!("{}.new", std::process::id()));
    let _not_there_as_a_rule = fs::remove_file(&beside);
    let listener = UnixListener::bind(&beside).map_err(named)?;
    fs::set_permissions(&beside, fs::Permissions::from_mode(0o600)).map_err(named)?;
    fs::rename(&beside, path).map_err(named)?;
    Ok(listener)
}

impl Port {
    async fn bind(address: SocketAddr, patient: bool) -> io::Result<Port> {
        let listener = match bind_tcp(address).await {
            Ok(listener) => Some(listener),
            Err(error) if patient && error.kind() == io::ErrorKind::AddrInUse => {
                tracing::info!(%address, "in use: taken as soon as the agent before this one lets go");
                None
            }
            Err(error) => return Err(error),
        };
        Ok(Port {
            address,
            listener,
            wanted: true,
        })
    }

    /// The next connection; waits for the port first.
    async fn accept(&mut self) -> io::Result<TcpStream> {
        loop {
            match &self.listener {
                Some(listener) => return Ok(listener.accept().await?.0),
                None if self.wanted => {
                    tokio::time::sleep(PORT_RETRY).await;
                    self.listener = bind_tcp(self.address).await.ok();
                }
                None => return std::future::pending().await,
            }
        }
    }

    fn release(&mut self) {
        (self.listener, self.wanted) = (None, false);
    }
}

impl Bound {
    /// The TCP addresses that were taken: metrics, health.
    pub fn addresses(&self) -> io::Result<(SocketAddr, SocketAddr)> {
        let address = |port: &Port| match &port.listener {
            Some(listener) => listener.local_addr(),
            None => Err(io::ErrorKind::AddrInUse.into()),
        };
        Ok((address(&self.metrics)?, address(&self.health)?))
    }

    /// The unix socket's path.
    pub fn socket(&self) -> &Path {
        &self.socket_path
    }

    /// Serves until dropped; on the TCP ports until `release`, so that the next agent can have them.
    pub async fn run(mut self, release: impl Future<Output = ()>) {
        let (mut release, mut released) = (std::pin::pin!(release), false);
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut connections = JoinSet::new();
        loop {
            // Never closed, so that a permit always comes; while none is free the backlog holds the rest.
            let Ok(place) = places.clone().acquire_owned().await else {
                return;
            };
            let accepted = tokio::select! {
                () = &mut release, if !released => {
                    released = true;
                    self.metrics.release();
                    self.health.release();
                    continue;
                }
                accepted = self.metrics.accept() => accepted.map(|stream| (Door::Metrics, Either::Tcp(stream))),
                accepted = self.health.accept() => accepted.map(|stream| (Door::Health, Either::Tcp(stream))),
                accepted = self.socket.accept() => accepted.map(|(stream, _)| (Door::Debug, Either::Unix(stream))),
            };
            while connections.try_join_next().is_some() {}
            match accepted {
                Ok((door, stream)) => {
                    let admin = self.admin.clone();
                    connections.spawn(async move {
                        let served = async {
                            match stream {
                                Either::Tcp(stream) => serve(admin, door, stream).await,
                                Either::Unix(stream) => serve(admin, door, stream).await,
                            }
                        };
                        // Whoever asks and goes away is of no interest.
                        let _ = tokio::time::timeout(CONNECTION_TIMEOUT, served).await;
                        drop(place);
                    });
                }
                Err(_) => tokio::time::sleep(REST).await,
            }
        }
    }
}

enum Either {
    Tcp(TcpStream),
    Unix(tokio::net::UnixStream),
}

async fn serve(admin: Arc<Admin>, door: Door, stream: impl AsyncRead + AsyncWrite + Unpin) {
    let service = service_fn(move |request: Request<Incoming>| {
        let response = admin.answer(door, request.method(), request.uri().path());
        async move { Ok::<_, Infallible>(response) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "admin connection");
    }
}

/// What [`ask`] was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The whole body.
    pub body: String,
}

/// Asks an agent for a page over its unix socket, from outside of it. Blocking, bounded by [`ASK_TIMEOUT`].
pub fn ask(socket: &Path, page: &str) -> io::Result<Answer> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", socket.display()));
    let mut stream = std::os::unix::net::UnixStream::connect(socket).map_err(named)?;
    stream.set_read_timeout(Some(ASK_TIMEOUT))?;
    stream.set_write_timeout(Some(ASK_TIMEOUT))?;
    write!(
        stream,
        "GET {page} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n"
    )
    .map_err(named)?;
    let mut text = String::new();
    stream.take(ASK_BYTES_MAX).read_to_string(&mut text).map_err(named)?;
    let answer = text.split_once("\r\n\r\n").and_then(|(head, body)| {
        let status = head.split(' ').nth(1)?.parse().ok()?;
        let body = body.to_owned();
        Some(Answer { status, body })
    });
    answer.ok_or_else(|| named(io::Error::new(io::ErrorKind::InvalidData, "not an answer in HTTP/1.1")))
}

/// The page `/debug/view`.
pub fn view_page(view: &View) -> Value {
    let workloads: Vec<Value> = view
        .workloads()
        .map(|workload| {
            json!({
                "name": workload.name.to_string(),
                "identity": workload.identity.as_str(),
                "node": &*workload.node,
                "addresses": workload.addresses,
                "enrolled": workload.enrolled,
                "ready": workload.ready,
            })
        })
        .collect();
    let services: Vec<Value> = view
        .services()
        .map(|service| {
            let ports: Vec<Value> = service
                .service
                .ports
                .iter()
                .map(|port| {
                    let served = service.port(port.port);
                    json!({
                        "name": &*port.name,
                        "port": port.port,
                        "protocol": format!("{:?}", port.protocol),
                        "routes": served.is_some_and(|served| served.routes.is_some()),
                        "endpoints": served.map(|served| {
                            let backend = &served.backend;
                            let all = backend.endpoints_v4.iter().chain(&backend.endpoints_v6);
                            all.map(|endpoint| endpoint.address.to_string()).collect::<Vec<_>>()
                        }),
                    })
                })
                .collect();
            json!({
                "name": service.service.name.to_string(),
                "addresses": service.service.addresses,
                "ports": ports,
            })
        })
        .collect();
    json!({
        "revision": view.revision().0,
        "trustDomain": view.trust_domain().as_str(),
        "workloads": workloads,
        "services": services,
    })
}

/// The page `/debug/config`. Holds paths of secrets, never a secret.
pub fn config_page(config: &AgentConfig) -> Value {
    let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    json!({
        "node": config.node,
        "trustDomain": config.trust_domain.as_str(),
        "stateDir": config.state_dir,
        "workers": config.workers,
        "controller": {
            "address": config.controller.address,
            "trustBundle": config.controller.trust_bundle,
            "joinTokenFile": config.controller.join_token_file,
            "connectTimeoutMs": ms(config.controller.connect_timeout),
            "callTimeoutMs": ms(config.controller.call_timeout),
            "retryMaxMs": ms(config.controller.retry_max),
        },
        "kernel": {
            "cgroup": config.kernel.cgroup,
            "pinDir": config.pin_dir(),
            "failMode": format!("{:?}", config.kernel.fail_mode).to_lowercase(),
            "debug": config.kernel.debug,
        },
        "admin": {
            "metrics": config.admin.metrics.to_string(),
            "health": config.admin.health.to_string(),
            "socket": config.admin.socket,
        },
        "log": { "filter": config.log.filter, "format": config.log.format },
        "accessLog": {
            "enabled": config.access_log.enabled,
            "format": config.access_log.format,
            "path": config.access_log.path,
        },
        "metrics": {
            "compat": format!("{:?}", config.metrics.compat).to_lowercase(),
            "seriesMax": config.metrics.series_max,
            "seriesIdleMs": ms(config.metrics.series_idle),
        },
        "path": {
            "connectionsMax": config.path.connections_max,
            "silenceMs": ms(config.path.silence),
            "handshakeTimeoutMs": ms(config.path.handshake_timeout),
            "dialTimeoutMs": ms(config.path.dial_timeout),
            "viewPatienceMs": ms(config.path.view_patience),
            "idleTimeoutMs": config.path.idle_timeout.map(ms),
        },
        "drain": { "patienceMs": ms(config.drain.patience), "graceMs": ms(config.drain.grace) },
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn get(mut stream: impl AsyncRead + AsyncWrite + Unpin, path: &str) -> (u16, String) {
        let request = format!("GET {path} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        (status, answer)
    }

    #[tokio::test]
    async fn each_door_serves_its_pages_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let config = AdminConfig {
            metrics: any,
            health: any,
            socket: dir.path().join("run/agent.sock"),
        };
        let ready = Arc::new(AtomicBool::new(false));
        let admin = Admin::new(Events::quiet())
            .ready_when({
                let ready = ready.clone();
                move || {
                    vec![Check {
                        name: "view",
                        ready: ready.load(Ordering::Relaxed),
                        detail: "revision 0".into(),
                    }]
                }
            })
            .page("/debug/pods", || json!([{"pod": "shop/cart"}]));
        let bound = admin.bind(&config, false).await.unwrap();
        let (metrics, health) = bound.addresses().unwrap();
        let mode = fs::metadata(&config.socket).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let serving = tokio::spawn(bound.run(std::future::pending()));

        let tcp = async |address: SocketAddr, path: &str| {
            get(tokio::net::TcpStream::connect(address).await.unwrap(), path).await
        };
        let unix = async |path: &str| get(tokio::net::UnixStream::connect(&config.socket).await.unwrap(), path).await;

        let (status, body) = tcp(metrics, "/metrics").await;
        assert_eq!(status, 200);
        assert!(
            body.contains("application/openmetrics-text") && body.ends_with("# EOF\n"),
            "{body}"
        );
        for (address, path) in [
            (metrics, "/readyz"),
            (metrics, "/debug/pods"),
            (health, "/metrics"),
            (health, "/debug/pods"),
        ] {
            assert_eq!(tcp(address, path).await.0, 404, "{path}");
        }
        assert_eq!(tcp(health, "/livez").await.0, 200);
        let (status, body) = tcp(health, "/readyz").await;
        assert_eq!(status, 503);
        assert!(body.contains("missing view: revision 0"), "{body}");
        ready.store(true, Ordering::Relaxed);
        assert_eq!(tcp(health, "/readyz").await.0, 200);
        let (status, body) = unix("/debug/pods").await;
        assert_eq!(status, 200);
        assert!(body.contains("shop/cart"), "{body}");
        assert!(unix("/debug").await.1.contains("/debug/pods"));
        assert_eq!(unix("/debug/none").await.0, 404);
        assert_eq!(unix("/metrics").await.0, 200);

        // A second agent takes the name over while the first one still lives.
        let second = bind_unix(&config.socket).unwrap();
        assert!(config.socket.exists());
        drop(second);
        serving.abort();
    }
}
