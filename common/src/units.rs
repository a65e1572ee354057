//! Quantities that carry their unit, and how people write them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Thousandths of a CPU core. People write cores: `0.5`, in TOML and JSON alike.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, utoipa::ToSchema)]
#[schema(value_type = f64, example = 0.5)]
pub struct Millicores(pub u32);

/// A number of bytes. People write `256M` (binary: 1 K = 1024) or a bare integer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, utoipa::ToSchema)]
#[schema(value_type = u64, example = 268435456)]
pub struct Bytes(pub u64);

/// Why a text is not a quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    #[error("`{0}` is not a size; write a number with K, M, G or T, such as `256M`")]
    Size(String),
    #[error("`{0}` is larger than any size we count")]
    SizeTooLarge(String),
    #[error("`{0}` is not a number of cores; write for example `0.5` or `2`")]
    Cores(String),
    #[error("`{0}` cores are out of range; at least 0.01 and at most 4096")]
    CoresRange(String),
}

impl Millicores {
    /// From a number of cores: finite, 0.01 to 4096; finer than a thousandth is rounded.
    pub fn from_cores(cores: f64) -> Result<Self, UnitError> {
        if !cores.is_finite() {
            return Err(UnitError::Cores(cores.to_string()));
        }
        let millicores = (cores * 1000.0).round();
        if !(10.0..=4_096_000.0).contains(&millicores) {
            return Err(UnitError::CoresRange(cores.to_string()));
        }
        Ok(Millicores(millicores as u32))
    }

    pub fn cores(self) -> f64 {
        f64::from(self.0) / 1000.0
    }
}

impl fmt::Display for Millicores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.cores())
    }
}
impl FromStr for Millicores {
    type Err = UnitError;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let cores: f64 = s.trim().parse().map_err(|_| UnitError::Cores(s.to_owned()))?;
        Millicores::from_cores(cores)
    }
}

const SIZE_UNITS: [(&str, u64); 5] = [("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10), ("", 1)];

impl fmt::Display for Bytes {
    /// The largest unit that divides the number: `64M`, `1536M`, `1000` (bytes).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (suffix, factor) in SIZE_UNITS {
            if self.0 >= factor && self.0.is_multiple_of(factor) {
                return write!(f, "{}{suffix}", self.0 / factor);
            }
        }
        write!(f, "{}", self.0)
    }
}
impl FromStr for Bytes {
    type Err = UnitError;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let bad = || UnitError::Size(s.to_owned());
        let text = s.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let factor: u64 = match unit.trim().to_ascii_uppercase().as_str() {
            "" | "B" => 1,
            "K" | "KB" | "KIB" => 1 << 10,
            "M" | "MB" | "MIB" => 1 << 20,
            "G" | "GB" | "GIB" => 1 << 30,
            "T" | "TB" | "TIB" => 1 << 40,
            _ => return Err(bad()),
        };
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(factor).map(Bytes).ok_or_else(|| UnitError::SizeTooLarge(s.to_owned()));
        }
        let number: f64 = number.parse().map_err(|_| bad())?;
        let bytes = number * factor as f64;
        if factor == 1 {
            return Err(bad()); // half a byte
        }
        if bytes >= 9.0e18 {
            return Err(UnitError::SizeTooLarge(s.to_owned()));
        }
        Ok(Bytes(bytes.round() as u64))
    }
}

impl Bytes {
    pub const fn mib(n: u64) -> Self {
        Bytes(n << 20)
    }

    /// Rounded for reading: `63.9 MiB`.
    pub fn human(self) -> String {
        for (suffix, factor) in [("GiB", 1u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
            if self.0 >= factor {
                let value = self.0 as f64 / factor as f64;
                let text = format!("{value:.1}");
                return format!("{} {suffix}", text.strip_suffix(".0").unwrap_or(&text));
            }
        }
        format!("{} B", self.0)
    }
}

impl Serialize for Millicores {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        if s.is_human_readable() { s.serialize_f64(self.cores()) } else { s.serialize_u32(self.0) }
    }
}
impl<'de> Deserialize<'de> for Millicores {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        if d.is_human_readable() {
            // The range of what may be asked for is a rule of the spec; sums and rests may be anything from zero.
            let millicores = (f64::deserialize(d)? * 1000.0).round();
            let in_range = (0.0..=f64::from(u32::MAX)).contains(&millicores);
            if in_range { Ok(Millicores(millicores as u32)) } else { Err(de::Error::custom("not a number of cores")) }
        } else {
            u32::deserialize(d).map(Millicores)
        }
    }
}
impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u64(self.0)
    }
}
impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        u64::deserialize(d).map(Bytes)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_people_write_them() {
        for (text, bytes) in [("0", 0), ("64M", 64 << 20), ("1.5G", 3 << 29), ("2 KiB", 2048), ("7b", 7), ("1t", 1 << 40)] {
            assert_eq!(text.parse::<Bytes>().unwrap(), Bytes(bytes), "{text}");
        }
        for bad in ["", "M", "-1M", "1.5", "1X", "1..2M", "64 M M", "99999999999T", "1e3M"] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad}");
        }
        assert_eq!(Bytes(64 << 20).to_string(), "64M");
        assert_eq!(Bytes(1000).to_string(), "1000");
        assert_eq!(Bytes(67_000_000).human(), "63.9 MiB");
    }

    #[test]
    fn no_cores_at_all_survive_json() {
        assert_eq!(serde_json::from_str::<Millicores>("0.0").unwrap(), Millicores(0));
        for bad in ["-1", "1e300", "\"1\""] {
            assert!(serde_json::from_str::<Millicores>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn cores_have_a_range() {
        assert_eq!("0.5".parse::<Millicores>().unwrap(), Millicores(500));
        for bad in ["0", "-1", "nan", "inf", "0.001", "5000", "half"] {
            assert!(bad.parse::<Millicores>().is_err(), "{bad}");
        }
    }
}
