//! A YAML or JSON document as a tree whose every value knows its line, built within bounds.
//!
//! YAML 1.2's core schema, one type per scalar: what Kubernetes takes as a string or refuses as a number is the same
//! here, but for YAML 1.1's words (`yes`, `on`), which are strings. The tree is built by a loop, not by recursion, and
//! every alias is paid for when it is expanded: no input makes it deeper, larger or slower than the bounds allow.

use std::{
    collections::{HashMap, HashSet},
    rc::Rc,
};

use saphyr_parser::{Event, Parser, ScalarStyle, ScanError, Span, Tag};
use serde_json::{Number, Value};

use super::{ALIASES_MAX, DOCUMENTS_PER_SOURCE_MAX, Log, NESTING_MAX, NODES_MAX, SOURCE_BYTES_MAX};

/// A value and the line on which it begins; line 0: none.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    pub(crate) line: u32,
    pub(crate) tree: Tree,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Tree {
    Null,
    Bool(bool),
    Number(Number),
    Text(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// A key of a map with its value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) line: u32,
    pub(crate) value: Node,
}

impl Node {
    /// From JSON, which has no lines.
    pub(crate) fn from_json(value: &Value) -> Node {
        let tree = match value {
            Value::Null => Tree::Null,
            Value::Bool(bool) => Tree::Bool(*bool),
            Value::Number(number) => Tree::Number(number.clone()),
            Value::String(text) => Tree::Text(text.clone()),
            Value::Array(items) => Tree::List(items.iter().map(Node::from_json).collect()),
            Value::Object(map) => Tree::Map(
                map.iter()
                    .map(|(key, value)| Entry {
                        key: key.clone(),
                        line: 0,
                        value: Node::from_json(value),
                    })
                    .collect(),
            ),
        };
        Node { line: 0, tree }
    }

    /// To JSON.
    pub(crate) fn to_json(&self) -> Value {
        match &self.tree {
            Tree::Null => Value::Null,
            Tree::Bool(bool) => Value::Bool(*bool),
            Tree::Number(number) => Value::Number(number.clone()),
            Tree::Text(text) => Value::String(text.clone()),
            Tree::List(items) => items.iter().map(Node::to_json).collect(),
            Tree::Map(entries) => Value::Object(entries.iter().map(|e| (e.key.clone(), e.value.to_json())).collect()),
        }
    }

    /// What it is, for problems.
    pub(crate) fn describe(&self) -> String {
        match &self.tree {
            Tree::Null => "nothing".to_owned(),
            Tree::Bool(bool) => format!("the boolean {bool}"),
            Tree::Number(number) => format!("the number {number}"),
            Tree::Text(text) => format!("the string {}", super::quoted(text)),
            Tree::List(_) => "a list".to_owned(),
            Tree::Map(_) => "a map".to_owned(),
        }
    }
}

/// Reads every document of a source. After an error of syntax the rest of the source is not read.
pub(crate) fn load(log: &Log, text: &str) -> Vec<Node> {
    if text.len() > SOURCE_BYTES_MAX {
        log.refuse(
            0,
            "",
            format!("has {} bytes", text.len()),
            format!("at most {SOURCE_BYTES_MAX} bytes"),
        );
        return Vec::new();
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut loader = Loader {
        log,
        documents: Vec::new(),
        stack: Vec::new(),
        anchors: HashMap::new(),
        nodes: 0,
        aliases: 0,
    };
    let mut parser = Parser::new_from_str(text);
    while let Some(event) = parser.next_event() {
        let step = match event {
            Ok((Event::StreamEnd, _)) => break,
            Ok((event, span)) => loader.take(event, span),
            Err(error) => Err(Stop::Syntax(error)),
        };
        if let Err(stop) = step {
            loader.report(stop);
            break;
        }
    }
    loader.documents
}

/// Why a source is not read on.
enum Stop {
    Syntax(ScanError),
    Bound {
        line: u32,
        message: &'static str,
        expected: String,
    },
}

/// A list or map that is still open.
struct Frame {
    line: u32,
    anchor: usize,
    open: Open,
    /// How deep what it holds nests.
    height: usize,
    /// How many values it holds.
    weight: usize,
}

enum Open {
    List(Vec<Node>),
    /// `key` is read and waits for its value; `seen` has the line of each key.
    Map {
        entries: Vec<Entry>,
        key: Option<(String, u32)>,
        seen: HashMap<String, u32>,
    },
}

/// A finished value that aliases may name.
struct Anchored {
    node: Node,
    height: usize,
    weight: usize,
}

struct Loader<'a> {
    log: &'a Log<'a>,
    documents: Vec<Node>,
    stack: Vec<Frame>,
    anchors: HashMap<usize, Rc<Anchored>>,
    nodes: usize,
    aliases: usize,
}

fn line_of(span: Span) -> u32 {
    u32::try_from(span.start.line()).unwrap_or(u32::MAX)
}

impl Loader<'_> {
    fn report(&self, stop: Stop) {
        match stop {
            Stop::Syntax(error) => {
                let line = u32::try_from(error.marker().line()).unwrap_or(u32::MAX);
                self.log.refuse(line, "", format!("is not YAML: {}", error.info()), "");
            }
            Stop::Bound {
                line,
                message,
                expected,
            } => self.log.refuse(line, &self.path(), message, expected),
        }
    }

    /// Where the loader is, as a field path.
    fn path(&self) -> String {
        let mut path = String::new();
        for frame in &self.stack {
            match &frame.open {
                Open::List(items) => path.push_str(&format!("[{}]", items.len())),
                Open::Map {
                    key: Some((key, _)), ..
                } if !key.is_empty() => path = super::join(&path, key),
                Open::Map { .. } => {}
            }
        }
        path
    }

    fn count(&mut self, more: usize, line: u32) -> Result<(), Stop> {
        self.nodes = self.nodes.saturating_add(more);
        if self.nodes > NODES_MAX {
            let expected = format!("at most {NODES_MAX} in one source, copies by aliases included");
            return Err(Stop::Bound {
                line,
                message: "there are too many values",
                expected,
            });
        }
        Ok(())
    }

    fn nest(&self, height: usize, line: u32) -> Result<(), Stop> {
        if self.stack.len() + height > NESTING_MAX {
            let expected = format!("at most {NESTING_MAX} levels");
            return Err(Stop::Bound {
                line,
                message: "lists and maps nest too deep",
                expected,
            });
        }
        Ok(())
    }

    fn take(&mut self, event: Event<'_>, span: Span) -> Result<(), Stop> {
        let line = line_of(span);
        match event {
            Event::DocumentStart(_) => {
                self.anchors.clear();
                self.aliases = 0;
                if self.documents.len() >= DOCUMENTS_PER_SOURCE_MAX {
                    let expected = format!("at most {DOCUMENTS_PER_SOURCE_MAX} in one source");
                    return Err(Stop::Bound {
                        line,
                        message: "there are too many documents",
                        expected,
                    });
                }
                Ok(())
            }
            Event::Scalar(text, style, anchor, tag) => {
                self.count(1, line)?;
                let tree = self.scalar(&text, style, tag.as_deref(), line);
                self.finish(Node { line, tree }, anchor, 0, 1);
                Ok(())
            }
            Event::SequenceStart(anchor, tag) => {
                self.collection(tag.as_deref(), line);
                self.push(line, anchor, Open::List(Vec::new()))
            }
            Event::MappingStart(anchor, tag) => {
                self.collection(tag.as_deref(), line);
                self.push(
                    line,
                    anchor,
                    Open::Map {
                        entries: Vec::new(),
                        key: None,
                        seen: HashMap::new(),
                    },
                )
            }
            Event::SequenceEnd | Event::MappingEnd => {
                self.pop();
                Ok(())
            }
            Event::Alias(anchor) => self.alias(anchor, line),
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => Ok(()),
        }
    }

    fn push(&mut self, line: u32, anchor: usize, open: Open) -> Result<(), Stop> {
        self.count(1, line)?;
        self.nest(1, line)?;
        self.stack.push(Frame {
            line,
            anchor,
            open,
            height: 0,
            weight: 1,
        });
        Ok(())
    }

    fn pop(&mut self) {
        let Some(frame) = self.stack.pop() else { return };
        let tree = match frame.open {
            Open::List(items) => Tree::List(items),
            Open::Map { entries, .. } => Tree::Map(merged(entries)),
        };
        self.finish(
            Node { line: frame.line, tree },
            frame.anchor,
            frame.height + 1,
            frame.weight,
        );
    }

    fn alias(&mut self, anchor: usize, line: u32) -> Result<(), Stop> {
        self.aliases += 1;
        if self.aliases > ALIASES_MAX {
            let expected = format!("at most {ALIASES_MAX} in one document");
            return Err(Stop::Bound {
                line,
                message: "there are too many aliases",
                expected,
            });
        }
        let Some(anchored) = self.anchors.get(&anchor).cloned() else {
            let expected = "the name of a value that ends before it".to_owned();
            return Err(Stop::Bound {
                line,
                message: "an alias names a value that it is part of",
                expected,
            });
        };
        self.count(anchored.weight, line)?;
        self.nest(anchored.height, line)?;
        self.finish(anchored.node.clone(), 0, anchored.height, anchored.weight);
        Ok(())
    }

    /// Puts a finished value where it belongs.
    fn finish(&mut self, node: Node, anchor: usize, height: usize, weight: usize) {
        if anchor > 0 {
            self.anchors.insert(
                anchor,
                Rc::new(Anchored {
                    node: node.clone(),
                    height,
                    weight,
                }),
            );
        }
        let Some(frame) = self.stack.last_mut() else {
            self.documents.push(node);
            return;
        };
        frame.height = frame.height.max(height);
        frame.weight += weight;
        match &mut frame.open {
            Open::List(items) => items.push(node),
            Open::Map { entries, key, .. } if key.is_some() => {
                let (key, line) = key.take().unwrap_or_default();
                entries.push(Entry { key, line, value: node });
            }
            Open::Map { key, seen, .. } => {
                let text = match node.tree {
                    Tree::Text(text) => Some(text),
                    Tree::Bool(bool) => Some(bool.to_string()),
                    Tree::Number(number) => Some(number.to_string()),
                    Tree::Null | Tree::List(_) | Tree::Map(_) => None,
                };
                *key = Some((text.clone().unwrap_or_default(), node.line));
                match text {
                    None => self
                        .log
                        .refuse(node.line, &self.path(), "a key is not a string", "a string"),
                    Some(text) if text == MERGE => {}
                    Some(text) => {
                        if let Some(first) = seen.insert(text, node.line) {
                            let message = format!("the key is there twice, first on line {first}");
                            self.log.refuse(node.line, &self.path(), message, "each key once");
                        }
                    }
                }
            }
        }
    }

    fn collection(&self, tag: Option<&Tag>, line: u32) {
        if let Some(tag) = tag
            && !(tag.is_yaml_core_schema() && matches!(tag.suffix.as_str(), "map" | "seq"))
        {
            self.tag_refused(tag, line);
        }
    }

    fn tag_refused(&self, tag: &Tag, line: u32) {
        let message = format!("the tag {}{} is not known", tag.handle, tag.suffix);
        self.log.refuse(
            line,
            &self.path(),
            message,
            "no tag, or one of !!str, !!int, !!float, !!bool, !!null",
        );
    }

    fn scalar(&self, text: &str, style: ScalarStyle, tag: Option<&Tag>, line: u32) -> Tree {
        let Some(tag) = tag else {
            return if style == ScalarStyle::Plain {
                plain(text)
            } else {
                Tree::Text(text.to_owned())
            };
        };
        if !tag.is_yaml_core_schema() {
            self.tag_refused(tag, line);
            return Tree::Null;
        }
        let resolved = plain(text);
        let good = match (tag.suffix.as_str(), &resolved) {
            ("str", _) => return Tree::Text(text.to_owned()),
            ("int", Tree::Number(number)) => number.is_i64() || number.is_u64(),
            ("float", Tree::Number(_)) | ("bool", Tree::Bool(_)) | ("null", Tree::Null) => true,
            _ => false,
        };
        if !good {
            let message = format!("{} is no !!{}", super::quoted(text), tag.suffix);
            self.log
                .refuse(line, &self.path(), message, "a value that its tag describes");
        }
        resolved
    }
}

