//! Tunnels over real sockets on loopback: who gets in, what comes through, what is used again.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::LocalSet,
};

use super::*;
use crate::{
    identity::{
        Credential, CredentialStore,
        testing::{HOUR, TestCa, id},
    },
    net::{OwnNetns, SocketSource, SystemClock},
    tls::{HandshakeError, TlsStream},
};

const PATIENCE: Duration = Duration::from_secs(20);

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let local = LocalSet::new();
    runtime.block_on(local.run_until(async { tokio::time::timeout(PATIENCE, test).await.expect("stuck") }))
}

fn pool(credential: Credential, config: PoolConfig) -> (Pool, Arc<CredentialStore>) {
    let store = CredentialStore::new();
    store.put(credential);
    (Pool::new(config, store.clone(), Arc::new(SystemClock)), store)
}

fn key(address: SocketAddr) -> TunnelKey {
    TunnelKey {
        source: id("front"),
        destination: id("cart"),
        address,
        netns: OwnNetns.netns(),
    }
}

fn preface() -> Preface {
    Preface::new("10.0.0.1:4321".parse().unwrap())
}

/// A destination that accepts tunnels and does `with` each of them. Counts what it accepted.
struct Destination {
    address: SocketAddr,
    tunnels: Rc<RefCell<Vec<Result<PeerIdentitySeen, String>>>>,
}

#[derive(Clone, Debug, PartialEq)]
struct PeerIdentitySeen(String);

impl Destination {
    async fn start<F: Future<Output = ()> + 'static>(
        credential: Credential,
        with: impl Fn(Accepted) -> F + 'static,
    ) -> Destination {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tunnels = Rc::new(RefCell::new(Vec::new()));
        let seen = tunnels.clone();
        let (credential, with) = (Rc::new(credential), Rc::new(with));
        tokio::task::spawn_local(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (credential, with, seen) = (credential.clone(), with.clone(), seen.clone());
                tokio::task::spawn_local(async move {
                    match server::accept(
                        tcp,
                        &[],
                        &credential,
                        SystemTime::now(),
                        PATIENCE,
                        PeerPatience::default(),
                    )
                    .await
                    {
                        Ok(accepted) => {
                            let (Accepted::Http(_, peer) | Accepted::Flow(_, peer)) = &accepted;
                            seen.borrow_mut().push(Ok(PeerIdentitySeen(peer.spiffe.to_string())));
                            with(accepted).await;
                        }
                        Err(error) => seen.borrow_mut().push(Err(error.to_string())),
                    }
                });
            }
        });
        Destination { address, tunnels }
    }

    fn accepted(&self) -> usize {
        self.tunnels.borrow().iter().filter(|seen| seen.is_ok()).count()
    }
}

/// Echoes flows, and HTTP tunnels as plain bytes.
async fn echo(accepted: Accepted) {
    match accepted {
        Accepted::Http(mut transport, _) => {
            let mut buffer = [0; 1000];
            while let Ok(n @ 1..) = transport.read(&mut buffer).await {
                transport.write_all(&buffer[..n]).await.unwrap();
            }
        }
        Accepted::Flow(mut flows, _) => {
            while let Ok(Some(offer)) = flows.next(PATIENCE).await {
                assert_eq!(offer.preface().source, preface().source);
                let Ok(flow) = offer.accept() else { return };
                let (mut reader, mut writer) = tokio::io::split(flow);
                let copied = tokio::io::copy(&mut reader, &mut writer).await;
                if copied.is_ok() {
                    let _ = writer.shutdown().await;
                }
            }
        }
    }
}

async fn exchange(flow: &mut FlowStream, bytes: &[u8]) {
    flow.write_all(bytes).await.unwrap();
    flow.shutdown().await.unwrap();
    let mut back = Vec::new();
    flow.read_to_end(&mut back).await.unwrap();
    assert_eq!(back, bytes);
}

