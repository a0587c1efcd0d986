//! Numbers, addresses and ids as text, written by hand into a buffer that is there already.
//!
//! Every request has a dozen of them in its heads and its log line, and the standard library's formatting costs some
//! hundred instructions for each. What is written here is exactly what the standard library would write.

use std::net::IpAddr;

const HEX: &[u8; 16] = b"0123456789abcdef";

/// A whole number.
pub fn decimal(out: &mut Vec<u8>, mut value: u64) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (value % 10) as u8;
        value /= 10;
        at -= 1;
        if value == 0 {
            break;
        }
    }
    out.extend_from_slice(digits.get(at..).unwrap_or_default());
}

/// The last `width` digits of a number, zeros in front.
pub fn padded(out: &mut Vec<u8>, value: u64, width: u32) {
    for place in (0..width).rev() {
        out.push(b'0' + (value / 10u64.pow(place) % 10) as u8);
    }
}

/// An address, without a port.
pub fn ip(out: &mut Vec<u8>, ip: IpAddr) {
    match ip {
        IpAddr::V4(ip) => {
            for (number, octet) in ip.octets().into_iter().enumerate() {
                if number > 0 {
                    out.push(b'.');
                }
                decimal(out, octet.into());
            }
        }
        IpAddr::V6(ip) => out.extend_from_slice(ip.to_string().as_bytes()),
    }
}

/// The lower `N` hexadecimal digits, in lower case, zeros in front.
pub fn hex<const N: usize>(value: u128) -> [u8; N] {
    let mut text = [0; N];
    let mut rest = value;
    for digit in text.iter_mut().rev() {
        *digit = HEX[(rest & 0xf) as usize];
        rest >>= 4;
    }
    text
}

/// The number of hexadecimal digits in lower case; `None` if there is anything else, or more than 32 of them.
pub fn from_hex(text: &[u8]) -> Option<u128> {
    if text.is_empty() || text.len() > 32 {
        return None;
    }
    text.iter().try_fold(0u128, |value, digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(value << 4 | u128::from(digit))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(write: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        write(&mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn edges() {
        for value in [0, 7, 10, 99, 100, 12_345, u64::from(u32::MAX), u64::MAX] {
            assert_eq!(written(|out| decimal(out, value)), value.to_string());
        }
        for text in [
            "0.0.0.0",
            "10.96.0.1",
            "255.255.255.255",
            "::",
            "fd00::2",
            "::ffff:1.2.3.4",
        ] {
            assert_eq!(written(|out| ip(out, text.parse().unwrap())), text);
        }
        for (text, value) in [
            ("0", Some(0)),
            ("00ff", Some(255)),
            (&"f".repeat(32), Some(u128::MAX)),
            (&"f".repeat(33), None),
            ("", None),
            ("FF", None),
            ("-1", None),
            ("+1", None),
            ("é", None),
        ] {
            assert_eq!(from_hex(text.as_bytes()), value, "{text}");
        }
    }

    proptest! {
        #[test]
        fn as_the_standard_library_writes(value: u64, wide: u128, octets: [u8; 4], width in 1u32..19) {
            prop_assert_eq!(written(|out| decimal(out, value)), value.to_string());
            prop_assert_eq!(written(|out| ip(out, octets.into())), std::net::Ipv4Addr::from(octets).to_string());
            let cut = value % 10u64.pow(width);
            prop_assert_eq!(written(|out| padded(out, value, width)), format!("{cut:0width$}", width = width as usize));
            prop_assert_eq!(hex::<32>(wide).to_vec(), format!("{wide:032x}").into_bytes());
            prop_assert_eq!(from_hex(&hex::<32>(wide)), Some(wide));
        }
    }
}
