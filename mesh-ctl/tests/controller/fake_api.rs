//! An API server in memory: what the controller asks of one, and the ways in which one fails.
//!
//! Lists with pages, watches from a resource version, optimistic concurrency, the status subresource, TokenReviews.
//! Tests put objects in as users would, compact its history, cut its watches, or take it down. It knows nothing of what
//! the controller should do with any of it.

use std::{collections::BTreeMap, convert::Infallible, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use futures_util::stream;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Frame, Incoming},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;

/// `group/plural/namespace/name`; the group of core kinds and the namespace of cluster-wide objects are empty.
type Key = (String, String, String, String);

struct Event {
    version: u64,
    kind: &'static str,
    key: Key,
    object: Value,
}

#[derive(Default)]
struct State {
    version: u64,
    objects: BTreeMap<Key, Value>,
    events: Vec<Event>,
    /// Watches from before this version are told that it is gone.
    compacted: u64,
    /// How often a watch was told so.
    expired: usize,
    down: bool,
    silent: bool,
    tokens: BTreeMap<String, Value>,
    /// Plurals whose next writes conflict.
    conflicts: BTreeMap<String, usize>,
    /// Plurals that nobody may ask for.
    forbidden: Vec<String>,
    requests: Vec<String>,
}

struct Inner {
    state: Mutex<State>,
    changed: watch::Sender<u64>,
    cut: Mutex<CancellationToken>,
}

/// See the module.
#[derive(Clone)]
pub struct FakeApi {
    inner: Arc<Inner>,
    pub address: SocketAddr,
}

/// What a path names.
#[derive(Debug)]
struct Target {
    group: String,
    version: String,
    plural: String,
    namespace: String,
    name: Option<String>,
    status: bool,
}

type Body = BoxBody<Bytes, Infallible>;

fn target(path: &str) -> Option<Target> {
    let mut parts = path.trim_start_matches('/').split('/').peekable();
    let (group, version) = match parts.next()? {
        "api" => (String::new(), parts.next()?.to_owned()),
        "apis" => (parts.next()?.to_owned(), parts.next()?.to_owned()),
        _ => return None,
    };
    let mut namespace = String::new();
    let mut plural = parts.next()?.to_owned();
    if plural == "namespaces"
        && let Some(name) = parts.next()
    {
        match parts.next() {
            Some(inner) => {
                namespace = name.to_owned();
                plural = inner.to_owned();
            }
            None => {
                return Some(Target {
                    group,
                    version,
                    plural,
                    namespace,
                    name: Some(name.to_owned()),
                    status: false,
                });
            }
        }
    }
    Some(Target {
        group,
        version,
        plural,
        namespace,
        name: parts.next().map(str::to_owned),
        status: parts.next() == Some("status"),
    })
}

fn query<'a>(uri: &'a hyper::Uri, key: &str) -> Option<&'a str> {
    let pairs = uri.query()?.split('&').filter_map(|pair| pair.split_once('='));
    pairs.into_iter().find(|(k, _)| *k == key).map(|(_, value)| value)
}

fn plain(status: StatusCode, value: &Value) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from(value.to_string())).boxed());
    *response.status_mut() = status;
    let json = hyper::header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, json);
    response
}

fn refuse(code: u16, reason: &str) -> Response<Body> {
    let status = json!({
        "apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code, "reason": reason,
        "message": reason,
    });
    plain(StatusCode::from_u16(code).unwrap(), &status)
}

impl State {
    fn next(&mut self) -> u64 {
        self.version += 1;
        self.version
    }

    /// Stores an object and tells the watches.
    fn store(&mut self, key: Key, mut object: Value) -> Value {
        let version = self.next();
        let old = self.objects.get(&key);
        let generation = match old {
            None => 1,
            Some(old) if old["spec"] == object["spec"] => old["metadata"]["generation"].as_i64().unwrap_or(1),
            Some(old) => old["metadata"]["generation"].as_i64().unwrap_or(1) + 1,
        };
        let uid = old.map_or_else(|| format!("uid-{version}"), |old| text(&old["metadata"]["uid"]));
        let created = old.map_or_else(
            || "2026-01-01T00:00:00Z".to_owned(),
            |o| text(&o["metadata"]["creationTimestamp"]),
        );
        let metadata = &mut object["metadata"];
        metadata["resourceVersion"] = json!(version.to_string());
        metadata["generation"] = json!(generation);
        metadata["creationTimestamp"] = json!(created);
        if metadata["uid"].is_null() {
            metadata["uid"] = json!(uid);
        }
        let kind = if old.is_some() { "MODIFIED" } else { "ADDED" };
        self.objects.insert(key.clone(), object.clone());
        self.events.push(Event {
            version,
            kind,
            key,
            object: object.clone(),
        });
        object
    }

