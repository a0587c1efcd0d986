//! HTTP/2 end to end over real loopback sockets: a source, the engine, an application that does what the path says.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    rc::Rc,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use h2::{
    Reason, RecvStream, SendStream,
    client::{ResponseFuture, SendRequest},
};
use http::{HeaderMap, Request as HttpRequest, Response, StatusCode};
use mesh_api::request::Request;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, oneshot},
    task::{JoinHandle, LocalSet},
    time::timeout,
};

use super::serve;
use crate::{
    l7::{
        Attempt, Attempted, End, Facts, Fault, Forward, GrpcStatus, Handler, HeaderChanges, Limits, Reply, ServeError,
        Target, Verdict, headers::Standard,
    },
    transport::Transport,
};

const PATIENCE: Duration = Duration::from_secs(10);

async fn within<F: IntoFuture>(step: F) -> F::Output {
    timeout(PATIENCE, step).await.expect("took too long")
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dialed = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (dialed, listener.accept().await.unwrap().0)
}

fn run<F: Future<Output = ()>>(test: F) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, test);
}

/// What the application saw of a request.
#[derive(Debug)]
enum Seen {
    Head(Box<http::request::Parts>),
    Reset(Reason),
    BodyEnd(usize),
}

type Decide = Box<dyn Fn(&dyn Request, Facts) -> Result<Forward, Reply>>;

struct Scripted {
    decide: Decide,
    retry: bool,
    seen: mpsc::Sender<Seen>,
    target: RefCell<Option<SendRequest<Bytes>>>,
    connections: Cell<u32>,
    ends: mpsc::Sender<End>,
    decided: Cell<u32>,
    refused: RefCell<Vec<Fault>>,
}

impl Handler for Scripted {
    type Source = Transport;
    type Target = Transport;
    type Exchange = ();

    async fn decide(&self, request: &dyn Request, facts: Facts) -> Verdict<()> {
        self.decided.set(self.decided.get() + 1);
        match (self.decide)(request, facts) {
            Ok(forward) => Verdict::Forward(forward, ()),
            Err(reply) => Verdict::Reply(reply, ()),
        }
    }

    async fn connect(&self, _: &mut (), _: Attempt) -> Result<Target<Transport>, Reply> {
        unreachable!("an HTTP/2 engine asks for HTTP/2")
    }

    async fn connect_h2(&self, _: &mut (), attempt: Attempt) -> Result<SendRequest<Bytes>, Reply> {
        if let Some(target) = self.target.borrow().clone().filter(|_| attempt == Attempt::First) {
            return Ok(target);
        }
        let number = self.connections.get();
        self.connections.set(number + 1);
        let (ours, theirs) = pair().await;
        tokio::task::spawn_local(application(theirs, self.seen.clone(), number));
        let (target, connection) = super::client_builder().handshake(ours).await.unwrap();
        tokio::task::spawn_local(connection);
        *self.target.borrow_mut() = Some(target.clone());
        Ok(target)
    }

    fn release(&self, _: &mut (), _: Transport) {}

    fn again(&self, _: &mut (), attempted: Attempted, retries: u32) -> bool {
        let failed = match attempted {
            Attempted::Status(status) | Attempted::Undelivered(status) => status == StatusCode::SERVICE_UNAVAILABLE,
            Attempted::Failed(_) => true,
        };
        self.retry && failed && retries < 1
    }

    async fn relay(&self, _: &mut (), _: Transport, _: Transport) -> (u64, u64) {
        unreachable!("HTTP/2 has no upgrades")
    }

    fn finish(&self, _: (), end: End) {
        let _ = self.ends.try_send(end);
    }

    fn refused(&self, fault: Fault, _: Option<StatusCode>) {
        self.refused.borrow_mut().push(fault);
    }
}

