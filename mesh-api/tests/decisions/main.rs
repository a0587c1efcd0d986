//! The decisions over a view, told as tables and properties: a world in YAML, a question, the answer.
//!
//! Everything goes through public doors: the parser, the view, `explain`'s written-down request. A table's line that
//! fails names itself.

mod access;
mod direct;
mod explain;
mod gateway_api;
mod limits;
mod properties;
mod routes;
mod traffic;
mod world;
