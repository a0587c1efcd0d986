//! The heads of frames in a flow: what is accepted reads the same when it is written again.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_agent::tunnel::frame::{HEAD_BYTES, Head};

fuzz_target!(|bytes: [u8; HEAD_BYTES]| {
    if let Ok(head) = Head::parse(bytes) {
        assert_eq!(Head::parse(head.to_bytes()), Ok(head));
    }
});