/// Serves one connection; `number` tells the first from later ones.
async fn application(stream: TcpStream, seen: mpsc::Sender<Seen>, number: u32) {
    let mut connection = h2::server::handshake(stream).await.unwrap();
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        let seen = seen.clone();
        tokio::task::spawn_local(async move {
            let (parts, mut body) = request.into_parts();
            let path = parts.uri.path().to_owned();
            let _ = seen.try_send(Seen::Head(Box::new(parts)));
            let first = number == 0;
            match path.as_str() {
                "/refuse" if first => respond.send_reset(Reason::REFUSED_STREAM),
                "/reset" => respond.send_reset(Reason::ENHANCE_YOUR_CALM),
                "/busy" if first => {
                    let response = Response::builder().status(503).body(()).unwrap();
                    respond.send_response(response, true).unwrap();
                }
                "/busy-late" if first => {
                    let mut bytes = 0;
                    while bytes < 100_000 {
                        let data = body.data().await.unwrap().unwrap();
                        bytes += data.len();
                        body.flow_control().release_capacity(data.len()).unwrap();
                    }
                    let response = Response::builder().status(503).body(()).unwrap();
                    respond.send_response(response, true).unwrap();
                }
                "/silent" => {
                    let reason = std::future::poll_fn(|cx| respond.poll_reset(cx)).await.unwrap();
                    let _ = seen.try_send(Seen::Reset(reason));
                }
                "/cut" => {
                    let mut stream = respond.send_response(Response::new(()), false).unwrap();
                    stream.send_data("half".into(), false).unwrap();
                    // When the source has read that.
                    let _ = body.data().await;
                    stream.send_reset(Reason::INTERNAL_ERROR);
                }
                "/half" => {
                    let mut stream = respond.send_response(Response::new(()), false).unwrap();
                    stream.send_data("half".into(), false).unwrap();
                    let reason = std::future::poll_fn(|cx| stream.poll_reset(cx)).await.unwrap();
                    let _ = seen.try_send(Seen::Reset(reason));
                }
                "/flood" => {
                    let mut stream = respond.send_response(Response::new(()), false).unwrap();
                    let mut sent = 0;
                    let piece = Bytes::from(vec![0; 64 * 1024]);
                    // Until the source's window is the only thing that is waited for.
                    while let Ok(Ok(())) = timeout(
                        Duration::from_millis(300),
                        super::stream::send(&mut stream, piece.clone(), false),
                    )
                    .await
                    {
                        sent += piece.len();
                    }
                    let _ = seen.try_send(Seen::BodyEnd(sent));
                }
                // Echoes body and trailers.
                _ => {
                    let mut stream = respond
                        .send_response(Response::builder().header("x-app", &path).body(()).unwrap(), false)
                        .unwrap();
                    let mut bytes = 0;
                    while let Some(Ok(data)) = body.data().await {
                        bytes += data.len();
                        let _ = body.flow_control().release_capacity(data.len());
                        if super::stream::send(&mut stream, data, false).await.is_err() {
                            return;
                        }
                    }
                    let mut trailers = body.trailers().await.ok().flatten().unwrap_or_default();
                    trailers.insert("grpc-status", "0".parse().unwrap());
                    let _ = seen.try_send(Seen::BodyEnd(bytes));
                    let _ = stream.send_trailers(trailers);
                }
            }
        });
    }
}

struct Bench {
    source: SendRequest<Bytes>,
    seen: mpsc::Receiver<Seen>,
    ends: mpsc::Receiver<End>,
    handler: Rc<Scripted>,
    drain: Option<oneshot::Sender<()>>,
    served: JoinHandle<Result<(), ServeError>>,
    client: JoinHandle<Result<(), h2::Error>>,
}

