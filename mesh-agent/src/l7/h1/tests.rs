//! The engine over real loopback sockets, with scripted peers on both sides.

use std::{
    cell::RefCell,
    collections::VecDeque,
    rc::Rc,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use http::StatusCode;
use mesh_api::request::Request;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{mpsc, oneshot},
    task::{JoinHandle, LocalSet},
    time::timeout,
};

use super::serve;
use crate::{
    l7::{
        Attempt, Attempted, COPY_BYTES_MAX, CopyTo, End, Facts, Fault, Forward, GrpcStatus, Handler, Limits, Reply,
        RequestCopy, ServeError, Target, Verdict,
    },
    transport::Transport,
};

/// No step of a test may take longer.
const PATIENCE: Duration = Duration::from_secs(10);

type Decide = Box<dyn Fn(&dyn Request, Facts) -> Result<Forward, Reply>>;

/// A handler that does what the test says and keeps what it was told.
struct Scripted {
    decide: Decide,
    retry_on: Vec<StatusCode>,
    apps: mpsc::Sender<TcpStream>,
    pool: RefCell<VecDeque<Transport>>,
    ends: mpsc::Sender<End>,
    refused: RefCell<Vec<(Fault, Option<StatusCode>)>>,
    decided: RefCell<Vec<String>>,
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dialed = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (dialed, listener.accept().await.unwrap().0)
}

fn transport(stream: TcpStream) -> Transport {
    Transport::from_tcp(stream, BytesMut::new())
}

impl Handler for Scripted {
    type Source = Transport;
    type Target = Transport;
    type Exchange = ();

    async fn decide(&self, request: &dyn Request, facts: Facts) -> Verdict<()> {
        self.decided
            .borrow_mut()
            .push(format!("{} {}", request.method(), request.path()));
        match (self.decide)(request, facts) {
            Ok(forward) => Verdict::Forward(forward, ()),
            Err(reply) => Verdict::Reply(reply, ()),
        }
    }

    async fn connect(&self, _: &mut (), attempt: Attempt) -> Result<Target<Transport>, Reply> {
        if let Some(wire) = self.pool.borrow_mut().pop_front().filter(|_| attempt == Attempt::First) {
            return Ok(Target { wire, reused: true });
        }
        let (ours, theirs) = pair().await;
        self.apps.try_send(theirs).unwrap();
        Ok(Target {
            wire: transport(ours),
            reused: false,
        })
    }

    async fn connect_h2(&self, _: &mut (), _: Attempt) -> Result<::h2::client::SendRequest<Bytes>, Reply> {
        unreachable!("an HTTP/1 engine asks for HTTP/1")
    }

    fn release(&self, _: &mut (), wire: Transport) {
        self.pool.borrow_mut().push_back(wire);
    }

    fn again(&self, _: &mut (), attempted: Attempted, retries: u32) -> bool {
        let wanted = match attempted {
            Attempted::Status(status) | Attempted::Undelivered(status) => self.retry_on.contains(&status),
            Attempted::Failed(_) => !self.retry_on.is_empty(),
        };
        wanted && retries < 1
    }

    async fn relay(&self, _: &mut (), mut source: Transport, mut target: Transport) -> (u64, u64) {
        tokio::io::copy_bidirectional(&mut source, &mut target)
            .await
            .unwrap_or_default()
    }

    fn finish(&self, _: (), end: End) {
        let _ = self.ends.try_send(end);
    }

    fn refused(&self, fault: Fault, status: Option<StatusCode>) {
        self.refused.borrow_mut().push((fault, status));
    }
}

/// A source's connection to an engine, and what the engine does.
struct Bench {
    source: TcpStream,
    apps: mpsc::Receiver<TcpStream>,
    ends: mpsc::Receiver<End>,
    handler: Rc<Scripted>,
    drain: Option<oneshot::Sender<Duration>>,
    served: JoinHandle<Result<(), ServeError>>,
}

impl Bench {
    async fn new(limits: Limits, retry_on: Vec<StatusCode>, decide: Decide) -> Bench {
        let (source, ours) = pair().await;
        let (apps_in, apps) = mpsc::channel(1024);
        let (ends_in, ends) = mpsc::channel(1024);
        let (drain, drained) = oneshot::channel::<Duration>();
        let handler = Rc::new(Scripted {
            decide,
            retry_on,
            apps: apps_in,
            pool: RefCell::default(),
            ends: ends_in,
            refused: RefCell::default(),
            decided: RefCell::default(),
        });
        let served = tokio::task::spawn_local({
            let handler = handler.clone();
            async move {
                let drained = async {
                    match drained.await {
                        Ok(patience) => patience,
                        Err(_) => std::future::pending().await,
                    }
                };
                serve(transport(ours), handler, &limits, drained).await
            }
        });
        Bench {
            source,
            apps,
            ends,
            handler,
            drain: Some(drain),
            served,
        }
    }

    async fn plain() -> Bench {
        Bench::new(Limits::default(), Vec::new(), Box::new(|_, _| Ok(Forward::default()))).await
    }

    async fn send(&mut self, text: &str) {
        within(self.source.write_all(text.as_bytes())).await.unwrap();
    }

    async fn app(&mut self) -> App {
        App(within(self.apps.recv()).await.unwrap())
    }

    async fn expect(&mut self, text: &str) {
        expect(&mut self.source, text).await;
    }

    async fn end(&mut self) -> End {
        within(self.ends.recv()).await.unwrap()
    }

    /// The source reads nothing more, and the engine has ended.
    async fn expect_closed(mut self) -> Rc<Scripted> {
        let mut rest = Vec::new();
        within(self.source.read_to_end(&mut rest)).await.unwrap();
        assert_eq!(String::from_utf8_lossy(&rest), "");
        drop(self.source);
        let _ = within(self.served).await.unwrap();
        self.handler
    }
}

/// The application's side of a connection.
struct App(TcpStream);

impl App {
    async fn expect(&mut self, text: &str) {
        expect(&mut self.0, text).await;
    }

    async fn send(&mut self, text: &str) {
        within(self.0.write_all(text.as_bytes())).await.unwrap();
    }

    async fn expect_closed(&mut self) {
        let mut rest = Vec::new();
        let _ = within(self.0.read_to_end(&mut rest)).await;
        assert_eq!(String::from_utf8_lossy(&rest), "");
    }
}

async fn within<F: IntoFuture>(step: F) -> F::Output {
    timeout(PATIENCE, step).await.expect("took too long")
}

/// Reads exactly this text.
async fn expect(stream: &mut TcpStream, text: &str) {
    let mut read = Vec::new();
    while read.len() < text.len() {
        let mut buffer = vec![0; text.len() - read.len()];
        let count = within(stream.read(&mut buffer)).await.unwrap_or(0);
        read.extend_from_slice(&buffer[..count]);
        if count == 0 || !text.as_bytes().starts_with(&read) {
            break;
        }
    }
    assert_eq!(String::from_utf8_lossy(&read), text);
}

