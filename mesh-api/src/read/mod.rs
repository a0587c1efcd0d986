//! Reading typed values out of YAML or JSON: every problem at once, each with its line, its field and what was expected.

//!
//! [`load`] makes trees of a text, [`Field`] and [`Fields`] read typed values out of a tree. A reader returns `None` when
//! it has reported a problem; it goes on with what stands beside it, so that one look at the output is enough to
//! mend a file. Readers of what people and peers write are total: they refuse, they never panic.

mod field;
mod tree;

use std::{cell::RefCell, fmt};

pub(crate) use field::{Decode, Field, Fields, one_of, port};
pub(crate) use tree::{Node, Tree, load};

/// The most bytes in one source file.
pub const SOURCE_BYTES_MAX: usize = 4 << 20;
/// The most documents in one source file.
pub const DOCUMENTS_PER_SOURCE_MAX: usize = 10_000;
/// The deepest nesting of lists and maps.
pub const NESTING_MAX: usize = 64;
/// The most aliases (`*name`) in one document.
pub const ALIASES_MAX: usize = 1_000;
/// The most values in one source file, those copied by aliases included.
pub const NODES_MAX: usize = 1_000_000;
/// The most problems that are reported for one source file.
pub const PROBLEMS_MAX: usize = 100;

/// One thing that is wrong with a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file's name.
    pub source: String,
    /// The line, from 1; `None` if the document has no lines of its own.
    pub line: Option<u32>,
    /// The field: `spec.rules[0].matches[1].path.value`; empty if it concerns no single field.
    pub path: String,
    /// What is wrong.
    pub message: String,
    /// What would be right; empty if there is nothing to say.
    pub expected: String,
}

impl fmt::Display for Problem {
    /// `file.yaml:12: spec.rules[0].matches[1].path.value: "api" does not start with '/', expected an absolute path`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.source)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if !self.path.is_empty() {
            write!(f, ": {}", self.path)?;
        }
        write!(f, ": {}", self.message)?;
        if !self.expected.is_empty() {
            write!(f, ", expected {}", self.expected)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problem {}

/// Where problems go while a source is read.
pub(crate) struct Log<'a> {
    source: &'a str,
    problems: RefCell<Vec<Problem>>,
}

impl<'a> Log<'a> {
    pub(crate) fn new(source: &'a str) -> Log<'a> {
        Log {
            source,
            problems: RefCell::new(Vec::new()),
        }
    }

    /// Adds a problem; beyond [`PROBLEMS_MAX`] they are dropped.
    pub(crate) fn refuse(&self, line: u32, path: &str, message: impl Into<String>, expected: impl Into<String>) {
        let mut problems = self.problems.borrow_mut();
        if problems.len() < PROBLEMS_MAX {
            problems.push(Problem {
                source: self.source.to_owned(),
                line: (line > 0).then_some(line),
                path: path.to_owned(),
                message: message.into(),
                expected: expected.into(),
            });
        }
    }

    /// How many problems there are so far.
    pub(crate) fn len(&self) -> usize {
        self.problems.borrow().len()
    }

    /// The problems, by line.
    pub(crate) fn into_problems(self) -> Vec<Problem> {
        let mut problems = self.problems.into_inner();
        problems.sort_by_key(|problem| problem.line);
        problems
    }
}

/// The path of a field of the value at `path`. Keys that are no plain words (labels, annotations) are put in brackets.
pub(crate) fn join(path: &str, key: &str) -> String {
    let plain = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    match (path.is_empty(), plain) {
        (true, true) => key.to_owned(),
        (false, true) => format!("{path}.{key}"),
        (_, false) => format!("{path}[{}]", quoted(key)),
    }
}

/// A text in quotes, control characters escaped, cut where it is long.
pub(crate) fn quoted(text: &str) -> String {
    const CHARS_MAX: usize = 80;
    match text.char_indices().nth(CHARS_MAX) {
        Some((at, _)) => format!("{:?}…", text.get(..at).unwrap_or_default()),
        None => format!("{text:?}"),
    }
}

/// Reads a spec from JSON: the readers' way into [`serde::Deserialize`] and from the wire.
pub(crate) fn from_json<T: Decode>(value: &serde_json::Value) -> Result<T, Vec<Problem>> {
    let node = Node::from_json(value);
    let log = Log::new("spec");
    let decoded = T::decode(&Field::root(&log, &node, None));
    match (decoded, log.len()) {
        (Some(value), 0) => Ok(value),
        _ => Err(log.into_problems()),
    }
}

/// [`serde::Deserialize`] by way of [`Decode`]: one reader, whatever the format.
macro_rules! deserialize_by_decoding {
    ($($type:ty),+ $(,)?) => {$(
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<$type, D::Error> {
                let value = serde_json::Value::deserialize(deserializer)?;
                $crate::read::from_json(&value).map_err(|problems| {
                    let texts: Vec<String> = problems.iter().map(ToString::to_string).collect();
                    serde::de::Error::custom(texts.join("; "))
                })
            }
        }
    )+};
}
pub(crate) use deserialize_by_decoding;