#[test]
fn a_tunnel_opens_between_the_right_two_and_nobody_else() {
    run(async {
        let (ca, other) = (TestCa::new(), TestCa::new());
        let soon_over = SystemTime::now() - Duration::from_secs(5);
        type Check = fn(&Result<PooledTransport, DialError>) -> bool;
        let good: Check = |result| result.is_ok();
        let cases: &[(&str, Credential, Credential, Check)] = &[
            ("right", ca.credential("front"), ca.credential("cart"), good),
            (
                "somebody else answers",
                ca.credential("front"),
                ca.credential("thief"),
                |result| {
                    matches!(result, Err(DialError::WrongIdentity { expected, found })
                    if *expected == id("cart") && *found == id("thief"))
                },
            ),
            (
                "another CA answers",
                ca.credential("front"),
                other.credential("cart"),
                |result| matches!(result, Err(DialError::Handshake(HandshakeError::Tls(_)))),
            ),
            (
                "expired destination",
                ca.credential("front"),
                ca.credential_until("cart", soon_over),
                |result| {
                    matches!(
                        result,
                        Err(DialError::Handshake(HandshakeError::Tls(
                            rustls::Error::InvalidCertificate(rustls::CertificateError::Expired)
                        )))
                    )
                },
            ),
            (
                "no valid credential here",
                ca.credential_until("front", soon_over),
                ca.credential("cart"),
                |result| matches!(result, Err(DialError::NoCredential(_))),
            ),
        ];
        // Credentials are not Clone: rebuilt from the same chain and key.
        let copy = |credential: &Credential| {
            let then = credential.not_before() + Duration::from_secs(60);
            credential.with_bundle(credential.bundle().clone(), then).unwrap()
        };
        for (case, source, destination, expected) in cases {
            let destination = Destination::start(copy(destination), echo).await;
            let (pool, _) = pool(copy(source), PoolConfig::default());
            let result = pool.http1(&key(destination.address), &OwnNetns, false).await;
            assert!(expected(&result), "{case}: {:?}", result.err());
        }
    });
}

/// In TLS 1.3 the source is through before the destination has judged it: the refusal comes with the first read.
#[test]
fn a_source_of_another_ca_or_expired_or_without_certificate_is_refused() {
    run(async {
        let (ca, other) = (TestCa::new(), TestCa::new());
        let destination = Destination::start(ca.credential("cart"), echo).await;

        // A source that trusts the destination's CA but shows a certificate of another one.
        let (chain, private) = other.leaf(
            &[id("front").as_str()],
            SystemTime::now() - HOUR,
            SystemTime::now() + HOUR,
        );
        let expired = ca.leaf(
            &[id("front").as_str()],
            SystemTime::now() - HOUR,
            SystemTime::now() - Duration::from_secs(5),
        );
        let roots = {
            let mut roots = rustls::RootCertStore::empty();
            roots.add(ca.root.clone()).unwrap();
            Arc::new(roots)
        };
        let forged = |identity: Option<(Vec<_>, _)>| {
            let builder = rustls::ClientConfig::builder_with_provider(Arc::new(crate::identity::provider()))
                .with_protocol_versions(&[&rustls::version::TLS13])
                .unwrap()
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Gullible(roots.clone())));
            let mut config = match identity {
                Some((chain, key)) => builder.with_client_auth_cert(chain, key).unwrap(),
                None => builder.with_no_client_auth(),
            };
            config.alpn_protocols = vec![b"nodemesh-http/1".to_vec()];
            Arc::new(config)
        };
        for (case, config) in [
            ("another CA", forged(Some((chain, private)))),
            ("expired", forged(Some(expired))),
            ("none", forged(None)),
        ] {
            let tcp = tokio::net::TcpStream::connect(destination.address).await.unwrap();
            let name = rustls::pki_types::ServerName::IpAddress(destination.address.ip().into());
            let mut tls = TlsStream::connect(tcp, config, name, PATIENCE).await.unwrap();
            let _ = tls.write_all(b"let me in").await;
            let error = tls.read(&mut [0; 10]).await.expect_err(case);
            assert!(
                error.get_ref().is_some_and(|error| error.to_string().contains("alert")),
                "{case}: {error}"
            );
        }
        assert_eq!(destination.accepted(), 0);
    });
}

