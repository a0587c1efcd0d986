//! Events: what happened, told once to the log and the metrics together.
pub mod refusal;
pub use refusal::Refusal;
