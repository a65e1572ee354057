//! One tree for TOML and JSON, so that both are read by the same walker.
//!
//! Depth, the size of a table and the number of values are bounded here: the walker recurses, looks for keys one after
//! the other, and need not think of it.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::ERRORS_MAX;
use super::error::SpecError;

/// Deepest nesting of tables and lists. The format needs seven levels.
const DEPTH_MAX: usize = 16;
/// Most keys of one table. More than any list of variables or labels may have.
const KEYS_MAX: usize = 2000;
/// Most values of one document.
const VALUES_MAX: usize = 50_000;

#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    pub value: Value,
    /// Place in the source; JSON has none.
    pub span: Option<Range<usize>>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Text(String),
    Integer(i64),
    /// With its text: a variable keeps `1.10` as it was written.
    Float(f64, String),
    Bool(bool),
    List(Vec<Node>),
    Table(Vec<Entry>),
    /// Something no field takes: a date, a null, a number beyond 64 bits.
    Other(&'static str),
}

/// A key with its value, in the order of the source.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    pub key: String,
    pub key_span: Option<Range<usize>>,
    pub node: Node,
    /// Set when an overlay gave it: the overlay's environment.
    pub overlay: Option<String>,
}

impl Value {
    /// What it is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Text(_) => "text",
            Value::Integer(_) => "an integer",
            Value::Float(..) => "a decimal number",
            Value::Bool(_) => "true or false",
            Value::List(_) => "a list",
            Value::Table(_) => "a table",
            Value::Other(what) => what,
        }
    }
}

/// Reads TOML 1.0. Syntax errors come alone: what stands beside one may have been read into the wrong table.
pub fn from_toml(text: &str) -> Result<Node, Vec<SpecError>> {
    if let Some(at) = depth_fault(text) {
        return Err(vec![SpecError::new(Some(at..at + 1), format!("nested more than {DEPTH_MAX} deep"))]);
    }
    let (table, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        return Err(syntax_errors(text, &errors));
    }
    let mut builder = Builder { values: 0 };
    let value = builder.toml_table(table.get_ref(), 0, &(0..0)).map_err(|e| vec![e])?;
    Ok(Node { value, span: Some(table.span()) })
}

/// Reads JSON that has been parsed.
pub fn from_json(value: &serde_json::Value) -> Result<Node, Vec<SpecError>> {
    Builder { values: 0 }.json(value, 0).map_err(|e| vec![e])
}

/// Counts what it builds.
struct Builder {
    values: usize,
}

impl Builder {
    /// Whether a table or list with so many values may be entered.
    fn enter(&mut self, len: usize, depth: usize, is_table: bool, span: Option<&Range<usize>>) -> Result<(), SpecError> {
        self.values = self.values.saturating_add(len);
        let fault = |message: String| Err(SpecError::new(span.cloned(), message));
        match () {
            () if depth > DEPTH_MAX => fault(format!("nested more than {DEPTH_MAX} deep")),
            () if is_table && len > KEYS_MAX => fault(format!("a table of {len} keys; at most {KEYS_MAX} are read")),
            () if self.values > VALUES_MAX => fault(format!("the document holds more than {VALUES_MAX} values")),
            () => Ok(()),
        }
    }

    fn toml_table(&mut self, table: &DeTable<'_>, depth: usize, span: &Range<usize>) -> Result<Value, SpecError> {
        self.enter(table.len(), depth, true, Some(span))?;
        let mut entries = Vec::with_capacity(table.len());
        for (key, value) in table {
            let node = Node { value: self.toml_value(value, depth + 1, &key.span())?, span: Some(value.span()) };
            entries.push(Entry { key: key.get_ref().to_string(), key_span: Some(key.span()), node, overlay: None });
        }
        // The parser sorts by key; people mean the order of the file.
        entries.sort_by_key(|e: &Entry| e.key_span.as_ref().map_or(0, |s| s.start));
        Ok(Value::Table(entries))
    }

    fn toml_value(&mut self, value: &Spanned<DeValue<'_>>, depth: usize, key: &Range<usize>) -> Result<Value, SpecError> {
        Ok(match value.get_ref() {
            DeValue::String(text) => Value::Text(text.to_string()),
            DeValue::Integer(n) => {
                i64::from_str_radix(n.as_str(), n.radix()).map_or(Value::Other("a number beyond 64 bits"), Value::Integer)
            }
            DeValue::Float(n) => {
                n.as_str().parse().map_or(Value::Other("a number we cannot hold"), |f| Value::Float(f, n.as_str().to_owned()))
            }
            DeValue::Boolean(b) => Value::Bool(*b),
            DeValue::Datetime(_) => Value::Other("a date"),
            DeValue::Array(list) => {
                self.enter(list.len(), depth, false, Some(&value.span()))?;
                let mut nodes = Vec::with_capacity(list.len());
                for item in list.iter() {
                    nodes.push(Node { value: self.toml_value(item, depth + 1, &item.span())?, span: Some(item.span()) });
                }
                Value::List(nodes)
            }
            DeValue::Table(table) => self.toml_table(table, depth, key)?,
        })
    }

