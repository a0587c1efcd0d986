//! The watches: one task per kind, list then watch, for ever. Objects become documents here and are dropped.
//!
//! What comes out is a bounded stream of [`Note`]s for the one task that owns the documents (`cluster.rs`). Kinds that
//! come with a CustomResourceDefinition may be absent; whether one is, its definition says and nothing else: an API
//! server that is starting or failing may deny for a moment that it knows a kind, and policies must not go with that.

use std::{pin::pin, sync::Arc, time::Duration};

use futures_util::StreamExt;
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject},
    core::{GroupVersionKind, PartialObjectMeta},
    runtime::{
        WatchStreamExt,
        utils::Backoff,
        watcher::{self, Event, watcher},
    },
};
use mesh_api::document::{Document, DocumentKey, Kind, Problem, read_object};
use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::health::Metrics;

/// Notes on their way to the owner of the documents.
pub const NOTES_MAX: usize = 1024;
/// Objects per page of a list.
const PAGE: u32 = 500;
/// The API server ends each watch after this time; a connection that died in silence is noticed a little later.
const WATCH_SECONDS: u32 = 60;
/// How long the definition of an absent kind goes unasked when nothing tells of it.
const RECHECK: Duration = Duration::from_secs(30);
/// A watch that lasted this long has worked.
const STEADY: Duration = Duration::from_secs(10);
/// How long a request may take.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// What happened to objects of a kind.
pub enum Note {
    /// A list begins: what it does not show is gone.
    Listing(Kind),
    /// An object, as it is now.
    Seen(Box<Seen>),
    /// It was deleted.
    Gone(DocumentKey),
    /// The list has been seen whole.
    Listed(Kind),
    /// The cluster does not have this kind.
    Absent(Kind),
}

/// An object, reduced to what matters.
pub struct Seen {
    /// What it is called.
    pub key: DocumentKey,
    /// What it says, or why it cannot be read.
    pub document: Result<Document, Vec<Problem>>,
    /// The object itself when it cannot be read: what holds then depends on what it said before.
    pub object: Option<Value>,
    /// For kinds whose status we write.
    pub state: Option<ObjectState>,
}

/// What writing an object's status needs to know.
#[derive(Clone, Debug, PartialEq)]
pub struct ObjectState {
    /// How the API server names the kind.
    pub resource: ApiResource,
    /// Of `metadata`.
    pub uid: String,
    /// Of `metadata`.
    pub resource_version: String,
    /// Of `metadata`.
    pub generation: i64,
    /// The status as it is.
    pub status: Value,
}

/// How the API server names a kind.
struct Watched {
    kind: &'static str,
    group: &'static str,
    plural: &'static str,
    /// The versions that we read, the best first. Kinds without a definition have the first.
    versions: &'static [&'static str],
    defined: bool,
}

const fn core(kind: &'static str, plural: &'static str) -> Watched {
    Watched {
        kind,
        group: "",
        plural,
        versions: &["v1"],
        defined: false,
    }
}

const fn route(kind: &'static str, plural: &'static str, versions: &'static [&'static str]) -> Watched {
    Watched {
        kind,
        group: "gateway.networking.k8s.io",
        plural,
        versions,
        defined: true,
    }
}

const fn own(kind: &'static str, plural: &'static str) -> Watched {
    Watched {
        kind,
        group: "nodemesh.io",
        plural,
        versions: &["v1alpha1"],
        defined: true,
    }
}

const WATCHED: [Watched; 15] = [
    core("Namespace", "namespaces"),
    core("Node", "nodes"),
    core("Pod", "pods"),
    core("Service", "services"),
    Watched {
        kind: "EndpointSlice",
        group: "discovery.k8s.io",
        plural: "endpointslices",
        versions: &["v1"],
        defined: false,
    },
    route("HTTPRoute", "httproutes", &["v1", "v1beta1"]),
    route("GRPCRoute", "grpcroutes", &["v1", "v1alpha2"]),
    route("TCPRoute", "tcproutes", &["v1", "v1alpha2"]),
    route("TLSRoute", "tlsroutes", &["v1", "v1alpha3", "v1alpha2"]),
    route("ReferenceGrant", "referencegrants", &["v1", "v1beta1"]),
    own("MeshPolicy", "meshpolicies"),
    own("TrafficPolicy", "trafficpolicies"),
    own("RateLimit", "ratelimits"),
    own("AccessPolicy", "accesspolicies"),
    own("ServiceSubset", "servicesubsets"),
];

