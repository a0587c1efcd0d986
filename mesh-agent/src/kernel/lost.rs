//! Connections whose peers have vanished: found by what the kernel knows of their acknowledgements, and ended.
//!
//! A worker's tunnels are watched here, one list for each thread. Only what is owed counts: a peer that has nothing to
//! say, or whose application takes nothing, is not lost. Must never end a connection whose peer's kernel answers.

use std::{
    cell::RefCell,
    marker::PhantomData,
    os::fd::{AsRawFd, BorrowedFd, RawFd},
    rc::Rc,
    time::{Duration, Instant},
};

use tokio::net::TcpStream;

use crate::net;

/// Unanswered probes of a reader's window before it counts as silent.
const WINDOW_PROBES: u8 = 3;

thread_local! {
    static WATCHED: RefCell<Watchlist> = const { RefCell::new(Watchlist { all: Vec::new(), free: Vec::new() }) };
}

/// The watched sockets of a thread.
struct Watchlist {
    all: Vec<Option<Watched>>,
    free: Vec<usize>,
}

/// A socket whose peer may vanish.
struct Watched {
    fd: RawFd,
    patience: Duration,
    /// Since when nothing that was sent was acknowledged, as far as was looked.
    stuck: Option<Instant>,
}

/// A socket that is looked after by [`give_up`] on this thread. Must be dropped before its socket is closed, and
/// on its own thread, which the compiler sees to.
#[derive(Debug)]
pub struct Watch {
    place: usize,
    _thread: PhantomData<Rc<()>>,
}

/// Watches a connection to a peer for it to be lost: nothing that is owed may stay unacknowledged for longer than
/// `patience`, and neither may the peer's kernel leave probes unanswered for so long.
///
/// Keepalive probes find a silent peer only while nothing is on its way; what is on its way the kernel repeats for a
/// quarter of an hour (`tcp_retries2`). `TCP_USER_TIMEOUT` is no way out: it also ends connections whose reader takes
/// nothing for as long (tcp_probe_timer, Linux 6.1 to 6.18), and a reader may take its time.
pub fn watch(stream: &TcpStream, patience: Duration) -> Watch {
    // Half of it until the first probe, the other half for their answers; the kernel counts whole seconds.
    let interval = (patience / (2 * net::KEEPALIVE_PROBES)).max(Duration::from_secs(1));
    net::keep_alive(stream, (patience / 2).max(Duration::from_secs(1)), interval);
    let watched = Some(Watched {
        fd: stream.as_raw_fd(),
        patience,
        stuck: None,
    });
    WATCHED.with_borrow_mut(|Watchlist { all, free }| {
        let place = free.pop().unwrap_or(all.len());
        match all.get_mut(place) {
            Some(free) => *free = watched,
            None => all.push(watched),
        }
        Watch {
            place,
            _thread: PhantomData,
        }
    })
}

impl Drop for Watch {
    fn drop(&mut self) {
        // At the thread's end there is nobody left to look.
        let _ = WATCHED.try_with(|list| {
            let Watchlist { all, free } = &mut *list.borrow_mut();
            if let Some(place) = all.get_mut(self.place) {
                *place = None;
                free.push(self.place);
            }
        });
    }
}

/// Ends the watched connections of this thread whose peers have not acknowledged anything for too long: their owners
/// read an end, and the kernel forgets them. To be called every few seconds; a look costs one system call for each
/// watched connection. Returns how many were ended.
pub fn give_up(now: Instant) -> usize {
    WATCHED.with_borrow_mut(|list| {
        let mut lost = 0;
        for watched in list.all.iter_mut().flatten() {
            // SAFETY: the descriptor is that of an open socket: its `Watch` is dropped before it is closed.
            let socket = unsafe { BorrowedFd::borrow_raw(watched.fd) };
            let Some(sent) = unacknowledged(socket) else {
                watched.stuck = None;
                continue;
            };
            let stuck = now.saturating_duration_since(*watched.stuck.get_or_insert(now));
            // An acknowledgement between two looks counts.
            if stuck >= watched.patience && sent >= watched.patience {
                lost += 1;
                watched.stuck = None;
                let socket = socket2::SockRef::from(&socket);
                let _ = socket.set_linger(Some(Duration::ZERO));
                let _ = socket.shutdown(std::net::Shutdown::Both);
            }
        }
        lost
    })
}

/// For how long nothing was acknowledged while the kernel repeats what it sent; `None` if it does not.
fn unacknowledged(socket: BorrowedFd<'_>) -> Option<Duration> {
    // SAFETY: plain numbers, for which zero is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to a structure of that size.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    // A reader that takes nothing answers each probe of its window, which starts their count anew.
    let is_stuck = (info.tcpi_unacked > 0 && info.tcpi_retransmits > 0) || info.tcpi_probes >= WINDOW_PROBES;
    (result == 0 && is_stuck).then(|| Duration::from_millis(info.tcpi_last_ack_recv.into()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[tokio::test]
    async fn a_reader_that_takes_nothing_is_not_lost() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut writer = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (_reader, _) = listener.accept().unwrap();
        writer.set_nonblocking(true).unwrap();
        while writer.write(&[0; 65_536]).is_ok() {}
        let stream = TcpStream::from_std(writer).unwrap();
        let now = tokio::time::Instant::now().into_std();
        let watched = watch(&stream, Duration::from_secs(2));
        for hours in 0..4 {
            assert_eq!(give_up(now + Duration::from_secs(3600 * hours)), 0);
        }
        drop(watched);
        // Its place is used again.
        let again = watch(&stream, Duration::from_secs(2));
        assert_eq!(again.place, 0);
    }
}
