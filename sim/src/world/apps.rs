//! The applications: destinations that serve requests and echo flows, and sources that ask and tell how it ended.
//!
//! Destinations are where the checks look: what arrives here was delivered, so somebody must have permitted it, and
//! whoever it claims to come from must be who sent it.

use std::{cell::Cell, io, net::SocketAddr, rc::Rc, time::Duration};

use bytes::{Buf, BytesMut};
use real_tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::{JoinHandle, LocalSet},
    time::Instant,
};

use super::{
    World,
    mesh::{ACCOUNTS, BROKEN, FLOW, LIMITED, PodModel, WEB, service},
};
use crate::{
    kernel::NetnsCookie,
    net::{StdListener, TcpListener, TcpStream, network::Door},
};

/// The largest head that is read.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// What payloads are made of.
const WORD: &[u8] = b"SECRET-0123456789abcdef-";

/// How one request or flow ended for its source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// An answer, whole.
    Status(u16),
    /// The flow came back whole.
    Echoed,
    /// The connection failed.
    Failed(String),
}

/// What a source asked for, and what became of it.
#[derive(Clone, Debug)]
pub struct Asked {
    pub id: u64,
    pub from: usize,
    pub to: usize,
    pub flow: bool,
    pub post: bool,
    pub began: Instant,
    pub ended: Option<(Instant, Outcome)>,
    /// Times that the destination's application read a whole request, and that it answered one.
    pub arrived: u32,
    pub answered: u32,
    /// On a connection that carried a request before.
    pub reused: bool,
}

/// A request to be sent.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub from: usize,
    pub to: usize,
    pub post: bool,
    pub fresh: bool,
    pub body: usize,
    pub reply: usize,
    pub think_ms: u64,
}

/// A flow to be opened.
#[derive(Clone, Copy, Debug)]
pub struct FlowPlan {
    pub from: usize,
    pub to: usize,
    pub pieces: usize,
    pub bytes: usize,
    pub pause_ms: u64,
}

/// A running application: everything of it ends with its tasks.
pub struct App {
    tasks: Cell<Option<JoinHandle<()>>>,
    pub down: Cell<bool>,
    /// The next request is not answered.
    pub drops: Cell<u32>,
    /// Requests that it works on.
    pub busy: Cell<u32>,
}

impl Default for App {
    fn default() -> App {
        App {
            tasks: Cell::default(),
            down: Cell::new(true),
            drops: Cell::new(0),
            busy: Cell::new(0),
        }
    }
}

fn payload(bytes: usize) -> Vec<u8> {
    let mut payload = WORD.repeat(bytes.div_ceil(WORD.len()));
    payload.truncate(bytes);
    payload
}

impl World {
    /// Starts a pod's application.
    pub fn start_app(self: &Rc<Self>, pod: usize) {
        let local = LocalSet::new();
        for port in [WEB, FLOW] {
            let backlog = self.network.open(self.mesh.pods[pod].netns, Door::App(port));
            let listener = TcpListener::from_std(StdListener(backlog)).expect("a listener");
            let world = self.clone();
            local.spawn_local(async move {
                while let Ok((stream, source)) = listener.accept().await {
                    let world = world.clone();
                    real_tokio::task::spawn_local(async move {
                        // How it ends shows at the source.
                        let _ = match port {
                            WEB => world.serve_requests(pod, stream, source).await,
                            _ => world.serve_flow(pod, stream, source).await,
                        };
                    });
                }
            });
        }
        self.apps[pod].down.set(false);
        self.apps[pod].busy.set(0);
        self.apps[pod].tasks.set(Some(real_tokio::task::spawn_local(local)));
    }

    /// Ends it: its connections are closed, new ones are refused.
    pub fn stop_app(&self, pod: usize) {
        for port in [WEB, FLOW] {
            self.network.close(self.mesh.pods[pod].netns, Door::App(port));
        }
        self.apps[pod].down.set(true);
        if let Some(tasks) = self.apps[pod].tasks.take() {
            tasks.abort();
        }
    }

    /// Who the application sees behind a connection.
    fn shown(&self, pod: usize, source: SocketAddr) -> Option<PodModel> {
        let model = &self.mesh.pods[pod];
        let kernel = &self.nodes[model.node].kernel;
        let shown = kernel.shown(NetnsCookie(model.netns), source);
        if shown.is_none() {
            self.fail(format!(
                "{}: a connection from {source} that nobody presents",
                model.name
            ));
        }
        self.mesh.pod_at(shown?.ip()).cloned()
    }

