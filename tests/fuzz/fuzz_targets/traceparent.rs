//! The W3C trace context of a request.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| mesh_agent::l7::headers::fuzz_traceparent(text));
