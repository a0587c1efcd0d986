//! What an object's status should say, from what it says: conditions, per parent, as the Gateway API has them.
//!
//! Pure: the object's status in, the new one out, or nothing when it would say the same. `Accepted` and `ResolvedRefs`
//! are the model's (`mesh_api::status`); `Programmed` is added here, from what the agents hold. Other controllers'
//! parents and conditions are never touched. I/O is `status_writer.rs`.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh_api::{
    status::{ACCEPTED, Condition, DocumentStatus, PROGRAMMED},
    workload::Revision,
};
use serde_json::{Value, json};

use crate::controller::agents::Standing;

/// Who we are in a route's status.
pub const CONTROLLER: &str = "nodemesh.io/mesh";
/// How much of a message is kept: the API's own limit.
const MESSAGE_CHARS_MAX: usize = 32_768;
/// How many nodes a message names.
const NODES_NAMED: usize = 5;

/// What a parent of a route, or a policy, should be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The parent as the route names it; `None` for a policy.
    pub parent: Option<Value>,
    /// Its conditions.
    pub conditions: Vec<Condition>,
}

/// How far a document has come among the agents that need it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Every one holds it; so many they are.
    All(usize),
    /// These do not, with the reason of those that refused it.
    Waiting(Vec<(String, Option<String>)>),
}

/// How far `revision` has come on `nodes`.
pub fn reach(revision: Revision, nodes: &BTreeSet<Arc<str>>, agents: &BTreeMap<String, Standing>) -> Reach {
    let waiting = nodes.iter().filter_map(|node| {
        let agent = agents.get(&**node);
        if agent.is_some_and(|agent| agent.held >= revision) {
            return None;
        }
        let refusal = agent
            .filter(|agent| agent.nacked >= revision)
            .map(|agent| agent.reason.clone());
        Some((node.to_string(), refusal))
    });
    let waiting: Vec<_> = waiting.collect();
    match waiting.is_empty() {
        true => Reach::All(nodes.len()),
        false => Reach::Waiting(waiting),
    }
}

/// What the model says of a document, with what agents hold of it.
pub fn verdicts(document: &DocumentStatus, reach: &Reach) -> Vec<Verdict> {
    let complete = |conditions: &[Condition]| {
        let accepted = conditions.iter().all(|c| c.kind != ACCEPTED || c.holds);
        let mut all = conditions.to_vec();
        all.push(programmed(accepted, reach));
        all
    };
    if !document.key.kind.is_route() {
        return vec![Verdict {
            parent: None,
            conditions: complete(&document.conditions),
        }];
    }
    let parents = document.parents.iter().map(|parent| Verdict {
        parent: Some(serde_json::to_value(&parent.parent).unwrap_or_default()),
        conditions: complete(&parent.conditions),
    });
    parents.collect()
}

/// The condition `Programmed` of a document.
pub fn programmed(accepted: bool, reach: &Reach) -> Condition {
    let condition = Condition::programmed;
    if !accepted {
        return condition(false, "Invalid", "it is not accepted".to_owned());
    }
    match reach {
        Reach::All(0) => condition(true, PROGRAMMED, "no node needs it now".to_owned()),
        Reach::All(_) => condition(true, PROGRAMMED, "every agent that needs it holds it".to_owned()),
        Reach::Waiting(nodes) => {
            let refused = nodes.iter().find_map(|(node, why)| Some((node, why.as_ref()?)));
            if let Some((node, why)) = refused {
                return condition(false, "Refused", format!("the agent of {node} refused it: {why}"));
            }
            let named: Vec<&str> = nodes.iter().take(NODES_NAMED).map(|(node, _)| node.as_str()).collect();
            let more = nodes.len().saturating_sub(NODES_NAMED);
            let more = if more > 0 {
                format!(" and {more} more")
            } else {
                String::new()
            };
            let message = format!("waiting for the agents of {}{more}", named.join(", "));
            condition(false, "Pending", message)
        }
    }
}

/// Whether the object says already that this generation is programmed: it stays so until the object changes, however
/// often revisions, agents and leaders do.
fn latched(conditions: &[Value], generation: i64) -> bool {
    conditions.iter().any(|condition| {
        condition["type"] == PROGRAMMED
            && condition["status"] == "True"
            && condition["observedGeneration"].as_i64() == Some(generation)
    })
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map(Vec::as_slice).unwrap_or_default()
}