impl Bench {
    async fn new(limits: Limits, retry: bool, decide: Decide) -> Bench {
        let (theirs, ours) = pair().await;
        let (seen_in, seen) = mpsc::channel(1024);
        let (ends_in, ends) = mpsc::channel(1024);
        let (drain, drained) = oneshot::channel::<()>();
        let handler = Rc::new(Scripted {
            decide,
            retry,
            seen: seen_in,
            target: RefCell::default(),
            connections: Cell::default(),
            ends: ends_in,
            decided: Cell::default(),
            refused: RefCell::default(),
        });
        let served = tokio::task::spawn_local({
            let handler = handler.clone();
            async move {
                let drained = async {
                    if drained.await.is_err() {
                        std::future::pending::<()>().await;
                    }
                };
                serve(Transport::from_tcp(ours, BytesMut::new()), handler, &limits, drained).await
            }
        });
        let (source, connection) = within(super::client_builder().handshake(theirs)).await.unwrap();
        let client = tokio::task::spawn_local(connection);
        Bench {
            source,
            seen,
            ends,
            handler,
            drain: Some(drain),
            served,
            client,
        }
    }

    async fn plain() -> Bench {
        Bench::new(Limits::default(), false, Box::new(|_, _| Ok(Forward::default()))).await
    }

    async fn open(&mut self, request: HttpRequest<()>, ends: bool) -> (ResponseFuture, SendStream<Bytes>) {
        let mut source = within(self.source.clone().ready()).await.unwrap();
        source.send_request(request, ends).unwrap()
    }

    async fn get(&mut self, path: &str) -> Response<RecvStream> {
        let (response, _) = self.open(request(path, false), true).await;
        within(response).await.unwrap()
    }

    async fn seen(&mut self) -> Seen {
        within(self.seen.recv()).await.unwrap()
    }

    async fn end(&mut self) -> End {
        within(self.ends.recv()).await.unwrap()
    }
}

fn request(path: &str, grpc: bool) -> HttpRequest<()> {
    let mut request = HttpRequest::builder().method("POST").uri(format!("http://app{path}"));
    if grpc {
        request = request
            .header("content-type", "application/grpc+proto")
            .header("te", "trailers");
    }
    request.body(()).unwrap()
}

/// Reads a body to its end.
async fn read(body: &mut RecvStream) -> Result<(Vec<u8>, Option<HeaderMap>), h2::Error> {
    let mut bytes = Vec::new();
    while let Some(data) = within(body.data()).await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        bytes.extend_from_slice(&data);
    }
    Ok((bytes, within(body.trailers()).await?))
}

fn code(trailers: &HeaderMap) -> &str {
    trailers["grpc-status"].to_str().unwrap()
}

#[test]
fn streams_are_passed_on_with_bodies_and_trailers() {
    run(async {
        let mut bench = Bench::plain().await;
        let (response, mut up) = bench.open(request("/echo?q=1", true), false).await;
        // Both ways at once: the answer to each message comes before the next is sent.
        let mut response = within(response).await.unwrap();
        assert_eq!(
            (response.status(), &response.headers()["x-app"]),
            (StatusCode::OK, &"/echo".parse().unwrap())
        );
        for message in ["one", "two", "three"] {
            up.send_data(message.into(), false).unwrap();
            let data = within(response.body_mut().data()).await.unwrap().unwrap();
            response.body_mut().flow_control().release_capacity(data.len()).unwrap();
            assert_eq!(data, message);
        }
        let mut trailers = HeaderMap::new();
        trailers.insert("x-trailer", "t".parse().unwrap());
        up.send_trailers(trailers).unwrap();
        let (rest, trailers) = read(response.body_mut()).await.unwrap();
        let trailers = trailers.unwrap();
        assert_eq!(
            (rest.len(), code(&trailers), &trailers["x-trailer"]),
            (0, "0", &"t".parse().unwrap())
        );
        let Seen::Head(head) = bench.seen().await else { panic!() };
        assert_eq!(head.uri.to_string(), "http://app/echo?q=1");
        assert_eq!(&head.headers["te"], "trailers");
        let end = bench.end().await;
        assert_eq!(
            (end.request_bytes, end.response_bytes, end.grpc_status, end.fault),
            (11, 11, Some(0), None)
        );
    });
}