/// The kinds that are watched.
pub fn kinds() -> impl Iterator<Item = Kind> {
    WATCHED.iter().filter_map(|watched| Kind::find(watched.kind))
}

impl Watched {
    fn resource(&self, version: &str) -> ApiResource {
        let kind = GroupVersionKind::gvk(self.group, version, self.kind);
        ApiResource::from_gvk_with_plural(&kind, self.plural)
    }

    fn definition(&self) -> String {
        format!("{}.{}", self.plural, self.group)
    }
}

/// What a kind's definition says.
#[derive(Debug, PartialEq, Eq)]
enum Defined {
    /// There is none, or the API server has not taken it into use.
    No,
    /// The best version that both sides know.
    Version(&'static str),
    /// It has no version that we know.
    Foreign(String),
}

fn definitions() -> ApiResource {
    let kind = GroupVersionKind::gvk("apiextensions.k8s.io", "v1", "CustomResourceDefinition");
    ApiResource::from_gvk_with_plural(&kind, "customresourcedefinitions")
}

/// Reads the served versions out of a definition.
fn served(watched: &Watched, definition: &Value) -> Defined {
    let established = definition["status"]["conditions"]
        .as_array()
        .is_some_and(|all| all.iter().any(|c| c["type"] == "Established" && c["status"] == "True"));
    if !established {
        return Defined::No;
    }
    let versions = definition["spec"]["versions"].as_array();
    let served: Vec<&str> = versions
        .into_iter()
        .flatten()
        .filter(|version| version["served"] == true)
        .filter_map(|version| version["name"].as_str())
        .collect();
    match watched.versions.iter().find(|ours| served.contains(ours)) {
        Some(best) => Defined::Version(best),
        None => Defined::Foreign(served.join(", ")),
    }
}

async fn ask(client: &Client, watched: &Watched) -> Result<Defined, kube::Error> {
    let api: Api<DynamicObject> = Api::all_with(client.clone(), &definitions());
    let asked = tokio::time::timeout(REQUEST_TIMEOUT, api.get_opt(&watched.definition())).await;
    let found = asked.map_err(|e| kube::Error::Service(e.into()))??;
    Ok(found.map_or(Defined::No, |definition| served(watched, &definition.data)))
}

/// Retries soon, and never gives up: 0.2 s, doubled to 5 s, with a third of jitter.
pub struct Patience(u32);

impl Patience {
    /// The first wait is next.
    pub fn new() -> Patience {
        Patience(0)
    }
}

impl Iterator for Patience {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let base = Duration::from_millis(200 << self.0.min(5)).min(Duration::from_secs(5));
        self.0 = self.0.saturating_add(1);
        Some(base.mul_f64(rand::random_range(0.7..1.0)))
    }
}

impl Backoff for Patience {
    fn reset(&mut self) {
        self.0 = 0;
    }
}

/// Starts all watches; they end with `stop`.
pub fn start(
    client: &Client,
    metrics: &Arc<Metrics>,
    notes: mpsc::Sender<Note>,
    stop: &CancellationToken,
    tasks: &tokio_util::task::TaskTracker,
) {
    let (tell, changed) = watch::channel(0);
    tasks.spawn(
        stop.clone()
            .run_until_cancelled_owned(watch_definitions(client.clone(), tell)),
    );
    for watched in &WATCHED {
        let Some(kind) = Kind::find(watched.kind) else { continue };
        let keeper = Keeper {
            client: client.clone(),
            metrics: metrics.clone(),
            watched,
            kind,
            notes: notes.clone(),
            changed: changed.clone(),
        };
        tasks.spawn(stop.clone().run_until_cancelled_owned(keeper.run()));
    }
}

/// Tells of every change of a definition; the definitions themselves (they are large) are not kept.
async fn watch_definitions(client: Client, tell: watch::Sender<u64>) {
    let api: Api<PartialObjectMeta<DynamicObject>> = Api::all_with(client, &definitions());
    let config = watcher::Config::default().timeout(WATCH_SECONDS).page_size(PAGE);
    let mut events = pin!(watcher(api, config).backoff(Patience::new()));
    while let Some(event) = events.next().await {
        if matches!(event, Ok(Event::Apply(_) | Event::Delete(_) | Event::InitDone)) {
            tell.send_modify(|count| *count += 1);
        }
    }
}

