//! An Event on each Pod that should be captured and is not, with the agent's reason.
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
    document::{Document, DocumentKey, Kind},
    wire::PodReport,
    workload::ObjectName,
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

/// What is known of a pod that is not captured.
struct Trouble {
    why: String,
    since: Instant,
    told: Option<Instant>,
}

/// Which troubles should be told now.
#[derive(Default)]
struct Troubles(BTreeMap<ObjectName, Trouble>);

impl Troubles {
    /// Takes the present reports, and returns what to tell.
    fn look(&mut self, reports: &[(String, PodReport)], now: Instant) -> Vec<(ObjectName, String, String)> {
        self.0
            .retain(|name, _| reports.iter().any(|(_, report)| report.name == *name));
        let mut tell = Vec::new();
        for (node, report) in reports {
            if self.0.len() >= PODS_MAX && !self.0.contains_key(&report.name) {
                continue;
            }
            let trouble = self.0.entry(report.name.clone()).or_insert_with(|| Trouble {
                why: report.why.clone(),
                since: now,
                told: None,
            });
            if trouble.why != report.why {
                trouble.why = report.why.clone();
                trouble.told = None;
            }
            let due = match trouble.told {
                None => now >= trouble.since + LASTS,
                Some(at) => now >= at + AGAIN,
            };
            if due && tell.len() < ROUND_MAX {
                trouble.told = Some(now);
                tell.push((report.name.clone(), node.clone(), report.why.clone()));
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
    let mut troubles = Troubles::default();
    loop {
        tokio::time::sleep(LOOK).await;
        let reports = agents.pods(|pod| pod.enrolled && !pod.captured && !pod.why.is_empty());
        metrics.not_captured(reports.len());
        for (name, node, why) in troubles.look(&reports, Instant::now()) {
            let Some(pod) = reference(&cluster, &name) else {
                continue;
            };
            let note: String = format!("the agent of {node} cannot capture it: {why}");
            let event = Event {
                type_: EventType::Warning,
                reason: "NotCaptured".to_owned(),
                note: Some(note.chars().take(NOTE_CHARS_MAX).collect()),
                action: "Capture".to_owned(),
                secondary: None,
            };
            match tokio::time::timeout(REQUEST_TIMEOUT, recorder.publish(&event, &pod)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(pod = %name, %error, "an Event was not written"),
                Err(_) => tracing::warn!(pod = %name, "an Event was not written in time"),
            }
        }
    }
}

/// The pod as an Event names it; one that is gone needs none.
fn reference(cluster: &Cluster, name: &ObjectName) -> Option<ObjectReference> {
    let key = DocumentKey::new(Kind::Pod, &name.namespace, &name.name);
    cluster.look(|known| match known.set.get(&key) {
        Some(Document::Pod(pod)) => Some(ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            namespace: Some(name.namespace.to_string()),
            name: Some(name.name.to_string()),
            uid: Some(pod.meta.uid.to_string()).filter(|uid| !uid.is_empty()),
            ..ObjectReference::default()
        }),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lasts_is_told_once_and_again_when_its_reason_changes() {
        let report = |why: &str| {
            let report = PodReport {
                name: ObjectName::new("shop", "cart"),
                enrolled: true,
                captured: false,
                why: why.to_owned(),
            };
            vec![("node-1".to_owned(), report)]
        };
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
            (611, vec![], 0),
            (613, report("no memory"), 0),
            (618, report("no memory"), 1),
        ];
        for (seconds, reports, expected) in steps {
            assert_eq!(troubles.look(&reports, at(seconds)).len(), expected, "second {seconds}");
        }
    }

    #[test]
    fn a_round_is_bounded_and_the_rest_follows() {
        let reports: Vec<_> = (0..50)
            .map(|n| {
                let report = PodReport {
                    name: ObjectName::new("shop", &format!("pod-{n}")),
                    enrolled: true,
                    captured: false,
                    why: "no netns".to_owned(),
                };
                ("node-1".to_owned(), report)
            })
            .collect();
        let start = Instant::now();
        let mut troubles = Troubles::default();
        troubles.look(&reports, start);
        let later = start + LASTS;
        let rounds: Vec<usize> = (0..4).map(|_| troubles.look(&reports, later).len()).collect();
        assert_eq!(rounds, [20, 20, 10, 0]);
    }
}
