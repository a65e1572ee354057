//! Where text goes and how it looks: data to stdout, everything else to stderr.
//!
//! Colour, redrawn lines and questions appear on a terminal only. `--json` prints API objects: one
//! document for an answer, one line an object for a stream.

use std::io::{self, IsTerminal, Write};

use clap::ValueEnum;
use comfy_table::{ContentArrangement, Table, presets};
use optimus_common::time::{Span, Timestamp};
use serde::Serialize;

/// `--color`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum ColorChoice {
    // Colour on a terminal, unless `NO_COLOR` is set; `CLICOLOR_FORCE` forces it.
    #[default]
    Auto,
    Always,
    Never,
}

/// Whether to colour; the colours are named after what they say.
#[derive(Debug, Clone, Copy)]
pub struct Paint(pub bool);

/// Colours told apart by eye, for the prefixes of copies.
const COPY_COLOURS: [&str; 6] = ["36", "33", "32", "35", "34", "96"];

impl Paint {
    fn with(self, style: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{style}m{text}\x1b[0m") } else { text.to_owned() }
    }
    pub fn bold(self, text: &str) -> String {
        self.with("1", text)
    }
    pub fn dim(self, text: &str) -> String {
        self.with("2", text)
    }
    pub fn error(self, text: &str) -> String {
        self.with("1;31", text)
    }
    pub fn bad(self, text: &str) -> String {
        self.with("31", text)
    }
    pub fn good(self, text: &str) -> String {
        self.with("32", text)
    }
    pub fn busy(self, text: &str) -> String {
        self.with("33", text)
    }
    /// The colour of the `n`th copy seen.
    pub fn copy(self, n: usize, text: &str) -> String {
        self.with(COPY_COLOURS[n % COPY_COLOURS.len()], text)
    }
}

/// What is on the other side of stdout and stderr.
#[derive(Debug, Clone, Copy)]
pub struct Terminal {
    pub json: bool,
    pub stdin_tty: bool,
    pub stdout_tty: bool,
    pub stderr_tty: bool,
    stdout_colour: bool,
    stderr_colour: bool,
}

impl Terminal {
    pub fn detect(choice: ColorChoice, json: bool) -> Self {
        let (stdout_tty, stderr_tty) = (io::stdout().is_terminal(), io::stderr().is_terminal());
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let forced = set("CLICOLOR_FORCE") && std::env::var_os("CLICOLOR_FORCE").is_some_and(|value| value != "0");
        let decide = |tty: bool| colour(choice, tty && !dumb, set("NO_COLOR"), forced);
        Terminal {
            json,
            stdin_tty: io::stdin().is_terminal(),
            stdout_tty,
            stderr_tty: stderr_tty && !dumb,
            stdout_colour: decide(stdout_tty),
            stderr_colour: decide(stderr_tty),
        }
    }

    pub fn stdout_paint(&self) -> Paint {
        Paint(self.stdout_colour)
    }

    pub fn stderr_paint(&self) -> Paint {
        Paint(self.stderr_colour)
    }

    /// One line of data.
    pub fn line(&self, text: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.write_all(b"\n")?;
        out.flush()
    }

    /// One line to the side: progress, what to do next.
    pub fn note(&self, text: &str) {
        self.note_raw(&format!("{text}\n"));
    }

    /// Text to the side, as it is. A closed stderr is no reason to stop.
    pub fn note_raw(&self, text: &str) {
        let _ = io::stderr().lock().write_all(text.as_bytes());
    }

    /// One document, for `--json`.
    pub fn json_document(&self, value: &impl Serialize) -> io::Result<()> {
        let text = if self.stdout_tty { serde_json::to_string_pretty(value) } else { serde_json::to_string(value) };
        self.line(&text.map_err(io::Error::other)?)
    }

