//! Which series a Prometheus server asks for: `optimus_node_memory_bytes{node=~"db-.*"}`.
//!
//! The grammar is that of Prometheus' instant vector selectors without offset and `@`.

use regex::Regex;

/// Longest selector.
pub const SELECTOR_MAX: usize = 4096;
/// Most matchers of one selector.
const MATCHERS_MAX: usize = 32;
/// What a compiled expression may take.
const REGEX_BYTES_MAX: usize = 1 << 20;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{selector}` is not a selector: {why}")]
pub struct SelectorError {
    pub selector: String,
    pub why: String,
}

#[derive(Debug)]
enum Test {
    Equal(String),
    NotEqual(String),
    Matches(Regex),
    NotMatches(Regex),
}

/// One selector: every matcher must hold.
#[derive(Debug)]
pub struct Selector {
    matchers: Vec<(String, Test)>,
}

/// The label that holds the metric's name.
const NAME: &str = "__name__";

impl Selector {
    pub fn parse(text: &str) -> Result<Selector, SelectorError> {
        let shown: String = text.chars().take(120).collect();
        let fail = |why: String| SelectorError { selector: shown.clone(), why };
        if text.len() > SELECTOR_MAX {
            return Err(fail(format!("it is longer than {SELECTOR_MAX} bytes")));
        }
        let mut rest = Rest(text.trim());
        let mut matchers = Vec::new();
        let name = rest.word(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':');
        if !name.is_empty() {
            matchers.push((NAME.to_owned(), Test::Equal(name.to_owned())));
        }
        rest.space();
        if rest.take("{") {
            loop {
                rest.space();
                if rest.take("}") {
                    break;
                }
                let label = rest.word(|c| c.is_ascii_alphanumeric() || c == '_').to_owned();
                if label.is_empty() {
                    return Err(fail(format!("a label was expected at `{}`", rest.shown())));
                }
                rest.space();
                let Some(operator) = ["=~", "!~", "!=", "="].into_iter().find(|op| rest.take(op)) else {
                    return Err(fail(format!("=, !=, =~ or !~ was expected at `{}`", rest.shown())));
                };
                rest.space();
                let value = rest.quoted().ok_or_else(|| fail(format!("a quoted value was expected at `{}`", rest.shown())))?;
                let regex = || {
                    // Anchored, as Prometheus does it.
                    let built = regex::RegexBuilder::new(&format!("^(?s:{value})$")).size_limit(REGEX_BYTES_MAX).build();
                    built.map_err(|error| {
                        fail(format!("`{value}` is not an expression: {}", error.to_string().lines().last().unwrap_or_default()))
                    })
                };
                let test = match operator {
                    "=~" => Test::Matches(regex()?),
                    "!~" => Test::NotMatches(regex()?),
                    "!=" => Test::NotEqual(value),
                    _ => Test::Equal(value),
                };
                if matchers.len() >= MATCHERS_MAX {
                    return Err(fail(format!("it has more than {MATCHERS_MAX} matchers")));
                }
                matchers.push((label, test));
                rest.space();
                if !rest.take(",") && !rest.0.starts_with('}') {
                    return Err(fail(format!("`,` or `}}` was expected at `{}`", rest.shown())));
                }
            }
        }
        if !rest.0.trim().is_empty() {
            return Err(fail(format!("nothing more was expected at `{}`", rest.shown())));
        }
        // Prometheus refuses these too: they ask for everything by mistake.
        if !matchers.iter().any(|(_, test)| !test.holds("")) {
            return Err(fail("at least one matcher must exclude an empty value".into()));
        }
        Ok(Selector { matchers })
    }

    /// Whether a series of this name and these labels is asked for. A label it does not have is empty.
    pub fn matches(&self, name: &str, labels: &[(&str, &str)]) -> bool {
        self.matchers.iter().all(|(label, test)| {
            let value = if label == NAME { name } else { labels.iter().find(|(l, _)| l == label).map_or("", |(_, v)| v) };
            test.holds(value)
        })
    }
}

impl Test {
    fn holds(&self, value: &str) -> bool {
        match self {
            Test::Equal(wanted) => value == wanted,
            Test::NotEqual(other) => value != other,
            Test::Matches(regex) => regex.is_match(value),
            Test::NotMatches(regex) => !regex.is_match(value),
        }
    }
}

/// What is still to be read.
struct Rest<'a>(&'a str);

impl<'a> Rest<'a> {
    fn space(&mut self) {
        self.0 = self.0.trim_start();
    }
    fn take(&mut self, word: &str) -> bool {
        match self.0.strip_prefix(word) {
            Some(rest) => {
                self.0 = rest;
                true
            }
            None => false,
        }
    }
    fn word(&mut self, part: impl Fn(char) -> bool) -> &'a str {
        let end = self.0.find(|c| !part(c)).unwrap_or(self.0.len());
        let (word, rest) = self.0.split_at(end);
        self.0 = rest;
        word
    }
    fn shown(&self) -> String {
        self.0.chars().take(20).collect()
    }
    /// A value in double or single quotes, with backslash escapes.
    fn quoted(&mut self) -> Option<String> {
        let quote = self.0.chars().next().filter(|c| matches!(c, '"' | '\''))?;
        let mut value = String::new();
        let mut chars = self.0.char_indices().skip(1);
        while let Some((at, c)) = chars.next() {
            match c {
                c if c == quote => {
                    self.0 = &self.0[at + 1..];
                    return Some(value);
                }
                '\\' => match chars.next()?.1 {
                    'n' => value.push('\n'),
                    't' => value.push('\t'),
                    c @ ('\\' | '"' | '\'') => value.push(c),
                    _ => return None,
                },
                c => value.push(c),
            }
        }
        None
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matches(selector: &str, name: &str, labels: &[(&str, &str)]) -> bool {
        Selector::parse(selector).unwrap().matches(name, labels)
    }

    #[test]
    fn selectors_mean_what_prometheus_means() {
        let labels = [("node", "db-1"), ("project", "shop")];
        for (selector, expected) in [
            ("up", true),
            ("down", false),
            (r#"{__name__="up"}"#, true),
            (r#"{__name__=~"u.*"}"#, true),
            (r#"{__name__=~"u"}"#, false),
            (r#"up{node="db-1"}"#, true),
            (r#"up{ node = 'db-1' , project!="x" }"#, true),
            (r#"up{node!~"db-.+"}"#, false),
            (r#"up{zone=""}"#, true),
            (r#"up{zone!=""}"#, false),
            (r#"{node=~"db-1|db-2",}"#, true),
            (r#"up{project="sh\"op"}"#, false),
        ] {
            assert_eq!(matches(selector, "up", &labels), expected, "{selector}");
        }
    }

    #[test]
    fn what_is_no_selector_is_refused_with_the_place() {
        for (selector, why) in [
            ("", "exclude an empty value"),
            ("{}", "exclude an empty value"),
            (r#"{node=~".*"}"#, "exclude an empty value"),
            ("up{", "a label was expected"),
            ("up{node}", "was expected at `}`"),
            ("up{node=db}", "a quoted value was expected at `db}`"),
            (r#"up{node="db"#, "a quoted value"),
            (r#"up{node="db" x}"#, "`,` or `}`"),
            (r#"up{node=~"("}"#, "not an expression"),
            ("up[5m]", "nothing more was expected at `[5m]`"),
        ] {
            let error = Selector::parse(selector).unwrap_err().to_string();
            assert!(error.contains(why), "{selector}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,80}") {
            let _ = Selector::parse(&text);
        }

        #[test]
        fn any_value_can_be_written(value in "[^\\r]{1,20}") {
            let escaped = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let selector = format!("up{{node=\"{escaped}\"}}");
            prop_assert!(matches(&selector, "up", &[("node", &value)]));
        }
    }
}
