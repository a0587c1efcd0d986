//! A hash map that revisions share: a copy costs one reference count, a change copies the few entries beside it.
//!
//! A view of 100,000 workloads differs from the one before it by one of them; with plain maps each revision would copy
//! or build all of it. Entries lie in leaves of some tens, leaves in groups; a change copies one leaf, one group and the
//! root, unless nobody else holds them. A look-up is one hash and three steps, whatever the size. It must never be used
//! where an order is needed: it has none.

use std::{
    borrow::Borrow,
    fmt,
    hash::{BuildHasher, Hash},
    sync::Arc,
};

use foldhash::fast::RandomState;
use hashbrown::HashTable;

/// A leaf holds this many entries on average before the map is laid out anew with more leaves.
const LEAF_ENTRIES: usize = 32;
/// With each new layout there are so many times the leaves.
const GROWTH_BITS: u32 = 2;

type Leaf<K, V> = HashTable<(K, V)>;
type Group<K, V> = Vec<Arc<Leaf<K, V>>>;

/// See the module.
pub struct SharedMap<K, V> {
    groups: Arc<Vec<Arc<Group<K, V>>>>,
    /// There are two to the power of this many leaves.
    bits: u32,
    len: usize,
    hasher: RandomState,
}

impl<K, V> Clone for SharedMap<K, V> {
    fn clone(&self) -> SharedMap<K, V> {
        SharedMap {
            groups: self.groups.clone(),
            bits: self.bits,
            len: self.len,
            hasher: self.hasher.clone(),
        }
    }
}

impl<K, V> Default for SharedMap<K, V> {
    fn default() -> SharedMap<K, V> {
        SharedMap {
            groups: Arc::new(vec![Arc::new(vec![Arc::new(HashTable::new())])]),
            bits: 0,
            len: 0,
            hasher: RandomState::default(),
        }
    }
}

/// The group and the leaf in it. The table within a leaf goes by the lowest and the highest bits, so these are of the
/// middle.
fn place(hash: u64, bits: u32) -> (usize, usize) {
    let leaf_bits = bits / 2;
    let index = (hash >> 24) & ((1 << bits) - 1);
    ((index >> leaf_bits) as usize, (index & ((1 << leaf_bits) - 1)) as usize)
}

impl<K, V> SharedMap<K, V> {
    /// How many entries.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All entries, in no order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&K, &V)> {
        let leaves = self.groups.iter().flat_map(|group| group.iter());
        Counted {
            entries: leaves.flat_map(|leaf| leaf.iter()).map(|(key, value)| (key, value)),
            left: self.len,
        }
    }

    /// All keys, in no order.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &K> {
        self.iter().map(|(key, _)| key)
    }

    /// All values, in no order.
    pub fn values(&self) -> impl ExactSizeIterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }

    /// Whether both are one map, and not only alike.
    pub fn is_same(&self, other: &SharedMap<K, V>) -> bool {
        Arc::ptr_eq(&self.groups, &other.groups)
    }

    /// Whether the one is a copy of the other, changed or not, so that what they share can be told by looking.
    fn is_kin(&self, other: &SharedMap<K, V>) -> bool {
        let probe = |map: &SharedMap<K, V>| map.hasher.hash_one(0u64);
        self.bits == other.bits && probe(self) == probe(other)
    }
}

impl<K: Hash + Eq, V> SharedMap<K, V> {
    /// The value of a key.
    pub fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        let hash = self.hasher.hash_one(key);
        let (group, leaf) = place(hash, self.bits);
        let leaf = self.groups.get(group)?.get(leaf)?;
        leaf.find(hash, |(known, _)| known.borrow() == key)
            .map(|(_, value)| value)
    }

    /// Whether there is such a key.
    pub fn contains_key<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.get(key).is_some()
    }
}

impl<K: Hash + Eq, V: PartialEq> SharedMap<K, V> {
    /// Tells each key whose value is not as it was `before`, with the value that it has now, if it has one. Between a map
    /// and its copy this takes as long as there are changes.
    pub fn differences<'a>(&'a self, before: &'a SharedMap<K, V>, mut tell: impl FnMut(&'a K, Option<&'a V>)) {
        if self.is_same(before) {
            return;
        }
        if !self.is_kin(before) {
            news(before, self.iter(), &mut tell);
            gone(self, before.iter(), &mut tell);
            return;
        }
        for (new, old) in self.groups.iter().zip(before.groups.iter()) {
            if Arc::ptr_eq(new, old) {
                continue;
            }
            for (new, old) in new.iter().zip(old.iter()) {
                if !Arc::ptr_eq(new, old) {
                    news(before, new.iter().map(|(key, value)| (key, value)), &mut tell);
                    gone(self, old.iter().map(|(key, value)| (key, value)), &mut tell);
                }
            }
        }
    }
}