/// YAML's key for "all entries of that map, too".
const MERGE: &str = "<<";

/// Resolves merge keys: an entry of the map itself wins over a merged one, an earlier merged one over a later.
fn merged(entries: Vec<Entry>) -> Vec<Entry> {
    if !entries.iter().any(|e| e.key == MERGE) {
        return entries;
    }
    let (merges, mut own): (Vec<Entry>, Vec<Entry>) = entries.into_iter().partition(|e| e.key == MERGE);
    let mut keys: HashSet<String> = own.iter().map(|entry| entry.key.clone()).collect();
    for merge in merges {
        let maps = match merge.value.tree {
            Tree::List(items) => items,
            _ => vec![merge.value],
        };
        for map in maps {
            match map.tree {
                Tree::Map(more) => {
                    for entry in more {
                        if keys.insert(entry.key.clone()) {
                            own.push(entry);
                        }
                    }
                }
                // Left in place under its key: whoever reads the map finds an unknown field.
                tree => own.push(Entry {
                    key: MERGE.to_owned(),
                    line: merge.line,
                    value: Node { line: map.line, tree },
                }),
            }
        }
    }
    own
}

/// A plain scalar by the core schema (YAML 1.2 §10.3.2).
fn plain(text: &str) -> Tree {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Tree::Null,
        "true" | "True" | "TRUE" => return Tree::Bool(true),
        "false" | "False" | "FALSE" => return Tree::Bool(false),
        _ => {}
    }
    number(text).map_or_else(|| Tree::Text(text.to_owned()), Tree::Number)
}

