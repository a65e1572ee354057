//! Where a workload may run, and where it would rather: what the scheduler is asked.
//!
//! Rules are written as one line each: `label.zone in a, b`. They are kept as lines too, so that what the API shows
//! is what the file said; reading one never fails later than when the file is read.
//!
//! ```text
//! constraint  ATTRIBUTE OPERATOR VALUE      arch = amd64        label.ssd exists      kernel.version >= 5.10
//! affinity    WEIGHT CONSTRAINT             +50 label.disk = ssd                      -20 label.zone = c
//! spread      ATTRIBUTE [VALUE PERCENT, …]  label.zone          label.zone a 70%, b 30%
//! device      [COUNT] TYPE [where …]        nvidia/gpu          2 gpu where memory >= 16G and model ~ A100
//! ```

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::{nearest, printable};
use crate::ids::Name;
use crate::units::Bytes;

/// The priority of a workload that states none. Copies may be displaced by those at least ten points above them.
pub const PRIORITY: u8 = 50;
/// Most rules of one kind.
pub const RULES_MAX: usize = 32;
/// Longest rule.
pub const RULE_MAX: usize = 512;
/// Most memory a compiled pattern may take: patterns come from users.
const PATTERN_SIZE_MAX: usize = 256 << 10;

/// What a workload asks of the nodes it runs on, beside CPU, memory and ports.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Placement {
    /// Rules a node must meet, all of them: `arch = amd64`, `label.zone in a, b`, `kernel.version >= 5.10`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub constraints: Vec<Constraint>,
    /// Rules that make a node better or worse, each with a weight from -100 to 100: `+50 label.disk = ssd`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub affinity: Vec<Affinity>,
    /// Workloads of the same project and environment to keep away from, where there is a choice.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub anti_affinity: Vec<Name>,
    /// Attributes whose values share the copies: evenly, or by percent: `label.zone a 70%, b 30%`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub spread: Vec<Spread>,
    /// At most one copy on a node.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub distinct_hosts: bool,
    /// The pool of nodes to run in. Unset: `default`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<Name>,
    /// 0 to 100; higher ones are placed first and may displace lower ones.
    #[serde(default = "usual_priority", skip_serializing_if = "is_usual_priority")]
    pub priority: u8,
    /// Disk reserved on the node.
    #[serde(default, skip_serializing_if = "no_bytes")]
    pub disk: Bytes,
    /// Devices given to each copy alone: `2 nvidia/gpu where memory >= 16G`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub devices: Vec<DeviceAsk>,
    /// Devices a copy was given. Said to its agent; what a file says here is not heard.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(ignore)]
    pub given: Vec<GivenDevice>,
    /// Volumes the copies use: they run on the node that holds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<Name>,
    /// Where the copies see volumes; one that is not here is told of by `OPTIMUS_VOLUME_NAME` only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<VolumeMount>,
    /// Architectures it was built for; empty: any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub arch: Vec<String>,
}

fn usual_priority() -> u8 {
    PRIORITY
}
fn is_usual_priority(priority: &u8) -> bool {
    *priority == PRIORITY
}
fn no_bytes(bytes: &Bytes) -> bool {
    bytes.0 == 0
}

impl Default for Placement {
    fn default() -> Self {
        Placement {
            constraints: vec![],
            affinity: vec![],
            anti_affinity: vec![],
            spread: vec![],
            distinct_hosts: false,
            pool: None,
            priority: PRIORITY,
            disk: Bytes(0),
            devices: vec![],
            given: vec![],
            volumes: vec![],
            mounts: vec![],
            arch: vec![],
        }
    }
}

impl Placement {
    /// Nothing is asked.
    pub fn is_default(&self) -> bool {
        *self == Placement::default()
    }
}

/// What a rule looks at.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Attribute {
    /// `label.zone`: given by whoever runs the node.
    Label(String),
    /// `attr.kernel.version`, or `kernel.version` for short: found out by the agent.
    Attr(String),
    Node(NodeField),
}

/// What every node has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum NodeField {
    Arch,
    Name,
    Id,
    Pool,
    Cgroup,
    Address,
    Cpu,
    Memory,
    Disk,
}

