//! The JSON schemas of our own kinds, as the Kubernetes API server wants them: structural, no references, CEL for what
//! a schema cannot say. Compiled only with the feature `schema`, for `cargo xtask gen`.
//!
//! The readers in this folder stay the judges: a schema may take what a reader refuses (the controller then says so in
//! the status), never the other way round. Unknown fields are kept by the API server, not pruned: a misspelt guard has
//! to reach the reader, which refuses it, instead of becoming a rule without that guard.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings, json_schema};
use serde_json::{Map, Value, json};

use super::{
    AccessPolicy, Duration, GROUP, HeaderMatch, HostMatch, IdentityMatch, LimitKeyField, MeshPolicy, PathMatch,
    RateLimit, RetryCondition, ServiceSubset, TrafficPolicy,
};

/// A duration in the Gateway API's form.
const DURATION: &str = "^([0-9]{1,5}(h|m|s|ms)){1,4}$";
const DNS_LABEL: &str = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$";
const DNS_NAME: &str = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$";
const TOKEN: &str = "^[A-Za-z0-9!#$%&'*+.^_`|~-]+$";
const UPPER_TOKEN: &str = "^[A-Z0-9!#$%&'*+.^_`|~-]+$";

/// One `x-kubernetes-validations` rule.
pub(super) fn rule(rule: &str, message: &str) -> Value {
    json!([{"rule": rule, "message": message}])
}

pub(super) fn dns_label(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "minLength": 1, "maxLength": 63, "pattern": DNS_LABEL})
}

pub(super) fn dns_name(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "minLength": 1, "maxLength": 253, "pattern": DNS_NAME})
}

/// A duration of more than zero.
pub(super) fn some_time(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "maxLength": 28,
        "pattern": DURATION,
        "x-kubernetes-validations": [{
            "rule": "self.matches('[1-9]')",
            "message": "is zero: expected a duration of more than zero, such as 500ms or 1m30s",
        }],
    })
}

/// `on` is a boolean to readers of YAML 1.1, kubectl among them; `retryOn` is the same list.
pub(super) fn retry_on(schema: &mut Schema) {
    let Some(on) = schema.pointer("/properties/on").cloned() else {
        return;
    };
    if let Some(Value::Array(required)) = schema.get_mut("required") {
        required.retain(|name| name != "on");
    }
    if let Some(Value::Object(properties)) = schema.get_mut("properties") {
        properties.insert("retryOn".to_owned(), on);
    }
    let message = "expected retryOn, or on in quotes (without them YAML takes it for a boolean), and not both";
    schema.insert(
        "x-kubernetes-validations".to_owned(),
        rule("has(self.on) != has(self.retryOn)", message),
    );
}

pub(super) fn labels(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "minProperties": 1,
        "maxProperties": 256,
        "additionalProperties": {"type": "string", "maxLength": 63},
    })
}

