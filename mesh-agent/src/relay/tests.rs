//! The relay between real sockets, bare and through a flow in a tunnel: what an application sees of the other one.

use std::{future::pending, pin::pin, rc::Rc, sync::Arc, time::SystemTime};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::oneshot,
    task::LocalSet,
};

use super::*;
use crate::{
    identity::{
        CredentialStore,
        testing::{TestCa, id},
    },
    net::{OwnNetns, SocketSource, SystemClock},
    tunnel::{Accepted, PeerPatience, Pool, PoolConfig, Preface, TunnelKey, server},
};

const PATIENCE: Duration = Duration::from_secs(30);

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let local = LocalSet::new();
    runtime.block_on(local.run_until(async { tokio::time::timeout(PATIENCE, test).await.expect("stuck") }))
}

async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (dialed, accepted) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (dialed.unwrap(), accepted.unwrap().0)
}

/// Two applications, and the relays between them.
struct Path {
    source: TcpStream,
    destination: TcpStream,
    /// How the relay at the source ended.
    end: oneshot::Receiver<RelayEnd>,
    pool: Option<Pool>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// One relay between two sockets.
    Bare,
    /// A relay into a flow and one out of it.
    Flow,
}

async fn path(kind: Kind, stop: impl Future<Output = Stop> + 'static, idle: Option<Duration>) -> Path {
    let (source, captured) = sockets().await;
    let (delivered, destination) = sockets().await;
    let (done, end) = oneshot::channel();
    if kind == Kind::Bare {
        tokio::task::spawn_local(async move {
            let _ = done.send(relay(captured, delivered, &Counters::default(), idle, pin!(stop)).await);
        });
        return Path {
            source,
            destination,
            end,
            pool: None,
        };
    }
    let ca = TestCa::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let credential = ca.credential("cart");
    tokio::task::spawn_local(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let accepted = server::accept(
            tcp,
            &[],
            &credential,
            SystemTime::now(),
            PATIENCE,
            PeerPatience::default(),
        )
        .await
        .unwrap();
        let Accepted::Flow(mut flows, _) = accepted else {
            panic!("not a flow")
        };
        let mut delivered = Some(delivered);
        while let Ok(Some(offer)) = flows.next(PATIENCE).await {
            let flow = offer.accept().unwrap();
            let delivered = delivered.take().expect("one flow in this test");
            relay(flow, delivered, &Counters::default(), None, pending()).await;
        }
    });
    let store = CredentialStore::new();
    store.put(ca.credential("front"));
    let pool = Pool::new(PoolConfig::default(), store, Arc::new(SystemClock));
    let key = TunnelKey {
        source: id("front"),
        destination: id("cart"),
        address,
        netns: OwnNetns.netns(),
    };
    let preface = Preface::new(captured.peer_addr().unwrap());
    let flow = pool.flow(&key, &OwnNetns, &preface, false).await.unwrap();
    tokio::task::spawn_local(async move {
        let _ = done.send(relay(captured, flow, &Counters::default(), idle, pin!(stop)).await);
    });
    Path {
        source,
        destination,
        end,
        pool: Some(pool),
    }
}

async fn read_all(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await.map(|_| all)
}

#[test]
fn requests_and_answers_pass_and_ends_are_ends() {
    for kind in [Kind::Bare, Kind::Flow] {
        run(async {
            let mut path = path(kind, pending(), None).await;
            path.source.write_all(b"request").await.unwrap();
            path.source.shutdown().await.unwrap();
            assert_eq!(read_all(&mut path.destination).await.unwrap(), b"request");
            path.destination.write_all(b"the answer after the end").await.unwrap();
            path.destination.shutdown().await.unwrap();
            assert_eq!(read_all(&mut path.source).await.unwrap(), b"the answer after the end");
            let end = path.end.await.unwrap();
            assert_eq!((end.how, end.sent, end.received), (How::Closed, 7, 24), "{kind:?}");
            if let Some(pool) = path.pool {
                assert_eq!(pool.gauge().ready, 1, "the tunnel is free again");
            }
        });
    }
}

/// SMTP and MySQL: the destination speaks first, and here it ends first too.
#[test]
fn the_destination_may_speak_and_end_first() {
    for kind in [Kind::Bare, Kind::Flow] {
        run(async {
            let mut path = path(kind, pending(), None).await;
            path.destination.write_all(b"220 ready").await.unwrap();
            path.destination.shutdown().await.unwrap();
            assert_eq!(read_all(&mut path.source).await.unwrap(), b"220 ready");
            path.source.write_all(b"late but heard").await.unwrap();
            path.source.shutdown().await.unwrap();
            assert_eq!(read_all(&mut path.destination).await.unwrap(), b"late but heard");
            assert_eq!(path.end.await.unwrap().how, How::Closed);
        });
    }
}

#[test]
fn large_transfers_are_whole_both_ways_at_once() {
    const TOTAL: usize = 64 << 20;
    fn chunk(n: usize, seed: u8) -> Vec<u8> {
        vec![(n * 31 + n / 251) as u8 ^ seed; 60_001]
    }
    async fn both(stream: TcpStream, out: u8, back: u8) {
        let (mut reader, mut writer) = stream.into_split();
        let send = async {
            for n in 0..TOTAL / 60_001 {
                writer.write_all(&chunk(n, out)).await.unwrap();
            }
            writer.shutdown().await.unwrap();
        };
        let receive = async {
            let mut buffer = vec![0; 60_001];
            for n in 0..TOTAL / 60_001 {
                reader.read_exact(&mut buffer).await.unwrap();
                assert!(buffer == chunk(n, back), "chunk {n}");
            }
            assert_eq!(reader.read(&mut buffer).await.unwrap(), 0);
        };
        tokio::join!(send, receive);
    }
    for kind in [Kind::Bare, Kind::Flow] {
        run(async {
            let path = path(kind, pending(), None).await;
            tokio::join!(both(path.source, 1, 2), both(path.destination, 2, 1));
            let end = path.end.await.unwrap();
            let total = (TOTAL / 60_001 * 60_001) as u64;
            assert_eq!((end.how, end.sent, end.received), (How::Closed, total, total));
        });
    }
}

