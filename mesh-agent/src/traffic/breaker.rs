//! The circuit breaker of one endpoint: closed, open, half open. Pure; time is an argument.
//!
//! Closed, it counts: failures in a row and the share of failures in a sliding window. Open, it lets nothing through.
//! When `open_for` is over it lets `half_open_probes` requests through at once; as many successes close it, one
//! failure opens it again. What began before it opened tells nothing about the time after and is not counted.

use std::time::{Duration, Instant};

use mesh_api::resilience::{BreakerSettings, ErrorRateSettings};

/// The parts of an error rate's window: what is forgotten at once when time goes on.
const WINDOW_PARTS: usize = 10;

/// What a breaker lets through just now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    /// Everything.
    Closed,
    /// Nothing, until this moment.
    Open {
        /// When probes may go.
        until: Instant,
    },
    /// Probes only.
    HalfOpen {
        /// Probes under way.
        probes: u32,
        /// Probes that came back well.
        successes: u32,
    },
}

/// The leave to send one request. Must be given back by [`Breaker::report`] or [`Breaker::give_up`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a ticket that is not given back blocks a half-open breaker"]
pub struct Ticket {
    epoch: u64,
}

/// A breaker's state.
#[derive(Debug)]
pub struct Breaker {
    state: BreakerState,
    /// Grows with each change of state, so that reports from before it are known.
    epoch: u64,
    failures_in_a_row: u32,
    window: Window,
}

#[derive(Clone, Copy, Debug, Default)]
struct Part {
    /// Which part of all time this is; others have outlived the window.
    number: u64,
    successes: u32,
    failures: u32,
}

#[derive(Debug, Default)]
struct Window {
    origin: Option<Instant>,
    parts: [Part; WINDOW_PARTS],
}

impl Default for Breaker {
    fn default() -> Breaker {
        Breaker {
            state: BreakerState::Closed,
            epoch: 0,
            failures_in_a_row: 0,
            window: Window::default(),
        }
    }
}

impl Breaker {
    /// The state at `now`; an open one whose time is over still reads open until someone asks to send.
    pub fn state(&self) -> BreakerState {
        self.state
    }

    /// Whether [`Breaker::acquire`] would succeed.
    pub fn allows(&self, settings: &BreakerSettings, now: Instant) -> bool {
        match self.state {
            BreakerState::Closed => true,
            BreakerState::Open { until } => now >= until,
            BreakerState::HalfOpen { probes, successes } => probes + successes < settings.half_open_probes.max(1),
        }
    }

    /// Asks to send one request.
    pub fn acquire(&mut self, settings: &BreakerSettings, now: Instant) -> Option<Ticket> {
        if !self.allows(settings, now) {
            return None;
        }
        match &mut self.state {
            BreakerState::Closed => {}
            BreakerState::Open { .. } => self.enter(BreakerState::HalfOpen {
                probes: 1,
                successes: 0,
            }),
            BreakerState::HalfOpen { probes, .. } => *probes += 1,
        }
        Some(Ticket { epoch: self.epoch })
    }

    /// Tells how a request ended. Returns whether that opened the breaker.
    pub fn report(&mut self, ticket: Ticket, success: bool, settings: &BreakerSettings, now: Instant) -> bool {
        if ticket.epoch != self.epoch {
            return false;
        }
        match (&mut self.state, success) {
            (BreakerState::Closed, true) => {
                self.failures_in_a_row = 0;
                self.count(settings, true, now);
                false
            }
            (BreakerState::Closed, false) => {
                self.failures_in_a_row = self.failures_in_a_row.saturating_add(1);
                let rate_is_over = self.count(settings, false, now);
                let row_is_over = settings
                    .consecutive_failures
                    .is_some_and(|most| self.failures_in_a_row >= most.max(1));
                if row_is_over || rate_is_over {
                    self.open(settings, now);
                }
                row_is_over || rate_is_over
            }
            (BreakerState::HalfOpen { probes, successes }, true) => {
                *probes = probes.saturating_sub(1);
                *successes += 1;
                if *successes >= settings.half_open_probes.max(1) {
                    self.enter(BreakerState::Closed);
                }
                false
            }
            (BreakerState::HalfOpen { .. }, false) => {
                self.open(settings, now);
                true
            }
            // Tickets of this epoch are made by closed and half-open breakers only.
            (BreakerState::Open { .. }, _) => false,
        }
    }

    /// Gives a ticket back without a result: the request was cancelled or never sent.
    pub fn give_up(&mut self, ticket: Ticket) {
        if let BreakerState::HalfOpen { probes, .. } = &mut self.state
            && ticket.epoch == self.epoch
        {
            *probes = probes.saturating_sub(1);
        }
    }

    fn enter(&mut self, state: BreakerState) {
        self.state = state;
        self.epoch += 1;
        self.failures_in_a_row = 0;
        self.window = Window::default();
    }

    fn open(&mut self, settings: &BreakerSettings, now: Instant) {
        // A time that cannot be represented is as good as a year.
        let until = now
            .checked_add(settings.open_for)
            .unwrap_or_else(|| now + Duration::from_secs(31_536_000));
        self.enter(BreakerState::Open { until });
    }

    fn count(&mut self, settings: &BreakerSettings, success: bool, now: Instant) -> bool {
        settings
            .error_rate
            .is_some_and(|rate| self.window.count(&rate, success, now))
    }
}