/// Runs a test on one thread, as a worker would.
fn run<F: Future<Output = ()>>(test: F) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, test);
}

const GET: &str = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

#[test]
fn exchanges_are_passed_on_as_they_are() {
    // Request, what the application reads, what it answers, what the source reads.
    let cases: &[(&str, &str, &str, &str, &str)] = &[
        ("get", GET, GET, OK, OK),
        (
            "content length both ways, names as sent",
            "POST /a?b=c HTTP/1.1\r\nHost: a\r\nX-One: 1\r\nContent-Length: 5\r\n\r\nhello",
            "POST /a?b=c HTTP/1.1\r\nhost: a\r\nX-One: 1\r\ncontent-length: 5\r\n\r\nhello",
            "HTTP/1.1 201 Made\r\nX-Two: 2\r\nContent-Length: 3\r\n\r\nabc",
            "HTTP/1.1 201 Made\r\nX-Two: 2\r\ncontent-length: 3\r\n\r\nabc",
        ),
        (
            "chunked both ways, extensions dropped, trailers kept",
            "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: Chunked\r\n\r\n3;x=\"y\"\r\nabc\r\n02\r\nde\r\n0\r\nX-Sum: 1\r\n\r\n",
            "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\nX-Sum: 1\r\n\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nA\r\n0123456789\r\n0\r\nx-t: v\r\ncontent-length: 3\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\na\r\n0123456789\r\n0\r\nx-t: v\r\n\r\n",
        ),
        (
            "head keeps the length of what is not sent",
            "HEAD / HTTP/1.1\r\nhost: a\r\n\r\n",
            "HEAD / HTTP/1.1\r\nhost: a\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n",
        ),
        (
            "204",
            GET,
            GET,
            "HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n",
            "HTTP/1.1 204 No Content\r\n\r\n",
        ),
        (
            "304",
            GET,
            GET,
            "HTTP/1.1 304 Not Modified\r\netag: x\r\ncontent-length: 7\r\n\r\n",
            "HTTP/1.1 304 Not Modified\r\netag: x\r\ncontent-length: 7\r\n\r\n",
        ),
        (
            "interim responses",
            GET,
            GET,
            "HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            "HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
        ),
        (
            "hop-by-hop fields go, and those that connection names",
            "GET / HTTP/1.1\r\nhost: a\r\nconnection: keep-alive, X-Private, host\r\nkeep-alive: 5\r\nx-private: 1\r\nproxy-connection: x\r\nte: trailers, gzip\r\nupgrade: h2c\r\nx-public: 1\r\n\r\n",
            "GET / HTTP/1.1\r\nhost: a\r\nx-public: 1\r\nconnection: te\r\nte: trailers\r\n\r\n",
            "HTTP/1.1 200 OK\r\nconnection: x-own\r\nx-own: 1\r\nkeep-alive: 1\r\ncontent-length: 0\r\nx: y\r\n\r\n",
            "HTTP/1.1 200 OK\r\nx: y\r\ncontent-length: 0\r\n\r\n",
        ),
        (
            "an absolute target becomes an origin form and names the host",
            "GET http://b:80/x?y HTTP/1.1\r\nhost: a\r\n\r\n",
            "GET /x?y HTTP/1.1\r\nhost: b:80\r\n\r\n",
            OK,
            OK,
        ),
        (
            "an absolute target without a path",
            "GET http://b HTTP/1.1\r\nhost: a\r\n\r\n",
            "GET / HTTP/1.1\r\nhost: b\r\n\r\n",
            OK,
            OK,
        ),
        (
            "options for all",
            "OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n",
            "OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n",
            OK,
            OK,
        ),
        (
            "an empty line before the request",
            &("\r\n".to_owned() + GET),
            GET,
            OK,
            OK,
        ),
        (
            "identity headers from outside are stripped",
            "GET / HTTP/1.1\r\nhost: a\r\nX-Forwarded-Client-Cert: URI=spiffe://x\r\nx-forwarded-for: 1.2.3.4\r\n\r\n",
            "GET / HTTP/1.1\r\nhost: a\r\nx-forwarded-for: 1.2.3.4\r\n\r\n",
            OK,
            OK,
        ),
        (
            "a body until the close becomes chunks",
            GET,
            GET,
            "HTTP/1.1 200 OK\r\n\r\nall$",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nall\r\n0\r\n\r\n",
        ),
        (
            "an HTTP/1.0 answer",
            GET,
            GET,
            "HTTP/1.0 200 OK\r\nServer: old\r\nContent-Length: 2\r\n\r\nok$",
            "HTTP/1.1 200 OK\r\nServer: old\r\ncontent-length: 2\r\n\r\nok",
        ),
        (
            "http/1.0 with keep-alive",
            "GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n",
            "GET / HTTP/1.1\r\nhost: \r\n\r\n",
            OK,
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: keep-alive\r\n\r\nok",
        ),
    ];
    run(async {
        for (name, request, at_app, answer, at_source) in cases {
            println!("{name}");
            let mut bench = Bench::plain().await;
            bench.send(request).await;
            let mut app = bench.app().await;
            app.expect(at_app).await;
            app.send(answer.strip_suffix('$').unwrap_or(answer)).await;
            let closes = answer.ends_with('$');
            if closes {
                app.0.shutdown().await.unwrap();
            }
            bench.expect(at_source).await;
            assert_eq!(bench.end().await.fault, None);
            // The connection is good for another request.
            bench.send(GET).await;
            if closes {
                app = bench.app().await;
            }
            assert!(bench.apps.is_empty(), "{name}: the target's connection is used again");
            app.expect(GET).await;
            app.send(OK).await;
            bench.expect(OK).await;
        }
    });
}