/// What stands for a checked text where the value's type is a plain one.
macro_rules! text {
    ($(#[$doc:meta])* $name:ident, $schema:tt) => {
        $(#[$doc])*
        pub(super) struct $name;
        inline!($name, $schema);
    };
}

/// A schema that is written where it is used: a structural schema has no references.
macro_rules! inline {
    ($type:ty, $schema:tt) => {
        impl JsonSchema for $type {
            fn inline_schema() -> bool {
                true
            }
            fn schema_name() -> Cow<'static, str> {
                stringify!($type).into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($schema)
            }
        }
    };
}

text!(
    /// A namespace's name.
    Label,
    {"type": "string", "minLength": 1, "maxLength": 63, "pattern": DNS_LABEL}
);
text!(
    /// A CIDR or an address.
    Network,
    {"type": "string", "minLength": 2, "maxLength": 43, "pattern": "^[0-9A-Fa-f:.]+(/[0-9]{1,3})?$"}
);
text!(
    /// A method as it is sent.
    Method,
    {"type": "string", "minLength": 1, "maxLength": 32, "pattern": UPPER_TOKEN}
);

inline!(Duration, {"type": "string", "maxLength": 28, "pattern": DURATION});
inline!(RetryCondition, {
    "type": "string",
    "maxLength": 15,
    "pattern": "^(connect-failure|reset|refused-stream|gateway-error|5xx|[45][0-9][0-9])$",
});
inline!(IdentityMatch, {
    "type": "string",
    "maxLength": 2048,
    "pattern": r"^spiffe://[^/*]+/([^*]*[^/*]|[^*]*/\*|\*)$",
});
inline!(HostMatch, {
    "type": "string",
    "maxLength": 255,
    "pattern": r"^(\*\.)?[A-Za-z0-9:]([-A-Za-z0-9.:]*[A-Za-z0-9])?$",
});
inline!(PathMatch, {
    "type": "object",
    "properties": {
        "type": {
            "type": "string",
            "description": "How the path is compared.",
            "enum": ["Exact", "PathPrefix", "RegularExpression"],
            "default": "PathPrefix",
        },
        "value": {"type": "string", "description": "The path, or the expression.", "maxLength": 1024, "default": "/"},
    },
    "x-kubernetes-validations": [
        {
            "rule": "self.type == 'RegularExpression' || self.value.startsWith('/')",
            "message": "value does not start with '/': expected an absolute path",
        },
    ],
});
inline!(HeaderMatch, {
    "type": "object",
    "required": ["name", "value"],
    "properties": {
        "name": {"type": "string", "description": "The header's name.", "minLength": 1, "maxLength": 256, "pattern": TOKEN},
        "type": {
            "type": "string",
            "description": "How the value is compared.",
            "enum": ["Exact", "RegularExpression"],
            "default": "Exact",
        },
        "value": {"type": "string", "description": "What the value must be.", "minLength": 1, "maxLength": 4096},
    },
});
inline!(LimitKeyField, {
    "type": "object",
    "properties": {
        "source": {"type": "string", "description": "A fact about the source.", "enum": ["identity", "address"]},
        "header": {
            "type": "string",
            "description": "The value of this header.",
            "minLength": 1,
            "maxLength": 256,
            "pattern": TOKEN,
        },
        "request": {"type": "string", "description": "A fact about the request.", "enum": ["path", "method"]},
    },
    "x-kubernetes-validations": [{
        "rule": "[has(self.source), has(self.header), has(self.request)].exists_one(x, x)",
        "message": "expected exactly one of source, header and request",
    }],
});

/// One of a policy's `targetRefs`, with or without pods by labels.
pub(super) struct Target<const PODS: bool>;

impl<const PODS: bool> JsonSchema for Target<PODS> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Target".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut kinds = vec!["Mesh", "Namespace", "Service"];
        let label = dns_label(generator);
        let described = |text: &str| {
            let mut schema = label.clone();
            schema.insert("description".to_owned(), text.into());
            schema
        };
        let group_rule = format!(
            "self.kind == 'Mesh' ? self.group == '{GROUP}' : (!has(self.group) || self.group == '' || self.group == \
             'core')"
        );
        let group_rule = group_rule.replace(
            "self.group == 'nodemesh.io'",
            "(!has(self.group) || self.group == 'nodemesh.io')",
        );
        let mut rules = vec![
            json!({"rule": group_rule, "message": "the group is not the kind's: nodemesh.io for Mesh, none for the others"}),
            json!({
                "rule": "self.kind in ['Mesh', 'Pod'] || has(self.name)",
                "message": "name is missing: expected the name of the Service or Namespace",
            }),
            json!({
                "rule": "self.kind != 'Mesh' || !has(self.name) || self.name in ['mesh', 'default']",
                "message": "the mesh has no other name: expected none",
            }),
            json!({
                "rule": "self.kind in ['Service', 'Pod'] || !(has(self.sectionName) || has(self.namespace))",
                "message": "sectionName and namespace are of a Service or Pod target",
            }),
        ];
        let mut properties = json!({
            "group": {"type": "string", "description": "nodemesh.io for a Mesh; not given for the others.", "maxLength": 253},
            "kind": {"type": "string"},
            "name": described("The name of the Service or Namespace."),
            "namespace": described("The namespace of the Service or pods; not given: the policy's own."),
            "sectionName": described("One port only: its name, or its number in quotes."),
        });
        if PODS {
            kinds.push("Pod");
            properties["selector"] = json!({
                "type": "object",
                "description": "The pods, by labels.",
                "required": ["matchLabels"],
                "properties": {"matchLabels": labels(generator)},
            });
            rules.push(json!({
                "rule": "(self.kind == 'Pod') == has(self.selector)",
                "message": "a Pod target has a selector, and no other has",
            }));
            rules.push(json!({
                "rule": "self.kind != 'Pod' || !has(self.name)",
                "message": "a Pod target has no name: expected a selector",
            }));
        }
        properties["kind"] = json!({
            "type": "string",
            "description": "What the policy is attached to.",
            "enum": kinds,
        });
        json_schema!({
            "type": "object",
            "description": "What the policy is attached to; the most specific target wins.",
            "required": ["kind"],
            "properties": properties,
            "x-kubernetes-validations": rules,
        })
    }
}

/// A kind of our own, as a CustomResourceDefinition names and describes it.
pub struct KindSchema {
    /// The kind.
    pub kind: &'static str,
    /// In the API's path.
    pub plural: &'static str,
    /// For `kubectl get`.
    pub short: &'static str,
    /// The structural schema of its `spec`.
    pub spec: Value,
}

