//! What a connection's first bytes say: pure, bounded, total.

/// The most bytes that [`sniff`] asks for before it must decide.
pub const SNIFF_BYTES_MAX: usize = 4096;

/// The ALPN of our own tunnels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alpn {
    /// `nodemesh-http/1`
    Http,
    /// `nodemesh-tcp/1`
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
    let _ = bytes;
    Sniff::Opaque
}