    fn remove(&mut self, key: &Key) -> Option<Value> {
        let mut object = self.objects.remove(key)?;
        let version = self.next();
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        self.events.push(Event {
            version,
            kind: "DELETED",
            key: key.clone(),
            object: object.clone(),
        });
        Some(object)
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// RFC 7396.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in patch {
        match value {
            Value::Null => {
                target.as_object_mut().unwrap().remove(key);
            }
            value => merge(&mut target[key], value),
        }
    }
}

fn group_of(api_version: &str) -> String {
    api_version.split_once('/').map_or("", |(group, _)| group).to_owned()
}

fn plural_of(kind: &str) -> String {
    let lower = kind.to_lowercase();
    match lower.strip_suffix('y') {
        Some(stem) => format!("{stem}ies"),
        None => format!("{lower}s"),
    }
}

fn key_of(object: &Value) -> Key {
    (
        group_of(&text(&object["apiVersion"])),
        plural_of(&text(&object["kind"])),
        text(&object["metadata"]["namespace"]),
        text(&object["metadata"]["name"]),
    )
}

impl FakeApi {
    /// One that knows the mesh's definitions and those of HTTPRoute and ReferenceGrant.
    pub async fn start() -> FakeApi {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let api = FakeApi {
            address: listener.local_addr().unwrap(),
            inner: Arc::new(Inner {
                state: Mutex::default(),
                changed: watch::Sender::new(0),
                cut: Mutex::default(),
            }),
        };
        for kind in [
            "MeshPolicy",
            "TrafficPolicy",
            "RateLimit",
            "AccessPolicy",
            "ServiceSubset",
        ] {
            api.define("nodemesh.io", kind, "v1alpha1");
        }
        for kind in ["HTTPRoute", "ReferenceGrant"] {
            api.define("gateway.networking.k8s.io", kind, "v1");
        }
        let serving = api.clone();
        tokio::spawn(async move {
            loop {
                let Ok((tcp, _)) = listener.accept().await else { return };
                let api = serving.clone();
                if api.inner.state.lock().down {
                    continue;
                }
                tokio::spawn(async move {
                    let cut = api.inner.cut.lock().clone();
                    let service = service_fn(|request| {
                        let api = api.clone();
                        async move { Ok::<_, Infallible>(api.answer(request).await) }
                    });
                    let connection =
                        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(tcp), service);
                    let _ = cut.run_until_cancelled(connection).await;
                });
            }
        });
        api
    }

    /// A kubeconfig that leads here.
    pub fn kubeconfig(&self, dir: &Path) -> std::path::PathBuf {
        let path = dir.join("kubeconfig");
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": {"server": format!("http://{}", self.address)}}],
            "users": [{"name": "fake", "user": {"token": "fake"}}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
        });
        std::fs::write(&path, config.to_string()).unwrap();
        path
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let done = change(&mut self.inner.state.lock());
        self.inner.changed.send_modify(|count| *count += 1);
        done
    }

    /// Installs a definition.
    pub fn define(&self, group: &str, kind: &str, version: &str) {
        self.apply(json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": format!("{}.{group}", plural_of(kind))},
            "spec": {"group": group, "versions": [{"name": version, "served": true, "storage": true}]},
            "status": {"conditions": [{"type": "Established", "status": "True"}]},
        }));
    }

    /// Puts an object in, or over the one that is there; a status that is not given stays.
    pub fn apply(&self, mut object: Value) -> Value {
        let key = key_of(&object);
        self.change(|state| {
            if let Some(old) = state.objects.get(&key)
                && object["status"].is_null()
                && !old["status"].is_null()
            {
                object["status"] = old["status"].clone();
            }
            state.store(key, object)
        })
    }

    /// Puts in what a YAML text says.
    pub fn apply_yaml(&self, yaml: &str) {
        use serde::Deserialize;
        for document in serde_yaml_ng::Deserializer::from_str(yaml) {
            self.apply(Value::deserialize(document).unwrap());
        }
    }

    pub fn delete(&self, api_version: &str, kind: &str, namespace: &str, name: &str) {
        let key = (
            group_of(api_version),
            plural_of(kind),
            namespace.to_owned(),
            name.to_owned(),
        );
        self.change(|state| state.remove(&key))
            .expect("there is no such object");
    }

    pub fn get(&self, api_version: &str, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        let key = (
            group_of(api_version),
            plural_of(kind),
            namespace.to_owned(),
            name.to_owned(),
        );
        self.inner.state.lock().objects.get(&key).cloned()
    }

    /// All objects of a kind.
    pub fn all(&self, api_version: &str, kind: &str) -> Vec<Value> {
        let (group, plural) = (group_of(api_version), plural_of(kind));
        let state = self.inner.state.lock();
        let found = state
            .objects
            .iter()
            .filter(|((g, p, ..), _)| *g == group && *p == plural);
        found.map(|(_, object)| object.clone()).collect()
    }

    /// Whatever answers `wanted` first; the test's patience bounds the wait.
    pub async fn wait_for<T>(&self, what: &str, wanted: impl Fn(&FakeApi) -> Option<T>) -> T {
        let mut changed = self.inner.changed.subscribe();
        let found = async {
            loop {
                changed.borrow_and_update();
                if let Some(found) = wanted(self) {
                    return found;
                }
                changed.changed().await.unwrap();
            }
        };
        let patience = tokio::time::timeout(crate::world::PATIENCE, found).await;
        patience.unwrap_or_else(|_| panic!("{what} did not come in time"))
    }

    /// Ends every connection.
    pub fn cut(&self) {
        std::mem::take(&mut *self.inner.cut.lock()).cancel();
    }

    /// Forgets the history: every watch that comes back must list again.
    pub fn compact(&self) {
        self.change(|state| {
            state.compacted = state.version;
            state.events.clear();
        });
    }

    /// Ends every connection and answers nobody until told otherwise.
    pub fn down(&self, down: bool) {
        self.inner.state.lock().down = down;
        self.cut();
    }

    /// Takes requests and answers none until told otherwise; the connections stay.
    pub fn silent(&self, silent: bool) {
        self.change(|state| state.silent = silent);
    }

    /// The next `count` writes of this kind conflict.
    pub fn conflict(&self, plural: &str, count: usize) {
        self.inner.state.lock().conflicts.insert(plural.to_owned(), count);
    }

    /// Nobody may ask for this kind.
    pub fn forbid(&self, plural: &str) {
        self.inner.state.lock().forbidden.push(plural.to_owned());
    }

    /// What a TokenReview says of a token.
    pub fn token(&self, token: &str, status: Value) {
        self.inner.state.lock().tokens.insert(token.to_owned(), status);
    }

    /// `METHOD path` of every request so far that matches.
    pub fn requests(&self, part: &str) -> usize {
        let state = self.inner.state.lock();
        state.requests.iter().filter(|request| request.contains(part)).count()
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let (method, uri) = (request.method().clone(), request.uri().clone());
        self.inner.state.lock().requests.push(format!("{method} {uri}"));
        let Some(target) = target(uri.path()) else {
            return refuse(404, "NotFound");
        };
        let kind = request.headers().get(hyper::header::CONTENT_TYPE);
        let apply = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/apply-patch"));
        let body = request
            .into_body()
            .collect()
            .await
            .map(|body| body.to_bytes())
            .unwrap_or_default();
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let mut changed = self.inner.changed.subscribe();
        while self.inner.state.lock().silent {
            let _ = changed.changed().await;
        }
        let response = self.act(&method, &uri, &target, body, apply, changed);
        if method != Method::GET {
            self.inner.changed.send_modify(|count| *count += 1);
        }
        response
    }

    fn act(
        &self,
        method: &Method,
        uri: &hyper::Uri,
        target: &Target,
        body: Value,
        apply: bool,
        changed: watch::Receiver<u64>,
    ) -> Response<Body> {
        let mut state = self.inner.state.lock();
        if state.forbidden.contains(&target.plural) {
            return refuse(403, "Forbidden");
        }
        if target.plural == "tokenreviews" {
            let token = text(&body["spec"]["token"]);
            let nobody = json!({"authenticated": false, "error": "unknown token"});
            let status = state.tokens.get(&token).cloned().unwrap_or(nobody);
            let mut review = body;
            review["status"] = status;
            review["metadata"] = json!({});
            return plain(StatusCode::CREATED, &review);
        }
        let key = |name: &str| {
            (
                target.group.clone(),
                target.plural.clone(),
                target.namespace.clone(),
                name.to_owned(),
            )
        };
        if *method != Method::GET
            && let Some(left) = state.conflicts.get_mut(&target.plural).filter(|left| **left > 0)
        {
            *left -= 1;
            return refuse(409, "Conflict");
        }
        match (method, &target.name) {
            (&Method::GET, Some(name)) => match state.objects.get(&key(name)) {
                Some(object) => plain(StatusCode::OK, object),
                None => refuse(404, "NotFound"),
            },
            (&Method::GET, None) if query(uri, "watch") == Some("true") => {
                let from: u64 = query(uri, "resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(0);
                if from < state.compacted {
                    // Servers say it in either way.
                    state.expired += 1;
                    if state.expired.is_multiple_of(2) {
                        return refuse(410, "Expired");
                    }
                    let gone = json!({"kind": "Status", "status": "Failure", "code": 410, "reason": "Expired", "message": "gone"});
                    return plain(StatusCode::OK, &json!({"type": "ERROR", "object": gone}));
                }
                drop(state);
                self.watch(target, from, changed)
            }
            (&Method::GET, None) => list(&state, uri, target),
            (&Method::POST, None) => {
                let mut object = body;
                if !target.namespace.is_empty() {
                    object["metadata"]["namespace"] = json!(target.namespace);
                }
                let key = key(&text(&object["metadata"]["name"]));
                if state.objects.contains_key(&key) {
                    return refuse(409, "AlreadyExists");
                }
                plain(StatusCode::CREATED, &state.store(key, object))
            }
            (&Method::PUT, Some(name)) => {
                let key = key(name);
                match state.objects.get(&key) {
                    None => refuse(404, "NotFound"),
                    Some(old) if old["metadata"]["resourceVersion"] != body["metadata"]["resourceVersion"] => {
                        refuse(409, "Conflict")
                    }
                    Some(_) => plain(StatusCode::OK, &state.store(key, body)),
                }
            }
            (&Method::PATCH, Some(name)) => {
                let key = key(name);
                let Some(old) = state.objects.get(&key) else {
                    return match apply {
                        true => plain(StatusCode::CREATED, &state.store(key, body)),
                        false => refuse(404, "NotFound"),
                    };
                };
                for field in ["resourceVersion", "uid"] {
                    let wanted = &body["metadata"][field];
                    if !wanted.is_null() && *wanted != old["metadata"][field] {
                        return refuse(409, "Conflict");
                    }
                }
                let mut new = old.clone();
                // The subresource changes the status and nothing else.
                let patch = match target.status {
                    true => json!({ "status": body["status"] }),
                    false => body,
                };
                merge(&mut new, &patch);
                plain(StatusCode::OK, &state.store(key, new))
            }
            _ => refuse(405, "MethodNotAllowed"),
        }
    }

    /// The events after `from`, as they come.
    fn watch(&self, target: &Target, from: u64, changed: watch::Receiver<u64>) -> Response<Body> {
        let (group, plural, namespace) = (target.group.clone(), target.plural.clone(), target.namespace.clone());
        let api = self.clone();
        let lines = stream::unfold((api, changed, from), move |(api, mut changed, from)| {
            let (group, plural, namespace) = (group.clone(), plural.clone(), namespace.clone());
            async move {
                loop {
                    changed.borrow_and_update();
                    let (line, last) = {
                        let state = api.inner.state.lock();
                        let matches = |event: &&Event| {
                            let (g, p, n, _) = &event.key;
                            event.version > from
                                && *g == group
                                && *p == plural
                                && (namespace.is_empty() || *n == namespace)
                        };
                        let mut last = from;
                        let mut line = String::new();
                        for event in state.events.iter().filter(matches) {
                            line += &json!({"type": event.kind, "object": event.object}).to_string();
                            line.push('\n');
                            last = event.version;
                        }
                        (line, last)
                    };
                    if !line.is_empty() {
                        let frame = Ok::<_, Infallible>(Frame::data(Bytes::from(line)));
                        return Some((frame, (api, changed, last)));
                    }
                    changed.changed().await.ok()?;
                }
            }
        });
        Response::new(BodyExt::boxed(StreamBody::new(lines)))
    }
}