#[test]
fn many_streams_share_a_connection_and_large_bodies_pass_whole() {
    const BYTES: usize = 4 * 1024 * 1024;
    run(async {
        let mut bench = Bench::plain().await;
        assert_eq!(bench.get("/echo").await.status(), 200);
        assert_eq!(bench.end().await.response_bytes, 0);
        let mut streams = tokio::task::JoinSet::new();
        for number in 0..8u8 {
            let (response, mut up) = bench.open(request("/echo", false), false).await;
            streams.spawn_local(async move {
                let body = Bytes::from(vec![number; BYTES]);
                let send = async { super::stream::send(&mut up, body.clone(), true).await.unwrap() };
                let receive = async { read(response.await.unwrap().body_mut()).await.unwrap().0 };
                let ((), received) = within(async { tokio::join!(send, receive) }).await;
                assert!(received == body);
            });
        }
        while let Some(result) = within(streams.join_next()).await {
            result.unwrap();
        }
        assert_eq!(bench.handler.connections.get(), 1);
        assert_eq!(bench.end().await.response_bytes, BYTES as u64);
    });
}

#[test]
fn a_slow_reader_stops_its_writer() {
    run(async {
        let mut bench = Bench::plain().await;
        let response = bench.get("/flood").await;
        let _ = bench.seen().await;
        let Seen::BodyEnd(sent) = bench.seen().await else {
            panic!()
        };
        assert!(
            sent < 8 << 20,
            "{sent} bytes were taken from a reader that does not read"
        );
        // And nobody else.
        let (echo, mut up) = bench.open(request("/echo", false), false).await;
        up.send_data("x".into(), true).unwrap();
        assert_eq!(read(within(echo).await.unwrap().body_mut()).await.unwrap().0, b"x");
        drop(response);
    });
}

#[test]
fn refusals_are_told_in_the_way_of_the_source() {
    let cases = [
        (StatusCode::FORBIDDEN, GrpcStatus::PermissionDenied, "7"),
        (StatusCode::SERVICE_UNAVAILABLE, GrpcStatus::Unavailable, "14"),
        (StatusCode::TOO_MANY_REQUESTS, GrpcStatus::ResourceExhausted, "8"),
        (StatusCode::NOT_FOUND, GrpcStatus::Unimplemented, "12"),
    ];
    run(async move {
        for (status, grpc, number) in cases {
            let decide: Decide =
                Box::new(move |_, _| Err(Reply::new(status, grpc, "no, 100%\n").with_header("x-why", "rule")));
            let mut bench = Bench::new(Limits::default(), false, decide).await;
            let (response, _up) = bench.open(request("/", true), false).await;
            let mut response = within(response).await.unwrap();
            assert_eq!((response.status(), code(response.headers())), (StatusCode::OK, number));
            assert_eq!(&response.headers()["grpc-message"], "no, 100%25");
            assert_eq!(&response.headers()["x-why"], "rule");
            assert!(response.body_mut().is_end_stream(), "trailers only");
            assert!(bench.end().await.replied);
            let mut response = bench.get("/").await;
            assert_eq!(
                (response.status(), &response.headers()["x-why"]),
                (status, &"rule".parse().unwrap())
            );
            assert_eq!(read(response.body_mut()).await.unwrap().0, b"no, 100%\n");
            let end = bench.end().await;
            assert_eq!((end.status, end.grpc_status), (Some(status), None));
        }
    });
}

