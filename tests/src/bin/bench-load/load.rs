//! The load: one thread drives all connections over one epoll and one timer.
//!
//! With a rate, request number `n` belongs to connection `n mod connections` and is due at `n / rate`, whatever became
//! of those before it (an open loop). A request that finds its connection waiting is sent when that is free and counts
//! from when it was due; one that finds it free counts from when it is sent, because a thread that wakes late is not the
//! network's delay.

use std::{
    collections::VecDeque,
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustix::{
    event::epoll::{self, CreateFlags, Event, EventData, EventFlags},
    net::{AddressFamily, SocketFlags, SocketType},
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec},
};

use crate::{
    http::{self, HEAD_MAX},
    report::Seen,
};

/// How much is read at once: bulk answers come in large pieces.
const BUFFER: usize = 256 * 1024;
/// Events taken at once.
const EVENTS: usize = 256;
/// How long after the end answers are waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// The timer's place among the connections' numbers.
const TIMER: u64 = u64::MAX;
/// Errors after which a run is hopeless.
const ERRORS_MAX: u64 = 1000;

/// What is done with connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// They are kept, request after request.
    Keep,
    /// Each carries one request.
    Connect,
    /// Each carries one request and stays open.
    Idle,
}

/// What to do.
pub struct Plan {
    /// What is done with connections.
    pub kind: Kind,
    /// Where they go.
    pub address: SocketAddr,
    /// What is sent, again and again.
    pub request: Vec<u8>,
    /// How many there are at once.
    pub connections: usize,
    /// Requests per second over all of them; 0: as fast as answers come.
    pub rate: f64,
    /// How long is measured.
    pub seconds: Duration,
    /// How long before that it runs already.
    pub warm_up: Duration,
    /// At most this many requests.
    pub requests: Option<u64>,
}

/// What a connection is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Closed,
    Connecting,
    Free,
    Head,
    Body(u64),
}

struct Connection {
    stream: Option<TcpStream>,
    state: State,
    /// What of the request was not written yet.
    unsent: usize,
    head: Vec<u8>,
    close: bool,
    begun: Instant,
    due: VecDeque<Instant>,
}

struct Load<'a> {
    plan: &'a Plan,
    epoll: OwnedFd,
    connections: Vec<Connection>,
    buffer: Vec<u8>,
    seen: Seen,
    measure_from: Instant,
    end: Instant,
    sent: u64,
    /// Requests due or sent whose answer is missing.
    open: usize,
}

/// Runs a plan and prints what it saw.
pub fn run(plan: &Plan) -> Result<()> {
    let epoll = epoll::create(CreateFlags::CLOEXEC)?;
    let timer = rustix::time::timerfd_create(
        TimerfdClockId::Monotonic,
        TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
    )?;
    epoll::add(&epoll, &timer, EventData::new_u64(TIMER), EventFlags::IN)?;
    let now = Instant::now();
    let connection = || Connection {
        stream: None,
        state: State::Closed,
        unsent: 0,
        head: Vec::new(),
        close: false,
        begun: now,
        due: VecDeque::new(),
    };
    let mut load = Load {
        plan,
        epoll,
        connections: (0..plan.connections).map(|_| connection()).collect(),
        buffer: vec![0; BUFFER],
        seen: Seen::default(),
        measure_from: now,
        end: now,
        sent: 0,
        open: 0,
    };
    if plan.kind != Kind::Connect {
        load.open_all()?;
    }
    let start = Instant::now();
    load.measure_from = start + plan.warm_up;
    load.end = load.measure_from + plan.seconds;
    match plan.kind {
        Kind::Idle => return load.idle(&timer),
        _ if plan.rate == 0.0 => (0..plan.connections).for_each(|number| load.go(number, Instant::now())),
        _ => {}
    }
    load.drive(&timer, start)?;
    let measured = Instant::now()
        .min(load.end)
        .saturating_duration_since(load.measure_from);
    load.seen.print(measured);
    Ok(())
}

