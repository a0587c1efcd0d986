//! Drain: an owned handle that every task of the data path holds, and the signal that tells it to end.
//!
//! `Serving -> Draining -> Closing -> Over`. While draining, listeners take nothing new and connections end when their
//! exchange does; when closing, the bound on patience is reached and they end now; when over, nobody waits any more. A
//! connection between two requests may be kept for a last one, if another agent serves already and nothing waits for
//! this one's end. The drain is over when the last [`Guard`] drops, so nobody counts by hand and a cancelled task cannot
//! be forgotten. Never wait here without a bound.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::sync::watch;

/// How far a drain is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Everything is served.
    #[default]
    Serving,
    /// Nothing new is taken; what runs may end by itself.
    Draining,
    /// What still runs must end now.
    Closing,
    /// Everything has ended; what has not is abandoned.
    Over,
}

#[derive(Debug)]
struct Shared {
    phase: watch::Sender<Phase>,
    /// Open guards; the watch wakes the waiter when it falls to zero.
    open: AtomicUsize,
    empty: tokio::sync::Notify,
    /// How long a connection without a request is kept once the drain has begun, in milliseconds.
    idle_millis: AtomicU64,
}

/// Starts the drain and waits for its end. Held by the composition root alone.
#[derive(Debug)]
pub struct Trigger(Arc<Shared>);

/// The signal's other end. Cheap to clone; holding it does not hold the drain up.
#[derive(Clone, Debug)]
pub struct Drain(Arc<Shared>);

/// While it lives, the drain is not over. Also tells its holder when to end.
#[derive(Debug)]
pub struct Guard(Drain);

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drained {
    /// The guards that were still open when the bounds were reached; zero is a clean end.
    pub left: usize,
}

/// A trigger and its signal.
pub fn channel() -> (Trigger, Drain) {
    let shared = Arc::new(Shared {
        phase: watch::Sender::new(Phase::Serving),
        open: AtomicUsize::new(0),
        empty: tokio::sync::Notify::new(),
        idle_millis: AtomicU64::new(0),
    });
    (Trigger(shared.clone()), Drain(shared))
}

impl Shared {
    fn advance(&self, to: Phase) {
        self.phase.send_if_modified(|phase| {
            let forward = to > *phase;
            if forward {
                *phase = to;
            }
            forward
        });
    }

    async fn reached(&self, wanted: Phase) {
        let mut receiver = self.phase.subscribe();
        // The sender lives in `self`, so the wait cannot fail.
        let _ = receiver.wait_for(|phase| *phase >= wanted).await;
    }

    async fn emptied(&self) {
        loop {
            let notified = self.empty.notified();
            if self.open.load(Ordering::Acquire) == 0 {
                return;
            }
            notified.await;
        }
    }
}

impl Trigger {
    /// Connections without a request are kept for so long once the drain begins; without this they end at once.
    pub fn keep_idle(&self, time: Duration) {
        let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        self.0.idle_millis.store(millis, Ordering::Release);
    }

    /// Stop taking new work.
    pub fn start(&self) {
        self.0.advance(Phase::Draining);
    }

    /// End what runs.
    pub fn close(&self) {
        self.0.advance(Phase::Closing);
    }

    /// Lets go of what has not ended.
    pub fn end(&self) {
        self.0.advance(Phase::Over);
    }

    /// The guards that are open.
    pub fn open(&self) -> usize {
        self.0.open.load(Ordering::Acquire)
    }

    /// Starts the drain, gives it `patience`, then closes and gives it `grace`.
    pub async fn finish(&self, patience: Duration, grace: Duration) -> Drained {
        self.start();
        if tokio::time::timeout(patience, self.0.emptied()).await.is_err() {
            self.close();
            // Whatever is left after the grace is reported and then abandoned by the caller.
            let _ = tokio::time::timeout(grace, self.0.emptied()).await;
        }
        Drained { left: self.open() }
    }
}

