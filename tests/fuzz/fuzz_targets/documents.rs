//! Documents of an operator: refused or read, never a panic.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    // Problems are an answer.
    let _ = mesh_api::document::parse("fuzz.yaml", text);
});
