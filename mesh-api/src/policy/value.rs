//! Durations and regular expressions, checked once.

use std::fmt;

use serde::{Serialize, Serializer};

/// The longest regular expression, in bytes.
pub const REGEX_BYTES_MAX: usize = 1024;
/// The most memory that one compiled regular expression may take.
pub const REGEX_COMPILED_BYTES_MAX: usize = 1 << 20;
/// The most digits of one unit.
const UNIT_DIGITS_MAX: usize = 5;
/// The longest duration: what the form can say in its largest unit alone, eleven years.
const MILLIS_MAX: u64 = 99_999 * 3_600_000;
/// The units of a Gateway API duration, the most significant first.
const UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// A duration in the Gateway API's form (GEP-2257): `1h10m30s500ms`, whole milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Duration(std::time::Duration);

/// Why a text is not a duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a duration")]
pub struct DurationError(pub String);

impl Duration {
    /// From whole milliseconds; brought down to the longest duration, 99999 hours.
    pub const fn from_millis(millis: u64) -> Duration {
        let millis = if millis > MILLIS_MAX { MILLIS_MAX } else { millis };
        Duration(std::time::Duration::from_millis(millis))
    }

    /// As the standard library's type.
    pub const fn as_std(self) -> std::time::Duration {
        self.0
    }

    /// Whether it is zero; the Gateway API's timeouts mean "none" by it.
    pub const fn is_zero(self) -> bool {
        self.0.is_zero()
    }
}

impl std::str::FromStr for Duration {
    type Err = DurationError;

    /// Accepts `^([0-9]{1,5}(h|m|s|ms)){1,4}$`: units may come in any order and more than once, as GEP-2257 has it.
    fn from_str(text: &str) -> Result<Duration, DurationError> {
        let refused = || DurationError(text.chars().take(40).collect());
        let mut rest = text;
        let mut millis = 0u64;
        for _ in 0..UNITS.len() {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            let (number, tail) = rest.split_at_checked(digits).ok_or_else(refused)?;
            if digits == 0 || digits > UNIT_DIGITS_MAX {
                return Err(refused());
            }
            let letters = tail.bytes().take_while(u8::is_ascii_lowercase).count();
            let (unit, tail) = tail.split_at_checked(letters).ok_or_else(refused)?;
            let (_, scale) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(refused)?;
            let number: u64 = number.parse().map_err(|_| refused())?;
            millis += number * scale;
            rest = tail;
            if millis > MILLIS_MAX {
                return Err(refused());
            }
            if rest.is_empty() {
                return Ok(Duration::from_millis(millis));
            }
        }
        Err(refused())
    }
}

impl fmt::Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX);
        if rest == 0 {
            return f.write_str("0s");
        }
        for (unit, scale) in UNITS {
            let count = rest / scale;
            if count > 0 {
                write!(f, "{count}{unit}")?;
                rest %= scale;
            }
        }
        Ok(())
    }
}

impl Serialize for Duration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A regular expression (RE2's syntax, linear time) that must match the whole value, as Envoy and Istio read it.
#[derive(Clone)]
pub struct RegexPattern {
    text: Box<str>,
    regex: regex::Regex,
}

/// Why a text is not a regular expression that we take.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegexError {
    /// Longer than [`REGEX_BYTES_MAX`].
    #[error("is longer than {REGEX_BYTES_MAX} bytes")]
    TooLong,
    /// It compiles to more than [`REGEX_COMPILED_BYTES_MAX`].
    #[error("compiles to more than {REGEX_COMPILED_BYTES_MAX} bytes")]
    TooLarge,
    /// It does not parse; the parser's last line says why.
    #[error("is not a regular expression: {0}")]
    Syntax(String),
}

impl RegexPattern {
    /// Compiles a pattern.
    pub fn new(text: &str) -> Result<RegexPattern, RegexError> {
        if text.len() > REGEX_BYTES_MAX {
            return Err(RegexError::TooLong);
        }
        // Checked by itself first: "a)(b" is not a pattern, though it would be one between our parentheses.
        let compile = |pattern: &str| {
            regex::RegexBuilder::new(pattern)
                .size_limit(REGEX_COMPILED_BYTES_MAX)
                .dfa_size_limit(REGEX_COMPILED_BYTES_MAX)
                .build()
                .map_err(|error| match error {
                    regex::Error::CompiledTooBig(_) => RegexError::TooLarge,
                    other => {
                        let text = other.to_string();
                        let last = text.lines().last().unwrap_or_default().trim();
                        RegexError::Syntax(last.strip_prefix("error: ").unwrap_or(last).to_owned())
                    }
                })
        };
        compile(text)?;
        let regex = compile(&format!(r"\A(?:{text})\z"))?;
        Ok(RegexPattern {
            text: text.into(),
            regex,
        })
    }

    /// The pattern as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether the whole value matches.
    pub fn matches(&self, value: &str) -> bool {
        self.regex.is_match(value)
    }
}

impl PartialEq for RegexPattern {
    fn eq(&self, other: &RegexPattern) -> bool {
        self.text == other.text
    }
}
impl Eq for RegexPattern {}

impl fmt::Debug for RegexPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}/", self.text)
    }
}

impl Serialize for RegexPattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_parsed_or_refused() {
        let cases = [
            ("1h10m30s500ms", Some(4_230_500)),
            ("10m1h", Some(4_200_000)),
            ("1s1s", Some(2_000)),
            ("0s", Some(0)),
            ("99999h", Some(MILLIS_MAX)),
            ("99999h1ms", None),
            ("100000s", None),
            ("1s1s1s1s1s", None),
            ("", None),
            ("1", None),
            ("s", None),
            ("1.5s", None),
            ("-1s", None),
            ("1 s", None),
            ("1S", None),
            ("1d", None),
            ("1µs", None),
        ];
        for (text, millis) in cases {
            let expected = millis.map(Duration::from_millis);
            assert_eq!(text.parse::<Duration>().ok(), expected, "{text:?}");
        }
        assert_eq!("90m".parse::<Duration>().unwrap().to_string(), "1h30m");
    }

    #[test]
    fn a_pattern_matches_the_whole_value() {
        let pattern = RegexPattern::new("a|b.").unwrap();
        assert!(pattern.matches("a") && pattern.matches("bc"));
        assert!(!pattern.matches("ax") && !pattern.matches("xbc") && !pattern.matches("a\n"));
        assert!(RegexPattern::new("a)(b").is_err());
        assert_eq!(
            RegexPattern::new(&"a".repeat(REGEX_BYTES_MAX + 1)),
            Err(RegexError::TooLong)
        );
    }
}