const NODE_FIELDS: [(&str, NodeField); 9] = [
    ("arch", NodeField::Arch),
    ("name", NodeField::Name),
    ("id", NodeField::Id),
    ("pool", NodeField::Pool),
    ("cgroup", NodeField::Cgroup),
    ("address", NodeField::Address),
    ("cpu", NodeField::Cpu),
    ("memory", NodeField::Memory),
    ("disk", NodeField::Disk),
];

/// First words of what agents find out, so that `attr.` may be left out before them.
const FOUND_OUT: [&str; 6] = ["kernel", "os", "cpu", "cgroup", "driver", "hostname"];

impl Attribute {
    /// Whether two nodes of one class may differ in it.
    pub fn is_own(&self) -> bool {
        match self {
            Attribute::Node(field) => matches!(field, NodeField::Name | NodeField::Id | NodeField::Address),
            Attribute::Attr(name) => name == "hostname",
            Attribute::Label(_) => false,
        }
    }
}

impl FromStr for Attribute {
    type Err = RuleError;
    fn from_str(text: &str) -> Result<Self, RuleError> {
        let shown = printable(text);
        let (root, rest) = text.split_once('.').unwrap_or((text, ""));
        match (root, rest) {
            ("label" | "attr" | "node", "") => Err(RuleError::new(format!("`{shown}` names nothing")).hint(format!("write `{root}.NAME`"))),
            ("label", name) => Ok(Attribute::Label(name.into())),
            ("attr", name) => Ok(Attribute::Attr(name.into())),
            ("node", name) => NODE_FIELDS.iter().find(|(known, _)| *known == name).map(|(_, f)| Attribute::Node(*f)).ok_or_else(|| {
                let known: Vec<&str> = NODE_FIELDS.iter().map(|(name, _)| *name).collect();
                let near = nearest(name, &known)
                    .map_or_else(|| format!("known are {}", known.join(", ")), |k| format!("did you mean `node.{k}`?"));
                RuleError::new(format!("a node has no `{}`", printable(name))).hint(near)
            }),
            ("arch", "") => Ok(Attribute::Node(NodeField::Arch)),
            ("hostname", "") => Ok(Attribute::Attr("hostname".into())),
            (root, rest) if FOUND_OUT.contains(&root) && !rest.is_empty() => Ok(Attribute::Attr(text.into())),
            _ => {
                let hint = if rest.is_empty() && nearest(root, &["arch"]).is_some() {
                    "did you mean `arch`?".to_owned()
                } else {
                    format!("write `label.{shown}` for a label, `attr.{shown}` for what the agent found out")
                };
                Err(RuleError::new(format!("`{shown}` is no attribute of a node")).hint(hint))
            }
        }
    }
}

impl fmt::Display for Attribute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Attribute::Label(name) => write!(f, "label.{name}"),
            Attribute::Attr(name) if FOUND_OUT.contains(&name.split('.').next().unwrap_or("")) => write!(f, "{name}"),
            Attribute::Attr(name) => write!(f, "attr.{name}"),
            Attribute::Node(NodeField::Arch) => write!(f, "arch"),
            Attribute::Node(field) => {
                write!(f, "node.{}", NODE_FIELDS.iter().find(|(_, f)| f == field).map_or("", |(name, _)| name))
            }
        }
    }
}

/// How a value is judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Test {
    Equal(String),
    NotEqual(String),
    /// Compared as versions: part by part, numbers as numbers. A size such as `16G` counts in bytes.
    Compare(Order, String),
    /// Any part of it matches the pattern (ASCII); `^` and `$` bind it to the ends.
    Matches(String),
    DoesNotMatch(String),
    In(Vec<String>),
    NotIn(Vec<String>),
    /// The value is a list parted by commas that holds all of these.
    Contains(Vec<String>),
    /// All hold: `version >= 1.2, < 2`.
    Version(Vec<(Order, String)>),
    Exists,
    NotExists,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Less,
    LessOrEqual,
    Equal,
    MoreOrEqual,
    More,
}

const ORDERS: [(&str, Order); 5] =
    [("<=", Order::LessOrEqual), (">=", Order::MoreOrEqual), ("<", Order::Less), (">", Order::More), ("=", Order::Equal)];