/// What must be refused, with which status, and never reach an application.
const SMUGGLING: &[(&str, &str, u16)] = &[
    (
        "both lengths",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    (
        "two lengths",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        400,
    ),
    (
        "two equal lengths",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 5\r\n\r\nhello",
        400,
    ),
    (
        "a list of lengths",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5, 5\r\n\r\nhello",
        400,
    ),
    (
        "a signed length",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: +5\r\n\r\nhello",
        400,
    ),
    (
        "a hexadecimal length",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0x5\r\n\r\nhello",
        400,
    ),
    (
        "an empty length",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: \r\n\r\nhello",
        400,
    ),
    (
        "a huge length",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999999999\r\n\r\nhello",
        400,
    ),
    (
        "an unknown coding",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n",
        400,
    ),
    (
        "chunked not last",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, gzip\r\n\r\n",
        400,
    ),
    (
        "chunked twice",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    (
        "chunked twice in two fields",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    (
        "a coding before chunked",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        501,
    ),
    (
        "a quoted coding",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: \"chunked\"\r\n\r\n0\r\n\r\n",
        400,
    ),
    (
        "an empty coding",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding:\r\n\r\n0\r\n\r\n",
        400,
    ),
    (
        "a coding in HTTP/1.0",
        "POST / HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    (
        "a vertical tab before the coding",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    (
        "space before the colon",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding : chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    (
        "space before the first field",
        "GET / HTTP/1.1\r\n host: a\r\n\r\n",
        400,
    ),
    ("obs-fold", "GET / HTTP/1.1\r\nhost: a\r\nx: 1\r\n 2\r\n\r\n", 400),
    (
        "obs-fold with a tab",
        "GET / HTTP/1.1\r\nhost: a\r\nx: 1\r\n\t2\r\n\r\n",
        400,
    ),
    (
        "a bare LF after the request line",
        "GET / HTTP/1.1\nhost: a\r\n\r\n",
        400,
    ),
    (
        "a bare LF after a field",
        "GET / HTTP/1.1\r\nhost: a\nx: 1\r\n\r\n",
        400,
    ),
    ("bare LFs only", "GET / HTTP/1.1\nhost: a\n\n", 400),
    ("a bare LF at the end", "GET / HTTP/1.1\r\nhost: a\r\n\n", 400),
    (
        "a bare CR in a value",
        "GET / HTTP/1.1\r\nhost: a\r\nx: 1\r2\r\n\r\n",
        400,
    ),
    (
        "a bare CR in the request line",
        "GET /\r HTTP/1.1\r\nhost: a\r\n\r\n",
        400,
    ),
    ("a NUL in a value", "GET / HTTP/1.1\r\nhost: a\r\nx: \0\r\n\r\n", 400),
    (
        "a control in a value",
        "GET / HTTP/1.1\r\nhost: a\r\nx: \x01\r\n\r\n",
        400,
    ),
    ("a bad name", "GET / HTTP/1.1\r\nhost: a\r\nx(y): 1\r\n\r\n", 400),
    ("an empty name", "GET / HTTP/1.1\r\nhost: a\r\n: 1\r\n\r\n", 400),
    ("a name without colon", "GET / HTTP/1.1\r\nhost: a\r\nx\r\n\r\n", 400),
    ("a bad method", "G(T / HTTP/1.1\r\nhost: a\r\n\r\n", 400),
    ("no target", "GET HTTP/1.1\r\nhost: a\r\n\r\n", 400),
    ("two spaces", "GET  / HTTP/1.1\r\nhost: a\r\n\r\n", 400),
    ("a space in the target", "GET /a b HTTP/1.1\r\nhost: a\r\n\r\n", 400),
    ("a tab for a space", "GET\t/ HTTP/1.1\r\nhost: a\r\n\r\n", 400),
    ("a relative target", "GET a HTTP/1.1\r\nhost: a\r\n\r\n", 400),
    ("a fragment", "GET /a#b HTTP/1.1\r\nhost: a\r\n\r\n", 400),
    (
        "a byte outside ASCII in the target",
        "GET /\u{e9} HTTP/1.1\r\nhost: a\r\n\r\n",
        400,
    ),
    ("a star that is no OPTIONS", "GET * HTTP/1.1\r\nhost: a\r\n\r\n", 400),
    (
        "user information in the target",
        "GET http://a@b/ HTTP/1.1\r\nhost: a\r\n\r\n",
        400,
    ),
    ("another scheme", "GET ftp://b/ HTTP/1.1\r\nhost: a\r\n\r\n", 400),
    ("no host", "GET / HTTP/1.1\r\nx: y\r\n\r\n", 400),
    ("two hosts", "GET / HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\n", 400),
    (
        "two hosts in HTTP/1.0",
        "GET / HTTP/1.0\r\nhost: a\r\nhost: b\r\n\r\n",
        400,
    ),
    (
        "a host with user information",
        "GET / HTTP/1.1\r\nhost: a@b\r\n\r\n",
        400,
    ),
    ("a host with a path", "GET / HTTP/1.1\r\nhost: a/b\r\n\r\n", 400),
    ("a list of hosts", "GET / HTTP/1.1\r\nhost: a, b\r\n\r\n", 400),
    ("a host with a bad port", "GET / HTTP/1.1\r\nhost: a:b\r\n\r\n", 400),
    ("connect", "CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\n", 405),
    ("another version", "GET / HTTP/2.0\r\nhost: a\r\n\r\n", 505),
    ("an older version", "GET / HTTP/0.9\r\nhost: a\r\n\r\n", 505),
    ("nonsense for a version", "GET / FOO\r\nhost: a\r\n\r\n", 400),
    ("a lower-case version", "GET / http/1.1\r\nhost: a\r\n\r\n", 400),
    (
        "two empty lines before",
        "\r\n\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n",
        400,
    ),
    (
        "an empty line of a bare LF before",
        "\nGET / HTTP/1.1\r\nhost: a\r\n\r\n",
        400,
    ),
];

#[test]
fn what_could_be_read_in_two_ways_is_refused() {
    run(async {
        for (name, request, status) in SMUGGLING {
            println!("{name}");
            let mut bench = Bench::plain().await;
            // What follows must not be taken for another request either.
            bench
                .send(&format!("{request}GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n"))
                .await;
            bench.expect(&format!("HTTP/1.1 {status} ")).await;
            let mut rest = String::new();
            within(bench.source.read_to_string(&mut rest)).await.unwrap();
            assert!(rest.contains("connection: close\r\n"), "{name}: {rest}");
            assert_eq!(rest.matches("HTTP/1.1").count(), 0, "{name}: {rest}");
            assert!(bench.apps.is_empty(), "{name}: nothing is sent on");
            assert!(bench.handler.decided.borrow().is_empty(), "{name}: nothing is decided");
            drop(bench.source);
            assert!(within(bench.served).await.unwrap().is_err());
            let refused = bench.handler.refused.borrow();
            assert!(
                matches!(refused.as_slice(), [(_, Some(sent))] if sent.as_u16() == *status),
                "{name}: {refused:?}"
            );
        }
    });
}

#[test]
fn chunks_that_could_be_read_in_two_ways_are_refused() {
    let cases = [
        ("no size", "\r\nabc\r\n0\r\n\r\n"),
        ("a signed size", "+3\r\nabc\r\n0\r\n\r\n"),
        ("a prefixed size", "0x3\r\nabc\r\n0\r\n\r\n"),
        ("a size that overflows", "fffffffffffffffff\r\nabc\r\n0\r\n\r\n"),
        ("space before the size", " 3\r\nabc\r\n0\r\n\r\n"),
        ("space after the size", "3 \r\nabc\r\n0\r\n\r\n"),
        ("a bare LF after the size", "3\nabc\r\n0\r\n\r\n"),
        ("a bare CR after the size", "3\rabc\r\n0\r\n\r\n"),
        ("a bare LF in an extension", "3;a\nb\r\nabc\r\n0\r\n\r\n"),
        ("a bare CR in an extension", "3;a\rb\r\nabc\r\n0\r\n\r\n"),
        ("data longer than its size", "3\r\nabcd\r\n0\r\n\r\n"),
        ("a bare LF after the data", "3\r\nabc\n0\r\n\r\n"),
        ("a bare LF at the end", "3\r\nabc\r\n0\r\n\n"),
        ("a bad trailer", "0\r\nx y: 1\r\n\r\n"),
        ("a bare LF after a trailer", "0\r\nx: 1\n\r\n"),
        ("an obs-fold in a trailer", "0\r\nx: 1\r\n 2\r\n\r\n"),
    ];
    run(async {
        for (name, body) in cases {
            println!("{name}");
            let mut bench = Bench::plain().await;
            let head = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
            bench.send(&format!("{head}{body}")).await;
            bench.expect("HTTP/1.1 400 ").await;
            assert!(bench.apps.is_empty(), "{name}: nothing is sent on");
            // The same when it comes after the head was sent on.
            let mut bench = Bench::plain().await;
            bench.send(head).await;
            let mut app = bench.app().await;
            app.expect(head).await;
            bench.send(body).await;
            bench.expect("HTTP/1.1 400 ").await;
            let end = bench.end().await;
            assert_eq!(end.fault, Some(Fault::Request(super::RequestDefect::Chunk)), "{name}");
            let mut rest = Vec::new();
            let _ = within(app.0.read_to_end(&mut rest)).await;
            assert!(
                !String::from_utf8_lossy(&rest).contains("0\r\n\r\n"),
                "{name}: the body must not look whole"
            );
        }
    });
}

#[test]
fn responses_that_could_be_read_in_two_ways_are_refused() {
    let cases = [
        ("not HTTP", "SSH-2.0-x\r\n\r\n"),
        (
            "both lengths",
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        (
            "two lengths",
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
        ),
        ("a bad length", "HTTP/1.1 200 OK\r\ncontent-length: five\r\n\r\nhello"),
        (
            "an unknown coding",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
        ),
        (
            "a coding before chunked",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        ),
        (
            "a coding in HTTP/1.0",
            "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        ("bare LFs", "HTTP/1.1 200 OK\ncontent-length: 0\n\n"),
        ("obs-fold", "HTTP/1.1 200 OK\r\nx: 1\r\n 2\r\ncontent-length: 0\r\n\r\n"),
        (
            "space before the colon",
            "HTTP/1.1 200 OK\r\ncontent-length : 0\r\n\r\n",
        ),
        ("a status of two digits", "HTTP/1.1 20 OK\r\ncontent-length: 0\r\n\r\n"),
        ("a status below 100", "HTTP/1.1 099 OK\r\ncontent-length: 0\r\n\r\n"),
        (
            "101 to no upgrade",
            "HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
        ),
        (
            "a bad chunk in the first bytes",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        ),
    ];
    run(async {
        for (name, answer) in cases {
            println!("{name}");
            let mut bench = Bench::plain().await;
            bench.send(GET).await;
            let mut app = bench.app().await;
            app.expect(GET).await;
            app.send(answer).await;
            bench.expect("HTTP/1.1 502 ").await;
            let end = bench.end().await;
            assert!(matches!(end.fault, Some(Fault::Response(_))), "{name}: {end:?}");
            assert_eq!(end.status, Some(StatusCode::BAD_GATEWAY), "{name}");
            app.expect_closed().await;
            assert!(
                bench.handler.pool.borrow().is_empty(),
                "{name}: such a connection is not kept"
            );
        }
    });
}

#[test]
fn a_refusal_arrives_however_much_is_sent_behind() {
    run(async {
        let mut bench = Bench::plain().await;
        let (mut read, mut write) = bench.source.split();
        let send = async {
            let junk = vec![b'x'; 768 * 1024];
            write
                .write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: x\r\n\r\n")
                .await
                .unwrap();
            let _ = write.write_all(&junk).await;
        };
        let receive = async {
            let mut answer = String::new();
            read.read_to_string(&mut answer).await.map(|_| answer)
        };
        let ((), answer) = within(async { tokio::join!(send, receive) }).await;
        assert!(answer.unwrap().starts_with("HTTP/1.1 400 "));
    });
}

#[test]
fn sizes_are_bounded() {
    let cases = [
        (
            "a long request line",
            format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", "a".repeat(9_000)),
            414,
        ),
        ("an endless request line", "a".repeat(9_000), 414),
        (
            "a long field",
            format!("GET / HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", "a".repeat(40_000)),
            431,
        ),
        (
            "an endless field",
            format!("GET / HTTP/1.1\r\nhost: a\r\nx: {}", "a".repeat(40_000)),
            431,
        ),
        (
            "many fields",
            format!("GET / HTTP/1.1\r\nhost: a\r\n{}\r\n", "x: y\r\n".repeat(101)),
            431,
        ),
    ];
    run(async {
        for (name, request, status) in cases {
            println!("{name}");
            let mut bench = Bench::plain().await;
            bench.send(&request).await;
            bench.expect(&format!("HTTP/1.1 {status} ")).await;
        }
        // The largest that is allowed goes through.
        let mut bench = Bench::plain().await;
        let request = format!("GET / HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", "a".repeat(30_000));
        bench.send(&request).await;
        bench.app().await.expect(&request).await;
        // Responses have the same bound.
        let mut bench = Bench::plain().await;
        bench.send(GET).await;
        let mut app = bench.app().await;
        app.send(&format!("HTTP/1.1 200 OK\r\nx: {}", "a".repeat(40_000))).await;
        bench.expect("HTTP/1.1 502 ").await;
    });
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    run(async {
        let mut bench = Bench::plain().await;
        let post = "POST /2 HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc";
        bench.send(&format!("{GET}{post}{GET}")).await;
        let mut app = bench.app().await;
        for (request, body) in [(GET, "one"), (post, "two"), (GET, "six")] {
            app.expect(request).await;
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n{body}");
            app.send(&answer).await;
            bench.expect(&answer).await;
            assert_eq!(bench.end().await.response_bytes, 3);
        }
        assert!(bench.apps.is_empty(), "one connection served them all");
    });
}

#[test]
fn a_request_may_come_byte_by_byte() {
    run(async {
        let mut bench = Bench::plain().await;
        bench.source.set_nodelay(true).unwrap();
        let request = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
        for byte in request.chars() {
            bench.send(&byte.to_string()).await;
            tokio::task::yield_now().await;
        }
        let mut app = bench.app().await;
        let head = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
        app.expect(head).await;
        let mut body = String::new();
        while !body.ends_with("0\r\n\r\n") {
            let mut buffer = [0; 64];
            let count = within(app.0.read(&mut buffer)).await.unwrap();
            assert!(count > 0);
            body.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
        }
        app.send("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n").await;
        bench.expect("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n").await;
        app.send("x").await;
        bench.expect("x").await;
        assert_eq!(bench.end().await.request_bytes, 3);
    });
}

#[test]
fn expect_continue_is_passed_on() {
    run(async {
        let mut bench = Bench::plain().await;
        let head = "PUT / HTTP/1.1\r\nhost: a\r\nExpect: 100-continue\r\ncontent-length: 4\r\n\r\n";
        bench.send(head).await;
        let mut app = bench.app().await;
        app.expect(head).await;
        app.send("HTTP/1.1 100 Continue\r\n\r\n").await;
        bench.expect("HTTP/1.1 100 Continue\r\n\r\n").await;
        bench.send("body").await;
        app.expect("body").await;
        app.send(OK).await;
        bench.expect(OK).await;
        assert_eq!(bench.end().await.fault, None);

        // A final answer in place of the 100: nobody knows whether the body comes, so the connection closes.
        let mut bench = Bench::plain().await;
        bench.send(head).await;
        let mut app = bench.app().await;
        app.expect(head).await;
        app.send("HTTP/1.1 417 No\r\ncontent-length: 0\r\n\r\n").await;
        bench
            .expect("HTTP/1.1 417 No\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            .await;
        bench.expect_closed().await;
    });
}

#[test]
fn an_early_answer_arrives_while_the_body_is_sent() {
    run(async {
        // The rest of the body comes: the connection lives on.
        let mut bench = Bench::plain().await;
        let head = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 6\r\n\r\n";
        bench.send(&format!("{head}abc")).await;
        let mut app = bench.app().await;
        app.expect(&format!("{head}abc")).await;
        app.send(OK).await;
        bench.expect(OK).await;
        bench.send(&format!("def{GET}")).await;
        app.expect(&format!("def{GET}")).await;
        app.send(OK).await;
        bench.expect(OK).await;

        // The source leaves it away: it has its answer, and the exchange is no failure.
        let mut bench = Bench::plain().await;
        bench.send(&format!("{head}abc")).await;
        let mut app = bench.app().await;
        app.expect(&format!("{head}abc")).await;
        app.send(OK).await;
        bench.expect(OK).await;
        bench.source.shutdown().await.unwrap();
        let end = bench.end().await;
        assert_eq!((end.fault, end.status), (None, Some(StatusCode::OK)));

        // It does not: the answer stays readable, then the connection closes.
        let limits = Limits {
            linger: Duration::from_millis(50),
            ..Limits::default()
        };
        let mut bench = Bench::new(limits, Vec::new(), Box::new(|_, _| Ok(Forward::default()))).await;
        bench.send(&format!("{head}abc")).await;
        let mut app = bench.app().await;
        app.expect(&format!("{head}abc")).await;
        app.send("HTTP/1.1 413 No\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            .await;
        drop(app);
        bench.expect("HTTP/1.1 413 No\r\ncontent-length: 0\r\n\r\n").await;
        bench.expect_closed().await;
    });
}

#[test]
fn upgrades_become_relays() {
    run(async {
        let mut bench = Bench::plain().await;
        bench.send("GET /ws HTTP/1.1\r\nhost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nsec-websocket-key: k\r\n\r\nearly").await;
        let mut app = bench.app().await;
        app.expect(
            "GET /ws HTTP/1.1\r\nhost: a\r\nsec-websocket-key: k\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        )
        .await;
        app.send("HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: x\r\n\r\nhello").await;
        bench.expect("HTTP/1.1 101 Switching Protocols\r\nsec-websocket-accept: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nhello").await;
        app.expect("early").await;
        bench.send("ping").await;
        app.expect("ping").await;
        app.send("pong").await;
        bench.expect("pong").await;
        bench.source.shutdown().await.unwrap();
        app.expect_closed().await;
        drop(app);
        let end = bench.end().await;
        assert!(
            end.upgraded && end.status == Some(StatusCode::SWITCHING_PROTOCOLS),
            "{end:?}"
        );
        assert_eq!((end.request_bytes, end.response_bytes), (9, 9));

        // An application that does not want to: plain HTTP goes on.
        let mut bench = Bench::plain().await;
        bench
            .send("GET /ws HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")
            .await;
        let mut app = bench.app().await;
        app.expect("GET /ws HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")
            .await;
        app.send("HTTP/1.1 400 No\r\ncontent-length: 0\r\n\r\n").await;
        bench.expect("HTTP/1.1 400 No\r\ncontent-length: 0\r\n\r\n").await;
        bench.send(GET).await;
        app.expect(GET).await;
    });
}

#[test]
fn http_1_0_is_answered_in_its_way() {
    run(async {
        for (answer, at_source) in [
            (
                OK,
                "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok",
            ),
            (
                "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
                "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nok",
            ),
        ] {
            let mut bench = Bench::plain().await;
            bench.send("GET / HTTP/1.0\r\nhost: a\r\n\r\n").await;
            let mut app = bench.app().await;
            app.expect(GET).await;
            app.send(answer).await;
            bench.expect(at_source).await;
            bench.expect_closed().await;
        }
    });
}

#[test]
fn connection_close_is_obeyed_on_either_side() {
    run(async {
        let mut bench = Bench::plain().await;
        bench
            .send("GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            .await;
        let mut app = bench.app().await;
        app.expect(GET).await;
        app.send(OK).await;
        bench
            .expect("HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")
            .await;
        let handler = bench.expect_closed().await;
        assert_eq!(handler.pool.borrow().len(), 1, "the target's connection is kept");

        let mut bench = Bench::plain().await;
        bench.send(GET).await;
        let mut app = bench.app().await;
        app.expect(GET).await;
        app.send("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok")
            .await;
        bench.expect(OK).await;
        bench.send(GET).await;
        bench.app().await.expect(GET).await;
    });
}

#[test]
fn a_dead_pooled_connection_is_replaced_when_that_is_safe() {
    run(async {
        // Closed while idle: nothing was sent, so that any request may go to another.
        let mut bench = Bench::plain().await;
        let post = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc";
        for request in [GET, post] {
            bench.send(request).await;
            let mut app = bench.app().await;
            app.expect(request).await;
            app.send(OK).await;
            bench.expect(OK).await;
            drop(app);
            // The engine must see the close before it asks: wait until it is there.
            let pooled = bench.handler.pool.borrow_mut().pop_front().unwrap();
            within(pooled.tcp().readable()).await.unwrap();
            bench.handler.pool.borrow_mut().push_front(pooled);
        }
        bench.send(GET).await;
        let mut app = bench.app().await;
        app.expect(GET).await;
        app.send(OK).await;
        bench.expect(OK).await;

        // Closed after the request was sent: safe for GET, not for POST.
        bench.send(GET).await;
        app.expect(GET).await;
        drop(app);
        let mut app = bench.app().await;
        app.expect(GET).await;
        app.send(OK).await;
        bench.expect(OK).await;
        bench.send(post).await;
        app.expect(post).await;
        drop(app);
        bench.expect("HTTP/1.1 503 ").await;
        assert!(bench.apps.is_empty(), "a POST is not sent twice");
    });
}

#[test]
fn a_fresh_connection_that_dies_is_a_503() {
    run(async {
        let mut bench = Bench::plain().await;
        bench.send(GET).await;
        drop(bench.app().await);
        bench.expect("HTTP/1.1 503 ").await;
        let end = bench.end().await;
        assert_eq!((end.fault, end.replied), (Some(Fault::TargetClosed), true));
        assert!(bench.apps.is_empty());
    });
}

#[test]
fn the_handler_may_ask_for_another_attempt() {
    run(async {
        let retry_on = vec![StatusCode::SERVICE_UNAVAILABLE];
        let mut bench = Bench::new(Limits::default(), retry_on, Box::new(|_, _| Ok(Forward::default()))).await;
        let post = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc";
        let bad = "HTTP/1.1 503 No\r\ncontent-length: 3\r\n\r\nbad";
        bench.send(post).await;
        let mut first = bench.app().await;
        first.expect(post).await;
        first.send(bad).await;
        let mut second = bench.app().await;
        second.expect(post).await;
        second.send(OK).await;
        bench.expect(OK).await;
        // A body that went by cannot be sent again.
        let head = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 6\r\n\r\n";
        bench.send(&format!("{head}abc")).await;
        second.expect(&format!("{head}abc")).await;
        bench.send("def").await;
        second.expect("def").await;
        second.send(bad).await;
        bench.expect(bad).await;
        assert!(bench.apps.is_empty());
        // Only once: then the answer is the source's.
        bench.send(GET).await;
        second.expect(GET).await;
        second.send(bad).await;
        let mut third = bench.app().await;
        third.expect(GET).await;
        third.send(bad).await;
        bench.expect(bad).await;
    });
}

#[test]
fn an_answer_that_nobody_asked_for_reaches_nobody() {
    let evil = "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil";
    run(async move {
        // Right behind the answer.
        for (request, answer) in [
            (GET, OK),
            (
                GET,
                "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
            ),
            (GET, "HTTP/1.1 204 No Content\r\n\r\n"),
            (
                "HEAD / HTTP/1.1\r\nhost: a\r\n\r\n",
                "HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n",
            ),
        ] {
            let mut bench = Bench::plain().await;
            bench.send(request).await;
            let mut app = bench.app().await;
            app.expect(request).await;
            app.send(&format!("{answer}{evil}")).await;
            bench.expect(answer).await;
            bench.end().await;
            assert!(bench.handler.pool.borrow().is_empty(), "{answer}");
            bench.send(GET).await;
            let mut app = bench.app().await;
            app.expect(GET).await;
            app.send(OK).await;
            bench.expect(OK).await;
        }
        // Behind a body that came after its head.
        let mut bench = Bench::plain().await;
        bench.send(GET).await;
        let mut app = bench.app().await;
        app.expect(GET).await;
        let (head, body) = OK.split_at(OK.len() - 2);
        app.send(head).await;
        bench.expect(head).await;
        app.send(&format!("{body}{evil}")).await;
        bench.expect(body).await;
        bench.end().await;
        assert!(bench.handler.pool.borrow().is_empty());
        // While the connection is idle.
        let mut bench = Bench::plain().await;
        bench.send(GET).await;
        let mut app = bench.app().await;
        app.expect(GET).await;
        app.send(OK).await;
        bench.expect(OK).await;
        bench.end().await;
        app.send(evil).await;
        let pooled = bench.handler.pool.borrow_mut().pop_front().unwrap();
        within(pooled.tcp().readable()).await.unwrap();
        bench.handler.pool.borrow_mut().push_front(pooled);
        bench.send(GET).await;
        let mut app = bench.app().await;
        app.expect(GET).await;
        app.send(OK).await;
        bench.expect(OK).await;
    });
}

#[test]
fn a_cut_response_does_not_look_whole() {
    run(async {
        for answer in [
            "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        ] {
            let mut bench = Bench::plain().await;
            bench.send(GET).await;
            let mut app = bench.app().await;
            app.expect(GET).await;
            app.send(answer).await;
            drop(app);
            let mut read = Vec::new();
            let ended = within(bench.source.read_to_end(&mut read)).await;
            let text = String::from_utf8_lossy(&read);
            assert!(ended.is_err() || !text.ends_with("0\r\n\r\n"), "{text}");
            let end = bench.end().await;
            assert_eq!(
                (end.fault, end.status),
                (Some(Fault::ResponseCut), Some(StatusCode::OK))
            );
        }
    });
}

#[test]
fn a_source_that_goes_away_takes_its_request_along() {
    run(async {
        // Within its body: the application must not take the request for whole.
        let mut bench = Bench::plain().await;
        let head = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 6\r\n\r\n";
        bench.send(&format!("{head}abc")).await;
        let mut app = bench.app().await;
        app.expect(&format!("{head}abc")).await;
        bench.source.shutdown().await.unwrap();
        app.expect_closed().await;
        assert_eq!(bench.end().await.fault, Some(Fault::SourceClosed));

        // After its request: the application sees the end and may still answer.
        let mut bench = Bench::plain().await;
        bench.send(GET).await;
        bench.source.shutdown().await.unwrap();
        let mut app = bench.app().await;
        app.expect(GET).await;
        app.expect_closed().await;
        app.send(OK).await;
        let mut answer = String::new();
        within(bench.source.read_to_string(&mut answer)).await.unwrap();
        assert!(answer.ends_with("\r\nconnection: close\r\n\r\nok"), "{answer}");
        assert_eq!(bench.end().await.fault, None);

        // With a reset: the application's connection ends.
        let mut bench = Bench::plain().await;
        bench.send(GET).await;
        let mut app = bench.app().await;
        app.expect(GET).await;
        socket2::SockRef::from(&bench.source)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(bench.source);
        app.expect_closed().await;
        let end = within(bench.ends.recv()).await.unwrap();
        assert_eq!(end.fault, Some(Fault::SourceClosed));
    });
}

#[test]
fn time_limits_hold() {
    let short = Duration::from_millis(400);
    run(async move {
        // A request's time, before the response began.
        let forward = move || Forward {
            request_timeout: Some(short),
            ..Forward::default()
        };
        let mut bench = Bench::new(Limits::default(), Vec::new(), Box::new(move |_, _| Ok(forward()))).await;
        bench.send(GET).await;
        let mut app = bench.app().await;
        app.expect(GET).await;
        bench.expect("HTTP/1.1 504 ").await;
        assert_eq!(bench.end().await.fault, Some(Fault::RequestTimeout));
        app.expect_closed().await;

        // And within it.
        let mut bench = Bench::new(Limits::default(), Vec::new(), Box::new(move |_, _| Ok(forward()))).await;
        bench.send(GET).await;
        let mut app = bench.app().await;
        app.expect(GET).await;
        app.send("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf").await;
        bench.expect("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf").await;
        let end = bench.end().await;
        assert_eq!(
            (end.fault, end.status),
            (Some(Fault::RequestTimeout), Some(StatusCode::OK))
        );

        // An attempt's time leads to another attempt, which may take its own.
        let forward = move || Forward {
            attempt_timeout: Some(short),
            ..Forward::default()
        };
        let retry_on = vec![StatusCode::GATEWAY_TIMEOUT];
        let mut bench = Bench::new(Limits::default(), retry_on, Box::new(move |_, _| Ok(forward()))).await;
        bench.send(GET).await;
        let _first = bench.app().await;
        let mut second = bench.app().await;
        second.expect(GET).await;
        second.send(OK).await;
        bench.expect(OK).await;

        // A head that does not come to its end, and a connection that asks nothing.
        let limits = Limits {
            head_timeout: short,
            idle_timeout: short,
            ..Limits::default()
        };
        let mut bench = Bench::new(limits, Vec::new(), Box::new(|_, _| Ok(Forward::default()))).await;
        bench.send("GET / HTTP/1.1\r\nhost").await;
        bench.expect("HTTP/1.1 408 ").await;
        let bench = Bench::new(limits, Vec::new(), Box::new(|_, _| Ok(Forward::default()))).await;
        bench.expect_closed().await;
    });
}

#[test]
fn copies_are_the_requests_as_they_came() {
    let long = "x".repeat(COPY_BYTES_MAX + 1);
    let long = format!(
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{long}",
        long.len()
    );
    // The pieces that are sent, and whether a copy is given.
    let cases: &[(&[&str], bool)] = &[
        (&[GET], true),
        (&["POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"], true),
        (
            &[
                "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhel",
                "lo",
                "hello",
            ],
            true,
        ),
        (
            &[
                "POST / HTTP/1.1\r\nhost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nab",
                "c\r\n0\r\nx-t: 1\r\n\r\n",
            ],
            true,
        ),
        (&[&long], false),
    ];
    run(async {
        for (pieces, given) in cases {
            let (copies_in, mut copies) = mpsc::channel(8);
            let decide: Decide = Box::new(move |_, _| {
                let copies = copies_in.clone();
                let copy = CopyTo::new(move |copy| match copy {
                    RequestCopy::Http1(bytes) => copies.try_send(bytes).unwrap(),
                    RequestCopy::Http2(_) => panic!("a stream"),
                });
                Ok(Forward {
                    copy: Some(copy),
                    ..Forward::default()
                })
            });
            let mut bench = Bench::new(Limits::default(), vec![StatusCode::BAD_GATEWAY], decide).await;
            let mut app = None;
            for piece in *pieces {
                bench.send(piece).await;
                if app.is_none() {
                    app = Some(bench.app().await);
                }
            }
            let mut app = app.unwrap();
            let whole = pieces.concat();
            // Whatever the application makes of it, it reads all of it before it answers.
            let mut read = Vec::new();
            let end = if whole.contains("chunked") {
                "\r\n\r\n"
            } else {
                &whole[whole.len() - 4..]
            };
            while !read.ends_with(end.as_bytes()) || read.len() < whole.len() / 2 {
                let mut buffer = vec![0; 64 * 1024];
                let count = within(app.0.read(&mut buffer)).await.unwrap();
                assert_ne!(count, 0, "{}", String::from_utf8_lossy(&read));
                read.extend_from_slice(&buffer[..count]);
            }
            app.send(OK).await;
            bench.expect(OK).await;
            bench.end().await;
            let copy = copies.try_recv().ok();
            let text = copy.as_ref().map(|copy| String::from_utf8_lossy(copy));
            assert_eq!(text.as_deref(), given.then_some(&*whole), "{pieces:?}");
            assert!(copies.try_recv().is_err(), "two copies of {pieces:?}");
        }
    });
}

#[test]
fn replies_keep_or_close_the_connection() {
    let decide = || -> Decide {
        Box::new(|request, _| match request.path() {
            "/no" => Err(Reply::new(
                StatusCode::TOO_MANY_REQUESTS,
                GrpcStatus::ResourceExhausted,
                "slow down",
            )
            .with_header("retry-after", "3")),
            "/abort" => Err(Reply::abort()),
            _ => Ok(Forward::default()),
        })
    };
    let head = "HTTP/1.1 429 Too Many Requests\r\nretry-after: 3\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: 9\r\n";
    run(async move {
        let mut bench = Bench::new(Limits::default(), Vec::new(), decide()).await;
        for _ in 0..2 {
            bench
                .send("POST /no HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc")
                .await;
            bench.expect(&format!("{head}\r\nslow down")).await;
        }
        bench.send("HEAD /no HTTP/1.1\r\nhost: a\r\n\r\n").await;
        bench.expect(&format!("{head}\r\n")).await;
        let end = bench.end().await;
        assert!(end.replied && end.status == Some(StatusCode::TOO_MANY_REQUESTS));
        // A body that is not there yet is not waited for.
        bench
            .send("POST /no HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\n")
            .await;
        bench.expect(&format!("{head}connection: close\r\n\r\nslow down")).await;
        let handler = bench.expect_closed().await;
        assert_eq!(handler.decided.borrow().len(), 4);

        let mut bench = Bench::new(Limits::default(), Vec::new(), decide()).await;
        bench.send("GET /abort HTTP/1.1\r\nhost: a\r\n\r\n").await;
        let mut read = Vec::new();
        assert!(within(bench.source.read_to_end(&mut read)).await.is_err(), "a reset");
    });
}

#[test]
fn edits_are_applied() {
    use crate::l7::headers::{ClientCert, HeaderChanges, Standard, TraceParent};
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let forward = move |request: &dyn Request| {
        let mut standard = Standard::at_source(request, [10, 0, 0, 7].into());
        assert!(standard.request_id.is_none() && standard.trace.is_some());
        standard.trace = TraceParent::parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        standard.client_cert = ClientCert::Set("By=spiffe://b;URI=spiffe://a".into());
        Forward {
            target: Some("/new path?q".to_owned()),
            authority: Some("other".to_owned()),
            request_headers: HeaderChanges {
                set: vec![
                    pair("x-set", "new"),
                    pair("x-bad", "a\r\nb"),
                    pair("content-length", "9"),
                ],
                add: vec![pair("x-add", "2")],
                remove: vec!["x-gone".to_owned()],
            },
            response_headers: HeaderChanges {
                set: vec![pair("server", "mesh")],
                add: vec![],
                remove: vec!["x-secret".to_owned()],
            },
            standard,
            ..Forward::default()
        }
    };
    run(async move {
        let decide: Decide = Box::new(move |request, _| Ok(forward(request)));
        let mut bench = Bench::new(Limits::default(), Vec::new(), decide).await;
        bench
            .send("GET /old HTTP/1.1\r\nhost: a\r\nX-Set: old\r\nx-add: 1\r\nX-Gone: 1\r\nx-forwarded-for: 1.1.1.1\r\nx-request-id: id\r\ntraceparent: junk\r\ntracestate: t\r\nX-Forwarded-For: 2.2.2.2\r\nx-forwarded-client-cert: me\r\n\r\n")
            .await;
        let mut app = bench.app().await;
        app.expect("GET /new%20path?q HTTP/1.1\r\nhost: other\r\nx-add: 1\r\nx-request-id: id\r\nx-forwarded-for: 1.1.1.1, 2.2.2.2, 10.0.0.7\r\ntraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\nx-forwarded-client-cert: By=spiffe://b;URI=spiffe://a\r\nx-set: new\r\nx-add: 2\r\n\r\n").await;
        app.send("HTTP/1.1 200 OK\r\nServer: app\r\nx-secret: 1\r\ncontent-length: 0\r\n\r\n")
            .await;
        bench
            .expect("HTTP/1.1 200 OK\r\nserver: mesh\r\ncontent-length: 0\r\n\r\n")
            .await;
    });
}

#[test]
fn draining_ends_idle_connections_and_lets_requests_finish() {
    run(async {
        let mut bench = Bench::plain().await;
        bench.send(GET).await;
        let mut app = bench.app().await;
        app.expect(GET).await;
        bench.drain.take().unwrap().send(Duration::ZERO).unwrap();
        app.send(OK).await;
        bench
            .expect("HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")
            .await;
        bench.expect_closed().await;

        let mut bench = Bench::plain().await;
        bench.drain.take().unwrap().send(Duration::ZERO).unwrap();
        bench.expect_closed().await;

        // One that is kept may send one more request, and is told that it was the last.
        let mut bench = Bench::plain().await;
        bench.drain.take().unwrap().send(Duration::from_secs(60)).unwrap();
        tokio::task::yield_now().await;
        bench.send(GET).await;
        let mut app = bench.app().await;
        app.expect(GET).await;
        app.send(OK).await;
        bench
            .expect("HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")
            .await;
        bench.expect_closed().await;
    });
}

#[test]
fn large_bodies_pass_whole_and_with_back_pressure() {
    const BYTES: usize = 8 * 1024 * 1024;
    run(async {
        for chunked in [false, true] {
            let mut bench = Bench::plain().await;
            let framing = if chunked {
                "transfer-encoding: chunked".to_owned()
            } else {
                format!("content-length: {BYTES}")
            };
            let body: Vec<u8> = (0..BYTES).map(|i| (i % 251) as u8).collect();
            let mut coded = Vec::new();
            for piece in body.chunks(100_000) {
                if chunked {
                    super::chunk::write_chunk(piece, &mut coded);
                } else {
                    coded.extend_from_slice(piece);
                }
            }
            if chunked {
                coded.extend_from_slice(b"0\r\n\r\n");
            }
            let head = format!("POST / HTTP/1.1\r\nhost: a\r\n{framing}\r\n\r\n");
            let answer = format!("HTTP/1.1 200 OK\r\n{framing}\r\n\r\n");
            bench.send(&head).await;
            let mut app = bench.app().await;
            app.expect(&head).await;
            let started = Instant::now();
            let (mut source_read, mut source_write) = bench.source.split();
            let (mut app_read, mut app_write) = app.0.split();
            let receive = async |stream: &mut (dyn tokio::io::AsyncRead + Unpin)| {
                let (mut decoder, mut data) = (super::chunk::ChunkDecoder::default(), Vec::new());
                let mut buffer = vec![0; 50_000];
                while data.len() < BYTES || (chunked && !decoder.is_done()) {
                    let count = within(stream.read(&mut buffer)).await.unwrap();
                    assert!(count > 0);
                    let mut rest = &buffer[..count];
                    while chunked && !rest.is_empty() {
                        let step = decoder.step(rest).unwrap();
                        data.extend_from_slice(&rest[step.skipped..step.skipped + step.data]);
                        rest = &rest[step.skipped + step.data..];
                    }
                    data.extend_from_slice(rest);
                }
                data
            };
            // Both directions at once: neither may block the other.
            let source = async {
                source_write.write_all(&coded).await.unwrap();
            };
            let app = async {
                app_write.write_all(answer.as_bytes()).await.unwrap();
                app_write.write_all(&coded).await.unwrap();
            };
            let at_source = async {
                let mut head = vec![0; answer.len()];
                source_read.read_exact(&mut head).await.unwrap();
                assert_eq!(String::from_utf8(head).unwrap(), answer);
                receive(&mut source_read).await
            };
            let (_, _, at_app, at_source) =
                within(async { tokio::join!(source, app, receive(&mut app_read), at_source) }).await;
            assert!(at_app == body && at_source == body);
            println!("chunked {chunked}: {:?}", started.elapsed());
            let end = bench.end().await;
            assert_eq!((end.request_bytes, end.response_bytes), (BYTES as u64, BYTES as u64));
        }
        // A reader that does not read stops the writer.
        let mut bench = Bench::plain().await;
        bench.send(GET).await;
        let mut app = bench.app().await;
        app.expect(GET).await;
        app.send(&format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", 1u64 << 30))
            .await;
        let piece = vec![0; 1 << 20];
        let mut written = 0usize;
        while let Ok(count) = timeout(Duration::from_millis(300), app.0.write(&piece)).await {
            written += count.unwrap();
            assert!(written < 64 << 20, "the engine took all that came");
        }
    });
}

#[test]
fn a_connection_is_small() {
    run(async {
        let (_source, ours) = pair().await;
        let handler = Bench::plain().await.handler;
        let limits = Limits::default();
        let future = serve(transport(ours), handler, &limits, std::future::pending());
        let bytes = std::mem::size_of_val(&future);
        println!("{bytes} bytes");
        assert!(bytes <= 3 * 1024, "{bytes} bytes a connection");
    });
}