    fn json(&mut self, value: &serde_json::Value, depth: usize) -> Result<Node, SpecError> {
        use serde_json::Value as Json;
        let value = match value {
            Json::Null => Value::Other("null"),
            Json::Bool(b) => Value::Bool(*b),
            Json::Number(n) => match (n.as_i64(), n.as_f64()) {
                (Some(n), _) => Value::Integer(n),
                // 90.0 is an integer in JSON Schema.
                (None, Some(f)) if f.fract() == 0.0 && f.abs() < 9.0e15 => Value::Integer(f as i64),
                (None, Some(f)) => Value::Float(f, n.to_string()),
                (None, None) => Value::Other("a number we cannot hold"),
            },
            Json::String(text) => Value::Text(text.clone()),
            Json::Array(list) => {
                self.enter(list.len(), depth, false, None)?;
                Value::List(list.iter().map(|item| self.json(item, depth + 1)).collect::<Result<_, _>>()?)
            }
            Json::Object(map) => {
                self.enter(map.len(), depth, true, None)?;
                let mut entries = Vec::with_capacity(map.len());
                for (key, value) in map {
                    entries.push(Entry { key: key.clone(), key_span: None, node: self.json(value, depth + 1)?, overlay: None });
                }
                Value::Table(entries)
            }
        };
        Ok(Node { value, span: None })
    }
}

/// The first error of each line: the parser's later ones on it mostly follow from the first.
fn syntax_errors(text: &str, errors: &[toml::de::Error]) -> Vec<SpecError> {
    let mut lines = std::collections::BTreeSet::new();
    let mut found = Vec::new();
    for error in errors {
        if found.len() > ERRORS_MAX {
            break; // bounds the counting of lines too
        }
        let span = error.span().unwrap_or(0..0);
        let line = text.as_bytes()[..span.start.min(text.len())].iter().filter(|b| **b == b'\n').count();
        if lines.insert(line) {
            found.push(syntax_error(text, span, error.message()));
        }
    }
    found
}

/// A syntax error in words for those who do not know the grammar.
fn syntax_error(text: &str, span: Range<usize>, message: &str) -> SpecError {
    let at = |range: Range<usize>| text.get(range).unwrap_or("");
    let here = at(span.clone());
    let error = |message: &str| SpecError::new(Some(span.clone()), message);
    if message.starts_with("string values must be quoted") {
        return match here.trim() {
            "" => error("a value is missing after `=`"),
            word if word.starts_with(['\u{201c}', '\u{201d}', '\u{2018}', '\u{2019}']) => {
                error("these are typographic quotes").hint("write straight ones: \"...\"")
            }
            word if word.len() < 80 => {
                error("text must be in quotes").hint(format!("write \"{}\"", super::error::printable(word).replace('"', "")))
            }
            _ => error("text must be in quotes"),
        };
    }
    match message {
        m if m.contains("string, expected `\"`") || m.contains("string, expected `'`") => {
            error("the string is not closed").hint("add the quote that ends it")
        }
        m if m.starts_with("invalid basic string, expected non") => {
            error("a string must not hold control characters").hint("write them as \\uXXXX")
        }
        "duplicate key" => error(&format!("`{}` is given twice", super::error::printable(here.trim_matches(['"', '\''])))),
        m if m.starts_with("key with no value") => error("a key must be followed by `=` and a value"),
        m if m.starts_with("unclosed array") => error("the list is not closed").hint("add `]`"),
        m if m.starts_with("unclosed table") => error("the header is not closed").hint("add `]`"),
        m if m.starts_with("missing comma between key-value pairs") => {
            error("the inline table { ... } is not closed, or a comma is missing")
        }
        m if m.starts_with("missing escaped value") => {
            error("`\\` starts an escape, and this is none").hint("double it, or write the text in '...'")
        }
        m if m.starts_with("unexpected leading zero") => error("a number must not start with 0"),
        m if m.starts_with("extra `=`") => error("one `=` is too many"),
        m if m.contains("cannot extend") => {
            let key = super::error::printable(here);
            let hint = format!("a table written as {{ ... }} ends there; write its values as `{key}.NAME = ...`");
            let found = error(&format!("`{key}` has its value already"));
            if m.contains("inline table") { found.hint(hint) } else { found }
        }
        "recursion limit" => error(&format!("nested more than {DEPTH_MAX} deep")),
        // The parser may name what it met and what it expected on lines of their own.
        m => {
            let message = m.lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join("; ");
            error(&format!("not valid TOML: {}", message.trim_end_matches(", expected nothing")))
        }
    }
}

/// The place of the first bracket or dotted key nested deeper than [`DEPTH_MAX`].
///
/// Each level costs the parser, and the release of its tree, stack; so this looks before anything is parsed. It
/// knows strings and comments, and nothing else of TOML.
fn depth_fault(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    let (mut at, mut brackets, mut dots) = (0, 0usize, 0usize);
    while at < bytes.len() {
        match bytes[at] {
            b'#' => {
                at += bytes[at..].iter().position(|b| *b == b'\n').unwrap_or(bytes.len() - at);
                continue;
            }
            quote @ (b'"' | b'\'') => {
                at = string_end(bytes, at, quote);
                continue;
            }
            b'[' | b'{' => (brackets, dots) = (brackets + 1, 0),
            b']' | b'}' => (brackets, dots) = (brackets.saturating_sub(1), 0),
            b'\n' | b'=' | b',' => dots = 0,
            b'.' => dots += 1,
            _ => {}
        }
        if brackets > DEPTH_MAX || dots > DEPTH_MAX {
            return Some(at);
        }
        at += 1;
    }
    None
}

/// The index behind the string that starts at `at`.
fn string_end(bytes: &[u8], at: usize, quote: u8) -> usize {
    let long = bytes[at..].starts_with(&[quote; 3]);
    let mut at = at + if long { 3 } else { 1 };
    while at < bytes.len() {
        match bytes[at] {
            b'\\' if quote == b'"' => at += 2,
            b'\n' if !long => return at,
            b if b == quote && !long => return at + 1,
            b if b == quote && bytes[at..].starts_with(&[quote; 3]) => {
                at += 3;
                let extra = bytes[at..].iter().take(2).take_while(|b| **b == quote).count();
                return at + extra; // `""""` ends with a quote as its last character
            }
            _ => at += 1,
        }
    }
    bytes.len()
}