fn list(state: &State, uri: &hyper::Uri, target: &Target) -> Response<Body> {
    let matches = |key: &Key| {
        key.0 == target.group && key.1 == target.plural && (target.namespace.is_empty() || key.2 == target.namespace)
    };
    let all: Vec<&Value> = state
        .objects
        .iter()
        .filter(|(key, _)| matches(key))
        .map(|(_, o)| o)
        .collect();
    // Pages are small here, so that there are some.
    let limit = query(uri, "limit").map_or(usize::MAX, |_| (all.len() / 5).clamp(3, 500));
    let start: usize = query(uri, "continue").and_then(|v| v.parse().ok()).unwrap_or(0);
    let end = start.saturating_add(limit).min(all.len());
    let mut metadata = json!({ "resourceVersion": state.version.to_string() });
    if end < all.len() {
        metadata["continue"] = json!(end.to_string());
    }
    // Items of a list do not say what they are.
    let items: Vec<Value> = all[start.min(end)..end]
        .iter()
        .map(|object| {
            let mut item = (*object).clone();
            item.as_object_mut()
                .unwrap()
                .retain(|key, _| key != "apiVersion" && key != "kind");
            item
        })
        .collect();
    let version = match target.group.is_empty() {
        true => target.version.clone(),
        false => format!("{}/{}", target.group, target.version),
    };
    let list = json!({"apiVersion": version, "kind": "List", "metadata": metadata, "items": items});
    plain(StatusCode::OK, &list)
}

/// How long a test watches that something does not happen.
pub const A_WHILE: Duration = Duration::from_millis(700);
