//! The simulator's runs: as many seeds as the time allows, each a mesh of its own with a course of its own.
//!
//! `NODEMESH_SEED=N` runs one seed and prints its course; `NODEMESH_SEEDS=N` sets how many are run instead of how long,
//! `NODEMESH_FROM=N` with which one they begin. A seed that fails is shortened and told with the command that runs it
//! again. Every run must be its seed's alone: nothing here may look at the machine's clock but to know when to stop.

use std::{
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use mesh_sim::world::{
    self, Failure, Report,
    plan::Plan,
    search::{alone, shrink, tell},
};

/// How long seeds are run by default.
const TIME: Duration = Duration::from_secs(60);
/// Seeds that are run however long they take.
const SEEDS_MIN: u64 = 100;

fn runner(plan: &Plan, state_dir: &Path) -> Result<Report, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(world::run(plan, state_dir))
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text}: expected a number")),
    )
}

#[test]
fn every_seed_holds() {
    if let Some(seed) = number("NODEMESH_SEED") {
        let plan = Plan::new(seed);
        match alone(runner, &plan) {
            Ok(report) => println!("{}\nseed {seed}: {report:?}", report.lines.join("\n")),
            Err(failure) => {
                let (plan, failure) = shrink(runner, &plan, failure);
                panic!("{}", tell(seed, &plan, &failure));
            }
        }
        return;
    }
    let (from, wanted) = (number("NODEMESH_FROM").unwrap_or(0), number("NODEMESH_SEEDS"));
    let began = Instant::now();
    let goes_on = |run: u64| match wanted {
        Some(wanted) => run < wanted,
        None => run < SEEDS_MIN || began.elapsed() < TIME,
    };
    let (next, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let (total, failed) = (Mutex::new((0, Report::default())), Mutex::new(None));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, |n| n.get()) {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let run = next.fetch_add(1, Ordering::Relaxed);
                    if !goes_on(run) {
                        return;
                    }
                    let seed = from + run;
                    match alone(runner, &Plan::new(seed)) {
                        Ok(report) => {
                            let mut total = total.lock().unwrap();
                            total.0 += 1;
                            total.1.add(&report);
                        }
                        Err(failure) => {
                            stop.store(true, Ordering::Relaxed);
                            *failed.lock().unwrap() = Some((seed, failure));
                        }
                    }
                }
            });
        }
    });
    if let Some((seed, failure)) = failed.into_inner().unwrap() {
        let (plan, failure) = shrink(runner, &Plan::new(seed), failure);
        panic!("{}", tell(seed, &plan, &failure));
    }
    let (count, total) = total.into_inner().unwrap();
    println!(
        "{count} seeds from {from} on in {:.1} s: {total:?}",
        began.elapsed().as_secs_f64()
    );
    // A simulator in which nothing is served, refused or broken off finds nothing.
    assert!(
        count < 20 || (total.served > total.requests / 4 && total.refused > 0 && total.failed > 0),
        "{total:?}"
    );
}

#[test]
fn a_seed_has_one_course() {
    for seed in 0..12 {
        let plan = Plan::new(seed);
        let [first, second] = [(); 2].map(|()| match alone(runner, &plan) {
            Ok(report) => report,
            Err(failure) => panic!("{}", tell(seed, &plan, &failure)),
        });
        for (first, second) in first.lines.iter().zip(&second.lines) {
            assert_eq!(first, second, "seed {seed} takes two courses");
        }
        assert_eq!(first.trace, second.trace, "seed {seed} takes two courses");
    }
}
