//! The lines of the kernel programs, read into the agent's own log. They come only where `kernel.debug` asks for them;
//! the programs that an ended agent left pinned have no reader, and drop their lines.

use tokio::io::unix::AsyncFd;

use super::KernelLogger;

/// Reads lines for ever.
pub async fn forward(logger: KernelLogger) {
    // SAFETY: the descriptor is the ring buffer's, which the logger owns: it stays open, and the same, until the drop.
    let mut logger = match unsafe { AsyncFd::register(logger) } {
        Ok(logger) => logger,
        Err(error) => return tracing::warn!(%error, "the kernel programs' log cannot be read"),
    };
    while let Ok(mut ready) = logger.readable_mut().await {
        ready.get_inner_mut().flush();
        ready.clear_ready();
    }
}
