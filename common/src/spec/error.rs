//! Errors with a place, shown the way a compiler shows them.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use super::ERRORS_MAX;
use crate::api::v1::FieldError;
use crate::reason::code;

/// One thing wrong with a spec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecError {
    pub message: String,
    /// What to do, shown beside the caret.
    pub hint: Option<String>,
    /// Bytes of the source it is about.
    pub span: Option<Range<usize>>,
    /// Keys from the root to the value.
    pub path: Vec<String>,
}

impl SpecError {
    pub fn new(span: Option<Range<usize>>, message: impl Into<String>) -> Self {
        SpecError { message: message.into(), hint: None, span, path: Vec::new() }
    }
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
    /// RFC 6901.
    pub fn pointer(&self) -> String {
        self.path.iter().map(|key| format!("/{}", key.replace('~', "~0").replace('/', "~1"))).collect()
    }
}

/// Everything wrong with a file, in the order of its lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecErrors {
    pub file: String,
    source: String,
    /// At most [`ERRORS_MAX`].
    pub errors: Vec<SpecError>,
    /// How many more there are.
    pub more: usize,
}

impl SpecErrors {
    pub(super) fn new(file: &str, source: &str, mut errors: Vec<SpecError>) -> Self {
        errors.sort_by_key(|e| e.span.as_ref().map_or(0, |s| s.start)); // stable: the order found breaks ties
        // The same line is read once for each environment.
        let mut seen = BTreeSet::new();
        errors.retain(|e| seen.insert((e.span.as_ref().map(|s| (s.start, s.end)), e.pointer(), e.message.clone())));
        let more = errors.len().saturating_sub(ERRORS_MAX);
        errors.truncate(ERRORS_MAX);
        SpecErrors { file: printable(file), source: source.to_owned(), errors, more }
    }
}

impl std::error::Error for SpecErrors {}

impl fmt::Display for SpecErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, error) in self.errors.iter().enumerate() {
            if n > 0 {
                writeln!(f)?;
            }
            self.one(f, error)?;
        }
        match self.more {
            0 => Ok(()),
            more => writeln!(f, "\nand {more} more"),
        }
    }
}

impl SpecErrors {
    /// As the API lists them in a `Problem`.
    pub fn field_errors(&self) -> Vec<FieldError> {
        let message = |e: &SpecError| e.hint.as_ref().map_or_else(|| e.message.clone(), |hint| format!("{}; {hint}", e.message));
        self.errors.iter().map(|e| FieldError { pointer: e.pointer(), message: message(e) }).collect()
    }

    fn one(&self, f: &mut fmt::Formatter<'_>, error: &SpecError) -> fmt::Result {
        writeln!(f, "error[{}]: {}", code::INVALID_SPEC.code, error.message)?;
        let hint = error.hint.as_deref().unwrap_or("");
        let Some(span) = &error.span else {
            let pointer = error.pointer();
            if !pointer.is_empty() {
                writeln!(f, "  at {}", printable_up_to(&pointer, 200))?; // its keys are the user's
            }
            return if hint.is_empty() { Ok(()) } else { writeln!(f, "  {hint}") };
        };
        // The very end is shown behind the last line that has text, not on an empty one after it.
        let start = if span.start >= self.source.len() { self.source.trim_end().len() } else { floor(&self.source, span.start) };
        let line_start = self.source[..start].rfind('\n').map_or(0, |at| at + 1);
        let line_end = self.source[start..].find('\n').map_or(self.source.len(), |at| start + at);
        let line = self.source[line_start..line_end].trim_end_matches('\r');
        let number = self.source[..line_start].matches('\n').count() + 1;
        let before = &self.source[line_start..start];
        let column = before.chars().count() + 1;
        let end = floor(&self.source, span.end).clamp(start, line_start + line.len().max(start - line_start));
        let width = self.source[start..end].chars().count().max(1);
        let gutter = number.to_string().len();
        // Tabs and long lines would put the caret in another column than the text.
        let (shown, pad) = window(line, column, width);
        writeln!(f, "{:gutter$}--> {}:{number}:{column}", " ", self.file)?;
        writeln!(f, "{:gutter$} |", " ")?;
        writeln!(f, "{}", format!("{number} | {shown}").trim_end())?;
        let carets = "^".repeat(width.min(LINE_SHOWN));
        writeln!(f, "{:gutter$} | {}{}{}{hint}", " ", " ".repeat(pad), carets, if hint.is_empty() { "" } else { " " })
    }
}

/// Most characters of a source line that are shown.
const LINE_SHOWN: usize = 100;

/// The part of a line that holds the place, printable, and the column of the place in it (from 0).
fn window(line: &str, column: usize, width: usize) -> (String, usize) {
    let clean: Vec<char> = line.chars().map(|c| if is_printable(c) { c } else { ' ' }).collect();
    let at = column - 1;
    let first = if at + width.min(LINE_SHOWN / 2) > LINE_SHOWN { at.saturating_sub(LINE_SHOWN / 2) } else { 0 };
    let shown: String = clean.iter().skip(first).take(LINE_SHOWN).collect();
    (shown.trim_end().to_owned(), at - first)
}

/// Control and direction-changing characters would let a file rewrite the terminal it is shown on.
fn is_printable(c: char) -> bool {
    !c.is_control() && !matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

/// Text of the user inside a message: escaped where it does not print, and short.
pub(super) fn printable(text: &str) -> String {
    printable_up_to(text, 60)
}

fn printable_up_to(text: &str, longest: usize) -> String {
    let escaped = |c: char| if is_printable(c) { c.to_string() } else { c.escape_default().to_string() };
    let clean: String = text.chars().take(longest).map(escaped).collect();
    if text.chars().count() > longest { format!("{clean}...") } else { clean }
}

/// Reads a quantity or a name. Their errors repeat the text, which need not be fit for that.
pub(super) fn parse<T: FromStr<Err: fmt::Display>>(text: &str) -> Result<T, String> {
    text.parse::<T>().map_err(|error| {
        let message = error.to_string();
        let clean = printable(text);
        if clean == text { message } else { message.replace(text, &clean) }
    })
}

/// The candidate a writer most likely meant by `word`.
pub(super) fn nearest<'k>(word: &str, known: &[&'k str]) -> Option<&'k str> {
    if word.len() > 64 {
        return None;
    }
    let word = word.to_lowercase();
    let most = 1 + word.chars().count() / 4;
    let distance = |k: &&'k str| strsim::osa_distance(&word, &k.to_lowercase());
    let near = known.iter().copied().map(|k| (distance(&k), k)).filter(|(d, k)| *d <= most && d + 1 < k.len().max(word.len()));
    near.min_by_key(|(d, _)| *d).map(|(_, k)| k)
}

/// The nearest character boundary at or before `at`.
fn floor(text: &str, at: usize) -> usize {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}