/// Watches one kind.
struct Keeper {
    client: Client,
    metrics: Arc<Metrics>,
    watched: &'static Watched,
    kind: Kind,
    notes: mpsc::Sender<Note>,
    changed: watch::Receiver<u64>,
}

/// Nobody takes notes any more.
struct Ended;

impl Keeper {
    async fn run(mut self) {
        let mut patience = Patience::new();
        loop {
            let version = match self.watched.defined {
                false => self.watched.versions[0],
                true => match self.find(&mut patience).await {
                    Ok(Some(version)) => version,
                    Ok(None) => continue,
                    Err(Ended) => return,
                },
            };
            let began = Instant::now();
            if self.follow(version).await.is_err() {
                return;
            }
            if began.elapsed() > STEADY {
                patience.reset();
            }
            tokio::time::sleep(patience.next().unwrap_or(RECHECK)).await;
        }
    }

    async fn say(&self, note: Note) -> Result<(), Ended> {
        self.notes.send(note).await.map_err(|_| Ended)
    }

    /// The version to watch; `None` after a wait for one.
    async fn find(&mut self, patience: &mut Patience) -> Result<Option<&'static str>, Ended> {
        self.changed.borrow_and_update();
        let wait = match ask(&self.client, self.watched).await {
            Ok(Defined::Version(version)) => return Ok(Some(version)),
            Ok(Defined::No) => {
                self.say(Note::Absent(self.kind)).await?;
                RECHECK
            }
            Ok(Defined::Foreign(served)) => {
                let wanted = self.watched.versions.join(", ");
                tracing::error!(kind = %self.kind, %served, %wanted, "the cluster serves no version of this kind that is known here");
                self.say(Note::Absent(self.kind)).await?;
                RECHECK
            }
            Err(error) => {
                self.failed(&error);
                patience.next().unwrap_or(RECHECK)
            }
        };
        let told = tokio::time::timeout(wait, self.changed.changed());
        // The teller lives as long as the watches do; without it the wait is what it would be anyway.
        if let Ok(Err(_)) = told.await {
            tokio::time::sleep(wait).await;
        }
        Ok(None)
    }

    fn failed(&self, error: &dyn std::error::Error) {
        self.metrics.watch_failed(self.kind.as_str());
        let cause = std::iter::successors(Some(error), |e| e.source()).last();
        let cause = cause.map(ToString::to_string).unwrap_or_default();
        tracing::warn!(kind = %self.kind, %error, %cause, "a watch was interrupted");
    }

    /// Lists and watches until the kind's definition has changed in a way that matters.
    async fn follow(&mut self, version: &'static str) -> Result<(), Ended> {
        let resource = self.watched.resource(version);
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
        let config = watcher::Config::default().timeout(WATCH_SECONDS).page_size(PAGE);
        let mut events = pin!(watcher(api, config).backoff(Patience::new()));
        tracing::debug!(kind = %self.kind, version, "watching");
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                _ = self.changed.changed(), if self.watched.defined => {
                    match ask(&self.client, self.watched).await {
                        Ok(Defined::Version(now)) if now == version => continue,
                        // Not known is not gone.
                        Err(_) => continue,
                        Ok(_) => return Ok(()),
                    }
                }
            };
            match event {
                None => return Ok(()),
                Some(Ok(Event::Init)) => self.say(Note::Listing(self.kind)).await?,
                Some(Ok(Event::InitDone)) => self.say(Note::Listed(self.kind)).await?,
                Some(Ok(Event::InitApply(object) | Event::Apply(object))) => {
                    if let Some(seen) = seen(self.kind, &resource, object) {
                        self.say(Note::Seen(Box::new(seen))).await?;
                    }
                }
                Some(Ok(Event::Delete(object))) => {
                    if let Some(key) = key_of(self.kind, &object) {
                        self.say(Note::Gone(key)).await?;
                    }
                }
                Some(Err(error)) => {
                    self.failed(&error);
                    // The watcher takes an expired version for one that may be good again, if it is told so as it
                    // starts a watch: only a new list helps.
                    if matches!(&error, watcher::Error::WatchStartFailed(kube::Error::Api(status)) if status.code == 410)
                    {
                        return Ok(());
                    }
                    if self.watched.defined && matches!(ask(&self.client, self.watched).await, Ok(Defined::No)) {
                        return Ok(());
                    }
                }
            }
        }
    }
}

