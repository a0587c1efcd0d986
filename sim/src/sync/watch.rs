//! `tokio::sync::watch`, as far as the agent uses it, on one [`Notify`].

use std::{
    fmt,
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
};

use parking_lot::{RwLock, RwLockReadGuard};
use real_tokio::sync::Notify;

/// Errors, under the names that tokio gives them.
pub mod error {
    pub use super::{RecvError, SendError};
}

/// Every sender is gone.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the channel is closed")]
pub struct RecvError(());

/// Nobody receives.
#[derive(Clone, Debug, thiserror::Error)]
#[error("nobody receives")]
pub struct SendError<T>(pub T);

struct Shared<T> {
    value: RwLock<T>,
    version: AtomicU64,
    senders: AtomicUsize,
    receivers: AtomicUsize,
    changed: Notify,
}

/// The writing end.
pub struct Sender<T>(Arc<Shared<T>>);

/// The reading end.
pub struct Receiver<T> {
    shared: Arc<Shared<T>>,
    seen: u64,
}

/// A look at the value.
pub struct Ref<'a, T>(RwLockReadGuard<'a, T>);

impl<T> Deref for Ref<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

/// A channel.
pub fn channel<T>(first: T) -> (Sender<T>, Receiver<T>) {
    let sender = Sender::new(first);
    let receiver = sender.subscribe();
    (sender, receiver)
}

impl<T> Sender<T> {
    pub fn new(first: T) -> Sender<T> {
        Sender(Arc::new(Shared {
            value: RwLock::new(first),
            version: AtomicU64::new(0),
            senders: AtomicUsize::new(1),
            receivers: AtomicUsize::new(0),
            changed: Notify::new(),
        }))
    }

    pub fn send(&self, value: T) -> Result<(), SendError<T>> {
        if self.0.receivers.load(SeqCst) == 0 {
            return Err(SendError(value));
        }
        self.send_replace(value);
        Ok(())
    }

    pub fn send_replace(&self, value: T) -> T {
        let old = std::mem::replace(&mut *self.0.value.write(), value);
        self.tell();
        old
    }

    pub fn send_modify(&self, change: impl FnOnce(&mut T)) {
        change(&mut self.0.value.write());
        self.tell();
    }

    pub fn send_if_modified(&self, change: impl FnOnce(&mut T) -> bool) -> bool {
        let changed = change(&mut self.0.value.write());
        if changed {
            self.tell();
        }
        changed
    }

    pub fn borrow(&self) -> Ref<'_, T> {
        Ref(self.0.value.read())
    }

    pub fn subscribe(&self) -> Receiver<T> {
        self.0.receivers.fetch_add(1, SeqCst);
        Receiver {
            seen: self.0.version.load(SeqCst),
            shared: self.0.clone(),
        }
    }

    fn tell(&self) {
        self.0.version.fetch_add(1, SeqCst);
        self.0.changed.notify_waiters();
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        if self.0.senders.fetch_sub(1, SeqCst) == 1 {
            self.0.changed.notify_waiters();
        }
    }
}

impl<T> Receiver<T> {
    pub fn borrow(&self) -> Ref<'_, T> {
        Ref(self.shared.value.read())
    }

    pub fn borrow_and_update(&mut self) -> Ref<'_, T> {
        self.seen = self.shared.version.load(SeqCst);
        Ref(self.shared.value.read())
    }

    pub fn mark_changed(&mut self) {
        self.seen = u64::MAX;
    }

    pub fn mark_unchanged(&mut self) {
        self.seen = self.shared.version.load(SeqCst);
    }

    pub fn has_changed(&self) -> Result<bool, RecvError> {
        if self.is_closed() {
            return Err(RecvError(()));
        }
        Ok(self.seen != self.shared.version.load(SeqCst))
    }

    fn is_closed(&self) -> bool {
        self.shared.senders.load(SeqCst) == 0
    }

    pub async fn changed(&mut self) -> Result<(), RecvError> {
        loop {
            let notified = self.shared.changed.notified();
            let version = self.shared.version.load(SeqCst);
            if self.seen != version {
                self.seen = version;
                return Ok(());
            }
            if self.is_closed() {
                return Err(RecvError(()));
            }
            notified.await;
        }
    }

    pub async fn wait_for(&mut self, mut wanted: impl FnMut(&T) -> bool) -> Result<Ref<'_, T>, RecvError> {
        loop {
            self.mark_unchanged();
            if wanted(&self.shared.value.read()) {
                return Ok(Ref(self.shared.value.read()));
            }
            self.changed().await?;
        }
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Receiver<T> {
        self.shared.receivers.fetch_add(1, SeqCst);
        Receiver {
            shared: self.shared.clone(),
            seen: self.seen,
        }
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.shared.receivers.fetch_sub(1, SeqCst);
    }
}

impl<T: fmt::Debug> fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Sender").field(&*self.0.value.read()).finish()
    }
}

impl<T: fmt::Debug> fmt::Debug for Receiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Receiver").field(&*self.shared.value.read()).finish()
    }
}
