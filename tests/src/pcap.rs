//! Reading a capture of the fabric: which bytes passed between which addresses, and whether they were TLS 1.3.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, bail, ensure};

/// The TCP segments of a capture in their order.
#[derive(Clone, Debug, Default)]
pub struct Packets {
    /// The segments, also those without payload.
    pub segments: Vec<Segment>,
    /// The capture as it was written.
    pub bytes: Vec<u8>,
}

/// One TCP segment.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    /// Who sent it.
    pub source: SocketAddr,
    /// To whom.
    pub destination: SocketAddr,
    /// What it carried.
    pub payload: Vec<u8>,
}

impl Packets {
    /// Reads a file in pcap's classic format with Ethernet frames, as tcpdump writes it on this machine.
    pub fn parse(bytes: Vec<u8>) -> Result<Packets> {
        let Some((header, mut rest)) = bytes.split_at_checked(24) else {
            bail!("a capture of {} bytes has no header", bytes.len());
        };
        ensure!(
            header[..4] == 0xa1b2_c3d4_u32.to_ne_bytes(),
            "not a capture of this machine's byte order: {:x?}",
            &header[..4]
        );
        ensure!(
            header[20..24] == 1_u32.to_ne_bytes(),
            "not Ethernet: {:x?}",
            &header[20..24]
        );
        let mut segments = Vec::new();
        while let Some((record, after)) = rest.split_at_checked(16) {
            let length = u32::from_ne_bytes([record[8], record[9], record[10], record[11]]) as usize;
            // The last record may be cut when the capture is still written.
            let Some((frame, after)) = after.split_at_checked(length) else {
                break;
            };
            segments.extend(segment(frame));
            rest = after;
        }
        Ok(Packets { segments, bytes })
    }

    /// How often these bytes occur in the capture.
    pub fn count(&self, needle: &str) -> usize {
        self.bytes
            .windows(needle.len())
            .filter(|window| *window == needle.as_bytes())
            .count()
    }

    /// The segments from or to a port.
    pub fn of_port(&self, port: u16) -> impl Iterator<Item = &Segment> {
        let of_port = move |segment: &&Segment| segment.source.port() == port || segment.destination.port() == port;
        self.segments.iter().filter(of_port)
    }

    /// How many TLS 1.3 handshakes were answered on a port.
    pub fn tls13_handshakes(&self, port: u16) -> usize {
        self.segments
            .iter()
            .filter(|segment| segment.source.port() == port && is_tls13_server_hello(&segment.payload))
            .count()
    }

    /// How many payload bytes passed from or to a port.
    pub fn payload_bytes(&self, port: u16) -> usize {
        self.of_port(port).map(|segment| segment.payload.len()).sum()
    }
}

fn segment(frame: &[u8]) -> Option<Segment> {
    let kind = u16::from_be_bytes([*frame.get(12)?, *frame.get(13)?]);
    let packet = frame.get(14..)?;
    let (source, destination, tcp): (IpAddr, IpAddr, &[u8]) = match kind {
        0x0800 => {
            let header = usize::from(packet.first()? & 0x0f) * 4;
            let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
            // Offloaded segments longer than the field can say carry 0.
            let end = if total == 0 {
                packet.len()
            } else {
                total.min(packet.len())
            };
            if *packet.get(9)? != 6 {
                return None;
            }
            let address = |at: usize| {
                Some(IpAddr::from(Ipv4Addr::from(
                    <[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?,
                )))
            };
            (address(12)?, address(16)?, packet.get(header..end)?)
        }
        0x86dd => {
            if *packet.get(6)? != 6 {
                return None;
            }
            let length = usize::from(u16::from_be_bytes([*packet.get(4)?, *packet.get(5)?]));
            let end = if length == 0 {
                packet.len()
            } else {
                (40 + length).min(packet.len())
            };
            let address = |at: usize| {
                Some(IpAddr::from(Ipv6Addr::from(
                    <[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?,
                )))
            };
            (address(8)?, address(24)?, packet.get(40..end)?)
        }
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
    let header = usize::from(tcp.get(12)? >> 4) * 4;
    Some(Segment {
        source: SocketAddr::new(source, port(0)?),
        destination: SocketAddr::new(destination, port(2)?),
        payload: tcp.get(header..)?.to_vec(),
    })
}

/// A handshake record that begins with a ServerHello whose `supported_versions` chose TLS 1.3. The extension may stand
/// after a post-quantum key share of more than a kilobyte.
fn is_tls13_server_hello(payload: &[u8]) -> bool {
    const SUPPORTED_VERSIONS_1_3: [u8; 6] = [0x00, 0x2b, 0x00, 0x02, 0x03, 0x04];
    let [0x16, 0x03, 0x03, high, low, 0x02, ..] = payload else {
        return false;
    };
    let record = usize::from(u16::from_be_bytes([*high, *low]));
    payload[5..]
        .windows(6)
        .take(record)
        .any(|window| window == SUPPORTED_VERSIONS_1_3)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(v6: bool, source_port: u16, payload: &[u8]) -> Vec<u8> {
        let mut tcp = [source_port.to_be_bytes(), 9_u16.to_be_bytes()].concat();
        tcp.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0, 0, 0, 0, 0, 0, 0]);
        tcp.extend(payload);
        let length = tcp.len() as u16;
        let mut frame = vec![0; 12];
        if v6 {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(length.to_be_bytes());
            frame.extend([6, 64]);
            frame.extend([1; 16]);
            frame.extend([2; 16]);
        } else {
            frame.extend([0x08, 0x00, 0x45, 0]);
            frame.extend((length + 20).to_be_bytes());
            frame.extend([0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        }
        frame.extend(tcp);
        // Ethernet pads short frames.
        frame.resize(frame.len().max(60), 0);
        frame
    }

    fn capture(frames: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = [0xa1b2_c3d4_u32.to_ne_bytes().as_slice(), &[0; 16], &1_u32.to_ne_bytes()].concat();
        for frame in frames {
            bytes.extend([0; 8]);
            bytes.extend((frame.len() as u32).to_ne_bytes());
            bytes.extend((frame.len() as u32).to_ne_bytes());
            bytes.extend(frame);
        }
        bytes
    }

    #[test]
    fn segments_of_both_families() {
        let hello = [
            &[0x16, 3, 3, 4, 0xba, 2, 0, 4, 0xb6],
            [7; 1200].as_slice(),
            &[0, 0x2b, 0, 2, 3, 4],
        ]
        .concat();
        let bytes = capture(&[
            frame(false, 80, b"GET"),
            frame(true, 81, &hello),
            frame(true, 81, b""),
            vec![0; 60],
        ]);
        let packets = Packets::parse(bytes.clone()).unwrap();
        assert_eq!(packets.segments.len(), 3);
        assert_eq!(packets.segments[0].source, "10.0.0.1:80".parse().unwrap());
        assert_eq!(packets.segments[0].payload, b"GET");
        assert_eq!((packets.tls13_handshakes(81), packets.tls13_handshakes(80)), (1, 0));
        assert_eq!((packets.count("GET"), packets.count("PUT")), (1, 0));
        assert_eq!(packets.payload_bytes(80), 3);
        // A capture that is cut anywhere is read as far as it goes.
        for end in 24..bytes.len() {
            assert!(Packets::parse(bytes[..end].to_vec()).is_ok());
        }
        assert!(Packets::parse(vec![0; 30]).is_err());
    }
}
