//! Sockets in memory, with the methods of tokio's that the agent uses.
//!
//! What they keep of TCP: bytes in order, a bounded window, an end for each direction, a reset that a close with unread
//! bytes or without linger sends, data that arrives at a closed socket answered by a reset, partial reads and writes.

use std::{
    fmt,
    fs::File,
    future::poll_fn,
    io::{self, IoSlice},
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd},
    pin::Pin,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use parking_lot::Mutex;
use real_tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use super::{
    inspect::Inspector,
    network::{self, Backlog, Door, Network, Parcel},
};
use crate::chance::Random;

/// Something with a descriptor, for those who set options on one.
static NOTHING: LazyLock<File> = LazyLock::new(|| File::open("/dev/null").expect("/dev/null"));

/// Between whom a connection is; the side that connected first.
#[derive(Debug)]
pub(super) struct Ends {
    pub addresses: [SocketAddr; 2],
    pub nodes: [usize; 2],
    pub netns: [u64; 2],
    pub door: Door,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Fin,
    Reset,
}

/// One direction.
#[derive(Debug, Default)]
struct Lane {
    arrived: BytesMut,
    flying: usize,
    last_at: Option<Instant>,
    end: Option<End>,
    /// The writing side has sent its end.
    ended: bool,
    reader: Option<Waker>,
    /// Those who wait to read by `readable`.
    writer: Option<Waker>,
}

#[derive(Debug)]
struct State {
    /// By the side that writes.
    lanes: [Lane; 2],
    open: [bool; 2],
    /// The side was told of a reset.
    reset: [bool; 2],
    is_cut: bool,
    dice: Random,
    inspectors: Option<[Inspector; 2]>,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    id: u64,
    pub addresses: [SocketAddr; 2],
    pub nodes: [usize; 2],
    netns: [u64; 2],
    door: Door,
    room: usize,
    state: Mutex<State>,
}

/// One side of a connection.
pub struct TcpStream {
    connection: Arc<Connection>,
    side: usize,
    aborts: AtomicBool,
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}

impl Connection {
    /// Something arrives that side `from` has sent.
    pub(super) fn arrive(self: &Arc<Self>, network: &Network, from: usize, parcel: Parcel) {
        let to = 1 - from;
        let mut state = self.state.lock();
        if state.is_cut {
            return;
        }
        let mut answer = false;
        let lane = &mut state.lanes[from];
        match parcel {
            Parcel::Data(bytes) => {
                lane.flying -= bytes.len();
                if state.open[to] {
                    state.lanes[from].arrived.extend_from_slice(&bytes);
                } else {
                    answer = !state.reset[from];
                }
            }
            Parcel::Fin => {
                lane.end.get_or_insert(End::Fin);
            }
            Parcel::Reset => {
                lane.end = Some(End::Reset);
                state.reset[to] = true;
            }
        }
        let reader = state.lanes[from].reader.take();
        let writers = [state.lanes[0].writer.take(), state.lanes[1].writer.take()];
        let at = state.lanes[to].last_at.unwrap_or_else(Instant::now);
        drop(state);
        wake(reader);
        writers.into_iter().for_each(wake);
        if answer {
            // Data for a socket that is closed.
            network.send(self, to, Parcel::Reset, at);
        }
    }

    /// The network loses it: both sides are reset, what is on its way is gone.
    pub(super) fn cut(&self) {
        let mut state = self.state.lock();
        state.is_cut = true;
        let mut wakers = Vec::new();
        for side in 0..2 {
            state.reset[side] = true;
            state.lanes[side].end = Some(End::Reset);
            wakers.extend([state.lanes[side].reader.take(), state.lanes[side].writer.take()]);
        }
        drop(state);
        wakers.into_iter().for_each(wake);
    }

    pub(super) fn is_open(&self) -> bool {
        self.state.lock().open.iter().any(|open| *open)
    }

    pub(super) fn describe(&self) -> String {
        let open = self.state.lock().open;
        format!(
            "#{} {}>{} {:?} open {open:?}",
            self.id, self.addresses[0], self.addresses[1], self.door
        )
    }
}

impl TcpStream {
    pub(super) fn pair(
        id: u64,
        ends: Ends,
        room: usize,
        dice: Random,
        inspectors: Option<[Inspector; 2]>,
    ) -> (TcpStream, TcpStream) {
        let Ends {
            addresses,
            nodes,
            netns,
            door,
        } = ends;
        let connection = Arc::new(Connection {
            id,
            addresses,
            nodes,
            netns,
            door,
            room,
            state: Mutex::new(State {
                lanes: Default::default(),
                open: [true; 2],
                reset: [false; 2],
                is_cut: false,
                dice,
                inspectors,
            }),
        });
        let side = |side| TcpStream {
            connection: connection.clone(),
            side,
            aborts: AtomicBool::new(false),
        };
        (side(0), side(1))
    }

