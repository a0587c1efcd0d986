//! Reads the first bytes of a connection until they tell what it speaks. Nothing read is lost: the bytes stay in the
//! buffer, which becomes the prefix of whoever serves the connection. Bounded in bytes and in time; a source that
//! stays silent may be one that waits for the destination to speak first, which the caller must decide.

use std::{io, time::Duration};

use bytes::BytesMut;
use tokio::{io::AsyncReadExt, net::TcpStream};

use crate::{
    l7::detect::{Sniff, sniff},
    transport::Transport,
};

/// The most bytes that are read before a connection counts as opaque. A ClientHello with post-quantum key shares has
/// about 2 KiB; RFC 8446 allows 16 KiB in one record.
pub const SNIFF_BYTES_MAX: usize = 16 * 1024 + 512;

/// What the first bytes said.
#[derive(Debug, PartialEq, Eq)]
pub enum Sniffed {
    /// They were understood.
    Known(Sniff),
    /// No byte came in the given time.
    Silent,
    /// The source closed before it said anything.
    Closed,
}

/// Reads until the bytes are understood. Waits `silence` for the first byte and `patience` for the rest; a source that
/// stops within a beginning which could still become something counts as opaque.
pub async fn read_first(
    stream: &TcpStream,
    buffer: &mut BytesMut,
    silence: Duration,
    patience: Duration,
) -> io::Result<Sniffed> {
    if buffer.is_empty() {
        match tokio::time::timeout(silence, fill(stream, buffer)).await {
            Err(_) => return Ok(Sniffed::Silent),
            Ok(Ok(0)) => return Ok(Sniffed::Closed),
            Ok(result) => result?,
        };
    }
    let rest = async {
        loop {
            match sniff(buffer) {
                Sniff::NeedMore if buffer.len() < SNIFF_BYTES_MAX => {
                    if fill(stream, buffer).await? == 0 {
                        return Ok(Sniffed::Known(Sniff::Opaque));
                    }
                }
                Sniff::NeedMore => return Ok(Sniffed::Known(Sniff::Opaque)),
                known => return Ok(Sniffed::Known(known)),
            }
        }
    };
    match tokio::time::timeout(patience, rest).await {
        Ok(result) => result,
        Err(_) => Ok(Sniffed::Known(Sniff::Opaque)),
    }
}

/// Reads what is there; zero at the end of the stream.
pub async fn fill(stream: &TcpStream, buffer: &mut BytesMut) -> io::Result<usize> {
    buffer.reserve(4096);
    loop {
        stream.readable().await?;
        match stream.try_read_buf(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            result => return result,
        }
    }
}

/// Tells whether requests on a transport are HTTP/1 or HTTP/2 without taking anything from it; `None` if it ended first.
pub async fn peek(source: &mut Transport) -> io::Result<Option<Sniff>> {
    let mut seen = BytesMut::with_capacity(64);
    loop {
        // The preface has 24 bytes; what is no beginning of it is HTTP/1's to refuse.
        match sniff(&seen) {
            Sniff::NeedMore if seen.len() < 24 => {
                if source.read_buf(&mut seen).await? == 0 {
                    return Ok(None);
                }
            }
            known => {
                source.unread(&seen);
                return Ok(Some(known));
            }
        }
    }
}
