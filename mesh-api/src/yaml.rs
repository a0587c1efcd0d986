//! YAML that every reader takes for the same: what YAML 1.1 would read as a boolean is put in quotes.
//!
//! `retry: {on: …}` and `mode: off` are words to YAML 1.2 and to this crate; kubectl and Helm read `true` and `false`.
//! Whatever is printed for people to hand on goes through here.

use serde::Serialize;

/// The words that YAML 1.1 takes for booleans and YAML 1.2 does not.
const BOOLEANS: [&str; 6] = ["y", "n", "yes", "no", "on", "off"];

fn is_boolean(word: &str) -> bool {
    BOOLEANS.iter().any(|boolean| word.eq_ignore_ascii_case(boolean))
}

/// A value as YAML.
pub fn to_string(value: &impl Serialize) -> Result<String, serde_yaml_ng::Error> {
    let text = serde_yaml_ng::to_string(value)?;
    let mut out = String::with_capacity(text.len() + 16);
    // How far the lines of a block of text are indented at least, while one is passed.
    let mut block: Option<usize> = None;
    for line in text.lines() {
        let indent = line.len() - line.trim_start_matches(' ').len();
        if block.is_some_and(|least| indent > least || line.trim().is_empty()) {
            out.push_str(line);
        } else {
            block = line.trim_end().ends_with(['|', '>']).then_some(indent);
            let block_signs = ["|-", "|+", ">-", ">+"].iter().any(|sign| line.ends_with(sign));
            block = block.or(block_signs.then_some(indent));
            push_line(&mut out, line);
        }
        out.push('\n');
    }
    Ok(out)
}

/// A line with its key and its value in quotes where they need them.
fn push_line(out: &mut String, line: &str) {
    let mut rest = line;
    // Indentation, and the dashes of lists in lists.
    while let Some(tail) = rest.strip_prefix(' ').or_else(|| rest.strip_prefix("- ")) {
        out.push_str(rest.get(..rest.len() - tail.len()).unwrap_or_default());
        rest = tail;
    }
    let mut push = |word: &str| {
        if is_boolean(word) {
            out.push('\'');
            out.push_str(word);
            out.push('\'');
        } else {
            out.push_str(word);
        }
    };
    match (rest.split_once(": "), rest.strip_suffix(':')) {
        (Some((key, value)), _) if !key.starts_with(['"', '\'']) => {
            push(key);
            push(": ");
            push(value);
        }
        (_, Some(key)) => {
            push(key);
            push(":");
        }
        _ => push(rest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn words_that_old_readers_take_for_booleans_are_quoted() {
        let value = json!({
            "on": ["off", "503", ["no", {"y": "n"}]],
            "mode": "off",
            "text": "first\n  on: x\noff\nlast\n",
            "after": {"Yes": "on", "plain": "once", "number": 1, "bool": true},
            "a: b": "on: x",
        });
        let text = to_string(&value).unwrap();
        let back: Value = serde_yaml_ng::from_str(&text).unwrap();
        assert_eq!(back, value, "{text}");
        for wanted in [
            "'on':\n",
            "- 'off'\n",
            "mode: 'off'\n",
            "'y': 'n'",
            "'Yes': 'on'",
            "- 'no'\n",
            "\n  off\n",
        ] {
            assert!(text.contains(wanted), "{wanted:?} is not in\n{text}");
        }
        assert!(text.contains("bool: true\n") && text.contains("plain: once\n"));
    }
}
