//! How a path may be read: every reading that a server behind the mesh could plausibly make of it.
//!
//! Stands between a request's path and the access rules that ask about paths. Servers disagree: some decode escapes
//! once, careless ones until nothing is left; some take `;x` for a parameter and drop it, before or after decoding; some
//! take a backslash for a slash, repeated slashes for one, resolve dots before or after that, or end a path at an escaped
//! question mark. [`Readings`] lists what comes out. An Allow must hold for all of them, a Deny for any. A path with more
//! readings than the bound is in doubt, which no Allow fits and every Deny does. It must never leave a reading out that
//! its steps can make.

use crate::{
    policy::PathMatch,
    route::{path_matches, percent_decode},
};

/// The most readings of one path.
const READINGS_MAX: usize = 64;
/// How often escapes are decoded; a path that still has some is in doubt.
const DECODED_MAX: u8 = 3;

/// The readings of one path.
#[derive(Debug)]
pub(crate) struct Readings {
    /// Each that differs from the path as sent, with how it came about.
    others: Vec<(Steps, String)>,
    /// There are more.
    in_doubt: bool,
}

/// What a server does with a path, in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Steps {
    drop_parameters_first: bool,
    decode: u8,
    drop_parameters_last: bool,
    backslash_is_slash: bool,
    cut: bool,
    shape: Shape,
}

/// What is done about empty and dot elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Shape {
    #[default]
    AsIs,
    /// Dots resolved as RFC 3986 §5.2.4 has it: an empty element is one that `..` takes away.
    DotsResolved,
    /// Repeated slashes are one, then dots are resolved.
    Merged,
}

impl Readings {
    /// All readings of a path (without the query) beside the one as sent.
    pub(crate) fn of(path: &str) -> Readings {
        let mut readings = Readings {
            others: Vec::new(),
            in_doubt: false,
        };
        if is_plain(path) {
            return readings;
        }
        // Each step adds, to every reading so far, what it makes of it.
        let mut all = vec![(Steps::default(), path.to_owned())];
        widen(&mut all, |steps, text| {
            let steps = Steps {
                drop_parameters_first: true,
                ..steps
            };
            (steps, without_parameters(text))
        });
        for decode in 1..=DECODED_MAX + 1 {
            let last: Vec<(Steps, String)> = all.iter().filter(|(s, _)| s.decode + 1 == decode).cloned().collect();
            for (steps, text) in last {
                let decoded = decoded(&text);
                if decoded != text {
                    readings.in_doubt |= decode > DECODED_MAX;
                    all.push((Steps { decode, ..steps }, decoded));
                }
            }
        }
        widen(&mut all, |steps, text| {
            let steps = Steps {
                drop_parameters_last: true,
                ..steps
            };
            (steps, without_parameters(text))
        });
        widen(&mut all, |steps, text| {
            let steps = Steps {
                backslash_is_slash: true,
                ..steps
            };
            (steps, text.replace('\\', "/"))
        });
        widen(&mut all, |steps, text| {
            (Steps { cut: true, ..steps }, cut(text).to_owned())
        });
        let shaped: Vec<(Steps, String)> = all
            .iter()
            .flat_map(|(steps, text)| {
                [Shape::DotsResolved, Shape::Merged].map(|shape| {
                    let steps = Steps { shape, ..*steps };
                    (steps, resolved(text, shape))
                })
            })
            .collect();
        for (steps, text) in all.into_iter().skip(1).chain(shaped) {
            readings.add(path, steps, text);
        }
        readings
    }

    fn add(&mut self, path: &str, steps: Steps, text: String) {
        if text == path || self.others.iter().any(|(_, known)| *known == text) {
            return;
        }
        if self.others.len() >= READINGS_MAX {
            self.in_doubt = true;
            return;
        }
        self.others.push((steps, text));
    }