    async fn serve_requests(self: &Rc<Self>, pod: usize, mut stream: TcpStream, source: SocketAddr) -> io::Result<()> {
        let shown = self.shown(pod, source);
        let mut input = BytesMut::new();
        while let Some(head) = read_head(&mut stream, &mut input).await? {
            let asked = head.path.strip_prefix("/r/").and_then(|rest| {
                let mut parts = rest.split('/').map(|part| part.parse::<u64>().ok());
                Some((parts.next()??, parts.next()?? as usize, parts.next()??))
            });
            let Some((id, reply, think_ms)) = asked else {
                self.fail(format!("an application was asked for {:?}", head.path));
                return Ok(());
            };
            self.delivered(id, pod, shown.as_ref(), false);
            let model = &self.mesh.pods[pod];
            if self.mesh.limits && model.account == LIMITED {
                self.limited.borrow_mut().push((model.node, Instant::now()));
            }
            while input.len() < head.length {
                if stream.read_buf(&mut input).await? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            if input[..head.length] != payload(head.length) {
                self.fail(format!("the body of request {id} is not what was sent"));
            }
            input.advance(head.length);
            let app = &self.apps[pod];
            let _busy = Busy::new(self, pod);
            if let Some(asked) = self.asked.borrow_mut().get_mut(&id) {
                asked.arrived += 1;
            }
            if app.drops.get() > 0 {
                app.drops.set(app.drops.get() - 1);
                stream.reset_on_close();
                return Ok(());
            }
            if think_ms > 0 {
                real_tokio::time::sleep(Duration::from_millis(think_ms)).await;
            }
            let head = format!("HTTP/1.1 200 OK\r\nx-id: {id}\r\ncontent-length: {reply}\r\n\r\n");
            stream.write_all(&[head.as_bytes(), &payload(reply)].concat()).await?;
            if let Some(asked) = self.asked.borrow_mut().get_mut(&id) {
                asked.answered += 1;
            }
        }
        Ok(())
    }

    async fn serve_flow(self: &Rc<Self>, pod: usize, mut stream: TcpStream, source: SocketAddr) -> io::Result<()> {
        let shown = self.shown(pod, source);
        let mut first = BytesMut::new();
        // Eight digits say which flow it is.
        while first.len() < 8 {
            if stream.read_buf(&mut first).await? == 0 {
                return Ok(());
            }
        }
        let id = std::str::from_utf8(&first[..8]).ok().and_then(|id| id.parse().ok());
        let Some(id) = id else {
            self.fail(format!("a flow begins with {:?}", &first[..8]));
            return Ok(());
        };
        if let Some(asked) = self.asked.borrow_mut().get_mut(&id) {
            asked.arrived += 1;
        }
        loop {
            self.delivered(id, pod, shown.as_ref(), true);
            stream.write_all(&first).await?;
            first.clear();
            if stream.read_buf(&mut first).await? == 0 {
                return stream.shutdown().await;
            }
        }
    }

    /// Something of request or flow `id` has reached an application: it must be permitted, and from whom it says.
    fn delivered(&self, id: u64, pod: usize, shown: Option<&PodModel>, now_only: bool) {
        let model = &self.mesh.pods[pod];
        let Some(asked) = self.asked.borrow().get(&id).cloned() else {
            return self.fail(format!("{} was sent {id}, which nobody sent", model.name));
        };
        let from = &self.mesh.pods[asked.from];
        if shown.is_none_or(|shown| shown.name != from.name) {
            self.fail(format!(
                "{} sees {:?} behind {id} of {}",
                model.name,
                shown.map(|s| &s.name),
                from.name
            ));
        }
        if asked.to != model.account {
            self.fail(format!("{id} for {} has reached {}", ACCOUNTS[asked.to], model.name));
        }
        let now = Instant::now();
        let since = if now_only { now } else { asked.began };
        if !self.permits(model.node, from.account, model.account, since, now).any {
            self.fail(format!(
                "{} was sent {id} of {} without a permit",
                model.name, from.name
            ));
        }
    }

    /// Sends a request and notes how it ended.
    pub async fn ask(self: Rc<Self>, request: Request) {
        let (id, mut reused) = (self.next_id(), false);
        self.note_asked(id, request.from, request.to, false, request.post);
        let kept = match request.fresh {
            true => None,
            false => self
                .kept
                .borrow_mut()
                .get_mut(&(request.from, request.to))
                .and_then(Vec::pop),
        };
        // As any source does: a connection that has ended is not written to.
        let kept = kept.filter(
            |stream| matches!(stream.try_read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock),
        );
        let connected = match kept {
            Some(stream) => {
                reused = true;
                Ok(stream)
            }
            None => self.connect(request.from, service(request.to, WEB)).await,
        };
        if let Some(asked) = self.asked.borrow_mut().get_mut(&id) {
            asked.reused = reused;
        }
        let outcome = match connected {
            Err(error) => Outcome::Failed(format!("connect: {error}")),
            Ok(mut stream) => match self.exchange(id, request, &mut stream).await {
                Ok((status, keep)) => {
                    if keep {
                        self.kept
                            .borrow_mut()
                            .entry((request.from, request.to))
                            .or_default()
                            .push(stream);
                    }
                    Outcome::Status(status)
                }
                Err(error) => Outcome::Failed(error.to_string()),
            },
        };
        self.note_outcome(id, outcome);
    }

    async fn exchange(&self, id: u64, request: Request, stream: &mut TcpStream) -> io::Result<(u16, bool)> {
        let Request { reply, think_ms, .. } = request;
        let length = if request.post { request.body } else { 0 };
        let head = format!(
            "{} /r/{id}/{reply}/{think_ms} HTTP/1.1\r\nhost: {}\r\ncontent-length: {length}\r\n\r\n",
            if request.post { "POST" } else { "GET" },
            ACCOUNTS[request.to],
        );
        let bytes = [head.as_bytes(), &payload(length)].concat();
        // Answers may come before the whole body was taken.
        let sent = stream.write_all(&bytes).await;
        let mut input = BytesMut::new();
        let Some(head) = read_head(stream, &mut input).await? else {
            sent?;
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed without an answer"));
        };
        while input.len() < head.length {
            if stream.read_buf(&mut input).await? == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the answer was cut"));
            }
        }
        if input.len() > head.length {
            self.fail(format!("{id} got more than one answer"));
        }
        let status = head.path.parse().unwrap_or(0);
        if status == 200 && (head.id != Some(id) || input[..] != payload(reply)) {
            self.fail(format!(
                "{id} got the answer of {:?}, {} of {reply} bytes",
                head.id,
                input.len()
            ));
        }
        Ok((status, !head.close && sent.is_ok()))
    }

