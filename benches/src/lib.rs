//! Nothing but a place for `benches/`: `cargo bench -p mesh-benches` runs them.
