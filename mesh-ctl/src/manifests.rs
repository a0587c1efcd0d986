//! What an installation consists of: the kustomize base of `deploy/daemonset`, built into this program, with the
//! user's settings in it.
//!
//! The files are the same that `kubectl apply -k` takes. Nothing is decided here but which text stands where.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::{
    connect::Failure,
    kubernetes::objects::{self, Object},
};

/// The version that this program installs: its own.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// On the Deployment and the DaemonSet: which version was installed.
pub const VERSION_ANNOTATION: &str = "nodemesh.io/version";
/// On the DaemonSet: the settings that differ from the defaults, as JSON, so that an upgrade keeps them.
pub const SETTINGS_ANNOTATION: &str = "nodemesh.io/settings";
/// On a CustomResourceDefinition: which schema it has.
pub const SCHEMA_ANNOTATION: &str = "nodemesh.io/schema";

const SETTINGS: &str = include_str!("../../deploy/daemonset/settings.yaml");

macro_rules! base {
    ($($name:literal),+ $(,)?) => {
        [$(($name, include_str!(concat!("../../deploy/daemonset/base/", $name)))),+]
    };
}

/// The definitions of our own kinds.
const DEFINITIONS: [(&str, &str); 5] = base!(
    "crds/nodemesh.io_accesspolicies.yaml",
    "crds/nodemesh.io_meshpolicies.yaml",
    "crds/nodemesh.io_ratelimits.yaml",
    "crds/nodemesh.io_servicesubsets.yaml",
    "crds/nodemesh.io_trafficpolicies.yaml",
);
const NAMESPACE: [(&str, &str); 1] = base!("namespace.yaml");
const RIGHTS: [(&str, &str); 3] = base!("rbac-controller.yaml", "rbac-agent.yaml", "rbac-operators.yaml");
const CONTROLLER: [(&str, &str); 1] = base!("controller.yaml");
const AGENT: [(&str, &str); 1] = base!("agent.yaml");
/// For clusters with the Prometheus Operator.
const MONITORING: [(&str, &str); 2] = [
    (
        "monitoring/monitors.yaml",
        include_str!("../../deploy/daemonset/monitoring/monitors.yaml"),
    ),
    (
        "monitoring/rules.yaml",
        include_str!("../../deploy/daemonset/monitoring/rules.yaml"),
    ),
];

/// What sweeps the nodes when the mesh goes.
const CLEANUP: &str = include_str!("../../deploy/daemonset/cleanup.yaml");

#[derive(Debug, Deserialize)]
struct Setting {
    name: String,
    about: String,
    default: Value,
    places: Vec<Place>,
}

#[derive(Debug, Deserialize)]
struct Place {
    literal: String,
    with: String,
}

/// Settings by name; what is not there has its default.
pub type Settings = BTreeMap<String, String>;

/// The parts of an installation, in the order in which they are applied.
pub struct Manifests {
    /// The namespace.
    pub namespace: Vec<Object>,
    /// The definitions of our kinds.
    pub definitions: Vec<Object>,
    /// Accounts and roles.
    pub rights: Vec<Object>,
    /// The controller and what belongs to it.
    pub controller: Vec<Object>,
    /// The agent and what belongs to it.
    pub agent: Vec<Object>,
    /// Monitors and alerts.
    pub monitoring: Vec<Object>,
}

fn known() -> Result<Vec<Setting>, Failure> {
    serde_yaml_ng::from_str(SETTINGS).map_err(|e| Failure::refused(format!("settings.yaml: {e}")))
}

