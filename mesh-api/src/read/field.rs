//! Typed reading of one value and of the fields of a map.

use std::{net::IpAddr, ops::RangeInclusive};

use super::{Log, Node, Tree, join, quoted, tree::Entry};

/// A type that can be read; `None` means that at least one problem was reported.
pub(crate) trait Decode: Sized {
    fn decode(field: &Field) -> Option<Self>;
}

/// One value, where it stands, and where its problems go.
#[derive(Clone)]
pub(crate) struct Field<'a> {
    log: &'a Log<'a>,
    node: &'a Node,
    path: String,
    /// The namespace of the document that is read; `None` while a spec is read by itself.
    namespace: Option<&'a str>,
}

impl<'a> Field<'a> {
    /// The whole tree.
    pub(crate) fn root(log: &'a Log<'a>, node: &'a Node, namespace: Option<&'a str>) -> Field<'a> {
        Field {
            log,
            node,
            path: String::new(),
            namespace,
        }
    }

    /// The same value, read for a document of that namespace.
    pub(crate) fn within(&self, namespace: Option<&'a str>) -> Field<'a> {
        Field {
            namespace,
            ..self.clone()
        }
    }

    /// The same value under another path.
    pub(crate) fn at(&self, path: &str) -> Field<'a> {
        Field {
            path: path.to_owned(),
            ..self.clone()
        }
    }

    pub(crate) fn namespace(&self) -> Option<&'a str> {
        self.namespace
    }

    pub(crate) fn node(&self) -> &'a Node {
        self.node
    }

    /// Reports a problem with this value.
    pub(crate) fn refuse(&self, message: impl Into<String>, expected: impl Into<String>) {
        self.log.refuse(self.node.line, &self.path, message, expected);
    }

    /// Reports that a word is known, but not what it stands for.
    pub(crate) fn refuse_later(&self, what: &str, expected: impl Into<String>) {
        self.refuse(format!("{what} is not supported yet"), expected);
    }

    fn refuse_type(&self, expected: &str) {
        self.refuse(format!("is {}", self.node.describe()), expected);
    }

    pub(crate) fn text(&self) -> Option<&'a str> {
        match &self.node.tree {
            Tree::Text(text) => Some(text),
            Tree::Number(_) | Tree::Bool(_) => {
                self.refuse_type("a string (put it in quotes)");
                None
            }
            _ => {
                self.refuse_type("a string");
                None
            }
        }
    }

    /// A text with at least one character.
    pub(crate) fn word(&self) -> Option<&'a str> {
        let text = self.text()?;
        if text.is_empty() {
            self.refuse("is empty", "a string of at least one character");
            return None;
        }
        Some(text)
    }

    pub(crate) fn boolean(&self) -> Option<bool> {
        match &self.node.tree {
            Tree::Bool(bool) => Some(*bool),
            _ => {
                self.refuse_type("true or false");
                None
            }
        }
    }

    pub(crate) fn integer<T: TryFrom<u64> + Copy + Into<u64>>(&self, range: RangeInclusive<T>) -> Option<T> {
        let (least, most): (u64, u64) = ((*range.start()).into(), (*range.end()).into());
        let expected = format!("a whole number from {least} to {most}");
        let Tree::Number(number) = &self.node.tree else {
            self.refuse_type(&expected);
            return None;
        };
        let value = number
            .as_u64()
            .filter(|n| (least..=most).contains(n))
            .and_then(|n| T::try_from(n).ok());
        if value.is_none() {
            self.refuse(format!("{number} is out of range"), expected);
        }
        value
    }

    /// One of some words.
    pub(crate) fn choice<T: Copy>(&self, choices: &[(&str, T)], later: &[&str]) -> Option<T> {
        let text = self.text()?;
        if let Some((_, value)) = choices.iter().find(|(word, _)| *word == text) {
            return Some(*value);
        }
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        if later.contains(&text) {
            self.refuse_later(&quoted(text), one_of(&words));
        } else {
            self.refuse(format!("{} is not known", quoted(text)), one_of(&words));
        }
        None
    }

    /// A text that parses.
    pub(crate) fn parse<T: std::str::FromStr>(&self, expected: &str) -> Option<T> {
        let text = self.text()?;
        let parsed = text.parse().ok();
        if parsed.is_none() {
            self.refuse(format!("{} does not parse", quoted(text)), expected);
        }
        parsed
    }

    pub(crate) fn address(&self) -> Option<IpAddr> {
        self.parse("an IPv4 or IPv6 address")
    }

    /// The items of a list.
    pub(crate) fn items(&self, most: usize) -> Option<Vec<Field<'a>>> {
        let Tree::List(items) = &self.node.tree else {
            self.refuse_type("a list");
            return None;
        };
        if items.len() > most {
            self.refuse(format!("has {} items", items.len()), format!("at most {most}"));
            return None;
        }
        let field = |(index, node)| Field {
            log: self.log,
            node,
            path: format!("{}[{index}]", self.path),
            namespace: self.namespace,
        };
        Some(items.iter().enumerate().map(field).collect())
    }

    /// A list, each item read; every item is looked at even if one is refused.
    pub(crate) fn list<T>(&self, most: usize, read: impl Fn(&Field<'a>) -> Option<T>) -> Option<Vec<T>> {
        let items: Vec<Option<T>> = self.items(most)?.iter().map(read).collect();
        items.into_iter().collect()
    }

    /// A map whose keys are data: labels and the like.
    pub(crate) fn entries(&self) -> Option<Vec<(&'a str, Field<'a>)>> {
        let Tree::Map(entries) = &self.node.tree else {
            self.refuse_type("a map");
            return None;
        };
        let field = |entry: &'a Entry| {
            let path = join(&self.path, &entry.key);
            (
                entry.key.as_str(),
                Field {
                    log: self.log,
                    node: &entry.value,
                    path,
                    namespace: self.namespace,
                },
            )
        };
        Some(entries.iter().map(field).collect())
    }

    /// Its fields if it is a map; nothing is reported if it is not.
    pub(crate) fn fields_if_map(&self) -> Option<Fields<'a>> {
        matches!(self.node.tree, Tree::Map(_)).then(|| self.fields()).flatten()
    }

    /// A map whose keys are fields.
    pub(crate) fn fields(&self) -> Option<Fields<'a>> {
        let Tree::Map(entries) = &self.node.tree else {
            self.refuse_type("a map");
            return None;
        };
        Some(Fields {
            at: self.clone(),
            entries,
            known: Vec::new(),
            refused: &[],
        })
    }
}

