//! A chunked body: it decodes the same wherever the network splits it. The first byte says where.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Some((split, body)) = bytes.split_first() {
        mesh_agent::l7::h1::chunk::fuzz_chunks(body, usize::from(*split));
    }
});
