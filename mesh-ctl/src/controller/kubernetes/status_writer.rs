//! Writes statuses to the API server while this replica leads: what `status.rs` says, when it says something new.
//!
//! Each write names the version of the object that it was made from, so that nobody's change is lost: a conflict is
//! answered by the object's next version, which the watch brings. Writes are bounded in number and rate; one that
//! failed is tried again later.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};
use k8s_openapi::jiff::{Timestamp, Unit};
use kube::{
    Api, Client,
    api::{DynamicObject, Patch, PatchParams},
};
use mesh_api::{document::DocumentKey, status::statuses};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    cluster::{Cluster, Known},
    health::Metrics,
    status,
    watch::{ObjectState, REQUEST_TIMEOUT},
};
use crate::controller::agents::Agents;

/// Who writes, in the API server's books.
const FIELD_MANAGER: &str = "nodemesh-controller";
/// Statuses are computed this long after something has changed: most changes come with others, and agents ack soon.
const QUIET: Duration = Duration::from_millis(150);
/// And not more often than this.
const PERIOD: Duration = Duration::from_millis(500);
/// Everything is looked at again although nothing has changed.
const LOOK: Duration = Duration::from_secs(30);
/// Writes at a time.
const WRITES_MAX: usize = 8;
/// Writes in one round; the next round follows at once.
const ROUND_MAX: usize = 100;
/// A write that failed is not tried again before.
const RETRY: Duration = Duration::from_secs(2);

/// A write that is to be made.
struct Write {
    key: DocumentKey,
    object: ObjectState,
    status: Value,
}

/// The last write of an object.
struct Done {
    /// The version that it was made from: until the watch shows another, nothing new is known.
    from: String,
    status: Value,
    /// For one that failed: not again before.
    retry: Option<Instant>,
}

/// Writes until its task is ended.
pub async fn run(client: Client, cluster: Arc<Cluster>, agents: Arc<Agents>, metrics: Arc<Metrics>) {
    let (mut changes, mut answers) = (cluster.changes(), agents.subscribe());
    let mut done: BTreeMap<DocumentKey, Done> = BTreeMap::new();
    let mut more = true;
    loop {
        let began = Instant::now();
        changes.borrow_and_update();
        answers.borrow_and_update();
        let mut writes = tokio::task::block_in_place(|| cluster.look(|known| due(known, &agents, &mut done)));
        more |= writes.len() > ROUND_MAX;
        writes.truncate(ROUND_MAX);
        let written = stream::iter(writes)
            .map(|write| put(&client, write))
            .buffer_unordered(WRITES_MAX);
        let written: Vec<_> = written.collect().await;
        for (write, result) in written {
            metrics.status_written(result);
            // After a conflict the watch will have shown another version by then.
            let retry = matches!(result, FAILED | CONFLICT).then(|| Instant::now() + RETRY);
            let entry = Done {
                from: write.object.resource_version,
                status: write.status,
                retry,
            };
            done.insert(write.key, entry);
        }
        if !more {
            let retries = done.values().filter_map(|last| last.retry).filter(|at| *at > began);
            let wake = retries.min().unwrap_or(began + LOOK).min(began + LOOK);
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                changed = answers.changed() => if changed.is_err() { return },
                () = tokio::time::sleep_until(wake) => {}
            }
            tokio::time::sleep(QUIET).await;
        }
        more = false;
        tokio::time::sleep_until(began + PERIOD).await;
    }
}

/// The statuses that say something new.
fn due(known: &Known<'_>, agents: &Agents, done: &mut BTreeMap<DocumentKey, Done>) -> Vec<Write> {
    done.retain(|key, _| known.objects.contains_key(key));
    let clock = Instant::now();
    let now = Timestamp::now().round(Unit::Second).unwrap_or_default().to_string();
    let standing = agents.standing();
    let mut writes = Vec::new();
    for document in statuses(known.set) {
        let key = document.key.clone();
        let Some(object) = known.objects.get(&key) else {
            continue;
        };
        let brought = known.brought.get(&key).copied().unwrap_or(known.current.revision);
        let reach = status::reach(brought, &document.nodes, &standing);
        let verdicts = status::verdicts(&document, &reach);
        let new = if key.kind.is_route() {
            status::route(&object.status, &verdicts, object.generation, &now)
        } else {
            let conditions = verdicts
                .into_iter()
                .flat_map(|verdict| verdict.conditions)
                .collect::<Vec<_>>();
            status::policy(&object.status, &conditions, brought, object.generation, &now)
        };
        let Some(new) = new else { continue };
        if let Some(last) = done.get(&key).filter(|last| last.from == object.resource_version) {
            // Written or in conflict: the watch will bring what came of it. Failed: later.
            let again = last.retry.is_some_and(|at| at <= clock);
            if !again && (last.retry.is_some() || same_but_times(&last.status, &new)) {
                continue;
            }
        }
        writes.push(Write {
            key,
            object: object.clone(),
            status: new,
        });
    }
    writes
}

/// Whether two statuses differ at most in when something turned.
fn same_but_times(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len()
                && a.iter().all(|(key, value)| {
                    key == "lastTransitionTime" || b.get(key).is_some_and(|other| same_but_times(value, other))
                })
        }
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same_but_times(a, b)),
        _ => a == b,
    }
}

const FAILED: &str = "failed";
const CONFLICT: &str = "conflict";

/// Writes one status: `ok`, `conflict` (somebody else wrote, or the object is gone), `refused` or `failed`.
async fn put(client: &Client, write: Write) -> (Write, &'static str) {
    let object = &write.object;
    let api: Api<DynamicObject> = match write.key.namespace.is_empty() {
        true => Api::all_with(client.clone(), &object.resource),
        false => Api::namespaced_with(client.clone(), &write.key.namespace, &object.resource),
    };
    let patch = json!({
        "apiVersion": object.resource.api_version,
        "kind": object.resource.kind,
        "metadata": { "resourceVersion": object.resource_version, "uid": object.uid },
        "status": write.status,
    });
    let parameters = PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    };
    let patch = Patch::Merge(&patch);
    let asked = api.patch_status(&write.key.name, &parameters, &patch);
    let result = match tokio::time::timeout(REQUEST_TIMEOUT, asked).await {
        Ok(Ok(_)) => "ok",
        Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => CONFLICT,
        Ok(Err(kube::Error::Api(status))) if matches!(status.code, 400 | 422) => {
            // Trying again would not help: the API server wants another shape.
            tracing::error!(key = %write.key, error = %status.message, "a status was refused");
            "refused"
        }
        Ok(Err(error)) => {
            tracing::warn!(key = %write.key, %error, "a status was not written");
            FAILED
        }
        Err(_) => FAILED,
    };
    (write, result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_time_of_a_transition_is_no_difference() {
        let status = |time: &str, reason: &str| json!({"conditions": [{"lastTransitionTime": time, "reason": reason}]});
        assert!(same_but_times(&status("a", "x"), &status("b", "x")));
        assert!(!same_but_times(&status("a", "x"), &status("a", "y")));
        assert!(!same_but_times(&status("a", "x"), &json!({"conditions": []})));
    }
}