    /// Whether one of the patterns matches on every reading.
    pub(crate) fn all_match(&self, wanted: &[PathMatch], path: &str) -> bool {
        let fits = |(steps, text): &(Steps, String)| wanted.iter().any(|pattern| steps.matches(pattern, text));
        !self.in_doubt && wanted.iter().any(|pattern| path_matches(pattern, path)) && self.others.iter().all(fits)
    }

    /// Whether one of the patterns matches on any reading.
    pub(crate) fn any_matches(&self, wanted: &[PathMatch], path: &str) -> bool {
        let fits = |text: &str| wanted.iter().any(|pattern| any_form_matches(pattern, text));
        self.in_doubt || fits(path) || self.others.iter().any(|(_, text)| fits(text))
    }
}

/// Adds what a step makes of each reading, where it makes a difference.
fn widen(all: &mut Vec<(Steps, String)>, step: impl Fn(Steps, &str) -> (Steps, String)) {
    for index in 0..all.len() {
        let Some((steps, text)) = all.get(index) else { break };
        let (steps, changed) = step(*steps, text);
        if changed != *text {
            all.push((steps, changed));
        }
    }
}

/// Whether every server reads it as it was sent.
fn is_plain(path: &str) -> bool {
    let bytes = path.as_bytes();
    let shaped = bytes.windows(2).any(|pair| matches!(pair, [b'/', b'/' | b'.']));
    !shaped
        && !bytes
            .iter()
            .any(|byte| matches!(byte, b'%' | b'\\' | b';' | b'?' | b'#' | 0))
}

impl Steps {
    /// The pattern is read by the same server as the path, so that an escape in the policy means the same as one in
    /// the path. A regular expression is not a path: it asks for the reading itself.
    fn matches(&self, pattern: &PathMatch, text: &str) -> bool {
        match pattern {
            PathMatch::Exact(wanted) => path_matches(&PathMatch::Exact(self.of(wanted)), text),
            PathMatch::PathPrefix(wanted) => path_matches(&PathMatch::PathPrefix(self.of(wanted)), text),
            PathMatch::RegularExpression(_) => path_matches(pattern, text),
        }
    }

    fn of(&self, pattern: &str) -> String {
        let mut text = pattern.to_owned();
        if self.drop_parameters_first {
            text = without_parameters(&text);
        }
        for _ in 0..self.decode {
            text = decoded(&text);
        }
        if self.drop_parameters_last {
            text = without_parameters(&text);
        }
        if self.backslash_is_slash {
            text = text.replace('\\', "/");
        }
        if self.cut {
            text = cut(&text).to_owned();
        }
        match self.shape {
            Shape::AsIs => text,
            shape => resolved(&text, shape),
        }
    }
}

/// Whether a reading matches a pattern or, since a pattern may have more than one reading too, any form of it.
fn any_form_matches(pattern: &PathMatch, text: &str) -> bool {
    let (wanted, form): (&str, fn(String) -> PathMatch) = match pattern {
        PathMatch::Exact(wanted) => (wanted, PathMatch::Exact),
        PathMatch::PathPrefix(wanted) => (wanted, PathMatch::PathPrefix),
        PathMatch::RegularExpression(_) => return path_matches(pattern, text),
    };
    path_matches(pattern, text)
        || (!is_plain(wanted)
            && Readings::of(wanted)
                .others
                .into_iter()
                .any(|(_, wanted)| path_matches(&form(wanted), text)))
}

/// Each element up to its first semicolon.
fn without_parameters(path: &str) -> String {
    let elements = path
        .split('/')
        .map(|element| element.split(';').next().unwrap_or_default());
    elements.collect::<Vec<_>>().join("/")
}

fn decoded(path: &str) -> String {
    String::from_utf8_lossy(&percent_decode(path.as_bytes())).into_owned()
}

/// Up to what would end a path if it were not escaped.
fn cut(path: &str) -> &str {
    path.split(['?', '#', '\0']).next().unwrap_or_default()
}

