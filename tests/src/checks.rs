//! Named checks on one lab, run to their end: a lab is dear and one run should show all that is wrong.

use std::{fmt, time::Instant};

use anyhow::Result;

/// What passed and what failed so far.
#[derive(Debug, Default)]
pub struct Checks {
    passed: usize,
    failed: Vec<String>,
}

impl Checks {
    /// Runs one check and prints how it went.
    pub fn check(&mut self, name: impl fmt::Display, run: impl FnOnce() -> Result<()>) {
        let started = Instant::now();
        match run() {
            Ok(()) => {
                self.passed += 1;
                println!("ok      {name} ({:?})", started.elapsed());
            }
            Err(error) => {
                println!("FAILED  {name} ({:?}): {error:#}", started.elapsed());
                self.failed.push(format!("{name}: {error:#}"));
            }
        }
    }

    /// Panics if any check failed, or if there was none.
    pub fn finish(self, what: &str) {
        println!("{what}: {} passed, {} failed", self.passed, self.failed.len());
        assert!(self.passed + self.failed.len() > 0, "{what}: nothing was checked");
        assert!(self.failed.is_empty(), "{what}:\n{}", self.failed.join("\n"));
    }
}
