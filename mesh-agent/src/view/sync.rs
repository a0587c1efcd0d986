//! The controller's stream as a state machine: state and input in, state and actions out. No socket, no clock.
//!
//! `session` around it does what the actions say and nothing else. Whatever comes over the stream, the agent never
//! holds less than it held: an update that is malformed, out of order, of an older revision or of another trust domain
//! is nacked with the reason, and the last good view stays. A lost stream changes nothing but the time of the next
//! attempt.

use std::{sync::Arc, time::Duration};

use mesh_api::{
    document::{Resource, ResourceKey},
    identity::TrustDomain,
    shared_map::SharedMap,
    wire::{Report, TrustRoots, Update},
    workload::Revision,
};

use crate::event::Event;

/// The wait after a first failure; it doubles with each one more.
pub const RETRY_FIRST: Duration = Duration::from_millis(250);

/// The wait after another generation of this node's agent has taken the stream. Two of them must not take it from each
/// other without end; meanwhile each learns from the disk what the other one was told.
pub const REPLACED_WAIT: Duration = Duration::from_secs(5);

/// One revision as it came: what the view is compiled from and the snapshot on disk is written from.
#[derive(Clone, Debug, PartialEq)]
pub struct Held {
    /// The revision.
    pub revision: Revision,
    /// What tells it from another revision of the same number; 0: unknown.
    pub stamp: u64,
    /// The trust domain that it was made for.
    pub trust_domain: TrustDomain,
    /// The resources by name. What did not change is shared with the revision before.
    pub resources: SharedMap<ResourceKey, Resource>,
    /// The roots that are trusted.
    pub roots: TrustRoots,
}

/// What the agent says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// The node's name.
    pub node: String,
    /// The trust domain that it was configured for.
    pub trust_domain: TrustDomain,
    /// The agent's version.
    pub version: &'static str,
    /// The ABI of its kernel programs.
    pub abi_version: u32,
}

/// How far the connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// There is none, and none is being made.
    Waiting,
    /// It is being made.
    Connecting,
    /// The stream is open. `useful`: an update was taken on it, so that failures count anew.
    Streaming {
        /// See above.
        useful: bool,
    },
}

/// All that the machine remembers.
#[derive(Clone, Debug)]
pub struct State {
    greeting: Greeting,
    held: Option<Arc<Held>>,
    phase: Phase,
    failures: u32,
    retry_max: Duration,
    /// The last status told on this stream; told again on the next one.
    status: Option<Report>,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// The time to connect has come: at the start, and when a wait is over.
    Due,
    /// The stream is open.
    Connected {
        /// Whither.
        address: String,
    },
    /// The stream could not be opened, or ended.
    Lost {
        /// Why.
        reason: String,
    },
    /// An update came.
    Update(Box<Update>),
    /// The controller ended the stream because this node has connected again: another generation of the agent runs.
    Replaced {
        /// What it said.
        reason: String,
    },
    /// While there is no stream: another generation has saved this.
    Found(Arc<Held>),
    /// Another generation serves now: let go of the stream, and make none.
    StandBack,
    /// Something came that is no update.
    Garbled {
        /// The revision that it names; 0 if none.
        revision: Revision,
        /// What is wrong with it.
        reason: String,
    },
    /// Pods or certificates have changed.
    Status(Report),
    /// The node's certificate was renewed: the connection must be made anew to show it.
    Renewed,
}

/// What is to be done, in this order.
#[derive(Clone, Debug)]
pub enum Action {
    /// Open the stream; this is its first message. [`Input::Connected`] or [`Input::Lost`] follows.
    Connect(Report),
    /// Let go of the stream.
    Disconnect,
    /// Send on the stream.
    Send(Report),
    /// Compile and publish.
    Publish(Arc<Held>),
    /// Trust these roots from now on.
    Trust(TrustRoots),
    /// Write to disk.
    Save(Arc<Held>),
    /// Give [`Input::Due`] after this time.
    Wait(Duration),
    /// Tell.
    Tell(Event),
}

