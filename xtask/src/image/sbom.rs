//! What a program was built from, as a CycloneDX 1.5 document: every crate that cargo's lock file resolves for it, with
//! version, checksum and license.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::shell;

/// The list for one package of the workspace, for the platform of this machine.
pub fn of(package: &str) -> Result<Value> {
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut command = shell::cargo();
    command.args([
        "metadata",
        "--format-version",
        "1",
        "--locked",
        "--filter-platform",
        &platform,
    ]);
    let metadata: Value = serde_json::from_str(&shell::read(&mut command)?)?;
    let lock = std::fs::read_to_string(shell::root().join("Cargo.lock")).context("read Cargo.lock")?;
    document(&metadata, &checksums(&lock), package)
}

fn document(metadata: &Value, checksums: &BTreeMap<(String, String), String>, package: &str) -> Result<Value> {
    let array = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
    let packages: BTreeMap<String, Value> = array(&metadata["packages"])
        .into_iter()
        .map(|package| (text(&package["id"]), package))
        .collect();
    let nodes: BTreeMap<String, Value> = array(&metadata["resolve"]["nodes"])
        .into_iter()
        .map(|node| (text(&node["id"]), node))
        .collect();
    let root = packages.iter().find(|(_, value)| value["name"] == package);
    let (root, facts) = root.with_context(|| format!("the workspace has no package {package}"))?;

    // What is linked or runs at build time; what only tests use is not in the program.
    let dependencies = |id: &str| -> Vec<String> {
        let kept = |dependency: &Value| array(&dependency["dep_kinds"]).iter().any(|kind| kind["kind"] != "dev");
        let of_node = nodes.get(id).map(|node| array(&node["deps"])).unwrap_or_default();
        let kept = of_node.iter().filter(|dependency| kept(dependency));
        kept.map(|dependency| text(&dependency["pkg"])).collect()
    };
    let mut seen = BTreeSet::new();
    let mut open = vec![root.clone()];
    while let Some(id) = open.pop() {
        if seen.insert(id.clone()) {
            open.extend(dependencies(&id));
        }
    }
    let reference = |package: &Value| format!("pkg:cargo/{}@{}", text(&package["name"]), text(&package["version"]));
    let component = |package: &Value| {
        let mut component = json!({
            "type": "library", "bom-ref": reference(package), "purl": reference(package),
            "name": package["name"], "version": package["version"],
        });
        if let Some(license) = package["license"].as_str() {
            component["licenses"] = json!([{"expression": license.replace('/', " OR ")}]);
        }
        if let Some(checksum) = checksums.get(&(text(&package["name"]), text(&package["version"]))) {
            component["hashes"] = json!([{"alg": "SHA-256", "content": checksum}]);
        }
        component
    };
    let mut application = component(facts);
    application["type"] = json!("application");
    let listed: Vec<&Value> = seen.iter().filter_map(|id| packages.get(id)).collect();
    let mut components: Vec<Value> = Vec::new();
    let mut relations: Vec<Value> = Vec::new();
    for package in listed {
        let below: BTreeSet<String> = dependencies(&text(&package["id"]))
            .iter()
            .filter_map(|id| packages.get(id).map(reference))
            .collect();
        relations.push(json!({"ref": reference(package), "dependsOn": below}));
        if package["id"] != facts["id"] {
            components.push(component(package));
        }
    }
    Ok(json!({
        "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
        "metadata": {"component": application},
        "components": components,
        "dependencies": relations,
    }))
}

/// The checksums of Cargo.lock by name and version.
fn checksums(lock: &str) -> BTreeMap<(String, String), String> {
    let mut found = BTreeMap::new();
    for package in lock.split("[[package]]") {
        let field = |name: &str| {
            let line = package
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(" = "))?;
            Some(line.trim_matches('"').to_string())
        };
        if let (Some(name), Some(version), Some(checksum)) = (field("name"), field("version"), field("checksum")) {
            found.insert((name, version), checksum);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_what_is_linked() -> Result<()> {
        let package = |name: &str| json!({"id": name, "name": name, "version": "1.0.0", "license": "MIT/Apache-2.0"});
        let edge = |name: &str, kind: Value| json!({"pkg": name, "dep_kinds": [{"kind": kind}]});
        let metadata = json!({
            "packages": [package("agent"), package("linked"), package("deep"), package("tests-only")],
            "resolve": {"nodes": [
                {"id": "agent", "deps": [edge("linked", Value::Null), edge("tests-only", json!("dev"))]},
                {"id": "linked", "deps": [edge("deep", json!("build"))]},
            ]},
        });
        let lock = "[[package]]\nname = \"deep\"\nversion = \"1.0.0\"\nchecksum = \"ab12\"\n";
        let document = document(&metadata, &checksums(lock), "agent")?;
        let names: Vec<_> = document["components"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|component| component["name"].as_str().unwrap_or_default())
            .collect();
        assert_eq!(names, ["deep", "linked"]);
        assert_eq!(document["components"][0]["hashes"][0]["content"], "ab12");
        assert_eq!(
            document["components"][1]["licenses"][0]["expression"],
            "MIT OR Apache-2.0"
        );
        assert_eq!(document["metadata"]["component"]["name"], "agent");
        Ok(())
    }
}
