//! What the workspace is made of: licenses and duplicate versions, judged by `deny.toml`.
//!
//! The same rules as `cargo deny check licenses bans`, read from the same file, so that a machine without cargo-deny
//! (minutes of compiling) still checks them with what cargo itself knows.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::shell;

/// All that breaks the rules, in words.
pub fn check() -> Result<Vec<String>> {
    let rules = fs::read_to_string(shell::root().join("deny.toml")).context("read deny.toml")?;
    let mut command = shell::cargo();
    command.args([
        "metadata",
        "--format-version",
        "1",
        "--locked",
        "--filter-platform",
        "x86_64-unknown-linux-gnu",
    ]);
    let metadata: Value = serde_json::from_str(&shell::read(&mut command)?)?;
    let mut problems = licenses(&metadata, &strings(&rules, "licenses", "allow"));
    problems.extend(duplicates(&metadata, &strings(&rules, "bans", "skip")));
    problems.extend(banned(&metadata, &strings(&rules, "bans", "deny")));
    Ok(problems)
}

/// The quoted strings of an array in a section of a TOML file; for a table in it (`{ crate = "x", reason = "…" }`), only the crate.
fn strings(toml: &str, section: &str, key: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut in_section = false;
    let mut in_array = false;
    for line in toml.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
        if line.starts_with('[') && line.ends_with(']') && !in_array {
            in_section = line == format!("[{section}]");
            continue;
        }
        let mut rest = line;
        if in_section && !in_array {
            let Some(after) = line
                .strip_prefix(key)
                .map(str::trim_start)
                .and_then(|rest| rest.strip_prefix('='))
            else {
                continue;
            };
            in_array = true;
            rest = after;
        }
        if in_array {
            let wanted = rest.split(", reason").next().unwrap_or(rest);
            found.extend(wanted.split('"').skip(1).step_by(2).map(String::from));
            in_array = !rest.ends_with(']');
        }
    }
    found
}

/// The packages that the programs are linked from, by id.
fn packages(metadata: &Value) -> impl Iterator<Item = &Value> {
    let used: BTreeSet<&str> = metadata["resolve"]["nodes"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|node| node["id"].as_str())
        .collect();
    let all = metadata["packages"].as_array().map(Vec::as_slice).unwrap_or_default();
    all.iter()
        .filter(move |package| package["id"].as_str().is_some_and(|id| used.contains(id)))
}

fn licenses(metadata: &Value, allowed: &BTreeSet<String>) -> Vec<String> {
    let mut problems = Vec::new();
    for package in packages(metadata) {
        let (name, version) = (&package["name"], &package["version"]);
        match package["license"].as_str() {
            None => problems.push(format!("{name} {version}: no license in its manifest")),
            Some(license) if !satisfied(license, allowed) => {
                problems.push(format!(
                    "{name} {version}: license {license:?} is not allowed by deny.toml"
                ));
            }
            Some(_) => {}
        }
    }
    problems
}

/// Whether an SPDX expression can be fulfilled with the allowed licenses: every `AND` part needs one `OR` choice.
fn satisfied(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let expression = expression.replace('/', " OR ");
    // Parentheses in the manifests that exist group choices: `A AND (B OR C)`.
    let parts = expression
        .split(" AND ")
        .map(|part| part.trim_matches(|c| c == '(' || c == ')' || c == ' '));
    parts.into_iter().all(|part| {
        part.split(" OR ")
            .any(|choice| allowed.contains(choice.trim_matches(|c| c == '(' || c == ')' || c == ' ')))
    })
}

fn duplicates(metadata: &Value, skipped: &BTreeSet<String>) -> Vec<String> {
    let mut versions: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for package in packages(metadata) {
        if let (Some(name), Some(version)) = (package["name"].as_str(), package["version"].as_str()) {
            versions.entry(name).or_default().insert(version);
        }
    }
    let several = versions
        .iter()
        .filter(|(name, versions)| versions.len() > 1 && !skipped.contains(**name));
    let mut problems: Vec<String> = several
        .map(|(name, versions)| {
            let versions: Vec<_> = versions.iter().copied().collect();
            format!(
                "{name}: {} versions ({}); deny.toml names no reason",
                versions.len(),
                versions.join(", ")
            )
        })
        .collect();
    for name in skipped
        .iter()
        .filter(|name| versions.get(name.as_str()).is_none_or(|versions| versions.len() < 2))
    {
        problems.push(format!(
            "deny.toml: bans.skip of {name}: there is one version only, remove the exception"
        ));
    }
    problems
}

fn banned(metadata: &Value, denied: &BTreeSet<String>) -> Vec<String> {
    let names = packages(metadata).filter_map(|package| package["name"].as_str());
    let found: BTreeSet<&str> = names.filter(|name| denied.contains(*name)).collect();
    found
        .into_iter()
        .map(|name| format!("{name} is denied by deny.toml"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licenses_are_expressions() {
        let allowed: BTreeSet<String> = ["MIT", "Apache-2.0", "ISC"].map(String::from).into();
        for (expression, want) in [
            ("MIT", true),
            ("MIT/Apache-2.0", true),
            ("GPL-3.0 OR MIT", true),
            ("GPL-3.0", false),
            ("ISC AND (Apache-2.0 OR OpenSSL)", true),
            ("ISC AND OpenSSL", false),
            ("(MIT OR Apache-2.0) AND Unicode-3.0", false),
        ] {
            assert_eq!(satisfied(expression, &allowed), want, "{expression}");
        }
    }

    #[test]
    fn reads_the_arrays_of_deny_toml() {
        let toml = "[licenses]\nallow = [\n  \"MIT\", # x\n  \"ISC\",\n]\n[bans]\nskip = [\n  { crate = \"syn\", reason = \"two \\\"majors\\\"\" },\n]\ndeny = [\"openssl\"]\n";
        assert_eq!(
            strings(toml, "licenses", "allow"),
            ["ISC", "MIT"].map(String::from).into()
        );
        assert_eq!(strings(toml, "bans", "skip"), ["syn"].map(String::from).into());
        assert_eq!(strings(toml, "bans", "deny"), ["openssl"].map(String::from).into());
        assert!(strings(toml, "bans", "allow").is_empty());
    }
}
