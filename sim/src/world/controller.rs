//! The simulated controller: revisions with their truth, and a stream for each node that is slow, breaks, repeats itself
//! and lies.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    rc::Rc,
    time::Duration,
};

use mesh_api::{
    document::{Resource, ResourceKey},
    identity::TrustDomain,
    wire::{TrustRoots, Update},
    workload::Revision,
};
use real_tokio::sync::{Notify, mpsc};

use super::{
    authority::Authority,
    mesh::{Mesh, Table, domain},
};
use crate::chance::Random;

/// What a revision says.
pub struct Truth {
    pub table: Table,
    pub resources: BTreeMap<ResourceKey, Resource>,
    pub roots: TrustRoots,
}

/// What comes to an agent over its stream.
pub enum Message {
    Update(Update),
    Garbled { revision: Revision, reason: String },
    Replaced,
}

/// What a controller that is not well may say.
#[derive(Clone, Copy, Debug)]
pub enum Lie {
    /// A revision from before, as a snapshot.
    Older,
    /// The same again.
    Again,
    /// For another mesh.
    OtherMesh,
    /// Nobody to be trusted.
    NoRoots,
    /// A delta from a revision that was never held.
    Gap,
    /// A delta that goes back.
    Backward,
    /// One name twice.
    Twice,
    /// Bytes.
    Garbage,
}

impl Lie {
    pub const ALL: [Lie; 8] = [
        Lie::Older,
        Lie::Again,
        Lie::OtherMesh,
        Lie::NoRoots,
        Lie::Gap,
        Lie::Backward,
        Lie::Twice,
        Lie::Garbage,
    ];
}

struct Stream {
    id: u64,
    sender: mpsc::Sender<Message>,
    told: Rc<Cell<u64>>,
}

/// The controller.
pub struct Controller {
    pub authority: Authority,
    pub truths: RefCell<BTreeMap<u64, Truth>>,
    pub down: Cell<bool>,
    streams: RefCell<BTreeMap<usize, Stream>>,
    changed: Notify,
    ids: Cell<u64>,
    dice: RefCell<Random>,
}

impl Controller {
    pub fn new(seed: u64, mesh: &Mesh, table: &Table) -> Controller {
        let controller = Controller {
            authority: Authority::default(),
            truths: RefCell::default(),
            down: Cell::new(false),
            streams: RefCell::default(),
            changed: Notify::new(),
            ids: Cell::new(0),
            dice: RefCell::new(Random::new(seed, "controller")),
        };
        controller.publish(mesh, table);
        controller
    }

    pub fn latest(&self) -> u64 {
        self.truths.borrow().keys().next_back().copied().unwrap_or(0)
    }

    pub fn table(&self) -> Table {
        let truths = self.truths.borrow();
        truths
            .values()
            .next_back()
            .map(|truth| truth.table)
            .expect("a revision")
    }

    /// Makes the next revision.
    pub fn publish(&self, mesh: &Mesh, table: &Table) -> u64 {
        let resources = mesh.resources(table);
        let truth = Truth {
            table: *table,
            resources: resources
                .into_iter()
                .map(|resource| (resource.key(), resource))
                .collect(),
            roots: self.authority.roots(),
        };
        let next = self.latest() + 1 + self.dice.borrow_mut().below(3);
        self.truths.borrow_mut().insert(next, truth);
        self.changed.notify_waiters();
        next
    }

    /// Ends all streams; nobody is let in until it is up again.
    pub fn set_down(&self, down: bool) {
        self.down.set(down);
        if down {
            self.streams.borrow_mut().clear();
            self.changed.notify_waiters();
        }
    }

    pub fn pause(&self, most_ms: u64) -> Duration {
        Duration::from_millis(self.dice.borrow_mut().below(most_ms))
    }

    pub fn one_in(&self, n: u64) -> bool {
        self.dice.borrow_mut().one_in(n)
    }

    /// Opens a node's stream; one that it had before is told so and ends.
    pub async fn connect(self: &Rc<Self>, node: usize, resume: Revision) -> Result<mpsc::Receiver<Message>, String> {
        let pause = self.pause(30);
        real_tokio::time::sleep(pause).await;
        if self.down.get() {
            return Err("the controller is away".to_owned());
        }
        let (sender, receiver) = mpsc::channel(64);
        self.ids.set(self.ids.get() + 1);
        let id = self.ids.get();
        let known = self.truths.borrow().contains_key(&resume.0);
        let told = Rc::new(Cell::new(if known { resume.0 } else { 0 }));
        let stream = Stream {
            id,
            sender: sender.clone(),
            told: told.clone(),
        };
        if let Some(before) = self.streams.borrow_mut().insert(node, stream) {
            let _ = before.sender.try_send(Message::Replaced);
        }
        real_tokio::task::spawn_local(self.clone().tell(node, id, sender, told));
        Ok(receiver)
    }