/// Trusts any server; only for sources that misbehave.
#[derive(Debug)]
struct Gullible(#[allow(dead_code)] Arc<rustls::RootCertStore>);

impl rustls::client::danger::ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("no".to_owned()))
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        crate::identity::provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[test]
fn the_destination_knows_who_came() {
    run(async {
        let ca = TestCa::new();
        let destination = Destination::start(ca.credential("cart"), echo).await;
        let (pool, _) = pool(ca.credential("front"), PoolConfig::default());
        let mut tunnel = pool.http1(&key(destination.address), &OwnNetns, false).await.unwrap();
        tunnel.write_all(b"hi").await.unwrap();
        tunnel.read_exact(&mut [0; 2]).await.unwrap();
        assert_eq!(
            *destination.tunnels.borrow(),
            [Ok(PeerIdentitySeen(id("front").to_string()))]
        );
        assert_eq!(tunnel.peer().unwrap().spiffe, id("cart"));
    });
}

#[test]
fn a_destination_without_tls_is_an_error_of_the_peer() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::task::spawn_local(async move {
            let (mut tcp, _) = listener.accept().await.unwrap();
            tcp.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        });
        let (pool, _) = pool(TestCa::new().credential("front"), PoolConfig::default());
        let error = pool.http1(&key(address), &OwnNetns, false).await.err().unwrap();
        assert!(
            matches!(error, DialError::Handshake(HandshakeError::Tls(_))),
            "{error:?}"
        );
        assert_eq!((error.blame(), error.retry()), (Blame::Peer, Retry::Safe));
        assert_eq!(pool.gauge(), slots::Gauge::default(), "a failed tunnel is not counted");
    });
}

#[test]
fn flows_follow_each_other_in_one_tunnel() {
    run(async {
        let ca = TestCa::new();
        let destination = Destination::start(ca.credential("cart"), echo).await;
        let (pool, _) = pool(ca.credential("front"), PoolConfig::default());
        for round in 0..50u32 {
            let mut flow = pool
                .flow(&key(destination.address), &OwnNetns, &preface(), false)
                .await
                .unwrap();
            assert_eq!(flow.is_reused(), round > 0);
            assert_eq!(flow.peer().unwrap().spiffe, id("cart"));
            exchange(&mut flow, &vec![round as u8; (round * 977) as usize + 1]).await;
            drop(flow);
            assert_eq!(
                pool.gauge(),
                slots::Gauge {
                    ready: 1,
                    ..Default::default()
                }
            );
        }
        assert_eq!(destination.accepted(), 1, "one handshake for fifty flows");

        let unused = pool
            .flow(&key(destination.address), &OwnNetns, &preface(), false)
            .await
            .unwrap();
        drop(unused);
        let mut empty = pool
            .flow(&key(destination.address), &OwnNetns, &preface(), false)
            .await
            .unwrap();
        exchange(&mut empty, b"").await;
        drop(empty);
        assert_eq!(
            destination.accepted(),
            1,
            "neither an unused nor an empty flow costs the tunnel"
        );
    });
}

#[test]
fn flows_at_once_have_tunnels_of_their_own() {
    run(async {
        let ca = TestCa::new();
        let destination = Destination::start(ca.credential("cart"), echo).await;
        let (pool, _) = pool(ca.credential("front"), PoolConfig::default());
        let key = key(destination.address);
        let mut flows = Vec::new();
        for _ in 0..5 {
            flows.push(pool.flow(&key, &OwnNetns, &preface(), false).await.unwrap());
        }
        assert_eq!(pool.gauge().busy, 5);
        for flow in &mut flows {
            exchange(flow, b"mine").await;
        }
        drop(flows);
        assert_eq!(
            pool.gauge(),
            slots::Gauge {
                ready: 5,
                ..Default::default()
            }
        );
        pool.drain();
        assert_eq!(pool.gauge(), slots::Gauge::default());
        // What a connection that lives on still needs is opened, and closed after its use.
        let mut last = pool.flow(&key, &OwnNetns, &preface(), false).await.unwrap();
        exchange(&mut last, b"last").await;
        drop(last);
        assert_eq!(pool.gauge(), slots::Gauge::default());
    });
}

