//! The stream against itself and against tokio-rustls, an implementation of its own on rustls' buffered API.

use rand::RngExt as _;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::JoinSet,
};

use super::*;
use crate::identity::{
    Alpn, Credential,
    testing::{TestCa, id},
};

const PATIENCE: Duration = Duration::from_secs(20);

trait Stream: AsyncRead + AsyncWrite + Unpin {}
impl<S: AsyncRead + AsyncWrite + Unpin> Stream for S {}

async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (dialed, accepted) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (dialed.unwrap(), accepted.unwrap().0)
}

fn name() -> ServerName<'static> {
    ServerName::IpAddress("127.0.0.1".parse::<std::net::IpAddr>().unwrap().into())
}

fn credentials() -> (Credential, Credential) {
    let ca = TestCa::new();
    (ca.credential("front"), ca.credential("cart"))
}

async fn ours(client: &Credential, server: &Credential, sockets: (TcpStream, TcpStream)) -> (TlsStream, TlsStream) {
    let (dialed, accepted) = tokio::join!(
        TlsStream::connect(sockets.0, client.client(Alpn::Http).clone(), name(), PATIENCE),
        TlsStream::accept(sockets.1, &[], server.server().clone(), PATIENCE),
    );
    (dialed.unwrap(), accepted.unwrap())
}

async fn pair(client_is_ours: bool, server_is_ours: bool, sockets: (TcpStream, TcpStream)) -> [Box<dyn Stream>; 2] {
    let (client, server) = credentials();
    let config = client.client(Alpn::Http).clone();
    let dial = async {
        if client_is_ours {
            Box::new(TlsStream::connect(sockets.0, config, name(), PATIENCE).await.unwrap()) as Box<dyn Stream>
        } else {
            let connector = tokio_rustls::TlsConnector::from(config);
            Box::new(connector.connect(name(), sockets.0).await.unwrap())
        }
    };
    let accept = async {
        if server_is_ours {
            Box::new(
                TlsStream::accept(sockets.1, &[], server.server().clone(), PATIENCE)
                    .await
                    .unwrap(),
            ) as Box<dyn Stream>
        } else {
            let acceptor = tokio_rustls::TlsAcceptor::from(server.server().clone());
            Box::new(acceptor.accept(sockets.1).await.unwrap())
        }
    };
    let (dialed, accepted) = tokio::join!(dial, accept);
    [dialed, accepted]
}

/// A stream of bytes that depends on a seed only, so that both ends know it.
fn pattern(seed: u64) -> impl FnMut(usize) -> Vec<u8> {
    let mut state = seed | 1;
    move |length| {
        (0..length)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state as u8
            })
            .collect()
    }
}

async fn send(to: &mut (impl AsyncWrite + Unpin), seed: u64, total: usize) {
    let (mut bytes, mut sent) = (pattern(seed), 0);
    while sent < total {
        let size = match rand::random_range(0..4) {
            0 => rand::random_range(1..20),
            1 => rand::random_range(1..2000),
            2 => rand::random_range(16_000..17_000),
            _ => rand::random_range(1..200_000),
        };
        let chunk = bytes(size.min(total - sent));
        to.write_all(&chunk).await.unwrap();
        sent += chunk.len();
    }
    to.shutdown().await.unwrap();
}

async fn receive(from: &mut (impl AsyncRead + Unpin), seed: u64, total: usize) {
    let (mut bytes, mut received, mut buffer) = (pattern(seed), 0, vec![0; 150_000]);
    loop {
        let room = rand::rng().random_range(1..buffer.len());
        let n = from.read(&mut buffer[..room]).await.unwrap();
        if n == 0 {
            break;
        }
        assert_eq!(buffer[..n], bytes(n), "at {received}");
        received += n;
    }
    assert_eq!(received, total);
}

/// Both directions at once, chunks of every size, then an end on each side.
#[tokio::test]
async fn bytes_are_whole_against_every_peer() {
    const TOTAL: usize = 6 << 20;
    for (client, server) in [(true, true), (true, false), (false, true)] {
        for small_buffers in [false, true] {
            let sockets = sockets().await;
            if small_buffers {
                for socket in [&sockets.0, &sockets.1] {
                    socket2::SockRef::from(socket).set_send_buffer_size(4096).unwrap();
                }
            }
            let total = if small_buffers { TOTAL / 8 } else { TOTAL };
            let [dialed, accepted] = pair(client, server, sockets).await;
            // On one thread, as the tunnels of a worker.
            let local = tokio::task::LocalSet::new();
            let mut tasks = JoinSet::new();
            for (stream, out, back) in [(dialed, 1, 2), (accepted, 2, 1)] {
                let (mut reader, mut writer) = tokio::io::split(stream);
                tasks.spawn_local_on(async move { send(&mut writer, out, total).await }, &local);
                tasks.spawn_local_on(async move { receive(&mut reader, back, total).await }, &local);
            }
            let done = tokio::time::timeout(PATIENCE, local.run_until(tasks.join_all())).await;
            assert!(
                done.is_ok(),
                "stuck: client ours {client}, server ours {server}, small {small_buffers}"
            );
        }
    }
}