#[test]
fn a_reset_on_one_side_is_a_reset_on_the_other() {
    for kind in [Kind::Bare, Kind::Flow] {
        for source_resets in [true, false] {
            run(async {
                let mut path = path(kind, pending(), None).await;
                // Something passes first, so that the flow is established.
                path.source.write_all(b"a").await.unwrap();
                path.destination.read_exact(&mut [0]).await.unwrap();
                path.destination.write_all(b"b").await.unwrap();
                path.source.read_exact(&mut [0]).await.unwrap();
                let (resetting, mut other) = match source_resets {
                    true => (path.source, path.destination),
                    false => (path.destination, path.source),
                };
                net::reset_on_close(&resetting);
                drop(resetting);
                let error = other.read(&mut [0]).await.unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{kind:?} {source_resets}");
                let end = path.end.await.unwrap();
                let side = if source_resets { Side::First } else { Side::Second };
                assert_eq!(end.how, How::Reset(side), "{kind:?} {source_resets}");
                if let Some(pool) = path.pool {
                    assert_eq!(pool.gauge().ready, 0, "such a tunnel is not used again");
                }
            });
        }
    }
}

/// A destination that answers and leaves without reading on: the answer arrives, although writing to it failed.
#[test]
fn what_was_said_before_the_end_arrives() {
    run(async {
        let mut path = path(Kind::Bare, pending(), None).await;
        path.destination.write_all(&[7; 100_000]).await.unwrap();
        path.destination.shutdown().await.unwrap();
        let mut got = vec![0; 100_000];
        path.source.read_exact(&mut got).await.unwrap();
        drop(path.destination);
        // The socket is gone: the first write is answered by a reset, and the relay sees it.
        while path.source.write_all(&[1; 1000]).await.is_ok() {
            tokio::task::yield_now().await;
        }
        assert!(matches!(path.end.await.unwrap().how, How::Reset(Side::Second)));
        assert!(got.iter().all(|byte| *byte == 7));
    });
}

#[test]
fn a_slow_reader_holds_the_writer_back() {
    for kind in [Kind::Bare, Kind::Flow] {
        run(async {
            let path = path(kind, pending(), None).await;
            let block = vec![5; 1 << 16];
            let mut accepted = 0usize;
            // What fits into socket buffers on the way, and no more.
            loop {
                match tokio::time::timeout(Duration::from_millis(300), path.source.writable()).await {
                    Ok(ready) => ready.unwrap(),
                    Err(_) => break,
                }
                if let Ok(n) = path.source.try_write(&block) {
                    accepted += n;
                }
                assert!(accepted < 64 << 20, "{kind:?}: nobody holds back");
            }
            drop(path.source);
            let mut destination = path.destination;
            let mut got = Vec::new();
            destination.read_to_end(&mut got).await.unwrap();
            assert_eq!(got.len(), accepted, "and nothing is lost");
        });
    }
}

#[test]
fn a_stopped_relay_resets_both() {
    for (stop, how) in [(Stop::PermitLost, How::PermitLost), (Stop::Drained, How::Drained)] {
        for kind in [Kind::Bare, Kind::Flow] {
            run(async {
                let (now, told) = oneshot::channel();
                let told = async move { told.await.unwrap() };
                let mut path = path(kind, told, None).await;
                path.source.write_all(b"a").await.unwrap();
                path.destination.read_exact(&mut [0]).await.unwrap();
                now.send(stop).unwrap();
                for side in [&mut path.source, &mut path.destination] {
                    assert_eq!(
                        side.read(&mut [0]).await.unwrap_err().kind(),
                        io::ErrorKind::ConnectionReset
                    );
                }
                assert_eq!(path.end.await.unwrap().how, how);
            });
        }
    }
}

#[test]
fn an_idle_relay_ends_and_an_active_one_does_not() {
    let idle = Duration::from_secs(60);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(LocalSet::new().run_until(async {
        let mut path = path(Kind::Bare, pending(), Some(idle)).await;
        let start = Instant::now();
        for _ in 0..5 {
            tokio::time::advance(idle / 2 + Duration::from_secs(1)).await;
            path.source.write_all(b"a").await.unwrap();
            path.destination.read_exact(&mut [0]).await.unwrap();
        }
        let end = path.end.await.unwrap();
        assert_eq!((end.how, end.sent), (How::IdleTimeout, 5));
        assert!(start.elapsed() > idle * 3);
    }));
}

/// Each open connection costs one of these: a figure to be kept, not a limit to be raised.
#[test]
fn the_future_is_small() {
    run(async {
        let (a, b) = sockets().await;
        let counters = Rc::new(Counters::default());
        let future = relay(a, b, &counters, None, pending());
        assert!(size_of_val(&future) <= 512, "{}", size_of_val(&future));
        assert!(size_of::<FlowStream>() <= 8, "boxed");
    });
}
