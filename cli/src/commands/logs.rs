//! `optimus logs`

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use optimus_common::api::v1::{LogRecord, Page, Workload};
use optimus_common::{Span, Timestamp, WorkloadKey};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::args::Global;
use crate::client::{Client, Lines};
use crate::commands::{ScopeArgs, Session};
use crate::error::{Exit, Failure, printable};
use crate::output::{Terminal, clock_time};
use crate::target;

pub const EXAMPLES: &str = "Examples:
  optimus logs web               the last lines of all copies of web, in order of time
  optimus logs web-0 -f          one copy, and go on with new lines
  optimus logs --since 5m        all workloads, the last five minutes
  optimus logs web --tail all";

/// Lines of each copy when neither --tail nor --since is given.
const TAIL_DEFAULT: u32 = 100;
/// Most workloads read at once.
const WORKLOADS_MAX: usize = 32;
/// Lines under way between the readers and the output.
const QUEUE_MAX: usize = 1024;
/// A broken stream is taken up again after a pause, for at most this long.
const REOPEN_PAUSE: Duration = Duration::from_millis(500);
const REOPEN_FOR: Duration = Duration::from_secs(60);
/// Stream name of the server's own remarks: whose output is missing, and why.
const REMARK: &str = "optimus";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// `web`, `env/web`, `project/env/web`, or a copy such as `web-0`; none: all workloads in scope
    #[arg(value_name = "WORKLOAD|COPY")]
    target: Option<String>,
    /// Go on with new lines until Ctrl-C
    #[arg(long, short)]
    follow: bool,
    /// Last lines of each copy, or `all` [default: 100, or all with --since]
    #[arg(long, short = 'n', value_name = "N", value_parser = tail)]
    tail: Option<Tail>,
    /// Only lines of the last 5m, 2h, ..., or from a time on (RFC 3339)
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<String>,
    /// Show the time of each line
    #[arg(long, short)]
    timestamps: bool,
    #[command(flatten)]
    scope: ScopeArgs,
}

/// `--tail`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tail {
    All,
    Last(u32),
}

fn tail(text: &str) -> Result<Tail, String> {
    match text {
        "all" => Ok(Tail::All),
        number => number.parse().map(Tail::Last).map_err(|_| "write a number of lines, or `all`".to_owned()),
    }
}

fn since(text: &str) -> Result<String, String> {
    let known = text.parse::<Span>().is_ok() || text.parse::<jiff::Timestamp>().is_ok();
    if known { Ok(text.to_owned()) } else { Err("write how long ago, such as 5m or 2h, or a time such as 2026-01-31T12:00:00Z".into()) }
}

/// What is asked of one workload.
#[derive(Clone)]
struct Ask {
    key: WorkloadKey,
    copy: Option<String>,
    tail: Option<u32>,
    since: Option<String>,
    follow: bool,
}

impl Ask {
    fn query(&self) -> Vec<(&'static str, String)> {
        let mut query = Vec::new();
        let Ask { key: _, copy, tail, since, follow } = self;
        query.extend(follow.then(|| ("follow", "true".to_owned())));
        query.extend(tail.map(|tail| ("tail", tail.to_string())));
        query.extend(since.clone().map(|since| ("since", since)));
        query.extend(copy.clone().map(|copy| ("copy", copy)));
        query
    }

    async fn open(&self, client: &Client) -> Result<Lines, Failure> {
        client.stream(&format!("{}/logs", target::path(&self.key)), &self.query(), &format!("cannot read the log of {}", self.key)).await
    }
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let session = Session::open(global, &args.scope, terminal)?;
    let targets = targets(args, &session).await?;
    let tail = match args.tail {
        Some(Tail::Last(lines)) => Some(lines),
        Some(Tail::All) => None,
        None => args.since.is_none().then_some(TAIL_DEFAULT),
    };
    let several = targets.len() > 1;
    let asks = targets.into_iter().map(|(key, copy)| Ask { key, copy, tail, since: args.since.clone(), follow: args.follow });
    let mut printer = Printer { terminal, several, timestamps: args.timestamps, copies: BTreeMap::new() };
    if args.follow {
        return follow(&session.client, asks.collect(), &mut printer).await;
    }
    merge(&session.client, asks.collect(), &mut printer).await
}

