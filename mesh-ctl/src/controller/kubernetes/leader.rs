//! Who leads: a Lease in the API server, taken and renewed with optimistic concurrency, and the numbers of revisions.
//!
//! [`Election`] decides and is told the time; [`campaign`] does the I/O around it. A replica believes in a lead only as
//! long as it renewed it in time by its own clock, which is shorter than the others wait before they take it; clocks
//! need not agree. The Lease also says which revision numbers are taken, so that a new leader goes on above them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use mesh_api::workload::Revision;
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

/// The Lease's name.
pub const LEASE: &str = "nodemesh-controller";
/// The annotation with the highest revision number that any leader may have used.
pub const RESERVED: &str = "nodemesh.io/revision-reserved";
/// How many numbers a leader reserves beyond those in use.
const BLOCK: u64 = 1000;
/// No agent is believed to hold more: as much as every JSON reader can say, and never reached by counting.
const HELD_MAX: u64 = 1 << 53;

/// The times of an election.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// Others take a Lease that was not renewed for this long.
    pub duration: Duration,
    /// How often the leader renews, and others look.
    pub renew: Duration,
}

impl Times {
    /// A leader that could not renew for this long stops: a third before the others begin to take over.
    fn deadline(&self) -> Duration {
        self.duration * 2 / 3
    }
}

/// The numbers that a leader may give to revisions.
pub struct Numbers {
    used: AtomicU64,
    reserved: AtomicU64,
}

impl Numbers {
    fn new(used: u64, reserved: u64) -> Numbers {
        Numbers {
            used: AtomicU64::new(used),
            reserved: AtomicU64::new(reserved),
        }
    }

    /// The next number; `None` until the Lease has reserved more.
    pub fn take(&self) -> Option<Revision> {
        let reserved = self.reserved.load(Ordering::Acquire);
        let next = |used: u64| (used < reserved).then_some(used + 1);
        let taken = self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
        taken.ok().map(|used| Revision(used + 1))
    }

    /// Goes on above `held`, which somebody got from a row of numbers that is lost; `false` if there is nothing to do.
    pub fn raise(&self, held: Revision) -> bool {
        // A margin: who comes next may hold a little more.
        let beyond = held.0.min(HELD_MAX) + BLOCK;
        held.0 <= HELD_MAX && self.used.fetch_max(beyond, Ordering::AcqRel) < held.0
    }

    /// Whether there is no number left until the Lease has reserved more.
    pub fn are_used_up(&self) -> bool {
        self.used.load(Ordering::Acquire) >= self.reserved.load(Ordering::Acquire)
    }

    /// What the next renewal should reserve.
    fn wanted(&self) -> u64 {
        let (used, reserved) = (self.used.load(Ordering::Acquire), self.reserved.load(Ordering::Acquire));
        if reserved.saturating_sub(used) < BLOCK / 2 {
            used + BLOCK
        } else {
            reserved
        }
    }
}

/// What matters of a Lease.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Who holds it; empty: nobody.
    pub holder: String,
    /// Changes with every write.
    pub version: String,
    /// What [`RESERVED`] says.
    pub reserved: u64,
}

/// What to do about the Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Make it.
    Create,
    /// Put our name into it.
    Take,
    /// Renew it.
    Renew,
    /// Somebody else leads.
    Wait,
}

/// Who leads, as far as this replica can know.
pub struct Election {
    identity: String,
    times: Times,
    /// The Lease's last change, and when it was noticed.
    noticed: Option<(Seen, Instant)>,
    /// When the last write that made or kept us the leader was begun.
    renewed: Option<Instant>,
    /// The highest number that was ever seen reserved: a deleted Lease does not start the numbers over.
    reserved: u64,
}

impl Election {
    /// A replica that knows nothing yet.
    pub fn new(identity: &str, times: Times) -> Election {
        Election {
            identity: identity.to_owned(),
            times,
            noticed: None,
            renewed: None,
            reserved: 0,
        }
    }

