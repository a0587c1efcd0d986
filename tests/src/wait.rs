//! Waiting for a condition with a deadline: the only place of the lab where a thread sleeps.
//!
//! A test never sleeps for a guessed time; it names what it waits for, and a wait that runs out says what was missing.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// How long a wait pauses between two looks at its condition.
const POLL_INTERVAL: Duration = Duration::from_millis(15);

/// Asks `condition` again and again until it gives a value, at most for `limit`.
///
/// `condition` answers `Ok(Some(value))` when it holds, `Ok(None)` when it does not hold yet, and an error that is
/// kept as the explanation should time run out.
pub fn until<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        let missing = match condition() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if Instant::now() >= deadline {
            match missing {
                Some(error) => return Err(error.context(format!("{what}: not within {limit:?}"))),
                None => bail!("{what}: not within {limit:?}"),
            }
        }
        thread::sleep(POLL_INTERVAL);
    }
}