#[test]
fn resets_become_resets() {
    run(async {
        // By the target, before and within its response.
        let mut bench = Bench::plain().await;
        let (response, _) = bench.open(request("/reset", false), true).await;
        assert_eq!(
            within(response).await.unwrap_err().reason(),
            Some(Reason::ENHANCE_YOUR_CALM)
        );
        assert_eq!(bench.end().await.fault, Some(Fault::TargetClosed));
        let (response, mut up) = bench.open(request("/cut", false), false).await;
        let mut response = within(response).await.unwrap();
        assert_eq!(within(response.body_mut().data()).await.unwrap().unwrap(), "half");
        up.send_data("go".into(), false).unwrap();
        assert_eq!(
            read(response.body_mut()).await.unwrap_err().reason(),
            Some(Reason::INTERNAL_ERROR)
        );
        assert_eq!(bench.end().await.fault, Some(Fault::ResponseCut));

        // By the source, before and within the response.
        for path in ["/silent", "/half"] {
            let mut bench = Bench::plain().await;
            let (response, mut up) = bench.open(request(path, false), false).await;
            assert!(matches!(bench.seen().await, Seen::Head(_)));
            let held = if path == "/half" {
                Some(within(response).await.unwrap())
            } else {
                None
            };
            up.send_reset(Reason::CANCEL);
            assert!(matches!(bench.seen().await, Seen::Reset(Reason::CANCEL)), "{path}");
            assert_eq!(bench.end().await.fault, Some(Fault::SourceClosed), "{path}");
            drop(held);
        }
    });
}

#[test]
fn a_source_that_goes_away_ends_its_streams() {
    run(async {
        let mut bench = Bench::plain().await;
        let (_response, _up) = bench.open(request("/silent", false), true).await;
        assert!(matches!(bench.seen().await, Seen::Head(_)));
        bench.client.abort();
        assert!(matches!(bench.seen().await, Seen::Reset(_)));
        let _ = within(bench.served).await.unwrap();
    });
}

#[test]
fn a_refused_stream_goes_to_a_fresh_connection_and_failures_may_be_retried() {
    run(async {
        for (path, retry) in [("/refuse", false), ("/busy", true)] {
            let mut bench = Bench::new(Limits::default(), retry, Box::new(|_, _| Ok(Forward::default()))).await;
            let (response, mut up) = bench.open(request(path, false), false).await;
            up.send_data("body".into(), true).unwrap();
            let mut response = within(response).await.unwrap();
            assert_eq!(
                read(response.body_mut()).await.unwrap().0,
                b"body",
                "{path}: sent again whole"
            );
            assert_eq!(bench.handler.connections.get(), 2, "{path}");
        }
        // A body that went by cannot be sent again.
        let mut bench = Bench::new(Limits::default(), true, Box::new(|_, _| Ok(Forward::default()))).await;
        let (response, mut up) = bench.open(request("/busy-late", false), false).await;
        super::stream::send(&mut up, vec![0; 100_000].into(), false)
            .await
            .unwrap();
        assert_eq!(within(response).await.unwrap().status(), 503);
        assert_eq!(bench.handler.connections.get(), 1);
        // Without leave the answer is the source's.
        let mut bench = Bench::plain().await;
        assert_eq!(bench.get("/busy").await.status(), 503);
        assert_eq!(bench.handler.connections.get(), 1);
    });
}

#[test]
fn a_dead_target_is_a_503() {
    run(async {
        for grpc in [false, true] {
            let mut bench = Bench::plain().await;
            // A connection whose other end is gone.
            let (ours, theirs) = pair().await;
            let server = tokio::task::spawn_local(h2::server::handshake::<_>(theirs));
            let (target, connection) = super::client_builder().handshake(ours).await.unwrap();
            tokio::task::spawn_local(connection);
            let server = within(server).await.unwrap().unwrap();
            *bench.handler.target.borrow_mut() = Some(target);
            bench.handler.connections.set(0);
            let (response, _up) = bench.open(request("/silent", grpc), true).await;
            // It is sent there, and then the other end closes without a word.
            while bench.handler.decided.get() == 0 {
                tokio::task::yield_now().await;
            }
            drop(server);
            let response = within(response).await;
            match (response, bench.handler.connections.get()) {
                (Ok(response), 0) if grpc => assert_eq!(code(response.headers()), "14"),
                (Ok(response), 0) => assert_eq!(response.status(), 503),
                other => panic!("{other:?}"),
            }
            assert_eq!(bench.end().await.fault, Some(Fault::TargetClosed));
        }
    });
}