/// 64 MiB each way at once, whole.
#[test]
fn large_flows_are_whole_both_ways() {
    const TOTAL: usize = 64 << 20;
    run(async {
        let ca = TestCa::new();
        let destination = Destination::start(ca.credential("cart"), echo).await;
        let (pool, _) = pool(ca.credential("front"), PoolConfig::default());
        let flow = pool
            .flow(&key(destination.address), &OwnNetns, &preface(), false)
            .await
            .unwrap();
        let (mut reader, mut writer) = tokio::io::split(flow);
        // Chunks of 64 KiB - 1, each filled with its own number: any loss or shift shows.
        let chunk = |n: usize| vec![(n * 31 + n / 251) as u8; 65_535];
        let send = async {
            for n in 0..TOTAL / 65_535 {
                writer.write_all(&chunk(n)).await.unwrap();
            }
            writer.shutdown().await.unwrap();
        };
        let receive = async {
            let mut buffer = vec![0; 65_535];
            for n in 0..TOTAL / 65_535 {
                reader.read_exact(&mut buffer).await.unwrap();
                assert!(buffer == chunk(n), "chunk {n}");
            }
            assert_eq!(reader.read(&mut buffer).await.unwrap(), 0);
        };
        tokio::join!(send, receive);
    });
}

#[test]
fn half_close_works_in_both_orders() {
    run(async {
        let ca = TestCa::new();
        // The destination speaks and ends first, then reads what the source still has to say.
        let heard = Rc::new(RefCell::new(Vec::new()));
        let ear = heard.clone();
        let destination = Destination::start(ca.credential("cart"), move |accepted| {
            let ear = ear.clone();
            async move {
                let Accepted::Flow(mut flows, _) = accepted else { return };
                while let Ok(Some(offer)) = flows.next(PATIENCE).await {
                    let mut flow = offer.accept().unwrap();
                    flow.write_all(b"220 welcome").await.unwrap();
                    flow.shutdown().await.unwrap();
                    let mut said = Vec::new();
                    flow.read_to_end(&mut said).await.unwrap();
                    ear.borrow_mut().push(said);
                }
            }
        })
        .await;
        let (pool, _) = pool(ca.credential("front"), PoolConfig::default());
        for _ in 0..2 {
            let mut flow = pool
                .flow(&key(destination.address), &OwnNetns, &preface(), false)
                .await
                .unwrap();
            let mut greeting = Vec::new();
            flow.read_to_end(&mut greeting).await.unwrap();
            assert_eq!(greeting, b"220 welcome", "the source has not said a word");
            flow.write_all(b"quit").await.unwrap();
            flow.shutdown().await.unwrap();
        }
        // The tunnel went back with the destination's end read and the source's sent: the same one serves both.
        let mut flow = pool
            .flow(&key(destination.address), &OwnNetns, &preface(), false)
            .await
            .unwrap();
        assert_eq!(flow.read(&mut [0; 20]).await.unwrap(), 11);
        assert_eq!(destination.accepted(), 1);
        assert_eq!(*heard.borrow(), [b"quit", b"quit"]);
    });
}