/// Why an update is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UpdateRefused {
    /// Revisions only grow.
    #[error("revision {offered} is older than {held}, which is held")]
    Older {
        /// The one that came.
        offered: Revision,
        /// The one that is held.
        held: Revision,
    },
    /// One number, two revisions: the controller's store is older than what is held, and has gone on by itself.
    #[error("another revision {offered} is held: was the controller's store restored? The next revision is taken")]
    Other {
        /// The one that came.
        offered: Revision,
    },
    /// A delta that leads nowhere.
    #[error("a delta from {from} to {to} does not go forward")]
    Backward {
        /// Whence.
        from: Revision,
        /// Whither.
        to: Revision,
    },
    /// A delta from a revision that is not held.
    #[error("a delta from {from}, but {held} is held")]
    Gap {
        /// Whence.
        from: Revision,
        /// What is held; 0 is nothing.
        held: Revision,
    },
    /// Revision 0 means "none".
    #[error("revision 0 is none")]
    Zero,
    /// Another mesh.
    #[error("for trust domain {0}, not ours")]
    TrustDomain(TrustDomain),
    /// Without a root nobody could be believed.
    #[error("without a trusted root")]
    NoRoots,
    /// One name twice: which of the two was meant?
    #[error("{0} resources of the same name")]
    Duplicate(usize),
}

impl State {
    /// The state at the start of the agent, with what was found on disk.
    pub fn new(greeting: Greeting, held: Option<Arc<Held>>, retry_max: Duration) -> State {
        State {
            greeting,
            held,
            phase: Phase::Waiting,
            failures: 0,
            retry_max,
            status: None,
        }
    }

    /// What is held.
    pub fn held(&self) -> Option<&Arc<Held>> {
        self.held.as_ref()
    }

    /// How far the connection is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    fn revision(&self) -> Revision {
        self.held.as_ref().map_or(Revision(0), |held| held.revision)
    }

    fn stamp(&self) -> u64 {
        self.held.as_ref().map_or(0, |held| held.stamp)
    }

    fn hello(&self) -> Report {
        Report::Hello {
            node: self.greeting.node.clone(),
            agent_version: self.greeting.version.to_owned(),
            resume: self.revision(),
            stamp: self.stamp(),
            abi_version: self.greeting.abi_version,
        }
    }

    /// The next backoff: doubled per failure, and of that between half and the whole.
    fn backoff(&self, random: f64) -> Duration {
        let doubled = RETRY_FIRST
            .saturating_mul(1 << self.failures.min(16))
            .min(self.retry_max);
        doubled.mul_f64(0.5 + 0.5 * random.clamp(0.0, 1.0))
    }

    /// What would be held after the update, or why it is refused.
    fn judge(&self, update: Update) -> Result<Held, UpdateRefused> {
        let held = self.revision();
        match update {
            Update::Snapshot {
                revision,
                stamp,
                trust_domain,
                resources,
                trust_roots,
            } => {
                if revision == Revision(0) {
                    return Err(UpdateRefused::Zero);
                }
                if revision == held && stamp != 0 && self.stamp() != 0 && stamp != self.stamp() {
                    return Err(UpdateRefused::Other { offered: revision });
                }
                if revision < held {
                    return Err(UpdateRefused::Older {
                        offered: revision,
                        held,
                    });
                }
                if trust_domain != self.greeting.trust_domain {
                    return Err(UpdateRefused::TrustDomain(trust_domain));
                }
                if trust_roots.0.is_empty() {
                    return Err(UpdateRefused::NoRoots);
                }
                let count = resources.len();
                let resources: SharedMap<_, _> = resources.into_iter().map(|r| (r.key(), r)).collect();
                if resources.len() != count {
                    return Err(UpdateRefused::Duplicate(count - resources.len()));
                }
                // What is told again stays the same to all that is made from it.
                let resources = match &self.held {
                    Some(held) => held.resources.become_like(&resources),
                    None => resources,
                };
                Ok(Held {
                    revision,
                    stamp,
                    trust_domain,
                    resources,
                    roots: trust_roots,
                })
            }
            Update::Delta {
                from,
                to,
                stamp,
                upserts,
                removed,
                trust_roots,
            } => {
                let Some(base) = self.held.as_ref().filter(|base| base.revision == from) else {
                    return Err(UpdateRefused::Gap { from, held });
                };
                if to <= from {
                    return Err(UpdateRefused::Backward { from, to });
                }
                if trust_roots.as_ref().is_some_and(|roots| roots.0.is_empty()) {
                    return Err(UpdateRefused::NoRoots);
                }
                let mut next = Held::clone(base);
                for key in &removed {
                    next.resources.remove(key);
                }
                let count = upserts.len();
                let upserts: SharedMap<_, _> = upserts.into_iter().map(|r| (r.key(), r)).collect();
                if upserts.len() != count {
                    return Err(UpdateRefused::Duplicate(count - upserts.len()));
                }
                next.resources
                    .extend(upserts.iter().map(|(key, resource)| (key.clone(), resource.clone())));
                next.revision = to;
                next.stamp = stamp;
                if let Some(roots) = trust_roots {
                    next.roots = roots;
                }
                Ok(next)
            }
        }
    }
}