    /// When the lead ends unless it is renewed.
    fn ends(&self) -> Option<Instant> {
        self.renewed.map(|at| at + self.times.deadline())
    }

    /// Whether this replica leads at `now`.
    pub fn leads(&self, now: Instant) -> bool {
        self.ends().is_some_and(|end| now < end)
    }

    /// What to do, given the Lease as it was just read.
    pub fn look(&mut self, lease: Option<&Seen>, now: Instant) -> Act {
        let Some(lease) = lease else { return Act::Create };
        self.reserved = self.reserved.max(lease.reserved);
        let since = match &self.noticed {
            Some((before, since)) if before == lease => *since,
            _ => {
                self.noticed = Some((lease.clone(), now));
                now
            }
        };
        if lease.holder == self.identity {
            // Ours, but for how long we did not renew it: no other process has this name.
            return if self.leads(now) { Act::Renew } else { Act::Take };
        }
        self.renewed = None;
        if lease.holder.is_empty() || now >= since + self.times.duration {
            Act::Take
        } else {
            Act::Wait
        }
    }

    /// A write that was begun at `began` has succeeded.
    pub fn wrote(&mut self, lease: Seen, began: Instant) {
        self.reserved = self.reserved.max(lease.reserved);
        self.noticed = Some((lease, began));
        self.renewed = Some(began);
    }

    /// The lead is over, by our will or another's.
    pub fn resign(&mut self) {
        self.renewed = None;
    }
}

/// The API server's side.
struct Door {
    api: Api<Lease>,
    identity: String,
    times: Times,
}

fn seen(lease: &Lease) -> Seen {
    let annotations = lease.metadata.annotations.as_ref();
    let reserved = annotations.and_then(|all| all.get(RESERVED)?.parse().ok());
    let holder = lease.spec.as_ref().and_then(|spec| spec.holder_identity.clone());
    Seen {
        holder: holder.unwrap_or_default(),
        version: lease.metadata.resource_version.clone().unwrap_or_default(),
        reserved: reserved.unwrap_or(0),
    }
}

