//! Direct flows: opaque connections between pods of this node that the kernel lets go without the agent.
//!
//! `mesh_api::view` says which pairs may; here that is written into the kernel's maps, and what was connected so is
//! judged again when policy changes and recorded when it ends. What a view no longer permits is taken away before the
//! view is published, so that nobody is told that a view holds which does not; what it permits anew is added when its
//! pods are captured. All of it belongs to the control thread. Nothing here carries a byte.
//!
//! Generations of the agent share the maps, and the youngest owns the entries. Whoever takes a view and is not the
//! owner says so in the kernel, and no entry is valid there until the owner holds that view too. An owner that gives no
//! sign of life loses all its entries; its connections live on.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use mesh_abi::{
    direct::{self, DIRECT_ENDPOINTS_MAX, DirectEndpoint, DirectFlow, DirectKey, DirectState, GENERATION_NONE, tcp},
    maps::{DIRECT_ENDED_MAX, DIRECT_FLOWS_MAX, DIRECT_MAX},
};
use mesh_api::{
    authz::SourceAttributes,
    rule::RuleId,
    view::{Destination, View},
    workload::{Revision, Service, Workload},
};

use super::judge;
use crate::{
    drain::Drain,
    event::{ConnectionSecurity, Events, Outcome, Protocol, Refusal, Reporter},
    kernel::{
        Kernel, KernelError, NetnsCookie,
        direct::{direct_entry, monotonic_ns},
    },
    pods::{Directory, Pod, SocketName, sever_sockets},
};

const _: () = assert!(mesh_api::view::DIRECT_ENDPOINTS_MAX == DIRECT_ENDPOINTS_MAX);

/// How often the owner gives a sign of life, and tries again what failed.
const BEAT: Duration = Duration::from_secs(1);
const _: () = assert!(3 * (BEAT.as_nanos() as u64) < direct::OWNER_SILENCE_NS);
/// How often the record is looked through after an entry went: a program may have read it just before, and be delayed.
const LOOKS_AFTER: u32 = 10;
/// A flow on record that has no source after this long never got under way.
const UNDER_WAY: Duration = Duration::from_secs(60);
/// Decisions that are remembered after their entries went: flows that they let go may still live.
const PAST_DECISIONS_MAX: usize = 4096;

/// The direct flows of this node.
pub struct Direct {
    node: Arc<str>,
    kernel: Arc<Kernel>,
    pods: Directory,
    events: Arc<Events>,
    drain: Drain,
    me: u64,
    next_decision: Cell<u64>,
    table: RefCell<Table>,
}

/// What is written in the kernel, as far as it is known.
#[derive(Default)]
struct Table {
    generation: u64,
    entries: HashMap<DirectKey, Arc<Decision>>,
    decisions: HashMap<u64, Arc<Decision>>,
    past: VecDeque<u64>,
    /// The kernel has these entries and no others.
    is_clean: bool,
    /// Flows may live that no entry would let go now: they are judged at every view.
    has_strays: bool,
    /// So often the record is still to be looked through at the next occasions.
    looks_due: u32,
    /// When it was last tried to write entries.
    tried: Option<u64>,
    /// Sockets that were ended here, until they are told of.
    severed: HashSet<u64>,
    /// A flow could not be ended: none is let go any more.
    is_powerless: bool,
    is_full: bool,
}

/// Why an entry is there: what the records of its flows say.
#[derive(Debug)]
struct Decision {
    number: u64,
    revision: Revision,
    source: Arc<Workload>,
    service: Option<Arc<Service>>,
    endpoints: Vec<Judged>,
}

/// An endpoint, and the rule that lets the source in there.
#[derive(Debug)]
struct Judged {
    at: DirectEndpoint,
    workload: Arc<Workload>,
    rule: RuleId,
}

/// What an agent is to the entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// It writes them.
    Owner,
    /// Nobody does, so that it shall.
    Heir,
    /// Another agent does.
    Other,
}

fn role(state: &DirectState, me: u64, now: u64, is_draining: bool) -> Role {
    if state.owner == me {
        return Role::Owner;
    }
    if !is_draining && (state.owner == 0 || state.is_silent(now)) {
        Role::Heir
    } else {
        Role::Other
    }
}

