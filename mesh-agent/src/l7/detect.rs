//! What a connection's first bytes say: pure, bounded, total.
//!
//! A decision never changes when more bytes come, so the caller may ask after each read. What is not known stays
//! opaque: it is then judged as a plain flow, which no rule about requests can allow.

/// The most bytes that [`sniff`] asks for before it must decide: a ClientHello with post-quantum key shares and a
/// large ticket fits.
pub const SNIFF_BYTES_MAX: usize = 16 * 1024;

/// The ALPN of HTTP between agents.
pub const ALPN_HTTP: &[u8] = b"nodemesh-http/1";
/// The ALPN of one opaque flow between agents.
pub const ALPN_TCP: &[u8] = b"nodemesh-tcp/1";

/// How a connection with prior knowledge of HTTP/2 begins (RFC 9113 §3.4).
pub const H2_PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Methods that are taken for HTTP with the first byte of their target.
const METHODS: [&[u8]; 8] = [
    b"GET", b"POST", b"PUT", b"HEAD", b"DELETE", b"OPTIONS", b"PATCH", b"TRACE",
];
/// The longest method that is looked for.
const METHOD_BYTES_MAX: usize = 32;

/// The ALPN of our own tunnels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alpn {
    /// [`ALPN_HTTP`]
    Http,
    /// [`ALPN_TCP`]
    Tcp,
}

/// What the first bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sniff {
    /// An HTTP/1 request line.
    Http1,
    /// The HTTP/2 preface (prior knowledge).
    Http2,
    /// A TLS ClientHello that offers one of our ALPN protocols.
    TlsOurs(Alpn),
    /// Any other TLS ClientHello.
    TlsOther,
    /// Anything else.
    Opaque,
    /// Not decided yet: call again with more bytes.
    NeedMore,
}

/// Tells what `bytes`, the first of a connection, are. Never [`Sniff::NeedMore`] at [`SNIFF_BYTES_MAX`] bytes or more.
pub fn sniff(bytes: &[u8]) -> Sniff {
    let window = bytes.get(..SNIFF_BYTES_MAX).unwrap_or(bytes);
    let (sniffed, at_bound) = match window.first() {
        None => (Sniff::NeedMore, Sniff::Opaque),
        Some(0x16) => sniff_tls(window),
        Some(_) if H2_PREFACE.starts_with(window.get(..H2_PREFACE.len()).unwrap_or(window)) => (
            if window.len() < H2_PREFACE.len() {
                Sniff::NeedMore
            } else {
                Sniff::Http2
            },
            Sniff::Opaque,
        ),
        Some(_) => (sniff_http1(window), Sniff::Opaque),
    };
    if sniffed == Sniff::NeedMore && window.len() >= SNIFF_BYTES_MAX {
        at_bound
    } else {
        sniffed
    }
}

/// A request line: `method SP target SP HTTP/1.`; for well-known methods the first byte of the target is enough.
fn sniff_http1(bytes: &[u8]) -> Sniff {
    let is_token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    let method_end = bytes.iter().position(|byte| !is_token(byte)).unwrap_or(bytes.len());
    if method_end == 0 || method_end > METHOD_BYTES_MAX {
        return Sniff::Opaque;
    }
    let (method, rest) = bytes.split_at(method_end);
    let rest = match rest.split_first() {
        None => return Sniff::NeedMore,
        Some((b' ', rest)) => rest,
        Some(_) => return Sniff::Opaque,
    };
    match rest.first() {
        None => return Sniff::NeedMore,
        Some(b'/' | b'*') if METHODS.contains(&method) => return Sniff::Http1,
        Some(_) => {}
    }
    // Unusual methods and absolute targets: the version decides.
    let Some(target_end) = rest.iter().position(|byte| !matches!(byte, b'!'..=b'~')) else {
        return Sniff::NeedMore;
    };
    let (target, version) = rest.split_at(target_end);
    let wanted = b" HTTP/1.";
    let seen = version.get(..wanted.len()).unwrap_or(version);
    match (target.is_empty(), wanted.starts_with(seen)) {
        (false, true) if seen.len() == wanted.len() => Sniff::Http1,
        (false, true) => Sniff::NeedMore,
        _ => Sniff::Opaque,
    }
}

/// A TLS ClientHello, and what is to be said of it if its end does not come within the bound.
fn sniff_tls(bytes: &[u8]) -> (Sniff, Sniff) {
    match hello_body(bytes) {
        Ok(body) => (our_alpn(&body).map_or(Sniff::TlsOther, Sniff::TlsOurs), Sniff::TlsOther),
        Err(sniffed) => sniffed,
    }
}

