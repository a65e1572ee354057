//! Command lines: split into arguments when they are plain, left to a shell when they use its syntax.

use super::types::Run;

/// First words a shell understands and no program answers to.
const SHELL_WORDS: [&str; 21] = [
    "exec", "cd", "export", "source", ".", ":", "set", "unset", "eval", "ulimit", "umask", "trap", "wait", "if", "for", "while", "until",
    "case", "exit", "alias", "!",
];

/// Reads a line as a person wrote it.
///
/// A line without shell syntax becomes its words, started directly. A line with `$`, `|`, `;`, `&`, `<`, `>`, `*`,
/// `?`, `(`, `)`, `[`, `` ` ``, `~`, a comment, a leading `NAME=value` or a leading shell word is kept as it is for
/// `/bin/sh -c`. Quoted or escaped characters are plain. `Err` says what is wrong with the line.
pub fn parse_line(line: &str) -> Result<Run, &'static str> {
    if line.trim().is_empty() {
        return Err("the command is empty");
    }
    let shell = uses_shell(line)?;
    let words = shell_words::split(line);
    let first_is_shell = |words: &[String]| words.first().is_some_and(|w| SHELL_WORDS.contains(&w.as_str()) || is_assignment(w));
    match words {
        Ok(words) if !shell && !first_is_shell(&words) => match words.first().map(String::as_str) {
            None | Some("") => Err("the command is empty"),
            Some(_) => Ok(Run::Argv(words)),
        },
        _ => Ok(Run::Shell(line.trim().to_owned())),
    }
}

/// Whether the line has shell syntax outside quotes; an open quote is an error for either reading.
fn uses_shell(line: &str) -> Result<bool, &'static str> {
    let mut shell = false;
    let mut word_start = true;
    let mut chars = line.trim().chars().peekable();
    while let Some(c) = chars.next() {
        let at_start = std::mem::replace(&mut word_start, c.is_whitespace());
        match c {
            '\\' => _ = chars.next().ok_or("the command ends in a lone `\\`")?,
            '\'' => loop {
                match chars.next() {
                    Some('\'') => break,
                    Some(_) => {}
                    None => return Err("a `'` in the command is not closed"),
                }
            },
            '"' => loop {
                match chars.next() {
                    Some('"') => break,
                    Some('\\') => _ = chars.next(),
                    Some('$' | '`') => shell = true,
                    Some(_) => {}
                    None => return Err("a `\"` in the command is not closed"),
                }
            },
            '$' | '|' | ';' | '&' | '<' | '>' | '*' | '?' | '(' | ')' | '[' | '`' | '\n' => shell = true,
            '~' | '#' if at_start => {
                shell = true;
                if c == '#' {
                    while chars.next_if(|c| *c != '\n').is_some() {} // quotes in a comment open nothing
                }
            }
            _ => {}
        }
    }
    Ok(shell)
}

fn is_assignment(word: &str) -> bool {
    word.split_once('=').is_some_and(|(name, _)| super::check::is_variable(name))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn plain_lines_become_their_words() {
        for (line, words) in [
            ("python3 app.py", vec!["python3", "app.py"]),
            ("  node  server.js ", vec!["node", "server.js"]),
            ("python3 -c 'print(1); x = \"$HOME\"'", vec!["python3", "-c", "print(1); x = \"$HOME\""]),
            ("a \"b c\" d\\;e", vec!["a", "b c", "d;e"]),
            ("gunicorn app:app --bind=0.0.0.0", vec!["gunicorn", "app:app", "--bind=0.0.0.0"]),
            ("x ''", vec!["x", ""]),
            ("a b#c d~e", vec!["a", "b#c", "d~e"]),
        ] {
            assert_eq!(parse_line(line).unwrap(), Run::Argv(words.into_iter().map(String::from).collect()), "{line}");
        }
    }

    #[test]
    fn shell_syntax_goes_to_the_shell() {
        for line in [
            "a | b",
            "echo $PORT",
            "a && b",
            "a; b",
            "a > f",
            "ls *.py",
            "`a`",
            "FOO=1 a",
            "exec a",
            "cd x",
            "a \"$B\"",
            "a # don't",
            "~/bin/a",
            "a\nb",
            "(a)",
            "[ -f x ]",
        ] {
            assert_eq!(parse_line(line).unwrap(), Run::Shell(line.into()), "{line}");
        }
    }

    #[test]
    fn lines_no_shell_could_read_are_refused() {
        for line in ["", "  ", "a 'b", "a \"b", "a \\", "'' a", "a \"b\\\""] {
            assert!(parse_line(line).is_err(), "{line:?}");
        }
    }
}