/// `a, b or c`.
pub(crate) fn one_of(words: &[&str]) -> String {
    match words {
        [] => String::new(),
        [only] => (*only).to_owned(),
        [head @ .., last] => format!("{} or {last}", head.join(", ")),
    }
}

/// The fields of a map. Each is asked for by name; [`Fields::finish`] refuses what nobody asked for.
pub(crate) struct Fields<'a> {
    at: Field<'a>,
    entries: &'a [Entry],
    known: Vec<&'static str>,
    /// Fields that have been refused already.
    refused: &'static [&'static str],
}

impl<'a> Fields<'a> {
    /// The map itself, for problems that concern it as a whole.
    pub(crate) fn whole(&self) -> &Field<'a> {
        &self.at
    }

    /// A field; `null` counts as absent, as Kubernetes has it.
    pub(crate) fn get(&mut self, name: &'static str) -> Option<Field<'a>> {
        self.known.push(name);
        self.peek(name)
    }

    fn peek(&self, name: &str) -> Option<Field<'a>> {
        let entry = self.entries.iter().find(|e| e.key == name)?;
        if entry.value.tree == Tree::Null {
            return None;
        }
        let at = &self.at;
        Some(Field {
            log: at.log,
            node: &entry.value,
            path: join(&at.path, name),
            namespace: at.namespace,
        })
    }

    /// A field that must be there.
    pub(crate) fn need(&mut self, name: &'static str, expected: &str) -> Option<Field<'a>> {
        let field = self.get(name);
        if field.is_none() {
            self.at
                .log
                .refuse(self.at.node.line, &join(&self.at.path, name), "is missing", expected);
        }
        field
    }

    /// An optional field: `Some(None)` if it is absent, `None` if it was refused.
    pub(crate) fn read<T>(
        &mut self,
        name: &'static str,
        read: impl FnOnce(&Field<'a>) -> Option<T>,
    ) -> Option<Option<T>> {
        match self.get(name) {
            None => Some(None),
            Some(field) => read(&field).map(Some),
        }
    }

    /// A list field; absent is empty.
    pub(crate) fn list<T>(
        &mut self,
        name: &'static str,
        most: usize,
        read: impl Fn(&Field<'a>) -> Option<T>,
    ) -> Option<Vec<T>> {
        match self.get(name) {
            None => Some(Vec::new()),
            Some(field) => field.list(most, read),
        }
    }

    /// A list field that, where it is written, has at least one item: an empty list reads like "nothing" to one
    /// person and like "anything" to another.
    pub(crate) fn filled_list<T>(
        &mut self,
        name: &'static str,
        most: usize,
        read: impl Fn(&Field<'a>) -> Option<T>,
    ) -> Option<Vec<T>> {
        match self.get(name) {
            None => Some(Vec::new()),
            Some(field) => {
                let list = field.list(most, read)?;
                if list.is_empty() {
                    field.refuse("is empty", "at least one item, or no such field");
                    return None;
                }
                Some(list)
            }
        }
    }

    /// Fields that are named in the design and not implemented: refused where they are used.
    pub(crate) fn later(&mut self, names: &'static [&'static str]) {
        self.refused = names;
        for name in names {
            if let Some(field) = self.peek(name) {
                field.refuse_later("the field", "no such field");
            }
        }
    }

    /// Whether any of these fields is written.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.peek(name).is_some()
    }

    /// Refuses every field that was not asked for.
    pub(crate) fn finish(self) {
        for entry in self.entries {
            let key = entry.key.as_str();
            if !self.known.contains(&key) && !self.refused.contains(&key) {
                let mut known = self.known.clone();
                known.sort_unstable();
                let path = join(&self.at.path, &entry.key);
                self.at.log.refuse(entry.line, &path, "unknown field", one_of(&known));
            }
        }
    }
}

/// A TCP port.
pub(crate) fn port(field: &Field) -> Option<u16> {
    field.integer(1..=u16::MAX)
}
