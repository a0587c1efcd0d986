//! An Event on each Pod that should be captured and is not, with the agent's reason; and on each Pod or Namespace that
//! says of itself what the mesh does not look at: a label or annotation that nobody refused when it was applied.
//!
//! A pod that has just started is not captured for a moment, which is no news: only what lasts is told. Each reason is
//! told once, and again after a while when it still holds; how many Events one round makes is bounded.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use mesh_api::{
    document::{DocumentKey, DocumentSet, Kind},
    wire::PodReport,
};
use tokio::time::Instant;

use super::{cluster::Cluster, health::Metrics, status::CONTROLLER, watch::REQUEST_TIMEOUT};
use crate::controller::agents::Agents;

/// What is over by then is not told.
const LASTS: Duration = Duration::from_secs(5);
/// What still holds is told again.
const AGAIN: Duration = Duration::from_secs(600);
/// How often reports are looked at.
const LOOK: Duration = Duration::from_secs(2);
/// Events in one round.
const ROUND_MAX: usize = 20;
/// How many pods are remembered.
const PODS_MAX: usize = 10_000;
/// The API server's limit of a note is 1 kB.
const NOTE_CHARS_MAX: usize = 800;

/// How often objects are looked at.
const LOOK_AT_OBJECTS: Duration = Duration::from_secs(10);

/// What is known of an object that something is wrong with.
struct Trouble {
    why: String,
    since: Instant,
    told: Option<Instant>,
}

/// Which troubles should be told now.
#[derive(Default)]
struct Troubles(BTreeMap<DocumentKey, Trouble>);

impl Troubles {
    /// Takes what is wrong now, each object once, and returns what to tell.
    fn look(&mut self, wrong: &BTreeMap<DocumentKey, String>, now: Instant) -> Vec<(DocumentKey, String)> {
        self.0.retain(|key, _| wrong.contains_key(key));
        let mut tell = Vec::new();
        for (key, why) in wrong {
            if self.0.len() >= PODS_MAX && !self.0.contains_key(key) {
                continue;
            }
            let trouble = self.0.entry(key.clone()).or_insert_with(|| Trouble {
                why: why.clone(),
                since: now,
                told: None,
            });
            if trouble.why != *why {
                trouble.why = why.clone();
                trouble.told = None;
            }
            let due = match trouble.told {
                None => now >= trouble.since + LASTS,
                Some(at) => now >= at + AGAIN,
            };
            if due && tell.len() < ROUND_MAX {
                trouble.told = Some(now);
                tell.push((key.clone(), why.clone()));
            }
        }
        tell
    }
}

/// Tells until its task is ended.
pub async fn run(client: Client, instance: String, cluster: Arc<Cluster>, agents: Arc<Agents>, metrics: Arc<Metrics>) {
    let reporter = Reporter {
        controller: CONTROLLER.to_owned(),
        instance: Some(instance),
    };
    let recorder = Recorder::new(client, reporter);
    let mut not_captured = Troubles::default();
    let mut ignored = Troubles::default();
    let mut changes = cluster.changes();
    changes.mark_changed();
    let mut wrong = BTreeMap::new();
    let mut objects_at = Instant::now();
    loop {
        tokio::time::sleep(LOOK).await;
        let reports = agents.pods(|pod| pod.enrolled && !pod.captured && !pod.why.is_empty());
        metrics.not_captured(reports.len());
        let now = Instant::now();
        for (key, why) in not_captured.look(&captures(reports), now) {
            publish(&recorder, &cluster, &key, ("NotCaptured", "Capture"), why).await;
        }
        if now >= objects_at && changes.has_changed().unwrap_or(false) {
            changes.borrow_and_update();
            objects_at = now + LOOK_AT_OBJECTS;
            wrong = tokio::task::block_in_place(|| cluster.look(|known| said_in_vain(known.set)));
        }
        for (key, why) in ignored.look(&wrong, now) {
            tracing::warn!(object = %key, %why, "an object says what the mesh does not look at");
            publish(&recorder, &cluster, &key, ("Ignored", "Read"), why).await;
        }
    }
}

/// What agents say of pods that they cannot capture.
fn captures(reports: Vec<(String, PodReport)>) -> BTreeMap<DocumentKey, String> {
    let one = |(node, report): (String, PodReport)| {
        let key = DocumentKey::new(Kind::Pod, &report.name.namespace, &report.name.name);
        (key, format!("the agent of {node} cannot capture it: {}", report.why))
    };
    reports.into_iter().map(one).collect()
}