impl Drain {
    /// Holds the drain up until dropped.
    pub fn guard(&self) -> Guard {
        self.0.open.fetch_add(1, Ordering::AcqRel);
        Guard(self.clone())
    }

    /// How far the drain is.
    pub fn phase(&self) -> Phase {
        *self.0.phase.borrow()
    }

    /// Whether it has begun.
    pub fn is_draining(&self) -> bool {
        self.phase() >= Phase::Draining
    }

    /// Returns when the drain has begun.
    pub fn started(&self) -> impl Future<Output = ()> + Send + 'static {
        let shared = self.0.clone();
        async move { shared.reached(Phase::Draining).await }
    }

    /// Returns when the drain has begun, with how long a connection without a request may still wait for one.
    pub fn last_requests(&self) -> impl Future<Output = Duration> + Send + 'static {
        let shared = self.0.clone();
        async move {
            shared.reached(Phase::Draining).await;
            Duration::from_millis(shared.idle_millis.load(Ordering::Acquire))
        }
    }

    /// Returns when everything must end now.
    pub fn closing(&self) -> impl Future<Output = ()> + Send + 'static {
        let shared = self.0.clone();
        async move { shared.reached(Phase::Closing).await }
    }

    /// Returns when the drain is over: whoever runs the connections' tasks may drop them.
    pub fn over(&self) -> impl Future<Output = ()> + Send + 'static {
        let shared = self.0.clone();
        async move { shared.reached(Phase::Over).await }
    }

    /// The guards that are open.
    pub fn open(&self) -> usize {
        self.0.open.load(Ordering::Acquire)
    }
}

impl Guard {
    /// The signal that this guard belongs to.
    pub fn drain(&self) -> &Drain {
        &self.0
    }
}

impl Clone for Guard {
    fn clone(&self) -> Guard {
        self.0.guard()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.0.0.open.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.0.empty.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn ends_when_the_last_guard_drops() {
        let (trigger, drain) = channel();
        let guard = drain.guard();
        let second = guard.clone();
        assert_eq!(drain.open(), 2);
        let task = tokio::spawn(async move {
            guard.drain().started().await;
            drop(guard);
            second.drain().closing().await;
            drop(second);
        });
        let began = tokio::time::Instant::now();
        let drained = trigger.finish(Duration::from_secs(30), Duration::from_secs(5)).await;
        assert_eq!(drained, Drained { left: 0 });
        // The second guard waited for the close, so the whole patience went by, but none of the grace.
        assert_eq!(began.elapsed(), Duration::from_secs(30));
        task.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_guard_that_never_ends_is_counted_and_the_wait_is_bounded() {
        let (trigger, drain) = channel();
        let guard = drain.guard();
        let drained = trigger.finish(Duration::from_secs(1), Duration::from_secs(1)).await;
        assert_eq!(drained, Drained { left: 1 });
        assert_eq!(drain.phase(), Phase::Closing);
        drop(guard);
    }

    #[tokio::test]
    async fn the_time_for_last_requests_is_told_when_the_drain_begins() {
        for time in [Duration::ZERO, Duration::from_secs(60)] {
            let (trigger, drain) = channel();
            let last = tokio::spawn(drain.last_requests());
            trigger.keep_idle(time);
            trigger.start();
            assert_eq!(last.await.unwrap(), time);
            assert_eq!(drain.last_requests().await, time);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn without_guards_it_ends_at_once() {
        let (trigger, drain) = channel();
        assert!(!drain.is_draining());
        let began = tokio::time::Instant::now();
        trigger.finish(Duration::from_secs(30), Duration::from_secs(5)).await;
        assert_eq!(began.elapsed(), Duration::ZERO);
        assert!(drain.is_draining());
        // The phase never goes back.
        trigger.close();
        trigger.start();
        assert_eq!(drain.phase(), Phase::Closing);
    }
}