/// One step. `random` (0..=1) spreads the attempts of many agents.
pub fn step(mut state: State, input: Input, random: f64) -> (State, Vec<Action>) {
    let actions = match (state.phase, input) {
        (Phase::Waiting, Input::Due) => {
            state.phase = Phase::Connecting;
            vec![Action::Connect(state.hello())]
        }
        // A wait that ended after a renewal already connected.
        (_, Input::Due) => Vec::new(),

        (Phase::Connecting, Input::Connected { address }) => {
            state.phase = Phase::Streaming { useful: false };
            let mut actions = vec![Action::Tell(Event::ControllerConnected { address })];
            actions.extend(state.status.clone().map(Action::Send));
            actions
        }
        // Nobody asked for it: a stream that nothing is expected from is let go.
        (_, Input::Connected { .. }) => vec![Action::Disconnect],

        (Phase::Waiting, Input::Lost { .. }) => Vec::new(),
        (phase, Input::Lost { reason }) => {
            if phase == (Phase::Streaming { useful: true }) {
                state.failures = 0;
            }
            let retry_in = state.backoff(random);
            state.failures = state.failures.saturating_add(1);
            state.phase = Phase::Waiting;
            vec![
                Action::Disconnect,
                Action::Tell(Event::ControllerLost { reason, retry_in }),
                Action::Wait(retry_in),
            ]
        }

        (Phase::Waiting, Input::Replaced { .. }) => Vec::new(),
        (_, Input::Replaced { reason }) => {
            state.phase = Phase::Waiting;
            let retry_in = REPLACED_WAIT;
            vec![
                Action::Disconnect,
                Action::Tell(Event::ControllerLost { reason, retry_in }),
                Action::Wait(retry_in),
            ]
        }
        (_, Input::StandBack) => {
            state.phase = Phase::Waiting;
            vec![Action::Disconnect]
        }
        // What the controller says itself comes first.
        (Phase::Streaming { .. }, Input::Found(_)) => Vec::new(),
        (_, Input::Found(found)) => find(&mut state, found),

        (Phase::Streaming { .. }, Input::Update(update)) => take(&mut state, *update),
        (Phase::Streaming { .. }, Input::Garbled { revision, reason }) => nack(revision, reason),
        // The rest of a stream that was let go.
        (_, Input::Update(_) | Input::Garbled { .. }) => Vec::new(),

        (phase, Input::Status(report)) => {
            let tell = matches!(phase, Phase::Streaming { .. }) && state.status.as_ref() != Some(&report);
            state.status = Some(report.clone());
            if tell { vec![Action::Send(report)] } else { Vec::new() }
        }

        (Phase::Streaming { .. }, Input::Renewed) => {
            state.phase = Phase::Connecting;
            vec![Action::Disconnect, Action::Connect(state.hello())]
        }
        (_, Input::Renewed) => Vec::new(),
    };
    (state, actions)
}

