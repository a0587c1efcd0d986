//! Addresses as the kernel holds them: network byte order, IPv4 as `::ffff:a.b.c.d`.

#[cfg(not(target_arch = "bpf"))]
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// `::ffff:0:0/96`'s third word.
const MAPPED: u32 = 0xffff_u32.to_be();

/// An IP address in network byte order; IPv4 is held v4-mapped, so that one key serves both families and a v4-mapped
/// IPv6 destination is the IPv4 destination that it means.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Addr {
    /// The address as the four words of a `struct in6_addr`.
    pub words: [u32; 4],
}

/// An address and a port in host byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// The address.
    pub addr: Addr,
    /// The port, in host byte order.
    pub port: u16,
    /// Zero; in the `PEERS` map a number that tells two presentations at one port apart.
    pub tag: u16,
}

impl Addr {
    /// `::`, which stands for "none" in the maps.
    pub const NONE: Addr = Addr { words: [0; 4] };
    /// `127.0.0.1`.
    pub const LOOPBACK4: Addr = Addr::from_v4_word(0x7f00_0001_u32.to_be());
    /// `::1`.
    pub const LOOPBACK6: Addr = Addr {
        words: [0, 0, 0, 1_u32.to_be()],
    };

    /// From a `struct in_addr`'s word.
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Addr {
        Addr {
            words: [0, 0, MAPPED, word],
        }
    }

    /// The address as 16 bytes, IPv4 being v4-mapped.
    #[inline(always)]
    pub const fn octets(&self) -> [u8; 16] {
        let [a, b, c, d] = self.words[0].to_ne_bytes();
        let [e, f, g, h] = self.words[1].to_ne_bytes();
        let [i, j, k, l] = self.words[2].to_ne_bytes();
        let [m, n, o, p] = self.words[3].to_ne_bytes();
        [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
    }

    /// Whether this is an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == MAPPED
    }

    /// The word of a `struct in_addr`; meaningful for IPv4 only.
    #[inline(always)]
    pub const fn v4_word(&self) -> u32 {
        self.words[3]
    }

    /// Whether this is `::`, the mark of an absent address.
    #[inline(always)]
    pub const fn is_none(&self) -> bool {
        (self.words[0] | self.words[1] | self.words[2] | self.words[3]) == 0
    }

    /// Whether a connection to this address stays in the namespace by nature: 127.0.0.0/8, `::1`, and the
    /// unspecified addresses, which Linux connects to loopback.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            let host = u32::from_be(self.words[3]);
            host >> 24 == 127 || host == 0
        } else {
            (self.words[0] | self.words[1] | self.words[2]) == 0 && u32::from_be(self.words[3]) <= 1
        }
    }

    /// Whether this is in fe80::/10, whose meaning depends on the interface.
    #[inline(always)]
    pub const fn is_link_local6(&self) -> bool {
        u32::from_be(self.words[0]) >> 22 == 0xfe80 >> 6
    }

    /// Equality that compiles to word compares in the kernel.
    #[inline(always)]
    pub const fn same(&self, other: &Addr) -> bool {
        self.words[0] == other.words[0]
            && self.words[1] == other.words[1]
            && self.words[2] == other.words[2]
            && self.words[3] == other.words[3]
    }
}

impl Endpoint {
    /// No endpoint: port 0 is never connected to.
    pub const NONE: Endpoint = Endpoint {
        addr: Addr::NONE,
        port: 0,
        tag: 0,
    };

    /// An address and a port in host byte order.
    #[inline(always)]
    pub const fn new(addr: Addr, port: u16) -> Endpoint {
        Endpoint { addr, port, tag: 0 }
    }

    /// Whether this is [`Endpoint::NONE`].
    #[inline(always)]
    pub const fn is_none(&self) -> bool {
        self.port == 0
    }
}

#[cfg(not(target_arch = "bpf"))]
impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Addr {
        let octets = match ip {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        };
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(octets.chunks_exact(4)) {
            *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        Addr { words }
    }
}

#[cfg(not(target_arch = "bpf"))]
impl From<Addr> for IpAddr {
    fn from(addr: Addr) -> IpAddr {
        if addr.is_v4() {
            return IpAddr::V4(Ipv4Addr::from(u32::from_be(addr.words[3])));
        }
        IpAddr::V6(Ipv6Addr::from(addr.octets()))
    }
}

#[cfg(not(target_arch = "bpf"))]
impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Endpoint {
        Endpoint::new(address.ip().into(), address.port())
    }
}

#[cfg(not(target_arch = "bpf"))]
impl From<Endpoint> for SocketAddr {
    fn from(endpoint: Endpoint) -> SocketAddr {
        SocketAddr::new(endpoint.addr.into(), endpoint.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_back_as_they_went_in() {
        for text in ["10.1.2.3", "127.0.0.1", "fd00::1:2", "::1", "0.0.0.0", "::"] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(IpAddr::from(Addr::from(ip)), ip, "{text}");
        }
        let mapped: IpAddr = "::ffff:10.1.2.3".parse().unwrap();
        assert_eq!(IpAddr::from(Addr::from(mapped)), "10.1.2.3".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn loopback_is_what_linux_keeps_local() {
        let cases = [
            ("127.0.0.1", true),
            ("127.9.8.7", true),
            ("::ffff:127.0.0.1", true),
            ("::1", true),
            ("::", true),
            ("0.0.0.0", true),
            ("::2", false),
            ("128.0.0.1", false),
            ("10.0.0.1", false),
            ("fe80::1", false),
        ];
        for (text, expected) in cases {
            let addr = Addr::from(text.parse::<IpAddr>().unwrap());
            assert_eq!(addr.is_loopback(), expected, "{text}");
        }
        assert_eq!(Addr::from("127.0.0.1".parse::<IpAddr>().unwrap()), Addr::LOOPBACK4);
        assert_eq!(Addr::from("::1".parse::<IpAddr>().unwrap()), Addr::LOOPBACK6);
        for (text, expected) in [
            ("fe80::1", true),
            ("febf::1", true),
            ("fec0::1", false),
            ("fd00::1", false),
        ] {
            assert_eq!(
                Addr::from(text.parse::<IpAddr>().unwrap()).is_link_local6(),
                expected,
                "{text}"
            );
        }
    }
}
