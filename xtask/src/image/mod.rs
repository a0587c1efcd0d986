//! `cargo xtask image`: OCI images of the agent and the controller, made from files, without docker and without a
//! network.
//!
//! An image holds one program, its loader and shared libraries, two lines of `/etc/passwd` and a list of what it was
//! built from: no shell, no package manager, no certificates of others. The same input gives the same bytes.

mod archive;
mod build;
mod closure;
mod sbom;

pub use archive::{Image, Platform, write};
pub use build::{Options, run, write_all};
pub use closure::Files;
