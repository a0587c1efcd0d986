//! One timer for the life of a connection or a stream, cheap to move.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::time::{Instant, Sleep, sleep_until};

/// One timer for a connection's life. Moving the deadline later costs nothing: the timer fires once in vain and is
/// armed anew.
#[derive(Default)]
pub(super) struct Timer {
    deadline: Option<Instant>,
    armed: Option<(Instant, Pin<Box<Sleep>>)>,
}

impl Timer {
    /// Moves the deadline; `None` never comes.
    pub fn set(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    /// Moves the deadline to that moment unless it comes earlier anyway.
    pub fn cut(&mut self, at: Instant) {
        self.deadline = Some(self.deadline.map_or(at, |deadline| deadline.min(at)));
    }

    /// Whether there is a deadline.
    pub fn is_set(&self) -> bool {
        self.deadline.is_some()
    }

    /// Ready when the deadline has passed.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(deadline) = self.deadline else {
            return Poll::Pending;
        };
        let (armed, sleep) = self
            .armed
            .get_or_insert_with(|| (deadline, Box::pin(sleep_until(deadline))));
        loop {
            if *armed > deadline {
                sleep.as_mut().reset(deadline);
                *armed = deadline;
            }
            ready!(sleep.as_mut().poll(cx));
            if *armed >= deadline {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(deadline);
            *armed = deadline;
        }
    }
}