/// Puts `wanted` into the conditions that are there; the time of a transition stays while the status does.
fn merge(old: &[Value], wanted: &[Condition], generation: i64, now: &str) -> Vec<Value> {
    let mut merged: Vec<Value> = old.to_vec();
    let latched = latched(old, generation);
    for condition in wanted {
        let found = merged.iter_mut().find(|old| old["type"] == condition.kind);
        let keep = condition.kind == PROGRAMMED
            && condition.reason == "Pending"
            && latched
            && wanted.iter().all(|other| other.kind != ACCEPTED || other.holds);
        if keep {
            continue;
        }
        let status = if condition.holds { "True" } else { "False" };
        let since = found
            .as_ref()
            .filter(|old| old["status"] == status)
            .and_then(|old| old["lastTransitionTime"].as_str());
        let message: String = condition.message.chars().take(MESSAGE_CHARS_MAX).collect();
        let new = json!({
            "type": condition.kind,
            "status": status,
            "reason": condition.reason,
            "message": message,
            "observedGeneration": generation,
            "lastTransitionTime": since.unwrap_or(now),
        });
        match found {
            Some(old) => *old = new,
            None => merged.push(new),
        }
    }
    merged
}

/// The status that a route should have, if it differs from `old`.
pub fn route(old: &Value, wanted: &[Verdict], generation: i64, now: &str) -> Option<Value> {
    let before = list(old, "parents");
    let ours = |entry: &&Value| entry["controllerName"] == CONTROLLER;
    let mut parents: Vec<Value> = before.iter().filter(|entry| !ours(entry)).cloned().collect();
    for verdict in wanted {
        let parent = verdict.parent.clone().unwrap_or(Value::Null);
        let present = before.iter().filter(ours).find(|entry| entry["parentRef"] == parent);
        let conditions = present.map(|entry| list(entry, "conditions")).unwrap_or_default();
        parents.push(json!({
            "parentRef": parent,
            "controllerName": CONTROLLER,
            "conditions": merge(conditions, &verdict.conditions, generation, now),
        }));
    }
    // The order is nobody's: only what is said counts.
    let text = |all: &[Value]| all.iter().map(Value::to_string).collect::<BTreeSet<_>>();
    (text(before) != text(&parents)).then(|| json!({ "parents": parents }))
}

