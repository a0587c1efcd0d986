//! A real controller in a directory of its own, and a scripted agent that speaks the real protocol to it.

use std::{
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        Arc,
        mpsc::{Receiver, channel},
    },
    time::Duration,
};

use hyper_util::rt::TokioIo;
use mesh_api::{
    document::{Resource, ResourceKey},
    wire::{
        MESSAGE_BYTES_MAX, Report, Update,
        control::{AgentMessage, BootstrapRequest, ControlClient, ControllerMessage, SignRequest, SigningRequest},
    },
    workload::{ObjectName, Revision},
};
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, pem::PemObject};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint, Uri},
};

/// No wait of a test is longer.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A controller process; killed when dropped.
pub struct Controller {
    pub dir: Arc<TempDir>,
    child: Child,
    log: Receiver<String>,
}

/// What a command came to.
#[derive(Debug)]
pub struct Done {
    pub code: i32,
    pub out: String,
    pub err: String,
}

fn done(output: Output) -> Done {
    Done {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

impl Done {
    #[track_caller]
    pub fn good(self) -> String {
        assert_eq!(self.code, 0, "{self:?}");
        self.out
    }

    pub fn json(self) -> serde_json::Value {
        serde_json::from_str(&self.good()).unwrap()
    }
}

pub fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-ctl"));
    command.env_remove("MESH_CTL_SOCKET").env_remove("RUST_LOG");
    command
}

/// Runs `mesh-ctl` with standard input.
pub fn ctl_at(socket: &Path, args: &[&str], input: &str) -> Done {
    let mut child = program()
        .arg("--socket")
        .arg(socket)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that does not read its input closes it.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    done(child.wait_with_output().unwrap())
}

pub fn controller_command(dir: &Path, more: &[&str]) -> Command {
    let mut command = program();
    command
        .args(["controller", "--standalone", "--listen", "127.0.0.1:0"])
        .arg("--data-dir")
        .arg(dir.join("data"))
        .arg("--operator-socket")
        .arg(dir.join("operator.sock"))
        .args(more)
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    command
}

impl Controller {
    pub fn start() -> Controller {
        Controller::start_in(Arc::new(tempfile::tempdir().unwrap()), &[])
    }

    pub fn start_in(dir: Arc<TempDir>, more: &[&str]) -> Controller {
        let mut child = controller_command(dir.path(), more).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, log) = channel();
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let controller = Controller { dir, child, log };
        controller.wait_for_log("the controller serves");
        controller
    }

    #[track_caller]
    pub fn wait_for_log(&self, text: &str) {
        let mut seen = Vec::new();
        while let Ok(line) = self.log.recv_timeout(PATIENCE) {
            if line.contains(text) {
                return;
            }
            seen.push(line);
        }
        panic!("no {text:?} in the log: {seen:#?}");
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("operator.sock")
    }

    pub fn address(&self) -> SocketAddr {
        let text = std::fs::read_to_string(self.dir.path().join("data/address")).unwrap();
        text.trim().parse().unwrap()
    }

    pub fn ctl(&self, args: &[&str]) -> Done {
        ctl_at(&self.socket(), args, "")
    }

    pub fn apply(&self, yaml: &str, more: &[&str]) -> Done {
        let args = [&["policy", "apply", "-f", "-"], more].concat();
        ctl_at(&self.socket(), &args, yaml)
    }

    /// Like [`Controller::ctl`], beside the test's own tasks.
    pub async fn ctl_beside(&self, args: &'static [&'static str], input: String) -> tokio::task::JoinHandle<Done> {
        let socket = self.socket();
        tokio::task::spawn_blocking(move || ctl_at(&socket, args, &input))
    }

    pub fn token(&self, node: &str) -> String {
        self.ctl(&["token", "create", "--node", node]).good().trim().to_owned()
    }

    /// As `kill -9`.
    pub fn kill(mut self) -> Arc<TempDir> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.dir.clone()
    }

    /// As `kill -TERM`; the exit code.
    pub fn stop(mut self) -> (Arc<TempDir>, i32) {
        let status = Command::new("kill").arg(self.child.id().to_string()).status().unwrap();
        assert!(status.success());
        let code = self.child.wait().unwrap().code().unwrap_or(-1);
        (self.dir.clone(), code)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A key and the chain that was signed for it.
pub struct Identity {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: KeyPair,
}

/// A key and a CSR without names.
pub fn new_request() -> (KeyPair, Vec<u8>) {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let csr = params.serialize_request(&key).unwrap().der().to_vec();
    (key, csr)
}

pub fn chain_of(chain: mesh_api::wire::control::Chain) -> Vec<CertificateDer<'static>> {
    chain.certificates_der.into_iter().map(CertificateDer::from).collect()
}

