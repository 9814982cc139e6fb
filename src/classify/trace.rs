//! The `traceparent` that sqlcommenter puts into a comment at the end or the start of a statement. Pure.
//!
//! `SELECT 1 /*action='run',traceparent='00-5bd6...-01'*/`: keys and values are URL-encoded, values stand in single quotes,
//! and a quote within one has a backslash. What is given back is made of hexadecimal digits and dashes alone (the W3C's
//! Trace Context, version 00 and later), so that no client can write into a log by it.

/// Bytes of a comment that are read.
const MOST: usize = 4096;

/// Length of version, trace id, parent id and flags with the dashes between them.
const LENGTH: usize = 55;

/// The traceparent of a statement. `text` may be a text's head and its tail, cut apart anywhere between comments.
pub fn traceparent(text: &[u8]) -> Option<String> {
    trailing(text).and_then(in_comment).or_else(|| leading(text).and_then(in_comment))
}

fn leading(text: &[u8]) -> Option<&[u8]> {
    let body = text.trim_ascii_start().strip_prefix(b"/*")?;
    let body = &body[..body.len().min(MOST)];
    body.windows(2).position(|two| two == b"*/").map(|end| &body[..end])
}

fn trailing(text: &[u8]) -> Option<&[u8]> {
    let blank = |byte: &u8| byte.is_ascii_whitespace() || *byte == b';' || *byte == 0;
    let end = text.iter().rposition(|byte| !blank(byte))? + 1;
    let body = text[..end].strip_suffix(b"*/")?;
    let body = &body[body.len().saturating_sub(MOST)..];
    body.windows(2).rposition(|two| two == b"/*").map(|start| &body[start + 2..])
}

fn in_comment(body: &[u8]) -> Option<String> {
    let mut pairs = Pairs(body);
    let pair = pairs.find(|(key, _)| decoded(key.trim_ascii()) == b"traceparent")?;
    let value = pair.1.trim_ascii();
    let value = value.strip_prefix(b"'").and_then(|v| v.strip_suffix(b"'")).unwrap_or(value);
    valid(&decoded(value))
}

/// The pairs of a comment: a comma within quotes parts none.
struct Pairs<'a>(&'a [u8]);

impl<'a> Iterator for Pairs<'a> {
    type Item = (&'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        while !self.0.is_empty() {
            let (mut quoted, mut escaped) = (false, false);
            let part = |byte: &u8| {
                let parts = *byte == b',' && !quoted;
                quoted ^= *byte == b'\'' && !escaped;
                escaped = *byte == b'\\' && !escaped;
                parts
            };
            let end = self.0.iter().position(part).unwrap_or(self.0.len());
            let (pair, rest) = self.0.split_at(end);
            self.0 = rest.get(1..).unwrap_or_default();
            if let Some(equals) = pair.iter().position(|byte| *byte == b'=') {
                return Some((&pair[..equals], &pair[equals + 1..]));
            }
        }
        None
    }
}

/// Without URL encoding and backslashes.
fn decoded(text: &[u8]) -> Vec<u8> {
    let digit = |byte: Option<&u8>| byte.and_then(|byte| char::from(*byte).to_digit(16));
    let mut out = Vec::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        match (text[at], digit(text.get(at + 1)), digit(text.get(at + 2))) {
            (b'%', Some(high), Some(low)) => {
                out.extend(u8::try_from(high * 16 + low));
                at += 3;
                continue;
            }
            (b'\\', ..) => {}
            (byte, ..) => out.push(byte),
        }
        at += 1;
    }
    out
}

fn valid(value: &[u8]) -> Option<String> {
    // A later version may add more behind a dash.
    let (value, rest) = value.split_at_checked(LENGTH)?;
    let parts: Vec<&[u8]> = value.split(|byte| *byte == b'-').collect();
    let [version, trace, parent, flags] = parts[..] else { return None };
    let hexadecimal = |part: &[u8]| part.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let zero = |part: &[u8]| part.iter().all(|b| *b == b'0');
    let lengths = [version, trace, parent, flags].map(<[u8]>::len) == [2, 32, 16, 2];
    let good = lengths
        && parts.iter().all(|part| hexadecimal(part))
        && version != b"ff"
        && !zero(trace)
        && !zero(parent)
        && (rest.is_empty() || version != b"00" && rest[0] == b'-');
    good.then(|| String::from_utf8_lossy(value).into_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PARENT: &str = "00-5bd66ef5095369c7b0d1f8f4bd33716a-c532cb4098ac3dd2-01";

    #[test]
    fn it_is_found_at_either_end_and_nowhere_else() {
        let check = |text: &str, found: bool| {
            let text = text.replace('@', PARENT);
            assert_eq!(traceparent(text.as_bytes()).as_deref(), found.then_some(PARENT), "{text}");
        };
        check("SELECT 1 /*traceparent='@'*/", true);
        check("SELECT 1 /* traceparent = '@' */ ; \n", true);
        check("/*traceparent='@'*/ SELECT 1", true);
        check(
            "SELECT 1 /*action='%2Fa%2Cb',controller='it\\'s, so',traceparent='@',tracestate='x%3Dy'*/",
            true,
        );
        check("/*traceparent='@'*/ SELECT 1 /* said 'hello' */", true);
        check("SELECT 1 /*traceparent=@*/", true);
        check("SELECT 1 /*trace%70arent='00%2D5bd66ef5095369c7b0d1f8f4bd33716a-c532cb4098ac3dd2-01'*/", true);
        check("SELECT /*traceparent='@'*/ 1", false);
        check("SELECT '/*traceparent=@*/'", false);
        check("SELECT 1 /*mytraceparent='@'*/", false);
        check("SELECT 1 /*action='traceparent=@'*/", false);
        check("SELECT 1 /*traceparent='@x'*/", false);
        check("SELECT 1 /*traceparent='@-more'*/", false);
        check("SELECT 1 traceparent='@'*/", false);
        check("", false);
    }

    #[test]
    fn what_is_none_by_the_standard_is_none() {
        for wrong in [
            "ff-5bd66ef5095369c7b0d1f8f4bd33716a-c532cb4098ac3dd2-01",
            "00-00000000000000000000000000000000-c532cb4098ac3dd2-01",
            "00-5bd66ef5095369c7b0d1f8f4bd33716a-0000000000000000-01",
            "00-5BD66EF5095369C7B0D1F8F4BD33716A-c532cb4098ac3dd2-01",
            "00-5bd66ef5095369c7b0d1f8f4bd33716-ac532cb4098ac3dd2-01",
            "00-5bd66ef5095369c7b0d1f8f4bd33716a-c532cb4098ac3dd2",
            "00-5bd66ef5095369c7b0d1f8f4bd33716a-c532cb4098ac3dd\n-1",
        ] {
            assert_eq!(
                traceparent(format!("SELECT 1 /*traceparent='{wrong}'*/").as_bytes()),
                None,
                "{wrong}"
            );
        }
        let later = format!("/*traceparent='{}-more'*/", PARENT.replacen("00", "01", 1));
        assert!(traceparent(later.as_bytes()).unwrap().starts_with("01-5bd"));
    }

    proptest! {
        #[test]
        fn whatever_is_sent_only_digits_and_dashes_come_out(
            text in proptest::collection::vec(any::<u8>(), 0..200), inside in "[ -~]{0,80}"
        ) {
            let texts = [text, format!("select 1 /*traceparent='{inside}'*/").into_bytes()];
            for text in texts {
                if let Some(found) = traceparent(&text) {
                    prop_assert!(found.len() == LENGTH && found.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-'));
                }
            }
        }
    }
}