fn news<'a, K: Hash + Eq + 'a, V: PartialEq + 'a>(
    before: &SharedMap<K, V>,
    entries: impl Iterator<Item = (&'a K, &'a V)>,
    tell: &mut impl FnMut(&'a K, Option<&'a V>),
) {
    for (key, value) in entries {
        if before.get(key) != Some(value) {
            tell(key, Some(value));
        }
    }
}

fn gone<'a, K: Hash + Eq + 'a, V: 'a>(
    now: &SharedMap<K, V>,
    entries: impl Iterator<Item = (&'a K, &'a V)>,
    tell: &mut impl FnMut(&'a K, Option<&'a V>),
) {
    for (key, _) in entries {
        if !now.contains_key(key) {
            tell(key, None);
        }
    }
}

impl<K: Hash + Eq + Clone, V: Clone> SharedMap<K, V> {
    /// A map with room for so many entries.
    pub fn with_capacity(entries: usize) -> SharedMap<K, V> {
        let mut map = SharedMap::default();
        let mut bits = 0;
        while entries > LEAF_ENTRIES << bits {
            bits += GROWTH_BITS;
        }
        if bits > 0 {
            map.lay_out(bits);
        }
        map
    }

    /// Puts a value in; the one that it replaces is handed back.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        if self.len >= LEAF_ENTRIES << self.bits {
            self.lay_out(self.bits + GROWTH_BITS);
        }
        let (hash, hasher) = (self.hasher.hash_one(&key), self.hasher.clone());
        let leaf = self.leaf(hash)?;
        if let Some((_, known)) = leaf.find_mut(hash, |(known, _)| *known == key) {
            return Some(std::mem::replace(known, value));
        }
        leaf.insert_unique(hash, (key, value), |(key, _)| hasher.hash_one(key));
        self.len += 1;
        None
    }

    /// The value of a key, to be changed.
    pub fn get_mut<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: Borrow<Q>,
    {
        // A leaf is copied only for a change.
        if !self.contains_key(key) {
            return None;
        }
        let hash = self.hasher.hash_one(key);
        let found = self.leaf(hash)?.find_mut(hash, |(known, _)| known.borrow() == key);
        found.map(|(_, value)| value)
    }

    /// Takes a value out.
    pub fn remove<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        // A leaf is copied only for a change.
        if !self.contains_key(key) {
            return None;
        }
        let hash = self.hasher.hash_one(key);
        let found = self.leaf(hash)?.find_entry(hash, |(known, _)| known.borrow() == key);
        let ((_, value), _) = found.ok()?.remove();
        self.len -= 1;
        Some(value)
    }

    /// The leaf of a hash, to be changed. There always is one.
    fn leaf(&mut self, hash: u64) -> Option<&mut Leaf<K, V>> {
        let (group, leaf) = place(hash, self.bits);
        let group = Arc::make_mut(Arc::make_mut(&mut self.groups).get_mut(group)?);
        group.get_mut(leaf).map(Arc::make_mut)
    }

    /// A map that says what the other says, and shares with this one what both say.
    pub fn become_like(&self, other: &SharedMap<K, V>) -> SharedMap<K, V>
    where
        V: PartialEq,
    {
        let mut changed = self.clone();
        other.differences(self, |key, value| match value {
            Some(value) => drop(changed.insert(key.clone(), value.clone())),
            None => drop(changed.remove(key)),
        });
        changed
    }

    /// Spreads the entries over so many leaves.
    fn lay_out(&mut self, bits: u32) {
        let leaf_bits = bits / 2;
        let group = || (0..1usize << leaf_bits).map(|_| Arc::new(HashTable::new())).collect();
        let groups = (0..1usize << (bits - leaf_bits)).map(|_| Arc::new(group())).collect();
        let laid_out = SharedMap {
            groups: Arc::new(groups),
            bits,
            len: 0,
            hasher: self.hasher.clone(),
        };
        let before = std::mem::replace(self, laid_out);
        for (key, value) in before.iter() {
            self.insert(key.clone(), value.clone());
        }
    }
}