#[test]
fn time_limits_hold() {
    let short = Duration::from_millis(400);
    run(async move {
        let decide = move || -> Decide {
            Box::new(move |_, _| {
                Ok(Forward {
                    request_timeout: Some(short),
                    ..Forward::default()
                })
            })
        };
        let mut bench = Bench::new(Limits::default(), false, decide()).await;
        assert_eq!(bench.get("/silent").await.status(), 504);
        assert_eq!(bench.end().await.fault, Some(Fault::RequestTimeout));
        let _ = bench.seen().await;
        assert!(
            matches!(bench.seen().await, Seen::Reset(Reason::CANCEL)),
            "the target hears of it"
        );
        for path in ["/silent", "/half"] {
            let (response, _up) = bench.open(request(path, true), true).await;
            let mut response = within(response).await.unwrap();
            let head = response.headers().clone();
            let (_, trailers) = read(response.body_mut()).await.unwrap();
            assert_eq!(code(trailers.as_ref().unwrap_or(&head)), "4", "{path}");
            assert_eq!(bench.end().await.fault, Some(Fault::RequestTimeout), "{path}");
        }
        // An attempt's time leads to another attempt, where that is wanted.
        let decide: Decide = Box::new(move |_, _| {
            Ok(Forward {
                attempt_timeout: Some(short),
                ..Forward::default()
            })
        });
        let mut bench = Bench::new(Limits::default(), true, decide).await;
        assert_eq!(bench.get("/silent").await.status(), 504);
        assert_eq!(bench.handler.connections.get(), 2);
        assert_eq!(bench.end().await.fault, Some(Fault::AttemptTimeout));
    });
}

#[test]
fn heads_are_changed_as_decided() {
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let decide: Decide = Box::new(move |request, _| {
        Ok(Forward {
            target: Some("/new?q".to_owned()),
            authority: Some("other".to_owned()),
            request_headers: HeaderChanges {
                set: vec![pair("x-set", "new")],
                add: vec![],
                remove: vec!["x-gone".into()],
            },
            response_headers: HeaderChanges {
                set: vec![pair("x-app", "hidden")],
                ..HeaderChanges::default()
            },
            standard: Standard::at_source(request, [10, 0, 0, 7].into()),
            ..Forward::default()
        })
    });
    run(async move {
        let mut bench = Bench::new(Limits::default(), false, decide).await;
        let request = HttpRequest::builder()
            .uri("http://app/old")
            .header("x-set", "old")
            .header("x-gone", "1")
            .header("x-forwarded-for", "1.1.1.1")
            .header("x-forwarded-client-cert", "URI=spiffe://me")
            .header("x-kept", "1");
        let (response, _) = bench.open(request.body(()).unwrap(), true).await;
        let response = within(response).await.unwrap();
        assert_eq!(&response.headers()["x-app"], "hidden");
        let Seen::Head(head) = bench.seen().await else { panic!() };
        assert_eq!(head.uri.to_string(), "http://other/new?q");
        assert_eq!(
            (&head.headers["x-set"], &head.headers["x-kept"]),
            (&"new".parse().unwrap(), &"1".parse().unwrap())
        );
        assert_eq!(&head.headers["x-forwarded-for"], "1.1.1.1, 10.0.0.7");
        assert!(!head.headers.contains_key("x-gone") && !head.headers.contains_key("x-forwarded-client-cert"));
        assert!(head.headers.contains_key("x-request-id") && head.headers.contains_key("traceparent"));
    });
}

