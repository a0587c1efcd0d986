//! The pool's book-keeping, pure: which tunnels are being opened, are in use, or lie ready, and how many there may be.
//!
//! Keys in, decisions out; the time is an argument and a tunnel is whatever `T` is. `pool` does the I/O. Ready tunnels
//! are taken newest first, so that a quiet hour lets the oldest run into their idle timeout. A tunnel of another
//! credential than the current one is never handed out again.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

use foldhash::fast::RandomState;

/// Bounds of a pool. Each is reached sooner or later; what then happens is said at each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Tunnels of one key, ready or not. Beyond: refused.
    pub per_key_max: usize,
    /// Tunnels of one pool, ready or not. Beyond: the longest idle one makes room, else refused.
    pub total_max: usize,
    /// Ready tunnels of one key. Beyond: the longest idle one is closed.
    pub idle_per_key_max: usize,
    /// How long a tunnel may lie ready.
    pub idle_timeout: Duration,
}

/// A tunnel's facts that decide whether it may be used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts<E> {
    /// The credential that opened it.
    pub epoch: E,
    /// When it is too old to be used again.
    pub retire_at: Instant,
}

struct Ready<T, E> {
    tunnel: T,
    facts: Facts<E>,
    since: Instant,
}

struct Lane<T, E> {
    /// Oldest first.
    ready: Vec<Ready<T, E>>,
    connecting: usize,
    busy: usize,
}

/// What to do for somebody who needs a tunnel.
#[derive(Debug, PartialEq, Eq)]
pub enum Take<T, E> {
    /// Use this one. It counts as busy.
    Reuse(T, Facts<E>),
    /// Open one. It counts as connecting.
    Dial,
    /// There are too many.
    Full,
}

/// How many tunnels there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gauge {
    /// Being opened.
    pub connecting: usize,
    /// In use.
    pub busy: usize,
    /// Waiting for use.
    pub ready: usize,
}

impl Gauge {
    fn total(self) -> usize {
        self.connecting + self.busy + self.ready
    }
}

/// The book.
pub struct Slots<K, T, E> {
    bounds: Bounds,
    // Keys are the view's own names: nobody outside chooses them, so the hash need not be a keyed one.
    lanes: HashMap<K, Lane<T, E>, RandomState>,
    gauge: Gauge,
    draining: bool,
}

impl<K: Clone + Eq + Hash, T, E: Copy + Eq> Slots<K, T, E> {
    /// An empty book.
    pub fn new(bounds: Bounds) -> Slots<K, T, E> {
        Slots {
            bounds,
            lanes: HashMap::default(),
            gauge: Gauge::default(),
            draining: false,
        }
    }

    /// How many there are.
    pub fn gauge(&self) -> Gauge {
        self.gauge
    }

    /// Asks for a tunnel for `key`: a ready one that credential `reuse` opened, or in any case a new one if that is
    /// `None`. Tunnels that may not be used again land in `closed`.
    pub fn take(&mut self, key: &K, reuse: Option<E>, now: Instant, closed: &mut Vec<T>) -> Take<T, E> {
        if let Some(lane) = self.lanes.get_mut(key) {
            while let Some(epoch) = reuse
                && let Some(ready) = lane.ready.pop()
            {
                self.gauge.ready -= 1;
                if is_usable(&ready, epoch, now, self.bounds.idle_timeout) {
                    lane.busy += 1;
                    self.gauge.busy += 1;
                    return Take::Reuse(ready.tunnel, ready.facts);
                }
                closed.push(ready.tunnel);
            }
            if lane.connecting + lane.busy >= self.bounds.per_key_max {
                return Take::Full;
            }
            if lane.connecting + lane.busy + lane.ready.len() >= self.bounds.per_key_max {
                self.gauge.ready -= 1;
                closed.push(lane.ready.remove(0).tunnel);
            }
        }
        if self.gauge.total() >= self.bounds.total_max {
            match self.evict_longest_idle() {
                Some(tunnel) => closed.push(tunnel),
                None => {
                    self.forget_if_empty(key);
                    return Take::Full;
                }
            }
        }
        self.lanes.entry(key.clone()).or_insert_with(Lane::new).connecting += 1;
        self.gauge.connecting += 1;
        Take::Dial
    }

    /// A tunnel that was being opened is open, and in use.
    pub fn opened(&mut self, key: &K) {
        if let Some(lane) = self.lanes.get_mut(key)
            && lane.connecting > 0
        {
            lane.connecting -= 1;
            lane.busy += 1;
            self.gauge.connecting -= 1;
            self.gauge.busy += 1;
        }
    }

