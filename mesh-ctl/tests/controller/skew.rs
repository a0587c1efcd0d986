//! Agents of the release before and after: they know fewer fields than the controller, or say some that it does not know.
//!
//! The messages here are written out by hand and never follow the protocol file: the first release's, as they were.

use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Streaming, client::Grpc, codegen::http::uri::PathAndQuery};
use tonic_prost::ProstCodec;

use crate::world::{Controller, PATIENCE, bootstrap, connect_channel, two_nodes};

/// What an agent of the first release says, and what one of a later release adds.
#[derive(Clone, PartialEq, prost::Message)]
struct Said {
    #[prost(message, optional, tag = "1")]
    hello: Option<Hello>,
    #[prost(message, optional, tag = "2")]
    ack: Option<Ack>,
    #[prost(message, optional, tag = "4")]
    status: Option<Status>,
    /// A field of the future, beside the message.
    #[prost(string, tag = "900")]
    future: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Hello {
    #[prost(string, tag = "1")]
    node: String,
    #[prost(string, tag = "2")]
    agent_version: String,
    #[prost(uint64, tag = "3")]
    resume_revision: u64,
    #[prost(uint32, tag = "4")]
    abi_version: u32,
    #[prost(string, repeated, tag = "901")]
    future: Vec<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Ack {
    #[prost(uint64, tag = "1")]
    revision: u64,
    #[prost(uint64, tag = "902")]
    future: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Status {
    #[prost(message, repeated, tag = "1")]
    pods: Vec<PodStatus>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PodStatus {
    #[prost(string, tag = "1")]
    namespace: String,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(bool, tag = "3")]
    enrolled: bool,
    #[prost(bool, tag = "4")]
    captured: bool,
}

/// What an agent of the first release understands.
#[derive(Clone, PartialEq, prost::Message)]
struct Heard {
    #[prost(message, optional, tag = "1")]
    snapshot: Option<Snapshot>,
    #[prost(message, optional, tag = "2")]
    delta: Option<Delta>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Snapshot {
    #[prost(uint64, tag = "1")]
    revision: u64,
    #[prost(string, tag = "2")]
    trust_domain: String,
    #[prost(message, repeated, tag = "3")]
    resources: Vec<Resource>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Delta {
    #[prost(uint64, tag = "1")]
    from: u64,
    #[prost(uint64, tag = "2")]
    to: u64,
    #[prost(message, repeated, tag = "3")]
    upserts: Vec<Resource>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Resource {
    #[prost(message, optional, tag = "1")]
    workload: Option<Workload>,
    #[prost(message, optional, tag = "2")]
    service: Option<Service>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Workload {
    #[prost(string, tag = "1")]
    namespace: String,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(string, tag = "5")]
    identity: String,
    #[prost(string, tag = "6")]
    node: String,
    #[prost(bytes, repeated, tag = "8")]
    addresses: Vec<Vec<u8>>,
    #[prost(bool, tag = "10")]
    enrolled: bool,
    #[prost(string, tag = "12")]
    netns: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Service {
    #[prost(string, tag = "1")]
    namespace: String,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(map = "string, string", tag = "5")]
    selector: std::collections::HashMap<String, String>,
}

async fn heard(stream: &mut Streaming<Heard>) -> Heard {
    let message = tokio::time::timeout(PATIENCE, stream.message())
        .await
        .expect("nothing came");
    message.unwrap().expect("the stream has ended")
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_of_the_release_before_and_after_are_served() {
    for future in [false, true] {
        let controller = Controller::start();
        controller.apply(&two_nodes(), &[]).good();
        let identity = bootstrap(&controller, "node-1", &controller.token("node-1"))
            .await
            .unwrap();
        let channel = connect_channel(&controller, &identity).await;
        let mut client = Grpc::new(channel);
        client.ready().await.unwrap();
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        let hello = Hello {
            node: "node-1".into(),
            agent_version: "0.1.0".into(),
            resume_revision: 0,
            abi_version: 7,
            future: if future { vec!["a".into(), "b".into()] } else { vec![] },
        };
        let text = if future { "hello" } else { "" };
        let say = |said: Said| {
            sender.send(Said {
                future: text.into(),
                ..said
            })
        };
        say(Said {
            hello: Some(hello),
            ..Said::default()
        })
        .await
        .unwrap();
        let path = PathAndQuery::from_static("/mesh.v1.Control/Sync");
        let codec = ProstCodec::<Said, Heard>::default();
        let request = Request::new(ReceiverStream::new(receiver));
        let mut stream = client.streaming(request, path, codec).await.unwrap().into_inner();

        let snapshot = heard(&mut stream).await.snapshot.unwrap();
        assert_eq!(snapshot.trust_domain, "cluster.local");
        let workloads: Vec<_> = snapshot.resources.iter().filter_map(|r| r.workload.as_ref()).collect();
        let cart = workloads.iter().find(|w| w.name == "cart").unwrap();
        assert_eq!(
            (
                cart.namespace.as_str(),
                cart.node.as_str(),
                cart.identity.as_str(),
                cart.enrolled
            ),
            ("shop", "node-1", "spiffe://cluster.local/ns/shop/sa/cart", true)
        );
        assert_eq!(
            (cart.addresses.as_slice(), cart.netns.as_str()),
            (&[vec![10, 1, 1, 2]][..], "/run/netns/cart")
        );
        let service = snapshot.resources.iter().find_map(|r| r.service.as_ref()).unwrap();
        assert_eq!(service.selector.get("app").map(String::as_str), Some("cart"));

        let ack = |revision| Said {
            ack: Some(Ack {
                revision,
                future: u64::from(future),
            }),
            ..Said::default()
        };
        say(ack(snapshot.revision)).await.unwrap();
        let pods = vec![PodStatus {
            namespace: "shop".into(),
            name: "cart".into(),
            enrolled: true,
            captured: true,
        }];
        say(Said {
            status: Some(Status { pods }),
            ..Said::default()
        })
        .await
        .unwrap();
        controller.apply(&crate::world::service("other", 81), &[]).good();
        let delta = heard(&mut stream).await.delta.unwrap();
        assert_eq!(
            (delta.from, delta.to, delta.upserts.len()),
            (snapshot.revision, snapshot.revision + 1, 1)
        );
        say(ack(delta.to)).await.unwrap();
        let end = std::time::Instant::now() + PATIENCE;
        loop {
            let status = controller.ctl(&["status", "-o", "json"]).json();
            let nodes = status["agents"].as_array().unwrap();
            let node = nodes.iter().find(|node| node["node"] == "node-1").unwrap();
            if node["revision"] == delta.to && node["pods"][0]["captured"] == true {
                break;
            }
            assert!(std::time::Instant::now() < end, "{status:#}");
        }
    }
}