fn word(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// What can be set, a line each: name, default and meaning.
pub fn describe() -> Result<String, Failure> {
    let line = |setting: &Setting| format!("{}={}  {}\n", setting.name, word(&setting.default), setting.about);
    Ok(known()?.iter().map(line).collect())
}

/// Whether a value can stand in a manifest: one plain word of YAML.
fn is_plain(value: &str) -> bool {
    let good = |b: u8| b.is_ascii_alphanumeric() || b"-._/:=,@".contains(&b);
    !value.is_empty()
        && value.len() <= 512
        && value.bytes().all(good)
        && !value.starts_with(['-', ',', '@', ':', '='])
        && !value.ends_with(':')
}

/// Refuses settings that do not exist and values that could say more than a value.
pub fn check(settings: &Settings) -> Result<(), Failure> {
    let known = known()?;
    for (name, value) in settings {
        if !known.iter().any(|setting| setting.name == *name) {
            let names: Vec<&str> = known.iter().map(|setting| setting.name.as_str()).collect();
            return Err(Failure::Usage(format!(
                "unknown setting {name:?}, expected one of {}",
                names.join(", ")
            )));
        }
        if !is_plain(value) {
            return Err(Failure::Usage(format!(
                "{name}: {value:?} is no value, expected a word of letters, digits and - . _ / : = , @"
            )));
        }
    }
    let choice = |name: &str, words: &[&str]| match settings.get(name) {
        Some(value) if !words.contains(&value.as_str()) => Err(Failure::Usage(format!(
            "{name}: {value:?} is not known, expected {}",
            words.join(", ")
        ))),
        _ => Ok(()),
    };
    choice("failMode", &["hold", "refuse", "pass"])?;
    choice("image.pullPolicy", &["Always", "IfNotPresent", "Never"])?;
    if let Some(domain) = settings.get("trustDomain") {
        mesh_api::identity::TrustDomain::new(domain).map_err(|e| Failure::Usage(format!("trustDomain: {e}")))?;
    }
    match settings.get("controller.replicas").map(|text| text.parse::<u8>()) {
        None | Some(Ok(1..=9)) => Ok(()),
        Some(_) => Err(Failure::Usage(
            "controller.replicas: expected a number from 1 to 9".to_owned(),
        )),
    }
}

/// The manifests with the settings in them.
pub fn manifests(settings: &Settings) -> Result<Manifests, Failure> {
    check(settings)?;
    let known = known()?;
    let part = |files: &[(&str, &str)]| -> Result<Vec<Object>, Failure> {
        let mut part = Vec::new();
        for (name, text) in files {
            let mut text = (*text).to_owned();
            for setting in &known {
                let Some(value) = settings.get(&setting.name) else {
                    continue;
                };
                for place in &setting.places {
                    text = text.replace(&place.literal, &place.with.replace("{}", value));
                }
            }
            part.extend(objects::read(name, &text)?);
        }
        Ok(part)
    };
    let mut all = Manifests {
        namespace: part(&NAMESPACE)?,
        definitions: part(&DEFINITIONS)?,
        rights: part(&RIGHTS)?,
        controller: part(&CONTROLLER)?,
        agent: part(&AGENT)?,
        monitoring: part(&MONITORING)?,
    };
    let kept = serde_json::to_string(settings).map_err(|e| Failure::refused(e.to_string()))?;
    for object in all.controller.iter_mut().chain(&mut all.agent) {
        if ["Deployment", "DaemonSet"].contains(&object.kind()) {
            let annotations = &mut object.value["metadata"]["annotations"];
            annotations[VERSION_ANNOTATION] = VERSION.into();
            annotations[SETTINGS_ANNOTATION] = kept.clone().into();
        }
    }
    Ok(all)
}

/// The DaemonSet that sweeps the nodes, with these settings, or this image if one is named.
pub fn cleanup(settings: &Settings, image: Option<&str>) -> Result<Object, Failure> {
    let mut text = CLEANUP.to_owned();
    for setting in &known()? {
        let Some(value) = settings.get(&setting.name) else {
            continue;
        };
        for place in &setting.places {
            text = text.replace(&place.literal, &place.with.replace("{}", value));
        }
    }
    let mut found = objects::read("cleanup.yaml", &text)?;
    let mut object = found.pop().ok_or_else(|| Failure::refused("cleanup.yaml is empty"))?;
    if let Some(image) = image {
        let spec = &mut object.value["spec"]["template"]["spec"];
        spec["initContainers"][0]["image"] = image.into();
        spec["containers"][0]["image"] = image.into();
    }
    Ok(object)
}

impl Manifests {
    /// All that is applied, in order.
    pub fn in_order(self, namespace: bool, monitoring: bool) -> Vec<Object> {
        let mut all = Vec::new();
        if namespace {
            all.extend(self.namespace);
        }
        all.extend(self.definitions);
        all.extend(self.rights);
        all.extend(self.controller);
        all.extend(self.agent);
        if monitoring {
            all.extend(self.monitoring);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(pairs: &[(&str, &str)]) -> Settings {
        pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn settings_reach_their_places() {
        let all = manifests(&settings(&[
            ("image.registry", "ghcr.io/nodemesh"),
            ("image.tag", "v1"),
            ("trustDomain", "example.org"),
            ("failMode", "refuse"),
            ("controller.replicas", "3"),
            ("logLevel", "debug"),
        ]))
        .unwrap();
        let agent = all.agent.iter().find(|object| object.kind() == "DaemonSet").unwrap();
        let controller = all
            .controller
            .iter()
            .find(|object| object.kind() == "Deployment")
            .unwrap();
        let containers = &agent.value["spec"]["template"]["spec"]["containers"];
        for container in containers.as_array().unwrap() {
            assert_eq!(container["image"], "ghcr.io/nodemesh/agent:v1");
        }
        let args = containers[0]["args"].as_array().unwrap();
        for arg in ["--trust-domain=example.org", "--fail-mode=refuse"] {
            assert!(args.iter().any(|found| found == arg), "{arg} is not in {args:?}");
        }
        assert_eq!(controller.value["spec"]["replicas"], 3);
        assert_eq!(
            controller.value["spec"]["template"]["spec"]["containers"][0]["env"][0]["value"],
            "debug"
        );
        assert_eq!(controller.value["metadata"]["annotations"][VERSION_ANNOTATION], VERSION);
    }

    #[test]
    fn values_are_words() {
        for bad in ["", "a b", "a\nb", "{x}", "\"", "a#b", "-x", "x:"] {
            assert!(check(&settings(&[("image.tag", bad)])).is_err(), "{bad:?}");
        }
        assert!(check(&settings(&[("image.registry", "localhost:5000/nodemesh")])).is_ok());
        assert!(check(&settings(&[("no.such", "x")])).is_err());
        assert!(check(&settings(&[("failMode", "open")])).is_err());
        assert!(check(&settings(&[("controller.replicas", "0")])).is_err());
    }

    #[test]
    fn the_sweep_has_the_agents_image() {
        let object = cleanup(&settings(&[("image.tag", "v1")]), None).unwrap();
        let spec = &object.value["spec"]["template"]["spec"];
        assert_eq!(spec["containers"][0]["image"], "localhost/nodemesh/agent:v1");
        assert_eq!(
            spec["initContainers"][0]["securityContext"],
            spec["containers"][0]["securityContext"]
        );
        let object = cleanup(&Settings::new(), Some("a/b:c")).unwrap();
        assert_eq!(
            object.value["spec"]["template"]["spec"]["initContainers"][0]["image"],
            "a/b:c"
        );
    }

    #[test]
    fn every_part_is_there_once() {
        let all = manifests(&Settings::new()).unwrap().in_order(true, true);
        let mut titles: Vec<String> = all.iter().map(Object::title).collect();
        let count = titles.len();
        titles.sort();
        titles.dedup();
        assert_eq!(titles.len(), count);
        assert_eq!(all[0].kind(), "Namespace");
        assert!(all.iter().all(|object| {
            let cluster = [
                "Namespace",
                "CustomResourceDefinition",
                "ClusterRole",
                "ClusterRoleBinding",
            ];
            cluster.contains(&object.kind()) || object.namespace() == mesh_api::policy::ROOT_NAMESPACE
        }));
    }
}
