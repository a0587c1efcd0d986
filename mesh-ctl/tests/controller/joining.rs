//! Who gets a certificate, and who does not.

use mesh_api::wire::control::SignRequest;
use tonic::Code;

use crate::world::{Agent, Controller, Identity, bootstrap, bootstrap_by, connect, connect_with, pod, sign, two_nodes};

const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";
const FRONT: &str = "spiffe://cluster.local/ns/shop/sa/front";

fn names(identity: &Identity) -> Vec<String> {
    let (_, parsed) = x509_parser::parse_x509_certificate(&identity.chain[0]).unwrap();
    let names = parsed.subject_alternative_name().unwrap().unwrap();
    names.value.general_names.iter().map(ToString::to_string).collect()
}

#[tokio::test]
async fn a_node_joins_by_its_own_token_only() {
    let controller = Controller::start();
    let token = controller.token("node-1");
    let cases = [
        ("node-1", token.as_str(), true),
        // An agent that lost its state joins again.
        ("node-1", token.as_str(), true),
        ("node-2", token.as_str(), false),
        ("node-1", "nmj1.AAAAAAAAAAA.AAAA", false),
        ("node-1", "wrong", false),
        ("node 1", token.as_str(), false),
    ];
    for (node, token, good) in cases {
        match bootstrap(&controller, node, token).await {
            Ok(identity) => {
                assert!(good, "{node} {token}");
                assert_eq!(names(&identity), ["URI(spiffe://cluster.local/node/node-1)"]);
            }
            Err(status) => {
                assert!(!good, "{node} {token}: {status}");
                assert!(
                    matches!(status.code(), Code::PermissionDenied | Code::InvalidArgument),
                    "{status}"
                );
                assert!(
                    !status.message().contains("another node"),
                    "the answer tells too much: {status}"
                );
            }
        }
    }
    let refused = bootstrap(&controller, "node-1", "").await;
    assert_eq!(refused.err().map(|s| s.code()), Some(Code::Unauthenticated));
}

#[tokio::test]
async fn a_node_renews_itself_and_nobody_else() {
    let controller = Controller::start();
    let identity = bootstrap(&controller, "node-1", &controller.token("node-1"))
        .await
        .unwrap();
    let client = connect(&controller, Some(&identity)).await.unwrap();
    let renewed = bootstrap_by(client.clone(), "node-1", "").await.unwrap();
    assert_ne!(renewed.chain, identity.chain);
    let stolen = bootstrap_by(client, "node-2", "").await;
    assert_eq!(stolen.err().map(|s| s.code()), Some(Code::PermissionDenied));
}

#[tokio::test]
async fn a_certificate_is_signed_only_for_what_the_node_runs_now() {
    let controller = Controller::start();
    controller.apply(&two_nodes(), &[]).good();

    let mut anonymous = connect(&controller, None).await.unwrap();
    let refused = sign(&mut anonymous, CART).await;
    assert_eq!(refused.err().map(|s| s.code()), Some(Code::Unauthenticated));

    let identity = bootstrap(&controller, "node-1", &controller.token("node-1"))
        .await
        .unwrap();
    let mut client = connect(&controller, Some(&identity)).await.unwrap();
    let signed = sign(&mut client, CART).await.unwrap().unwrap();
    assert_eq!(names(&signed), [format!("URI({CART})")]);
    let life = {
        let (_, parsed) = x509_parser::parse_x509_certificate(&signed.chain[0]).unwrap();
        parsed.validity().not_after.timestamp() - parsed.validity().not_before.timestamp()
    };
    assert_eq!(life, 3600 + 30);

    let thefts = [
        FRONT,
        "spiffe://cluster.local/ns/shop/sa/nobody",
        "spiffe://cluster.local/node/node-1",
        "spiffe://cluster.local/node/node-2",
        "spiffe://cluster.local/controller",
        "spiffe://other.local/ns/shop/sa/cart",
        "not an id",
    ];
    for identity in thefts {
        let refusal = sign(&mut client, identity).await.unwrap();
        assert!(refusal.is_err(), "{identity} was signed for node-1");
    }

    // The pod moves away, and with it the right to its identity.
    controller.apply(&pod("cart", "node-2", "cart", "10.1.1.2"), &[]).good();
    assert!(sign(&mut client, CART).await.unwrap().is_err());
}