impl Door {
    /// No request may take longer than the time in which a lead is lost.
    async fn timed<T>(&self, request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, kube::Error> {
        match tokio::time::timeout(self.times.renew, request).await {
            Ok(done) => done,
            Err(late) => Err(kube::Error::Service(late.into())),
        }
    }

    async fn read(&self) -> Result<Option<Lease>, kube::Error> {
        self.timed(self.api.get_opt(LEASE)).await
    }

    /// Writes the Lease over `old`; a conflict is an error.
    async fn write(&self, old: Option<&Lease>, holder: &str, reserved: u64) -> Result<Lease, kube::Error> {
        let now = MicroTime(Timestamp::now());
        let before = old.and_then(|lease| lease.spec.clone()).unwrap_or_default();
        let same = before.holder_identity.as_deref() == Some(holder);
        let transitions = before.lease_transitions.unwrap_or(0);
        let mut lease = old.cloned().unwrap_or_else(|| Lease {
            metadata: ObjectMeta {
                name: Some(LEASE.to_owned()),
                ..ObjectMeta::default()
            },
            ..Lease::default()
        });
        lease.metadata.managed_fields = None;
        let annotations = lease.metadata.annotations.get_or_insert_default();
        annotations.insert(RESERVED.to_owned(), reserved.to_string());
        let seconds = self.times.duration.as_secs().max(1);
        lease.spec = Some(LeaseSpec {
            holder_identity: Some(holder.to_owned()),
            lease_duration_seconds: Some(i32::try_from(seconds).unwrap_or(i32::MAX)),
            acquire_time: if same { before.acquire_time } else { Some(now.clone()) },
            renew_time: Some(now),
            lease_transitions: Some(if same {
                transitions
            } else {
                transitions.saturating_add(1)
            }),
            ..LeaseSpec::default()
        });
        let parameters = PostParams::default();
        match old {
            None => self.timed(self.api.create(&parameters, &lease)).await,
            Some(_) => self.timed(self.api.replace(LEASE, &parameters, &lease)).await,
        }
    }
}

/// Takes part in the election until `stop`, then gives the lead up so that another need not wait. `leading` holds the
/// numbers of the term while this replica leads.
pub async fn campaign(
    client: Client,
    namespace: &str,
    identity: &str,
    times: Times,
    leading: watch::Sender<Option<Arc<Numbers>>>,
    stop: CancellationToken,
) {
    let door = Door {
        api: Api::namespaced(client, namespace),
        identity: identity.to_owned(),
        times,
    };
    let mut election = Election::new(identity, times);
    let mut numbers: Option<Arc<Numbers>> = None;
    let mut known: Option<Lease> = None;
    loop {
        // Others look more often than the leader writes: half of what a takeover takes is the look.
        let pause = if numbers.is_some() {
            times.renew
        } else {
            times.renew / 2
        };
        let next = Instant::now() + pause;
        let ends = election.ends();
        let attempt = step(&door, &mut election, numbers.as_ref(), &mut known);
        let limit = ends.unwrap_or_else(|| Instant::now() + times.duration);
        let result = tokio::select! {
            result = tokio::time::timeout_at(limit, attempt) => result.unwrap_or(Ok(())),
            () = stop.cancelled() => break,
        };
        if let Err(error) = result {
            // Somebody else was faster, which is no failure; anything else may cost the lead.
            known = None;
            if !matches!(&error, kube::Error::Api(status) if status.code == 409) {
                tracing::warn!(%error, "the Lease cannot be used");
            }
        }
        let now = Instant::now();
        match (election.leads(now), &numbers) {
            (true, None) => {
                let first = election.reserved - BLOCK;
                let term = Arc::new(Numbers::new(first, election.reserved));
                tracing::info!(identity, above = first, "leading");
                leading.send_replace(Some(term.clone()));
                numbers = Some(term);
            }
            (true, Some(numbers)) => numbers.reserved.store(election.reserved, Ordering::Release),
            (false, Some(_)) => {
                tracing::warn!(identity, "the lead is lost");
                election.resign();
                numbers = None;
                leading.send_replace(None);
            }
            (false, None) => {}
        }
        // A leader that fails tries again at once, as long as it leads.
        let wake = if numbers.is_some() && known.is_none() {
            now + times.renew / 4
        } else {
            next
        };
        tokio::select! {
            () = tokio::time::sleep_until(wake) => {}
            () = stop.cancelled() => break,
        }
    }
    if numbers.is_some() {
        leading.send_replace(None);
        if let Some(lease) = known {
            let given_up = door.write(Some(&lease), "", election.reserved).await;
            tracing::info!(given_up = given_up.is_ok(), "the lead ends");
        }
    }
}

/// One look at the Lease, and what follows from it.
async fn step(
    door: &Door,
    election: &mut Election,
    numbers: Option<&Arc<Numbers>>,
    known: &mut Option<Lease>,
) -> Result<(), kube::Error> {
    // A leader knows the Lease as it wrote it; if that is not so any more, the write conflicts.
    let lease = match (numbers, known.take()) {
        (Some(_), Some(lease)) => Some(lease),
        _ => door.read().await?,
    };
    let view = lease.as_ref().map(seen);
    let act = election.look(view.as_ref(), Instant::now());
    if act == Act::Wait {
        return Ok(());
    }
    let reserved = match numbers {
        Some(numbers) => numbers.wanted().max(election.reserved),
        None => election.reserved + BLOCK,
    };
    let began = Instant::now();
    let written = door.write(lease.as_ref(), &door.identity, reserved).await?;
    election.wrote(seen(&written), began);
    *known = Some(written);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMES: Times = Times {
        duration: Duration::from_secs(6),
        renew: Duration::from_secs(2),
    };

    fn lease(holder: &str, version: u32, reserved: u64) -> Seen {
        Seen {
            holder: holder.to_owned(),
            version: version.to_string(),
            reserved,
        }
    }

    #[test]
    fn a_lease_is_taken_only_when_nobody_renews_it() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut waiting = Election::new("b", TIMES);
        let steps = [
            (None, 0, Act::Create),
            (Some(lease("a", 1, 0)), 1, Act::Wait),
            (Some(lease("a", 1, 0)), 6, Act::Wait),
            // Renewed: the wait begins anew, whatever the clock of its writer says.
            (Some(lease("a", 2, 0)), 7, Act::Wait),
            (Some(lease("a", 2, 0)), 12, Act::Wait),
            (Some(lease("a", 2, 0)), 13, Act::Take),
            // Another was faster.
            (Some(lease("c", 3, 0)), 14, Act::Wait),
            // Given up.
            (Some(lease("", 4, 0)), 15, Act::Take),
            // Ours, from a write whose answer was lost.
            (Some(lease("b", 5, 0)), 16, Act::Take),
        ];
        for (seen, seconds, expected) in steps {
            assert_eq!(waiting.look(seen.as_ref(), at(seconds)), expected, "second {seconds}");
            assert!(!waiting.leads(at(seconds)), "nothing was written");
        }
    }