/// The status that a policy should have, if it differs from `old`. `revision` is the one that brought its present form.
pub fn policy(old: &Value, wanted: &[Condition], revision: Revision, generation: i64, now: &str) -> Option<Value> {
    let before = list(old, "conditions");
    let conditions = merge(before, wanted, generation, now);
    let same_form = latched(before, generation) && latched(&conditions, generation);
    // Numbers that only another leader's start has moved are no news.
    let revision = match old["revision"].as_u64().filter(|_| same_form) {
        Some(known) => known,
        None => revision.0,
    };
    let new = json!({ "conditions": conditions, "revision": revision });
    let differs = conditions != before || old["revision"].as_u64() != Some(revision);
    differs.then_some(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    const T0: &str = "2026-01-01T00:00:00Z";
    const T1: &str = "2026-01-01T00:01:00Z";

    fn condition(kind: &'static str, holds: bool, reason: &'static str) -> Condition {
        Condition {
            kind,
            holds,
            reason,
            message: String::new(),
        }
    }

    fn accepted() -> Vec<Condition> {
        vec![
            condition("Accepted", true, "Accepted"),
            condition("ResolvedRefs", true, "ResolvedRefs"),
            condition(PROGRAMMED, false, "Pending"),
        ]
    }

    fn done() -> Vec<Condition> {
        let mut all = accepted();
        all[2] = condition(PROGRAMMED, true, PROGRAMMED);
        all
    }

    fn verdict(name: &str, conditions: Vec<Condition>) -> Verdict {
        Verdict {
            parent: Some(json!({"group": "", "kind": "Service", "name": name})),
            conditions,
        }
    }

    #[test]
    fn what_is_said_already_is_not_said_again() {
        let first = policy(&Value::Null, &accepted(), Revision(7), 1, T0).unwrap();
        assert_eq!(first["revision"], 7);
        assert_eq!(policy(&first, &accepted(), Revision(7), 1, T1), None);
        let second = policy(&first, &done(), Revision(7), 1, T1).unwrap();
        let times = |status: &Value| -> Vec<String> {
            let all = status["conditions"].as_array().unwrap().iter();
            all.map(|c| c["lastTransitionTime"].as_str().unwrap().to_owned())
                .collect()
        };
        assert_eq!(times(&first), [T0, T0, T0]);
        assert_eq!(times(&second), [T0, T0, T1], "only what has turned has a new time");
    }

    #[test]
    fn programmed_stays_while_the_object_does() {
        let first = policy(&Value::Null, &done(), Revision(7), 1, T0).unwrap();
        // Another leader numbers anew, and its agents have not acked yet.
        assert_eq!(policy(&first, &accepted(), Revision(1001), 1, T1), None);
        assert_eq!(policy(&first, &done(), Revision(1001), 1, T1), None);
        // A new generation starts over.
        let second = policy(&first, &accepted(), Revision(1002), 2, T1).unwrap();
        assert_eq!(
            (&second["conditions"][2]["status"], &second["revision"]),
            (&json!("False"), &json!(1002))
        );
        // A refusal is news, and so is an object that is not accepted any more.
        let mut refused = accepted();
        refused[2].reason = "Refused";
        assert!(policy(&first, &refused, Revision(1001), 1, T1).is_some());
        let mut invalid = accepted();
        invalid[0] = condition("Accepted", false, "Invalid");
        invalid[2] = programmed(false, &Reach::All(1));
        let third = policy(&first, &invalid, Revision(1001), 1, T1).unwrap();
        assert_eq!(third["conditions"][2]["status"], "False");
    }

    #[test]
    fn other_controllers_parents_and_conditions_stay() {
        let theirs = json!({
            "parentRef": {"name": "gateway"}, "controllerName": "example.com/gateway",
            "conditions": [{"type": "Accepted", "status": "False"}],
        });
        let old = json!({ "parents": [theirs.clone()] });
        let one = route(&old, &[verdict("cart", accepted())], 1, T0).unwrap();
        assert_eq!(one["parents"][0], theirs);
        assert_eq!(one["parents"][1]["controllerName"], CONTROLLER);
        assert_eq!(one["parents"][1]["parentRef"]["name"], "cart");
        assert_eq!(route(&one, &[verdict("cart", accepted())], 1, T1), None);

        let mut ours = one["parents"][1].clone();
        ours["conditions"]
            .as_array_mut()
            .unwrap()
            .push(json!({"type": "Audited", "status": "True"}));
        let noted = json!({ "parents": [ours, theirs.clone()] });
        let two = route(&noted, &[verdict("cart", done())], 2, T1).unwrap();
        let kinds: Vec<_> = two["parents"][1]["conditions"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| &c["type"])
            .collect();
        assert!(kinds.contains(&&json!("Audited")), "{two:#}");

        // A parent that the route does not name any more loses our entry and nobody else's.
        let none = route(&two, &[], 3, T1).unwrap();
        assert_eq!(none["parents"], json!([theirs]));
        assert_eq!(route(&json!({"parents": []}), &[], 1, T0), None);
        assert_eq!(route(&Value::Null, &[], 1, T0), None);
    }

    #[test]
    fn a_document_has_come_as_far_as_its_agents() {
        let nodes: BTreeSet<Arc<str>> = ["a", "b"].map(Arc::from).into();
        let standing = |held: u64, nacked: u64| Standing {
            held: Revision(held),
            nacked: Revision(nacked),
            reason: if nacked > 0 { "no memory".into() } else { String::new() },
        };
        let agents = |a: Option<Standing>, b: Option<Standing>| {
            let all = [("a", a), ("b", b)].into_iter();
            all.filter_map(|(node, standing)| Some((node.to_owned(), standing?)))
                .collect::<BTreeMap<_, _>>()
        };
        let cases = [
            (
                agents(Some(standing(7, 0)), Some(standing(9, 0))),
                true,
                PROGRAMMED,
                "every agent",
            ),
            (
                agents(Some(standing(7, 0)), Some(standing(6, 0))),
                false,
                "Pending",
                "of b",
            ),
            (agents(Some(standing(7, 0)), None), false, "Pending", "of b"),
            (
                agents(Some(standing(6, 7)), Some(standing(6, 0))),
                false,
                "Refused",
                "of a refused it: no memory",
            ),
            // It refused something later, and holds this.
            (
                agents(Some(standing(7, 8)), Some(standing(7, 0))),
                true,
                PROGRAMMED,
                "every agent",
            ),
        ];
        for (agents, holds, reason, message) in cases {
            let condition = programmed(true, &reach(Revision(7), &nodes, &agents));
            assert_eq!((condition.holds, condition.reason), (holds, reason), "{agents:?}");
            assert!(condition.message.contains(message), "{}", condition.message);
        }
        assert!(programmed(true, &reach(Revision(7), &BTreeSet::new(), &BTreeMap::new())).holds);
    }
}
