//! One tree for TOML and JSON, so that both are read by the same walker.

use std::ops::Range;

use toml::de::{DeTable, DeValue};

use super::error::SpecError;

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
    Float(f64),
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
}

impl Value {
    /// What it is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Text(_) => "text",
            Value::Integer(_) => "an integer",
            Value::Float(_) => "a number",
            Value::Bool(_) => "true or false",
            Value::List(_) => "a list",
            Value::Table(_) => "a table",
            Value::Other(what) => what,
        }
    }
}

/// Reads TOML 1.0. A syntax error has its place.
pub fn from_toml(text: &str) -> Result<Node, SpecError> {
    let table = DeTable::parse(text).map_err(|error| {
        let span = error.span().filter(|s| s.start < text.len() || !text.is_empty());
        // The parser names what it met and what it expected on lines of their own.
        let message = error.message().lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join("; ");
        let at = span.clone().and_then(|s| text.get(s)).unwrap_or_default().trim().to_owned();
        let found = SpecError::new(span.or(Some(0..0)), format!("not valid TOML: {message}"));
        match (message.contains("must be quoted"), at.starts_with(|c: char| c.is_ascii_alphanumeric())) {
            (true, true) => found.hint(format!("put it in quotes: \"{at}\"")),
            (true, false) => found.hint("a value belongs here"),
            _ => found,
        }
    })?;
    let span = table.span();
    Ok(Node { value: toml_table(table.get_ref()), span: Some(span) })
}

fn toml_table(table: &DeTable<'_>) -> Value {
    let mut entries: Vec<Entry> = table
        .iter()
        .map(|(key, value)| Entry {
            key: key.get_ref().to_string(),
            key_span: Some(key.span()),
            node: Node { value: toml_value(value.get_ref()), span: Some(value.span()) },
        })
        .collect();
    entries.sort_by_key(|e| e.key_span.as_ref().map_or(0, |s| s.start));
    Value::Table(entries)
}

fn toml_value(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Integer(n) => i64::from_str_radix(n.as_str(), n.radix()).map_or(Value::Other("a number beyond 64 bits"), Value::Integer),
        DeValue::Float(n) => n.as_str().parse().map_or(Value::Other("a number we cannot hold"), Value::Float),
        DeValue::Boolean(b) => Value::Bool(*b),
        DeValue::Datetime(_) => Value::Other("a date"),
        DeValue::Array(list) => Value::List(list.iter().map(|v| Node { value: toml_value(v.get_ref()), span: Some(v.span()) }).collect()),
        DeValue::Table(table) => toml_table(table),
    }
}

pub fn from_json(value: &serde_json::Value) -> Node {
    use serde_json::Value as Json;
    let value = match value {
        Json::Null => Value::Other("null"),
        Json::Bool(b) => Value::Bool(*b),
        Json::Number(n) => match (n.as_i64(), n.as_f64()) {
            (Some(n), _) => Value::Integer(n),
            // 90.0 is an integer in JSON Schema.
            (None, Some(f)) if f.fract() == 0.0 && f.abs() < 9.0e15 => Value::Integer(f as i64),
            (None, Some(f)) => Value::Float(f),
            (None, None) => Value::Other("a number we cannot hold"),
        },
        Json::String(text) => Value::Text(text.clone()),
        Json::Array(list) => Value::List(list.iter().map(from_json).collect()),
        Json::Object(map) => {
            Value::Table(map.iter().map(|(key, value)| Entry { key: key.clone(), key_span: None, node: from_json(value) }).collect())
        }
    };
    Node { value, span: None }
}