impl Decision {
    /// Whether another decision would let the same flows go, for the same reasons, and tell the same of them.
    fn is_like(&self, other: &Decision) -> bool {
        let same_labels = |a: &Workload, b: &Workload| {
            a.name == b.name && a.identity == b.identity && a.app == b.app && a.version == b.version
        };
        let same_end =
            |(a, b): (&Judged, &Judged)| a.at == b.at && a.rule == b.rule && same_labels(&a.workload, &b.workload);
        same_labels(&self.source, &other.source)
            && self.service.as_ref().map(|s| &s.name) == other.service.as_ref().map(|s| &s.name)
            && self.endpoints.len() == other.endpoints.len()
            && self.endpoints.iter().zip(&other.endpoints).all(same_end)
    }

    fn places(&self) -> Vec<DirectEndpoint> {
        self.endpoints.iter().map(|judged| judged.at).collect()
    }
}

impl Direct {
    /// Takes the entries over from whoever owns them. They stay valid until the first view is applied.
    pub fn open(
        node: &str,
        kernel: Arc<Kernel>,
        pods: Directory,
        events: Arc<Events>,
        drain: Drain,
    ) -> Result<Direct, KernelError> {
        let me = rand::random::<u64>() | 1;
        let state = kernel.direct_state()?;
        kernel.set_direct_state(&DirectState {
            owner: me,
            beat: monotonic_ns(),
            ..state
        })?;
        Ok(Direct {
            node: node.into(),
            kernel,
            pods,
            events,
            drain,
            me,
            // Numbers of another agent's decisions mean nothing here.
            next_decision: Cell::new(rand::random::<u64>() >> 1),
            table: RefCell::new(Table {
                has_strays: true,
                ..Table::default()
            }),
        })
    }

    /// Takes away what the view does not permit. Before it is published.
    pub fn narrow(&self, view: &View) {
        let mut table = self.table.borrow_mut();
        if let Err(error) = self.try_narrow(view, &mut table) {
            self.failed(&mut table, &error);
        }
    }

    fn try_narrow(&self, view: &View, table: &mut Table) -> Result<(), KernelError> {
        let (state, now) = (self.kernel.direct_state()?, monotonic_ns());
        match role(&state, self.me, now, self.drain.is_draining()) {
            Role::Owner if table.is_clean => {
                self.remove_unlike(table, &self.wanted(view))?;
                self.kernel.set_direct_state(&DirectState {
                    beat: now,
                    revision: view.revision().0,
                    ..state
                })
            }
            Role::Owner | Role::Heir => {
                (table.is_clean, table.has_strays) = (false, true);
                self.stop(&state)
            }
            // One that drains has left the controller to its successor.
            Role::Other if self.drain.is_draining() => Ok(()),
            Role::Other => {
                (table.is_clean, table.has_strays) = (false, true);
                self.kernel.outdate_direct(view.revision().0)
            }
        }
    }

    /// No entry is valid any more.
    fn stop(&self, state: &DirectState) -> Result<(), KernelError> {
        self.kernel.set_direct_state(&DirectState {
            generation: GENERATION_NONE,
            ..*state
        })
    }

    /// Deletes the entries that are not wanted as they are.
    fn remove_unlike(&self, table: &mut Table, wanted: &HashMap<DirectKey, Arc<Decision>>) -> Result<(), KernelError> {
        let is_unlike = |(key, decision): &(&DirectKey, &Arc<Decision>)| {
            wanted.get(key).is_none_or(|wanted| !wanted.is_like(decision))
        };
        let gone: Vec<DirectKey> = table.entries.iter().filter(is_unlike).map(|(key, _)| *key).collect();
        for key in gone {
            self.kernel.delete_direct(&key)?;
            table.forget(&key);
        }
        Ok(())
    }