fn number(text: &str) -> Option<Number> {
    if let Some(digits) = text.strip_prefix("0x") {
        let good = digits.bytes().all(|b| b.is_ascii_hexdigit());
        return if good {
            u64::from_str_radix(digits, 16).ok().map(Number::from)
        } else {
            None
        };
    }
    if let Some(digits) = text.strip_prefix("0o") {
        let good = digits.bytes().all(|b| b.is_ascii_digit());
        return if good {
            u64::from_str_radix(digits, 8).ok().map(Number::from)
        } else {
            None
        };
    }
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    if !unsigned.is_empty() && unsigned.bytes().all(|b| b.is_ascii_digit()) {
        let signed = text.strip_prefix('+').unwrap_or(text);
        if let Ok(number) = signed.parse::<i64>() {
            return Some(number.into());
        }
        if let Ok(number) = signed.parse::<u64>() {
            return Some(number.into());
        }
    }
    // [-+]? ( \. [0-9]+ | [0-9]+ ( \. [0-9]* )? ) ( [eE] [-+]? [0-9]+ )?
    let mantissa = unsigned.split(['e', 'E']).next().unwrap_or_default();
    let mut parts = mantissa.splitn(2, '.');
    let whole = parts.next().unwrap_or_default();
    let fraction = parts.next();
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    let shape =
        digits(whole) && fraction.is_none_or(digits) && (!whole.is_empty() || fraction.is_some_and(|f| !f.is_empty()));
    if !shape {
        return None;
    }
    Number::from_f64(text.parse::<f64>().ok()?)
}
