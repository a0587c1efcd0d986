//! Looks at the bytes between two nodes: they must be TLS records from the first to the last, and no word of a payload
//! may stand among them.

/// What every payload of the simulated applications contains.
pub const SECRET: &[u8] = b"SECRET-";

const HEAD_BYTES: usize = 5;
/// RFC 8446: 2^14 bytes and what encryption adds.
const RECORD_BYTES_MAX: usize = 16384 + 256;

/// One direction of a connection between two nodes.
#[derive(Debug, Default)]
pub struct Inspector {
    head: Vec<u8>,
    left: usize,
    tail: Vec<u8>,
}

impl Inspector {
    /// Takes the next bytes. Says what is wrong with them.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<(), String> {
        self.tail.extend_from_slice(bytes);
        if self.tail.windows(SECRET.len()).any(|window| window == SECRET) {
            return Err("a payload in plaintext".to_owned());
        }
        self.tail.drain(..self.tail.len().saturating_sub(SECRET.len() - 1));
        while !bytes.is_empty() {
            if self.left > 0 {
                let n = self.left.min(bytes.len());
                self.left -= n;
                bytes = &bytes[n..];
                continue;
            }
            self.head.push(bytes[0]);
            bytes = &bytes[1..];
            if self.head.len() == HEAD_BYTES {
                let length = usize::from(u16::from_be_bytes([self.head[3], self.head[4]]));
                if !(20..=23).contains(&self.head[0]) || self.head[1] != 3 || length > RECORD_BYTES_MAX {
                    return Err(format!("no TLS record: {:02x?}", self.head));
                }
                self.left = length;
                self.head.clear();
            }
        }
        Ok(())
    }
}