    pub(super) fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    pub(crate) fn reset_on_close(&self) {
        self.aborts.store(true, Relaxed);
    }

    /// Never used: who connects here has a namespace.
    pub async fn connect<A>(_address: A) -> io::Result<TcpStream> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.connection.addresses[1 - self.side])
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.connection.addresses[self.side])
    }

    pub fn set_nodelay(&self, _on: bool) -> io::Result<()> {
        Ok(())
    }

    pub fn nodelay(&self) -> io::Result<bool> {
        Ok(true)
    }

    /// The bytes that can be read now are looked at by `take`, which says how many it took. `None`: nothing yet.
    fn read_now(&self, waker: Option<&Waker>, take: &mut dyn FnMut(&[u8]) -> usize) -> Option<io::Result<usize>> {
        let mut state = self.connection.state.lock();
        let partly = state.dice.one_in(24).then(|| state.dice.unit());
        let lane = &mut state.lanes[1 - self.side];
        if !lane.arrived.is_empty() {
            let all = lane.arrived.len();
            let offered = partly.map_or(all, |part| ((all as f64 * part) as usize).max(1));
            let taken = take(&lane.arrived[..offered]);
            lane.arrived.advance(taken);
            if lane.arrived.is_empty() {
                lane.arrived = BytesMut::new();
            }
            let writer = lane.writer.take();
            drop(state);
            wake(writer);
            return Some(Ok(taken));
        }
        match lane.end {
            Some(End::Fin) => Some(Ok(0)),
            Some(End::Reset) => {
                // Told once; after that it looks like an end.
                lane.end = Some(End::Fin);
                Some(Err(io::ErrorKind::ConnectionReset.into()))
            }
            None => {
                if let Some(waker) = waker {
                    lane.reader = Some(waker.clone());
                }
                None
            }
        }
    }

    /// Whether there is something to read, or an end.
    fn is_readable(&self, waker: &Waker) -> bool {
        let mut state = self.connection.state.lock();
        let lane = &mut state.lanes[1 - self.side];
        let is_readable = !lane.arrived.is_empty() || lane.end.is_some();
        if !is_readable {
            lane.reader = Some(waker.clone());
        }
        is_readable
    }

    /// `None`: no room now.
    fn write_now(&self, waker: Option<&Waker>, slices: &[IoSlice<'_>]) -> Option<io::Result<usize>> {
        let network = match network::current() {
            Ok(network) => network,
            Err(error) => return Some(Err(error)),
        };
        let (side, connection) = (self.side, &self.connection);
        let mut state = connection.state.lock();
        if state.reset[side] {
            return Some(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if state.lanes[side].ended {
            return Some(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let total: usize = slices.iter().map(|slice| slice.len()).sum();
        if total == 0 {
            return Some(Ok(0));
        }
        let partly = state.dice.one_in(24).then(|| state.dice.unit());
        let lane = &mut state.lanes[side];
        let room = connection.room.saturating_sub(lane.arrived.len() + lane.flying);
        if room == 0 {
            if let Some(waker) = waker {
                lane.writer = Some(waker.clone());
            }
            return None;
        }
        let wanted = partly.map_or(total, |part| ((total as f64 * part) as usize).max(1));
        let n = wanted.min(room);
        let mut bytes = BytesMut::with_capacity(n);
        for slice in slices {
            let take = slice.len().min(n - bytes.len());
            bytes.put_slice(&slice[..take]);
        }
        lane.flying += n;
        let not_before = lane.last_at.unwrap_or_else(Instant::now);
        if let Some(inspectors) = &mut state.inspectors
            && let Err(wrong) = inspectors[side].feed(&bytes)
        {
            let what = format!("between nodes on {}: {wrong}", connection.addresses[1]);
            network.fault(what);
        }
        drop(state);
        let at = network.send(connection, side, Parcel::Data(bytes.freeze()), not_before);
        connection.state.lock().lanes[side].last_at = Some(at);
        Some(Ok(n))
    }

    fn end(&self, parcel: Parcel) {
        let Ok(network) = network::current() else { return };
        let not_before = {
            let mut state = self.connection.state.lock();
            let lane = &mut state.lanes[self.side];
            if lane.ended && matches!(parcel, Parcel::Fin) {
                return;
            }
            lane.ended = true;
            lane.last_at.unwrap_or_else(Instant::now)
        };
        let at = network.send(&self.connection, self.side, parcel, not_before);
        self.connection.state.lock().lanes[self.side].last_at = Some(at);
    }

    pub async fn readable(&self) -> io::Result<()> {
        poll_fn(|cx| match self.is_readable(cx.waker()) {
            true => Poll::Ready(Ok(())),
            false => Poll::Pending,
        })
        .await
    }

    pub fn try_read(&self, buf: &mut [u8]) -> io::Result<usize> {
        let mut take = |bytes: &[u8]| {
            let n = bytes.len().min(buf.len());
            buf[..n].copy_from_slice(&bytes[..n]);
            n
        };
        self.read_now(None, &mut take)
            .unwrap_or_else(|| Err(io::ErrorKind::WouldBlock.into()))
    }

    pub fn try_read_buf(&self, buf: &mut BytesMut) -> io::Result<usize> {
        let mut take = |bytes: &[u8]| {
            let n = bytes.len().min(buf.capacity() - buf.len());
            buf.put_slice(&bytes[..n]);
            n
        };
        self.read_now(None, &mut take)
            .unwrap_or_else(|| Err(io::ErrorKind::WouldBlock.into()))
    }

    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        let slices = [IoSlice::new(bytes)];
        self.write_now(None, &slices)
            .unwrap_or_else(|| Err(io::ErrorKind::WouldBlock.into()))
    }
}

impl Drop for TcpStream {
    fn drop(&mut self) {
        let (unread, known) = {
            let mut state = self.connection.state.lock();
            state.open[self.side] = false;
            let lane = &mut state.lanes[1 - self.side];
            let unread = !lane.arrived.is_empty();
            lane.arrived = BytesMut::new();
            (unread, state.reset[self.side] || state.is_cut)
        };
        if !known {
            let abort = unread || self.aborts.load(Relaxed);
            self.end(if abort { Parcel::Reset } else { Parcel::Fin });
        }
    }
}

impl fmt::Debug for TcpStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TcpStream({}, side {})", self.connection.describe(), self.side)
    }
}

impl AsFd for TcpStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        NOTHING.as_fd()
    }
}

