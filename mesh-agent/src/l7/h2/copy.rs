//! A stream that is sent once more, for a mirror: decided and recorded like any other, its answer dropped.

use std::future::poll_fn;

use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderMap, request::Parts};

use super::{head, stream::send};
use crate::l7::{Attempt, End, Facts, Fault, Forward, Handler, Verdict, Version};

/// A whole request as it came.
#[derive(Clone, Debug)]
pub struct StreamCopy {
    pub(super) parts: Parts,
    pub(super) body: Vec<Bytes>,
    pub(super) trailers: Option<HeaderMap>,
}

/// Sends the copy as `handler` decides and reads the answer to its end. Bounded in time by whoever calls it; if it is
/// dropped, its exchange is.
pub async fn send_copy<H: Handler>(handler: &H, copy: StreamCopy) {
    let facts = Facts {
        version: Version::Http2,
        upgrade: false,
        grpc: head::is_grpc(&copy.parts.headers),
        body: !copy.body.is_empty(),
        index: 0,
    };
    match handler.decide(&head::View(&copy.parts), facts).await {
        Verdict::Reply(reply, exchange) => {
            let end = End {
                status: Some(reply.status),
                replied: true,
                ..End::default()
            };
            handler.finish(exchange, end);
        }
        Verdict::Forward(forward, mut exchange) => {
            let mut end = End::default();
            match handler.connect_h2(&mut exchange, Attempt::First).await {
                Ok(target) => {
                    let sent = transfer(handler, &mut exchange, target, &copy, &forward, &mut end).await;
                    end.fault = sent.err();
                }
                Err(reply) => (end.status, end.replied) = (Some(reply.status), true),
            }
            handler.finish(exchange, end);
        }
    }
}

async fn transfer<H: Handler>(
    handler: &H,
    exchange: &mut H::Exchange,
    mut target: SendRequest<Bytes>,
    copy: &StreamCopy,
    forward: &Forward,
    end: &mut End,
) -> Result<(), Fault> {
    poll_fn(|cx| target.poll_ready(cx))
        .await
        .map_err(|_| Fault::StreamRefused)?;
    let request = head::outgoing(&copy.parts, forward)?;
    let bare = copy.body.is_empty() && copy.trailers.is_none();
    let (response, mut up) = target.send_request(request, bare).map_err(|_| Fault::StreamRefused)?;
    // A target that takes no more may still answer.
    let _ = async {
        for (number, data) in copy.body.iter().enumerate() {
            let ends = copy.trailers.is_none() && number + 1 == copy.body.len();
            send(&mut up, data.clone(), ends).await.map_err(|_| ())?;
            end.request_bytes += data.len() as u64;
        }
        match &copy.trailers {
            Some(trailers) => up.send_trailers(trailers.clone()).map_err(|_| ()),
            None => Ok(()),
        }
    }
    .await;
    let response = response.await.map_err(|_| Fault::TargetClosed)?;
    let (parts, mut body) = response.into_parts();
    handler.responded(exchange, parts.status);
    end.status = Some(parts.status);
    end.grpc_status = head::grpc_status(&parts.headers);
    while let Some(data) = body.data().await {
        let count = data.map_err(|_| Fault::ResponseCut)?.len();
        end.response_bytes += count as u64;
        // Fails only for more than was received.
        let _ = body.flow_control().release_capacity(count);
    }
    if let Some(trailers) = body.trailers().await.map_err(|_| Fault::ResponseCut)? {
        end.grpc_status = head::grpc_status(&trailers).or(end.grpc_status);
    }
    Ok(())
}