#[tokio::test]
async fn an_idle_stream_keeps_no_buffer() {
    let (client, server) = credentials();
    let (mut dialed, mut accepted) = ours(&client, &server, sockets().await).await;
    let mut buffer = vec![0; 300];
    for _ in 0..20 {
        dialed.write_all(&[7; 100_000]).await.unwrap();
        let mut left = 100_000;
        while left > 0 {
            left -= accepted.read(&mut buffer).await.unwrap();
        }
        accepted.write_all(&[8; 1]).await.unwrap();
        assert_eq!(dialed.read(&mut buffer).await.unwrap(), 1);
    }
    for stream in [&dialed, &accepted] {
        assert_eq!(stream.session.key_exchange(), Some(rustls::NamedGroup::X25519MLKEM768));
        assert_eq!(stream.incoming.capacity(), 0);
        assert_eq!(stream.plain.bytes.capacity(), 0);
        assert_eq!(stream.outgoing.bytes.capacity(), 0);
        assert!(stream.is_settled());
    }
    assert!(size_of::<TlsStream>() <= 256, "{}", size_of::<TlsStream>());
}

#[tokio::test]
async fn a_writer_without_a_reader_is_held_back() {
    let (client, server) = credentials();
    let (mut dialed, _accepted) = ours(&client, &server, sockets().await).await;
    let mut cx = Context::from_waker(std::task::Waker::noop());
    let mut written = 0;
    loop {
        match Pin::new(&mut dialed).poll_write(&mut cx, &[1; 1 << 20]) {
            Poll::Ready(n) => written += n.unwrap(),
            // Other tasks do not run, but the reactor must be seen for readiness to be true.
            Poll::Pending => {
                tokio::task::yield_now().await;
                if Pin::new(&mut dialed).poll_write(&mut cx, &[1; 1]).is_pending() {
                    break;
                }
            }
        }
        assert!(written < 1 << 28);
        assert!(dialed.outgoing.bytes.len() <= OUTPUT_BYTES);
    }
}

#[tokio::test]
async fn a_cut_stream_is_an_error_and_an_ended_one_is_not() {
    for cut in [false, true] {
        let (client, server) = credentials();
        let (mut dialed, mut accepted) = ours(&client, &server, sockets().await).await;
        accepted.write_all(b"all but the end").await.unwrap();
        if !cut {
            accepted.shutdown().await.unwrap();
        }
        drop(accepted);
        let mut got = Vec::new();
        let end = dialed.read_to_end(&mut got).await;
        assert_eq!(got, b"all but the end");
        match cut {
            false => assert_eq!(end.unwrap(), got.len()),
            true => assert!(matches!(
                end.unwrap_err().kind(),
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
            )),
        }
    }
}

/// After our end, the peer's bytes still come.
#[tokio::test]
async fn half_close_leaves_the_other_direction_open() {
    let (client, server) = credentials();
    let (mut dialed, mut accepted) = ours(&client, &server, sockets().await).await;
    dialed.shutdown().await.unwrap();
    assert_eq!(accepted.read(&mut [0; 10]).await.unwrap(), 0);
    accepted.write_all(b"late").await.unwrap();
    accepted.shutdown().await.unwrap();
    let mut got = Vec::new();
    dialed.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"late");
    assert!(dialed.write_all(b"x").await.is_err());
}

