//! The first bytes of a connection: more of them never change a decision.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| mesh_agent::l7::detect::fuzz_sniff(bytes));