/// The name that a ClientHello asks for (SNI), if these first bytes of a connection hold a whole ClientHello.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerName {
    /// This one, as sent.
    Name(String),
    /// It asks for none, or for what is no name.
    None,
    /// There is no ClientHello.
    NotTls,
}

/// Reads the name that a ClientHello asks for.
pub fn server_name(bytes: &[u8]) -> ServerName {
    let window = bytes.get(..SNIFF_BYTES_MAX).unwrap_or(bytes);
    match window.first() {
        Some(0x16) => match hello_body(window) {
            Ok(body) => name_in(&body).map_or(ServerName::None, ServerName::Name),
            Err((_, Sniff::TlsOther)) => ServerName::None,
            Err(_) => ServerName::NotTls,
        },
        _ => ServerName::NotTls,
    }
}

/// The body of the ClientHello in the first records, else what [`sniff_tls`] says.
fn hello_body(bytes: &[u8]) -> Result<Vec<u8>, (Sniff, Sniff)> {
    // The record's type, and its version: 3.0 to 3.4 whatever is spoken in the end.
    match (bytes.get(1), bytes.get(2)) {
        (Some(3) | None, Some(0..=4) | None) => {}
        _ => return Err((Sniff::Opaque, Sniff::Opaque)),
    }
    let mut hello = Vec::new();
    let mut records = Reader(bytes);
    loop {
        let (Some(kind), Some(_version)) = (records.u8(), records.take(2)) else {
            return Err((Sniff::NeedMore, Sniff::TlsOther));
        };
        let Some(length) = records.u16() else {
            return Err((Sniff::NeedMore, Sniff::TlsOther));
        };
        if kind != 0x16 || length == 0 || length > 1 << 14 {
            // Within a hello only handshake records may follow; before one it is no TLS.
            let first = hello.is_empty();
            return Err(if first {
                (Sniff::Opaque, Sniff::Opaque)
            } else {
                (Sniff::TlsOther, Sniff::TlsOther)
            });
        }
        let here = records.0.get(..usize::from(length)).unwrap_or(records.0);
        hello.extend_from_slice(here);
        if hello.first().is_some_and(|kind| *kind != 1) {
            return Err((Sniff::Opaque, Sniff::Opaque));
        }
        let mut handshake = Reader(&hello);
        if let (Some(_kind), Some(high), Some(low)) = (handshake.u8(), handshake.u8(), handshake.u16()) {
            let length = usize::from(high) << 16 | usize::from(low);
            if let Some(body) = handshake.take(length) {
                return Ok(body.to_vec());
            }
            if length > SNIFF_BYTES_MAX {
                return Err((Sniff::TlsOther, Sniff::TlsOther));
            }
        }
        if here.len() < usize::from(length) {
            return Err((Sniff::NeedMore, Sniff::TlsOther));
        }
        records.0 = records.0.get(usize::from(length)..).unwrap_or_default();
    }
}

/// The body of an extension of a ClientHello (RFC 8446 §4.1.2), the first of that type.
fn extension(body: &[u8], wanted: u16) -> Option<&[u8]> {
    let mut hello = Reader(body);
    hello.take(2 + 32)?;
    let session = hello.u8()?;
    hello.take(session.into())?;
    let suites = hello.u16()?;
    hello.take(suites.into())?;
    let compressions = hello.u8()?;
    hello.take(compressions.into())?;
    let length = hello.u16()?;
    let mut extensions = Reader(hello.take(length.into())?);
    loop {
        let (kind, length) = (extensions.u16()?, extensions.u16()?);
        let extension = extensions.take(length.into())?;
        if kind == wanted {
            return Some(extension);
        }
    }
}

/// Our protocol among those that a ClientHello's body offers (RFC 7301 §3.1).
fn our_alpn(body: &[u8]) -> Option<Alpn> {
    let mut extension = Reader(extension(body, 16)?);
    let length = extension.u16()?;
    let mut protocols = Reader(extension.take(length.into())?);
    while let Some(length) = protocols.u8() {
        match protocols.take(length.into())? {
            name if name == ALPN_HTTP => return Some(Alpn::Http),
            name if name == ALPN_TCP => return Some(Alpn::Tcp),
            _ => {}
        }
    }
    None
}