#[tokio::test]
async fn a_record_that_was_touched_ends_the_stream() {
    let (client, server) = credentials();
    let (dialed, mut accepted) = ours(&client, &server, sockets().await).await;
    let mut raw = dialed.tcp;
    let forged = [&[23, 3, 3, 0, 32][..], &[9; 32]].concat();
    raw.write_all(&forged).await.unwrap();
    let error = accepted.read(&mut [0; 10]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    assert!(accepted.write_all(b"x").await.is_err(), "and stays ended");
    let mut alert = [0; 100];
    assert!(raw.read(&mut alert).await.unwrap() > 5, "the peer is told by an alert");
}

/// What was sniffed is handed in, whole or in part.
#[tokio::test]
async fn a_client_hello_that_was_read_before_counts() {
    let (client, server) = credentials();
    for sniffed in [1, 5, 100, 1000, 5000] {
        let (dialed, mut accepted) = sockets().await;
        let dial = TlsStream::connect(dialed, client.client(Alpn::Tcp).clone(), name(), PATIENCE);
        let accept = async {
            let mut prefix = vec![0; sniffed];
            let n = match sniffed {
                ..=1000 => accepted.read_exact(&mut prefix).await.unwrap(),
                _ => accepted.read(&mut prefix).await.unwrap(),
            };
            TlsStream::accept(accepted, &prefix[..n], server.server().clone(), PATIENCE)
                .await
                .unwrap()
        };
        let (dialed, accepted) = tokio::join!(dial, accept);
        let mut dialed = dialed.unwrap();
        let mut accepted = accepted;
        assert_eq!(accepted.alpn(), Some(Alpn::Tcp.as_bytes()));
        dialed.write_all(b"hello").await.unwrap();
        let mut got = [0; 5];
        accepted.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"hello");
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_runs_into_the_timeout() {
    let (client, _) = credentials();
    let (dialed, _silent) = sockets().await;
    let error = TlsStream::connect(dialed, client.client(Alpn::Http).clone(), name(), PATIENCE)
        .await
        .unwrap_err();
    assert!(matches!(error, HandshakeError::Timeout(PATIENCE)), "{error}");
}

#[tokio::test]
async fn a_peer_that_speaks_no_tls_fails_the_handshake() {
    let (client, server) = credentials();
    let cases: &[(&[u8], bool)] = &[
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", true),
        (b"GET / HTTP/1.1\r\n\r\n", false),
    ];
    for (plain, we_dial) in cases {
        let (mut raw, ours) = sockets().await;
        raw.write_all(plain).await.unwrap();
        let result = if *we_dial {
            TlsStream::connect(ours, client.client(Alpn::Http).clone(), name(), PATIENCE).await
        } else {
            TlsStream::accept(ours, &[], server.server().clone(), PATIENCE).await
        };
        assert!(matches!(result.unwrap_err(), HandshakeError::Tls(_)));
        let (raw, ours) = sockets().await;
        drop(raw);
        let result = TlsStream::connect(ours, client.client(Alpn::Http).clone(), name(), PATIENCE).await;
        assert!(
            matches!(result.unwrap_err(), HandshakeError::Io(_)),
            "a peer that leaves"
        );
    }
}

#[tokio::test]
async fn a_head_and_its_body_make_one_record() {
    let (client, server) = credentials();
    let (mut dialed, accepted) = ours(&client, &server, sockets().await).await;
    let slices = [IoSlice::new(b"head"), IoSlice::new(b""), IoSlice::new(b"body")];
    let n = poll_fn(|cx| Pin::new(&mut dialed).poll_write_vectored(cx, &slices))
        .await
        .unwrap();
    assert_eq!(n, 8);
    let mut raw = accepted.tcp;
    let mut record = [0; 200];
    // Five bytes of header, eight of payload, one of type, sixteen of tag.
    assert_eq!(raw.read(&mut record).await.unwrap(), 30);
}

/// The first connection between two parties is a whole handshake, the next one resumes, and another credential of the
/// same identity never resumes the old one's sessions.
#[tokio::test]
async fn sessions_resume_within_a_credential_only() {
    let ca = TestCa::new();
    let (client, server) = (ca.credential("front"), ca.credential("cart"));
    let renewed = ca.credential("front");
    let rebuilt = server.with_bundle(ca.bundle(), std::time::SystemTime::now()).unwrap();
    let cases = [
        ("first", &client, &server, false),
        ("second", &client, &server, true),
        ("renewed source", &renewed, &server, false),
        ("new bundle at the destination", &client, &rebuilt, false),
        ("and again", &client, &rebuilt, true),
    ];
    for (case, client, server, resumed) in cases {
        let (mut dialed, mut accepted) = ours(client, server, sockets().await).await;
        assert_eq!(
            (dialed.is_resumed(), accepted.is_resumed()),
            (resumed, resumed),
            "{case}"
        );
        for (stream, peer) in [(&dialed, "cart"), (&accepted, "front")] {
            let found = crate::identity::verify::peer(
                stream.peer_certificates(),
                client.bundle(),
                std::time::SystemTime::now(),
            );
            assert_eq!(found.unwrap().spiffe, id(peer), "{case}");
        }
        // The ticket comes with the first bytes.
        accepted.write_all(b"x").await.unwrap();
        dialed.read_exact(&mut [0]).await.unwrap();
        assert!(dialed.is_quiet());
    }
}
