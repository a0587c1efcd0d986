//! The view that the agent serves by: written by one task, read with one pointer load.
//!
//! `sync` compiles each revision and publishes it here; `path` loads once per connection or request, so that no
//! decision mixes two revisions. A publication touches no connection: relays wait on [`Published::changed`] and judge
//! their permit again. A holder must never publish an older revision than it shows.

pub mod controller;
pub mod node;
pub mod session;
#[cfg(test)]
mod session_tests;
pub mod snapshot;
pub mod sync;

pub use controller::ControllerClient;
pub use session::{AgentReport, ControllerConfig, SyncConfig, SyncError, SyncHealth, ViewSync};

use std::{future::Future, sync::Arc, time::Duration};

use arc_swap::{ArcSwap, Guard};
use tokio::sync::watch;

/// A value that is replaced whole, with a notice at each change.
#[derive(Debug)]
pub struct Published<T> {
    current: Arc<ArcSwap<T>>,
    changes: watch::Sender<u64>,
}

/// The view that the agent serves by.
pub type ViewStore = Published<mesh_api::view::View>;

/// A reader of one task: costs one comparison while nothing changes and shares no reference count with other cores.
pub struct Reader<T> {
    cache: arc_swap::Cache<Arc<ArcSwap<T>>, Arc<T>>,
}

/// The wait for a view ended without one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the view did not come in time")]
pub struct WaitTimeout;

impl<T> Published<T> {
    /// Starts with this value.
    pub fn new(first: T) -> Published<T> {
        Published {
            current: Arc::new(ArcSwap::from_pointee(first)),
            changes: watch::Sender::new(0),
        }
    }

    /// The current value, to keep.
    pub fn load(&self) -> Arc<T> {
        self.current.load_full()
    }

    /// The current value, for a look that ends before the next await.
    pub fn peek(&self) -> Guard<Arc<T>> {
        self.current.load()
    }

    /// A reader for one task or thread.
    pub fn reader(&self) -> Reader<T> {
        Reader {
            cache: arc_swap::Cache::new(self.current.clone()),
        }
    }

    /// Replaces the value and tells those who wait.
    pub fn publish(&self, value: Arc<T>) {
        self.current.store(value);
        self.changes.send_modify(|count| *count += 1);
    }

    /// How often the value was replaced.
    pub fn changes(&self) -> u64 {
        *self.changes.borrow()
    }

    /// A receiver that is marked as changed at each later publication.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Returns at the next publication after this call, however late it is waited for: who looks at the value between the
    /// two misses none, whatever thread publishes.
    pub fn changed(&self) -> impl Future<Output = ()> + use<'_, T> {
        let mut changes = self.changes.subscribe();
        async move {
            // The sender lives in `self`, so the wait cannot fail.
            let _ = changes.changed().await;
        }
    }

    /// Returns the first value that satisfies the predicate, the current one included.
    pub async fn wait_for(&self, predicate: impl Fn(&T) -> bool, patience: Duration) -> Result<Arc<T>, WaitTimeout> {
        let mut changes = self.changes.subscribe();
        tokio::time::timeout(patience, async {
            loop {
                let value = self.load();
                if predicate(&value) {
                    return value;
                }
                let _ = changes.changed().await;
            }
        })
        .await
        .map_err(|_| WaitTimeout)
    }
}

impl<T> Reader<T> {
    /// The current value.
    pub fn current(&mut self) -> &Arc<T> {
        self.cache.load()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn waits_see_each_publication() {
        let published = Arc::new(Published::new(1u32));
        let mut reader = published.reader();
        assert_eq!(**reader.current(), 1);
        let waiter = tokio::spawn({
            let published = published.clone();
            async move { published.wait_for(|v| *v == 3, Duration::from_secs(5)).await }
        });
        tokio::task::yield_now().await;
        published.publish(Arc::new(2));
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        published.publish(Arc::new(3));
        assert_eq!(waiter.await.unwrap().as_deref(), Ok(&3));
        assert_eq!(**reader.current(), 3);
        assert_eq!((*published.load(), **published.peek(), published.changes()), (3, 3, 2));
        assert_eq!(
            published.wait_for(|v| *v == 4, Duration::from_secs(5)).await,
            Err(WaitTimeout)
        );
    }
}