async fn targets(args: &Args, session: &Session) -> Result<Vec<(WorkloadKey, Option<String>)>, Failure> {
    if let Some(text) = &args.target {
        let found = target::resolve(&session.client, text, &session.scope, &session.defaults).await?;
        return Ok(vec![(found.key, found.copy.map(|copy| copy.to_string()))]);
    }
    let workloads: Page<Workload> = session.client.list("/v1/workloads", &session.scope.query(), "cannot list the workloads").await?;
    let mut keys: Vec<WorkloadKey> = workloads.items.into_iter().map(|workload| workload.key).collect();
    // In a project's folder its own workloads are meant, if it has any.
    let here: Vec<WorkloadKey> = keys.iter().filter(|key| session.defaults.holds(key)).cloned().collect();
    if !here.is_empty() {
        keys = here;
    }
    match keys.len() {
        0 => Err(Failure::new(Exit::NotFound, "cannot read logs").because("there are no workloads").hint("optimus status")),
        1..=WORKLOADS_MAX => Ok(keys.into_iter().map(|key| (key, None)).collect()),
        many => Err(Failure::usage("cannot read the logs of all workloads at once")
            .because(format!("there are {many}, and at most {WORKLOADS_MAX} are read together"))
            .hint("name one, or narrow it with --project and --env")),
    }
}

/// All that is there, merged by time over the workloads.
async fn merge(client: &Client, asks: Vec<Ask>, printer: &mut Printer) -> Result<(), Failure> {
    let alone = asks.len() == 1;
    let mut heads: Vec<(LogRecord, WorkloadKey, Lines)> = Vec::new();
    for ask in asks {
        let mut lines = match ask.open(client).await {
            // One of several without copies yet is no error.
            Err(failure) if !alone && failure.exit == Exit::NotFound => continue,
            opened => opened?,
        };
        if let Some(first) = lines.next().await? {
            heads.push((first, ask.key, lines));
        }
    }
    while let Some(earliest) = (0..heads.len()).min_by_key(|&at| heads[at].0.at) {
        let (_, key, lines) = &mut heads[earliest];
        let next = lines.next::<LogRecord>().await?;
        let key = key.clone();
        let record = match next {
            Some(next) => std::mem::replace(&mut heads[earliest].0, next),
            None => heads.swap_remove(earliest).0,
        };
        printer.print(&key, &record)?;
    }
    Ok(())
}

/// New lines as they come; streams that break are taken up again where they ended.
async fn follow(client: &Client, asks: Vec<Ask>, printer: &mut Printer) -> Result<(), Failure> {
    let (sender, mut records) = mpsc::channel(QUEUE_MAX);
    let mut readers = JoinSet::new();
    for ask in asks {
        readers.spawn(read_on(client.clone(), ask, sender.clone()));
    }
    drop(sender);
    let interrupt = tokio::signal::ctrl_c();
    tokio::pin!(interrupt);
    loop {
        tokio::select! {
            received = records.recv() => match received {
                Some(Ok((key, record))) => printer.print(&key, &record)?,
                Some(Err(failure)) => return Err(failure),
                None => return Ok(()),
            },
            _ = &mut interrupt => return Err(Failure::quiet(Exit::Interrupted)),
        }
    }
}

type Received = Result<(WorkloadKey, LogRecord), Failure>;

async fn read_on(client: Client, mut ask: Ask, records: mpsc::Sender<Received>) {
    let mut newest = Newest::default();
    let mut broken_since: Option<Instant> = None;
    loop {
        let failure = match read_once(&client, &ask, &mut newest, &records).await {
            Ended::Done => return,
            Ended::Broken(failure) => failure,
            Ended::BrokenAfterLines(failure) => {
                broken_since = None;
                failure
            }
        };
        let since = *broken_since.get_or_insert_with(Instant::now);
        if failure.exit != Exit::Unreachable || since.elapsed() > REOPEN_FOR {
            // Nobody listens only when the output is closed.
            let _ = records.send(Err(failure)).await;
            return;
        }
        if let Some(at) = newest.at {
            ask.since = Some(at.to_string());
            ask.tail = None;
        }
        tokio::time::sleep(REOPEN_PAUSE).await;
    }
}

enum Ended {
    Done,
    Broken(Failure),
    BrokenAfterLines(Failure),
}

async fn read_once(client: &Client, ask: &Ask, newest: &mut Newest, records: &mpsc::Sender<Received>) -> Ended {
    let mut lines = match ask.open(client).await {
        Ok(lines) => lines,
        Err(failure) => return Ended::Broken(failure),
    };
    let mut any = false;
    loop {
        match lines.next::<LogRecord>().await {
            Ok(Some(record)) => {
                any = true;
                if newest.is_new(&record) && records.send(Ok((ask.key.clone(), record))).await.is_err() {
                    return Ended::Done;
                }
            }
            // The workload is gone, or the server ends: told apart by asking again.
            Ok(None) => return Ended::BrokenAfterLines(Failure::new(Exit::Unreachable, format!("the log of {} ended", ask.key))),
            Err(failure) if any => return Ended::BrokenAfterLines(failure),
            Err(failure) => return Ended::Broken(failure),
        }
    }
}