/// Takes what another generation has saved, if it is newer.
fn find(state: &mut State, found: Arc<Held>) -> Vec<Action> {
    if found.revision <= state.revision() || found.trust_domain != state.greeting.trust_domain {
        return Vec::new();
    }
    let mut actions = Vec::new();
    if state.held.as_ref().is_none_or(|held| held.roots != found.roots) {
        actions.push(Action::Trust(found.roots.clone()));
    }
    actions.push(Action::Publish(found.clone()));
    actions.push(Action::Tell(Event::SnapshotLoaded {
        revision: found.revision,
    }));
    state.held = Some(found);
    actions
}

fn nack(revision: Revision, reason: String) -> Vec<Action> {
    vec![
        Action::Tell(Event::ViewRefused {
            revision,
            reason: reason.clone(),
        }),
        Action::Send(Report::Nack { revision, reason }),
    ]
}

fn take(state: &mut State, update: Update) -> Vec<Action> {
    let revision = match &update {
        Update::Snapshot { revision, .. } => *revision,
        Update::Delta { to, .. } => *to,
    };
    let next = match state.judge(update) {
        Ok(next) => Arc::new(next),
        Err(refused) => return nack(revision, refused.to_string()),
    };
    state.phase = Phase::Streaming { useful: true };
    let mut actions = Vec::new();
    let same = state.held.as_ref() == Some(&next);
    if !same {
        if state.held.as_ref().is_none_or(|held| held.roots != next.roots) {
            actions.push(Action::Trust(next.roots.clone()));
        }
        actions.push(Action::Publish(next.clone()));
        actions.push(Action::Tell(Event::ViewApplied {
            revision,
            resources: next.resources.len(),
        }));
    }
    actions.push(Action::Send(Report::Ack(revision)));
    if !same {
        actions.push(Action::Save(next.clone()));
        state.held = Some(next);
    }
    actions
}

#[cfg(test)]
mod tests {
    use mesh_api::workload::{ObjectName, Service};

    use super::*;

    fn domain() -> TrustDomain {
        TrustDomain::new("test.mesh").unwrap()
    }

    fn service(name: &str) -> Resource {
        Resource::Service(Arc::new(Service {
            name: ObjectName::new("shop", name),
            addresses: Vec::new(),
            ports: Vec::new(),
            publish_not_ready: false,
            ..Service::default()
        }))
    }

    fn key(name: &str) -> ResourceKey {
        ResourceKey::Service(ObjectName::new("shop", name))
    }

    fn roots(n: u8) -> TrustRoots {
        TrustRoots(vec![vec![n]])
    }

    fn snapshot(revision: u64, names: &[&str]) -> Update {
        Update::Snapshot {
            stamp: 0,
            revision: Revision(revision),
            trust_domain: domain(),
            resources: names.iter().map(|name| service(name)).collect(),
            trust_roots: roots(1),
        }
    }

    fn delta(from: u64, to: u64, upserts: &[&str], removed: &[&str]) -> Update {
        Update::Delta {
            stamp: 0,
            from: Revision(from),
            to: Revision(to),
            upserts: upserts.iter().map(|name| service(name)).collect(),
            removed: removed.iter().map(|name| key(name)).collect(),
            trust_roots: None,
        }
    }

    fn fresh() -> State {
        let greeting = Greeting {
            node: "node-1".into(),
            trust_domain: domain(),
            version: "1",
            abi_version: 1,
        };
        State::new(greeting, None, Duration::from_secs(30))
    }

    fn words(actions: &[Action]) -> Vec<String> {
        actions
            .iter()
            .map(|action| match action {
                Action::Connect(Report::Hello { resume, .. }) => format!("connect {resume}"),
                Action::Connect(_) => "connect without hello".into(),
                Action::Disconnect => "disconnect".into(),
                Action::Send(Report::Ack(revision)) => format!("ack {revision}"),
                Action::Send(Report::Nack { revision, .. }) => format!("nack {revision}"),
                Action::Send(Report::Status { .. }) => "status".into(),
                Action::Send(Report::Hello { .. }) => "hello".into(),
                Action::Publish(held) => format!("publish {}", held.revision),
                Action::Trust(_) => "trust".into(),
                Action::Save(held) => format!("save {}", held.revision),
                Action::Wait(wait) => format!("wait {}ms", wait.as_millis()),
                Action::Tell(event) => format!("tell {}", event.name()),
            })
            .collect()
    }