#[test]
fn heads_that_could_be_read_in_two_ways_are_refused() {
    run(async {
        let uri = "http://app/";
        let requests = [
            (HttpRequest::builder().uri(uri).header("host", "other"), 400),
            (
                HttpRequest::builder()
                    .uri(uri)
                    .header("host", "app")
                    .header("host", "app"),
                400,
            ),
            (HttpRequest::builder().uri("http://user@app/"), 400),
            (HttpRequest::builder().method("CONNECT").uri("app:80"), 405),
        ];
        for (request, status) in requests {
            let mut bench = Bench::plain().await;
            let (response, _) = bench.open(request.body(()).unwrap(), true).await;
            assert_eq!(within(response).await.unwrap().status(), status);
            assert_eq!(bench.handler.decided.get(), 0);
            assert_eq!(bench.handler.refused.borrow().len(), 1);
        }
        let mut bench = Bench::plain().await;
        let huge = HttpRequest::builder().uri(uri).header("x", "a".repeat(64 * 1024));
        let (response, _) = bench.open(huge.body(()).unwrap(), true).await;
        let refused = within(response).await.map(|response| response.status());
        assert!(
            matches!(refused, Err(_) | Ok(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE)),
            "{refused:?}"
        );
        assert_eq!(bench.handler.decided.get(), 0);
    });
}

#[test]
fn draining_lets_streams_finish() {
    run(async {
        let mut bench = Bench::plain().await;
        let (response, mut up) = bench.open(request("/echo", false), false).await;
        let mut response = within(response).await.unwrap();
        bench.drain.take().unwrap().send(()).unwrap();
        // GOAWAY comes: no further streams.
        let mut source = bench.source.clone();
        while source.clone().ready().await.is_ok_and(|mut source| {
            source
                .send_request(request("/late", false), true)
                .is_ok_and(|(_, mut stream)| {
                    stream.send_reset(Reason::CANCEL);
                    true
                })
        }) {
            tokio::task::yield_now().await;
        }
        let _ = &mut source;
        up.send_data("last".into(), true).unwrap();
        assert_eq!(read(response.body_mut()).await.unwrap().0, b"last");
        assert!(within(bench.served).await.unwrap().is_ok());

        let mut idle = Bench::plain().await;
        idle.drain.take().unwrap().send(()).unwrap();
        assert!(within(idle.served).await.unwrap().is_ok());
        let limits = Limits {
            idle_timeout: Duration::from_millis(50),
            ..Limits::default()
        };
        let idle = Bench::new(limits, false, Box::new(|_, _| Ok(Forward::default()))).await;
        assert!(within(idle.served).await.unwrap().is_ok());
    });
}

#[test]
fn rapid_resets_end_the_connection() {
    run(async {
        let mut bench = Bench::plain().await;
        let mut opened = 0u32;
        for _ in 0..100_000 {
            let Ok(mut source) = within(bench.source.clone().ready()).await else {
                break;
            };
            let Ok((_, mut stream)) = source.send_request(request("/silent", false), true) else {
                break;
            };
            stream.send_reset(Reason::CANCEL);
            opened += 1;
            if opened.is_multiple_of(64) {
                tokio::task::yield_now().await;
            }
        }
        drop(bench.source);
        let _ = within(bench.served).await.unwrap();
        let _ = within(bench.client).await;
        let decided = bench.handler.decided.get();
        println!("{opened} opened and reset, {decided} decided");
        assert!(opened < 50_000, "the connection must have ended");
        // What was decided has ended, each exactly once.
        let mut ended = 0;
        while ended < decided && within(bench.ends.recv()).await.is_some() {
            ended += 1;
        }
        assert_eq!(ended, decided);
    });
}

#[test]
fn nonsense_is_no_http2() {
    run(async {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let bench = Bench::plain().await;
        let (mut theirs, ours) = pair().await;
        let handler = bench.handler.clone();
        let served = tokio::task::spawn_local(async move {
            let source = Transport::from_tcp(ours, BytesMut::new());
            serve(source, handler, &Limits::default(), std::future::pending()).await
        });
        theirs
            .write_all(b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n0000000000000")
            .await
            .unwrap();
        let mut rest = Vec::new();
        let _ = within(theirs.read_to_end(&mut rest)).await;
        assert!(within(served).await.unwrap().is_err());
    });
}