fn key_of(kind: Kind, object: &DynamicObject) -> Option<DocumentKey> {
    let metadata = &object.metadata;
    let name = metadata.name.as_deref()?;
    Some(DocumentKey::new(
        kind,
        metadata.namespace.as_deref().unwrap_or_default(),
        name,
    ))
}

/// Whether the controller writes the kind's status.
fn has_status(kind: Kind) -> bool {
    kind.is_policy() && kind != Kind::ReferenceGrant
}

/// Reduces an object; one without a name is none.
fn seen(kind: Kind, resource: &ApiResource, mut object: DynamicObject) -> Option<Seen> {
    let key = key_of(kind, &object)?;
    object.metadata.managed_fields = None;
    let state = has_status(kind).then(|| ObjectState {
        resource: resource.clone(),
        uid: object.metadata.uid.clone().unwrap_or_default(),
        resource_version: object.metadata.resource_version.clone().unwrap_or_default(),
        generation: object.metadata.generation.unwrap_or_default(),
        status: object.data.get("status").cloned().unwrap_or(Value::Null),
    });
    let mut whole = match object.data {
        Value::Object(map) => Value::Object(map),
        _ => json!({}),
    };
    whole["metadata"] = serde_json::to_value(&object.metadata).unwrap_or_default();
    let document = read_object(kind, &whole, None);
    let unreadable = matches!(document, Ok(Document::Unreadable(_)));
    Some(Seen {
        document,
        object: unreadable.then_some(whole),
        key,
        state,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_definition_says_which_version_is_watched() {
        let definition = |established: &str, versions: &[(&str, bool)]| {
            let versions: Vec<_> = versions
                .iter()
                .map(|(name, served)| json!({"name": name, "served": served}))
                .collect();
            json!({
                "spec": {"versions": versions},
                "status": {"conditions": [{"type": "Established", "status": established}]},
            })
        };
        let route = WATCHED.iter().find(|w| w.kind == "TLSRoute").unwrap();
        let cases = [
            (
                definition("True", &[("v1alpha2", true), ("v1", true)]),
                Defined::Version("v1"),
            ),
            (
                definition("True", &[("v1alpha2", true), ("v1", false)]),
                Defined::Version("v1alpha2"),
            ),
            (definition("True", &[("v2", true)]), Defined::Foreign("v2".into())),
            (definition("False", &[("v1", true)]), Defined::No),
            (json!({}), Defined::No),
        ];
        for (definition, expected) in cases {
            assert_eq!(served(route, &definition), expected, "{definition}");
        }
    }

    #[test]
    fn an_object_is_reduced_to_what_matters() {
        let resource = WATCHED
            .iter()
            .find(|w| w.kind == "MeshPolicy")
            .unwrap()
            .resource("v1alpha1");
        let object: DynamicObject = serde_json::from_value(json!({
            "metadata": {
                "name": "strict", "namespace": "shop", "uid": "u", "resourceVersion": "7", "generation": 3,
                "managedFields": [{"manager": "kubectl"}],
            },
            "spec": {"targetRefs": [{"kind": "Namespace", "name": "shop"}], "mtls": {"mode": "strict"}},
            "status": {"conditions": []},
        }))
        .unwrap();
        let seen = seen(Kind::MeshPolicy, &resource, object).unwrap();
        assert_eq!(seen.key, DocumentKey::new(Kind::MeshPolicy, "shop", "strict"));
        let state = seen.state.unwrap();
        assert_eq!((state.generation, state.resource_version.as_str()), (3, "7"));
        assert_eq!(state.status, json!({"conditions": []}));
        assert_eq!(seen.document.unwrap().meta().generation, 3);
    }

    #[test]
    fn retries_grow_and_stay_bounded() {
        let waits: Vec<Duration> = Patience::new().take(40).collect();
        assert!(waits[0] < Duration::from_millis(201) && waits[0] > Duration::from_millis(100));
        assert!(waits.iter().all(|wait| *wait <= Duration::from_secs(5)));
        assert!(waits[39] > Duration::from_secs(3));
    }
}
