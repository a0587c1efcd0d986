//! HTTP/2 with prior knowledge, on the `h2` crate: gRPC and whoever asks for it.
//!
//! The connection is one task, each stream another on the same thread; bodies move with the flow control of both
//! sides, so a slow reader stops its own writer and nobody else. Streams, header lists, buffers and resets are bounded:
//! `h2` ends a connection that resets faster than streams are accepted, and here a stream is refused while too many
//! tasks still wind up.

mod copy;
mod head;
mod stream;

use std::{
    future::{Future, poll_fn},
    io,
    pin::pin,
    rc::Rc,
    task::Poll,
};

use bytes::Bytes;
pub use copy::{StreamCopy, send_copy};
use h2::{Reason, server};
use tokio::{task::JoinSet, time::Instant};

use super::{Fault, Handler, Limits, ServeError, timer::Timer};

/// What a stream may send before its reader has read: enough for bulk over a mesh's latencies.
pub const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
/// What all streams of a connection may send together.
pub const CONNECTION_WINDOW_BYTES: u32 = 4 * 1024 * 1024;
/// What a stream may have written that the socket has not taken.
pub const SEND_BUFFER_BYTES: usize = 256 * 1024;
/// Streams that were reset before they were served; more end the connection (rapid reset, CVE-2023-44487).
const PENDING_RESETS_MAX: usize = 64;

/// How connections to targets are made: windows that let one slow reader stop its own stream only, no server push.
pub fn client_builder() -> h2::client::Builder {
    let mut builder = h2::client::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .max_header_list_size(32 * 1024)
        .enable_push(false);
    builder
}

/// Serves HTTP/2 streams of one source connection, each by a local task, until it ends or `drain` resolves and the
/// streams under way are over. Must run within a [`tokio::task::LocalSet`]; dropping it ends its streams.
pub async fn serve<H: Handler>(
    source: H::Source,
    handler: Rc<H>,
    limits: &Limits,
    drain: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let mut builder = server::Builder::new();
    builder
        .max_concurrent_streams(limits.streams_max)
        .max_header_list_size(u32::try_from(limits.head_bytes_max).unwrap_or(u32::MAX))
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .max_pending_accept_reset_streams(PENDING_RESETS_MAX);
    let handshake = tokio::time::timeout(limits.head_timeout, builder.handshake::<_, Bytes>(source)).await;
    let mut connection = match handshake {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return Err(ended(error, &*handler)),
        Err(_) => {
            handler.refused(Fault::HeadTimeout, None);
            return Err(Fault::HeadTimeout.into());
        }
    };
    let tasks_max = (limits.streams_max as usize).saturating_mul(2);
    let (mut tasks, mut index, mut timer) = (JoinSet::new(), 0, Timer::default());
    let (mut drain, mut draining) = (pin!(drain), false);
    loop {
        let accepted = poll_fn(|cx| {
            while let Poll::Ready(Some(_)) = tasks.poll_join_next(cx) {}
            match tasks.is_empty() {
                false => timer.set(None),
                true if !timer.is_set() => timer.set(Some(Instant::now() + limits.idle_timeout)),
                true => {}
            }
            if !draining && (drain.as_mut().poll(cx).is_ready() || timer.poll(cx).is_ready()) {
                draining = true;
                connection.graceful_shutdown();
            }
            connection.poll_accept(cx)
        })
        .await;
        match accepted {
            None => break,
            Some(Err(error)) => return Err(ended(error, &*handler)),
            Some(Ok((_, mut respond))) if tasks.len() >= tasks_max => respond.send_reset(Reason::REFUSED_STREAM),
            Some(Ok((request, respond))) => {
                tasks.spawn_local(stream::run(handler.clone(), request, respond, *limits, index));
                index += 1;
            }
        }
    }
    Ok(())
}

/// What the end of a connection means. A peer that closes in the middle of nothing is no error.
fn ended<H: Handler>(error: h2::Error, handler: &H) -> ServeError {
    if error.is_io() {
        return ServeError::Source(error.into_io().unwrap_or_else(|| io::ErrorKind::Other.into()));
    }
    // GOAWAY by the source with an error code tells of our streams, not of its own misdeeds.
    if error.is_remote() {
        return ServeError::Source(io::Error::other(error));
    }
    handler.refused(Fault::SourceProtocol, None);
    ServeError::Fault(Fault::SourceProtocol)
}

#[cfg(test)]
mod tests;