impl Window {
    /// Counts a result and says whether the rate is over.
    fn count(&mut self, rate: &ErrorRateSettings, success: bool, now: Instant) -> bool {
        let origin = *self.origin.get_or_insert(now);
        let part_nanos = (rate.window.as_nanos() / WINDOW_PARTS as u128).max(1);
        // Starts at 1, so that a part that was never used is none of the window's.
        let number =
            u64::try_from(now.saturating_duration_since(origin).as_nanos() / part_nanos).unwrap_or(u64::MAX - 1) + 1;
        let index = (number % WINDOW_PARTS as u64) as usize;
        if let Some(part) = self.parts.get_mut(index) {
            if part.number != number {
                *part = Part {
                    number,
                    ..Part::default()
                };
            }
            let counter = if success {
                &mut part.successes
            } else {
                &mut part.failures
            };
            *counter = counter.saturating_add(1);
        }
        let oldest = number.saturating_sub(WINDOW_PARTS as u64 - 1);
        let (successes, failures) = self
            .parts
            .iter()
            .filter(|part| part.number >= oldest.max(1))
            .fold((0u64, 0u64), |(s, f), part| {
                (s + u64::from(part.successes), f + u64::from(part.failures))
            });
        let all = successes + failures;
        !success && all >= u64::from(rate.min_requests) && failures * 100 >= u64::from(rate.percent) * all
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn settings(consecutive: Option<u32>, rate: Option<(u32, u64, u32)>, probes: u32) -> BreakerSettings {
        BreakerSettings {
            max_connections: None,
            max_pending_requests: None,
            max_requests: None,
            consecutive_failures: consecutive,
            error_rate: rate.map(|(percent, seconds, min_requests)| ErrorRateSettings {
                percent,
                window: Duration::from_secs(seconds),
                min_requests,
            }),
            open_for: Duration::from_secs(5),
            half_open_probes: probes,
        }
    }

    /// Runs a script: `s` and `f` send a request that succeeds or fails, `x` must be refused, a digit lets so many
    /// seconds pass. Returns the letters of the states after each step.
    fn run(settings: &BreakerSettings, script: &str) -> String {
        let (mut breaker, mut now) = (Breaker::default(), Instant::now());
        let mut states = String::new();
        for step in script.chars() {
            match step {
                's' | 'f' => {
                    let ticket = breaker
                        .acquire(settings, now)
                        .unwrap_or_else(|| panic!("refused in {script}"));
                    breaker.report(ticket, step == 's', settings, now);
                }
                'x' => assert_eq!(breaker.acquire(settings, now), None, "let through in {script}"),
                digit => now += Duration::from_secs(digit.to_digit(10).unwrap().into()),
            }
            states.push(match breaker.state() {
                BreakerState::Closed => 'c',
                BreakerState::Open { .. } => 'o',
                BreakerState::HalfOpen { .. } => 'h',
            });
        }
        states
    }

    #[test]
    fn states_follow_the_script() {
        let row = settings(Some(3), None, 1);
        let rate = settings(None, Some((50, 10, 4)), 1);
        let two_probes = settings(Some(1), None, 2);
        let cases = [
            (&row, "ffsffs", "cccccc"),
            (&row, "fffx4x1s", "ccoooooc"),
            (&row, "fff5fx5s", "ccoooooc"),
            (&rate, "fff", "ccc"),
            (&rate, "sffsf", "cccco"),
            (&rate, "ssssssfff", "ccccccccc"),
            (&rate, "fff99fff", "cccccccc"),
            (&two_probes, "f5sfx", "oohoo"),
            (&two_probes, "f5ss", "oohc"),
        ];
        for (settings, script, expected) in cases {
            assert_eq!(run(settings, script), expected, "{script}");
        }
    }

    #[test]
    fn reports_from_before_a_change_do_not_count() {
        let settings = settings(Some(1), None, 1);
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        let early: Vec<_> = (0..3).map(|_| breaker.acquire(&settings, now).unwrap()).collect();
        let trip = breaker.acquire(&settings, now).unwrap();
        assert!(breaker.report(trip, false, &settings, now));
        let later = now + Duration::from_secs(5);
        let probe = breaker.acquire(&settings, later).unwrap();
        for ticket in early {
            breaker.report(ticket, true, &settings, later);
        }
        assert!(matches!(
            breaker.state(),
            BreakerState::HalfOpen {
                probes: 1,
                successes: 0
            }
        ));
        breaker.give_up(probe);
        assert!(
            breaker.allows(&settings, later),
            "a cancelled probe makes room for another"
        );
    }

    proptest! {
        /// Whatever happens, nothing is sent while open, and no more than the probes while half open.
        #[test]
        fn never_sends_while_open(
            consecutive in 1u32..4, probes in 1u32..4,
            steps in prop::collection::vec((0u8..4, 0u64..4_000), 1..300),
        ) {
            let settings = settings(Some(consecutive), Some((50, 2, 5)), probes);
            let (mut breaker, mut now) = (Breaker::default(), Instant::now());
            let mut tickets = Vec::new();
            let mut opened: Option<Instant> = None;
            for (step, millis) in steps {
                now += Duration::from_millis(millis);
                match step {
                    0 | 1 => if let Some(ticket) = breaker.acquire(&settings, now) {
                        if let Some(at) = opened.take() {
                            prop_assert!(now >= at + settings.open_for);
                        }
                        tickets.push(ticket);
                        if let BreakerState::HalfOpen { probes: under_way, .. } = breaker.state() {
                            prop_assert!(under_way <= probes);
                        }
                    },
                    step => if let Some(ticket) = tickets.pop()
                        && breaker.report(ticket, step == 2, &settings, now)
                    {
                        opened = Some(now);
                    },
                }
            }
        }
    }
}
