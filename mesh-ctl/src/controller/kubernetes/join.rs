//! How an agent of a cluster proves which node it is: by a token of its ServiceAccount, made for the mesh.
//!
//! The API server says whose the token is (TokenReview, audience [`AUDIENCE`]). It must be the agents' ServiceAccount,
//! bound to a pod, and that pod must be there now, be the same (its uid), and run on the node that is asked for. A token
//! of another account, of no pod, or of another node's agent opens nothing.

use std::time::{Duration, SystemTime};

use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus, UserInfo},
    core::v1::Pod,
};
use kube::{Api, Client, api::PostParams};

use super::watch::REQUEST_TIMEOUT;
use crate::controller::source::{Admission, AdmissionError, SourceError, Waiting};

/// Whom the token must be made for.
pub const AUDIENCE: &str = "nodemesh";
/// The agents' ServiceAccount.
const ACCOUNT: &str = "nodemesh-agent";
/// Longer than any token that an API server makes.
const TOKEN_BYTES_MAX: usize = 16 << 10;
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// Asks the API server.
pub struct Reviews {
    /// How to reach it.
    pub client: Client,
    /// The namespace of the agents.
    pub namespace: String,
}

/// The pod that a reviewed token is bound to.
#[derive(Debug, PartialEq, Eq)]
struct Bound {
    pod: String,
    uid: String,
}

/// Whose the token is, if it is an agent's of `namespace` and says nothing against `node`.
fn bound(status: &TokenReviewStatus, namespace: &str, node: &str) -> Result<Bound, String> {
    if status.authenticated != Some(true) {
        let error = status.error.as_deref().unwrap_or("not authenticated");
        return Err(format!("the API server does not know the token: {error}"));
    }
    // An API server that knows nothing of audiences says none: its word is not about ours.
    if !status
        .audiences
        .as_ref()
        .is_some_and(|all| all.iter().any(|a| a == AUDIENCE))
    {
        return Err(format!("the token is not for the audience {AUDIENCE}"));
    }
    let nobody = UserInfo::default();
    let user = status.user.as_ref().unwrap_or(&nobody);
    let wanted = format!("system:serviceaccount:{namespace}:{ACCOUNT}");
    let found = user.username.as_deref().unwrap_or_default();
    if found != wanted {
        return Err(format!("the token is of {found:?}, expected {wanted}"));
    }
    let one = |name: &str| match user.extra.as_ref().and_then(|extra| extra.get(name)).map(Vec::as_slice) {
        Some([one]) if !one.is_empty() => Some(one.clone()),
        _ => None,
    };
    if let Some(on) = one(NODE_NAME).filter(|on| on != node) {
        return Err(format!("the token is of a pod on node {on}"));
    }
    match (one(POD_NAME), one(POD_UID)) {
        (Some(pod), Some(uid)) => Ok(Bound { pod, uid }),
        _ => Err("the token is not bound to a pod".to_owned()),
    }
}

/// Whether that pod is there and runs on `node`.
fn runs_on(pod: Option<&Pod>, bound: &Bound, node: &str) -> Result<(), String> {
    let pod = pod.ok_or_else(|| format!("the pod {} is gone", bound.pod))?;
    if pod.metadata.uid.as_deref() != Some(&bound.uid) {
        return Err(format!("the pod {} is another one now", bound.pod));
    }
    match pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) {
        Some(found) if found == node => Ok(()),
        found => Err(format!(
            "the pod {} runs on node {:?}",
            bound.pod,
            found.unwrap_or_default()
        )),
    }
}

fn failed(error: impl std::fmt::Display) -> AdmissionError {
    AdmissionError::Failed(error.to_string())
}

