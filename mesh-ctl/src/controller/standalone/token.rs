//! Join tokens: how an agent that has no certificate yet proves which node it is.
//!
//! A token is `nmj1.<id>.<secret>`: the id finds the record, the secret proves. The store keeps the secret's SHA-256 only
//! (32 random bytes need no slow hash). A token is bound to one node name and may be used again until it expires, so that
//! an agent which lost its state directory can join again; what a stolen token gains is bounded by its life and by what
//! that one node runs. A wrong id, secret, node or time get the same answer.

use std::time::{Duration, SystemTime};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use sha2::{Digest, Sha256};

use super::store::{Store, StoreError, StoredToken};
use crate::controller::{operator::TOKEN_TTL_MAX, unix_seconds};

const PREFIX: &str = "nmj1";
/// The token is not one that admits this node now. Why is for the controller's own log, not for the caller.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TokenRefused(pub &'static str);

/// Makes a token for `node` and keeps its hash. Returns the text to hand to the agent.
pub fn create(store: &Store, node: &str, ttl: Duration, now: SystemTime) -> Result<String, StoreError> {
    let id: [u8; 8] = rand::random();
    let secret: [u8; 32] = rand::random();
    let id = BASE64_URL_SAFE_NO_PAD.encode(id);
    let token = StoredToken {
        node: node.to_owned(),
        secret_sha256: Sha256::digest(secret).into(),
        expires: unix_seconds(now + ttl.min(TOKEN_TTL_MAX)),
    };
    store.put_token(&id, &token, unix_seconds(now))?;
    Ok(format!("{PREFIX}.{id}.{}", BASE64_URL_SAFE_NO_PAD.encode(secret)))
}

/// Compares without leaving early at the first difference.
fn equal_in_constant_time(a: &[u8; 32], b: &[u8; 32]) -> bool {
    let difference = a.iter().zip(b).fold(0u8, |sum, (x, y)| sum | (x ^ y));
    std::hint::black_box(difference) == 0
}

/// Whether `text` admits `node` now.
pub fn check(store: &Store, text: &str, node: &str, now: SystemTime) -> Result<Result<(), TokenRefused>, StoreError> {
    let refuse = |why| Ok(Err(TokenRefused(why)));
    let mut parts = text.trim().split('.');
    let (Some(PREFIX), Some(id), Some(secret), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return refuse("not of the form nmj1.<id>.<secret>");
    };
    let Ok(secret) = BASE64_URL_SAFE_NO_PAD.decode(secret) else {
        return refuse("the secret is not base64");
    };
    let Some(token) = store.token(id)? else {
        return refuse("no token has this id");
    };
    if !equal_in_constant_time(&token.secret_sha256, &Sha256::digest(&secret).into()) {
        return refuse("the secret is wrong");
    }
    if token.node != node {
        return refuse("the token is for another node");
    }
    if token.expires <= unix_seconds(now) {
        return refuse("the token has expired");
    }
    Ok(Ok(()))
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[test]
    fn a_token_admits_its_node_for_its_life_and_nobody_else() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), 3).unwrap();
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let hour = Duration::from_secs(3600);
        let token = create(&store, "node-1", hour, now).unwrap();
        let other = create(&store, "node-2", hour, now).unwrap();
        let id = token.split('.').nth(1).unwrap();
        let mixed = format!("nmj1.{id}.{}", other.split('.').nth(2).unwrap());
        let cases = [
            (token.as_str(), "node-1", now, true),
            (token.as_str(), "node-1", now + hour / 2, true),
            (token.as_str(), "node-2", now, false),
            (token.as_str(), "node-1", now + hour, false),
            (mixed.as_str(), "node-1", now, false),
            ("nmj1.x.y", "node-1", now, false),
            ("", "node-1", now, false),
            ("nmj1.a.b.c", "node-1", now, false),
        ];
        for (text, node, at, good) in cases {
            assert_eq!(check(&store, text, node, at).unwrap().is_ok(), good, "{text} {node}");
        }
    }
}
