//! Requests of a pod, and which pods serve them.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};

use super::Scope;

/// How many requests tell which pods serve: of two, one is missed once in two thousand times, and then asked for again.
const OFTEN: usize = 12;

impl Scope {
    /// What a URL answers to a pod: the first line, which is the name of the pod that served.
    pub fn ask(&self, source: &str, url: &str) -> Result<String> {
        let words = ["curl", "-sS", "-g", "--fail", "--max-time", "10", url];
        let said = self.exec(source, &words)?.ok()?;
        Ok(said.lines().next().unwrap_or_default().to_string())
    }

    /// Several requests, each over a new connection: the names of the pods that served.
    pub fn ask_often(&self, source: &str, url: &str) -> Result<BTreeSet<String>> {
        let words =
            format!("for i in $(seq {OFTEN}); do curl -sS -g --fail --max-time 10 '{url}' | head -n 1 || exit 1; done");
        let said = self.exec(source, &["sh", "-c", &words])?.ok()?;
        Ok(said.lines().map(String::from).collect())
    }

    /// Waits until the pods that serve a URL are these.
    pub fn until_served(&self, source: &str, url: &str, names: &[&str]) -> Result<()> {
        self.until(&format!("{names:?} at {url} for {source}"), || {
            let found = self.ask_often(source, url)?;
            let wanted: BTreeSet<String> = names.iter().map(|name| (*name).to_string()).collect();
            ensure!(found == wanted, "{found:?}");
            Ok(Some(()))
        })
    }
}