impl AsyncRead for TcpStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut take = |bytes: &[u8]| {
            let n = bytes.len().min(buf.remaining());
            buf.put_slice(&bytes[..n]);
            n
        };
        match self.read_now(Some(cx.waker()), &mut take) {
            Some(result) => Poll::Ready(result.map(|_| ())),
            None => Poll::Pending,
        }
    }
}

impl AsyncWrite for TcpStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.write_now(Some(cx.waker()), slices)
            .map_or(Poll::Pending, Poll::Ready)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.connection.state.lock().reset[self.side] {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        }
        self.end(Parcel::Fin);
        Poll::Ready(Ok(()))
    }
}

/// A socket that is not connected yet.
#[derive(Debug)]
pub struct TcpSocket {
    netns: u64,
    bound: Mutex<Option<SocketAddr>>,
}

impl TcpSocket {
    /// In a pod's namespace.
    pub fn in_netns(netns: u64) -> TcpSocket {
        TcpSocket {
            netns,
            bound: Mutex::new(None),
        }
    }

    pub fn new_v4() -> io::Result<TcpSocket> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub fn new_v6() -> io::Result<TcpSocket> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub fn bind(&self, to: SocketAddr) -> io::Result<()> {
        let port = match to.port() {
            0 => network::current()?.port(),
            port => port,
        };
        *self.bound.lock() = Some(SocketAddr::new(to.ip(), port));
        Ok(())
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.bound.lock().ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
    }

    pub async fn connect(self, to: SocketAddr) -> io::Result<TcpStream> {
        let bound = *self.bound.lock();
        network::current()?.connect(self.netns, bound, to).await
    }
}

impl AsFd for TcpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        NOTHING.as_fd()
    }
}

/// A listener that nobody accepts on yet.
#[derive(Clone, Debug)]
pub struct StdListener(pub Arc<Backlog>);

/// A listener. Its queue may be another one's too, as that of a socket with two descriptors is.
#[derive(Debug)]
pub struct TcpListener(Arc<Backlog>);

impl TcpListener {
    pub fn from_std(listener: StdListener) -> io::Result<TcpListener> {
        Ok(TcpListener(listener.0))
    }

    pub async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        poll_fn(|cx| match self.0.poll_accept(cx.waker()) {
            Some(accepted) => Poll::Ready(Ok(accepted)),
            None => Poll::Pending,
        })
        .await
    }
}

/// Kept for the compiler: a parcel's bytes are cheap to hold.
const _: fn() = || {
    fn is_send<T: Send>() {}
    is_send::<TcpStream>();
    is_send::<Bytes>();
};