    /// One object of a stream, for `--json`.
    pub fn json_line(&self, value: &impl Serialize) -> io::Result<()> {
        self.line(&serde_json::to_string(value).map_err(io::Error::other)?)
    }

    /// A table without borders; columns are wrapped to the terminal, never in a pipe.
    pub fn table(&self, header: &[&str], rows: Vec<Vec<String>>) -> io::Result<()> {
        self.line(&self.render_table(header, rows))
    }

    fn render_table(&self, header: &[&str], rows: Vec<Vec<String>>) -> String {
        let paint = self.stdout_paint();
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_content_arrangement(if self.stdout_tty { ContentArrangement::Dynamic } else { ContentArrangement::Disabled });
        table.set_header(header.iter().map(|name| paint.dim(name)));
        for row in rows {
            table.add_row(row);
        }
        // The first column starts at the margin, so that a line can be cut by its fields.
        if let Some(column) = table.column_mut(0) {
            column.set_padding((0, 1));
        }
        table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
    }
}

/// The rule behind `--color`, `NO_COLOR` and `CLICOLOR_FORCE`.
fn colour(choice: ColorChoice, tty: bool, no_color: bool, forced: bool) -> bool {
    match choice {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        ColorChoice::Auto => !no_color && (forced || tty),
    }
}

/// `3s`, `2m`, `5h`, `12d`: the largest unit, for tables.
pub fn age(span: Span) -> String {
    let seconds = span.0 / 1000;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// `430ms`, `1.4s`, `12s`, `3m20s`: how long something took.
pub fn took(span: Span) -> String {
    match span.0 {
        0..1000 => format!("{}ms", span.0),
        1000..10_000 => format!("{}.{}s", span.0 / 1000, span.0 % 1000 / 100),
        10_000..60_000 => format!("{}s", span.0 / 1000),
        _ => Span(span.0 / 1000 * 1000).to_string(),
    }
}

/// Wall-clock time of this machine.
pub fn now() -> Timestamp {
    Timestamp(u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap_or(0))
}

/// `07:46:54` in this machine's zone.
pub fn clock_time(at: Timestamp) -> String {
    i64::try_from(at.0)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .map_or_else(|| at.to_string(), |at| at.to_zoned(jiff::tz::TimeZone::system()).strftime("%H:%M:%S").to_string())
}

/// `1 copy`, `3 copies`.
pub fn count(n: u64, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

#[cfg(test)]
mod tests {
    use super::*;

    pub fn plain() -> Terminal {
        Terminal { json: false, stdin_tty: false, stdout_tty: false, stderr_tty: false, stdout_colour: false, stderr_colour: false }
    }

    #[test]
    fn tables_are_borderless_and_start_at_the_margin() {
        let text = plain().render_table(&["NAME", "READY"], vec![vec!["web".into(), "3/3".into()], vec!["api".into(), "".into()]]);
        assert_eq!(text, "NAME  READY\nweb   3/3\napi");
    }

    #[test]
    fn ages_show_their_largest_unit() {
        for (ms, text) in [(0, "0s"), (59_999, "59s"), (60_000, "1m"), (3_600_000, "1h"), (100_000_000, "27h"), (200_000_000, "2d")] {
            assert_eq!(age(Span(ms)), text);
        }
        for (ms, text) in [(430, "430ms"), (1430, "1.4s"), (9_990, "9.9s"), (12_345, "12s"), (200_000, "3m20s")] {
            assert_eq!(took(Span(ms)), text);
        }
    }

    #[test]
    fn no_color_beats_force_and_flags_beat_both() {
        assert!(colour(ColorChoice::Auto, true, false, false));
        assert!(!colour(ColorChoice::Auto, true, true, true));
        assert!(colour(ColorChoice::Auto, false, false, true));
        assert!(!colour(ColorChoice::Auto, false, false, false));
        assert!(colour(ColorChoice::Always, false, true, false));
        assert!(!colour(ColorChoice::Never, true, false, true));
    }
}