impl Reviews {
    async fn check(&self, token: &str, node: &str) -> Result<(), AdmissionError> {
        let refused = |why: String| AdmissionError::Refused {
            told: "the token is not one of this node's agent",
            why,
        };
        if token.len() > TOKEN_BYTES_MAX {
            return Err(refused(format!("longer than {TOKEN_BYTES_MAX} bytes")));
        }
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: Some(token.trim().to_owned()),
                audiences: Some(vec![AUDIENCE.to_owned()]),
            },
            ..TokenReview::default()
        };
        let reviews: Api<TokenReview> = Api::all(self.client.clone());
        let answer = reviews.create(&PostParams::default(), &review).await.map_err(failed)?;
        let bound = bound(&answer.status.unwrap_or_default(), &self.namespace, node).map_err(refused)?;
        // The API server itself is asked, not what we have seen of it: a pod that is gone must not join.
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let pod = pods.get_opt(&bound.pod).await.map_err(failed)?;
        runs_on(pod.as_ref(), &bound, node).map_err(refused)
    }
}

impl Admission for Reviews {
    fn admit<'a>(&'a self, token: &'a str, node: &'a str) -> Waiting<'a, Result<(), AdmissionError>> {
        Box::pin(async move {
            match tokio::time::timeout(REQUEST_TIMEOUT, self.check(token, node)).await {
                Ok(checked) => checked,
                Err(late) => Err(failed(late)),
            }
        })
    }

    fn issue(&self, _: &str, _: Duration, _: SystemTime) -> Result<String, SourceError> {
        let text = "in a cluster agents join by the token of their ServiceAccount: there is nothing to issue";
        Err(SourceError::NotHere(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn good() -> Value {
        json!({
            "authenticated": true,
            "audiences": ["nodemesh"],
            "user": {
                "username": "system:serviceaccount:nodemesh-system:nodemesh-agent",
                "extra": { POD_NAME: ["agent-x"], POD_UID: ["u-1"], NODE_NAME: ["node-1"] },
            },
        })
    }

    #[test]
    fn only_an_agents_own_token_admits_its_node() {
        let change = |pointer: &str, value: Value| {
            let mut status = good();
            *status.pointer_mut(pointer).unwrap() = value;
            status
        };
        let user = |name: &str| change("/user/username", json!(name));
        let cases = [
            (good(), true),
            (
                change("/user/extra", json!({POD_NAME: ["agent-x"], POD_UID: ["u-1"]})),
                true,
            ),
            (change("/authenticated", json!(false)), false),
            (change("/audiences", json!(["https://kubernetes.default.svc"])), false),
            (change("/audiences", json!(null)), false),
            (user("system:serviceaccount:nodemesh-system:default"), false),
            (user("system:serviceaccount:shop:nodemesh-agent"), false),
            (user("system:node:node-1"), false),
            (change("/user/extra", json!({})), false),
            (change("/user/extra", json!({POD_NAME: ["agent-x"]})), false),
            (
                change("/user/extra", json!({POD_NAME: ["a", "b"], POD_UID: ["u-1"]})),
                false,
            ),
            (
                change(
                    "/user/extra",
                    json!({POD_NAME: ["a"], POD_UID: ["u"], NODE_NAME: ["node-2"]}),
                ),
                false,
            ),
            (json!({}), false),
        ];
        for (status, expected) in cases {
            let parsed: TokenReviewStatus = serde_json::from_value(status.clone()).unwrap();
            assert_eq!(
                bound(&parsed, "nodemesh-system", "node-1").is_ok(),
                expected,
                "{status}"
            );
        }
    }

    #[test]
    fn the_pod_must_be_there_be_the_same_and_run_on_the_node() {
        let pod = |uid: &str, node: Value| -> Pod {
            serde_json::from_value(json!({
                "metadata": {"name": "agent-x", "uid": uid},
                "spec": {"nodeName": node, "containers": []},
            }))
            .unwrap()
        };
        let bound = Bound {
            pod: "agent-x".into(),
            uid: "u-1".into(),
        };
        let cases = [
            (Some(pod("u-1", json!("node-1"))), true),
            (Some(pod("u-1", json!("node-2"))), false),
            (Some(pod("u-1", json!(null))), false),
            (Some(pod("u-2", json!("node-1"))), false),
            (None, false),
        ];
        for (pod, expected) in cases {
            assert_eq!(runs_on(pod.as_ref(), &bound, "node-1").is_ok(), expected, "{pod:?}");
        }
    }
}