impl Order {
    fn holds(self, found: Ordering) -> bool {
        match self {
            Order::Less => found.is_lt(),
            Order::LessOrEqual => found.is_le(),
            Order::Equal => found.is_eq(),
            Order::MoreOrEqual => found.is_ge(),
            Order::More => found.is_gt(),
        }
    }
    fn sign(self) -> &'static str {
        ORDERS.iter().find(|(_, order)| *order == self).map_or("", |(sign, _)| sign)
    }
}

/// The numbers a version or a size begins with; none when it begins with no number.
fn quantity(text: &str) -> Option<Vec<u64>> {
    let text = text.trim();
    if text.ends_with(['K', 'M', 'G', 'T'])
        && let Ok(bytes) = text.parse::<Bytes>()
    {
        return Some(vec![bytes.0]);
    }
    let mut parts = Vec::new();
    for part in text.strip_prefix('v').unwrap_or(text).split('.').take(8) {
        let digits = part.bytes().take_while(u8::is_ascii_digit).count();
        if digits == 0 {
            break;
        }
        parts.push(part[..digits].parse().ok()?);
        if digits < part.len() {
            break; // `0-23-amd64`: what follows names a build
        }
    }
    (!parts.is_empty()).then_some(parts)
}

/// Compares as versions; unset when one of them begins with no number.
fn compare(one: &str, other: &str) -> Option<Ordering> {
    let (one, other) = (quantity(one)?, quantity(other)?);
    let parts = one.len().max(other.len());
    let at = |list: &[u64], n: usize| list.get(n).copied().unwrap_or(0);
    Some((0..parts).map(|n| at(&one, n).cmp(&at(&other, n))).find(|o| o.is_ne()).unwrap_or(Ordering::Equal))
}

/// ASCII only, so that every server agrees whatever tables it was built with.
fn pattern(text: &str) -> Result<regex::bytes::Regex, String> {
    regex::bytes::RegexBuilder::new(text).unicode(false).size_limit(PATTERN_SIZE_MAX).build().map_err(|error| match error {
        regex::Error::CompiledTooBig(_) => "the pattern is too large".to_owned(),
        other => other.to_string().lines().last().unwrap_or("").trim_start_matches("error: ").to_owned(),
    })
}

impl Test {
    /// Whether a value passes; unset: the node does not have it.
    pub fn holds(&self, value: Option<&str>) -> bool {
        let is = |wanted: &String| value == Some(wanted.as_str());
        let matches = |text: &str| value.is_some_and(|v| pattern(text).is_ok_and(|p| p.is_match(v.as_bytes())));
        let compares = |order: &Order, to: &str| value.and_then(|v| compare(v, to)).is_some_and(|found| order.holds(found));
        match self {
            Test::Equal(wanted) => is(wanted),
            Test::NotEqual(other) => !is(other),
            Test::Compare(order, to) => compares(order, to),
            Test::Matches(text) => matches(text),
            Test::DoesNotMatch(text) => !matches(text),
            Test::In(list) => list.iter().any(is),
            Test::NotIn(list) => !list.iter().any(is),
            Test::Contains(wanted) => value.is_some_and(|v| wanted.iter().all(|w| v.split(',').any(|part| part.trim() == w))),
            Test::Version(range) => range.iter().all(|(order, to)| compares(order, to)),
            Test::Exists => value.is_some(),
            Test::NotExists => value.is_none(),
        }
    }
}

/// A rule over one attribute. Reads from and writes to its line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Constraint {
    pub attribute: Attribute,
    pub test: Test,
}

/// A constraint that is wished for; the weight is from -100 to 100, never 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Affinity {
    pub weight: i8,
    pub rule: Constraint,
}

/// An attribute over whose values the copies are spread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Spread {
    pub attribute: Attribute,
    /// Percent by value, 100 at most together; what is left is shared by all other values. Empty: all alike.
    pub targets: Vec<(String, u8)>,
}

/// Devices a copy gets for itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceAsk {
    pub count: u32,
    /// `gpu`, `nvidia/gpu` or `nvidia/gpu/a100`.
    pub kind: String,
    /// Over the attributes of the devices.
    pub rules: Vec<(String, Test)>,
}

/// A device of the node that a copy has for itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GivenDevice {
    /// `nvidia/gpu/a100`
    pub kind: String,
    pub id: String,
}