    fn run(state: State, input: Input) -> (State, Vec<String>) {
        let (state, actions) = step(state, input, 1.0);
        let words = words(&actions);
        (state, words)
    }

    fn update(state: State, update: Update) -> (State, Vec<String>) {
        run(state, Input::Update(Box::new(update)))
    }

    fn streaming(state: State) -> State {
        let (state, _) = run(state, Input::Due);
        let connected = Input::Connected {
            address: "c:15010".into(),
        };
        let (state, words) = run(state, connected);
        assert_eq!(words[0], "tell controller-connected");
        state
    }

    fn names(state: &State) -> Vec<String> {
        let held = state.held().expect("something is held");
        let name = |key: &ResourceKey| match key {
            ResourceKey::Service(name) => name.name.to_string(),
            other => format!("{other:?}"),
        };
        let mut names: Vec<String> = held.resources.keys().map(name).collect();
        names.sort();
        names
    }

    #[test]
    fn another_revision_of_the_held_number_is_refused_and_the_next_one_taken() {
        let stamped = |revision, stamp, names: &[&str]| match snapshot(revision, names) {
            Update::Snapshot {
                revision,
                trust_domain,
                resources,
                trust_roots,
                ..
            } => Update::Snapshot {
                revision,
                stamp,
                trust_domain,
                resources,
                trust_roots,
            },
            other => other,
        };
        let state = streaming(fresh());
        let (state, _) = update(state, stamped(7, 11, &["a"]));
        let (state, words) = update(state, stamped(7, 13, &["b"]));
        assert!(words.iter().any(|word| word.starts_with("nack 7")), "{words:?}");
        assert_eq!(names(&state), ["a"]);
        // The same again is no news, and one whose maker drew no stamp is taken by its number.
        for (stamp, expected) in [(11, "a"), (0, "c")] {
            let (_, words) = update(state.clone(), stamped(7, stamp, &[expected]));
            assert!(words.iter().any(|word| word.starts_with("ack 7")), "{words:?}");
        }
        let (state, _) = update(state, stamped(8, 17, &["b"]));
        assert_eq!(names(&state), ["b"]);
        let (_, words) = run(state, Input::Lost { reason: "gone".into() });
        assert!(!words.is_empty());
    }

    #[test]
    fn snapshot_then_deltas_then_resume() {
        let (state, words) = run(fresh(), Input::Due);
        assert_eq!(words, ["connect 0"]);
        let (state, _) = run(state, Input::Connected { address: "c".into() });
        let (state, words) = update(state, snapshot(3, &["a", "b"]));
        assert_eq!(words, ["trust", "publish 3", "tell view-applied", "ack 3", "save 3"]);
        let (state, words) = update(state, delta(3, 5, &["c"], &["a", "never-there"]));
        assert_eq!(words, ["publish 5", "tell view-applied", "ack 5", "save 5"]);
        assert_eq!(names(&state), ["b", "c"]);
        let (state, words) = run(state, Input::Lost { reason: "reset".into() });
        assert_eq!(words, ["disconnect", "tell controller-lost", "wait 250ms"]);
        let (state, words) = run(state, Input::Due);
        assert_eq!(words, ["connect 5"]);
        assert_eq!(names(&state), ["b", "c"], "a lost stream takes nothing away");
    }