    #[test]
    fn a_lead_ends_before_another_can_begin() {
        let start = Instant::now();
        let at = |tenths: u64| start + Duration::from_millis(tenths * 100);
        let mut leader = Election::new("a", TIMES);
        let mut other = Election::new("b", TIMES);
        assert_eq!(leader.look(None, at(0)), Act::Create);
        leader.wrote(lease("a", 1, 1000), at(0));
        assert_eq!(leader.look(Some(&lease("a", 1, 1000)), at(20)), Act::Renew);
        leader.wrote(lease("a", 2, 1000), at(20));
        // From here on no write succeeds. The other notices the last one at once, which is the worst case.
        let mut took = None;
        for tenth in 20..200 {
            let now = at(tenth);
            if other.look(Some(&lease("a", 2, 1000)), now) == Act::Take && took.is_none() {
                took = Some(tenth);
                other.wrote(lease("b", 3, 2000), now);
            }
            assert!(!(leader.leads(now) && other.leads(now)), "two lead at {tenth}");
        }
        assert_eq!(took, Some(80));
        assert_eq!(leader.look(Some(&lease("b", 3, 2000)), at(81)), Act::Wait);
        assert_eq!(leader.reserved, 2000, "what another has reserved is remembered");
    }

    #[test]
    fn a_leader_that_sees_another_name_stops_at_once() {
        let start = Instant::now();
        let mut leader = Election::new("a", TIMES);
        leader.wrote(lease("a", 1, 1000), start);
        assert!(leader.leads(start));
        assert_eq!(leader.look(Some(&lease("b", 2, 2000)), start), Act::Wait);
        assert!(!leader.leads(start));
    }

    #[test]
    fn numbers_grow_over_leaders_and_are_never_given_twice() {
        let first = Numbers::new(0, BLOCK);
        assert_eq!(first.take(), Some(Revision(1)));
        assert_eq!(first.wanted(), BLOCK);
        for _ in 0..BLOCK / 2 {
            first.take().unwrap();
        }
        assert_eq!(first.wanted(), BLOCK + BLOCK / 2 + 1);
        while let Some(revision) = first.take() {
            assert!(revision.0 <= BLOCK);
        }
        first.reserved.store(first.wanted(), Ordering::Release);
        assert_eq!(first.take(), Some(Revision(BLOCK + 1)));
        // Somebody holds more, from a Lease that is lost: numbers go on above, once they are reserved.
        assert!(!first.raise(Revision(5)) && !first.raise(Revision(u64::MAX)));
        assert!(first.raise(Revision(9 * BLOCK)));
        assert!(first.are_used_up() && first.take().is_none());
        first.reserved.store(first.wanted(), Ordering::Release);
        assert_eq!(first.take(), Some(Revision(10 * BLOCK + 1)));
        // Whoever comes next begins at the bound, whatever was used of it.
        let next = Numbers::new(2 * BLOCK, 3 * BLOCK);
        assert_eq!(next.take(), Some(Revision(2 * BLOCK + 1)));
    }
}