/// Lines of the newest instant seen: a stream taken up from there repeats them.
#[derive(Default)]
struct Newest {
    at: Option<Timestamp>,
    /// Of that instant, by copy and text. Bounded by what fits into a millisecond.
    seen: BTreeSet<(String, String)>,
}

impl Newest {
    fn is_new(&mut self, record: &LogRecord) -> bool {
        let line = (record.copy.clone(), record.text.clone());
        match self.at {
            Some(at) if record.at == at => self.seen.insert(line) || record.stream == REMARK,
            Some(at) if record.at < at => true,
            _ => {
                self.at = Some(record.at);
                self.seen = BTreeSet::from([line]);
                true
            }
        }
    }
}

/// Writes records with the prefix of their copy.
struct Printer {
    terminal: Terminal,
    /// Copies of several workloads: the prefix names the workload in full.
    several: bool,
    timestamps: bool,
    /// Order in which copies were first seen; it picks their colour.
    copies: BTreeMap<String, usize>,
}

impl Printer {
    fn print(&mut self, key: &WorkloadKey, record: &LogRecord) -> Result<(), Failure> {
        if self.terminal.json {
            return Ok(self.terminal.json_line(record)?);
        }
        if record.stream == REMARK {
            let paint = self.terminal.stderr_paint();
            self.terminal.note(&paint.dim(&format!("{}: {}", record.copy, printable(&record.text))));
            return Ok(());
        }
        let name = if self.several { format!("{}/{}", key.environment, record.copy) } else { record.copy.clone() };
        let order = self.copies.len();
        let colour = *self.copies.entry(format!("{key} {}", record.copy)).or_insert(order);
        let paint = self.terminal.stdout_paint();
        let time = if self.timestamps { format!("{} ", clock_time(record.at)) } else { String::new() };
        // In a pipe a program reads the bytes as they were written; a terminal obeys only colours.
        let text = if self.terminal.stdout_tty { tame(&record.text) } else { record.text.clone() };
        self.terminal.line(&format!("{} {time}{text}", paint.copy(colour, &format!("{name} |"))))?;
        Ok(())
    }
}

/// A line with its colours, but without sequences that move the cursor or write elsewhere.
fn tame(text: &str) -> String {
    if !text.chars().any(|c| c.is_control() && c != '\t') {
        return text.to_owned();
    }
    let mut tamed = String::with_capacity(text.len());
    let mut rest = text;
    let mut coloured = false;
    while let Some(c) = rest.chars().next() {
        if let Some(parameters) = rest.strip_prefix("\x1b[")
            && let Some(end) = parameters.find(|c: char| !matches!(c, '0'..='9' | ';' | ':'))
            && parameters[end..].starts_with('m')
        {
            let length = 2 + end + 1;
            tamed.push_str(&rest[..length]);
            rest = &rest[length..];
            coloured = true;
            continue;
        }
        if c.is_control() && c != '\t' {
            tamed.extend(c.escape_default());
        } else {
            tamed.push(c);
        }
        rest = &rest[c.len_utf8()..];
    }
    if coloured {
        tamed.push_str("\x1b[0m");
    }
    tamed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_keep_their_colour_and_lose_everything_else() {
        assert_eq!(tame("plain\ttext"), "plain\ttext");
        assert_eq!(tame("\x1b[31mred\x1b[0m"), "\x1b[31mred\x1b[0m\x1b[0m");
        assert_eq!(tame("a\x1b[2Jb\x1b]0;title\x07"), "a\\u{1b}[2Jb\\u{1b}]0;title\\u{7}");
        assert_eq!(tame("a\rb"), "a\\rb");
    }

    #[test]
    fn a_stream_taken_up_again_repeats_nothing() {
        let record = |at, text: &str| LogRecord { at: Timestamp(at), copy: "web-0".into(), stream: "stdout".into(), text: text.into() };
        let mut newest = Newest::default();
        assert!(newest.is_new(&record(1, "a")));
        assert!(newest.is_new(&record(2, "b")));
        assert!(newest.is_new(&record(2, "c")));
        assert!(!newest.is_new(&record(2, "b")));
        assert!(newest.is_new(&record(3, "b")));
    }

    #[test]
    fn tail_and_since_are_checked() {
        assert_eq!(tail("all"), Ok(Tail::All));
        assert_eq!(tail("7"), Ok(Tail::Last(7)));
        assert!(tail("-1").is_err() && tail("x").is_err());
        assert!(since("5m").is_ok() && since("2026-01-31T12:00:00Z").is_ok());
        assert!(since("yesterday").is_err() && since("").is_err());
    }
}
