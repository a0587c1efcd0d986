//! Many seeds, and what to do with one that fails: run it again, leave out what does not matter, and tell the rest.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use super::{Failure, Report, plan::Plan};

/// How long is looked for a shorter plan.
const SHRINK_TIME: Duration = Duration::from_secs(40);

/// Runs a plan on the calling thread. `runtime` makes a current-thread runtime with a paused clock.
pub type Runner = fn(&Plan, &Path) -> Result<Report, Failure>;

/// Runs a plan on a thread of its own, which is as new as a process: nothing of an earlier run is left in it.
pub fn alone(runner: Runner, plan: &Plan) -> Result<Report, Failure> {
    static RUNS: AtomicU64 = AtomicU64::new(0);
    let number = RUNS.fetch_add(1, Ordering::Relaxed);
    let memory = PathBuf::from("/dev/shm");
    let base = if memory.is_dir() { memory } else { std::env::temp_dir() };
    let state_dir = base.join(format!("nodemesh-sim-{}-{number}", std::process::id()));
    let result = std::thread::scope(|scope| {
        let run = || catch_unwind(AssertUnwindSafe(|| runner(plan, &state_dir)));
        let thread = std::thread::Builder::new().stack_size(8 << 20).spawn_scoped(scope, run);
        thread.expect("a thread").join()
    });
    let _ = std::fs::remove_dir_all(&state_dir);
    match result {
        Ok(Ok(result)) => result,
        Ok(Err(panic)) | Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Err(Failure {
                what: format!("panicked: {}", text.unwrap_or_default()),
                trace: Vec::new(),
            })
        }
    }
}

/// The kind of a failure: what is told without numbers, addresses and states, which differ from plan to plan.
fn kind(what: &str) -> String {
    let words = what.split(['{', '[', '(', '"']).next().unwrap_or_default();
    words.chars().filter(|c| !c.is_ascii_digit()).collect()
}

/// A shorter plan that fails in the same way, and how.
pub fn shrink(runner: Runner, plan: &Plan, failure: Failure) -> (Plan, Failure) {
    let began = Instant::now();
    let (mut plan, mut failure) = (plan.clone(), failure);
    let mut size = plan.steps.len().div_ceil(2);
    while size > 0 {
        let mut at = 0;
        let mut any = false;
        while at < plan.steps.len() && began.elapsed() < SHRINK_TIME {
            let mut shorter = plan.clone();
            let until = (at + size).min(plan.steps.len());
            shorter.steps.drain(at..until);
            match alone(runner, &shorter) {
                Err(found) if kind(&found.what) == kind(&failure.what) => (plan, failure, any) = (shorter, found, true),
                Ok(_) | Err(_) => at += size,
            }
        }
        if began.elapsed() >= SHRINK_TIME || (size == 1 && !any) {
            break;
        }
        size = if size == 1 { 1 } else { size.div_ceil(2) };
    }
    (plan, failure)
}

/// What is told of a seed that fails.
pub fn tell(seed: u64, plan: &Plan, failure: &Failure) -> String {
    let steps: Vec<String> = plan
        .steps
        .iter()
        .map(|step| format!("  {:?} {:?}", step.after, step.operation))
        .collect();
    format!(
        "seed {seed} fails: {}\nas does this plan ({} steps, {} nodes' agents, calm: {}, limits: {}):\n{}\nits course:\n{}\n\
         again: NODEMESH_SEED={seed} cargo test -p mesh-sim -- --nocapture",
        failure.what,
        plan.steps.len(),
        super::NODES,
        plan.calm,
        plan.limits,
        steps.join("\n"),
        failure.trace.join("\n"),
    )
}