/// The host name that a ClientHello's body asks for (RFC 6066 §3): ASCII, not empty.
fn name_in(body: &[u8]) -> Option<String> {
    let mut extension = Reader(extension(body, 0)?);
    let length = extension.u16()?;
    let mut names = Reader(extension.take(length.into())?);
    loop {
        let (kind, length) = (names.u8()?, names.u16()?);
        let name = names.take(length.into())?;
        if kind == 0 {
            let plain = !name.is_empty() && name.iter().all(u8::is_ascii_graphic);
            return plain.then(|| String::from_utf8_lossy(name).into_owned());
        }
    }
}

/// Reads from the front of bytes that may end anywhere.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes([self.u8()?, self.u8()?]))
    }
}

/// Fuzz entry: more bytes never change a decision, and the bound holds.
pub fn fuzz_sniff(bytes: &[u8]) {
    let mut decided = None;
    for end in 0..=bytes.len().min(512) {
        let now = sniff(bytes.get(..end).unwrap_or_default());
        if let Some(before) = decided {
            assert_eq!(now, before, "changed at {end}");
        } else if now != Sniff::NeedMore {
            decided = Some(now);
        }
    }
    let whole = sniff(bytes);
    assert!(decided.is_none_or(|decided| decided == whole));
    assert!(whole != Sniff::NeedMore || bytes.len() < SNIFF_BYTES_MAX);
    // What is no TLS asks for nothing.
    let tls = matches!(whole, Sniff::TlsOurs(_) | Sniff::TlsOther | Sniff::NeedMore);
    assert!(tls || server_name(bytes) == ServerName::NotTls);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A ClientHello with these protocols, its records cut to `record` bytes.
    fn hello(protocols: &[&[u8]], record: usize) -> Vec<u8> {
        let list: Vec<u8> = protocols.iter().flat_map(|p| [&[p.len() as u8], *p].concat()).collect();
        let alpn = [
            &[0, 16],
            &(list.len() as u16 + 2).to_be_bytes()[..],
            &(list.len() as u16).to_be_bytes(),
            &list,
        ]
        .concat();
        let other = [0, 43, 0, 3, 2, 3, 4];
        let extensions = [&other[..], if protocols.is_empty() { &[] } else { &alpn }].concat();
        let body = [
            &[3, 3][..],
            &[7; 32],
            &[4, 1, 2, 3, 4],
            &[0, 2, 0x13, 1],
            &[1, 0],
            &(extensions.len() as u16).to_be_bytes(),
            &extensions,
        ]
        .concat();
        let handshake = [&[1, 0], &(body.len() as u16).to_be_bytes()[..], &body].concat();
        let records = handshake.chunks(record);
        records
            .flat_map(|part| [&[0x16, 3, 1], &(part.len() as u16).to_be_bytes()[..], part].concat())
            .collect()
    }

    #[test]
    fn first_bytes_are_told_apart() {
        let cases: &[(&[u8], Sniff)] = &[
            (b"", Sniff::NeedMore),
            (b"GET / HTTP/1.1\r\n", Sniff::Http1),
            (b"GET /", Sniff::Http1),
            (b"GET ", Sniff::NeedMore),
            (b"GE", Sniff::NeedMore),
            (b"OPTIONS *", Sniff::Http1),
            (b"GET http://a/ HTTP/1.", Sniff::Http1),
            (b"GET http://a/ HTT", Sniff::NeedMore),
            (b"PROPFIND /a HTTP/1.1\r\n", Sniff::Http1),
            (b"PROPFIND /a", Sniff::NeedMore),
            (b"PROPFIND /a SSH/1.1", Sniff::Opaque),
            (b"GET  / HTTP/1.1\r\n", Sniff::Opaque),
            (b"get key\r\n", Sniff::Opaque),
            (b"EHLO mail.example\r\n", Sniff::Opaque),
            (b"PING\r\n", Sniff::Opaque),
            (b"*1\r\n$4\r\nPING\r\n", Sniff::Opaque),
            (b"SSH-2.0-x\r\n", Sniff::Opaque),
            (b"\0\0\0\x08\x04\xd2\x16\x2f", Sniff::Opaque),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0", Sniff::Http2),
            (b"PRI * HTTP/2.0\r\n", Sniff::NeedMore),
            (b"P", Sniff::NeedMore),
            (b"PRI * HTTP/1.1\r\n", Sniff::Http1),
            (b"\x16", Sniff::NeedMore),
            (b"\x16\x03\x01", Sniff::NeedMore),
            (b"\x16\x02\x01", Sniff::Opaque),
            (b"\x16\x03\x01\x00\x04\x02\x00\x00\x00", Sniff::Opaque),
            (b"\x16\x03\x01\x00\x00", Sniff::Opaque),
        ];
        for (bytes, expected) in cases {
            assert_eq!(sniff(bytes), *expected, "{:?}", String::from_utf8_lossy(bytes));
        }
        assert_eq!(sniff(&[b'a'; 33]), Sniff::Opaque);
        assert_eq!(
            sniff(&[b"GET x".as_slice(), &[b'x'; SNIFF_BYTES_MAX]].concat()),
            Sniff::Opaque
        );
    }

    #[test]
    fn client_hellos_are_told_apart() {
        let cases: &[(&[&[u8]], Sniff)] = &[
            (&[], Sniff::TlsOther),
            (&[b"h2", b"http/1.1"], Sniff::TlsOther),
            (&[b"nodemesh-http/1"], Sniff::TlsOurs(Alpn::Http)),
            (&[b"h2", b"nodemesh-tcp/1"], Sniff::TlsOurs(Alpn::Tcp)),
            (&[b"nodemesh-tcp/12"], Sniff::TlsOther),
        ];
        for (protocols, expected) in cases {
            for record in [1, 7, 50, 16_384] {
                let bytes = hello(protocols, record);
                assert_eq!(sniff(&bytes), *expected, "{protocols:?} in records of {record}");
                let short = sniff(&bytes[..bytes.len() - 1]);
                assert_eq!(
                    short,
                    Sniff::NeedMore,
                    "{protocols:?} in records of {record}, one byte short"
                );
            }
        }
    }

    #[test]
    fn rustls_says_what_we_expect() {
        let mut config =
            rustls::ClientConfig::builder_with_provider(rustls::crypto::aws_lc_rs::default_provider().into())
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_root_certificates(rustls::RootCertStore::empty())
                .with_no_client_auth();
        for (alpn, expected) in [
            (ALPN_HTTP, Sniff::TlsOurs(Alpn::Http)),
            (b"h2".as_slice(), Sniff::TlsOther),
        ] {
            config.alpn_protocols = vec![alpn.to_vec()];
            let name = "a.example".try_into().unwrap();
            let mut client = rustls::ClientConnection::new(config.clone().into(), name).unwrap();
            let mut bytes = Vec::new();
            client.write_tls(&mut bytes).unwrap();
            assert_eq!(sniff(&bytes), expected);
            assert_eq!(sniff(&bytes[..bytes.len() - 1]), Sniff::NeedMore);
        }
    }

    #[test]
    fn names_are_read_out_of_hellos() {
        let config = rustls::ClientConfig::builder_with_provider(rustls::crypto::aws_lc_rs::default_provider().into())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        for (asked, wanted) in [
            ("a.example", ServerName::Name("a.example".to_owned())),
            ("10.0.0.1", ServerName::None),
        ] {
            let name = rustls::pki_types::ServerName::try_from(asked).unwrap().to_owned();
            let mut client = rustls::ClientConnection::new(config.clone().into(), name).unwrap();
            let mut bytes = Vec::new();
            client.write_tls(&mut bytes).unwrap();
            assert_eq!(server_name(&bytes), wanted, "{asked}");
            // A hello that does not end is one all the same.
            assert_eq!(server_name(&bytes[..bytes.len() - 1]), ServerName::None, "{asked}");
        }
        assert_eq!(server_name(&hello(&[b"h2"], 50)), ServerName::None);
        for other in [&b""[..], b"GET / HTTP/1.1\r\n", b"\x16\x02\x01", b"SSH-2.0-x\r\n"] {
            assert_eq!(server_name(other), ServerName::NotTls, "{other:?}");
        }
    }

    proptest! {
        #[test]
        fn decisions_are_final(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            fuzz_sniff(&bytes);
        }

        #[test]
        fn decisions_about_hellos_are_final(
            ours in any::<bool>(), record in 1usize..200, at in any::<prop::sample::Index>(), byte: u8,
        ) {
            let mut bytes = hello(&[if ours { ALPN_TCP } else { b"h2" }], record);
            fuzz_sniff(&bytes);
            let at = at.index(bytes.len());
            bytes[at] = byte;
            fuzz_sniff(&bytes);
        }

        #[test]
        fn decisions_about_lines_are_final(line in "(GET|PRI|PUT|X) [ -~]{0,40}( HTTP/[12].[01]\r\n)?") {
            fuzz_sniff(line.as_bytes());
        }
    }
}
