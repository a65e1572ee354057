//! Pages by key: the token names the last item seen, so items that come and go shift nothing.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use optimus_common::api::v1::{PAGE_DEFAULT, PAGE_MAX};
use serde::{Deserialize, Serialize};

use super::problem::ApiError;

/// Longest token read.
const TOKEN_MAX: usize = 1024;

/// A page token: the list and filter it belongs to, and the key of the last item.
#[derive(Debug, Serialize, Deserialize)]
struct Token {
    scope: String,
    after: String,
}

/// Which page of a list was asked for.
#[derive(Debug)]
pub(crate) struct PageRequest {
    pub size: usize,
    /// Key of the last item of the page before.
    pub after: Option<String>,
    scope: String,
}

impl PageRequest {
    /// `scope` names list and filters; a token of another one is refused. A size above [`PAGE_MAX`] is cut down to it.
    pub fn new(size: Option<u32>, token: Option<&str>, scope: String) -> Result<Self, ApiError> {
        let size = match size {
            Some(0) => return Err(ApiError::bad_request("query: page_size must be at least 1")),
            Some(size) => (size as usize).min(PAGE_MAX),
            None => PAGE_DEFAULT,
        };
        let after = match token.filter(|token| !token.is_empty()) {
            None => None,
            Some(token) => {
                let bytes = Some(token).filter(|token| token.len() <= TOKEN_MAX).and_then(|token| URL_SAFE_NO_PAD.decode(token).ok());
                let token: Option<Token> = bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok());
                let token = token.ok_or_else(|| ApiError::bad_request("query: page_token is not one of ours"))?;
                if token.scope != scope {
                    return Err(ApiError::bad_request("query: page_token belongs to another list or filter"));
                }
                Some(token.after)
            }
        };
        Ok(PageRequest { size, after, scope })
    }

    /// Takes one page from the items after the last one seen, and the token of the next if there is more.
    pub fn cut<T>(&self, items: impl Iterator<Item = T>, key: impl Fn(&T) -> String) -> (Vec<T>, Option<String>) {
        let mut items = items;
        let page: Vec<T> = items.by_ref().take(self.size).collect();
        let more = items.next().is_some();
        let token = page.last().filter(|_| more).map(|last| self.token(&key(last)));
        (page, token)
    }

    fn token(&self, after: &str) -> String {
        let token = Token { scope: self.scope.clone(), after: after.to_owned() };
        URL_SAFE_NO_PAD.encode(serde_json::to_vec(&token).expect("two strings are JSON"))
    }

    /// The key of the last item seen, read back.
    pub fn after<K: std::str::FromStr>(&self) -> Result<Option<K>, ApiError> {
        let parse = |text: &String| text.parse().map_err(|_| ApiError::bad_request("query: page_token is not one of ours"));
        self.after.as_ref().map(parse).transpose()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn pages_follow_each_other_without_gap_or_overlap() {
        let items: Vec<u32> = (0..25).collect();
        let (mut seen, mut token) = (Vec::new(), None::<String>);
        loop {
            let request = PageRequest::new(Some(10), token.as_deref(), "list".into()).unwrap();
            let after: Option<u32> = request.after().unwrap();
            let rest = items.iter().copied().filter(|n| after.is_none_or(|after| *n > after));
            let (page, next) = request.cut(rest, u32::to_string);
            seen.extend(page);
            match next {
                Some(next) => token = Some(next),
                None => break,
            }
        }
        assert_eq!(seen, items);
    }

    #[test]
    fn a_token_belongs_to_its_filter() {
        let request = PageRequest::new(Some(1), None, "a".into()).unwrap();
        let (_, token) = request.cut([1, 2].into_iter(), |n: &u32| n.to_string());
        assert!(PageRequest::new(None, token.as_deref(), "b".into()).is_err());
        assert!(PageRequest::new(None, Some("!!"), "a".into()).is_err());
        assert!(PageRequest::new(Some(0), None, "a".into()).is_err());
        assert_eq!(PageRequest::new(Some(1_000_000), None, "a".into()).unwrap().size, PAGE_MAX);
    }
}
