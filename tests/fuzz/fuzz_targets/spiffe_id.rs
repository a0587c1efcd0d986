//! The name in a peer's certificate: what is accepted prints as it was read.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_api::identity::SpiffeId;

fuzz_target!(|text: &str| {
    if let Ok(identity) = text.parse::<SpiffeId>() {
        assert_eq!(identity.to_string(), text);
    }
});