    /// What is in the kernel is not known any more: nothing of it counts until everything is written anew.
    fn failed(&self, table: &mut Table, error: &KernelError) {
        tracing::error!(%error, "direct connections go through the agent");
        (table.is_clean, table.has_strays) = (false, true);
        let stopped = self
            .kernel
            .direct_state()
            .and_then(|state| match state.owner == self.me {
                true => self.stop(&state),
                false => Ok(()),
            });
        if let Err(error) = stopped {
            tracing::error!(%error, "direct connections that should go through the agent may not");
        }
    }

    /// Ends what lives without a permit by this view. As soon as it is published.
    pub fn enforce(&self, view: &View) {
        let mut table = self.table.borrow_mut();
        if !table.has_strays && table.looks_due == 0 {
            return;
        }
        if let Err(error) = self.try_enforce(view, &mut table) {
            self.failed(&mut table, &error);
        }
    }

    fn try_enforce(&self, view: &View, table: &mut Table) -> Result<(), KernelError> {
        let state = self.kernel.direct_state()?;
        let is_draining = self.drain.is_draining();
        if is_draining && role(&state, self.me, monotonic_ns(), is_draining) == Role::Other {
            return Ok(());
        }
        table.has_strays = false;
        let mut denied: BTreeMap<NetnsCookie, Vec<SocketName>> = BTreeMap::new();
        for flow in self.kernel.direct_flows()? {
            if flow.closed != 0 {
                continue;
            }
            if flow.source.is_none() {
                table.has_strays = true;
                table.looks_due = table.looks_due.max(1);
                continue;
            }
            let entry = table.entries.get(&DirectKey::new(flow.netns, flow.asked));
            let is_known = entry.is_some_and(|entry| entry.places().iter().any(|at| at.address == flow.endpoint));
            if is_known && table.is_clean {
                continue;
            }
            table.has_strays = true;
            // Whose namespace is not held cannot be entered; its connections end with it.
            if let Some(pod) = self.pods.by_cookie(NetnsCookie(flow.netns))
                && !is_permitted(view, &pod, &flow)
            {
                denied.entry(pod.cookie()).or_default().push(SocketName {
                    source: flow.source.into(),
                    destination: flow.endpoint.into(),
                    cookie: flow.socket,
                });
            }
        }
        for (cookie, sockets) in denied {
            let Some(pod) = self.pods.by_cookie(cookie) else {
                continue;
            };
            if table.severed.len() + sockets.len() <= DIRECT_FLOWS_MAX as usize {
                table.severed.extend(sockets.iter().map(|socket| socket.cookie));
            }
            match sever_sockets(pod.netns(), &sockets) {
                Ok(ended) => tracing::info!(pod = %pod.name(), ended, "direct connections lost their permit"),
                Err(error) => {
                    tracing::error!(pod = %pod.name(), %error, "direct connections that lost their permit go on");
                    (table.is_powerless, table.is_clean) = (true, false);
                    if state.owner == self.me {
                        self.stop(&state)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Lets go what the view permits, once its pods are captured; and looks again at what lives, since sockets of a pod
    /// can only be ended once it is.
    pub fn apply(&self, view: &View) {
        let mut table = self.table.borrow_mut();
        if let Err(error) = self.try_apply(view, &mut table) {
            self.failed(&mut table, &error);
        }
        drop(table);
        self.enforce(view);
    }

    fn try_apply(&self, view: &View, table: &mut Table) -> Result<(), KernelError> {
        let now = monotonic_ns();
        table.tried = Some(now);
        let state = self.kernel.direct_state()?;
        match role(&state, self.me, now, self.drain.is_draining()) {
            Role::Owner if !table.is_powerless => {}
            Role::Heir if !table.is_powerless => table.is_clean = false,
            _ => return Ok(()),
        }
        let wanted = self.wanted(view);
        if table.is_clean {
            self.remove_unlike(table, &wanted)?;
        } else {
            // What is there may be anybody's: with a new generation none of it counts.
            table.generation = rand::random::<u64>() | 1;
            table.has_strays = true;
            for key in table.entries.keys().copied().collect::<Vec<_>>() {
                table.forget(&key);
            }
            for key in self.kernel.direct_keys()? {
                if !wanted.contains_key(&key) {
                    self.kernel.delete_direct(&key)?;
                }
            }
        }
        for (key, decision) in wanted {
            if table.entries.contains_key(&key) {
                continue;
            }
            let entry = direct_entry(table.generation, decision.number, &decision.places());
            match self.kernel.set_direct(&key, &entry) {
                Ok(()) => table.add(key, decision),
                Err(KernelError::Full(map)) => {
                    if !std::mem::replace(&mut table.is_full, true) {
                        tracing::warn!(map, "is full: further connections of this node go through the agent");
                    }
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        table.is_clean = true;
        // Without entries the programs need not look for any.
        let generation = match table.entries.is_empty() {
            true => GENERATION_NONE,
            false => table.generation,
        };
        self.kernel.set_direct_state(&DirectState {
            generation,
            owner: self.me,
            beat: monotonic_ns(),
            revision: view.revision().0,
        })
    }

    /// Gives the owner's sign of life, and tells of the flows that have ended. Every now and then, by the newest view.
    pub fn look(&self, view: &View) {
        let mut table = self.table.borrow_mut();
        let is_due = match self.beat(&table) {
            Ok(is_due) => is_due,
            Err(error) => {
                tracing::warn!(%error, "direct connections");
                false
            }
        };
        // Others may go on ending meanwhile: what is left is told next time.
        for _ in 0..2 * DIRECT_ENDED_MAX {
            match self.kernel.take_ended_flow() {
                Ok(Some(flow)) => self.tell(view, &mut table, &flow),
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, "ends of direct connections");
                    break;
                }
            }
        }
        let looks = table.looks_due;
        drop(table);
        if is_due {
            self.apply(view);
        } else if looks > 0 {
            self.enforce(view);
            let mut table = self.table.borrow_mut();
            table.looks_due = table.looks_due.saturating_sub(1);
        }
    }

    /// The owner's sign of life. Returns whether entries are to be written: nobody does any more, or it failed.
    fn beat(&self, table: &Table) -> Result<bool, KernelError> {
        let Some(tried) = table.tried else {
            return Ok(false);
        };
        let (state, now) = (self.kernel.direct_state()?, monotonic_ns());
        let is_older = |then: u64| now.saturating_sub(then) >= BEAT.as_nanos() as u64;
        match role(&state, self.me, now, self.drain.is_draining()) {
            Role::Owner if table.is_clean => {
                if is_older(state.beat) {
                    self.kernel.set_direct_state(&DirectState { beat: now, ..state })?;
                }
                Ok(false)
            }
            Role::Owner | Role::Heir => Ok(is_older(tried) && !table.is_powerless),
            Role::Other => Ok(false),
        }
    }

    /// Looks through the record: for ends that could not be queued, and connections that never got under way.
    pub fn tidy(&self, view: &View) {
        let mut table = self.table.borrow_mut();
        let flows = match self.kernel.direct_flows() {
            Ok(flows) => flows,
            Err(error) => return tracing::warn!(%error, "the record of direct connections"),
        };
        let now = monotonic_ns();
        for flow in flows {
            let age = Duration::from_nanos(now.saturating_sub(flow.opened));
            if flow.closed == 0 && !(flow.source.is_none() && age > UNDER_WAY) {
                continue;
            }
            if let Ok(Some(flow)) = self.kernel.take_direct_flow(flow.socket)
                && flow.closed != 0
            {
                self.tell(view, &mut table, &flow);
            }
        }
    }

    /// Every pair that may go without the agent.
    fn wanted(&self, view: &View) -> HashMap<DirectKey, Arc<Decision>> {
        let sources: Vec<(Arc<Pod>, Arc<Workload>)> = self
            .pods
            .all()
            .into_iter()
            .filter(|pod| {
                view.workload(pod.name())
                    .is_some_and(|now| now.enrolled && now.identity == *pod.identity())
            })
            .map(|pod| {
                let workload = pod.workload();
                (pod, workload)
            })
            .collect();
        let mut destinations = view.direct_destinations(&self.node);
        // With more pairs than there is room for, the same ones go without.
        destinations.sort_by_key(|destination| destination.asked);
        let mut wanted = HashMap::new();
        for destination in &destinations {
            let places: Option<Vec<DirectEndpoint>> = destination
                .endpoints
                .iter()
                .map(|(endpoint, _)| {
                    let pod = self.pods.by_name(&endpoint.workload.name)?;
                    let is_it = *pod.identity() == endpoint.workload.identity
                        && pod.workload().addresses.contains(&endpoint.address.ip());
                    is_it.then(|| DirectEndpoint::new(pod.cookie().0, endpoint.address.into()))
                })
                .collect();
            let Some(places) = places else { continue };
            for (pod, source) in &sources {
                let Ok(permits) = destination.permits(source) else {
                    continue;
                };
                if wanted.len() >= DIRECT_MAX as usize {
                    return wanted;
                }
                let judged = destination.endpoints.iter().zip(&places).zip(&permits);
                let judged = judged.map(|(((endpoint, _), at), permit)| Judged {
                    at: *at,
                    workload: endpoint.workload.clone(),
                    rule: permit.rule().clone(),
                });
                let decision = Decision {
                    number: self.next_decision(),
                    revision: view.revision(),
                    source: source.clone(),
                    service: destination.service().cloned(),
                    endpoints: judged.collect(),
                };
                wanted.insert(
                    DirectKey::new(pod.cookie().0, destination.asked.into()),
                    Arc::new(decision),
                );
            }
        }
        wanted
    }

    fn next_decision(&self) -> u64 {
        let number = self.next_decision.get();
        self.next_decision.set(number.wrapping_add(1));
        number
    }

    /// Closes the two records of a flow: one as the source's and one as the destination's.
    fn tell(&self, view: &View, table: &mut Table, flow: &DirectFlow) {
        let is_severed = table.severed.remove(&flow.socket);
        let decision = table.decisions.get(&flow.decision).cloned();
        let Some(decision) = decision.or_else(|| self.recall(view, flow)) else {
            return self.events.refused(Refusal::UnknownSource);
        };
        let Some(judged) = decision
            .endpoints
            .iter()
            .find(|judged| judged.at.address == flow.endpoint)
        else {
            return self.events.refused(Refusal::UnknownDestination);
        };
        let (from_source, to_source) = direct::payload(flow);
        let lasted = Duration::from_nanos(flow.closed.saturating_sub(flow.opened));
        let outcome = outcome(flow, is_severed);
        for reporter in [Reporter::Destination, Reporter::Source] {
            let parties = self.events.parties_of(
                reporter,
                Some(&decision.source),
                Some(&judged.workload),
                decision.service.as_ref(),
                ConnectionSecurity::SameNode,
            );
            let mut record = self.events.connection(parties, Protocol::Tcp);
            record.set_lasted(lasted);
            record.set_addresses(flow.source.into(), flow.asked.into());
            record.set_workloads(Some(&decision.source), Some(&judged.workload));
            match reporter {
                Reporter::Source => {
                    record.set_revision(decision.revision);
                    record.set_endpoint(flow.endpoint.into());
                }
                Reporter::Destination => record.set_rule(judged.rule.clone(), decision.revision),
            }
            if !direct::is_unanswered(flow.ended_in) {
                record.established();
            }
            record.set_bytes(to_source, from_source);
            record.close(outcome);
        }
    }

    /// What an agent before this one, or this one long ago, must have decided.
    fn recall(&self, view: &View, flow: &DirectFlow) -> Option<Arc<Decision>> {
        let pod = self.pods.by_cookie(NetnsCookie(flow.netns))?;
        let endpoint = SocketAddr::from(flow.endpoint);
        let workload = view.workload_by_address(endpoint.ip())?.clone();
        let policy = view.inbound(&workload.name, endpoint.port());
        let rule = match judge::flow(&policy, &attributes(&pod, flow)) {
            Ok(permit) => permit.rule().clone(),
            Err(denial) => denial.rule,
        };
        let service = match view.destination(flow.asked.into()) {
            Destination::ServicePort(port) => Some(port.service.clone()),
            _ => None,
        };
        Some(Arc::new(Decision {
            number: flow.decision,
            revision: view.revision(),
            source: pod.workload(),
            service,
            endpoints: vec![Judged {
                at: DirectEndpoint::new(0, flow.endpoint),
                workload,
                rule,
            }],
        }))
    }
}

impl Table {
    fn add(&mut self, key: DirectKey, decision: Arc<Decision>) {
        self.decisions.insert(decision.number, decision.clone());
        self.entries.insert(key, decision);
    }

    /// The entry is gone; its flows may live.
    fn forget(&mut self, key: &DirectKey) {
        let Some(decision) = self.entries.remove(key) else {
            return;
        };
        (self.has_strays, self.is_full) = (true, false);
        self.looks_due = LOOKS_AFTER;
        self.past.push_back(decision.number);
        while self.past.len() > PAST_DECISIONS_MAX {
            if let Some(oldest) = self.past.pop_front() {
                self.decisions.remove(&oldest);
            }
        }
    }
}

/// The source as the destination's policy sees it: by what it connected from.
fn attributes<'a>(pod: &'a Pod, flow: &DirectFlow) -> SourceAttributes<'a> {
    let source = SocketAddr::from(flow.source);
    SourceAttributes {
        identity: Some(pod.identity()),
        address: source.ip(),
        port: source.port(),
    }
}

/// Whether a flow that is open may stay so. Whom the view does not know lets nobody in.
fn is_permitted(view: &View, pod: &Pod, flow: &DirectFlow) -> bool {
    let endpoint = SocketAddr::from(flow.endpoint);
    view.workload_by_address(endpoint.ip()).is_some_and(|workload| {
        let policy = view.inbound(&workload.name, endpoint.port());
        judge::flow(&policy, &attributes(pod, flow)).is_ok()
    })
}

/// What a flow's end is called. The kernel does not say who reset a connection: if the destination had said its end it
/// was the source, else the destination is taken for it.
fn outcome(flow: &DirectFlow, is_severed: bool) -> Outcome {
    if is_severed {
        Outcome::Refused(Refusal::PermitLost)
    } else if direct::is_unanswered(flow.ended_in) {
        Outcome::Refused(Refusal::DialRefused)
    } else if direct::is_orderly(flow.ended_in) {
        Outcome::Served
    } else if flow.ended_in == tcp::CLOSE_WAIT {
        Outcome::SourceReset
    } else {
        Outcome::DestinationReset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_agent_owns_the_entries_and_the_dead_are_succeeded() {
        const SILENCE: u64 = direct::OWNER_SILENCE_NS;
        const NOW: u64 = 100 * SILENCE;
        // the owner, its last sign of life, whether this one drains, what this one is
        for (owner, beat, is_draining, expected) in [
            (7, NOW, false, Role::Owner),
            (7, 0, true, Role::Owner),
            (8, NOW, false, Role::Other),
            (8, NOW - SILENCE, false, Role::Other),
            (8, NOW - SILENCE - 1, false, Role::Heir),
            (8, NOW - SILENCE - 1, true, Role::Other),
            (0, NOW, false, Role::Heir),
            (0, NOW, true, Role::Other),
            // A clock that seems to run backwards is no death.
            (8, NOW + 1, false, Role::Other),
        ] {
            let state = DirectState {
                generation: 1,
                owner,
                beat,
                revision: 1,
            };
            assert_eq!(
                role(&state, 7, NOW, is_draining),
                expected,
                "{owner} {beat} {is_draining}"
            );
        }
    }

    #[test]
    fn every_end_has_a_name() {
        const ESTABLISHED: u32 = 1;
        for (ended_in, is_severed, expected) in [
            (tcp::SYN_SENT, false, Outcome::Refused(Refusal::DialRefused)),
            (tcp::FIN_WAIT2, false, Outcome::Served),
            (tcp::LAST_ACK, false, Outcome::Served),
            (tcp::CLOSING, false, Outcome::Served),
            (tcp::CLOSE_WAIT, false, Outcome::SourceReset),
            (ESTABLISHED, false, Outcome::DestinationReset),
            (ESTABLISHED, true, Outcome::Refused(Refusal::PermitLost)),
        ] {
            let flow = DirectFlow {
                ended_in,
                ..DirectFlow::default()
            };
            assert_eq!(outcome(&flow, is_severed), expected, "{ended_in}");
        }
    }
}
