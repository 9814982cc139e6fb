//! Who may look: a token, where one is configured.
//!
//! Promises: it is compared in constant time, whatever its length, and can be replaced while requests run.

use arc_swap::ArcSwapOption;
use base64::Engine as _;
use hyper::HeaderMap;
use hyper::header::AUTHORIZATION;
use ring::{hmac, rand::SystemRandom};

use crate::config::Secret;

/// What a token is compared through: its keyed hash, which takes the same time whatever is wrong with the other.
struct Token {
    key: hmac::Key,
    tag: hmac::Tag,
}

/// Asks for the token, if there is one.
#[derive(Default)]
pub struct Access(ArcSwapOption<Token>);

impl Access {
    /// Asks for `token`; `None`: for nothing.
    pub fn new(token: Option<&Secret>) -> Access {
        let access = Access::default();
        access.set(token);
        access
    }

    /// The same from now on.
    pub fn set(&self, token: Option<&Secret>) {
        let token = token.map(|secret| {
            // Only a broken system has no randomness; the key hides nothing, so a fixed one is as right.
            let key = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new())
                .unwrap_or_else(|_| hmac::Key::new(hmac::HMAC_SHA256, b"highwater"));
            let tag = hmac::sign(&key, secret.0.as_bytes());
            std::sync::Arc::new(Token { key, tag })
        });
        self.0.store(token);
    }

    /// Whether a request with these headers may look: it has the token as a bearer's, or as the password of
    /// the basic scheme under whatever name, which is what browsers can ask for.
    pub fn allows(&self, headers: &HeaderMap) -> bool {
        let token = self.0.load();
        let Some(token) = token.as_deref() else { return true };
        given(headers).is_some_and(|given| hmac::verify(&token.key, &given, token.tag.as_ref()).is_ok())
    }
}

fn given(headers: &HeaderMap) -> Option<Vec<u8>> {
    let (scheme, rest) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    let rest = rest.trim();
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(rest.as_bytes().to_vec());
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let pair = base64::engine::general_purpose::STANDARD.decode(rest).ok()?;
    let colon = pair.iter().position(|byte| *byte == b':')?;
    Some(pair[colon + 1..].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(authorization: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, authorization.parse().unwrap());
        headers
    }

    #[test]
    fn the_token_opens_as_a_bearers_or_as_a_password_and_nothing_else_does() {
        let access = Access::new(Some(&Secret("s:cret".to_owned())));
        let basic = |pair: &str| format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair));
        for good in [
            "Bearer s:cret".to_owned(),
            "bearer  s:cret".to_owned(),
            basic("anybody:s:cret"),
            basic(":s:cret"),
        ] {
            assert!(access.allows(&with(&good)), "{good}");
        }
        for bad in
            ["Bearer s:cre", "Bearer s:crets", "Bearer", "Bearer ", "Basic s:cret", "Digest s:cret", "s:cret"]
        {
            assert!(!access.allows(&with(bad)), "{bad}");
        }
        for bad in [basic("s:cret"), basic("s:cret:"), basic("s:cret:x")] {
            assert!(!access.allows(&with(&bad)), "{bad}");
        }
        assert!(!access.allows(&HeaderMap::new()));
        access.set(Some(&Secret("other".to_owned())));
        assert!(access.allows(&with("Bearer other")) && !access.allows(&with("Bearer s:cret")));
        access.set(None);
        assert!(access.allows(&HeaderMap::new()));
    }
}
