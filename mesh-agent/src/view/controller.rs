//! The connection to the controller: TLS that believes a SPIFFE id instead of a host name, and the calls on it.
//!
//! A controller is whoever proves `spiffe://<trust-domain>/controller` under a trusted root, wherever it runs. The
//! agent shows its node certificate once it has one. Nothing here decides when to connect or what an answer means.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use hyper_util::rt::TokioIo;
use mesh_api::{
    identity::SpiffeId,
    wire::{
        MESSAGE_BYTES_MAX,
        control::{BootstrapRequest, ControlClient, SignRequest, SigningOutcome, SigningRequest as WireRequest},
    },
};
use parking_lot::Mutex;
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::{net::TcpStream, sync::watch};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::{
    codegen::{Service, http::Uri},
    transport::{Channel, Endpoint},
};
use webpki::KeyUsage;

use super::node::{self, NodeCredential, NodeCredentialError, Pending};
use crate::identity::{
    TrustBundle,
    issue::{SignError, Signed, Signer, SigningRequest},
    provider,
};

/// Silence after which the controller is asked whether it is still there.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// How long it may take to answer that.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a call to the controller came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// No connection, or no handshake.
    #[error("cannot connect to the controller: {0}")]
    Connect(String),
    /// It said no, or nothing.
    #[error("the controller refused: {}", .0.message())]
    Call(#[from] Box<tonic::Status>),
    /// No answer in time.
    #[error("the controller did not answer within {} ms", .0.as_millis())]
    Timeout(Duration),
    /// It gave a certificate that is of no use.
    #[error("the certificate that was given is of no use: {0}")]
    Certificate(#[from] NodeCredentialError),
    /// The node has no certificate and no token to get one.
    #[error("no node certificate, and no join token to get one")]
    NoToken,
    /// The join token cannot be read.
    #[error("cannot read the join token: {0}")]
    Token(#[source] io::Error),
    /// The TLS configuration could not be made.
    #[error("cannot make the TLS configuration: {0}")]
    Tls(#[from] rustls::Error),
    /// The controller serves another mesh.
    #[error("the controller is of trust domain {0:?}, not ours")]
    TrustDomain(String),
}

/// How the controller is reached and believed.
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub address: String,
    pub node: SpiffeId,
    pub controller: SpiffeId,
    pub connect_timeout: Duration,
    pub call_timeout: Duration,
}

/// Believes one identity under one bundle.
#[derive(Debug)]
struct ControllerVerifier {
    bundle: Arc<TrustBundle>,
    controller: SpiffeId,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for ControllerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        issuers: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(now.as_secs());
        node::verify(leaf, issuers, &self.bundle, now, KeyUsage::server_auth())
            .and_then(|()| node::names_only(leaf, &self.controller))
            .and_then(|named| {
                if named {
                    Ok(ServerCertVerified::assertion())
                } else {
                    Err(NodeCredentialError::OtherIdentity(self.controller.clone()))
                }
            })
            .map_err(|error| {
                rustls::Error::InvalidCertificate(rustls::CertificateError::Other(rustls::OtherError(Arc::new(error))))
            })
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is never spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn tls_config(
    bundle: Arc<TrustBundle>,
    controller: SpiffeId,
    credential: Option<&NodeCredential>,
) -> Result<ClientConfig, rustls::Error> {
    let provider = provider();
    let verifier = ControllerVerifier {
        bundle,
        controller,
        algorithms: provider.signature_verification_algorithms,
    };
    let builder = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match credential {
        Some(credential) => builder.with_client_auth_cert(credential.chain(), credential.key())?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.enable_sni = false;
    // A resumed session would not show a renewed certificate; connections are few.
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// Opens the byte stream that tonic speaks on.
#[derive(Clone)]
struct Connector {
    address: String,
    tls: TlsConnector,
    timeout: Duration,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let Connector { address, tls, timeout } = self.clone();
        Box::pin(async move {
            let opened = async {
                let tcp = TcpStream::connect(&address).await?;
                tcp.set_nodelay(true)?;
                // The name is never sent and never looked at; the verifier believes an identity.
                let name = ServerName::try_from("controller").map_err(io::Error::other)?;
                tls.connect(name, tcp).await.map(TokioIo::new)
            };
            match tokio::time::timeout(timeout, opened).await {
                Ok(opened) => opened,
                Err(_) => Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("no connection to {address} within {} ms", timeout.as_millis()),
                )),
            }
        })
    }
}

/// An error with everything beneath it, once.
fn chain_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

impl Link {
    /// Connects, showing the node's certificate if there is one.
    pub(super) async fn connect(
        &self,
        bundle: Arc<TrustBundle>,
        credential: Option<&NodeCredential>,
    ) -> Result<Channel, LinkError> {
        let config = tls_config(bundle, self.controller.clone(), credential)?;
        let connector = Connector {
            address: self.address.clone(),
            tls: TlsConnector::from(Arc::new(config)),
            timeout: self.connect_timeout,
        };
        Endpoint::from_static("http://controller")
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .connect_with_connector(connector)
            .await
            .map_err(|error| LinkError::Connect(chain_of(&error)))
    }

    /// Waits for an answer for a bounded time.
    pub(super) async fn answer<T>(
        &self,
        call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    ) -> Result<T, LinkError> {
        match tokio::time::timeout(self.call_timeout, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(LinkError::Call(Box::new(status))),
            Err(_) => Err(LinkError::Timeout(self.call_timeout)),
        }
    }

    /// Gets a node certificate: with a join token, or with the certificate that the channel shows.
    pub(super) async fn bootstrap(
        &self,
        channel: Channel,
        join_token: &str,
        bundle: &Arc<TrustBundle>,
        now: SystemTime,
    ) -> Result<NodeCredential, LinkError> {
        let pending = Pending::new(&self.node)?;
        let request = BootstrapRequest {
            join_token: join_token.to_owned(),
            node_name: self.node.node_name().unwrap_or_default().to_owned(),
            csr_der: pending.csr.clone(),
        };
        let response = self.answer(client(channel).bootstrap(request)).await?;
        if response.trust_domain != self.node.trust_domain() {
            return Err(LinkError::TrustDomain(response.trust_domain));
        }
        let chain = response.chain.unwrap_or_default().certificates_der;
        Ok(pending.certified(chain, &self.node, bundle, now)?)
    }
}

/// The generated client with our bounds.
pub(super) fn client(channel: Channel) -> ControlClient<Channel> {
    ControlClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}

/// Calls on whatever connection there is now. Cheap to clone; the issuer holds one.
#[derive(Clone)]
pub struct ControllerClient {
    pub(super) link: Arc<Link>,
    pub(super) channel: Arc<Mutex<Option<Channel>>>,
    pub(super) bundle: watch::Receiver<Arc<TrustBundle>>,
}

impl Signer for ControllerClient {
    async fn sign(&self, requests: Vec<SigningRequest>) -> Result<Signed, SignError> {
        let channel = self.channel.lock().clone();
        let channel = channel.ok_or_else(|| SignError("there is no connection".to_owned()))?;
        let asked = requests.len();
        let request = SignRequest {
            requests: requests
                .into_iter()
                .map(|request| WireRequest {
                    identity: request.identity.to_string(),
                    csr_der: request.csr,
                })
                .collect(),
        };
        let response = self
            .link
            .answer(client(channel).sign(request))
            .await
            .map_err(|error| SignError(error.to_string()))?;
        if response.results.len() != asked {
            return Err(SignError(format!(
                "{} answers to {asked} requests",
                response.results.len()
            )));
        }
        let chains = response
            .results
            .into_iter()
            .map(|result| match result.outcome {
                Some(SigningOutcome::Chain(chain)) => {
                    Ok(chain.certificates_der.into_iter().map(CertificateDer::from).collect())
                }
                Some(SigningOutcome::Refusal(reason)) => Err(reason),
                None => Err("an answer without an outcome".to_owned()),
            })
            .collect();
        Ok(Signed {
            bundle: self.bundle.borrow().clone(),
            chains,
        })
    }
}