#[test]
fn a_reset_is_a_reset_at_the_other_end() {
    run(async {
        let ca = TestCa::new();
        let ends = Rc::new(RefCell::new(Vec::new()));
        let seen = ends.clone();
        let destination = Destination::start(ca.credential("cart"), move |accepted| {
            let seen = seen.clone();
            async move {
                let Accepted::Flow(mut flows, _) = accepted else { return };
                while let Ok(Some(offer)) = flows.next(PATIENCE).await {
                    let mut flow = offer.accept().unwrap();
                    let mut byte = [0];
                    match flow.read(&mut byte).await {
                        Ok(1) if byte[0] == b'r' => flow.reset(ResetReason::Reset),
                        _ => {
                            let error = flow.read(&mut byte).await.unwrap_err();
                            seen.borrow_mut().push(FlowError::of(&error));
                        }
                    }
                }
            }
        })
        .await;
        let (pool, _) = pool(ca.credential("front"), PoolConfig::default());
        let key = key(destination.address);

        let mut flow = pool.flow(&key, &OwnNetns, &preface(), false).await.unwrap();
        flow.write_all(b"r").await.unwrap();
        let error = flow.read(&mut [0; 10]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        assert_eq!(
            FlowError::of(&error),
            Some(FlowError::Reset(ResetReason::Reset)),
            "taken first, so not refused"
        );
        drop(flow);
        assert_eq!(
            pool.gauge(),
            slots::Gauge::default(),
            "a tunnel after a reset is not used again"
        );

        let mut flow = pool.flow(&key, &OwnNetns, &preface(), false).await.unwrap();
        flow.write_all(b"x").await.unwrap();
        flow.reset(ResetReason::Timeout);
        drop(flow);
        let mut dropped = pool.flow(&key, &OwnNetns, &preface(), false).await.unwrap();
        dropped.write_all(b"x").await.unwrap();
        drop(dropped);
        while ends.borrow().len() < 2 {
            tokio::task::yield_now().await;
        }
        let mut ends = ends.borrow().clone();
        ends.sort_by_key(Option::is_none);
        assert_eq!(
            ends,
            [Some(FlowError::Reset(ResetReason::Timeout)), None],
            "a reset; and a cut that is no end"
        );
    });
}

#[test]
fn a_refused_flow_says_why_before_any_data() {
    run(async {
        let ca = TestCa::new();
        let destination = Destination::start(ca.credential("cart"), |accepted| async move {
            let Accepted::Flow(mut flows, _) = accepted else { return };
            let offer = flows.next(PATIENCE).await.unwrap().unwrap();
            offer.refuse(ResetReason::Denied);
            assert!(
                flows.next(PATIENCE).await.unwrap().is_none(),
                "the tunnel ended with it"
            );
        })
        .await;
        let (pool, _) = pool(ca.credential("front"), PoolConfig::default());
        for confirm in [false, true] {
            let preface = Preface { confirm, ..preface() };
            let mut flow = pool
                .flow(&key(destination.address), &OwnNetns, &preface, false)
                .await
                .unwrap();
            let error = if confirm {
                flow.accepted().await.unwrap_err()
            } else {
                flow.write_all(b"data").await.unwrap();
                flow.read(&mut [0; 10]).await.unwrap_err()
            };
            assert_eq!(FlowError::of(&error), Some(FlowError::Refused(ResetReason::Denied)));
        }
    });
}

#[test]
fn a_confirmed_flow_is_accepted_before_it_speaks() {
    run(async {
        let ca = TestCa::new();
        let destination = Destination::start(ca.credential("cart"), echo).await;
        let (pool, _) = pool(ca.credential("front"), PoolConfig::default());
        for _ in 0..3 {
            let preface = Preface {
                confirm: true,
                ..preface()
            };
            let mut flow = pool
                .flow(&key(destination.address), &OwnNetns, &preface, false)
                .await
                .unwrap();
            flow.accepted().await.unwrap();
            flow.accepted().await.unwrap();
            exchange(&mut flow, b"after you").await;
        }
        assert_eq!(destination.accepted(), 1);
    });
}

#[test]
fn http_tunnels_are_used_one_after_another_and_the_pool_is_bounded() {
    run(async {
        let ca = TestCa::new();
        let destination = Destination::start(ca.credential("cart"), echo).await;
        let config = PoolConfig {
            per_key_max: 2,
            ..PoolConfig::default()
        };
        let (pool, _) = pool(ca.credential("front"), config);
        let key = key(destination.address);
        let mut first = pool.http1(&key, &OwnNetns, false).await.unwrap();
        let second = pool.http1(&key, &OwnNetns, false).await.unwrap();
        let error = pool.http1(&key, &OwnNetns, false).await.err().unwrap();
        assert!(matches!(error, DialError::PoolFull));
        drop(second);
        assert_eq!(pool.gauge().busy, 1, "a dropped tunnel is closed and not counted");

        first.write_all(b"request").await.unwrap();
        first.read_exact(&mut [0; 7]).await.unwrap();
        first.release();
        let again = pool.http1(&key, &OwnNetns, false).await.unwrap();
        assert!(again.is_reused());
        again.release();
        let fresh = pool.http1(&key, &OwnNetns, true).await.unwrap();
        assert!(!fresh.is_reused());
        fresh.release();

        let mut unread = pool.http1(&key, &OwnNetns, false).await.unwrap();
        unread.write_all(b"half").await.unwrap();
        let ready = pool.gauge().ready;
        unread.read_exact(&mut [0; 1]).await.unwrap();
        unread.release();
        assert_eq!(pool.gauge().ready, ready, "one with something left to read is closed");
    });
}

#[test]
fn a_tunnel_that_died_or_whose_credential_changed_is_not_used_again() {
    run(async {
        let ca = TestCa::new();
        let destination = Destination::start(ca.credential("cart"), |accepted| async move {
            let Accepted::Http(mut transport, _) = accepted else {
                return;
            };
            let mut byte = [0];
            transport.read_exact(&mut byte).await.unwrap();
            transport.write_all(&byte).await.unwrap();
            if byte[0] == b'k' {
                // Stays open until the source leaves.
                let _ = transport.read(&mut byte).await;
            }
        })
        .await;
        let (pool, store) = pool(ca.credential("front"), PoolConfig::default());
        let key = key(destination.address);
        let once = async |byte: u8| {
            let mut tunnel = pool.http1(&key, &OwnNetns, false).await.unwrap();
            let reused = tunnel.is_reused();
            tunnel.write_all(&[byte]).await.unwrap();
            tunnel.read_exact(&mut [0]).await.unwrap();
            tunnel.release();
            reused
        };
        once(b'd').await;
        // The other end closes now; the sweep sees it once the reactor does.
        while pool.gauge().ready > 0 {
            tokio::task::yield_now().await;
            pool.sweep();
        }
        once(b'k').await;
        assert_eq!(pool.gauge().ready, 1);
        store.put(ca.credential("front"));
        assert!(!once(b'k').await, "the credential changed");
        store.remove(&id("front"));
        pool.sweep();
        assert_eq!(pool.gauge(), slots::Gauge::default(), "the identity left");
        let error = pool.http1(&key, &OwnNetns, false).await.err().unwrap();
        assert!(matches!(error, DialError::NoCredential(_)));
    });
}

#[test]
fn http2_shares_connections_within_its_bounds() {
    run(async {
        let ca = TestCa::new();
        let destination = Destination::start(ca.credential("cart"), |accepted| async move {
            let Accepted::Http(transport, _) = accepted else { return };
            let mut connection = h2::server::handshake(transport).await.unwrap();
            while let Some(Ok((_, mut respond))) = connection.accept().await {
                respond.send_response(http::Response::new(()), true).unwrap();
            }
        })
        .await;
        let config = PoolConfig {
            h2_streams_max: 2,
            h2_connections_max: 2,
            ..PoolConfig::default()
        };
        let (pool, _) = pool(ca.credential("front"), config);
        let key = key(destination.address);
        let (first, second) = tokio::join!(pool.h2(&key, &OwnNetns), pool.h2(&key, &OwnNetns));
        let mut leases = vec![first.ok().unwrap(), second.ok().unwrap()];
        assert_eq!(pool.gauge().busy, 1, "both wait for one connection");
        leases.push(pool.h2(&key, &OwnNetns).await.ok().unwrap());
        assert_eq!(pool.gauge().busy, 2);
        leases.push(pool.h2(&key, &OwnNetns).await.ok().unwrap());
        assert!(matches!(pool.h2(&key, &OwnNetns).await, Err(DialError::PoolFull)));

        for lease in &mut leases {
            let mut send = lease.send.clone().ready().await.unwrap();
            let request = http::Request::builder().uri("http://cart/").body(()).unwrap();
            let (response, _) = send.send_request(request, true).unwrap();
            assert_eq!(response.await.unwrap().status(), 200);
        }
        leases.pop();
        assert_eq!(destination.accepted(), 2);
        assert!(pool.h2(&key, &OwnNetns).await.is_ok(), "a place is free again");
        leases.clear();
        pool.drain();
        while pool.gauge() != slots::Gauge::default() {
            tokio::task::yield_now().await;
        }
        assert_eq!(destination.accepted(), 2);
    });
}

#[test]
fn http2_leaves_a_connection_that_goes_away_and_shares_a_failure() {
    run(async {
        let ca = TestCa::new();
        let destination = Destination::start(ca.credential("cart"), |accepted| async move {
            let Accepted::Http(transport, _) = accepted else { return };
            let mut connection = h2::server::handshake(transport).await.unwrap();
            let mut open = Vec::new();
            while let Some(Ok((_, respond))) = connection.accept().await {
                // The first stream stays open, and the connection takes no other one.
                open.push(respond);
                connection.graceful_shutdown();
            }
        })
        .await;
        let (pool, _) = pool(ca.credential("front"), PoolConfig::default());
        let key = key(destination.address);
        let first = pool.h2(&key, &OwnNetns).await.ok().unwrap();
        let mut send = first.send.clone().ready().await.unwrap();
        let request = http::Request::builder().uri("http://cart/").body(()).unwrap();
        let (_response, _) = send.send_request(request, true).unwrap();
        loop {
            let lease = pool.h2(&key, &OwnNetns).await.ok().unwrap();
            if destination.accepted() == 2 {
                drop(lease);
                break;
            }
            tokio::task::yield_now().await;
        }
        assert_eq!(pool.gauge().busy, 2, "the old one still has its stream");

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let gone = TunnelKey {
            address: listener.local_addr().unwrap(),
            ..key
        };
        let dials = Rc::new(Cell::new(0));
        let counted = dials.clone();
        tokio::task::spawn_local(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                counted.set(counted.get() + 1);
                drop(tcp);
            }
        });
        let (first, second) = tokio::join!(pool.h2(&gone, &OwnNetns), pool.h2(&gone, &OwnNetns));
        for failed in [first, second] {
            assert!(matches!(
                failed.err(),
                Some(DialError::Handshake(HandshakeError::Io(_)))
            ));
        }
        assert_eq!(dials.get(), 1, "who waits shares the failure too");
    });
}

