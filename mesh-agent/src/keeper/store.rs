//! What a keeper holds: for each namespace and slot its sockets in their order. Pure; a socket is whatever `T` is.

use std::collections::BTreeMap;

use super::{
    NAMESPACES_MAX, PACKET_SOCKETS_MAX, SLOT_MAX, SOCKETS_MAX,
    codec::{PAGE_MAX, Refusal, Slot},
};

/// The sockets held. Bounded by [`SOCKETS_MAX`], [`NAMESPACES_MAX`] and [`SLOT_MAX`].
#[derive(Debug)]
pub struct Store<T> {
    namespaces: BTreeMap<u64, [Vec<T>; Slot::ALL.len()]>,
    sockets: usize,
}

impl<T> Default for Store<T> {
    fn default() -> Store<T> {
        Store {
            namespaces: BTreeMap::new(),
            sockets: 0,
        }
    }
}

impl<T> Store<T> {
    /// Sockets held.
    pub fn len(&self) -> usize {
        self.sockets
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.sockets == 0
    }

    /// A page of the namespaces after that one.
    pub fn namespaces(&self, after: u64) -> Vec<u64> {
        let after = (std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded);
        self.namespaces
            .range(after)
            .map(|(netns, _)| *netns)
            .take(PAGE_MAX)
            .collect()
    }

    /// A packet's worth of a slot's sockets from an index on, and how many the slot has.
    pub fn get(&self, netns: u64, slot: Slot, first: usize) -> (&[T], usize) {
        let all = self
            .namespaces
            .get(&netns)
            .and_then(|slots| slots.get(usize::from(slot.code())))
            .map_or(&[][..], Vec::as_slice);
        let rest = all.get(first..).unwrap_or_default();
        (rest.get(..PACKET_SOCKETS_MAX).unwrap_or(rest), all.len())
    }

    /// Adds sockets to a slot that has `first` of them.
    pub fn put(&mut self, netns: u64, slot: Slot, first: usize, sockets: Vec<T>) -> Result<(), Refusal> {
        let known = self.namespaces.contains_key(&netns);
        if first != self.get(netns, slot, 0).1 {
            return Err(Refusal::Taken);
        }
        let is_full = self.sockets + sockets.len() > SOCKETS_MAX
            || first + sockets.len() > SLOT_MAX
            || (!known && self.namespaces.len() >= NAMESPACES_MAX);
        if is_full {
            return Err(Refusal::Full);
        }
        if sockets.is_empty() {
            return Ok(());
        }
        self.sockets += sockets.len();
        let slots = self.namespaces.entry(netns).or_default();
        if let Some(place) = slots.get_mut(usize::from(slot.code())) {
            place.extend(sockets);
        }
        Ok(())
    }

    /// Lets go of a namespace.
    pub fn withdraw(&mut self, netns: u64) {
        if let Some(slots) = self.namespaces.remove(&netns) {
            self.sockets -= slots.iter().map(Vec::len).sum::<usize>();
        }
    }

    /// Lets go of everything.
    pub fn clear(&mut self) {
        *self = Store::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keeper::Direction;

    const OUT: Slot = Slot::new(Direction::Outbound, false);
    const IN: Slot = Slot::new(Direction::Inbound, true);

    #[test]
    fn sockets_are_kept_in_order_and_given_in_packets() {
        let mut store = Store::default();
        store.put(7, OUT, 0, (0..60).collect()).unwrap();
        store.put(7, OUT, 60, (60..100).collect()).unwrap();
        store.put(7, IN, 0, vec![1000]).unwrap();
        store.put(9, IN, 0, vec![1001]).unwrap();
        assert_eq!(store.len(), 102);
        let (first, total) = store.get(7, OUT, 0);
        assert_eq!((first.len(), total), (PACKET_SOCKETS_MAX, 100));
        let (rest, _) = store.get(7, OUT, PACKET_SOCKETS_MAX);
        assert_eq!([first, rest].concat(), (0..100).collect::<Vec<_>>());
        assert_eq!(store.get(7, OUT, 200), (&[][..], 100));
        assert_eq!(store.get(8, OUT, 0), (&[][..], 0));
        assert_eq!((store.namespaces(0), store.namespaces(7)), (vec![7, 9], vec![9]));
        store.withdraw(7);
        store.withdraw(8);
        assert_eq!((store.len(), store.namespaces(0)), (1, vec![9]));
        store.clear();
        assert!(store.is_empty() && store.namespaces(0).is_empty());
    }

    #[test]
    fn nobody_replaces_what_another_generation_has_put() {
        let mut store = Store::default();
        store.put(7, OUT, 0, vec![1, 2]).unwrap();
        for first in [0, 1, 3] {
            assert_eq!(store.put(7, OUT, first, vec![9]), Err(Refusal::Taken), "{first}");
        }
        assert_eq!(store.get(7, OUT, 0).0, [1, 2]);
    }

    #[test]
    fn bounds_hold() {
        let mut store = Store::default();
        assert_eq!(store.put(1, OUT, 0, vec![0; SLOT_MAX + 1]), Err(Refusal::Full));
        for netns in 0..(SOCKETS_MAX / SLOT_MAX) as u64 {
            store.put(netns, OUT, 0, vec![0; SLOT_MAX]).unwrap();
        }
        assert_eq!(store.put(1 << 40, OUT, 0, vec![0]), Err(Refusal::Full));
        store.clear();
        for netns in 0..NAMESPACES_MAX as u64 {
            store.put(netns, OUT, 0, vec![0]).unwrap();
        }
        assert_eq!(store.put(1 << 40, OUT, 0, vec![0]), Err(Refusal::Full));
        store.put(0, IN, 0, vec![0]).unwrap();
        assert_eq!(store.namespaces(0).len(), PAGE_MAX);
    }
}