    /// A tunnel could not be opened, or its opening was given up.
    pub fn failed(&mut self, key: &K) {
        if let Some(lane) = self.lanes.get_mut(key)
            && lane.connecting > 0
        {
            lane.connecting -= 1;
            self.gauge.connecting -= 1;
        }
        self.forget_if_empty(key);
    }

    /// A tunnel in use was closed.
    pub fn closed(&mut self, key: &K) {
        if let Some(lane) = self.lanes.get_mut(key)
            && lane.busy > 0
        {
            lane.busy -= 1;
            self.gauge.busy -= 1;
        }
        self.forget_if_empty(key);
    }

    /// A tunnel in use is free again. Returns one that is to be closed: this one if it may not be used again, or the
    /// longest idle one of a full lane.
    pub fn give_back(&mut self, key: &K, tunnel: T, facts: Facts<E>, now: Instant) -> Option<T> {
        let keep = !self.draining && now < facts.retire_at && self.bounds.idle_per_key_max > 0;
        let Some(lane) = self.lanes.get_mut(key) else {
            return Some(tunnel);
        };
        if lane.busy > 0 {
            lane.busy -= 1;
            self.gauge.busy -= 1;
        }
        if !keep {
            self.forget_if_empty(key);
            return Some(tunnel);
        }
        lane.ready.push(Ready {
            tunnel,
            facts,
            since: now,
        });
        self.gauge.ready += 1;
        if lane.ready.len() > self.bounds.idle_per_key_max {
            self.gauge.ready -= 1;
            return Some(lane.ready.remove(0).tunnel);
        }
        None
    }

    /// Closes what may not be used again: idle too long, too old, of another credential than `epoch_of` says, or not
    /// `is_good` any more.
    pub fn sweep(
        &mut self,
        now: Instant,
        epoch_of: impl Fn(&K) -> Option<E>,
        mut is_good: impl FnMut(&mut T) -> bool,
        closed: &mut Vec<T>,
    ) {
        let idle_timeout = self.bounds.idle_timeout;
        for (key, lane) in &mut self.lanes {
            if lane.ready.is_empty() {
                continue;
            }
            let epoch = epoch_of(key);
            let bad = lane.ready.extract_if(.., |ready| {
                let usable = epoch.is_some_and(|epoch| is_usable(ready, epoch, now, idle_timeout));
                !usable || !is_good(&mut ready.tunnel)
            });
            let before = closed.len();
            closed.extend(bad.map(|ready| ready.tunnel));
            self.gauge.ready -= closed.len() - before;
        }
        self.lanes.retain(|_, lane| !lane.is_empty());
    }

    /// Keeps nothing from now on and returns every ready tunnel for closing. Who still has a request is still served.
    pub fn drain(&mut self) -> Vec<T> {
        self.draining = true;
        self.let_go()
    }

    /// Returns every ready tunnel for closing.
    pub fn let_go(&mut self) -> Vec<T> {
        let mut closed = Vec::new();
        for lane in self.lanes.values_mut() {
            closed.extend(lane.ready.drain(..).map(|ready| ready.tunnel));
        }
        self.gauge.ready = 0;
        self.lanes.retain(|_, lane| !lane.is_empty());
        closed
    }

    fn evict_longest_idle(&mut self) -> Option<T> {
        // Rare, and the number of lanes is bounded by `total_max`.
        let key = self
            .lanes
            .iter()
            .filter_map(|(key, lane)| Some((lane.ready.first()?.since, key)))
            .min_by_key(|(since, _)| *since)
            .map(|(_, key)| key.clone())?;
        let tunnel = self.lanes.get_mut(&key)?.ready.remove(0).tunnel;
        self.gauge.ready -= 1;
        self.forget_if_empty(&key);
        Some(tunnel)
    }

    fn forget_if_empty(&mut self, key: &K) {
        if self.lanes.get(key).is_some_and(Lane::is_empty) {
            self.lanes.remove(key);
        }
    }
}

impl<T, E> Lane<T, E> {
    fn new() -> Lane<T, E> {
        Lane {
            ready: Vec::new(),
            connecting: 0,
            busy: 0,
        }
    }
    fn is_empty(&self) -> bool {
        self.ready.is_empty() && self.connecting == 0 && self.busy == 0
    }
}

