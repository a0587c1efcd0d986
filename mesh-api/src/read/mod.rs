//! Reading typed values out of YAML or JSON: every problem at once, each with its line, its field and what was expected.

use std::fmt;

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
