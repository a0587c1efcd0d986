//! The head of an HTTP/1.1 request, as any source may send it.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| mesh_agent::l7::h1::codec::fuzz_request(bytes));