/// A destination that wants to be left alone serves what is on its way, and no flow is lost.
#[test]
fn a_retired_tunnel_loses_no_flow() {
    run(async {
        let ca = TestCa::new();
        let destination = Destination::start(ca.credential("cart"), |accepted| async move {
            let Accepted::Flow(mut flows, _) = accepted else { return };
            flows.retire();
            while let Some(offer) = flows.next(PATIENCE).await.unwrap() {
                let flow = offer.accept().unwrap();
                let (mut reader, mut writer) = tokio::io::split(flow);
                tokio::io::copy(&mut reader, &mut writer).await.unwrap();
                writer.shutdown().await.unwrap();
            }
        })
        .await;
        let (pool, _) = pool(ca.credential("front"), PoolConfig::default());
        for round in 1..=3 {
            let mut flow = pool
                .flow(&key(destination.address), &OwnNetns, &preface(), false)
                .await
                .unwrap();
            exchange(&mut flow, b"on its way already").await;
            drop(flow);
            assert_eq!(pool.gauge(), slots::Gauge::default(), "it is not used again");
            assert_eq!(destination.accepted(), round);
        }
    });
}

/// What a request's or flow's future holds while it asks for a tunnel: dialing is boxed.
#[test]
fn asking_for_a_tunnel_is_small() {
    run(async {
        let (pool, _) = pool(TestCa::new().credential("front"), PoolConfig::default());
        let (key, preface) = (key("127.0.0.1:9".parse().unwrap()), preface());
        let sizes = [
            size_of_val(&pool.http1(&key, &OwnNetns, false)),
            size_of_val(&pool.flow(&key, &OwnNetns, &preface, false)),
            size_of_val(&pool.h2(&key, &OwnNetns)),
        ];
        assert!(sizes.iter().all(|size| *size <= 640), "{sizes:?}");
    });
}

/// The bytes that sniffing read belong to the stream.
#[test]
fn a_prefix_is_read_first() {
    run(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (dialed, accepted) = tokio::join!(
            tokio::net::TcpStream::connect(listener.local_addr().unwrap()),
            listener.accept()
        );
        let mut transport = crate::transport::Transport::from_tcp(accepted.unwrap().0, BytesMut::from(&b"lo "[..]));
        transport.unread(b"hel");
        let mut dialed = dialed.unwrap();
        dialed.write_all(b"world").await.unwrap();
        drop(dialed);
        let mut all = Bytes::new();
        let mut buffer = [0; 2];
        while let Ok(n @ 1..) = transport.read(&mut buffer).await {
            all = [&all, &buffer[..n]].concat().into();
        }
        assert_eq!(all, "hello world");
    });
}