/// Our own kinds, ordered by name.
pub fn schemas() -> Vec<KindSchema> {
    fn kind<T: JsonSchema>(kind: &'static str, plural: &'static str, short: &'static str) -> KindSchema {
        let settings = SchemaSettings::draft07()
            .with(|settings| {
                settings.inline_subschemas = true;
                settings.meta_schema = None;
            })
            .for_serialize();
        let mut spec = settings.into_generator().into_root_schema_for::<T>().to_value();
        structural(&mut spec);
        KindSchema {
            kind,
            plural,
            short,
            spec,
        }
    }
    vec![
        kind::<AccessPolicy>("AccessPolicy", "accesspolicies", "ap"),
        kind::<MeshPolicy>("MeshPolicy", "meshpolicies", "mp"),
        kind::<RateLimit>("RateLimit", "ratelimits", "rl"),
        kind::<ServiceSubset>("ServiceSubset", "servicesubsets", "ss"),
        kind::<TrafficPolicy>("TrafficPolicy", "trafficpolicies", "tp"),
    ]
}

/// Rewrites a schema so that it is structural.
fn structural(schema: &mut Value) {
    let Value::Object(map) = schema else { return };
    map.remove("title");
    map.remove("$schema");
    optional(map);
    words(map);
    if let Some(Value::String(text)) = map.get_mut("description") {
        *text = plain(text);
    }
    // `uint32` and the like are no formats of OpenAPI.
    if let Some(format) = map.get("format").and_then(Value::as_str).map(str::to_owned)
        && format.starts_with("uint")
    {
        let known = if format == "uint32" { "int64" } else { "int32" };
        map.insert("format".to_owned(), known.into());
    }
    for number in ["minimum", "maximum"] {
        if let Some(whole) = map.get(number).and_then(Value::as_f64) {
            map.insert(number.to_owned(), (whole as i64).into());
        }
    }
    if let Some(Value::Object(properties)) = map.get_mut("properties") {
        properties.values_mut().for_each(structural);
        let given: Vec<String> = properties
            .iter()
            .filter(|(_, property)| property.get("default").is_some())
            .map(|(name, _)| name.clone())
            .collect();
        if let Some(Value::Array(required)) = map.get_mut("required") {
            required.retain(|name| !given.iter().any(|given| name == given));
            if required.is_empty() {
                map.remove("required");
            }
        }
        map.insert("x-kubernetes-preserve-unknown-fields".to_owned(), true.into());
    }
    for inner in ["items", "additionalProperties"] {
        if let Some(inner) = map.get_mut(inner) {
            structural(inner);
        }
    }
}

/// `["integer", "null"]` and `anyOf: [T, null]` are what an absent field is to us.
fn optional(map: &mut Map<String, Value>) {
    if let Some(Value::Array(types)) = map.get_mut("type") {
        types.retain(|kind| kind != "null");
        if let [only] = types.as_slice() {
            let only = only.clone();
            map.insert("type".to_owned(), only);
        }
    }
    if let Some(Value::Array(choices)) = map.remove("anyOf") {
        let mut choices = choices;
        choices.retain(|choice| choice != &json!({"type": "null"}));
        match choices.pop() {
            Some(Value::Object(only)) if choices.is_empty() => {
                for (key, value) in only {
                    map.entry(key).or_insert(value);
                }
            }
            other => unreachable!("a schema of ours has a choice: {choices:?} {other:?}"),
        }
    }
}

/// An enum of words, each with its text, becomes one list; the texts go into the description.
fn words(map: &mut Map<String, Value>) {
    let Some(Value::Array(choices)) = map.remove("oneOf") else {
        return;
    };
    let mut texts = Vec::new();
    let mut words = Vec::new();
    for choice in &choices {
        let word = choice.get("const").or_else(|| choice.pointer("/enum/0"));
        let word = word.and_then(Value::as_str).unwrap_or_default();
        let text = choice.get("description").and_then(Value::as_str).unwrap_or_default();
        texts.push(format!("{word}: {}", plain(text)));
        words.push(Value::from(word));
    }
    let own = map.get("description").and_then(Value::as_str).unwrap_or_default();
    map.insert(
        "description".to_owned(),
        format!("{own} {}", texts.join(" ")).trim().into(),
    );
    map.insert("type".to_owned(), "string".into());
    map.insert("enum".to_owned(), words.into());
}

/// A doc comment as a user of the API reads it.
fn plain(text: &str) -> String {
    let text = text.replace('\n', " ").replace("`None`", "not given");
    text.split_once(" It is made by")
        .map_or(text.clone(), |(head, _)| head.to_owned())
}