/// Where a volume is seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeMount {
    /// One of `volumes`.
    pub volume: Name,
    /// Absolute; made on the node if it is missing, to mount on.
    pub path: String,
}

/// One of `volumes` as it is written: `data`, or `data at /var/lib/shop`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct VolumeUse {
    pub name: Name,
    pub path: Option<String>,
}

impl FromStr for VolumeUse {
    type Err = RuleError;
    fn from_str(text: &str) -> Result<Self, RuleError> {
        let (name, path) = match text.trim().split_once(" at ") {
            Some((name, path)) => (name.trim(), Some(path.trim())),
            None => (text.trim(), None),
        };
        let name = Name::new(name).map_err(|error| RuleError::new(error.to_string()).hint("write `NAME` or `NAME at /PATH`"))?;
        Ok(VolumeUse { name, path: path.map(str::to_owned) })
    }
}

/// Why a volume cannot be seen at a path; unset: it can.
pub(super) fn bad_mount_path(path: &str) -> Option<&'static str> {
    const KERNELS: [&str; 4] = ["/proc", "/sys", "/dev", "/run"];
    let parts: Vec<&str> = path.trim_end_matches('/').split('/').skip(1).collect();
    let below = |root: &str| path.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    match path {
        path if !path.starts_with('/') => Some("it must begin with /"),
        path if path.len() > RULE_MAX || path.contains(char::is_control) => Some("it is too long or holds control characters"),
        _ if parts.is_empty() => Some("the whole root cannot be covered"),
        _ if parts.iter().any(|part| matches!(*part, "" | "." | "..")) => Some("it must be written without `.`, `..` and doubled slashes"),
        _ if KERNELS.iter().any(|root| below(root)) => Some("/proc, /sys, /dev and /run are the system's"),
        _ => None,
    }
}

/// What is wrong with a rule, and what to write instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RuleError {
    pub message: String,
    pub hint: Option<String>,
}

impl RuleError {
    fn new(message: impl Into<String>) -> Self {
        RuleError { message: message.into(), hint: None }
    }
    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// Splits off the name a rule begins with.
fn name_of(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !(c.is_ascii_alphanumeric() || "._-/".contains(c))).unwrap_or(text.len());
    (&text[..end], text[end..].trim_start())
}

fn checked(text: &str) -> Result<&str, RuleError> {
    let text = text.trim();
    match text {
        "" => Err(RuleError::new("the rule is empty")),
        long if long.len() > RULE_MAX => Err(RuleError::new(format!("the rule is longer than {RULE_MAX} bytes"))),
        text if text.chars().any(char::is_control) => Err(RuleError::new("the rule holds control characters")),
        text => Ok(text),
    }
}

fn listed(text: &str) -> Result<Vec<String>, RuleError> {
    let list: Vec<String> = text.split(',').map(|part| part.trim().to_owned()).collect();
    match list.iter().any(String::is_empty) {
        true => Err(RuleError::new("the list has an empty place").hint("write the values with a comma between: a, b")),
        false => Ok(list),
    }
}

const OPERATORS: &str = "=, !=, <, <=, >, >=, ~, !~, in, not in, contains, version, exists, not exists";

