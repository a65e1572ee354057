//! From text to lines, and from a line to the sentence it is an instance of.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, anyhow, ensure};

/// The heading a line stands under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    Given,
    When,
    Then,
}

impl Section {
    pub fn of(line: &str) -> Option<Self> {
        match line {
            "given" => Some(Section::Given),
            "when" => Some(Section::When),
            "then" => Some(Section::Then),
            _ => None,
        }
    }
}

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Section::Given => "given",
            Section::When => "when",
            Section::Then => "then",
        })
    }
}

/// The lines that say something, with their numbers, without comments.
pub fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(n, line)| (n + 1, without_comment(line).trim())).filter(|(_, line)| !line.is_empty())
}

/// The first comment of a file: what it is about.
pub fn title(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.trim().strip_prefix('#')).map(str::trim)
}

fn without_comment(line: &str) -> &str {
    let mut quoted = false;
    for (at, c) in line.char_indices() {
        match c {
            '"' => quoted = !quoted,
            '#' if !quoted => return &line[..at],
            _ => {}
        }
    }
    line
}

/// A word of a line. Quotes keep spaces together: `constraint="arch = amd64"` is one word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    pub text: String,
    /// It began with a quote.
    pub quoted: bool,
}

pub fn tokens(line: &str) -> anyhow::Result<Vec<Token>> {
    let mut tokens = vec![];
    let mut rest = line.trim_start();
    while !rest.is_empty() {
        let mut token = Token { text: String::new(), quoted: rest.starts_with('"') };
        let mut inside = false;
        let mut end = rest.len();
        for (at, c) in rest.char_indices() {
            match c {
                '"' => inside = !inside,
                c if c.is_whitespace() && !inside => {
                    end = at;
                    break;
                }
                c => token.text.push(c),
            }
        }
        ensure!(!inside, "the quote does not end");
        tokens.push(token);
        rest = rest[end..].trim_start();
    }
    Ok(tokens)
}

/// The values of a sentence, by the names its pattern gives them.
#[derive(Debug, Default)]
pub struct Args {
    values: Vec<(&'static str, String)>,
    rest: Vec<String>,
}

impl Args {
    pub fn get(&self, name: &str) -> anyhow::Result<&str> {
        let found = self.values.iter().find(|(n, _)| *n == name);
        found.map(|(_, value)| value.as_str()).with_context(|| format!("the sentence has no {name}"))
    }
    pub fn parse<T: FromStr<Err: fmt::Display>>(&self, name: &str) -> anyhow::Result<T> {
        let value = self.get(name)?;
        value.parse().map_err(|e| anyhow!("`{value}`: {e}"))
    }
    /// What stands for the last part of a pattern that ends in `...`.
    pub fn rest(&self) -> &[String] {
        &self.rest
    }
    /// The rest, which goes by `key=value`.
    pub fn settings(&self) -> anyhow::Result<Vec<(&str, &str)>> {
        self.rest
            .iter()
            .map(|setting| setting.split_once('=').with_context(|| format!("`{setting}`: a setting is written key=value")))
            .collect()
    }
}

/// Whether a line is an instance of a pattern, and if so with which values and how many words in common.
///
/// Of a pattern's words those in lower case stand for themselves, those in UPPER CASE for any word, `"TEXT"` for a quoted
/// text, and a last one with `...` for all that is left, which may be nothing.
pub fn matches(pattern: &'static str, line: &[Token]) -> Option<(usize, Args)> {
    let mut args = Args::default();
    let mut literal = 0;
    let mut left = line.iter();
    for part in pattern.split_whitespace() {
        if part.ends_with("...") {
            args.rest = left.map(|t| t.text.clone()).collect();
            return Some((literal, args));
        }
        let token = left.next()?;
        if let Some(name) = part.strip_prefix('"') {
            if !token.quoted {
                return None;
            }
            args.values.push((name.trim_end_matches('"'), token.text.clone()));
        } else if part.chars().all(|c| c.is_ascii_uppercase() || c == '-') {
            args.values.push((part, token.text.clone()));
        } else if part == token.text && !token.quoted {
            literal += 1;
        } else {
            return None;
        }
    }
    left.next().is_none().then_some((literal, args))
}

/// Two values that should be the same are not.
#[derive(Debug, thiserror::Error)]
#[error("found `{found}`, expected {}`{expected}`", if *.contained { "it to say " } else { "" })]
pub struct Mismatch {
    pub found: String,
    pub expected: String,
    /// It is enough that `found` contains `expected`.
    pub contained: bool,
}

pub fn same(found: &str, expected: &str) -> anyhow::Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Mismatch { found: found.into(), expected: expected.into(), contained: false }.into())
}

pub fn says(found: &str, expected: &str) -> anyhow::Result<()> {
    if found.contains(expected) {
        return Ok(());
    }
    Err(Mismatch { found: found.into(), expected: expected.into(), contained: true }.into())
}