fn resolved(path: &str, shape: Shape) -> String {
    let mut elements: Vec<&str> = Vec::new();
    for element in path.strip_prefix('/').unwrap_or(path).split('/') {
        match element {
            "." => {}
            ".." => {
                elements.pop();
            }
            "" if shape == Shape::Merged => {}
            element => elements.push(element),
        }
    }
    let mut text = String::with_capacity(path.len());
    for element in &elements {
        text.push('/');
        text.push_str(element);
    }
    // An empty element at the end of those kept has made its slash already.
    let ends_with_slash = matches!(path.rsplit('/').next(), Some("" | "." | ".."));
    if (ends_with_slash && !text.ends_with('/')) || text.is_empty() {
        text.push('/');
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the path may be beside what was sent.
    fn readings(path: &str) -> Vec<String> {
        let mut texts: Vec<_> = Readings::of(path).others.into_iter().map(|(_, text)| text).collect();
        texts.sort();
        texts
    }

    #[test]
    fn a_path_has_these_readings() {
        let cases: &[(&str, &[&str])] = &[
            ("/a/b", &[]),
            ("/", &[]),
            ("*", &[]),
            ("", &[]),
            ("/a/.b", &[]),
            ("/a//b", &["/a/b"]),
            ("/a/./b", &["/a/b"]),
            ("/a/../b", &["/b"]),
            ("/a//../b", &["/a/b", "/b"]),
            ("/a/b/..", &["/a/"]),
            ("/../..", &["/"]),
            ("/%61dmin", &["/admin"]),
            ("/%2561", &["/%61", "/a"]),
            ("/%252e%252e/x", &["/%2e%2e/x", "/../x", "/x"]),
            ("/a;b/c", &["/a/c"]),
            ("/a/..;x/b", &["/a/../b", "/b"]),
            ("/a/..%3bx/b", &["/a/../b", "/a/..;x/b", "/b"]),
            ("/a;%2f../b", &["/a/b", "/a;/../b", "/a/../b", "/b"]),
            ("/a\\b", &["/a/b"]),
            ("/a%5c..%5cb", &["/a/../b", "/a\\..\\b", "/b"]),
            ("/a%3fb", &["/a", "/a?b"]),
            ("/a%00b", &["/a", "/a\0b"]),
            ("/100%", &[]),
            ("/a/%", &[]),
            ("/a%20b", &["/a b"]),
        ];
        for (path, wanted) in cases {
            let mut wanted: Vec<_> = wanted.iter().map(|text| (*text).to_owned()).collect();
            wanted.sort();
            assert_eq!(readings(path), wanted, "{path}");
        }
    }

    #[test]
    fn what_has_too_many_readings_is_in_doubt() {
        for path in ["/%25252561", "/%252525252525252e/x"] {
            assert!(Readings::of(path).in_doubt, "{path}");
        }
        for path in ["/%252561", "/a%20b%2fc", "/a;b;c/d;e/..;f/g", "/%25%25%25"] {
            assert!(!Readings::of(path).in_doubt, "{path}");
        }
        let wild = "/a;b%3bc%253b/..;d//..%2f./%5c..\\%3f%2500";
        let readings = Readings::of(wild);
        assert!(readings.others.len() <= READINGS_MAX);
        let (public, everything) = (
            [PathMatch::PathPrefix("/nothing".to_owned())],
            [PathMatch::PathPrefix("/".to_owned())],
        );
        if readings.in_doubt {
            assert!(readings.any_matches(&public, wild) && !readings.all_match(&everything, wild));
        }
    }

    /// Servers as they are, each written down by itself: what they take a path for.
    mod server {
        use super::super::percent_decode;

        fn text(bytes: Vec<u8>) -> String {
            String::from_utf8_lossy(&bytes).into_owned()
        }

        /// Resolves dots; `merge` drops empty elements first.
        fn clean(path: &str, merge: bool) -> String {
            let mut kept: Vec<&str> = Vec::new();
            let all: Vec<&str> = path.split('/').skip(1).collect();
            for (index, element) in all.iter().enumerate() {
                let last = index + 1 == all.len();
                match *element {
                    ".." | "." => {
                        if *element == ".." {
                            kept.pop();
                        }
                        if last {
                            kept.push("");
                        }
                    }
                    "" if merge && !last => {}
                    other => kept.push(other),
                }
            }
            format!("/{}", kept.join("/"))
        }

        /// A servlet container: parameters off, decode, backslashes, slashes, dots.
        pub fn servlet(path: &str) -> String {
            let bare: Vec<&str> = path
                .split('/')
                .map(|e| e.split_once(';').map_or(e, |(e, _)| e))
                .collect();
            let decoded = text(percent_decode(bare.join("/").as_bytes()));
            clean(&decoded.replace('\\', "/"), true)
        }

        /// A web server: decode once, merge slashes, resolve dots; a semicolon is a letter.
        pub fn web(path: &str) -> String {
            clean(&text(percent_decode(path.as_bytes())), true)
        }

        /// A library by the RFC: dots are resolved, nothing is decoded.
        pub fn strict(path: &str) -> String {
            clean(path, false)
        }

        /// A proxy that decodes before an application that decodes again.
        pub fn twice(path: &str) -> String {
            web(&web(path))
        }

        /// C: everything ends at a zero byte.
        pub fn c(path: &str) -> String {
            let decoded = text(percent_decode(path.as_bytes()));
            let end = decoded.find('\0').unwrap_or(decoded.len());
            clean(&decoded[..end], true)
        }

        type Read = fn(&str) -> String;
        pub const ALL: [(&str, Read); 5] = [
            ("servlet", servlet),
            ("web", web),
            ("strict", strict),
            ("twice", twice),
            ("c", c),
        ];
    }

    const PATHS: &str = "(/|/|%2[fF]|%252f|\\\\|%5c|\\.|\\.\\.|%2e|%252[eE]|;|%3b|%|%00|%3f|//|a|b|admin|é|%61){1,9}";

    proptest! {
        /// Whatever is allowed below `/a` is below `/a` for every server.
        #[test]
        fn no_server_sees_more_than_was_allowed(rest in PATHS) {
            let path = format!("/a{rest}");
            let wanted = [PathMatch::PathPrefix("/a".to_owned())];
            if Readings::of(&path).all_match(&wanted, &path) {
                for (name, read) in server::ALL {
                    let seen = read(&path);
                    prop_assert!(path_matches(&wanted[0], &seen), "{} reads {} as {}", name, path, seen);
                }
            }
        }

        /// Whatever some server takes for something below `/admin` is denied.
        #[test]
        fn no_server_sees_what_was_denied(rest in PATHS) {
            let path = format!("/{rest}");
            let wanted = [PathMatch::PathPrefix("/admin".to_owned())];
            for (name, read) in server::ALL {
                let seen = read(&path);
                if path_matches(&wanted[0], &seen) {
                    let denied = Readings::of(&path).any_matches(&wanted, &path);
                    prop_assert!(denied, "{} reads {} as {}", name, path, seen);
                }
            }
        }

        /// A path that a rule writes out as it is sent is allowed by it.
        #[test]
        fn a_rule_allows_what_it_writes_out(path in "/([a-c]|%20|%41|;v=1|%2520){0,6}(/[a-c;]{1,3}){0,2}") {
            for wanted in [PathMatch::Exact(path.clone()), PathMatch::PathPrefix(path.clone())] {
                let readings = Readings::of(&path);
                prop_assert!(readings.all_match(std::slice::from_ref(&wanted), &path), "{:?}", readings);
                prop_assert!(readings.any_matches(&[wanted], &path));
            }
        }

        #[test]
        fn any_path_is_survived_and_bounded(path in "\\PC{0,200}") {
            prop_assert!(Readings::of(&path).others.len() <= READINGS_MAX);
        }
    }
}