fn roots(controller: &Controller) -> rustls::RootCertStore {
    let bundle = controller.ctl(&["bundle"]).good();
    let mut roots = rustls::RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(bundle.as_bytes()) {
        roots.add(root.unwrap()).unwrap();
    }
    roots
}

/// Connects to the agents' port, verifying the controller by its bundle.
pub async fn connect(controller: &Controller, identity: Option<&Identity>) -> Result<ControlClient<Channel>, String> {
    connect_with(controller.address(), roots(controller), identity).await
}

/// The connection alone, for messages of other releases.
pub async fn connect_channel(controller: &Controller, identity: &Identity) -> Channel {
    let channel = dial(controller.address(), roots(controller), Some(identity)).await;
    channel.unwrap()
}

pub async fn connect_with(
    address: SocketAddr,
    roots: rustls::RootCertStore,
    identity: Option<&Identity>,
) -> Result<ControlClient<Channel>, String> {
    let channel = dial(address, roots, identity).await?;
    Ok(ControlClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX))
}

async fn dial(
    address: SocketAddr,
    roots: rustls::RootCertStore,
    identity: Option<&Identity>,
) -> Result<Channel, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(identity.key.serialize_der()));
            builder.with_client_auth_cert(identity.chain.clone(), key).unwrap()
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let connect = tower::service_fn(move |_: Uri| {
        let connector = connector.clone();
        async move {
            let tcp = TcpStream::connect(address).await?;
            let name = ServerName::from(address.ip());
            connector.connect(name, tcp).await.map(TokioIo::new)
        }
    });
    Endpoint::from_static("http://controller")
        .timeout(PATIENCE)
        .connect_with_connector(connect)
        .await
        .map_err(|e| format!("{e:?}"))
}

/// Joins with a token.
pub async fn bootstrap(controller: &Controller, node: &str, token: &str) -> Result<Identity, Status> {
    let client = connect(controller, None).await.map_err(Status::unavailable)?;
    bootstrap_by(client, node, token).await
}

pub async fn bootstrap_by(mut client: ControlClient<Channel>, node: &str, token: &str) -> Result<Identity, Status> {
    let (key, csr_der) = new_request();
    let request = BootstrapRequest {
        join_token: token.to_owned(),
        node_name: node.to_owned(),
        csr_der,
    };
    let response = client.bootstrap(request).await?.into_inner();
    assert_eq!(response.trust_domain, "cluster.local");
    assert!(!response.trust_bundle.unwrap().roots_der.is_empty());
    Ok(Identity {
        chain: chain_of(response.chain.unwrap()),
        key,
    })
}

/// Asks for a workload's certificate; a refusal is the inner error.
pub async fn sign(client: &mut ControlClient<Channel>, identity: &str) -> Result<Result<Identity, String>, Status> {
    use mesh_api::wire::control::SigningOutcome;
    let (key, csr_der) = new_request();
    let identity = identity.to_owned();
    let requests = vec![SigningRequest { identity, csr_der }];
    let response = client.sign(SignRequest { requests }).await?.into_inner();
    let result = response.results.into_iter().next().unwrap();
    Ok(match result.outcome.unwrap() {
        SigningOutcome::Chain(chain) => Ok(Identity {
            chain: chain_of(chain),
            key,
        }),
        SigningOutcome::Refusal(reason) => Err(reason),
    })
}

/// An agent whose every word is the test's.
pub struct Agent {
    sender: tokio::sync::mpsc::Sender<AgentMessage>,
    stream: Streaming<ControllerMessage>,
}

impl Agent {
    pub async fn connect(controller: &Controller, node: &str, resume: u64) -> Agent {
        let identity = bootstrap(controller, node, &controller.token(node)).await.unwrap();
        Agent::with(controller, &identity, node, resume).await.unwrap()
    }

    pub async fn with(controller: &Controller, identity: &Identity, node: &str, resume: u64) -> Result<Agent, Status> {
        let client = connect(controller, Some(identity)).await.map_err(Status::unavailable)?;
        Agent::open(client, node, resume).await
    }