    #[test]
    fn two_generations_do_not_fight_for_the_stream_and_learn_from_the_disk() {
        let held = |revision: u64, names: &[&str]| {
            let (state, _) = update(streaming(fresh()), snapshot(revision, names));
            state.held().cloned().unwrap()
        };
        let (state, _) = update(streaming(fresh()), snapshot(3, &["a"]));
        let (state, words) = run(state, Input::Found(held(9, &["z"])));
        assert!(
            words.is_empty() && names(&state) == ["a"],
            "the controller's own word counts"
        );
        let reason = "the same node has connected again".to_owned();
        let (state, words) = run(state, Input::Replaced { reason });
        assert_eq!(words, ["disconnect", "tell controller-lost", "wait 5000ms"]);
        for (revision, expected) in [(2, vec![]), (3, vec![]), (4, vec!["publish 4", "tell snapshot-loaded"])] {
            let (next, words) = run(state.clone(), Input::Found(held(revision, &["b"])));
            assert_eq!(words, expected, "{revision}");
            assert_eq!(next.revision(), Revision(revision.max(3)));
        }
        let other = Held {
            trust_domain: TrustDomain::new("other").unwrap(),
            ..Held::clone(&held(9, &["b"]))
        };
        assert!(run(state.clone(), Input::Found(Arc::new(other))).1.is_empty());
        let (state, _) = run(state, Input::Found(held(4, &["b"])));
        let (state, words) = run(state, Input::Due);
        assert_eq!(words, ["connect 4"]);
        let (state, _) = run(state, Input::Connected { address: "c".into() });
        let (state, words) = run(state, Input::StandBack);
        assert_eq!(words, ["disconnect"]);
        let (state, words) = run(state, Input::Found(held(5, &["c"])));
        assert_eq!(words, ["publish 5", "tell snapshot-loaded"]);
        assert_eq!(names(&state), ["c"]);
    }

    #[test]
    fn what_cannot_be_right_is_nacked_and_the_last_good_stays() {
        let (state, _) = update(streaming(fresh()), snapshot(7, &["a"]));
        let other_domain = Update::Snapshot {
            stamp: 0,
            revision: Revision(9),
            trust_domain: TrustDomain::new("other").unwrap(),
            resources: Vec::new(),
            trust_roots: roots(1),
        };
        let rootless = Update::Snapshot {
            stamp: 0,
            revision: Revision(9),
            trust_domain: domain(),
            resources: Vec::new(),
            trust_roots: TrustRoots(Vec::new()),
        };
        let rootless_delta = Update::Delta {
            stamp: 0,
            from: Revision(7),
            to: Revision(8),
            upserts: Vec::new(),
            removed: Vec::new(),
            trust_roots: Some(TrustRoots(Vec::new())),
        };
        let cases: Vec<(&str, Update, &str)> = vec![
            ("an older snapshot", snapshot(6, &[]), "nack 6"),
            ("revision 0", snapshot(0, &[]), "nack 0"),
            ("a replayed delta", delta(5, 7, &[], &["a"]), "nack 7"),
            ("a delta over a gap", delta(8, 9, &[], &["a"]), "nack 9"),
            ("a delta back", delta(7, 6, &[], &["a"]), "nack 6"),
            ("a delta to itself", delta(7, 7, &[], &["a"]), "nack 7"),
            ("a name twice", snapshot(9, &["x", "x"]), "nack 9"),
            ("a name twice in a delta", delta(7, 8, &["x", "x"], &["a"]), "nack 8"),
            ("another trust domain", other_domain, "nack 9"),
            ("no roots", rootless, "nack 9"),
            ("no roots in a delta", rootless_delta, "nack 8"),
        ];
        let mut state = state;
        for (what, wrong, word) in cases {
            let (next, words) = update(state, wrong);
            assert_eq!(words, ["tell view-refused", word], "{what}");
            assert_eq!(
                (next.revision(), names(&next)),
                (Revision(7), vec!["a".to_owned()]),
                "{what}"
            );
            state = next;
        }
        let garbled = Input::Garbled {
            revision: Revision(8),
            reason: "an address of 3 bytes".into(),
        };
        let (state, words) = run(state, garbled);
        assert_eq!(words, ["tell view-refused", "nack 8"]);
        let (state, words) = update(state, snapshot(9, &["b"]));
        assert_eq!(
            words,
            ["publish 9", "tell view-applied", "ack 9", "save 9"],
            "the next good one is taken"
        );
        assert_eq!(names(&state), ["b"]);
    }