/// What pods and namespaces say of themselves and the mesh does not look at.
fn said_in_vain(set: &DocumentSet) -> BTreeMap<DocumentKey, String> {
    let mut wrong: BTreeMap<DocumentKey, String> = BTreeMap::new();
    for (key, problem) in set.validate_pods() {
        let text = format!("{}: {}, expected {}", problem.path, problem.message, problem.expected);
        let all = wrong.entry(key).or_default();
        if !all.is_empty() {
            all.push_str("; ");
        }
        all.push_str(&text);
    }
    wrong
}

async fn publish(recorder: &Recorder, cluster: &Cluster, key: &DocumentKey, what: (&str, &str), why: String) {
    let Some(object) = reference(cluster, key) else {
        return;
    };
    let event = Event {
        type_: EventType::Warning,
        reason: what.0.to_owned(),
        note: Some(why.chars().take(NOTE_CHARS_MAX).collect()),
        action: what.1.to_owned(),
        secondary: None,
    };
    match tokio::time::timeout(REQUEST_TIMEOUT, recorder.publish(&event, &object)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(object = %key, %error, "an Event was not written"),
        Err(_) => tracing::warn!(object = %key, "an Event was not written in time"),
    }
}

/// The object as an Event names it; one that is gone needs none.
fn reference(cluster: &Cluster, key: &DocumentKey) -> Option<ObjectReference> {
    cluster.look(|known| {
        let meta = known.set.get(key)?.meta();
        let text = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        Some(ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some(key.kind.as_str().to_owned()),
            namespace: text(&meta.namespace),
            name: text(&meta.name),
            uid: text(&meta.uid),
            ..ObjectReference::default()
        })
    })
}

#[cfg(test)]
mod tests {
    use mesh_api::document::from_json;

    use super::*;

    fn wrong(pods: impl IntoIterator<Item = String>, why: &str) -> BTreeMap<DocumentKey, String> {
        let pods = pods.into_iter();
        pods.map(|name| (DocumentKey::new(Kind::Pod, "shop", &name), why.to_owned()))
            .collect()
    }

    #[test]
    fn what_lasts_is_told_once_and_again_when_its_reason_changes() {
        let report = |why: &str| wrong(["cart".to_owned()], why);
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut troubles = Troubles::default();
        let steps = [
            (0, report("no netns"), 0),
            (4, report("no netns"), 0),
            (5, report("no netns"), 1),
            (7, report("no netns"), 0),
            (9, report("no memory"), 1),
            (11, report("no memory"), 0),
            (609, report("no memory"), 1),
            // Captured in between: a new trouble must last again.
            (611, BTreeMap::new(), 0),
            (613, report("no memory"), 0),
            (618, report("no memory"), 1),
        ];
        for (seconds, reports, expected) in steps {
            assert_eq!(troubles.look(&reports, at(seconds)).len(), expected, "second {seconds}");
        }
    }

    #[test]
    fn a_round_is_bounded_and_the_rest_follows() {
        let reports = wrong((0..50).map(|n| format!("pod-{n}")), "no netns");
        let start = Instant::now();
        let mut troubles = Troubles::default();
        troubles.look(&reports, start);
        let later = start + LASTS;
        let rounds: Vec<usize> = (0..4).map(|_| troubles.look(&reports, later).len()).collect();
        assert_eq!(rounds, [20, 20, 10, 0]);
    }

    #[test]
    fn what_an_api_server_took_and_the_mesh_does_not_look_at_is_told_of_its_object() {
        let yaml = r#"
apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {nodemesh.io/mesh: "on"}}}
- {apiVersion: v1, kind: Namespace, metadata: {name: web, labels: {nodemesh.io/mesh: enabled}}}
- apiVersion: v1
  kind: Pod
  metadata: {name: cart, namespace: shop, annotations: {nodemesh.io/exclude-inbound-ports: http}}
  spec: {nodeName: node-1, containers: [{name: app}]}
- apiVersion: v1
  kind: Pod
  metadata: {name: good, namespace: shop, labels: {nodemesh.io/mesh: enabled}}
  spec: {nodeName: node-1, containers: [{name: app}]}
"#;
        let list: serde_json::Value = serde_yaml_ng::from_str(yaml).unwrap();
        let items = list["items"].as_array().unwrap();
        let set: DocumentSet = items.iter().map(|item| from_json("test", item).unwrap()).collect();
        let told = said_in_vain(&set);
        let objects: Vec<String> = told.keys().map(ToString::to_string).collect();
        assert_eq!(objects, ["Namespace shop", "Pod shop/cart"]);
        assert!(told.values().all(|why| why.contains("expected")), "{told:?}");
    }
}