fn is_usable<T, E: Eq>(ready: &Ready<T, E>, epoch: E, now: Instant, idle_timeout: Duration) -> bool {
    ready.facts.epoch == epoch && now < ready.facts.retire_at && now < ready.since + idle_timeout
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOUNDS: Bounds = Bounds {
        per_key_max: 3,
        total_max: 5,
        idle_per_key_max: 2,
        idle_timeout: Duration::from_secs(10),
    };

    type Book = Slots<u8, u32, u8>;

    fn facts(epoch: u8, retire_at: Instant) -> Facts<u8> {
        Facts { epoch, retire_at }
    }

    #[test]
    fn a_free_tunnel_is_reused_newest_first() {
        let (now, mut book, mut closed) = (Instant::now(), Book::new(BOUNDS), Vec::new());
        let late = now + Duration::from_secs(100);
        for tunnel in [1, 2] {
            assert_eq!(book.take(&0, Some(1), now, &mut closed), Take::Dial);
            book.opened(&0);
            assert_eq!(book.gauge().busy, tunnel);
        }
        assert_eq!(book.give_back(&0, 10, facts(1, late), now), None);
        assert_eq!(
            book.give_back(&0, 11, facts(1, late), now + Duration::from_secs(1)),
            None
        );
        assert_eq!(
            book.take(&0, Some(1), now, &mut closed),
            Take::Reuse(11, facts(1, late))
        );
        assert_eq!(
            book.take(&1, Some(1), now, &mut closed),
            Take::Dial,
            "another key has nothing ready"
        );
        assert!(closed.is_empty());
    }

    #[test]
    fn what_may_not_be_used_again_is_closed() {
        let now = Instant::now();
        let late = now + Duration::from_secs(100);
        let cases = [
            ("still good", 1, late, 5, false),
            ("idle too long", 1, late, 10, true),
            ("another credential", 2, late, 5, true),
            ("too old", 1, now + Duration::from_secs(4), 5, true),
        ];
        for (name, epoch, retire_at, seconds, is_closed) in cases {
            let (mut book, mut closed) = (Book::new(BOUNDS), Vec::new());
            assert_eq!(book.take(&0, Some(epoch), now, &mut closed), Take::Dial);
            book.opened(&0);
            assert_eq!(book.give_back(&0, 7, facts(epoch, retire_at), now), None);
            let then = now + Duration::from_secs(seconds);
            let expected = if is_closed {
                Take::Dial
            } else {
                Take::Reuse(7, facts(1, late))
            };
            assert_eq!(book.take(&0, Some(1), then, &mut closed), expected, "{name}");
            assert_eq!(closed, if is_closed { vec![7] } else { vec![] }, "{name}");
        }
    }

    #[test]
    fn bounds_hold() {
        let (now, mut book, mut closed) = (Instant::now(), Book::new(BOUNDS), Vec::new());
        let late = now + Duration::from_secs(100);
        for _ in 0..3 {
            assert_eq!(book.take(&0, Some(1), now, &mut closed), Take::Dial);
            book.opened(&0);
        }
        assert_eq!(book.take(&0, Some(1), now, &mut closed), Take::Full, "per key");
        for _ in 0..2 {
            assert_eq!(book.take(&1, Some(1), now, &mut closed), Take::Dial);
        }
        assert_eq!(book.take(&2, Some(1), now, &mut closed), Take::Full, "in total");
        assert_eq!(book.give_back(&0, 1, facts(1, late), now), None);
        assert_eq!(book.give_back(&0, 2, facts(1, late), now), None);
        assert_eq!(
            book.give_back(&0, 3, facts(1, late), now),
            Some(1),
            "the longest idle of a full lane goes"
        );
        book.failed(&1);
        book.failed(&1);
        for _ in 0..3 {
            assert_eq!(book.take(&2, Some(1), now, &mut closed), Take::Dial);
        }
        assert!(closed.is_empty());
        assert_eq!(book.take(&1, Some(1), now, &mut closed), Take::Dial);
        assert_eq!(closed, [2], "the longest idle makes room");
        book.failed(&2);
        assert_eq!(
            book.take(&0, None, now, &mut closed),
            Take::Dial,
            "a new one although one is ready"
        );
        assert_eq!(book.drain(), [3]);
        book.opened(&0);
        assert_eq!(
            book.give_back(&0, 4, facts(1, late), now),
            Some(4),
            "nothing is kept while draining"
        );
    }

    #[test]
    fn a_sweep_closes_dead_idle_and_unknown() {
        let (now, mut book, mut closed) = (Instant::now(), Book::new(BOUNDS), Vec::new());
        let late = now + Duration::from_secs(100);
        for (key, tunnel) in [(0, 1), (0, 2), (1, 3), (2, 4)] {
            assert_eq!(book.take(&key, Some(1), now, &mut closed), Take::Dial);
            book.opened(&key);
            if tunnel != 1 {
                assert_eq!(book.give_back(&key, tunnel, facts(1, late), now), None);
            }
        }
        book.give_back(&0, 1, facts(1, late), now);
        book.sweep(now, |key| (*key != 2).then_some(1), |tunnel| *tunnel != 3, &mut closed);
        closed.sort();
        assert_eq!(closed, [3, 4], "dead; and of an identity without credential");
        assert_eq!(
            book.gauge(),
            Gauge {
                ready: book.gauge().ready,
                ..Gauge::default()
            }
        );
    }

    #[derive(Clone, Debug)]
    enum Step {
        Take(u8, u8),
        Opened(u8),
        Failed(u8),
        Closed(u8),
        Back(u8, u8),
        Sweep(u8),
        Wait(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        let key = 0u8..3;
        prop_oneof![
            4 => (key.clone(), 0u8..2).prop_map(|(key, epoch)| Step::Take(key, epoch)),
            3 => key.clone().prop_map(Step::Opened),
            1 => key.clone().prop_map(Step::Failed),
            1 => key.clone().prop_map(Step::Closed),
            3 => (key, 0u8..2).prop_map(|(key, epoch)| Step::Back(key, epoch)),
            1 => (0u8..2).prop_map(Step::Sweep),
            1 => (0u8..12).prop_map(Step::Wait),
        ]
    }

    proptest! {
        /// Whatever happens: the gauges equal a plain count, bounds hold, and no tunnel is lost or handed out twice.
        #[test]
        fn the_book_balances(steps in prop::collection::vec(step(), 0..120)) {
            let (mut now, mut book) = (Instant::now(), Book::new(BOUNDS));
            let (mut connecting, mut busy) = ([0usize; 3], [const { Vec::<u32>::new() }; 3]);
            let (mut next, mut ready) = (0u32, std::collections::HashSet::new());
            for step in steps {
                let mut closed = Vec::new();
                match step {
                    Step::Take(key, epoch) => match book.take(&key, Some(epoch), now, &mut closed) {
                        Take::Reuse(tunnel, facts) => {
                            prop_assert!(ready.remove(&tunnel), "handed out twice");
                            prop_assert_eq!(facts.epoch, epoch);
                            busy[key as usize].push(tunnel);
                        }
                        Take::Dial => connecting[key as usize] += 1,
                        Take::Full => {}
                    },
                    Step::Opened(key) if connecting[key as usize] > 0 => {
                        book.opened(&key);
                        connecting[key as usize] -= 1;
                        busy[key as usize].push(next);
                        next += 1;
                    }
                    Step::Failed(key) if connecting[key as usize] > 0 => {
                        book.failed(&key);
                        connecting[key as usize] -= 1;
                    }
                    Step::Closed(key) if !busy[key as usize].is_empty() => {
                        busy[key as usize].pop();
                        book.closed(&key);
                    }
                    Step::Back(key, epoch) => if let Some(tunnel) = busy[key as usize].pop() {
                        ready.insert(tunnel);
                        let facts = Facts { epoch, retire_at: now + Duration::from_secs(20) };
                        closed.extend(book.give_back(&key, tunnel, facts, now));
                    },
                    Step::Sweep(epoch) => book.sweep(now, |_| Some(epoch), |_| true, &mut closed),
                    Step::Wait(seconds) => now += Duration::from_secs(seconds.into()),
                    _ => {}
                }
                for tunnel in closed {
                    prop_assert!(ready.remove(&tunnel), "closed what was not ready");
                }
                let gauge = book.gauge();
                prop_assert_eq!(gauge.ready, ready.len());
                prop_assert_eq!(gauge.busy, busy.iter().map(Vec::len).sum::<usize>());
                prop_assert_eq!(gauge.connecting, connecting.iter().sum::<usize>());
                prop_assert!(gauge.total() <= BOUNDS.total_max);
                for key in 0..3 {
                    prop_assert!(connecting[key] + busy[key].len() <= BOUNDS.per_key_max);
                }
            }
        }
    }
}
