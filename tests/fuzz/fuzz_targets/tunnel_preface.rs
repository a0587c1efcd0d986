//! The preface of a flow in a tunnel: what is accepted reads the same when it is written again.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_agent::tunnel::preface::{PREFACE_BYTES, Preface};

fuzz_target!(|bytes: [u8; PREFACE_BYTES]| {
    if let Ok(preface) = Preface::parse(&bytes) {
        assert_eq!(Preface::parse(&preface.to_bytes()), Ok(preface));
    }
});
