//! The little of HTTP/1.1 that the bench's two ends speak: heads with a Content-Length. Pure functions over bytes.

use std::net::SocketAddr;

/// The longest head that either end takes.
pub const HEAD_MAX: usize = 16 * 1024;

/// A request for `path`, which closes its connection if `close` says so.
pub fn request(address: SocketAddr, path: &str, close: bool) -> Vec<u8> {
    let close = if close { "connection: close\r\n" } else { "" };
    format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nuser-agent: bench-load\r\naccept: */*\r\n{close}\r\n")
        .into_bytes()
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Its head's length.
    pub length: usize,
    /// How many bytes the answer shall have.
    pub bytes: u64,
    /// Whether the connection ends with the answer.
    pub close: bool,
}

/// What an answer's head says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answered {
    /// The head's length.
    pub length: usize,
    /// The status.
    pub status: u16,
    /// The body's length.
    pub bytes: u64,
    /// Whether the connection ends with it.
    pub close: bool,
}

/// Reads a request's head; `None` if it is not whole yet, an error if it is none of ours.
pub fn read_request(bytes: &[u8]) -> Result<Option<Asked>, &'static str> {
    let Some((length, first, fields)) = split(bytes)? else {
        return Ok(None);
    };
    let path = first.split(' ').nth(1).ok_or("no path")?;
    let bytes = match path.strip_prefix("/bytes/") {
        Some(number) => number.parse().map_err(|_| "not a number of bytes")?,
        None => 0,
    };
    let close = value(fields, "connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
    Ok(Some(Asked { length, bytes, close }))
}

/// Reads an answer's head; `None` if it is not whole yet.
pub fn read_answer(bytes: &[u8]) -> Result<Option<Answered>, &'static str> {
    let Some((length, first, fields)) = split(bytes)? else {
        return Ok(None);
    };
    let status = first.split(' ').nth(1).and_then(|status| status.parse().ok());
    let bytes = value(fields, "content-length").and_then(|value| value.parse().ok());
    Ok(Some(Answered {
        length,
        status: status.ok_or("no status")?,
        bytes: bytes.ok_or("no content-length")?,
        close: value(fields, "connection").is_some_and(|value| value.eq_ignore_ascii_case("close")),
    }))
}

/// The head's length, its first line and its fields.
fn split(bytes: &[u8]) -> Result<Option<(usize, &str, &str)>, &'static str> {
    let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
        return if bytes.len() > HEAD_MAX {
            Err("a head too long")
        } else {
            Ok(None)
        };
    };
    let text = std::str::from_utf8(&bytes[..end + 2]).map_err(|_| "a head that is no text")?;
    let (first, fields) = text.split_once("\r\n").ok_or("no line")?;
    Ok(Some((end + 4, first, fields)))
}

fn value<'a>(fields: &'a str, name: &str) -> Option<&'a str> {
    fields.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_end_writes_the_other_reads() {
        for (close, path, bytes) in [(false, "/bytes/1024", 1024), (true, "/bytes/7", 7), (false, "/", 0)] {
            let text = request("127.0.0.1:80".parse().unwrap(), path, close);
            for part in 0..text.len() {
                assert_eq!(read_request(&text[..part]), Ok(None), "{part} bytes");
            }
            let length = text.len();
            assert_eq!(read_request(&text), Ok(Some(Asked { length, bytes, close })));
        }
    }

    #[test]
    fn answers() {
        let text = b"HTTP/1.1 503 Nope\r\nContent-Length: 12\r\nConnection: close\r\n\r\nhello";
        let answered = read_answer(text).unwrap().unwrap();
        assert_eq!((answered.status, answered.bytes, answered.close), (503, 12, true));
        assert_eq!(&text[answered.length..], b"hello");
        for bad in [
            "HTTP/1.1 200 OK\r\n\r\n",
            "x\r\ncontent-length: 1\r\n\r\n",
            "HTTP/1.1 2x0\r\n\r\n",
        ] {
            assert!(read_answer(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(read_answer(&[b'x'; HEAD_MAX + 1]).is_err());
    }
}