    async fn tell(self: Rc<Self>, node: usize, id: u64, sender: mpsc::Sender<Message>, told: Rc<Cell<u64>>) {
        loop {
            let changed = self.changed.notified();
            let pause = self.pause(50);
            real_tokio::time::sleep(pause).await;
            if self.streams.borrow().get(&node).is_none_or(|stream| stream.id != id) {
                return;
            }
            let latest = self.latest();
            if told.get() >= latest {
                changed.await;
                continue;
            }
            let update = match told.get() {
                0 => self.snapshot(latest),
                from if self.one_in(4) => {
                    told.set(from);
                    self.snapshot(latest)
                }
                from => self.delta(from, latest),
            };
            told.set(latest);
            if sender.try_send(Message::Update(update)).is_err() {
                return;
            }
        }
    }

    fn snapshot(&self, revision: u64) -> Update {
        let truths = self.truths.borrow();
        let truth = &truths[&revision];
        Update::Snapshot {
            stamp: 0,
            revision: Revision(revision),
            trust_domain: domain(),
            resources: truth.resources.values().cloned().collect(),
            trust_roots: truth.roots.clone(),
        }
    }

    fn delta(&self, from: u64, to: u64) -> Update {
        let truths = self.truths.borrow();
        let (old, new) = (&truths[&from], &truths[&to]);
        let differs = |(key, resource): &(&ResourceKey, &Resource)| old.resources.get(*key) != Some(*resource);
        let gone = |key: &&ResourceKey| !new.resources.contains_key(*key);
        Update::Delta {
            stamp: 0,
            from: Revision(from),
            to: Revision(to),
            upserts: new
                .resources
                .iter()
                .filter(differs)
                .map(|(_, resource)| resource.clone())
                .collect(),
            removed: old.resources.keys().filter(gone).cloned().collect(),
            trust_roots: (old.roots != new.roots).then(|| new.roots.clone()),
        }
    }

    /// Says something that is not so to a node, if it listens.
    pub fn lie(&self, node: usize, lie: Lie) {
        let streams = self.streams.borrow();
        let Some(stream) = streams.get(&node) else { return };
        let latest = self.latest();
        let oldest = self.truths.borrow().keys().next().copied().unwrap_or(1);
        let told = stream.told.get();
        if told == 0 {
            return;
        }
        let update = match (lie, self.snapshot(latest)) {
            (Lie::Older, _) if oldest < told => self.snapshot(oldest),
            (Lie::Older | Lie::Again, _) => self.snapshot(told),
            (
                Lie::OtherMesh,
                Update::Snapshot {
                    revision,
                    resources,
                    trust_roots,
                    ..
                },
            ) => Update::Snapshot {
                stamp: 0,
                revision: Revision(revision.0 + 1000),
                trust_domain: TrustDomain::new("other.mesh").expect("a trust domain"),
                resources,
                trust_roots,
            },
            (
                Lie::NoRoots,
                Update::Snapshot {
                    revision,
                    trust_domain,
                    resources,
                    ..
                },
            ) => Update::Snapshot {
                stamp: 0,
                revision: Revision(revision.0 + 1000),
                trust_domain,
                resources,
                trust_roots: TrustRoots(Vec::new()),
            },
            (
                Lie::Twice,
                Update::Snapshot {
                    revision,
                    trust_domain,
                    mut resources,
                    trust_roots,
                    ..
                },
            ) => {
                resources.extend(resources.first().cloned());
                Update::Snapshot {
                    stamp: 0,
                    revision: Revision(revision.0 + 1000),
                    trust_domain,
                    resources,
                    trust_roots,
                }
            }
            (lie @ (Lie::Gap | Lie::Backward), _) => Update::Delta {
                stamp: 0,
                from: Revision(if matches!(lie, Lie::Gap) { told + 500 } else { told }),
                to: Revision(if matches!(lie, Lie::Gap) {
                    told + 501
                } else {
                    told.saturating_sub(1)
                }),
                upserts: Vec::new(),
                // What guards would be gone.
                removed: self.truths.borrow()[&latest].resources.keys().cloned().collect(),
                trust_roots: None,
            },
            (_, _) => {
                let garbled = Message::Garbled {
                    revision: Revision(latest + 1000),
                    reason: "not a message".to_owned(),
                };
                let _ = stream.sender.try_send(garbled);
                return;
            }
        };
        let _ = stream.sender.try_send(Message::Update(update));
    }
}