    pub async fn open(mut client: ControlClient<Channel>, node: &str, resume: u64) -> Result<Agent, Status> {
        let (sender, receiver) = tokio::sync::mpsc::channel(16);
        let hello = Report::Hello {
            stamp: 0,
            node: node.to_owned(),
            agent_version: "0.1.0-test".to_owned(),
            resume: Revision(resume),
            abi_version: 7,
        };
        sender.send(hello.into()).await.unwrap();
        // The call's own limit is not for streams.
        let stream = client.sync(ReceiverStream::new(receiver)).await?.into_inner();
        Ok(Agent { sender, stream })
    }

    pub async fn next(&mut self) -> Result<Update, Status> {
        let message = tokio::time::timeout(PATIENCE, self.stream.message()).await;
        let message = message.expect("no update came in time")?;
        Ok(message.expect("the stream has ended").try_into().unwrap())
    }

    pub async fn say(&self, report: Report) {
        self.sender.send(report.into()).await.unwrap();
    }

    /// A kind of message that only a newer agent knows.
    pub async fn say_the_unknown(&self) {
        self.sender.send(AgentMessage { message: None }).await.unwrap();
    }

    pub async fn ack(&self, revision: u64) {
        self.say(Report::Ack(Revision(revision))).await;
    }

    /// Takes and acks one update.
    pub async fn take(&mut self) -> Update {
        let update = self.next().await.unwrap();
        self.ack(revision_of(&update)).await;
        update
    }
}

pub fn revision_of(update: &Update) -> u64 {
    match update {
        Update::Snapshot { revision, .. } => revision.0,
        Update::Delta { to, .. } => to.0,
    }
}

/// The keys of a delta's upserts and removals, as text.
#[track_caller]
pub fn delta_of(update: &Update) -> (u64, u64, Vec<String>, Vec<String>) {
    let Update::Delta {
        from,
        to,
        upserts,
        removed,
        ..
    } = update
    else {
        panic!("expected a delta, got {update:?}");
    };
    let upserts = upserts.iter().map(|resource| key_text(&resource.key())).collect();
    (from.0, to.0, upserts, removed.iter().map(key_text).collect())
}

pub fn key_text(key: &ResourceKey) -> String {
    match key {
        ResourceKey::Workload(name) => format!("Workload {name}"),
        ResourceKey::Service(name) => format!("Service {name}"),
        ResourceKey::Policy(key) => key.to_string(),
    }
}

#[track_caller]
pub fn snapshot_of(update: Update) -> (u64, Vec<Resource>) {
    match update {
        Update::Snapshot {
            revision, resources, ..
        } => (revision.0, resources),
        other => panic!("expected a snapshot, got {other:?}"),
    }
}

pub fn workload<'a>(resources: &'a [Resource], namespace: &str, name: &str) -> &'a mesh_api::workload::Workload {
    let wanted = ObjectName::new(namespace, name);
    resources
        .iter()
        .find_map(|resource| match resource {
            Resource::Workload(workload) if workload.name == wanted => Some(workload),
            _ => None,
        })
        .unwrap_or_else(|| panic!("no workload {wanted}"))
}

pub const CLUSTER: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {nodemesh.io/mesh: enabled}}
---
apiVersion: v1
kind: Node
metadata: {name: node-1}
status: {addresses: [{type: InternalIP, address: 10.0.0.1}]}
---
apiVersion: v1
kind: Node
metadata: {name: node-2}
status: {addresses: [{type: InternalIP, address: 10.0.0.2}]}
";

pub fn pod(name: &str, node: &str, account: &str, address: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}, \
         annotations: {{nodemesh.io/netns: /run/netns/{name}}}}}\nspec:\n  nodeName: {node}\n  serviceAccountName: \
         {account}\n  containers: [{{name: main, ports: [{{containerPort: 8080}}], readinessProbe: {{httpGet: {{path: \
         /, port: 8081}}}}}}]\nstatus: {{podIP: {address}}}\n"
    )
}

pub fn service(name: &str, port: u16) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{selector: {{app: \
         {name}}}, ports: [{{port: {port}, name: http}}]}}\n"
    )
}

/// node-1 runs cart (account cart), node-2 runs front (account front).
pub fn two_nodes() -> String {
    [
        CLUSTER,
        &pod("cart", "node-1", "cart", "10.1.1.2"),
        &pod("front", "node-2", "front", "10.1.2.2"),
        &service("cart", 80),
    ]
    .concat()
}