    #[test]
    fn the_first_delta_without_a_snapshot_is_nacked() {
        let (state, words) = update(streaming(fresh()), delta(0, 1, &["a"], &[]));
        assert_eq!(words, ["tell view-refused", "nack 1"]);
        assert!(state.held().is_none());
    }

    #[test]
    fn duplicates_are_harmless() {
        let (state, _) = update(streaming(fresh()), snapshot(7, &["a"]));
        let (state, words) = update(state, snapshot(7, &["a"]));
        assert_eq!(words, ["ack 7"]);
        let (state, words) = update(state, snapshot(7, &["a", "b"]));
        assert_eq!(words, ["publish 7", "tell view-applied", "ack 7", "save 7"]);
        assert_eq!(names(&state), ["a", "b"]);
    }

    #[test]
    fn new_roots_are_trusted_when_they_change() {
        let (state, _) = update(streaming(fresh()), snapshot(1, &[]));
        let rotated = Update::Delta {
            stamp: 0,
            from: Revision(1),
            to: Revision(2),
            upserts: Vec::new(),
            removed: Vec::new(),
            trust_roots: Some(roots(2)),
        };
        let (state, words) = update(state, rotated);
        assert_eq!(words[0], "trust");
        assert_eq!(state.held().unwrap().roots, roots(2));
    }

    #[test]
    fn failures_back_off_to_a_bound_and_success_counts_anew() {
        let mut state = fresh();
        let mut waits = Vec::new();
        for _ in 0..20 {
            let (next, _) = run(state, Input::Due);
            let (next, words) = run(
                next,
                Input::Lost {
                    reason: "refused".into(),
                },
            );
            waits.push(words[2].clone());
            state = next;
        }
        assert_eq!(waits[..3], ["wait 250ms", "wait 500ms", "wait 1000ms"]);
        assert_eq!(waits[19], "wait 30000ms");
        // A stream that opened but brought nothing does not count as success.
        let (next, words) = run(streaming(state), Input::Lost { reason: "reset".into() });
        assert_eq!(words[2], "wait 30000ms");
        let (next, _) = update(streaming(next), snapshot(1, &[]));
        let (_, words) = run(next, Input::Lost { reason: "reset".into() });
        assert_eq!(words[2], "wait 250ms");
        let (_, low) = step(streaming(fresh()), Input::Lost { reason: String::new() }, 0.0);
        assert!(words_have(&low, "wait 125ms"), "jitter never goes below half");
    }

    fn words_have(actions: &[Action], word: &str) -> bool {
        words(actions).iter().any(|w| w == word)
    }

    #[test]
    fn status_is_told_once_per_change_and_again_on_a_new_stream() {
        let status = |captured| Report::Status {
            pods: vec![mesh_api::wire::PodReport {
                name: ObjectName::new("shop", "a"),
                enrolled: true,
                captured,
                why: String::new(),
            }],
            certificates: Vec::new(),
        };
        let (state, words) = run(fresh(), Input::Status(status(false)));
        assert!(words.is_empty(), "nobody listens yet");
        let (state, _) = run(state, Input::Due);
        let (state, words) = run(state, Input::Connected { address: "c".into() });
        assert_eq!(words, ["tell controller-connected", "status"]);
        let (state, words) = run(state, Input::Status(status(false)));
        assert!(words.is_empty(), "nothing changed");
        let (state, words) = run(state, Input::Status(status(true)));
        assert_eq!(words, ["status"]);
        let (state, words) = run(state, Input::Renewed);
        assert_eq!(words, ["disconnect", "connect 0"]);
        let (_, words) = run(state, Input::Connected { address: "c".into() });
        assert_eq!(words[1], "status");
    }

    #[test]
    fn late_inputs_of_a_stream_that_is_gone_do_nothing() {
        for input in [
            Input::Update(Box::new(snapshot(1, &["a"]))),
            Input::Lost { reason: String::new() },
            Input::Renewed,
            Input::Garbled {
                revision: Revision(1),
                reason: String::new(),
            },
        ] {
            let (state, words) = run(fresh(), input);
            assert!(words.is_empty());
            assert!(state.held().is_none());
        }
    }
}