    /// Opens a flow, sends its pieces, and reads its echo.
    pub async fn flow(self: Rc<Self>, plan: FlowPlan) {
        let id = self.next_id();
        self.note_asked(id, plan.from, plan.to, true, true);
        let outcome = match self.echo(id, plan).await {
            Ok(()) => Outcome::Echoed,
            Err(error) => Outcome::Failed(error.to_string()),
        };
        self.note_outcome(id, outcome);
    }

    async fn echo(&self, id: u64, plan: FlowPlan) -> io::Result<()> {
        let mut stream = self.connect(plan.from, service(plan.to, FLOW)).await?;
        let mut expected = format!("{id:08}").into_bytes();
        stream.write_all(&expected).await?;
        let mut echoed = BytesMut::new();
        for _ in 0..plan.pieces {
            let piece = payload(plan.bytes);
            expected.extend_from_slice(&piece);
            stream.write_all(&piece).await?;
            real_tokio::time::sleep(Duration::from_millis(plan.pause_ms)).await;
            while echoed.len() < expected.len() {
                if stream.read_buf(&mut echoed).await? == 0 {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the echo was cut"));
                }
            }
        }
        stream.shutdown().await?;
        while stream.read_buf(&mut echoed).await? > 0 {}
        if echoed[..] == expected {
            return Ok(());
        }
        if !expected.starts_with(&echoed) {
            self.fail(format!("flow {id} got what it did not send"));
        }
        // A flow that was cut must not look whole.
        self.fail(format!(
            "flow {id} ended cleanly after {} of {} bytes",
            echoed.len(),
            expected.len()
        ));
        Err(io::ErrorKind::UnexpectedEof.into())
    }

    async fn connect(&self, from: usize, to: SocketAddr) -> io::Result<TcpStream> {
        let pod = &self.mesh.pods[from];
        let kernel = self.nodes[pod.node].kernel.clone();
        let note = |source| kernel.note_original_destination(NetnsCookie(pod.netns), source, to);
        self.network.capture(pod.netns, to, note).await
    }
}

/// Counts a request that an application works on; more than the breaker lets through is a fault.
struct Busy<'a>(&'a World, usize);

impl Busy<'_> {
    fn new(world: &World, pod: usize) -> Busy<'_> {
        let app = &world.apps[pod];
        app.busy.set(app.busy.get() + 1);
        if world.mesh.limits && world.mesh.pods[pod].account == BROKEN {
            world.check_breaker();
        }
        Busy(world, pod)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        let busy = &self.0.apps[self.1].busy;
        busy.set(busy.get().saturating_sub(1));
    }
}

/// A head of either kind. Of an answer `path` is the status.
struct Head {
    path: String,
    length: usize,
    id: Option<u64>,
    close: bool,
}

async fn read_head(stream: &mut TcpStream, input: &mut BytesMut) -> io::Result<Option<Head>> {
    loop {
        if let Some(at) = input.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&input[..at]).into_owned();
            input.advance(at + 4);
            let field = |name: &str| {
                let mut lines = head.lines().skip(1).filter_map(|line| line.split_once(": "));
                lines
                    .find(|(key, _)| key.eq_ignore_ascii_case(name))
                    .map(|(_, value)| value.to_owned())
            };
            return Ok(Some(Head {
                path: head.split_ascii_whitespace().nth(1).unwrap_or_default().to_owned(),
                length: field("content-length")
                    .and_then(|value| value.parse().ok())
                    .unwrap_or(0),
                id: field("x-id").and_then(|value| value.parse().ok()),
                close: field("connection").is_some_and(|value| value.eq_ignore_ascii_case("close")),
            }));
        }
        if input.len() > HEAD_BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if stream.read_buf(input).await? == 0 {
            return match input.is_empty() {
                true => Ok(None),
                false => Err(io::ErrorKind::UnexpectedEof.into()),
            };
        }
    }
}
