//! The operator's side: applying documents over the controller's socket.

use std::{path::Path, time::Instant};

use anyhow::{Context, Result, ensure};
use hyper_util::rt::TokioIo;
use mesh_api::wire::{
    MESSAGE_BYTES_MAX,
    operator::{ApplyRequest, OperatorClient, Source},
};
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::world::{self, Size};

/// Documents of one apply while the world is filled.
const DOCUMENTS_PER_APPLY: usize = 10_000;

/// Connects to the operator's socket.
pub async fn connect(socket: &Path) -> Result<OperatorClient<Channel>> {
    let socket = socket.to_owned();
    let connect = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://operator")
        .connect_with_connector(connect)
        .await?;
    Ok(OperatorClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX))
}

/// Applies documents and gives the revision.
pub async fn apply(client: &mut OperatorClient<Channel>, documents: &[Value]) -> Result<u64> {
    let texts: Vec<String> = documents.iter().map(Value::to_string).collect();
    let request = ApplyRequest {
        sources: vec![Source {
            name: "scale".to_owned(),
            yaml: texts.join("\n---\n"),
        }],
        dry_run: false,
    };
    let response = client.apply(request).await.context("apply")?.into_inner();
    let refused = response.problems.iter().find(|problem| !problem.warning);
    ensure!(refused.is_none(), "refused: {refused:?}");
    Ok(response.revision)
}

/// Applies the whole world.
pub async fn fill(socket: &Path, size: &Size) -> Result<Value> {
    let mut client = connect(socket).await?;
    let started = Instant::now();
    let (mut count, mut revision) = (0, 0);
    let mut documents = world::documents(size).peekable();
    while documents.peek().is_some() {
        let some: Vec<Value> = documents.by_ref().take(DOCUMENTS_PER_APPLY).collect();
        count += some.len();
        revision = apply(&mut client, &some).await?;
    }
    Ok(json!({"documents": count, "revision": revision, "seconds": started.elapsed().as_secs_f64()}))
}