#[tokio::test]
async fn what_a_request_asks_for_beside_its_identity_is_refused() {
    use mesh_api::wire::control::{SigningOutcome, SigningRequest};
    let controller = Controller::start();
    controller.apply(&two_nodes(), &[]).good();
    let identity = bootstrap(&controller, "node-1", &controller.token("node-1"))
        .await
        .unwrap();
    let mut client = connect(&controller, Some(&identity)).await.unwrap();
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let csr = |names: &[&str]| {
        let mut params = rcgen::CertificateParams::default();
        params.subject_alt_names = names
            .iter()
            .map(|n| rcgen::SanType::URI((*n).try_into().unwrap()))
            .collect();
        params.serialize_request(&key).unwrap().der().to_vec()
    };
    let cases = [
        (csr(&[CART]), true),
        (csr(&[FRONT]), false),
        (csr(&[CART, FRONT]), false),
        (vec![0; 9], false),
    ];
    let requests = cases.iter().map(|(csr_der, _)| SigningRequest {
        identity: CART.to_owned(),
        csr_der: csr_der.clone(),
    });
    let requests = SignRequest {
        requests: requests.collect(),
    };
    let results = client.sign(requests).await.unwrap().into_inner().results;
    assert_eq!(results.len(), cases.len());
    for (result, (_, good)) in results.iter().zip(cases) {
        assert_eq!(
            matches!(result.outcome, Some(SigningOutcome::Chain(_))),
            good,
            "{result:?}"
        );
    }
}

#[tokio::test]
async fn a_certificate_of_another_kind_or_another_root_opens_nothing() {
    let controller = Controller::start();
    controller.apply(&two_nodes(), &[]).good();
    let node = bootstrap(&controller, "node-1", &controller.token("node-1"))
        .await
        .unwrap();
    let mut client = connect(&controller, Some(&node)).await.unwrap();
    let workload = sign(&mut client, CART).await.unwrap().unwrap();

    let stranger = Controller::start();
    let foreign = bootstrap(&stranger, "node-1", &stranger.token("node-1")).await.unwrap();

    for identity in [&workload, &foreign] {
        // TLS 1.3 tells the client of its refusal with the first answer, or as it connects.
        let refused = match connect(&controller, Some(identity)).await {
            Err(_) => true,
            Ok(client) => Agent::open(client, "node-1", 0).await.is_err(),
        };
        assert!(refused);
    }

    let nobody = connect_with(controller.address(), rustls::RootCertStore::empty(), None).await;
    assert!(
        nobody.is_err(),
        "an agent must be able to tell the controller from a stranger"
    );
}

#[tokio::test]
async fn a_stream_belongs_to_the_node_of_the_certificate() {
    let controller = Controller::start();
    let identity = bootstrap(&controller, "node-1", &controller.token("node-1"))
        .await
        .unwrap();
    let mut agent = Agent::with(&controller, &identity, "node-2", 0).await.unwrap();
    assert_eq!(agent.next().await.err().map(|s| s.code()), Some(Code::PermissionDenied));
    let anonymous = connect(&controller, None).await.unwrap();
    let refused = Agent::open(anonymous, "node-1", 0).await;
    assert_eq!(refused.err().map(|s| s.code()), Some(Code::Unauthenticated));
}

#[tokio::test]
async fn an_expired_token_admits_nobody() {
    let controller = Controller::start();
    let token = controller
        .ctl(&["token", "create", "--node", "node-1", "--ttl", "1s"])
        .good();
    let deadline = tokio::time::Instant::now() + crate::world::PATIENCE;
    let client = connect(&controller, None).await.unwrap();
    loop {
        match bootstrap_by(client.clone(), "node-1", token.trim()).await {
            Ok(_) => assert!(tokio::time::Instant::now() < deadline, "the token never expired"),
            Err(status) => {
                assert_eq!(status.code(), Code::PermissionDenied, "{status}");
                break;
            }
        }
    }
}