/// Reads `OPERATOR VALUE`.
fn test(of: &str, text: &str) -> Result<Test, RuleError> {
    let shown = printable(of);
    let wanted = |value: &str, sign: &str| match value.trim() {
        "" => Err(RuleError::new(format!("nothing follows `{shown} {sign}`")).hint(format!("write `{shown} {sign} VALUE`"))),
        value => Ok(value.to_owned()),
    };
    let number = |value: &str, sign: &str| {
        let value = wanted(value, sign)?;
        match quantity(&value) {
            Some(_) => Ok(value),
            None => Err(RuleError::new(format!("`{}` is no number, version or size, so nothing is {sign} it", printable(&value)))
                .hint("write for example `5.10` or `16G`")),
        }
    };
    let matcher = |value: &str, sign: &str| {
        let value = wanted(value, sign)?;
        match pattern(&value) {
            Ok(_) => Ok(value),
            Err(why) => Err(RuleError::new(format!("`{}` is no pattern: {why}", printable(&value)))),
        }
    };
    let words: Vec<&str> = text.splitn(3, char::is_whitespace).collect();
    let after = |word: &str| text[word.len()..].trim_start();
    match words.as_slice() {
        ["exists"] => return Ok(Test::Exists),
        ["not", "exists"] => return Ok(Test::NotExists),
        ["exists", ..] | ["not", "exists", ..] => {
            return Err(RuleError::new(format!("nothing may follow `{shown} exists`")));
        }
        ["in", ..] => return Ok(Test::In(listed(&wanted(after("in"), "in")?)?)),
        ["not", "in", ..] => return Ok(Test::NotIn(listed(&wanted(after("not").strip_prefix("in").unwrap_or(""), "not in")?)?)),
        ["contains", ..] => return Ok(Test::Contains(listed(&wanted(after("contains"), "contains")?)?)),
        ["version", ..] => {
            let mut range = Vec::new();
            for part in listed(&wanted(after("version"), "version")?)? {
                let (sign, order) = *ORDERS.iter().find(|(sign, _)| part.starts_with(sign)).unwrap_or(&("", Order::Equal));
                range.push((order, number(&part[sign.len()..], "version")?));
            }
            return Ok(Test::Version(range));
        }
        _ => {}
    }
    let signs = ["==", "!=", "!~", "<=", ">=", "=", "<", ">", "~"];
    let Some(sign) = signs.into_iter().find(|sign| text.starts_with(sign)) else {
        let first = words.first().copied().unwrap_or("");
        let message = match first {
            "" => format!("`{shown}` is not compared with anything"),
            word => format!("`{}` is no operator", printable(word)),
        };
        return Err(RuleError::new(message).hint(format!("known are {OPERATORS}")));
    };
    let value = &text[sign.len()..];
    Ok(match sign {
        "=" | "==" => Test::Equal(wanted(value, "=")?),
        "!=" => Test::NotEqual(wanted(value, sign)?),
        "~" => Test::Matches(matcher(value, sign)?),
        "!~" => Test::DoesNotMatch(matcher(value, sign)?),
        _ => {
            let order = ORDERS.iter().find(|(known, _)| *known == sign).map_or(Order::Equal, |(_, order)| *order);
            Test::Compare(order, number(value, sign)?)
        }
    })
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Test::Equal(value) => write!(f, "= {value}"),
            Test::NotEqual(value) => write!(f, "!= {value}"),
            Test::Compare(order, value) => write!(f, "{} {value}", order.sign()),
            Test::Matches(text) => write!(f, "~ {text}"),
            Test::DoesNotMatch(text) => write!(f, "!~ {text}"),
            Test::In(list) => write!(f, "in {}", list.join(", ")),
            Test::NotIn(list) => write!(f, "not in {}", list.join(", ")),
            Test::Contains(list) => write!(f, "contains {}", list.join(", ")),
            Test::Version(range) => {
                let parts: Vec<String> = range.iter().map(|(order, value)| format!("{} {value}", order.sign())).collect();
                write!(f, "version {}", parts.join(", "))
            }
            Test::Exists => write!(f, "exists"),
            Test::NotExists => write!(f, "not exists"),
        }
    }
}

impl FromStr for Constraint {
    type Err = RuleError;
    fn from_str(text: &str) -> Result<Self, RuleError> {
        let text = checked(text)?;
        let (name, rest) = name_of(text);
        if name.is_empty() {
            return Err(RuleError::new(format!("`{}` does not begin with an attribute", printable(text)))
                .hint("write for example \"label.zone = a\""));
        }
        Ok(Constraint { attribute: name.parse()?, test: test(name, rest)? })
    }
}

impl fmt::Display for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.attribute, self.test)
    }
}

impl FromStr for Affinity {
    type Err = RuleError;
    fn from_str(text: &str) -> Result<Self, RuleError> {
        let text = checked(text)?;
        let (word, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let weight = word.parse::<i32>().map_err(|_| {
            RuleError::new(format!("`{}` does not begin with a weight", printable(text)))
                .hint(format!("write \"+50 {}\"; the weight is from -100 to 100", printable(text)))
        })?;
        if weight == 0 || !(-100..=100).contains(&weight) {
            let message = format!("the weight {weight} is not from -100 to 100, or 0, which says nothing");
            return Err(RuleError::new(message).hint("100 for a strong wish, -100 for a strong dislike"));
        }
        Ok(Affinity { weight: weight as i8, rule: rest.parse()? })
    }
}

impl fmt::Display for Affinity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:+} {}", self.weight, self.rule)
    }
}

