//! What happens in a run: operations drawn from the seed, each with all that it needs, so that any of them can be left
//! out and the others stay what they are.

use std::time::Duration;

use super::{
    apps::{FlowPlan, Request},
    controller::Lie,
    mesh::{ACCOUNTS, Mesh, NODES, Table},
};
use crate::chance::Random;

/// One thing that happens.
#[derive(Clone, Debug)]
pub enum Operation {
    /// Some requests at once.
    Requests(Vec<Request>),
    /// A flow.
    Flow(FlowPlan),
    /// Another policy.
    Policy(Table),
    /// The next step of the authority's rotation.
    Rotate,
    /// The controller goes away for a time.
    ControllerAway(Duration),
    /// The controller says something false.
    Lie(usize, Lie),
    /// A new agent takes the place of a node's.
    HandOver(usize),
    /// A new agent is killed while it takes the place.
    BrokenHandOver(usize, Duration),
    /// A node's agents are killed; another one starts later.
    Kill(usize, Duration),
    /// No packet between two nodes for a time.
    Partition(usize, usize, Duration),
    /// Slower packets between two nodes for a time.
    Slow(usize, usize, Duration, Duration),
    /// Connections between two nodes are lost, one in so many.
    Cut(usize, usize, u64),
    /// A pod's application goes away for a time.
    AppAway(usize, Duration),
    /// A pod's application does not answer its next requests.
    Drops(usize, u32),
    /// Nothing.
    Rest,
}

/// An operation and when it comes, after the one before.
#[derive(Clone, Debug)]
pub struct Step {
    pub after: Duration,
    pub operation: Operation,
}

/// A whole run.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    /// Nothing goes wrong that the mesh does not promise to hide: then every permitted request must succeed.
    pub calm: bool,
    /// One service has a circuit breaker and one a rate limit.
    pub limits: bool,
    pub first: Table,
    pub steps: Vec<Step>,
}

fn table(random: &mut Random) -> Table {
    let mut table = Table::default();
    for cell in table.iter_mut().flatten() {
        *cell = !random.one_in(4);
    }
    table
}

impl Plan {
    /// The plan of a seed.
    pub fn new(seed: u64) -> Plan {
        let mut random = Random::new(seed, "plan");
        let calm = random.one_in(3);
        let limits = !calm && random.one_in(2);
        let mesh = Mesh::new(seed, limits);
        let first = table(&mut random);
        let count = random.between(8, 28);
        let steps = (0..count).map(|_| step(&mut random, &mesh, calm)).collect();
        Plan {
            seed,
            calm,
            limits,
            first,
            steps,
        }
    }
}

fn step(random: &mut Random, mesh: &Mesh, calm: bool) -> Step {
    let longest = if random.one_in(8) { 20_000 } else { 600 };
    Step {
        after: Duration::from_millis(random.below(longest)),
        operation: operation(random, mesh, calm),
    }
}

fn request(random: &mut Random, mesh: &Mesh) -> Request {
    Request {
        from: random.below(mesh.pods.len() as u64) as usize,
        to: random.below(ACCOUNTS.len() as u64) as usize,
        post: random.one_in(2),
        fresh: random.one_in(3),
        body: *random.pick(&[0, 10, 3_000, 100_000]),
        reply: *random.pick(&[0, 20, 5_000, 80_000]),
        think_ms: *random.pick(&[0, 0, 2, 30, 400]),
    }
}

fn operation(random: &mut Random, mesh: &Mesh, calm: bool) -> Operation {
    let pods = mesh.pods.len() as u64;
    let node = |random: &mut Random| random.below(NODES as u64) as usize;
    let time = |random: &mut Random, longest: u64| Duration::from_millis(random.between(10, longest));
    let two = |random: &mut Random| {
        let a = random.below(NODES as u64) as usize;
        (a, (a + 1 + random.below(NODES as u64 - 1) as usize) % NODES)
    };
    let kinds = if calm { 16 } else { 24 };
    match random.below(kinds) {
        0..=5 => {
            let count = if random.one_in(5) {
                random.between(4, 8)
            } else {
                random.between(1, 3)
            };
            let one = request(random, mesh);
            let same = random.one_in(3);
            let next = |_| if same { one } else { request(random, mesh) };
            Operation::Requests((0..count).map(next).collect())
        }
        6..=7 => Operation::Flow(FlowPlan {
            from: random.below(pods) as usize,
            to: random.below(ACCOUNTS.len() as u64) as usize,
            pieces: random.between(0, 8) as usize,
            bytes: *random.pick(&[1, 100, 20_000]),
            pause_ms: *random.pick(&[0, 100, 1_000, 4_000]),
        }),
        8..=10 => Operation::Policy(table(random)),
        11 => Operation::Rotate,
        12 => Operation::HandOver(node(random)),
        13 => Operation::ControllerAway(time(random, 10_000)),
        14 => Operation::Lie(node(random), *random.pick(&Lie::ALL)),
        15 if random.one_in(3) => Operation::Rest,
        15 => {
            let (a, b) = two(random);
            Operation::Slow(a, b, Duration::from_millis(random.below(200)), time(random, 5_000))
        }
        16 | 17 => Operation::Kill(node(random), time(random, 3_000)),
        18 => {
            let (a, b) = two(random);
            Operation::Partition(a, b, time(random, 15_000))
        }
        19 | 20 => {
            let (a, b) = two(random);
            Operation::Cut(a, b, random.between(1, 3))
        }
        21 => Operation::AppAway(random.below(pods) as usize, time(random, 4_000)),
        22 => Operation::Drops(random.below(pods) as usize, random.between(1, 4) as u32),
        _ => Operation::BrokenHandOver(node(random), time(random, 100)),
    }
}
