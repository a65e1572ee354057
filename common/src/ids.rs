//! Names and ids. Each kind has its own type: a `NodeId` does not fit where an `AllocId` goes.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

/// Declares ids that are UUIDs (version 7: ordered by creation) with a type each.
macro_rules! typed_id {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
        #[serde(transparent)]
        #[schema(value_type = String, format = Uuid)]
        pub struct $name(pub Uuid);

        impl $name {
            /// The first eight hex digits, for people; never for look-ups.
            pub fn short(&self) -> String {
                // The tail of a v7 UUID is random; its head is the time and equal for neighbours.
                let text = self.0.simple().to_string();
                text[text.len() - 8..].to_owned()
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { self.0.fmt(f) }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { write!(f, "{}({})", stringify!($name), self.0) }
        }
        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(s: &str) -> Result<Self, Self::Err> { Uuid::parse_str(s).map($name) }
        }
        impl From<Uuid> for $name {
            fn from(id: Uuid) -> Self { $name(id) }
        }
    )+};
}

typed_id! {
    /// One cluster, from its first start on. A restore to new servers gets a new one.
    ClusterId,
    /// A host that runs the agent.
    NodeId,
    /// One placed copy of a release on a node.
    AllocId,
    /// One move of a workload from a release to another.
    DeploymentId,
    /// A join token.
    TokenId,
    /// One run of a job. That of a scheduled run follows from the job and the instant it was due at.
    RunId,
    /// One API request that changes something; a retry carries the same id.
    RequestId,
}

/// Longest name of a project, environment or workload. A DNS label, so that names can be addresses.
pub const NAME_MAX: usize = 63;

/// A name of a project, environment, workload or port: `[a-z][a-z0-9-]{0,62}`, not ending in `-`.
///
/// Shared: names are part of every key, and look-ups by key clone them by the hundred thousand.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, utoipa::ToSchema)]
#[schema(value_type = String, pattern = "^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$")]
pub struct Name(Arc<str>);

/// Why a text is not a [`Name`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("a name must not be empty")]
    Empty,
    #[error("`{0}` is longer than {NAME_MAX} characters")]
    TooLong(String),
    #[error("`{0}` must start with a letter a-z")]
    Start(String),
    #[error("`{name}` holds {found:?}; only a-z, 0-9 and - may be in a name")]
    Character { name: String, found: char },
    #[error("`{0}` must not end with -")]
    End(String),
}

impl Name {
    /// Checks and takes a name.
    pub fn new(text: impl Into<String>) -> Result<Self, NameError> {
        let text = text.into();
        let Some(first) = text.chars().next() else { return Err(NameError::Empty) };
        if let Some(found) = text.chars().find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '-')) {
            return Err(NameError::Character { name: text, found });
        }
        if !first.is_ascii_lowercase() {
            return Err(NameError::Start(text));
        }
        if text.len() > NAME_MAX {
            return Err(NameError::TooLong(text));
        }
        if text.ends_with('-') {
            return Err(NameError::End(text));
        }
        Ok(Name(text.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}
impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}
impl FromStr for Name {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Name::new(s)
    }
}
impl Serialize for Name {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}
impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Name::new(text).map_err(serde::de::Error::custom)
    }
}

/// A workload in an environment of a project, written `project/environment/workload`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
pub struct WorkloadKey {
    pub project: Name,
    pub environment: Name,
    pub workload: Name,
}

impl fmt::Display for WorkloadKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.project, self.environment, self.workload)
    }
}
impl fmt::Debug for WorkloadKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Serialises through `Display` and `FromStr`; for map keys that must be text in JSON.
pub mod as_text {
    use super::*;

    pub fn serialize<T: fmt::Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }
    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr,
        T::Err: fmt::Display,
        D: Deserializer<'de>,
    {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_labels() {
        for good in ["a", "web", "web-2", &"a".repeat(63)] {
            assert!(Name::new(good).is_ok(), "{good}");
        }
        for bad in ["", "2web", "-web", "web-", "Web", "we b", "wéb", "a/b", "..", &"a".repeat(64)] {
            assert!(Name::new(bad).is_err(), "{bad}");
        }
    }
}
