//! Reading JSON bodies: bounded in bytes and depth, and with no unknown key passed over.

use axum::body::Body;
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use optimus_common::api::v1::FieldError;
use optimus_common::reason::code;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::problem::ApiError;

/// Largest body of a request.
pub const BODY_MAX: usize = 1024 * 1024;
/// Deepest nesting of a body.
pub const DEPTH_MAX: usize = 64;

/// The bytes of a body of type JSON. `optional`: none at all is fine too, whatever its type.
pub(crate) async fn body_bytes(headers: &HeaderMap, body: Body, optional: bool) -> Result<Vec<u8>, ApiError> {
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let is_json = kind.is_some_and(|kind| {
        let essence = kind.split(';').next().unwrap_or_default().trim();
        essence.eq_ignore_ascii_case("application/json")
    });
    if !optional && !is_json {
        return Err(ApiError::unsupported_media(kind));
    }
    let bytes = match Limited::new(body, BODY_MAX).collect().await {
        Ok(collected) => collected.to_bytes().to_vec(),
        Err(error) if error.downcast_ref::<LengthLimitError>().is_some() => return Err(ApiError::too_large(BODY_MAX)),
        Err(error) => return Err(ApiError::bad_request(format!("the body could not be read: {error}"))),
    };
    if optional && !bytes.is_empty() && !is_json {
        return Err(ApiError::unsupported_media(kind));
    }
    Ok(bytes)
}

/// Reads a value from a body.
pub(crate) fn parse<T: DeserializeOwned + Serialize>(bytes: &[u8]) -> Result<T, ApiError> {
    if depth_exceeds(bytes, DEPTH_MAX) {
        return Err(ApiError::bad_request(format!("the body is nested deeper than {DEPTH_MAX} levels")));
    }
    let given: Value = serde_json::from_slice(bytes).map_err(|error| ApiError::bad_request(format!("the body is not JSON: {error}")))?;
    let value: T = serde_json::from_slice(bytes).map_err(|error| ApiError::bad_request(format!("the body: {error}")))?;
    let known = serde_json::to_value(&value).map_err(ApiError::internal)?;
    let mut unknown = Vec::new();
    unknown_keys(&given, &known, &mut String::new(), &mut unknown);
    if unknown.is_empty() {
        return Ok(value);
    }
    let detail = match unknown.as_slice() {
        [one] => format!("`{}` is not a known field", one.pointer),
        more => format!("{} fields are not known", more.len()),
    };
    Err(ApiError::invalid(code::INVALID_SPEC, detail, unknown))
}

/// Whether brackets nest deeper than `limit`. Reads bytes once, holds nothing.
fn depth_exceeds(bytes: &[u8], limit: usize) -> bool {
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    for &byte in bytes {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'{' | b'[' => {
                depth += 1;
                if depth > limit {
                    return true;
                }
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}

/// Keys of `given` that did not survive reading and writing again: nobody looked at them.
///
/// Works for any type without asking each for `deny_unknown_fields`, which cannot be had together
/// with `flatten`. A key with the value null may go: it says "unset".
fn unknown_keys(given: &Value, known: &Value, at: &mut String, unknown: &mut Vec<FieldError>) {
    match (given, known) {
        (Value::Object(given), Value::Object(known)) => {
            for (key, value) in given {
                let length = at.len();
                at.push('/');
                at.push_str(&key.replace('~', "~0").replace('/', "~1"));
                match known.get(key) {
                    Some(known) => unknown_keys(value, known, at, unknown),
                    None if value.is_null() => {}
                    None => unknown.push(FieldError { pointer: at.clone(), message: "not a known field".into() }),
                }
                at.truncate(length);
            }
        }
        (Value::Array(given), Value::Array(known)) => {
            for (i, (given, known)) in given.iter().zip(known).enumerate() {
                let length = at.len();
                at.push_str(&format!("/{i}"));
                unknown_keys(given, known, at, unknown);
                at.truncate(length);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use optimus_common::api::v1::{DeployRequest, ScaleRequest};

    use super::*;

    #[test]
    fn depth_counts_brackets_outside_strings() {
        assert!(!depth_exceeds(br#"{"a":"[[[[[[","b":[[1]]}"#, 3));
        assert!(depth_exceeds(br#"{"a":[[1]]}"#, 2));
        assert!(!depth_exceeds(br#"["\"[[[["]"#, 1));
    }

    #[test]
    fn unknown_fields_are_named() {
        assert_eq!(parse::<ScaleRequest>(br#"{"copies":3}"#).unwrap().copies, Some(3));
        let error = parse::<ScaleRequest>(br#"{"copies":3,"cop/ies":4}"#).unwrap_err();
        assert_eq!(error.status.as_u16(), 422);
        assert_eq!(error.errors[0].pointer, "/cop~1ies");
        assert_eq!(parse::<ScaleRequest>(br#"{"copies":-1}"#).unwrap_err().status.as_u16(), 400);
    }

    #[test]
    fn fields_deep_in_a_spec_are_looked_at() {
        let error = parse::<DeployRequest>(br#"{"project":"a","environment":"b","workloads":{},"x":{"y":1}}"#).unwrap_err();
        assert_eq!(error.errors[0].pointer, "/x");
    }
}
