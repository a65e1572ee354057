//! Points in time and lengths of time. Read from a clock only at the edges, passed as arguments inside.

use std::fmt;
use std::ops::{Add, Sub};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Milliseconds since 1970-01-01T00:00:00Z. RFC 3339 in JSON, an integer in binary forms.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, utoipa::ToSchema)]
#[schema(value_type = String, format = DateTime)]
pub struct Timestamp(pub u64);

/// A length of time in milliseconds; written `30s`, `1m30s`, `250ms`, `2h`.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, utoipa::ToSchema)]
#[schema(value_type = String, example = "30s")]
pub struct Span(pub u64);

/// Longest span a user may write: a year.
pub const SPAN_MAX: Span = Span(366 * 24 * 3_600_000);

/// Why a text is not a [`Span`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpanError {
    #[error("`{0}` is not a duration; write a number with ms, s, m, h or d, such as `30s` or `1m30s`")]
    Shape(String),
    #[error("`{0}` is longer than a year")]
    TooLong(String),
}

impl Timestamp {
    /// How long ago `earlier` was; zero if it is in the future.
    pub fn since(self, earlier: Timestamp) -> Span {
        Span(self.0.saturating_sub(earlier.0))
    }
}
impl Add<Span> for Timestamp {
    type Output = Timestamp;
    fn add(self, span: Span) -> Timestamp {
        Timestamp(self.0.saturating_add(span.0))
    }
}
impl Sub<Span> for Timestamp {
    type Output = Timestamp;
    fn sub(self, span: Span) -> Timestamp {
        Timestamp(self.0.saturating_sub(span.0))
    }
}
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match i64::try_from(self.0).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok()) {
            Some(at) => write!(f, "{at:.3}"),
            None => write!(f, "{}ms", self.0),
        }
    }
}
impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "t{}", self.0)
    }
}
impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        if s.is_human_readable() { s.collect_str(self) } else { s.serialize_u64(self.0) }
    }
}
impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        if !d.is_human_readable() {
            return u64::deserialize(d).map(Timestamp);
        }
        let text = String::deserialize(d)?;
        let at: jiff::Timestamp = text.parse().map_err(de::Error::custom)?;
        u64::try_from(at.as_millisecond()).map(Timestamp).map_err(|_| de::Error::custom("a time before 1970"))
    }
}

impl Span {
    pub const fn secs(n: u64) -> Self {
        Span(n * 1000)
    }
    pub const fn millis(n: u64) -> Self {
        Span(n)
    }
    pub const fn as_duration(self) -> Duration {
        Duration::from_millis(self.0)
    }
}
impl From<Duration> for Span {
    fn from(d: Duration) -> Self {
        Span(u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
    }
}

const SPAN_UNITS: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            return f.write_str("0s");
        }
        let mut left = self.0;
        for (unit, factor) in SPAN_UNITS {
            if left >= factor {
                write!(f, "{}{unit}", left / factor)?;
                left %= factor;
            }
        }
        Ok(())
    }
}
impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
impl FromStr for Span {
    type Err = SpanError;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let bad = || SpanError::Shape(s.to_owned());
        let mut rest = s.trim();
        if rest.is_empty() {
            return Err(bad());
        }
        let (mut total, mut previous) = (0u64, u64::MAX);
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
            let number: u64 = rest[..digits].parse().map_err(|_| bad())?;
            rest = &rest[digits..];
            let letters = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
            let (unit, after) = rest.split_at(letters);
            let &(_, factor) = SPAN_UNITS.iter().find(|(name, _)| *name == unit.trim()).ok_or_else(bad)?;
            if factor >= previous {
                return Err(bad()); // `5s1m`, `1s2s`
            }
            previous = factor;
            total = number.checked_mul(factor).and_then(|ms| total.checked_add(ms)).ok_or_else(|| SpanError::TooLong(s.to_owned()))?;
            rest = after;
        }
        if total > SPAN_MAX.0 {
            return Err(SpanError::TooLong(s.to_owned()));
        }
        Ok(Span(total))
    }
}
impl Serialize for Span {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        if s.is_human_readable() { s.collect_str(self) } else { s.serialize_u64(self.0) }
    }
}
impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        if !d.is_human_readable() {
            return u64::deserialize(d).map(Span);
        }
        String::deserialize(d)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn spans_read_back_as_written() {
        for (text, ms) in [("30s", 30_000), ("1m30s", 90_000), ("250ms", 250), ("2h", 7_200_000), ("1d", 86_400_000), ("1s500ms", 1500)] {
            assert_eq!(text.parse::<Span>().unwrap(), Span(ms));
            assert_eq!(Span(ms).to_string(), text);
        }
        for bad in ["", "s", "30", "30 parsecs", "-1s", "1s1m", "1s1s", "1.5s", "400d"] {
            assert!(bad.parse::<Span>().is_err(), "{bad}");
        }
    }

    #[test]
    fn timestamps_are_rfc_3339_in_json() {
        let at = Timestamp(1_700_000_000_123);
        let json = serde_json::to_string(&at).unwrap();
        assert_eq!(json, "\"2023-11-14T22:13:20.123Z\"");
        assert_eq!(serde_json::from_str::<Timestamp>(&json).unwrap(), at);
    }
}