impl Load<'_> {
    /// Opens every connection, one after the other, before anything is measured.
    fn open_all(&mut self) -> Result<()> {
        for number in 0..self.connections.len() {
            let stream = TcpStream::connect_timeout(&self.plan.address, PATIENCE)
                .with_context(|| format!("connection {} to {}", number + 1, self.plan.address))?;
            stream.set_nonblocking(true)?;
            self.watch(number, stream, State::Free)?;
        }
        Ok(())
    }

    fn watch(&mut self, number: usize, stream: TcpStream, state: State) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let interest = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.epoll, &stream, EventData::new_u64(number as u64), interest)?;
        self.seen.connects += 1;
        let connection = &mut self.connections[number];
        connection.stream = Some(stream);
        connection.state = state;
        Ok(())
    }

    fn connect(&mut self, number: usize) -> io::Result<()> {
        let family = match self.plan.address {
            SocketAddr::V4(_) => AddressFamily::INET,
            SocketAddr::V6(_) => AddressFamily::INET6,
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
        match rustix::net::connect(&socket, &self.plan.address) {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        self.watch(number, TcpStream::from(socket), State::Connecting)
    }

    /// Begins a request that counts from `begun`, on a connection that is free.
    fn go(&mut self, number: usize, begun: Instant) {
        if self.plan.requests.is_some_and(|most| self.sent >= most) {
            return;
        }
        self.sent += 1;
        self.open += 1;
        self.connections[number].begun = begun;
        self.connections[number].unsent = self.plan.request.len();
        let done = if self.connections[number].stream.is_none() {
            self.connect(number)
        } else {
            self.write(number)
        };
        if let Err(error) = done {
            self.failed(number, error.kind());
        }
    }

    fn write(&mut self, number: usize) -> io::Result<()> {
        let connection = &mut self.connections[number];
        connection.state = State::Head;
        let Some(stream) = &mut connection.stream else {
            return Err(ErrorKind::NotConnected.into());
        };
        while connection.unsent > 0 {
            let rest = &self.plan.request[self.plan.request.len() - connection.unsent..];
            match stream.write(rest) {
                Ok(count) => connection.unsent -= count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn failed(&mut self, number: usize, what: impl ToString) {
        self.seen.error(what);
        self.close(number);
        self.open = self.open.saturating_sub(1);
    }

    fn close(&mut self, number: usize) {
        let connection = &mut self.connections[number];
        connection.stream = None;
        connection.state = State::Closed;
        connection.head.clear();
    }

    /// Something happened to a connection.
    fn event(&mut self, number: usize, flags: EventFlags) {
        if self.connections[number].state == State::Connecting {
            if !flags.intersects(EventFlags::OUT | EventFlags::ERR | EventFlags::HUP) {
                return;
            }
            let error = self.connections[number]
                .stream
                .as_ref()
                .map(|stream| stream.take_error());
            match error {
                Some(Ok(None)) => {}
                Some(Ok(Some(error)) | Err(error)) => return self.failed(number, error.kind()),
                None => return,
            }
        }
        if self.connections[number].unsent > 0
            && let Err(error) = self.write(number)
        {
            return self.failed(number, error.kind());
        }
        if flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
            self.read(number);
        }
    }

    fn read(&mut self, number: usize) {
        loop {
            let connection = &mut self.connections[number];
            let Some(stream) = &mut connection.stream else { return };
            let count = match stream.read(&mut self.buffer) {
                Ok(0) => {
                    return match connection.state {
                        // Kept too long, or closed by the other side after a whole answer.
                        State::Free if self.plan.kind != Kind::Idle => self.close(number),
                        State::Free => {
                            self.seen.error("an idle connection was closed");
                            self.close(number);
                        }
                        _ => self.failed(number, "closed before the answer was whole"),
                    };
                }
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => return self.failed(number, error.kind()),
            };
            let mut input = &self.buffer[..count];
            if connection.state == State::Head {
                connection.head.extend_from_slice(&input[..count.min(HEAD_MAX)]);
                match http::read_answer(&connection.head) {
                    Err(what) => return self.failed(number, what),
                    Ok(None) => continue,
                    Ok(Some(answer)) if answer.status != 200 => {
                        return self.failed(number, format!("status {}", answer.status));
                    }
                    Ok(Some(answer)) => {
                        let before = connection.head.len() - count.min(HEAD_MAX);
                        input = &input[(answer.length - before).min(count)..];
                        connection.head.clear();
                        connection.close = answer.close;
                        connection.state = State::Body(answer.bytes);
                    }
                }
            }
            let State::Body(left) = &mut connection.state else {
                return self.failed(number, "an answer that nobody asked for");
            };
            let bytes = input.len() as u64;
            if bytes > *left {
                return self.failed(number, "more than was asked for");
            }
            *left -= bytes;
            let whole = *left == 0;
            let now = Instant::now();
            self.seen.bytes_all += bytes;
            if now >= self.measure_from && now < self.end {
                self.seen.bytes += bytes;
            }
            if whole {
                return self.answered(number, now);
            }
            // A short read has emptied the socket; the next event comes by itself.
            if count < self.buffer.len() {
                return;
            }
        }
    }

    fn answered(&mut self, number: usize, now: Instant) {
        self.open -= 1;
        self.seen.answered_all += 1;
        let connection = &mut self.connections[number];
        connection.state = State::Free;
        if now >= self.measure_from && now < self.end {
            self.seen.answered += 1;
            let nanos = now.saturating_duration_since(connection.begun).as_nanos();
            self.seen.latencies.push(u32::try_from(nanos).unwrap_or(u32::MAX));
        }
        if connection.close || self.plan.kind == Kind::Connect {
            self.close(number);
        }
        if self.plan.kind == Kind::Idle {
            return;
        }
        if self.plan.rate == 0.0 {
            if now < self.end {
                self.go(number, now);
            }
            return;
        }
        // What was due before the end is still asked for after it.
        if let Some(due) = self.connections[number].due.pop_front() {
            self.open -= 1;
            self.go(number, due);
        }
    }

    fn drive(&mut self, timer: &OwnedFd, start: Instant) -> Result<()> {
        let interval = if self.plan.rate > 0.0 {
            1.0 / self.plan.rate
        } else {
            0.0
        };
        let due_at = |turn: u64| start + Duration::from_secs_f64(interval * turn as f64);
        let mut turn: u64 = 0;
        let mut events: Vec<Event> = Vec::with_capacity(EVENTS);
        let give_up = self.end + PATIENCE;
        let mut armed = None;
        loop {
            let mut now = Instant::now();
            if self.plan.rate > 0.0 {
                while now < self.end && due_at(turn) <= now {
                    let number = (turn % self.connections.len() as u64) as usize;
                    if matches!(self.connections[number].state, State::Free | State::Closed) {
                        self.go(number, now);
                    } else {
                        self.seen.queued += 1;
                        self.open += 1;
                        self.connections[number].due.push_back(due_at(turn));
                    }
                    turn += 1;
                    now = Instant::now();
                }
            }
            let all_sent = self.plan.requests.is_some_and(|most| self.sent >= most);
            // Without a rate, nothing follows when nothing is open: the rest failed.
            let finished = self.open == 0 && (all_sent || self.plan.rate == 0.0);
            // Without a rate, what is still open at the end was not asked for within it.
            let over = now >= self.end && (self.open == 0 || self.plan.rate == 0.0);
            if finished || over {
                return Ok(());
            }
            ensure!(
                now < give_up,
                "{} answers are missing {PATIENCE:?} after the end; errors: {:?}",
                self.open,
                self.seen.errors
            );
            let errors: u64 = self.seen.errors.values().sum();
            ensure!(errors < ERRORS_MAX, "too many errors: {:?}", self.seen.errors);
            let next = match now < self.end {
                true if self.plan.rate > 0.0 => due_at(turn).min(self.end),
                true => self.end,
                false => give_up,
            };
            // At full speed the timer is set once: a system call for each turn would be measured too.
            if armed != Some(next) {
                set(timer, next.saturating_duration_since(now))?;
                armed = Some(next);
            }
            self.wait(&mut events)?;
        }
    }

    fn wait(&mut self, events: &mut Vec<Event>) -> Result<()> {
        events.clear();
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(events), None) {
            Err(rustix::io::Errno::INTR) => return Ok(()),
            other => other?,
        };
        for event in events.iter() {
            let (data, flags) = (event.data, event.flags);
            if data.u64() != TIMER {
                self.event(data.u64() as usize, flags);
            }
        }
        Ok(())
    }

    /// One request on each connection, then nothing, until somebody kills this program.
    fn idle(mut self, timer: &OwnedFd) -> Result<()> {
        let mut events: Vec<Event> = Vec::with_capacity(EVENTS);
        self.end = Instant::now() + PATIENCE;
        for number in 0..self.connections.len() {
            set(timer, PATIENCE)?;
            self.go(number, Instant::now());
            while self.open > 0 {
                ensure!(Instant::now() < self.end, "no answer on connection {}", number + 1);
                self.wait(&mut events)?;
            }
            ensure!(
                self.seen.errors.is_empty(),
                "connection {}: {:?}",
                number + 1,
                self.seen.errors
            );
            self.end = Instant::now() + PATIENCE;
        }
        println!("{}", serde_json::json!({"open": self.connections.len()}));
        loop {
            std::thread::park();
        }
    }
}

/// Sets the timer; it also wakes at once if the time is over already.
fn set(timer: &OwnedFd, time: Duration) -> io::Result<()> {
    let time = time.max(Duration::from_nanos(1));
    let value = Timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: time.subsec_nanos().into(),
    };
    let once = Timespec { tv_sec: 0, tv_nsec: 0 };
    let setting = Itimerspec {
        it_interval: once,
        it_value: value,
    };
    rustix::time::timerfd_settime(timer, TimerfdTimerFlags::empty(), &setting)?;
    Ok(())
}