/// An iterator that knows how much is left.
struct Counted<I> {
    entries: I,
    left: usize,
}

impl<I: Iterator> Iterator for Counted<I> {
    type Item = I::Item;

    fn next(&mut self) -> Option<I::Item> {
        let next = self.entries.next();
        self.left = self.left.saturating_sub(usize::from(next.is_some()));
        next
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl<I: Iterator> ExactSizeIterator for Counted<I> {}

impl<K: Hash + Eq + Clone, V: Clone> FromIterator<(K, V)> for SharedMap<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> SharedMap<K, V> {
        let entries = entries.into_iter();
        let mut map = SharedMap::with_capacity(entries.size_hint().0);
        map.extend(entries);
        map
    }
}

impl<K: Hash + Eq + Clone, V: Clone> Extend<(K, V)> for SharedMap<K, V> {
    fn extend<I: IntoIterator<Item = (K, V)>>(&mut self, entries: I) {
        for (key, value) in entries {
            self.insert(key, value);
        }
    }
}

impl<K: Hash + Eq, V: PartialEq> PartialEq for SharedMap<K, V> {
    fn eq(&self, other: &SharedMap<K, V>) -> bool {
        self.is_same(other) || (self.len == other.len && self.iter().all(|(key, value)| other.get(key) == Some(value)))
    }
}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for SharedMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// It is a map, and a copy does not see what is done to the other.
        #[test]
        fn copies_are_maps_of_their_own(
            before in proptest::collection::vec((0..400u16, any::<u8>()), 0..600),
            after in proptest::collection::vec((0..400u16, proptest::option::of(any::<u8>())), 0..100),
        ) {
            let mut model: HashMap<u16, u8> = HashMap::new();
            let mut map = SharedMap::default();
            for (key, value) in before {
                prop_assert_eq!(map.insert(key, value), model.insert(key, value));
            }
            let (kept, kept_model) = (map.clone(), model.clone());
            prop_assert!(kept.is_same(&map));
            for (key, value) in after {
                match value {
                    Some(value) => prop_assert_eq!(map.insert(key, value), model.insert(key, value)),
                    None => prop_assert_eq!(map.remove(&key), model.remove(&key)),
                }
            }
            for (map, model) in [(&map, &model), (&kept, &kept_model)] {
                prop_assert_eq!(map.len(), model.len());
                prop_assert_eq!(map.iter().len(), model.len());
                for key in 0..400 {
                    prop_assert_eq!(map.get(&key), model.get(&key));
                }
                let all: HashMap<u16, u8> = map.iter().map(|(key, value)| (*key, *value)).collect();
                prop_assert_eq!(&all, model);
            }
            prop_assert_eq!(map == kept, model == kept_model);
            // What is told leads from the one to the other, between kin and between strangers.
            let stranger: SharedMap<u16, u8> = model.iter().map(|(key, value)| (*key, *value)).collect();
            for now in [&map, &stranger] {
                let mut led = kept_model.clone();
                let mut told = HashSet::new();
                now.differences(&kept, |key, value| {
                    assert!(told.insert(*key), "{key} is told twice");
                    assert_ne!(kept_model.get(key), value, "{key} is as it was");
                    match value {
                        Some(value) => led.insert(*key, *value),
                        None => led.remove(key),
                    };
                });
                prop_assert_eq!(&led, &model);
            }
        }
    }

    #[test]
    fn a_change_copies_little() {
        let mut map: SharedMap<u32, u32> = (0..100_000).map(|n| (n, n)).collect();
        let before = map.clone();
        map.insert(7, 0);
        map.remove(&8);
        let leaves = |map: &SharedMap<u32, u32>| -> Vec<Arc<Leaf<u32, u32>>> {
            map.groups.iter().flat_map(|group| group.iter().cloned()).collect()
        };
        let (old, new) = (leaves(&before), leaves(&map));
        let copied = old.iter().zip(&new).filter(|(a, b)| !Arc::ptr_eq(a, b)).count();
        assert!(
            (1..=2).contains(&copied),
            "{copied} leaves of {} were copied",
            new.len()
        );
        assert!(
            new.iter().all(|leaf| leaf.len() < 4 * LEAF_ENTRIES),
            "a leaf is too full"
        );
    }
}