impl FromStr for Spread {
    type Err = RuleError;
    fn from_str(text: &str) -> Result<Self, RuleError> {
        let text = checked(text)?;
        let (name, rest) = name_of(text);
        let attribute = name.parse()?;
        let mut targets: Vec<(String, u8)> = Vec::new();
        for part in if rest.is_empty() { vec![] } else { listed(rest)? } {
            let target = part.rsplit_once(char::is_whitespace).and_then(|(value, share)| {
                let share = share.strip_suffix('%')?.parse().ok().filter(|s| (1..=100).contains(s))?;
                Some((value.trim().to_owned(), share))
            });
            let Some(target) = target else {
                return Err(RuleError::new(format!("`{}` is no share of the copies", printable(&part)))
                    .hint(format!("write `{name} VALUE 70%, OTHER 30%`, or `{name}` alone for equal shares")));
            };
            if targets.iter().any(|(value, _)| *value == target.0) {
                return Err(RuleError::new(format!("`{}` has two shares", printable(&target.0))));
            }
            targets.push(target);
        }
        let sum: u32 = targets.iter().map(|(_, share)| u32::from(*share)).sum();
        if sum > 100 {
            return Err(RuleError::new(format!("the shares of `{name}` make {sum}%, more than all copies")));
        }
        Ok(Spread { attribute, targets })
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.attribute)?;
        for (n, (value, share)) in self.targets.iter().enumerate() {
            write!(f, "{} {value} {share}%", if n == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl FromStr for DeviceAsk {
    type Err = RuleError;
    fn from_str(text: &str) -> Result<Self, RuleError> {
        let text = checked(text)?;
        let (first, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let (count, named) = match first.parse::<u32>() {
            Ok(count) => (count, rest.trim_start()),
            Err(_) => (1, text),
        };
        let (kind, rest) = name_of(named);
        if !(1..=64).contains(&count) {
            return Err(RuleError::new(format!("a copy can have 1 to 64 devices of a kind, not {count}")));
        }
        if kind.is_empty() || kind.split('/').count() > 3 || kind.split('/').any(str::is_empty) {
            return Err(RuleError::new(format!("`{}` names no kind of device", printable(text)))
                .hint("write \"gpu\", \"nvidia/gpu\" or \"2 nvidia/gpu/a100\""));
        }
        let mut rules = Vec::new();
        if !rest.is_empty() {
            let Some(conditions) = rest.strip_prefix("where ") else {
                return Err(RuleError::new(format!("`{}` after the kind of device is not understood", printable(rest)))
                    .hint(format!("write \"{kind} where memory >= 16G and model ~ A100\"")));
            };
            for condition in conditions.split(" and ") {
                let (name, rest) = name_of(condition.trim());
                rules.push((name.to_owned(), test(name, rest)?));
            }
        }
        Ok(DeviceAsk { count, kind: kind.into(), rules })
    }
}

impl fmt::Display for DeviceAsk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.count, self.kind)?;
        for (n, (name, test)) in self.rules.iter().enumerate() {
            write!(f, " {} {name} {test}", if n == 0 { "where" } else { "and" })?;
        }
        Ok(())
    }
}

/// A rule is stored as its line.
macro_rules! as_line {
    ($($rule:ty),+) => {$(
        impl TryFrom<String> for $rule {
            type Error = RuleError;
            fn try_from(text: String) -> Result<Self, RuleError> {
                text.parse()
            }
        }
        impl From<$rule> for String {
            fn from(rule: $rule) -> String {
                rule.to_string()
            }
        }
    )+};
}
as_line!(Constraint, Affinity, Spread, DeviceAsk);

/// One name for each architecture, whatever it is called elsewhere.
pub fn architecture(text: &str) -> &str {
    match text {
        "x86_64" | "x64" | "x86-64" => "amd64",
        "aarch64" => "arm64",
        "armv7l" | "armhf" => "arm",
        "i686" | "i386" => "386",
        other => other,
    }
}

#[cfg(test)]
#[path = "placement_tests.rs"]
mod tests;
